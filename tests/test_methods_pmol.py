"""PMoL: targets and soft loss against plain loops, and whole runs on a toy world made small."""
import itertools
import math
import signal
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import data
import toy
from checkpoint import load_model
from common import read_json
from conftest import (BASE, check_that_it_is_evaluated_again_alike, check_that_it_loads_and_is_evaluated_alike,
                      files_of, first_batch, grouped_file, ids_of, interrupt_at, load_run, mistake, preference_pairs,
                      rows, run, timeless, write_rows)
from data import Pair
from lora_moe import expert_layers
from losses import expert_group_soft_loss, group_targets

# The targets


@pytest.mark.parametrize("groups, experts, strict", (
    (1, 1, 0.5), (3, 3, 0.0), (3, 3, 1.0), (2, 6, 0.5), (2, 6, 1.0), (3, 6, [1.0, 0.5, 0.0]), (10, 20, 0.25),
    (2, 4, [0.3]), (4, 4, [0.0, 0.1, 0.9, 1.0])))
def test_targets_are_their_formula(groups, experts, strict):
    target = group_targets(groups, experts, strict)
    assert target.shape == (groups, experts)
    for i in range(groups):
        s = strict if isinstance(strict, float) else strict[i if len(strict) > 1 else 0]
        group = range(i * experts // groups, (i + 1) * experts // groups)
        weights = [1.0 if k in group else 1 - s for k in range(experts)]
        assert target[i].tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6)
        assert float(target[i].sum()) == pytest.approx(1, rel=1e-6)
        if s == 0:
            assert target[i].tolist() == pytest.approx([1 / experts] * experts, rel=1e-6)
        if s == 1:
            assert {k for k in range(experts) if target[i, k] > 0} == set(group)


# The soft loss


