"""Packed log-probabilities and their gradients against single sequences in float64."""
import pytest
import torch

import batch as batch_file
from batch import pack, policy_logps, sequence_logps
from conftest import SHAPES, VOCABULARY, brute_force, encoded_of, packed_logps, tiny

PAIRS = [(3, 5, 2), (1, 4, 6), (1, 1, 1), (7, 0, 3), (2, 3, 0), (9, 8, 7), (1, 2, 0), (4, 1, 12)]
SINGLES = [(3, 5), (1, 4), (7, 0), (1, 1), (9, 12)]
WEIGHTS = torch.linspace(-1, 2, 2 * len(PAIRS))  # a different pull on every response


def packed_and_separate(shape, items, frozen_head=False):
    """((logps, gradients) packed in float32, the same from separate sequences in float64, by autograd alone)."""
    encoded, indices = encoded_of(items), list(range(len(items)))[::-1]
    results = []
    for dtype, compute in ((torch.float32, packed_logps), (torch.float64, brute_force)):
        model = tiny(shape).to(dtype)
        model.lm_head.requires_grad_(not frozen_head)
        logps = compute(model, encoded, indices)
        (logps.flatten() * WEIGHTS[:logps.numel()].to(dtype)).sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    return results


def assert_same(got, want, tolerance=1e-5):
    (logps, gradients), (expected_logps, expected_gradients) = got, want
    assert logps.dtype == torch.float32 and logps.shape == expected_logps.shape
    assert float((logps - expected_logps).abs().max() / expected_logps.abs().max()) < tolerance
    for name, expected in expected_gradients.items():
        size = expected.norm()
        if size < 1e-12:  # without RoPE a bias on every key adds the same to all scores of a query
            assert name.endswith("k_proj.bias") and gradients[name].norm() < 1e-4
        else:
            assert float((gradients[name] - expected).norm() / size) < tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("items", (PAIRS, SINGLES), ids=("pairs", "one response each"))
def test_packed_logps_and_gradients_equal_separate_sequences(shape, items):
    assert_same(*packed_and_separate(shape, items))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_frozen_head_changes_no_logp_and_no_gradient_below_it(monkeypatch, shape):
    """gemma2's logits have a soft-cap, through which the gradient goes as well."""
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    assert_same(*packed_and_separate(shape, PAIRS, frozen_head=True))


@pytest.mark.parametrize("rows", (1, 3))
def test_small_chunks_give_the_same_logps_and_gradients(monkeypatch, rows):
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", rows * 4 * VOCABULARY)
    assert_same(*packed_and_separate("llama", PAIRS))


def test_empty_responses_have_log_probability_zero():
    model = tiny("llama")
    for items in ([(3, 0, 0)], [(3, 0), (2, 0)]):
        logps = packed_logps(model, encoded_of(items), list(range(len(items))))
        assert torch.equal(logps, torch.zeros(len(items), len(items[0]) - 1))


def test_padding_and_neighbours_do_not_change_a_pair():
    model, encoded = tiny("llama"), encoded_of(PAIRS)
    together = packed_logps(model, encoded, list(range(len(PAIRS))))
    for index in range(len(PAIRS)):
        alone = packed_logps(model, encoded, [index])
        assert torch.allclose(alone[0], together[index], rtol=1e-5, atol=1e-5)
    batch = pack(encoded, list(range(len(PAIRS))))
    before = policy_logps(model, batch)
    assert (batch.pair < 0).any()
    batch.tokens[batch.pair < 0] = 17
    after = policy_logps(model, batch)
    assert torch.equal(before, after)


def test_one_pair_given_twice_counts_twice():
    model, encoded = tiny("llama"), encoded_of(PAIRS)
    logps = packed_logps(model, encoded, [5, 5])
    assert torch.allclose(logps[0], logps[1], rtol=1e-5)
    expected = brute_force(tiny("llama").double(), encoded, [5])[0]
    assert torch.allclose(logps[0].double(), expected, rtol=1e-5)


@pytest.mark.parametrize("frozen_head", (False, True))
def test_no_vocabulary_sized_tensor_outlives_its_chunk(monkeypatch, frozen_head):
    rows = 2
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", rows * 4 * VOCABULARY)
    model, encoded = tiny("qwen2"), encoded_of(PAIRS)
    model.lm_head.requires_grad_(not frozen_head)
    batch = pack(encoded, list(range(len(PAIRS))))
    hidden = model(batch.tokens, batch.positions, batch.mask()).detach().requires_grad_()
    weight, logits, saved, computed = model.lm_head.weight, model.logits, [], []

    def counting(states, head):
        computed.append(len(states))
        return logits(states, head)

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(model, "logits", counting)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = sequence_logps(model, hidden, batch)
    M, V = len(batch.target), VOCABULARY
    assert saved and max(saved) < min(M * V, rows * V), "logits were kept for the backward pass"
    assert sum(saved) < M * V
    logps.sum().backward()
    assert max(computed) <= rows, "a chunk is larger than it may be, forward or backward"
    assert sum(computed) == (M if frozen_head else 2 * M), "a frozen head computes logits once"
    assert hidden.grad.abs().sum() > 0
