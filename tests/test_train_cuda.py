"""What runs on a GPU, against the CPU or the dense mask: steps of every method, FlexAttention with its gradients, whole
runs that are compiled, resumed or in bfloat16, and generated tokens."""
import signal
from pathlib import Path

import pytest
import torch
from test_model_compile import ITEMS

import model as model_file
from batch import pack, policy_logps, precision
from conftest import SHAPES, encoded_of, interrupt_at, load_fixture, relative_error, rows, run, timeless, tiny
from model import generate
from test_train_steps import METHODS, inputs_of, step_of

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device is here")
WIDE = dict(hidden_size=64, num_attention_heads=4, head_dim=16)  # FlexAttention's kernels want heads of 16 or more
FLAGS = ("--method", "safedpo", "--lora_rank", 4, "--max_steps", 6, "--log_every", 1, "--lr", 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_cpu(place, method):
    inputs_of(method)
    (want, metrics), (got, others) = step_of(method, 1), step_of(method, 1, device=DEVICE)
    size = torch.stack([gradient.norm() for gradient in want.values()]).norm()
    assert want.keys() == got.keys() and size > 0
    for name, gradient in want.items():
        assert (got[name].cpu() - gradient).norm() < 1e-3 * size, name
    assert others == pytest.approx(metrics, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("dtype, tolerance", (("float32", 1e-4), ("bfloat16", 3e-2)))
@pytest.mark.parametrize("family, changes", (
    ("llama", dict(num_key_value_heads=2)), ("mistral", dict(sliding_window=20)), ("qwen2", {}), ("qwen3", {}),
    ("gemma", {}), ("gemma2", dict(sliding_window=20, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)),
    ("gpt2", dict(n_embd=64, n_head=4, n_layer=2, n_positions=64))))
def test_flex_attention_has_the_gradients_of_the_dense_mask(monkeypatch, family, changes, dtype, tolerance):
    monkeypatch.setitem(SHAPES, family, {**WIDE, "model_type": family, **changes})
    model, encoded, calls = tiny(family).to(DEVICE), encoded_of(ITEMS), []
    monkeypatch.setattr(model_file, "create_block_mask", lambda *args, make=model_file.create_block_mask:
                        calls.append(args) or make(*args))
    for indices in ([0, 1, 2, 3, 4], [0], [1, 4], [2, 2, 2]):
        batch, results = pack(encoded, indices).to(DEVICE), []
        for fused in (False, DEVICE == "cuda"):
            monkeypatch.setattr(model_file, "flex_is_fused", lambda *_, fused=fused: fused)
            with precision(dtype, DEVICE):
                logps = policy_logps(model, batch)
            gradients = torch.autograd.grad(logps.square().mean(), [*model.parameters()])
            results.append((logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        assert relative_error(results[1][0], results[0][0]) < tolerance, batch.tokens.shape
        assert relative_error(results[1][1], results[0][1]) < 10 * tolerance, batch.tokens.shape
    assert len(calls) == 4 * len({*model.config.windows}) or DEVICE == "cpu"


def test_heads_too_narrow_for_flex_attention_use_the_dense_mask():
    batch, model = pack(encoded_of(ITEMS), [0, 1, 2]), load_fixture("llama")
    want = policy_logps(model, batch)
    torch.testing.assert_close(policy_logps(model.to(DEVICE), batch.to(DEVICE)).cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags, tolerance", (
    (("--compile",), 2e-3), (("--checkpointing",), 2e-3), (("--compile", "--checkpointing"), 2e-3),
    (("--batch_tokens", 150), 2e-3), (("--dtype", "bfloat16"), 0.1), (("--dtype", "bfloat16", "--compile"), 0.1)),
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_a_run_is_that_of_the_cpu(place, flags, tolerance):
    plain, other = run("plain", *FLAGS), run("other", *FLAGS, *flags, device=DEVICE)
    for row, same in zip(timeless(plain), timeless(other), strict=True):
        assert same.keys() == row.keys()
        assert same["loss"] == pytest.approx(row["loss"], rel=tolerance), row["step"]
        assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * tolerance), row["step"]


def test_an_interrupted_run_goes_on(place, monkeypatch):
    straight = run("straight", *FLAGS, device=DEVICE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2, signal.SIGTERM)
        run("broken", *FLAGS, device=DEVICE)
    assert [row["step"] for row in rows(Path("out/broken"))] == [1, 2, 3]
    resumed = run("broken", *FLAGS, "--resume", device=DEVICE)
    for row, same in zip(timeless(straight), timeless(resumed), strict=True):
        assert same == pytest.approx(row, rel=1e-3, abs=1e-3)


def test_greedy_answers_are_those_of_the_cpu():
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [33], [22, 4, 51, 22], [8, 8, 8, 30, 2, 41, 44]]
    for name in ("llama", "gemma2", "gpt2", "mistral_window"):
        model = load_fixture(name)
        want = generate(model, prompts, 12)
        assert generate(model.to(DEVICE), prompts, 12) == want, name