def routed(slots, layers=2, tokens=7, seed=0):
    """Router weights (L, tokens, slots) in float64 and the logits behind them, which ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, tokens, slots, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    return logits.softmax(-1), logits


def loop(weights, group, target):
    """KL(D_i ‖ w[:K]) one layer, token and expert at a time, mean over layers and tokens; 0 · log 0 = 0."""
    total = 0.0
    for layer, t in itertools.product(range(weights.shape[0]), range(weights.shape[1])):
        for k in range(target.shape[1]):
            d = float(target[group[t], k])
            if d > 0:
                total = total + d * (math.log(d) - torch.log(weights[layer, t, k]))
    return total / weights.shape[0] / weights.shape[1]


@pytest.mark.parametrize("empty", (True, False), ids=("empty expert", "none"))
@pytest.mark.parametrize("strict", (0.0, 0.5, 1.0, [1.0, 0.0, 0.3]))
def test_soft_loss_and_its_gradients_are_those_of_a_plain_loop(empty, strict):
    target, group = group_targets(3, 6, strict).double(), torch.tensor([0, 2, 2, 1, 0, 1, 2])
    results = []
    for compute in (lambda w: expert_group_soft_loss(w, group, target), lambda w: loop(w, group.tolist(), target)):
        weights, logits = routed(6 + empty)
        value = compute(weights)
        value.backward()
        results.append((float(value.detach()), logits.grad))
    (value, gradient), (expected, expected_gradient) = results
    assert value == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12) and expected_gradient.abs().max() > 1e-3


def test_soft_loss_is_zero_exactly_at_the_target():
    target, group = group_targets(2, 4, 0.5), torch.tensor([0, 1, 1])
    at = target[group].expand(3, 3, 4)
    assert float(expert_group_soft_loss(at, group, target)) == pytest.approx(0, abs=1e-6)
    assert float(expert_group_soft_loss(at.flip(-1), group, target)) > 0.01


@pytest.mark.parametrize("strict", (0.0, 0.5, 1.0))
def test_soft_loss_is_the_divergence_of_renormalised_weights_and_the_empty_experts_share(strict):
    """KL(D ‖ w[:K]) = KL(D ‖ w[:K] / Σ) − log(1 − w_empty)."""
    weights = routed(5, seed=1)[0].detach()
    target, group = group_targets(2, 4, strict).double(), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    target = target / target.sum(-1, keepdim=True)  # to the last digit of float64
    real = weights[..., :4]
    renormalised = loop(real / real.sum(-1, keepdim=True), group.tolist(), target)
    share = statistics.mean(-math.log(1 - empty) for empty in weights[..., 4].flatten().tolist())
    assert float(expert_group_soft_loss(weights, group, target)) == pytest.approx(float(renormalised) + share, rel=1e-9)
    assert share > 0.05


@pytest.mark.parametrize("strict", (0.0, 1.0))
def test_a_router_weight_that_underflows_to_zero_keeps_the_loss_and_its_gradients_finite(strict):
    logits = torch.tensor([[[0.0, -200.0, 0.0], [-200.0, 0.0, -200.0], [-200.0, -200.0, 0.0]]], requires_grad=True)
    weights = logits.softmax(-1)
    assert (weights == 0).sum() == 5
    loss = expert_group_soft_loss(weights, torch.tensor([0, 0, 1]), group_targets(2, 2, strict))
    loss.backward()
    assert math.isfinite(float(loss.detach())) and float(loss.detach()) > 10
    assert torch.isfinite(logits.grad).all()


# Whole runs


FLAGS = ("--method", "pmol", "--lora_rank", 4, "--max_steps", 3, "--log_every", 1)
THREE = ("helpfulness", "harmlessness", "empathy")


@torch.no_grad()
def plain_metrics(flags, pairs, names, target):
    """router/soft_loss, router/empty and router/entropy at the first step: every pair alone, layer by layer, token by
    token. Experts are zero as yet, so the routers see what the base's layers see."""
    _, model, tokenizer = load_run(*flags, groups=names)
    base, inputs_of = load_model(BASE).double(), {}
    routers = {name: layer.router.linear.weight.double() for name, layer in expert_layers(model).items()}
    for name in routers:
        base.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: inputs_of.update({name: inputs[0][0]}))
    divergences, empties, entropies = [], [], []
    for pair in pairs:
        prompt, *responses = ids_of(tokenizer, pair)
        for j, response in enumerate(responses):
            base(torch.tensor([prompt + response]))
            for name, weight in routers.items():
                for x in inputs_of[name][len(prompt) * (j > 0):]:   # the responses share one copy of the prompt
                    scores = [float(score.exp()) for score in weight @ x]
                    w = [score / sum(scores) for score in scores]
                    wanted = target[names.index(pair.group)]
                    divergences.append(sum(d * math.log(d / w[k]) for k, d in enumerate(wanted) if d))
                    empties.append(w[len(wanted)] if len(w) > len(wanted) else 0.0)
                    entropies.append(-sum(weight * math.log(weight) for weight in w))
    return {"router/soft_loss": statistics.mean(divergences), "router/empty": statistics.mean(empties),
            "router/entropy": statistics.mean(entropies)}


