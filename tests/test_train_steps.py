"""One optimiser step is the same however its pairs are split over forward passes: gradients and metrics, for every
method. test_runs_processes.py has the same over processes."""
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

import batch as batch_file
import checkpoint
import lora_moe
import methods
import model as model_file
import train
from batch import pack, split_step
from chat import Tokenizer
from checkpoint import load_model, save_model
from common import gathered
from conftest import encoded_of, perturb_experts, tiny
from runs import ALONE

METHODS = {
    "sft": (), "dpo": ("--lora_rank", 4), "safedpo": (), "reward": (), "cost": (), "pmol": ("--lora_rank", 4, "--egs_weight", 1),
    "midpo": ("--init_adapter", "adapter", "--init_adapter", "adapter"), "mix-dpo": ("--lora_rank", 4),
    "moe-dpo": ("--lora_rank", 4), "moe-dpo weights": ("--objective", "weights"),
    "spe-dpo": ("--reward_model", "score", "--view", "helpful"),
    "mix-dpo annotators": ("--lora_rank", 4, "--latent", "annotator", "--annotators", 12)}


def ready(method, *flags, device="cpu", processes=ALONE):
    """(config, model, encoded pairs) of a run as they are before its first step; experts have moved, as if trained."""
    flags = "--method", method.split()[0], *METHODS[method], *flags
    config = methods.parse_flags([*map(str, flags), "--device", device])
    encoded, _ = train.load_data(config, Tokenizer(train.base_folder(config)))
    config = methods.METHODS[config.method].settle(config, encoded.groups)
    model = train.build_model(config, train.base_folder(config), encoded.groups, processes)
    methods.METHODS[config.method].prepare(model, encoded, config)
    if methods.METHODS[config.method].reference:
        encoded.labels["reference"] = train.reference_logps(model, encoded, config).numpy()
    return config, perturb_experts(model, 0.05, 3).train(), encoded


def step_of(method, parts, processes=ALONE, *flags, tokens=0, device="cpu"):
    """({parameter: gradient}, metrics) of one step of eight pairs in so many forward passes, or more by a budget."""
    config, model, encoded = ready(method, *flags, device=device, processes=processes)
    parameters, gradients, sums = lora_moe.trainable_parameters(model), {}, {}
    optimizer = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: gradients.update(
        (name, gathered(parameter.grad).clone()) for name, parameter in parameters if parameter.grad is not None))
    passes = split_step(train.training_order(encoded, config)[:8], parts, encoded.lengths(), tokens,
                        annotator=encoded.labels.get("annotator"))
    assert len(passes) > parts if tokens else len(passes) == parts
    train.train_step(model, parameters, optimizer, encoded, passes, replace(config, grad_clip=0.0), sums, processes)
    return gradients, processes.sum(sums)


def inputs_of(method):
    """Make what the method wants to find: an adapter, a score model."""
    if method == "midpo":
        model = lora_moe.add_experts(load_model(train.toy_base(0, "cpu")), ["down_proj"], 4, 8)
        checkpoint.save_trained(perturb_experts(model, 0.1, 1), Path())
    if method == "spe-dpo":
        model = load_model(train.toy_base(0, "cpu"))
        save_model(model_file.ScoreModel.from_policy(model), "score")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_two_passes_is_the_step_in_one(place, method):
    inputs_of(method)
    check_equal(step_of(method, 1), step_of(method, 2))


@pytest.mark.parametrize("method", ("sft", "midpo", "pmol", "mix-dpo annotators"))
def test_a_step_in_passes_of_few_tokens_is_the_step_in_one(place, method):
    """Those whose losses are means over tokens, or whose pairs stay together; the passes are of unequal size."""
    inputs_of(method)
    check_equal(step_of(method, 1), step_of(method, 1, tokens=150))


def check_equal(one, other):
    """Two results of `step_of`."""
    (whole, metrics), (split, others) = one, other
    size = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    assert whole.keys() == split.keys() and size > 0
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() < 1e-5 * size, name
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6)  # rewards: log-probs near 40, whose spacing is 4e-6


@pytest.mark.parametrize("annotators, passes", (
    ([0, 0, 0, 1, 1, 1, 2, 2], [3, 5]), ([0] * 8, [8]), ([0, 1, 0, 1, 0, 1, 0, 1], [4, 4]), (list(range(8)), [4, 4])))
