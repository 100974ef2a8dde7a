"""Side-by-side timings, each a ratio of two things that run in this process, in turn.

    python tests/bench.py generate [--rounds 5]    our generate against transformers' (which it needs)
    python tests/bench.py experts                  a PMoL training step with 16 experts against one with 4
    python tests/bench.py mixture                  generation through MidPO's mixture against one expert and the base

The median of the rounds' ratios is what counts, as it is the figure that other work on the machine disturbs least.
Models are made here, of random weights.
"""
import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses  # noqa: E402
from data import Encoded, pack  # noqa: E402
from lora_moe import add_experts, router_weights, trainable_parameters  # noqa: E402
from model import ModelConfig, Transformer, generate  # noqa: E402

SMALL = dict(model_type="llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
             num_key_value_heads=4, vocab_size=16000, max_position_embeddings=2048, tie_word_embeddings=True)


def timed(function):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def bench_generate(rounds, batch=16, prompt_length=32, new_tokens=64):
    """Greedy decoding of a 33 M parameter Llama in float32, end-of-sequence switched off."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(**{name: value for name, value in SMALL.items() if name != "model_type"}, eos_token_id=None)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = Transformer.from_pretrained(folder)
    prompts = torch.randint(3, config.vocab_size, (batch, prompt_length))
    settings = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                    do_sample=False, pad_token_id=0)
    ratios = []
    for i in range(rounds + 1):
        with torch.no_grad():
            their_time, their_tokens = timed(lambda: theirs.generate(prompts, **settings))
        our_time, our_tokens = timed(lambda: generate(ours, prompts.tolist(), new_tokens))
        same = sum(a == b for row, other in zip(our_tokens, their_tokens[:, prompt_length:].tolist())
                   for a, b in zip(row, other)) / (batch * new_tokens)
        if i > 0:  # the first round warms both up
            ratios.append(their_time / our_time)
        print(f"{'warm-up' if i == 0 else f'round {i}'}: transformers {batch * new_tokens / their_time:6.0f} tokens/s, "
              f"ours {batch * new_tokens / our_time:6.0f} tokens/s, {their_time / our_time:.2f} x, "
              f"{same:.1%} of the tokens equal", flush=True)
    print(f"median {statistics.median(ratios):.2f} x  ({min(ratios):.2f} to {max(ratios):.2f}), batch {batch}, "
          f"{prompt_length} prompt and {new_tokens} new tokens, {torch.get_num_threads()} threads")


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
        model = Transformer(ModelConfig.from_hf(SMALL)).init_weights(0)
        add_experts(model, ["down_proj"], rank, 2 * rank, experts, router={"type": "softmax"})
        optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=1e-4, fused=True)
        target = losses.group_targets(2, experts, [0.5])

        def step():
            logps = losses.sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)
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
        model = Transformer(ModelConfig.from_hf(SMALL)).init_weights(0)
        return add_experts(model, ["down_proj"], 16, 32, experts, router=router) if experts else model

    prompts = torch.randint(3, 16000, (batch, prompt_length)).tolist()
    models = {"base": policy(0, None), "one expert": policy(1, {"type": "constant"}),
              "two experts, routed": policy(2, {"type": "sigmoid"})}
    compare(rounds, {name: partial(generate, model, prompts, new_tokens) for name, model in models.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "experts", "mixture"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    {"generate": bench_generate, "experts": bench_experts, "mixture": bench_mixture}[args.what](args.rounds)