RUNS = {  # flags, the preferences, the rows of the target, the weight of the soft loss
    "default": ((), THREE, [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], 0.1),
    "two experts each": (("--groups", "helpfulness,empathy", "--experts", 4), ("helpfulness", "empathy"),
                         [[1 / 3, 1 / 3, 1 / 6, 1 / 6], [1 / 6, 1 / 6, 1 / 3, 1 / 3]], 0.1),
    "no empty expert": (("--no_empty_expert", "--router_temperature", 1.0, "--lora_targets", "mlp"), THREE,
                        [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], 0.1),
    "strictness for each": (("--soft_constraint", "1,0.5,0", "--egs_weight", 0.7), THREE,
                            [[1, 0, 0], [1 / 4, 1 / 2, 1 / 4], [1 / 3, 1 / 3, 1 / 3]], 0.7),
    "no soft loss": (("--egs_weight", 0, "--lora_targets", "down_proj,o_proj"), THREE,
                     [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], 0.0),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_the_metrics_of_a_plain_loop_and_writes_a_mixture(quick, policies, name):
    flags, names, target, egs_weight = RUNS[name]
    out = run("run", *FLAGS, *flags, "--lr", 1e-2)
    first = rows(out)[0]
    expected = plain_metrics((*FLAGS, *flags), first_batch(preference_pairs(names)), names, target)
    assert {metric: first[metric] for metric in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2) + egs_weight * expected["router/soft_loss"], rel=1e-5)
    assert expected["router/soft_loss"] > 0.05 and (expected["router/empty"] > 0) == (name != "no empty expert")
    for row in rows(out):
        assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0
    assert rows(out)[-1]["router/soft_loss"] != pytest.approx(first["router/soft_loss"], rel=1e-4)

    assert (out / "experts").is_dir() and not (out / "adapter").exists() and not (out / "model").exists()
    base = load_file(f"{BASE}/model.safetensors")
    state = {key.replace(".base.", "."): tensor for key, tensor in policies[0].state_dict().items()}
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items()), "the base is as it was"
    moved = [key for key, tensor in state.items() if key.endswith("lora_B") and tensor.any()]
    wrapped = {"no soft loss": 2, "no empty expert": 3}
    assert len(moved) == wrapped.get(name, 1), "every wrapped layer has learnt something"

    report = read_json(out / "eval.json")
    for who in ("policy", "base"):
        metrics = report[who]["preferences"]
        assert metrics["mixing"] == pytest.approx(statistics.mean(metrics[preference] for preference in names))
    assert all(set(layer) == {*names, "entropy"} for layer in report["router"].values())
    check_that_it_loads_and_is_evaluated_alike(out, policies[0])


def test_without_soft_loss_every_steps_loss_is_that_of_dpo(quick):
    out = run("run", *FLAGS, "--egs_weight", 0, "--batch_size", 1, "--lr", 1e-2, "--beta", 1)
    margins = [row["rewards/margins"] for row in rows(out)]
    assert max(map(abs, margins[1:])) > 1e-3
    for row, margin in zip(rows(out), margins):
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)


def test_two_runs_of_a_seed_give_the_same_bytes_and_an_interrupted_one_goes_on_to_them(quick, monkeypatch):
    flags = (*FLAGS, "--groups", "empathy=2,cheer=1")
    first, second = run("first", *flags), run("second", *flags)
    assert files_of(first) == files_of(second) and timeless(first) == timeless(second) and len(files_of(first)) >= 5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1, signal.SIGINT)
        run("broken", *flags)
    broken = run("broken", *flags, "--resume")
    assert files_of(broken) == files_of(first) and timeless(broken) == timeless(first)
    assert timeless(run("second", *flags, "--seed", 1, "--overwrite")) != timeless(first)


def test_checkpointing_trains_the_same_experts_and_routers(quick):
    """The soft loss reads router weights of a pass that is computed twice."""
    flags = (*FLAGS, "--egs_weight", 1, "--lr", 1e-2)
    plain, again = run("plain", *flags), run("again", *flags, "--checkpointing")
    for name, tensor in load_file(plain / "experts/experts.safetensors").items():
        other = load_file(again / "experts/experts.safetensors")[name]
        assert float((tensor - other).norm()) < 1e-4 * float(tensor.norm()), name


@pytest.mark.parametrize("flags", (("--lora_rank", 4), ("--lora_rank", 0)), ids=("LoRA", "all weights"))
def test_baselines_train_on_the_same_pairs_and_are_scored_by_the_same_preferences(quick, encoded_lists, flags):
    mixed = run("mixed", *FLAGS, "--groups", "helpfulness,empathy")
    out = run("plain", "--method", "dpo", "--groups", "helpfulness,empathy", *flags, "--max_steps", 2, "--log_every", 1)
    train_pairs, held_out, *others = encoded_lists
    assert train_pairs == preference_pairs(("helpfulness", "empathy")) and others == [train_pairs, held_out]
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows(out)[0]["logps/chosen"] == pytest.approx(rows(mixed)[0]["logps/chosen"], rel=1e-5), "the same batch"
    report = read_json(out / "eval.json")
    assert {"helpfulness", "empathy", "mixing"} <= set(report["policy"]["preferences"])
    assert report["base"] == read_json(mixed / "eval.json")["base"]
    check_that_it_is_evaluated_again_alike(out)


