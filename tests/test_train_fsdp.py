"""With --fsdp two processes (gloo, on the CPU) hold half of the weights each, and compute what one process with all
weights does. test_runs_processes.py compares the gradients of every method.

    torchrun --nproc_per_node 2 tests/test_train_fsdp.py      the worker, in a folder with a base model and deep/
"""
import gc
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import methods
import toy
import train
from checkpoint import save_model
from common import as_command
from conftest import change_loss, interrupt_at, make_quick, make_small, mistake, run, timeless
from model import ModelConfig, Transformer
from runs import Processes
from test_runs_processes import torchrun

RUNS = {"all weights": ("--method", "safedpo", "--eval_every", 3), "lora": ("--method", "dpo", "--lora_rank", 4),
        "mixture": ("--method", "moe-dpo", "--lora_rank", 4, "--router_lr", 1),
        "score": ("--method", "cost", "--lora_rank", 4)}
BFLOAT16 = ("--method", "dpo", "--dtype", "bfloat16", "--checkpointing")
DEEP = {**toy.MODEL, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
SHARED = ("--lr", 1e-4, "--max_steps", 6, "--log_every", 1)


def flags_of(name, *flags):
    return (*RUNS[name], *SHARED, *flags)


def check_same(out, other):
    """The metrics of two runs within 1e-5, and the weights that they wrote within 1e-6, of 3.5e-4 that AdamW moves them.
    A gate's gradient is a difference of nearly equal responsibilities, in which the rounding of log-probs near 100 nats,
    8e-6, is up to 1 %; AdamW divides it by its own size: 5e-6."""
    for row, same in zip(timeless(out), timeless(other), strict=True):
        assert row == pytest.approx(same, rel=1e-5, abs=1e-5)
    files = [path.relative_to(out) for path in out.rglob("*.safetensors")]
    assert files
    for path in files:
        weights, others = load_file(out / path), load_file(other / path)
        assert weights.keys() == others.keys()
        for name in weights:
            assert (weights[name] - others[name]).abs().max() <= (5e-6 if name.startswith("gate.") else 1e-6), (path, name)


def test_sharded_runs_are_those_of_one_process(quick, monkeypatch):
    for name in RUNS:
        run(f"{name} whole", *flags_of(name))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run("begun by one", *flags_of("all weights"))
    for path in Path("out/cache").iterdir():
        path.unlink()
    shape = toy.init_weights(Transformer(ModelConfig.from_hf(DEEP)), 0)
    save_model(shape, "deep")
    report = json.loads(next(line for line in torchrun(__file__).splitlines() if line.startswith("[{")))
    for name in RUNS:
        check_same(Path(f"out/{name}"), Path(f"out/{name} whole"))
    check_same(Path("out/begun by one"), Path("out/all weights whole"))
    run("begun by two", *flags_of("all weights"), "--resume")
    check_same(Path("out/begun by two"), Path("out/all weights whole"))
    check_same(Path("out/bfloat16"), Path("out/bfloat16 whole"))
    assert [row.get("skipped", 0) for row in timeless(Path("out/skipped"))] == [0, 1, 0, 0, 0, 0]
    skipped = load_file("out/skipped/model/model.safetensors")
    assert all(weight.isfinite().all() for weight in skipped.values())
    sizes = {name: 4 * weight.numel() for name, weight in shape.named_parameters()}
    total, embedding = sum(sizes.values()), sizes["model.embed_tokens.weight"]
    for one in report:  # while a tensor is read, the one before it is still there
        assert total / 2 <= one["held"] <= 1.01 * total / 2
        assert one["peak"] <= total / 2 + embedding + 2 * max(sizes.values()) < 0.7 * total


def test_one_process_has_no_need_of_it_and_what_does_not_fit_is_one_line(quick):
    run("flag", *flags_of("lora"), "--fsdp")
    run("none", *flags_of("lora"))
    assert timeless(Path("out/flag")) == timeless(Path("out/none"))
    assert "--compile" in mistake("--fsdp", "--compile")


def live_bytes():
    """Of the tensors of weights that have been made since gc.freeze()."""
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    weights = filter(torch.is_floating_point, tensors)  # files are read through a buffer of bytes
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights}.values())


def load_deep(patch, processes):
    """{"peak": bytes of weights while a deep model is read, "held": and then}."""
    peaks, read = [], checkpoint.read_tensors

    def watching(*args):
        for item in read(*args):
            peaks.append(live_bytes())
            yield item
    patch.setattr(checkpoint, "read_tensors", watching)
    gc.collect()
    gc.freeze()
    deep = train.build_model(methods.parse_flags(["--fsdp", "--device", "cpu"]), Path("deep"), (), processes)
    gc.collect()
    return {"peak": max(peaks), "held": live_bytes(), "blocks": len(deep.model.layers)}


def work(patch, processes):
    """What two processes do for the first test."""
    patch.setattr(Processes, "join", lambda: processes)
    for name in RUNS:
        run(name, *flags_of(name), "--batch_size", 4, "--fsdp")
    run("begun by one", *flags_of("all weights"), "--batch_size", 4, "--fsdp", "--resume")
    for out, flags in (("bfloat16", ("--fsdp",)), ("bfloat16 whole", ())):
        run(out, *BFLOAT16, *SHARED, "--batch_size", 4, *flags)
    with patch.context() as one_run:  # in its second pass, the second process computes a loss that is not finite
        scales = iter([1.0, math.nan if processes.rank else 1.0] + [1.0] * 100)
        change_loss(one_run, lambda loss, _: (loss * next(scales), {}))
        run("skipped", *flags_of("all weights"), "--batch_size", 4, "--fsdp")
    with patch.context() as one_run:
        interrupt_at(one_run, 3, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run("begun by two", *flags_of("all weights"), "--batch_size", 4, "--fsdp")
    print(json.dumps(processes.gather(load_deep(patch, processes))))


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    make_small(patch)
    make_quick(patch)
    as_command(lambda: work(patch, Processes.join()), "test_train_fsdp.py", "interrupted")
