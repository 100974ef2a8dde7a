"""Side-by-side timings, each a ratio of two things that run in this process, in turn.

    python results/bench.py generate [--rounds 5]    our generate against transformers' (which it needs), with experts too
    python results/bench.py experts                  a PMoL training step with 16 experts against one with 4
    python results/bench.py mixture                  generation through MidPO's mixture against one expert and the base
    python results/bench.py train|ablation|growth    what training costs: see bench_train.py
    python results/bench.py memory                   bytes a weight of a training step, by default and with --low_memory
    python results/bench.py rounding [--rounds 3]    losses of runs with --low_memory beside those of float32 runs
    python results/bench.py refusals FILE.csv …      the refusal rule against human labels: XSTest's completion files

The median of the rounds' ratios is what counts, as it is the figure that other work on the machine disturbs least.
Models are made here, of random weights.
"""
import argparse
import copy
import csv
import io
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import batch as batch_file  # noqa: E402
import bench_train  # noqa: E402
import common  # noqa: E402
import losses  # noqa: E402
import methods  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from batch import Encoded, pack  # noqa: E402
from checkpoint import load_model, save_model  # noqa: E402
from judges import refuses  # noqa: E402
from lora_moe import add_experts, router_weights, trainable_parameters  # noqa: E402
from model import ModelConfig, Transformer, generate, stream  # noqa: E402

SMALL = dict(model_type="llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
             num_key_value_heads=4, vocab_size=16000, max_position_embeddings=2048, tie_word_embeddings=True)


def timed(function):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def bench_generate(rounds, batch=16):
    """A 33 M parameter Llama in float32, with and without experts, on two works. Equal: a batch of prompts of 32 tokens
    and 64 new ones each, greedy. Answers: 64 prompts of 8 to 64 tokens, sampled; 250 of the 16,000 tokens end an
    answer, so they have 64 tokens on average, 256 at most; transformers gets batches of prompts of like length."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(**{name: value for name, value in SMALL.items() if name != "model_type"}, eos_token_id=None)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = load_model(folder)
    rng = np.random.default_rng(0)
    equal = rng.integers(300, config.vocab_size, (batch, 32)).tolist()
    prompts = sorted((rng.integers(300, config.vocab_size, size).tolist() for size in rng.integers(8, 65, 64)), key=len)
    ends = [*range(3, 253)]

    @torch.no_grad()
    def their_answers(prompts, count, **settings):
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        rows = theirs.generate(tokens, attention_mask=(tokens > 0).long(), max_new_tokens=count, pad_token_id=0,
                               **settings)[:, width:].tolist()
        return sum(len(row) - row.count(0) for row in rows)  # a sampled 0 is as good as never

    def their_batches():
        return sum(their_answers(prompts[i:i + batch], 256, do_sample=True, top_k=0, eos_token_id=ends)
                   for i in range(0, len(prompts), batch))

    def tokens_of(answers):
        return sum(len(ids) for _, ids in answers)

    works = {"equal": (partial(their_answers, equal, 64, min_new_tokens=64, do_sample=False),
                       lambda model: tokens_of(stream(model, equal, 64, batch))),
             "answers": (their_batches, lambda model: tokens_of(stream(model, prompts, 256, batch, 1.0, eos_ids=ends)))}
    with_experts = {"one expert": (1, {"type": "constant"}), "two experts, routed": (2, {"type": "sigmoid"})}
    models = {"base": ours} | {name: add_experts(copy.deepcopy(ours), ["down_proj"], 16, 32, experts, router=router)
                               for name, (experts, router) in with_experts.items()}
    for work, (their_way, our_way) in works.items():
        ratios = {name: [] for name in models}
        for i in range(rounds + 1):
            seconds, tokens = timed(their_way)
            their_speed = tokens / seconds
            for name, model in models.items():
                seconds, tokens = timed(partial(our_way, model))
                if i:  # the first round warms all up
                    ratios[name].append(tokens / seconds / their_speed)
                print(f"{work}, {f'round {i}' if i else 'warm-up'}: transformers {their_speed:6.0f} tokens/s, ours, "
                      f"{name}, {tokens / seconds:6.0f}", flush=True)
        for name, all_rounds in ratios.items():
            print(f"{work}, {name}: median {statistics.median(all_rounds):.2f} x ({min(all_rounds):.2f} to "
                  f"{max(all_rounds):.2f}), batch {batch}, {torch.get_num_threads()} threads")


def compare(rounds, functions):
    """Run the functions in turn, one warm-up round and the rounds; print each one's ratio to the first: the median."""
    times = [[timed(function)[0] for function in functions.values()] for _ in range(rounds + 1)][1:]
    for i, name in enumerate(functions):
        ratios = [row[i] / row[0] for row in times]
        print(f"{name}: {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f}), "
              f"{statistics.median(row[i] for row in times):.3f} s")


