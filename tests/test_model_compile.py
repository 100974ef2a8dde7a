"""--compile: the layers are compiled at most twice, for batches of one row and for batches of several, of any length
and without a graph break; losses and gradients are those of the uncompiled model."""
import numpy as np
import pytest
import torch

import lora_moe
import methods
import model as model_file
from batch import pack, policy_logps
from conftest import encoded_of, files_of, load_fixture, run, tiny
from model import compile_once
from test_train_steps import check_equal, inputs_of, ready


@pytest.fixture(autouse=True)
def twice_at_most():
    """A third compilation of anything is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize("method, checkpointing, backend", (  # to make kernels takes minutes: these record the graphs
    ("safedpo", False, "eager"), ("midpo", True, "eager"), ("pmol", False, "eager"), ("moe-dpo", True, "aot_eager")))
def test_batches_of_all_shapes_take_two_compilations(place, method, checkpointing, backend):
    inputs_of(method)
    config, model, encoded = ready(method, *["--checkpointing"] * checkpointing)
    order, parameters = np.argsort(-encoded.lengths(), kind="stable"), lora_moe.trainable_parameters(model)
    batches = [pack(encoded, indices) for indices in (order[:5], order[10:30], order[-1:], order[:1], order[6:12])]
    shapes = [tuple(batch.tokens.shape) for batch in batches]
    assert len({T for _, T in shapes}) > 3 and len({B for B, _ in shapes}) > 3 and 1 in dict(shapes)

    def results():
        for batch in batches:
            loss, metrics = methods.METHODS[config.method].loss(model, batch, config)
            gradients = torch.autograd.grad(loss, [parameter for _, parameter in parameters], allow_unused=True)
            yield ({name: gradient for (name, _), gradient in zip(parameters, gradients) if gradient is not None},
                   {key: float(value) for key, value in {"loss": loss.detach(), **metrics}.items()})

    plain = list(results())
    with model.model.compiled(backend=backend, fullgraph=True):
        for one, other in zip(plain, results(), strict=True):
            check_equal(one, other)


def test_rows_that_are_as_many_as_they_are_long_are_not_compiled_apart():
    model = tiny("gpt2")
    encoded = encoded_of([(2, 3, 2), (1, 4, 2), (3, 3, 1), (2, 2, 3), (5, 1, 1), (1, 1, 2), (4, 9, 9)])
    batches = [pack(encoded, indices) for indices in ([0, 1, 2, 3, 4, 0, 1], [0, 5], [6, 1, 2])]
    assert batches[0].tokens.shape == (7, 7)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        plain = [policy_logps(model, batch) for batch in batches]
        with model.model.compiled(backend="eager", fullgraph=True):
            for logps, batch in zip(plain, batches):
                torch.testing.assert_close(policy_logps(model, batch), logps, rtol=1e-5, atol=1e-5)


def test_a_compiled_run_is_the_run(quick, monkeypatch):
    """Also its measurements, without gradients, and its answers, which are not compiled."""
    compiled = []
    monkeypatch.setattr(model_file, "compile_once", lambda function: compiled.append(1) or compile_once(
        function, backend="eager"))
    flags = "--method", "safedpo", "--lora_rank", 4, "--max_steps", 2, "--lr", 1e-3
    with torch._dynamo.config.patch(recompile_limit=8):
        outs = [run(name, *flags, *extra) for name, extra in (("plain", ()), ("compiled", ("--compile",)))]
    assert compiled == [1] and files_of(outs[0]) == files_of(outs[1])


ITEMS = [(9, 20, 25, 30, 31, 30), (1, 4, 6, 0, 1, 2), (30, 9, 1, 3, 9, 9), (2, 30, 9, 30, 2, 30), (9, 8, 7, 6, 5, 4)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ("llama", "mistral_window", "qwen2_window", "qwen3", "gemma", "gemma2", "gpt2"))
def test_flex_attention_of_packed_rows_is_attention_under_the_dense_mask(name, monkeypatch):
    """Over several of its blocks of 128 tokens, with padding; windows, soft-caps and grouped heads as the family has."""
    model, batch, calls = load_fixture(name), pack(encoded_of(ITEMS), [*range(len(ITEMS))]), []
    assert batch.tokens.shape[0] > 1 and batch.tokens.shape[1] > 128 and (batch.pair < 0).any()
    with torch.no_grad():
        dense = model(batch.tokens, batch.positions, batch.mask())
        flex = model_file.flex_attention
        monkeypatch.setattr(model_file, "flex_attention", lambda *args: calls.append(args) or flex(*args))
        assert not calls
        monkeypatch.setattr(model_file, "flex_is_fused", lambda *_: True)
        fused = model(batch.tokens, batch.positions, batch.mask())
    assert len(calls) == model.config.num_layers
    assert (fused - dense).abs().max() < 1e-5 * dense.abs().max()
