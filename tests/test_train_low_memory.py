"""--low_memory: AdamW inside the backward pass, weights and moments in bfloat16, rounded stochastically."""
import copy
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_moe
import train
from conftest import (SHAPES, change_loss, encoded_of, files_of, interrupt_at, load_run, packed_logps, relative_error,
                      rows, run, timeless, tiny)
from runs import ALONE

FLAGS = ("--method", "safedpo", "--low_memory", "--log_every", 1, "--lr", 1e-3)
LARGEST = 2.0 ** 127 * (2 - 2 ** -7)  # of bfloat16


def optimizer_of(*parameters, weight_decay=0.0, lr=1e-3, seed=0):
    return train.BackwardAdamW([{"params": [parameter], "weight_decay": weight_decay} for parameter in parameters],
                               lr, (0.9, 0.95), seed)


# The update


@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
def test_of_float32_weights_it_is_adamw_in_double_precision(monkeypatch, weight_decay):
    monkeypatch.setattr(train.BackwardAdamW, "CHUNK", 7)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5, 6)), torch.nn.Parameter(torch.randn(3))
    theirs = [torch.nn.Parameter(parameter.detach().double()) for parameter in ours]
    optimizer = optimizer_of(*ours, weight_decay=weight_decay, lr=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=weight_decay)
    for rate in (0.1, 0.03, 0.2, 0.1):
        gradients = [torch.randn_like(parameter) for parameter in ours]
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = rate
        sum((parameter * gradient).sum() for parameter, gradient in zip(ours, gradients)).backward()
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = gradient.double()
        reference.step()
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert float(optimizer.gradient_norm()) == pytest.approx(float(norm))
        for parameter, exact in zip(ours, theirs):
            assert parameter.grad is None and relative_error(parameter.detach().double(), exact.detach()) < 1e-6


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_to_update_within_the_backward_pass_changes_no_gradient(monkeypatch, shape, checkpointing):
    """The weights are those of an update after the backward pass; also where embedding and head are one."""
    monkeypatch.setattr("batch.CHUNK_BYTES", 2000)
    inside = tiny(shape).train()
    inside.model.checkpointing = checkpointing
    after, encoded = copy.deepcopy(inside), encoded_of([(5, 4, 6), (3, 7, 2), (4, 5, 5)])
    optimizer = optimizer_of(*inside.parameters(), lr=0.1)
    later = optimizer_of(*(torch.nn.Parameter(parameter.detach()) for parameter in after.parameters()), lr=0.1)
    for _ in range(2):
        packed_logps(inside, encoded, range(3)).diff().mean().backward()
        packed_logps(after, encoded, range(3)).diff().mean().backward()
        for number, (parameter, group) in enumerate(zip(after.parameters(), later.param_groups)):
            [twin] = group["params"]
            twin.grad, parameter.grad = parameter.grad, None
            later.update(number, 0, twin)
        assert float(optimizer.gradient_norm()) == pytest.approx(float(later.gradient_norm()))
    assert all(torch.equal(one, other) for one, other in zip(inside.parameters(), after.parameters()))


# Stochastic rounding


def test_a_rounded_number_is_one_of_its_two_neighbours_and_in_the_mean_itself():
    """Over all 65,536 values of the noise, against a table of all bfloat16 numbers."""
    torch.set_flush_denormal(False)
    table = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double()
    table = table[~table.isnan()].unique()                                              # sorted
    numbers = [0.0, 1.0, -1.0, 1.001, -1.001, 0.3, -0.3, 1 - 2 ** -20, 1e-39, -1e-39, 1e-45, -1e-45, 2.0 ** -126, 3e38,
               -3e38, LARGEST, -LARGEST, float(torch.finfo(torch.float32).max)]
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for number in torch.tensor(numbers):
        target = torch.empty(1 << 16, dtype=torch.bfloat16)
        train.store(number.expand(1 << 16).contiguous(), target, noise)
        exact = number.double()
        below, above = table[table <= exact][-1], table[table >= exact][0]
        assert set(target.double().unique().tolist()) == {float(below), float(above)}
        assert above.isinf() or target.double().mean() == exact


