"""What training costs: DPO with LoRA experts of rank 16 on down_proj, batches of 8 pairs; called by results/bench.py.

    python results/bench.py train [--work DIR] [--device cuda --shape 1b] [--beside PEER/bin/python]
    python results/bench.py ablation [--work DIR] [--rounds 3] [--only NAME,NAME]
    python results/bench.py growth [--rounds 3] [--clock cpu]

train prints one JSON line about `train.py` on a work folder: DIR/model in Hugging Face layout and DIR/pairs.jsonl of
{"prompt", "chosen", "rejected"}; without --work, random weights of the shape and random pairs. --beside: TRL's turn on
the same folder (results/peer_trl.py), by the python of an environment that has it, and the ratios.
ablation: the steps of train.py with one of its ways to save time or memory taken away, against all of them; growth:
with more pairs, experts, tokens or vocabulary. Every measurement is a process of its own. Model FLOPs are what the
matrix products of a step need: real tokens only, prompts shared, attention dense within a pair, no product for the
gradient of a frozen weight and none below the first expert; LoRA's own, about 1 %, are left out.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import batch as batch_file  # noqa: E402
import common  # noqa: E402
import lora_moe  # noqa: E402
import methods  # noqa: E402
import model as model_file  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from chat import Tokenizer  # noqa: E402
from checkpoint import read_config, save_model  # noqa: E402
from lora_moe import disable_experts  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

SHAPES = {  # width, inner width, layers, heads, heads of keys, vocabulary
    "tiny": (64, 176, 2, 4, 2, 2048), "small": (512, 1536, 8, 8, 4, 16000), "0.5b": (896, 4864, 24, 14, 2, 32000),
    "1b": (2048, 8192, 16, 32, 8, 32000), "7b": (4096, 11008, 32, 32, 32, 32000)}
HH = (90, 44)  # tokens of a prompt and of a response in HH-RLHF's harmless-base pairs, on average
FLAGS = ("--method dpo --view helpful --template raw --lora_rank 16 --lora_targets down_proj --batch_size 8 --lr 1e-5 "
         "--warmup 0 --weight_decay 0 --held_out 0 --log_every 1").split()


def make_work(folder, shape, pairs=64, vocabulary=None, lengths=HH, max_len=512):
    """A model of random weights and random pairs, whose lengths spread as those of dialogues do."""
    width, inner, layers, heads, key_heads, V = SHAPES[shape]
    V = vocabulary or V
    hf = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=width, intermediate_size=inner,
              num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=V,
              max_position_embeddings=4096, rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True,
              bos_token_id=0, eos_token_id=1, pad_token_id=2)
    names = ("<s>", "</s>", "<pad>")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({
        **{name: i for i, name in enumerate(names)}, **{f"w{i}": i for i in range(3, V)}}, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*names])
    save_model(toy.init_weights(Transformer(ModelConfig.from_hf(hf)).requires_grad_(False), 0), folder / "model")
    backend.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>")))
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(pairs):
            spread = rng.lognormal(-0.25, 0.7, 3)
            sizes = (np.array([lengths[0], lengths[1], lengths[1]]) * spread).astype(int).clip(4, max_len // 2 - 2)
            texts = [" ".join(f"w{number}" for number in rng.integers(3, V, size)) for size in sizes]
            file.write(json.dumps({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2],
                                   "group": "ab"[i % 2]}) + "\n")


def process(*command, folder):
    """Run a process in a folder: the JSON object on its last line, with its wall time and peak memory."""
    environment, start = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, time.perf_counter()
    with open(Path(folder) / "output", "w+") as output:
        child = subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)  # subprocess has no peak of one child
        wall = time.perf_counter() - start
        output.seek(0)
        lines = output.read().splitlines()
    if status:
        raise SystemExit("\n".join(lines[-20:]))
    result = json.loads(lines[-1])
    return {"wall_s": wall, "peak_mib": result.pop("gpu_mib", 0) or usage.ru_maxrss / 1024, **result}


# A run of train.py


RUN = """
import json, sys, torch, train
train.main(sys.argv[1:])
print(json.dumps({"gpu_mib": torch.cuda.max_memory_allocated() / 2 ** 20 if torch.cuda.is_available() else 0}))
"""


def products(config, tokens, predicted):
    """[(rows, D_in, D_out, number of them)] forward and backward in a step with this many tokens, whose experts are on
    down_proj: no gradient is needed below that of the first layer. predicted: response tokens."""
    D, I, L = config.hidden_size, config.intermediate_size, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    both = 2 * L - 1
    return [(tokens, D, queries, both), (tokens, queries, D, both), (tokens, D, keys, 2 * both),
            (tokens, D, I, (2 if config.gated_mlp else 1) * both), (tokens, I, D, both),
            (predicted, D, config.vocab_size, 2)]


def matrix_rate(shapes, dtype, device, repeats=20):
    """FLOP/s of these products, x W^T and (as in a backward pass) y W in turn: the best time of each shape."""
    total = best = 0.0
    for rows, width, out, number in shapes:
        x, weight = (torch.randn(size, width, dtype=dtype, device=device) for size in (rows, out))
        times = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            y = F.linear(x, weight)
            x = y @ weight
            synchronize(device)
            times.append(time.perf_counter() - start)
            x /= x.norm() / rows
        total, best = total + 2 * rows * width * out * number, best + min(times[1:]) / 2 * number
    return total / best


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def tokens_of(encoded, order, config):
    """Per step of eight pairs: (real tokens, tokens in packed rows, tokens of padded batches of chosen and rejected
    with a prompt each, response tokens, Σ n² over the pairs), each (steps,)."""
    rows = []
    for indices in np.split(order, range(8, len(order), 8)):
        batch, bounds = batch_file.pack(encoded, indices), encoded.bounds[indices]
        longest = (np.diff(bounds, axis=1)[:, 1:].max(1) + bounds[:, 1] - bounds[:, 0]).max()
        n = encoded.lengths()[indices]
        rows.append((n.sum(), batch.tokens.numel(), 2 * len(indices) * longest, len(batch.target), (n ** 2).sum()))
    return np.array(rows, dtype=float).T


def rounded(value):
    """The same with five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def bench_train(work, device, epochs, peer):
    """One run of train.py on a work folder, and the peer's after it: a JSON line."""
    cuda, model = device.startswith("cuda"), read_config(work / "model")
    dtype = "bfloat16" if cuda else "float32"
    flags = [*FLAGS, "--model", work / "model", "--data", work / "pairs.jsonl", "--epochs", epochs, "--device", device,
             "--dtype", dtype, *(["--compile"] if cuda else [])]
    config = methods.parse_flags([*map(str, flags)])
    encoded, _ = train.load_data(config, Tokenizer(config.model, config.template))
    real, packed, padded, predicted, squares = tokens_of(encoded, train.training_order(encoded, config), config)
    shapes = products(model, int(real.mean()), int(predicted.mean()))
    rates = [matrix_rate(shapes, common.DTYPES[dtype], device)]
    with tempfile.TemporaryDirectory() as folder:
        ours = process(sys.executable, "-c", RUN, *flags, folder=folder)
        rows = common.whole_rows(Path(folder) / "out/dpo/metrics.jsonl")
    rates.append(matrix_rate(shapes, common.DTYPES[dtype], device))
    step_s = real / [row["tokens/s"] for row in rows]
    attention = 4 * model.num_heads * model.head_dim * (3 * model.num_layers - 2) * squares.sum()
    flops = len(rows) * sum(2 * rows * width * out * number for rows, width, out, number in shapes) + attention
    pairs = len(encoded) * epochs
    report = {"pairs": len(encoded), "epochs": epochs, "device": device, "dtype": dtype, "threads": torch.get_num_threads(),
              "process_s": ours["wall_s"], "loop_s": float(step_s.sum()), "process_pairs_per_s": pairs / ours["wall_s"],
              "loop_pairs_per_s": pairs / step_s.sum(), "median_step_s": float(np.median(step_s)),
              "peak_mib": ours["peak_mib"], "tokens": int(real.sum()), "tokens_in_rows": int(packed.sum()),
              "tokens_padded_unshared": int(padded.sum()), "model_gflops_per_s": flops / step_s.sum() / 1e9,
              "matrix_gflops_per_s": max(rates) / 1e9, "share_of_matrix_rate": flops / step_s.sum() / max(rates),
              "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
    if peer:
        with tempfile.TemporaryDirectory() as folder:
            theirs = process(peer, ROOT / "results" / "peer_trl.py", work, "--epochs", epochs, "--device", device,
                             folder=folder)
        report["trl"] = theirs
        report |= {"process_ratio": theirs["wall_s"] / ours["wall_s"], "loop_ratio": theirs["loop_s"] / step_s.sum(),
                   "memory_ratio": ours["peak_mib"] / theirs["peak_mib"],
                   "first_loss_difference": abs(theirs["first_loss"] - rows[0]["loss"])}
    print(json.dumps(rounded(report)))


# Steps of train.py in a process of their own, with something switched off


def switch(target, name, value):
    def change(state):
        setattr(target, name, value)
    return change


def unshared(state):
    """Every response with its own copy of the prompt."""
    encoded = state["encoded"]
    bounds, pieces, ends = encoded.bounds, [], []
    for prompt, *responses in (np.split(encoded.tokens[row[0]:row[-1]], row[1:-1] - row[0]) for row in bounds):
        for response in responses:
            pieces += [prompt, response]
            ends.append((len(prompt), len(response)))
    sizes = np.cumsum(np.array(ends).flatten()).reshape(-1, 2)
    apart = batch_file.Encoded(np.concatenate(pieces), np.concatenate([sizes[:, :1] - np.array(ends)[:, :1], sizes], axis=1))
    encoded.labels["number"] = np.arange(len(encoded))

    def forward(model, batch):
        numbers = batch.labels["number"].numpy()
        return batch_file.policy_logps(model, batch_file.pack(apart, np.stack([2 * numbers, 2 * numbers + 1], 1).flatten())
                                   ).view(batch.lengths.shape)
    set_forward(forward)


def set_forward(forward):
    methods.policy_logps = forward


def reference_again(state):
    def forward(model, batch):
        with torch.no_grad(), disable_experts(model):
            batch_file.policy_logps(model, batch)
        return batch_file.policy_logps(model, batch)
    set_forward(forward)


def logits_everywhere(state):
    """The other positions' log-probs are computed too, and count for nothing."""
    def forward(model, batch):
        hidden = model(batch.tokens, batch.positions, batch.mask())
        others = torch.ones(batch.tokens.numel(), dtype=torch.bool).index_fill(0, batch.predictor, False).nonzero()[:, 0]
        rest = replace(batch, predictor=others, target=torch.zeros_like(others), owner=torch.zeros_like(others))
        return batch_file.sequence_logps(model, hidden, batch) + 0 * batch_file.sequence_logps(model, hidden, rest)
    set_forward(forward)


def logits_twice(head, states, target):
    """The way of a head that is trained."""
    return checkpoint(lambda states, target: -F.cross_entropy(head(states).float(), target, reduction="none"),
                      states, target, use_reentrant=False)


def unfrozen(state):
    state["model"].requires_grad_(True)


class LoopedAdamW(torch.optim.AdamW):
    def step(self):
        self.found_inf = None  # which the fused one alone reads
        super().step()


def looped_optimizer(state):
    groups = [{key: group[key] for key in ("params", "weight_decay", "factor")}
              for group in state["optimizer"].param_groups]
    state["optimizer"] = LoopedAdamW(groups, lr=1e-5, betas=(0.9, 0.95), foreach=False)


def by_length(state):
    state["order"] = state["order"][np.argsort(state["encoded"].lengths()[state["order"]], kind="stable")]


def one_to_a_row(lengths, capacity):
    return [(i, 0) for i in range(len(lengths))], len(lengths)


ABLATIONS = {  # name: a change of the state or the code, or flags
    "all of it": (),
    "prompt not shared": unshared,
    "one pair to a row": switch(batch_file, "first_fit", one_to_a_row),
    "rows as long as the longest pair": switch(batch_file, "row_length", max),
    "logits at all positions": logits_everywhere,
    "logits computed twice": switch(batch_file.FrozenHeadLogps, "apply", logits_twice),
    "logits in one chunk": switch(batch_file, "CHUNK_BYTES", 1 << 40),
    "reference at every step": reference_again,
    "gradients of frozen weights": unfrozen,
    "AdamW in a loop": looped_optimizer,
    "freed memory given back": switch(train, "keep_freed_memory", lambda: None),
    "with pairs of like length in a batch": by_length,
    "with bfloat16": ("--dtype", "bfloat16"),
    "with checkpointing": ("--checkpointing",),
    "with compile": ("--compile",)}


def child(work, change="all of it", flags=()):
    """The steps of train.py over the pairs of a work folder, twice: prints the seconds of the second time."""
    torch.set_flush_denormal(True)  # before there are threads, which take it over; they would not later
    change = ABLATIONS[change]
    config = methods.parse_flags([*FLAGS, "--model", f"{work}/model", "--data", f"{work}/pairs.jsonl", "--device", "cpu",
                                *flags, *(() if callable(change) else change)])
    encoded, _ = train.load_data(config, Tokenizer(config.model, config.template))
    config = methods.METHODS[config.method].settle(config, encoded.groups)
    model = train.build_model(config, Path(config.model), encoded.groups)
    encoded.labels["reference"] = train.reference_logps(model, encoded, config).numpy()
    parameters = lora_moe.trainable_parameters(model.train())
    state = {"model": model, "encoded": encoded, "optimizer": train.make_optimizer(parameters, config),
             "order": train.training_order(encoded, config)[:len(encoded)]}
    if callable(change):
        change(state)
    train.keep_freed_memory()
    if config.compile:
        model.model.run = model_file.compile_once(model.model.run)
    for _ in range(2):
        start, cpu, sums = time.perf_counter(), time.process_time(), {}
        for indices in np.split(state["order"], range(8, len(encoded), 8)):
            train.train_step(model, parameters, state["optimizer"], encoded, [indices], config, sums)
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps({**seconds, "tokens": int(encoded.lengths().sum())}))


