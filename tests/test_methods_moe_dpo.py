"""Whole runs of Mix- and MoE-DPO: what they write and log, their first loss, and that they repeat and resume."""
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as eval_file
import losses
from checkpoint import load_model, save_adapter, save_model
from common import read_json
from conftest import (BASE, check_that_it_loads_and_is_evaluated_alike, files_of, first_batch, grouped_file,
                      interrupt_at, mistake, pair_logps, preference_pairs, rows, run, timeless, write_rows)
from lora_moe import add_experts, merge_experts, perturb_experts

SHORT = ("--max_steps", 3, "--log_every", 1, "--batch_size", 6)
FLAGS = (*SHORT, "--lora_rank", 4, "--annotators", 6)
RUNS = {
    "mix": ("--method", "mix-dpo"), "moe": ("--method", "moe-dpo"),
    "fixed gate": ("--method", "mix-dpo", "--gate", "0.7,0.3"),
    "prompt gate": ("--method", "moe-dpo", "--gate", "prompt"),
    "user gate": ("--method", "mix-dpo", "--gate", "user"), "heads": ("--method", "moe-dpo", "--share", "trunk"),
    "full heads": ("--method", "moe-dpo", "--share", "trunk", "--lora_rank", 0, "--expert_noise", 0),
    "annotators": ("--method", "mix-dpo", "--latent", "annotator"),
    "weights": ("--method", "mix-dpo", "--objective", "weights", "--experts", 3),
    "one expert": ("--method", "mix-dpo", "--experts", 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_a_mixture_that_evaluation_reads_again(quick, policies, name):
    out = run("run", *FLAGS, *RUNS[name], "--lr", 3e-2)
    experts = {"weights": 3, "one expert": 1}.get(name, 2)

    logged = rows(out)
    assert [row["step"] for row in logged] == [1, 2, 3]
    for row in logged:
        assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0
        for sort in ("gate", "responsibility"):
            assert sum(row[f"{sort}/{k}"] for k in range(experts)) == pytest.approx(1, rel=1e-5)
    assert logged[0]["loss"] == pytest.approx(math.log(2), rel=1e-5), "all experts are the base as yet"
    assert logged[0]["log_likelihood"] == pytest.approx(-math.log(2), rel=1e-5)
    expected = [0.7, 0.3] if name == "fixed gate" else [1 / experts] * experts
    assert [logged[0][f"gate/{k}"] for k in range(experts)] == pytest.approx(expected, rel=1e-5)
    assert [logged[0][f"responsibility/{k}"] for k in range(experts)] == pytest.approx(expected, rel=1e-5)
    gate_rests = logged[-1]["gate/0"] == pytest.approx(expected[0], rel=1e-6)
    assert gate_rests == (name in ("fixed gate", "one expert")) or name == "full heads"

    assert (out / "experts").is_dir() and not (out / "adapter").exists() and not (out / "model").exists()
    report = read_json(out / "experts.json")
    assert len(report["responsibility"]) == experts and sum(report["responsibility"]) == pytest.approx(1, rel=1e-5)
    assert set(report["accuracy"]) == {"curtness", "warmth"}
    assert all(len(shares) == experts and all(0 <= share <= 1 for share in shares)
               for shares in report["accuracy"].values())
    report = read_json(out / "eval.json")
    assert set(report["uses"]) == {"mixture", "sparse", *map(str, range(experts))}
    for metrics in (report["base"]["preferences"], *report["uses"].values()):
        assert metrics["mixing"] == pytest.approx((metrics["warmth"] + metrics["curtness"]) / 2)
    check_that_it_loads_and_is_evaluated_alike(out, policies[0])


def test_the_temperature_of_the_e_step_falls_by_the_same_factor_at_every_step(quick, monkeypatch):
    loss, seen = losses.moe_dpo_loss, []

    def recording(*inputs):
        if torch.is_grad_enabled():
            seen.append(inputs[-1])
        return loss(*inputs)

    monkeypatch.setattr(losses, "moe_dpo_loss", recording)
    run("annealed", *FLAGS, "--max_steps", 4, "--method", "mix-dpo", "--q_temperature", "16,1")
    assert seen == pytest.approx([16, 8, 4, 2])
    run("fixed", *FLAGS, "--method", "mix-dpo", "--q_temperature", 3)
    assert seen[4:] == [3, 3, 3]


def test_two_runs_of_a_seed_give_the_same_bytes_and_another_seed_does_not(quick):
    flags = (*FLAGS, "--method", "moe-dpo", "--expert_noise", 0.1)
    first, second, other = (run(name, *flags, "--seed", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert files_of(first) == files_of(second) and timeless(first) == timeless(second)
    assert len(files_of(first)) >= 6
    assert timeless(first) != timeless(other)


@pytest.mark.parametrize("flags", (("--gate", "prompt"), ("--latent", "annotator", "--gate", "user")),
                         ids=("prompt", "annotator"))
def test_an_interrupted_run_goes_on_to_the_same_bytes(quick, monkeypatch, flags):
    flags = (*FLAGS, "--method", "moe-dpo", *flags)
    straight = run("straight", *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1, signal.SIGINT)
        run("broken", *flags)
    assert Path("out/broken/checkpoint").is_dir() and not Path("out/broken/experts").exists()
    broken = run("broken", *flags, "--resume")
    assert files_of(broken) == files_of(straight) and timeless(broken) == timeless(straight)


# The first step, one pair and one model at a time


def batch_of_two_tastes():
    """The pairs of the first step of a run with FLAGS."""
    return first_batch(preference_pairs(["warmth", "curtness"], annotators=6), 6)


def test_each_expert_is_compared_with_its_own_reference(quick):
    folders = ["out/toy-base-seed1", BASE]
    out = run("run", *FLAGS, "--method", "mix-dpo", "--gate", "0.6,0.4", "--references", ",".join(folders))
    losses, margins = [], []
    for pair in batch_of_two_tastes():
        chosen, rejected = pair_logps(BASE, pair)
        references = [pair_logps(folder, pair) for folder in folders]
        deltas = [0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected)) for ref_chosen, ref_rejected in references]
        losses.append(-math.log(sum(w / (1 + math.exp(-delta)) for w, delta in zip((0.6, 0.4), deltas))))
        margins.append(0.6 * deltas[0] + 0.4 * deltas[1])
    row = rows(out)[0]
    assert max(map(abs, margins)) > 1e-2
    assert row["loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert row["rewards/margins"] == pytest.approx(sum(margins) / 6, rel=1e-3, abs=1e-5)


def test_a_mixture_can_start_from_adapters_one_expert_each(quick):
    for k in (0, 1):
        model = add_experts(load_model(BASE), ["down_proj"], 2, 4, seed=k)
        save_adapter(perturb_experts(model, 0.3, k), f"adapter{k}")
        save_model(merge_experts(model), Path(f"merged{k}"))
    flags = (*SHORT, "--annotators", 6, "--method", "mix-dpo", "--init_adapter", "adapter0,adapter1")
    assert rows(run("start", *flags))[0]["loss"] == pytest.approx(math.log(2), rel=1e-6), "each is its own reference"
    out = run("run", *flags, "--references", f"{BASE},{BASE}")
    total, deltas = 0.0, []
    for pair in batch_of_two_tastes():
        base = pair_logps(BASE, pair)
        for k in (0, 1):
            chosen, rejected = pair_logps(f"merged{k}", pair)
            deltas.append(0.3 * (chosen - base[0] - rejected + base[1]))
        total -= math.log(sum(0.5 / (1 + math.exp(-delta)) for delta in deltas[-2:])) / 6
    assert np.std(deltas) > 1e-2 and rows(out)[0]["loss"] == pytest.approx(total, rel=1e-4)


# Experts and weights


def test_experts_of_every_kind_come_apart_in_training(quick):
    """Copies that start alike and get the same gradient would stay alike for ever."""
    for flags in ((), ("--share", "trunk"), ("--share", "trunk", "--lora_rank", 0)):
        out = run("run", *FLAGS, "--method", "mix-dpo", *flags, "--lr", 1e-2, "--overwrite")
        tensors = load_file(out / "experts/experts.safetensors")
        (name, B), *_ = [(name, tensor) for name, tensor in tensors.items() if name.endswith("lora_B")]
        A = tensors[name.replace("lora_B", "lora_A")]
        first, second = (b @ a for b, a in zip(B.chunk(2, 1), A.chunk(2)))
        assert first.abs().max() > 0 and float((first - second).norm()) > 1e-3 * float(first.norm()), flags


def test_fixed_weights_need_not_sum_to_one(quick):
    out = run("run", *FLAGS, "--method", "mix-dpo", "--gate", "3,1")
    assert [rows(out)[0][f"gate/{k}"] for k in (0, 1)] == pytest.approx([0.75, 0.25])


def test_a_mixture_can_be_evaluated_merged_at_fixed_weights(quick):
    for name, flags in (("adapters", ()), ("heads", ("--share", "trunk"))):
        out = run(name, *FLAGS, "--method", "mix-dpo", *flags)
        eval_file.main([str(out), "--static", "0.5,0.5"])
        report = read_json(out / "eval-static-0.5,0.5.json")
        assert 0 <= report["policy"]["degenerate"] <= 1 and "uses" not in report, "it is one model without a gate"


# Real data


REAL = (*SHORT, "--lora_rank", 4, "--data", "pairs.jsonl")


def test_the_toy_base_trains_on_a_file_as_well(quick):
    """The answers to the toy prompts are judged, by a gate that knows none of the annotators there."""
    grouped_file("pairs.jsonl", ("ann", "bob"), 24)
    out = run("run", *REAL, "--method", "moe-dpo")
    assert read_json(out / "experts/experts.json")["gate"]["groups"] == ["ann", "bob"]
    assert 0 <= read_json(out / "eval.json")["policy"]["degenerate"] <= 1


@pytest.mark.parametrize("method, gate", (("mix-dpo", "constant"), ("moe-dpo", "prompt")))
def test_a_models_default_gate(quick, method, gate):
    grouped_file("pairs.jsonl", ("ann", "", "bob"), 24)
    out = run("run", *REAL, "--method", method, "--held_out", 0, "--model", BASE)
    assert read_json(out / "experts/experts.json")["gate"]["kind"] == gate
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert not (out / "eval.json").exists()


ASPECTS = ("helpfulness", "honesty", "instruction-following", "truthfulness")


def test_ultrafeedback_trains_one_expert_for_each_of_its_four_aspects(quick):
    rng, lines = np.random.default_rng(0), []
    for number in range(14):
        ratings = [rng.permutation(5) + 1 for _ in range(4)]
        lines.append({"instruction": f"Name {number} things.", "completions": [
            {"response": f"{number} words {i}", "annotations": {
                aspect.replace("-", "_"): {"Rating": str(ratings[a][i])} for a, aspect in enumerate(ASPECTS)}}
            for i in range(5)]})
    write_rows("rated.jsonl", *lines)
    out = run("run", "--method", "moe-dpo", "--gate", "user", "--experts", 4, "--data", "rated.jsonl",
              "--model", BASE, "--held_out", 0.2, "--lora_rank", 2, "--max_steps", 3, "--log_every", 1)
    gate = read_json(out / "experts/experts.json")["gate"]
    assert gate["kind"] == "user" and tuple(gate["groups"]) == ASPECTS
    assert load_file(out / "experts/experts.safetensors")["gate.weight"].shape == (4, 4)
    report = read_json(out / "experts.json")
    assert tuple(report["accuracy"]) == ASPECTS and len(report["responsibility"]) == 4
    assert 0.25 <= report["recovered"] <= 1


@pytest.mark.parametrize("flags", (("--gate", "user"), ("--gate", "constant", "--latent", "annotator")), ids=" ".join)
def test_annotators_are_asked_for_where_the_data_names_none(quick, flags):
    grouped_file("pairs.jsonl", ("",), 24)
    message = mistake("--method", "moe-dpo", *flags, "--data", "pairs.jsonl", "--model", BASE, "--max_steps", 1,
                      "--out", "out/wrong")
    assert flags[-2] in message and "these comparisons do not say who made them" in message
    assert not Path("out/wrong").exists()