def bench_experts(rounds, rank=8, pairs=8, prompt=64, response=64):
    """Forward, backward and optimiser step of PMoL on a 33 M parameter Llama, experts of this rank on down_proj."""
    tokens = np.random.default_rng(0).integers(3, 16000, pairs * (prompt + 2 * response), dtype=np.int32)
    ends = np.arange(pairs)[:, None] * (prompt + 2 * response) + [0, prompt, prompt + response, prompt + 2 * response]
    batch = pack(Encoded(tokens, ends), np.arange(pairs))

    def trainer(experts):
        model = toy.init_weights(Transformer(ModelConfig.from_hf(SMALL)), 0)
        add_experts(model, ["down_proj"], rank, 2 * rank, experts, router={"type": "softmax"})
        optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=1e-4, fused=True)
        target = losses.group_targets(2, experts, [0.5])

        def step():
            logps = batch_file.sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)
            weights = router_weights(model, batch.pair.flatten() >= 0)
            loss = losses.dpo_loss(*logps.T, *torch.zeros(2, pairs), 0.1)[0]
            group = torch.zeros(weights.shape[1], dtype=torch.long)
            loss = loss + losses.expert_group_soft_loss(weights, group, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    compare(rounds, {f"{experts} experts": trainer(experts) for experts in (4, 8, 16)})


def bench_mixture(rounds, batch=16, prompt_length=32, new_tokens=64):
    """Greedy decoding, 33 M parameters; the router's d_r is 512 as in the paper."""
    def policy(experts, router):
        model = toy.init_weights(Transformer(ModelConfig.from_hf(SMALL)), 0)
        return add_experts(model, ["down_proj"], 16, 32, experts, router=router) if experts else model

    prompts = torch.randint(3, 16000, (batch, prompt_length)).tolist()
    models = {"base": policy(0, None), "one expert": policy(1, {"type": "constant"}),
              "two experts, routed": policy(2, {"type": "sigmoid"})}
    compare(rounds, {name: partial(generate, model, prompts, new_tokens) for name, model in models.items()})


LARGER = dict(SMALL, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
              num_key_value_heads=12)


def peak_of_steps(folders, flags):
    """(weights, bytes above those before it at the peak) of two steps of a short pair, all weights trained, on the last
    of these models; the one before loads the libraries."""
    encoded = Encoded(np.arange(3, 27, dtype=np.int32), np.array([[0, 8, 16, 24]]))
    encoded.labels["reference"] = np.zeros((1, 2), dtype=np.float32)
    for folder in folders:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        config = methods.parse_flags(["--method", "dpo", "--model", folder, "--device", "cpu", *flags])
        model = train.build_model(config, folder).train()
        parameters = trainable_parameters(model)
        optimizer = train.make_optimizer(parameters, config)
        for _ in range(2):
            train.train_step(model, parameters, optimizer, encoded, [np.arange(1)], config, {})
    weights = sum(parameter.numel() for _, parameter in parameters)
    return weights, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def bench_memory(rounds):
    """Weights, gradients and moments, and what little such a short pair adds."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"{folder}/tiny", f"{folder}/larger"]
        for path, shape in zip(folders, (dict(SMALL, hidden_size=64, intermediate_size=64), LARGER)):
            save_model(toy.init_weights(Transformer(ModelConfig.from_hf(shape)), 0), path)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else malloc keeps some of what has been freed
        for flags in ((), ("--low_memory",)):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                weights, peak = fresh.apply(peak_of_steps, (folders, flags))
            print(f"{' '.join(flags) or 'float32'}: {weights / 1e6:.0f} M weights, {peak / 1e9:.2f} GB, "
                  f"{peak / weights:.1f} bytes a weight", flush=True)


ROUNDING = {"float32": (), "float32, no clipping": ("--grad_clip", "0"), "--low_memory": ("--low_memory",),
            "--low_memory, rounded to the nearest": ("--low_memory",)}


def bench_rounding(rounds):
    """SafeDPO on toy, all weights, one epoch at toy's rate and at the paper's: held-out losses and margins, a seed a
    round, from 3 on."""
    train.evaluate_run, toy.closing_tables, store = lambda *_, **__: (None, ""), lambda *_: "", train.store
    for rate in ("1.6e-5", "1e-6"):
        ends = {name: [] for name in ROUNDING}
        for seed in range(3, 3 + rounds):
            for i, (name, flags) in enumerate(ROUNDING.items()):
                train.store = store if "nearest" not in name else lambda values, target, noise: store(
                    values, target, torch.full_like(noise, 1 << 15))
                out = f"out/rounding/{rate}-{seed}-{i}"
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    train.main([*"--method safedpo --delta 10 --lora_rank 0 --epochs 1 --device cpu --resume".split(),
                                "--lr", rate, "--seed", str(seed), "--out", out, *flags])
                ends[name].append(common.whole_rows(Path(out) / "metrics.jsonl")[-1])
        for name, rows in ends.items():
            loss, margin = (np.array([row[f"eval/{key}"] for row in rows]) for key in ("loss", "rewards/margins"))
            exact = np.array([row["eval/loss"] for row in ends["float32"]])
            print(f"| {rate} | {name} | {' | '.join(f'{value:.4f}' for value in loss)} | {(loss / exact).mean():.4f} | "
                  f"{margin.mean():.4f} |", flush=True)


def bench_refusals(files):
    """Agreement of eval.refuses with the final human labels, refusal (full or partial) against compliance."""
    shares = []
    for name in files:
        with open(name, encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        shares.append(np.mean([refuses(row["completion"]) == (row["final_label"] != "1_full_compliance")
                               for row in rows]))
        print(f"{Path(name).stem}: {shares[-1]:.4f} of {len(rows)} answers")
    print(f"mean {np.mean(shares):.4f}")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in bench_train.BENCHES:
        raise SystemExit(bench_train.main(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "experts", "mixture", "memory", "rounding", "refusals"])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.what == "refusals":
        bench_refusals(args.files)
    else:
        {"generate": bench_generate, "experts": bench_experts, "mixture": bench_mixture, "memory": bench_memory,
         "rounding": bench_rounding}[args.what](args.rounds)