def compare(rounds, runs, clock):
    """Run `child` with each of {name: its arguments} in turn, so many times; print a Markdown table of the time, as a
    ratio to the first one's in the same round (median and range), and peak memory."""
    results = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, arguments in runs.items():
                results[name].append(process(sys.executable, __file__, "child", json.dumps(arguments), folder=folder))
    first = next(iter(results.values()))
    print("| | time, × the first row | s | peak, MiB | tokens |\n|---|---|---|---|---|")
    for name, rows in results.items():
        ratios = [row[clock] / one[clock] for row, one in zip(rows, first)]
        print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{statistics.median(row[clock] for row in rows):.2f} | "
              f"{statistics.median(row['peak_mib'] for row in rows):.0f} | {rows[0]['tokens']} |", flush=True)


def bench_ablation(work, rounds, clock, only):
    names = [name for name in ABLATIONS if not only or name in ("all of it", *only)]
    compare(rounds, {name: {"work": str(work), "change": name} for name in names}, clock)


def bench_growth(folder, rounds, clock):
    """A table each for pairs, experts (PMoL's, of rank 8), tokens of a pair and vocabulary, with the shape small."""
    def work(name, flags=(), **settings):
        make_work(folder / name, "small", **{"pairs": 16, **settings})
        return {"work": str(folder / name), "flags": flags}

    tables = ({f"{pairs} pairs": work(f"pairs{pairs}", pairs=pairs) for pairs in (16, 32, 64)},
              {f"{K} experts": work("plain", ["--method", "pmol", "--lora_rank", "8", "--experts", str(K)])
               for K in (4, 8, 16)},
              {f"prompts of {90 * n} tokens, responses of {44 * n}": work(
                  f"lengths{n}", ["--max_len", str(512 * n)], lengths=(90 * n, 44 * n), max_len=512 * n)
               for n in (1, 2, 4)},
              {f"a vocabulary of {V}": work(f"vocabulary{V}", vocabulary=V) for V in (8000, 16000, 32000, 64000)})
    for runs in tables:
        compare(rounds, runs, clock)


BENCHES = ("train", "ablation", "growth")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--work", type=Path, help="a work folder (default: one is made)")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--beside", help="a python that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu, of one thread, on a busy machine")
    parser.add_argument("--only", type=lambda text: text.split(","), default=())
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = (args.work or Path(folder)).resolve()
        if not args.work and args.what != "growth":
            make_work(work, args.shape, args.pairs)
        if args.what == "train":
            bench_train(work, args.device, args.epochs, args.beside)
        elif args.what == "ablation":
            bench_ablation(work, args.rounds, args.clock, args.only)
        else:
            bench_growth(work, args.rounds, args.clock)


if __name__ == "__main__":  # a process of `compare`
    child(**json.loads(sys.argv[2]))