# Evaluation


def test_the_router_report_has_medians_over_each_preferences_prompts(quick):
    out = run("run", *FLAGS, "--lr", 1e-2)
    report, (model, tokenizer, _) = read_json(out / "eval.json")["router"], checkpoint.load_policy(out)
    layers, entropies = expert_layers(model), {}
    for name, prompts in toy.preference_sample(THREE, "test", 0).items():
        weights = {layer: [] for layer in layers}
        for prompt in prompts:
            with torch.no_grad():
                model(torch.tensor(tokenizer.encode([tokenizer.render(prompt.text)])))
            for layer, module in layers.items():
                weights[layer].append(module.weights[0, -1].tolist())
        for layer, values in weights.items():
            medians = [statistics.median(slot) for slot in zip(*values)]
            assert report[layer][name]["median"] == pytest.approx(medians, rel=1e-4) and len(medians) == 4
            entropies.setdefault(layer, []).extend(-sum(w * math.log(w) for w in row) for row in values)
    for layer, values in entropies.items():
        assert report[layer]["entropy"] == pytest.approx(statistics.mean(values), rel=1e-4)
    assert len({tuple(report[layer][name]["median"]) for layer in layers for name in THREE}) == 3 * len(layers)


# Real data: rows of a file that carry their group


REAL = (*FLAGS, "--data", "pairs.jsonl", "--model", BASE)


def group_names(out):
    """The names in the run's --groups."""
    return [name for name, _ in read_json(out / "config.json")["groups"]]


def pairs_of(lines):
    return [Pair(line["prompt"], line["chosen"], line["rejected"], group=line.get("group", "")) for line in lines]