def test_an_annotators_pairs_stay_in_one_pass(annotators, passes):
    numbers = np.array([*annotators, 9, 9])
    split = split_step(np.arange(8)[::-1], 2, np.ones(10, dtype=int), annotator=numbers)
    assert sorted(map(len, split)) == passes and sorted(np.concatenate(split)) == list(range(8))
    assert not set(numbers[split[0]]) & set(numbers[split[-1]]) or len(split) == 1
    assert [part.tolist() for part in split_step(np.arange(8), 4, np.ones(8))] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("seed", range(20))
def test_no_pass_of_a_step_holds_more_than_its_tokens(seed):
    """Beside their order nothing else changes: every pair is there once, and all processes have equally many passes."""
    rng = np.random.default_rng(seed)
    lengths, processes, annotator = rng.integers(1, 90, 60), 1 + seed % 3, rng.integers(0, 9, 60) if seed > 14 else None
    encoded = encoded_of([(1, size - 1) for size in lengths])
    indices, tokens = rng.permutation(60)[:24], int(rng.integers(20, 400))
    passes = split_step(indices, processes, encoded.lengths(), tokens, processes, annotator)
    assert sorted(np.concatenate(passes)) == sorted(indices)
    held = max(pack(encoded, part).tokens.numel() for part in passes)
    if annotator is None:
        assert held <= max(tokens, lengths[indices].max()) and len(passes) % processes == 0
        assert len(passes) <= processes + 2 * lengths[indices].sum() / tokens
    else:
        pairs_of = [indices[annotator[indices] == one] for one in set(annotator[indices])]
        assert held <= max(tokens, *(pack(encoded, pairs).tokens.numel() for pairs in pairs_of)) or processes > 1
        assert sum(len(set(annotator[part])) for part in passes) == len(pairs_of)


def test_a_pair_that_a_step_has_twice_is_two_pairs_to_its_budget():
    """Shares of groups repeat pairs; sorted by length, the two stand beside each other."""
    passes = split_step(np.array([1, 0, 1]), 1, np.array([5, 9]), tokens=9)
    assert [part.tolist() for part in passes] == [[1], [1], [0]]


def test_a_batch_without_gradients_holds_few_tokens_too(monkeypatch):
    monkeypatch.setattr(batch_file, "PASS_TOKENS", 30)
    encoded = encoded_of([(1, size) for size in (9, 9, 9, 9, 29, 9)])
    for settings in ({}, {"longest_first": False}, {"together": np.array([0, 0, 1, 1, 1, 2])}):
        parts, held = zip(*((indices.tolist(), batch.tokens.numel())
                            for indices in batch_file.batch_indices(encoded, 6, **settings)
                            for batch in [pack(encoded, indices)]))
        order = sum(parts, [])
        assert sorted(order) == list(range(6)) and (order == sorted(order) or "longest_first" not in settings)
        assert max(held) == (60 if "together" in settings else 30)  # pairs 2, 3 and 4 take two rows of 30


class WithoutWaiting(TorchDispatchMode):
    """A copy between the devices that is not said to be non-blocking raises AssertionError."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if function.overloadpacket is torch.ops.aten._to_copy else args[1]
            assert source.device == result.device or (kwargs or {}).get("non_blocking"), (source.shape, result.device)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_device(place, monkeypatch, method):
    inputs_of(method)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no device "meta"
    config, model, encoded = ready(method)
    model, config = model.to("meta"), replace(config, device="meta")
    parameters = lora_moe.trainable_parameters(model)
    optimizer = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None)
    parts = split_step(train.training_order(encoded, config)[:8], 2, encoded.lengths(),
                       annotator=encoded.labels.get("annotator"))
    train.train_step(model, parameters, optimizer, encoded, parts, config, {})  # constants are copied once
    with WithoutWaiting():
        train.train_step(model, parameters, optimizer, encoded, parts, config, {})
    assert any(parameter.grad is not None for _, parameter in parameters)


def test_what_waits_is_found():
    values = torch.zeros(3, device="meta")
    for waiting in (lambda: values.sum().item(), lambda: values[values > 0], lambda: bool(values.any()),
                    lambda: values.unique(), lambda: torch.arange(3).to("meta")):
        with pytest.raises((RuntimeError, AssertionError)), WithoutWaiting():
            waiting()


def test_block_masks_are_made_without_waiting(monkeypatch):
    monkeypatch.setattr(model_file, "flex_is_fused", lambda *_: True)
    model = tiny("gemma2 with a window shorter than the sequences").to("meta")
    batch = pack(encoded_of([(3, 9, 8), (1, 4, 2)]), [0, 1]).to("meta")
    with WithoutWaiting():
        masks = model.model.window_masks(batch.positions, batch.mask(), None)
    assert masks.keys() == {0, 4} and all(isinstance(mask, BlockMask) for mask in masks.values())