def test_what_the_optimiser_draws_is_unbiased_and_differs_by_step_parameter_and_seed():
    """Weight decay alone, by a 30th of what a bfloat16 can tell from 1; the nearest would be 1 for ever."""
    count, rate = 1 << 16, 1.2e-4

    def weights(seed):
        parameters = [torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = optimizer_of(*parameters, weight_decay=1.0, lr=rate, seed=seed)
        steps = []
        for _ in range(2):
            sum((parameter * 0).sum() for parameter in parameters).backward()
            steps += [parameter.detach().double() for parameter in parameters]
        assert len(optimizer.state) == 2
        return steps

    first = weights(0)
    for i, values in enumerate(first):
        error = (2 ** -8 * rate * (i // 2 + 1) / count) ** 0.5                            # of a jump of 2^-8
        assert abs(values.mean() - (1 - rate) ** (i // 2 + 1)) < 5 * error
        assert set(values.unique().tolist()) <= {1.0, 1 - 2 ** -8, 1 - 2 ** -7}
    moved = [first[0] < 1, first[1] < 1, first[2] < first[0], first[3] < first[1], weights(1)[0] < 1]
    for i, one in enumerate(moved):
        assert one.any() and all((one & other).sum() < 0.2 * one.sum() for other in moved[:i])
    assert all(map(torch.equal, first, weights(0)))


def test_small_updates_add_up_to_those_of_float32_weights(quick):
    """Along the way of float32 weights, bfloat16 ones go as far; rounded to the nearest they would stay."""
    start = load_file("out/toy-base-seed0/model.safetensors")

    def way(name, dtype, *flags):
        end = load_file(run(name, "--method", "dpo", "--lr", 2e-5, *flags) / "model/model.safetensors")
        return torch.cat([(end[key].double() - start[key].to(dtype).double()).flatten() for key in start])

    exact, rounded = way("exact", torch.float32, "--grad_clip", 0), way("rounded", torch.bfloat16, "--low_memory")
    assert float(rounded @ exact / (exact @ exact)) == pytest.approx(1, abs=0.05)


# Runs


def one_step(watch=lambda parameters: None, pairs=([*range(8)],), processes=ALONE):
    """({name: parameter}, their values before, metrics) of one step on random tokens, in so many passes."""
    config, model, _ = load_run(*FLAGS)
    parameters, before, sums = dict(lora_moe.trainable_parameters(model)), copy.deepcopy(model.state_dict()), {}
    watch(parameters)
    encoded = encoded_of([(9, 8, 7), (5, 9, 9)] * 4)
    encoded.labels["reference"] = np.zeros((8, 2), dtype=np.float32)
    encoded.labels["chosen_unsafe"] = encoded.labels["rejected_unsafe"] = np.zeros(8, dtype=bool)
    optimizer = train.make_optimizer(parameters.items(), config, processes)
    train.train_step(model.train(), parameters.items(), optimizer, encoded, list(map(np.array, pairs)), config, sums,
                     processes)
    return parameters, before, processes.sum(sums)


def test_one_gradient_is_held_at_a_time(place, monkeypatch):
    held, update, parameters = [], train.BackwardAdamW.update, {}

    def watched(*settings):
        held.append(sum(p.grad.numel() for p in parameters.values() if p.grad is not None))
        update(*settings)
    monkeypatch.setattr(train.BackwardAdamW, "update", watched)
    one_step(parameters.update)
    assert sorted(held) == sorted(parameter.numel() for parameter in parameters.values())
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("flags", ((), ("--method", "reward")), ids=("safedpo", "reward"))
def test_it_writes_bfloat16_weights_and_resumes_to_the_same_bytes(quick, monkeypatch, flags):
    flags = (*FLAGS, *flags, "--max_steps", 4)
    whole = run("whole", *flags)
    stored = load_file(whole / "model/model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} <= {"score.weight"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1, signal.SIGTERM)
        run("run", *flags)
    out = run("run", *flags, "--resume")
    assert files_of(out) == files_of(whole) and timeless(out) == timeless(whole)
    assert all(row["grad_norm"] > 0 for row in rows(out))


@pytest.mark.parametrize("flags", (FLAGS, (*FLAGS[:2], *FLAGS[3:])), ids=("--low_memory", "by default"))
def test_a_step_whose_loss_is_infinite_changes_no_weight_though_its_gradients_are_finite(quick, monkeypatch, flags):
    good = run("good", *flags, "--max_steps", 1, "--warmup", 0)
    steps = iter(range(4))
    change_loss(monkeypatch, lambda loss, metrics: (
        loss + (math.inf if torch.is_grad_enabled() and next(steps) else 0), metrics))
    bad = run("bad", *flags, "--max_steps", 4, "--warmup", 0)
    assert [row.get("skipped", 0) for row in rows(bad)] == [0, 1, 1, 1]
    path = Path("model/model.safetensors")
    assert files_of(good)[path] == files_of(bad)[path]


def test_a_parameter_whose_gradient_is_not_finite_stays_and_the_step_is_counted(place):
    name = "model.layers.0.mlp.down_proj.weight"
    parameters, before, metrics = one_step(lambda parameters: parameters[name].register_hook(lambda g: g * math.inf))
    assert metrics["skipped"] == 1 and metrics["loss"] == 0
    assert [key for key, parameter in parameters.items() if torch.equal(parameter, before[key])] == [name]


def check_that_a_step_in_two_processes_is_that_of_one(processes):
    """But for the rounding of gradients to bfloat16 before they are summed; test_runs_processes.py starts the processes."""
    one, before, metrics = one_step()
    two, _, others = one_step(pairs=([0, 2, 4, 6], [1, 3, 5, 7]), processes=processes)
    assert others == pytest.approx(metrics, rel=0.01, abs=1e-3)
    for name in one:
        assert (one[name] != before[name]).any() and (one[name] != two[name]).double().mean() < 0.02, name