def test_a_files_groups_are_the_preferences(quick):
    lines = grouped_file("pairs.jsonl", ("kind", "brief", "exact"))
    out = run("run", *REAL, "--held_out", 0, "--soft_constraint", "1,0,0.5")
    settings, names = read_json(out / "config.json"), ("brief", "exact", "kind")
    assert group_names(out) == [*names] and settings["experts"] == 3 and settings["lora_targets"] == "mlp"
    target = [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2]]
    expected = plain_metrics(REAL, first_batch(pairs_of(lines)), names, target)
    assert {metric: rows(out)[0][metric] for metric in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not (out / "eval.json").exists()


def test_a_finished_run_is_kept_or_refused_though_the_data_settle_its_groups(quick, capsys):
    grouped_file("pairs.jsonl", ("kind", "brief", "exact"))
    before = files_of(run("run", *REAL))
    run("run", *REAL)
    assert "out/run: finished with these settings, kept" in capsys.readouterr().out
    for flags, changed in ((("--beta", 0.2), "beta 0.1 (now 0.2)"), (("--experts", 6), "experts 3 (now 6)")):
        assert changed in mistake(*REAL, *flags, "--out", "out/run")
    run("run", *REAL, "--experts", 6, "--overwrite")
    assert "experts 6 (now 3)" in mistake(*REAL, "--out", "out/run") and files_of(Path("out/run")) != before


def test_some_of_a_files_groups_can_be_chosen_in_shares(quick, passes):
    grouped_file("pairs.jsonl", ("kind", "brief", "exact"))
    out = run("run", *REAL, "--held_out", 0.2, "--groups", "kind=3,exact=1", "--experts", 4)
    assert read_json(out / "config.json")["experts"] == 4
    steps = [[encoded.groups[encoded.labels["group"][i]] for i in indices] for encoded, indices in passes
             if len(indices) == 8]
    assert steps and all(set(names) <= {"kind", "exact"} for names in steps)
    assert all(abs(names.count("exact") - 2) <= 1 for names in steps[-3:])
    assert all(encoded.groups == ("kind", "exact") for encoded, _ in passes)
    assert "eval/router/soft_loss" in rows(out)[-1]


@pytest.mark.parametrize("paths", (("kind.jsonl", "brief.jsonl"), ("kind/pairs.jsonl", "brief/pairs.jsonl")),
                         ids=" ".join)
def test_of_several_sources_each_is_a_group(quick, encoded_lists, paths):
    source = {}
    for path, start in zip(paths, (0, 12)):
        Path(path).parent.mkdir(exist_ok=True)
        lines = grouped_file(path, ("ignored",))[start:start + 12]
        write_rows(path, *lines)
        source.update({line["prompt"] + line["chosen"]: path for line in lines})
    out = run("run", *FLAGS, "--model", BASE, "--data", ",".join(paths), "--held_out", 0)
    assert read_json(out / "config.json")["experts"] == 2
    [pairs] = encoded_lists
    groups = {path: {pair.group for pair in pairs if source[pair.prompt + pair.chosen] == path} for path in paths}
    assert len(pairs) == 24 and all(len(names) == 1 for names in groups.values())
    assert set.union(*groups.values()) == set(group_names(out))


def test_the_toy_base_mixes_the_groups_of_a_file_by_default(quick):
    grouped_file("pairs.jsonl", ("kind", "brief"))
    out = run("run", *FLAGS, "--data", "pairs.jsonl")
    assert group_names(out) == ["brief", "kind"]
    assert "harmful" in read_json(out / "eval.json")["router"]["model.layers.0.mlp.down_proj"]


def test_held_out_pairs_of_other_groups_are_no_obstacle(quick):
    """All that is held out belongs to a group that is not mixed."""
    lines = grouped_file("pairs.jsonl", ("kind",))
    for line in lines:
        line["group"] = "other" if data.prompt_hash(line["prompt"]) < 0.3 * 2**64 else "kind"
    assert {line["group"] for line in lines} == {"kind", "other"}
    write_rows("pairs.jsonl", *lines)
    out = run("run", "--method", "dpo", "--data", "pairs.jsonl", "--model", BASE, "--held_out", 0.3, "--groups", "kind",
              "--max_steps", 2, "--log_every", 1)
    assert math.isfinite(rows(out)[-1]["loss"]) and not any(name.startswith("eval/") for name in rows(out)[-1])


def test_rows_without_a_group_have_no_target(quick):
    """They train the experts by DPO; the soft loss is of the other rows' tokens."""
    pairs = first_batch(pairs_of(grouped_file("pairs.jsonl", ("kind", "", "brief"))))
    labelled = [pair for pair in pairs if pair.group]
    assert 0 < len(labelled) < len(pairs) and not pairs[0].group
    out = run("run", *REAL, "--held_out", 0)
    assert group_names(out) == ["brief", "kind"]
    assert all(math.isfinite(value) for row in rows(out) for value in row.values())
    expected = plain_metrics(REAL, labelled, ("brief", "kind"), [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    assert rows(out)[0]["router/soft_loss"] == pytest.approx(expected["router/soft_loss"], rel=1e-4)
    alone = rows(run("alone", *REAL, "--held_out", 0, "--batch_size", 1))
    assert alone[0]["router/soft_loss"] == 0 < alone[2]["router/soft_loss"], "the first pair is alone, and has no group"


def test_data_without_the_groups_that_are_asked_for_is_named(quick):
    grouped_file("pairs.jsonl", ("kind", "brief"))
    message = mistake(*REAL, "--groups", "kind,gentle", "--out", "out/wrong")
    assert "--groups" in message and "gentle" in message and "brief, kind" in message
    grouped_file("pairs.jsonl", ("",))
    message = mistake(*REAL, "--out", "out/wrong")
    assert "do not say which preference they belong to" in message
    message = mistake(*REAL, "--groups", "kind", "--out", "out/wrong")
    assert "kind" in message.partition("no groups")[0] and "no groups" in message
    assert not Path("out/wrong").exists()
