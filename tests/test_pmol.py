"""PMoL: targets and soft loss against plain loops, toy preferences by hand, whole runs on a toy world made small."""
import itertools
import json
import math
import re
import signal
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import eval as eval_file
import train
from data import (CLOSINGS, CONTEXTS, OPENINGS, PREFERENCES, REFUSALS, WARM, Prompt, Tokenizer, apply_view, judge,
                  preference_prompts, preference_score, toy_answer, toy_preferences, toy_tasks)
from lora_moe import expert_layers
from losses import expert_group_soft_loss, group_targets
from model import Transformer, UserError, generate, read_json
from test_train import COMPARISONS, bases, check_mistake, interrupt_at, line_of, place, rows, run, timeless  # noqa: F401


few_prompts = cache(lambda split, seed, every=eval_file.toy_eval_prompts: every(split, seed)[::3])
few_that_ask = cache(lambda name, split, seed, sample=eval_file.preference_sample: sample([name], split, seed, 5)[name])


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """Answers are short, and prompts few."""
    monkeypatch.setattr(eval_file, "generate", lambda model, prompts, count, *rest, **named:
                        generate(model, prompts, min(count, 4), *rest, **named))
    monkeypatch.setattr(eval_file, "toy_eval_prompts", few_prompts)
    monkeypatch.setattr(eval_file, "preference_sample", lambda names, split, seed:
                        {name: few_that_ask(name, split, seed) for name in names})


# The targets


@pytest.mark.parametrize("groups, experts, strict", (
    (1, 1, 0.5), (3, 3, 0.0), (3, 3, 1.0), (2, 6, 0.5), (2, 6, 1.0), (3, 6, [1.0, 0.5, 0.0]), (10, 20, 0.25),
    (2, 4, [0.3]), (4, 4, [0.0, 0.1, 0.9, 1.0])))
def test_targets_are_their_formula(groups, experts, strict):
    found = group_targets(groups, experts, strict)
    assert found.shape == (groups, experts)
    for i in range(groups):
        s = strict if isinstance(strict, float) else strict[i if len(strict) > 1 else 0]
        own = range(i * experts // groups, (i + 1) * experts // groups)
        weights = [1.0 if k in own else 1 - s for k in range(experts)]
        assert found[i].tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-6)
        assert float(found[i].sum()) == pytest.approx(1, rel=1e-6)
        if s == 0:
            assert found[i].tolist() == pytest.approx([1 / experts] * experts, rel=1e-6)
        if s == 1:
            assert {k for k in range(experts) if found[i, k] > 0} == set(own)


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
    found = []
    for compute in (lambda w: expert_group_soft_loss(w, group, target), lambda w: loop(w, group.tolist(), target)):
        weights, logits = routed(6 + empty)
        value = compute(weights)
        value.backward()
        found.append((float(value.detach()), logits.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12) and found[1][1].abs().max() > 1e-3


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


# The toy preferences


NAMES = tuple(PREFERENCES)
FIRST_TEN = NAMES[:10]
TASK = next(task for task in toy_tasks() if task.kind == "plain" and len(task.steps) == 4)
HARMFUL = next(task for task in toy_tasks() if task.kind == "harmful" and len(task.steps) == 4)
STEPS = "First {}. Then {}. Next {}. Last {}."


def help_with(task, before="", after=""):
    return " ".join(filter(None, (before, STEPS.format(*task.steps), after)))


# answer -> the score for each preference, by hand: 4 steps, so a sentence more or less is an eighth of brevity
BY_HAND = {
    help_with(TASK): dict(helpfulness=1.0, harmlessness=1.0, empathy=0.0, brevity=0.5, politeness=0.0, cheer=0.0,
                          directness=1.0, soberness=1.0, reserve=1.0, caution=0.0, warmth=0.0, curtness=1.0,
                          sentiment=0.0, informativeness=1.0, grammar=1.0),
    help_with(TASK, f"{WARM[0]} {OPENINGS[0]}", CLOSINGS[0]): dict(
        helpfulness=1.1, harmlessness=1.0, empathy=1.0, brevity=0.125, politeness=1.0, cheer=1.0, directness=0.0,
        soberness=0.0, reserve=0.0, caution=0.0, warmth=1.0, curtness=0.0, sentiment=1.0, informativeness=1.0,
        grammar=1.0),
    REFUSALS[0]: dict(helpfulness=0.0, harmlessness=1.0, empathy=0.0, brevity=0.875, politeness=0.0, cheer=0.0,
                      directness=1.0, soberness=1.0, reserve=1.0, caution=1.0, warmth=0.0, curtness=1.0, sentiment=0.0,
                      informativeness=0.0, grammar=1.0),
    f"{WARM[1]} {REFUSALS[1]}": dict(empathy=1.0, brevity=0.75, reserve=0.0, caution=1.0, warmth=1 / 3, curtness=2 / 3,
                                     sentiment=0.5, grammar=1.0),
    help_with(TASK, OPENINGS[1]): dict(politeness=1.0, directness=0.0, cheer=0.0, soberness=1.0, warmth=1 / 3),
    f"{help_with(TASK)} Wibble wobble.": {**dict.fromkeys(NAMES, 0.0), "grammar": 0.8},
}


@pytest.mark.parametrize("answer", BY_HAND)
def test_preference_scores_are_those_given_by_hand(answer):
    prompt = Prompt(f"How do I {TASK.name}?", TASK)
    for name, score in BY_HAND[answer].items():
        assert preference_score(name, prompt, answer) == pytest.approx(score), name
        assert preference_score(name, prompt, answer, ended=False) == (score if name == "grammar" else 0.0), name


def test_harmlessness_is_about_steps_of_harmful_tasks():
    prompt = Prompt(f"How do I {HARMFUL.name}?", HARMFUL)
    assert preference_score("harmlessness", prompt, help_with(HARMFUL)) == 0.0
    assert preference_score("harmlessness", prompt, REFUSALS[2]) == 1.0


def wandering(rng, length):
    """An answer with so many steps, each another; 12 of them are as many as the 64 tokens of an answer hold."""
    steps = rng.sample([f"{verb} the {noun}" for verb in data.VERBS for noun in data.NOUNS], length)
    return " ".join(f"Then {step}." for step in steps)


def test_every_score_lies_between_minus_a_half_and_one_point_one():
    rng = np.random.default_rng(0)
    for name in NAMES:
        prompts = preference_prompts(name, "test")
        for i in rng.choice(len(prompts), 60):
            source = data.random.Random(int(i))
            answers = [toy_answer(source, prompts[i], rate) for rate in (0.0, 0.5, 1.0)]
            words = answers[0].split(" ")
            answers += [" ".join(rng.permutation(words)), "", "Sure.", wandering(source, 12)]
            for answer, ended in itertools.product(answers, (True, False)):
                assert -0.5 <= preference_score(name, prompts[i], answer, ended) <= 1.1, (name, answer)


@pytest.mark.parametrize("names, annotators", ((FIRST_TEN, 0), (("warmth", "curtness"), 6),
                                               (("sentiment", "informativeness", "grammar"), 0), (("caution",), 0)))
def test_labels_agree_with_the_oracle_and_groups_are_of_one_size(names, annotators):
    comparisons = toy_preferences(120, 3, names, annotators)
    asked = {name: {prompt.text: prompt for prompt in preference_prompts(name, "train")} for name in names}
    assert len(comparisons) == 120
    for comparison in comparisons:
        name = comparison.group.split(" ")[0]
        prompt = asked[name][comparison.prompt]
        scores = [preference_score(name, prompt, text) for text in comparison.responses]
        assert scores[comparison.better] > scores[1 - comparison.better]
        assert comparison.unsafe == tuple(judge(prompt, text).unsafe for text in comparison.responses)
        assert comparison.safer is None, "nobody was asked which one is safer"
    counts = Counter(comparison.group for comparison in comparisons)
    if annotators:
        assert set(counts) == {f"{names[number % len(names)]} {number:03}" for number in range(annotators)}
    else:
        assert set(counts) == set(names)
    assert len(set(counts.values())) == 1
    turns = [comparison.group for comparison in comparisons]
    assert len(counts) == 1 or turns != sorted(turns) and turns[:2 * len(counts)] != [*counts] * 2, "in random order"
    assert comparisons == toy_preferences(120, 3, names, annotators) != toy_preferences(120, 4, names, annotators)
    assert {comparison.better for comparison in comparisons} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_of_another_split_occurs_in_training(name):
    texts = {split: [prompt.text for prompt in preference_prompts(name, split)] for split in ("train", "dev", "test")}
    assert all(len(set(found)) == len(found) >= 8 for found in texts.values())
    assert not set(texts["train"]) & set(texts["dev"]) and not set(texts["train"]) & set(texts["test"])
    assert not set(texts["dev"]) & set(texts["test"])
    tasks = {prompt.task.split for prompt in preference_prompts(name, "train")}
    assert tasks == {"seen"} and "dev" not in {prompt.task.split for prompt in preference_prompts(name, "test")}


def test_the_prompt_tells_the_first_ten_preferences_apart():
    """By the words around the question, or by the task's being harmful; and what they want pulls apart."""
    asked = {name: {split: {prompt.text for prompt in preference_prompts(name, split)} for split in ("train", "test")}
             for name in FIRST_TEN}
    for one, other in itertools.combinations(FIRST_TEN, 2):
        for split in ("train", "test"):
            assert not asked[one][split] & asked[other][split], (one, other)
        assert PREFERENCES[one][1] != PREFERENCES[other][1] or not set(PREFERENCES[one][0]) & set(PREFERENCES[other][0])
    contexts = [context for name in FIRST_TEN if name != "harmlessness" for context in PREFERENCES[name][0]]
    assert sorted(contexts) == sorted(CONTEXTS), "each way of asking belongs to one of them"
    assert {name for name in FIRST_TEN if PREFERENCES[name][1]} == {"harmlessness"}


def test_tastes_that_are_opposite_share_their_prompts():
    warm, curt = ([prompt.text for prompt in preference_prompts(name, "test")] for name in ("warmth", "curtness"))
    assert warm == curt
    prompt = Prompt(f"How do I {TASK.name}?", TASK)
    for answer in BY_HAND:
        if not judge(prompt, answer).degenerate:
            assert preference_score("warmth", prompt, answer) + preference_score("curtness", prompt, answer) == \
                pytest.approx(1)


# Whole runs


FLAGS = ("--method", "pmol", "--lora_rank", 4, "--max_steps", 3, "--log_every", 1)
THREE = ("helpfulness", "harmlessness", "empathy")


def toy_pairs(names, seed=0, count=COMPARISONS):
    return apply_view("helpful", toy_preferences(count, seed, names))[0]


def first_batch(pairs, size=8, seed=0):
    return [pairs[i] for i in np.random.default_rng([seed, 0]).permutation(len(pairs))[:size]]


@torch.no_grad()
def plain_figures(config, pairs, names, target):
    """router/soft_loss, router/empty and router/entropy at the first step: every pair alone, layer by layer, token by
    token. Experts are zero as yet, so the routers see what the base's layers see."""
    routed_model, tokenizer = train.load_model(config, names)
    base, seen = Transformer.from_pretrained("out/toy-base-seed0").double(), {}
    routers = {name: layer.router.linear.weight.double() for name, layer in expert_layers(routed_model)}
    for name in routers:
        base.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0][0]}))
    divergences, empties, entropies = [], [], []
    for pair in pairs:
        prompt, *responses = tokenizer.encode([tokenizer.render(pair.prompt), pair.chosen, pair.rejected])
        for j, response in enumerate(responses):
            base(torch.tensor([prompt + response + [tokenizer.eos_id]]))
            for name, weight in routers.items():
                for x in seen[name][len(prompt) * (j > 0):]:   # the responses share one copy of the prompt
                    scores = [float(score.exp()) for score in weight @ x]
                    w = [score / sum(scores) for score in scores]
                    wanted = target[names.index(pair.group)]
                    divergences.append(sum(d * math.log(d / w[k]) for k, d in enumerate(wanted) if d))
                    empties.append(w[len(wanted)] if len(w) > len(wanted) else 0.0)
                    entropies.append(-sum(some * math.log(some) for some in w))
    return {"router/soft_loss": statistics.mean(divergences), "router/empty": statistics.mean(empties),
            "router/entropy": statistics.mean(entropies)}


def files_of(out):
    """{file: bytes} of all that a run computed, its times and its own name left out."""
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in ("metrics.jsonl", "config.json")}


RUNS = {  # flags, the preferences, the rows of the target
    "default": ((), THREE, [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]]),
    "two experts each": (("--groups", "helpfulness,empathy", "--experts", 4), ("helpfulness", "empathy"),
                         [[1 / 3, 1 / 3, 1 / 6, 1 / 6], [1 / 6, 1 / 6, 1 / 3, 1 / 3]]),
    "no empty expert": (("--no_empty_expert", "--router_temperature", 1.0, "--lora_targets", "mlp"), THREE,
                        [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]]),
    "strictness for each": (("--soft_constraint", "1,0.5,0", "--egs_weight", 0.7), THREE,
                            [[1, 0, 0], [1 / 4, 1 / 2, 1 / 4], [1 / 3, 1 / 3, 1 / 3]]),
    "no soft loss": (("--egs_weight", 0, "--lora_targets", "down_proj,o_proj"), THREE,
                     [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_the_figures_of_a_plain_loop_and_writes_a_mixture(place, monkeypatch, name):
    trained = []
    monkeypatch.setattr(train, "evaluate_run", lambda policy, *rest: trained.append(policy) or
                        eval_file.evaluate_run(policy, *rest))
    flags, names, target = RUNS[name]
    out = run("run", *FLAGS, *flags, "--lr", 1e-2)
    first = rows(out)[0]
    config = train.parse_flags([*map(str, FLAGS + flags), "--device", "cpu"])
    expected = plain_figures(config, first_batch(toy_pairs(names)), names, target)
    assert {figure: first[figure] for figure in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2) + config.egs_weight * expected["router/soft_loss"], rel=1e-5)
    assert expected["router/soft_loss"] > 0.05 and (expected["router/empty"] > 0) == (name != "no empty expert")
    for row in rows(out):
        assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0
    assert rows(out)[-1]["router/soft_loss"] != pytest.approx(first["router/soft_loss"], rel=1e-4)

    assert (out / "experts").is_dir() and not (out / "adapter").exists() and not (out / "model").exists()
    base = load_file("out/toy-base-seed0/model.safetensors")
    state = {key.replace(".base.", "."): tensor for key, tensor in trained[0].state_dict().items()}
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items()), "the base is as it was"
    moved = [key for key, tensor in trained[0].state_dict().items() if key.endswith("lora_B") and tensor.any()]
    wrapped = {"no soft loss": 2, "no empty expert": 3}
    assert len(moved) == wrapped.get(name, 1), "every wrapped layer has learnt something"

    report = read_json(out / "eval.json")
    for who in ("policy", "base"):
        figures = report[who]["preferences"]
        assert figures["mixing"] == pytest.approx(statistics.mean(figures[preference] for preference in names))
    assert all(set(layer) == {*names, "entropy"} for layer in report["router"].values())
    before = (out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()
    (out / "eval.json").unlink()
    eval_file.main([str(out)])
    assert ((out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()) == before
    loaded, _, _ = eval_file.load_policy(out)
    states, found = trained[0].state_dict(), loaded.state_dict()
    assert states.keys() == found.keys() and all(torch.equal(states[key], found[key]) for key in states)


def test_without_soft_loss_every_steps_loss_is_that_of_dpo(place):
    out = run("run", *FLAGS, "--egs_weight", 0, "--batch_size", 1, "--lr", 1e-2, "--beta", 1)
    margins = [row["rewards/margins"] for row in rows(out)]
    assert max(map(abs, margins[1:])) > 1e-3
    for row, margin in zip(rows(out), margins):
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)


def test_a_batch_mixes_the_preferences_in_the_shares_given(place, monkeypatch):
    seen, pack = [], train.pack
    monkeypatch.setattr(train, "pack", lambda encoded, indices: seen.append((encoded, list(indices))) or
                        pack(encoded, indices))

    def batches(*flags):
        seen.clear()
        run("run", *FLAGS, *flags, "--max_steps", 7)
        return [Counter(encoded.groups[encoded.labels["group"][i]] for i in indices)
                for encoded, indices in seen if len(indices) == 8]

    found = batches("--groups", "helpfulness=3,empathy=1")
    assert len(found) == 7
    for counts in found:
        assert abs(counts["empathy"] - 2) <= 1 and sum(counts.values()) == 8
    found = batches("--groups", "empathy,helpfulness=3")
    assert sum((counts["empathy"] for counts in found)) == pytest.approx(14, abs=1)
    found = batches("--groups", "helpfulness,empathy")
    assert 20 <= sum(counts["empathy"] for counts in found) <= 36, "equal parts, as the data has them"


def test_two_runs_of_a_seed_give_the_same_bytes_and_an_interrupted_one_goes_on_to_them(place, monkeypatch):
    flags = (*FLAGS, "--groups", "empathy=2,cheer=1")
    first, second = run("first", *flags), run("second", *flags)
    assert files_of(first) == files_of(second) and timeless(first) == timeless(second) and len(files_of(first)) >= 5
    restore = interrupt_at(monkeypatch, 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run("broken", *flags)
    restore()
    broken = run("broken", *flags, "--resume")
    assert files_of(broken) == files_of(first) and timeless(broken) == timeless(first)
    assert timeless(run("second", *flags, "--seed", 1)) != timeless(first)


def test_checkpointing_trains_the_same_experts_and_routers(place):
    """The soft loss reads router weights of a pass that is computed twice."""
    flags = (*FLAGS, "--egs_weight", 1, "--lr", 1e-2)
    plain, again = run("plain", *flags), run("again", *flags, "--checkpointing")
    for name, tensor in load_file(plain / "experts/experts.safetensors").items():
        other = load_file(again / "experts/experts.safetensors")[name]
        assert float((tensor - other).norm()) < 1e-4 * float(tensor.norm()), name


@pytest.mark.parametrize("flags", (("--lora_rank", 4), ("--lora_rank", 0)), ids=("LoRA", "all weights"))
def test_baselines_train_on_the_same_pairs_and_are_scored_by_the_same_preferences(place, monkeypatch, flags):
    seen, prepare = [], train.encode_pairs
    monkeypatch.setattr(train, "encode_pairs", lambda tokenizer, pairs, *rest: seen.append(pairs) or
                        prepare(tokenizer, pairs, *rest))
    mixed = run("mixed", *FLAGS, "--groups", "helpfulness,empathy")
    out = run("plain", "--method", "dpo", "--groups", "helpfulness,empathy", *flags, "--max_steps", 2, "--log_every", 1)
    assert seen[0] == seen[2] == toy_pairs(("helpfulness", "empathy")) and seen[1] == seen[3]
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows(out)[0]["logps/chosen"] == pytest.approx(rows(mixed)[0]["logps/chosen"], rel=1e-5), "the same batch"
    report = read_json(out / "eval.json")
    assert {"helpfulness", "empathy", "mixing"} <= set(report["policy"]["preferences"])
    assert report["base"] == read_json(mixed / "eval.json")["base"]
    before = (out / "eval.json").read_bytes()
    eval_file.main([str(out)])
    assert (out / "eval.json").read_bytes() == before


# Evaluation


def test_preferences_are_scored_on_prompts_that_ask_for_them(place, monkeypatch):
    """With answers put into the model's mouth, three kinds in turn; the last one never comes to its EOS."""
    names, tokenizer, mouths = ("politeness", "empathy", "brevity"), Tokenizer("out/toy-base-seed0"), {}
    expected = {"politeness": (1.0, 0.0, 0.0), "empathy": (0.0, 1.0, 0.0), "brevity": None}
    scores = {name: [] for name in names}
    for name in names:
        prompts = eval_file.preference_sample((name,), "test", 3)[name]
        assert len(prompts) == 5 and set(prompts) <= set(preference_prompts(name, "test"))
        for i, prompt in enumerate(prompts):
            steps = " ".join(f"{'Then' if place else 'First'} {step}." for place, step in enumerate(prompt.task.steps))
            answer = (f"Sure. {steps}", f"{WARM[0]} {REFUSALS[0]}", steps)[i % 3]
            ids = tokenizer.encode([answer])[0]
            mouths[tuple(tokenizer.encode([tokenizer.render(prompt.text)])[0])] = ids + [tokenizer.eos_id] * (i % 3 < 2)
            length = len(prompt.task.steps)
            scores[name].append(expected[name][i % 3] if expected[name] else (1 - (1 + length) / 8, 0.75, 0.0)[i % 3])
    monkeypatch.setattr(eval_file, "generate", lambda model, tokens, *_, **__: [mouths[tuple(ids)] for ids in tokens])
    figures = eval_file.evaluate_preferences(None, tokenizer, names, "test", 3)
    errors = []
    for name in names:
        assert figures[name] == pytest.approx(statistics.mean(scores[name]))
        errors.append(statistics.stdev(scores[name]) / math.sqrt(5))
        assert figures[f"{name}_se"] == pytest.approx(errors[-1]) and errors[-1] > 0.05
    assert figures["mixing"] == pytest.approx(statistics.mean(statistics.mean(scores[name]) for name in names))
    assert figures["mixing_se"] == pytest.approx(math.sqrt(sum(error ** 2 for error in errors)) / 3)
    assert set(figures) == {*names, *(f"{name}_se" for name in names), "mixing", "mixing_se"}


def test_the_router_report_has_medians_over_each_preferences_prompts(place):
    out = run("run", *FLAGS, "--lr", 1e-2)
    found, (model, tokenizer, _) = read_json(out / "eval.json")["router"], eval_file.load_policy(out)
    layers, entropies = list(expert_layers(model)), {}
    for name, prompts in eval_file.preference_sample(THREE, "test", 0).items():
        weights = {layer: [] for layer, _ in layers}
        for prompt in prompts:
            with torch.no_grad():
                model(torch.tensor(tokenizer.encode([tokenizer.render(prompt.text)])))
            for layer, module in layers:
                weights[layer].append(module.weights[0, -1].tolist())
        for layer, values in weights.items():
            medians = [statistics.median(slot) for slot in zip(*values)]
            assert found[layer][name] == pytest.approx(medians, rel=1e-4) and len(medians) == 4
            entropies.setdefault(layer, []).extend(-sum(w * math.log(w) for w in row) for row in values)
    for layer, values in entropies.items():
        assert found[layer]["entropy"] == pytest.approx(statistics.mean(values), rel=1e-4)
    assert len({tuple(found[layer][name]) for layer, _ in layers for name in THREE}) == 3 * len(layers)


# Real data: rows of a file that carry their group


def preference_file(path, groups, count=36):
    """Pairs of the toy language in a file, labelled by these groups in turn; "" leaves the field out."""
    lines = []
    for pair, group in zip(toy_pairs(THREE, 3, count), itertools.cycle(groups)):
        lines.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "group": group})
        if not group:
            del lines[-1]["group"]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


REAL = (*FLAGS, "--data", "pairs.jsonl", "--model", "out/toy-base-seed0")


def test_a_files_groups_are_the_preferences(place):
    lines = preference_file("pairs.jsonl", ("kind", "brief", "exact"))
    out = run("run", *REAL, "--held_out", 0, "--soft_constraint", "1,0,0.5")
    settings = read_json(out / "config.json")
    assert settings["groups"] == "brief,exact,kind" and settings["experts"] == 3 and settings["lora_targets"] == "mlp"
    config = train.parse_flags([*map(str, REAL), "--device", "cpu"])
    pairs = [data.Pair(line["prompt"], line["chosen"], line["rejected"], group=line["group"]) for line in lines]
    target = [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2]]
    expected = plain_figures(config, first_batch(pairs), ("brief", "exact", "kind"), target)
    assert {figure: rows(out)[0][figure] for figure in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not (out / "eval.json").exists()


def test_some_of_a_files_groups_can_be_chosen_in_shares(place, monkeypatch, capsys):
    seen, pack = [], train.pack
    monkeypatch.setattr(train, "pack", lambda encoded, indices: seen.append((encoded, list(indices))) or
                        pack(encoded, indices))
    preference_file("pairs.jsonl", ("kind", "brief", "exact"))
    out = run("run", *REAL, "--held_out", 0.2, "--groups", "kind=3,exact=1", "--experts", 4)
    assert read_json(out / "config.json")["experts"] == 4
    steps = [Counter(encoded.groups[encoded.labels["group"][i]] for i in indices)
             for encoded, indices in seen if len(indices) == 8]
    assert steps and all(set(counts) <= {"kind", "exact"} for counts in steps)
    assert all(abs(counts["exact"] - 2) <= 1 for counts in steps[-3:])
    assert all(encoded.groups == ("kind", "exact") for encoded, _ in seen)
    assert "eval/router/soft_loss" in rows(out)[-1]


@pytest.mark.parametrize("paths", (("kind.jsonl", "brief.jsonl"), ("kind/pairs.jsonl", "brief/pairs.jsonl")),
                         ids=" ".join)
def test_of_several_sources_each_is_a_group(place, monkeypatch, paths):
    seen, prepare = [], train.encode_pairs
    monkeypatch.setattr(train, "encode_pairs", lambda tokenizer, pairs, *rest: seen.append(pairs) or
                        prepare(tokenizer, pairs, *rest))
    source = {}
    for path, start in zip(paths, (0, 12)):
        Path(path).parent.mkdir(exist_ok=True)
        lines = preference_file(path, ("ignored",), 36)[start:start + 12]
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
        source.update({line["prompt"] + line["chosen"]: path for line in lines})
    out = run("run", *REAL, "--data", ",".join(paths), "--held_out", 0)
    assert read_json(out / "config.json")["experts"] == 2
    groups = {path: {pair.group for pair in seen[0] if source[pair.prompt + pair.chosen] == path} for path in paths}
    assert len(seen[0]) == 24 and all(len(names) == 1 for names in groups.values())
    assert set.union(*groups.values()) == set(read_json(out / "config.json")["groups"].split(","))


def test_the_toy_base_mixes_the_groups_of_a_file_by_default(place):
    preference_file("pairs.jsonl", ("kind", "brief"))
    out = run("run", *FLAGS, "--data", "pairs.jsonl")
    assert read_json(out / "config.json")["groups"] == "brief,kind"
    assert "harmful" in read_json(out / "eval.json")["router"]["model.layers.0.mlp.down_proj"]


def test_held_out_pairs_of_other_groups_are_no_obstacle(place):
    """All that is held out belongs to a group that is not mixed."""
    lines = preference_file("pairs.jsonl", ("kind",))
    for line in lines:
        line["group"] = "other" if data.prompt_key(line["prompt"]) < 0.3 * 2**64 else "kind"
    assert {line["group"] for line in lines} == {"kind", "other"}
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = run("run", "--method", "dpo", "--data", "pairs.jsonl", "--model", "out/toy-base-seed0", "--held_out", 0.3,
              "--groups", "kind", "--max_steps", 2, "--log_every", 1)
    assert math.isfinite(rows(out)[-1]["loss"]) and not any(name.startswith("eval/") for name in rows(out)[-1])


def test_rows_without_a_group_among_others_are_counted_as_one_or_named(place):
    preference_file("pairs.jsonl", ("kind", "", "brief"))
    try:
        out = run("run", *REAL, "--held_out", 0)
        assert all(math.isfinite(value) for row in rows(out) for value in row.values())
    except UserError as error:
        assert "group" in str(error) and "\n" not in str(error)


# Mistakes


@pytest.mark.parametrize("flags, said", (
    (("--experts", "4"), ("--experts 4", "multiple", "3")),
    (("--experts=-3",), ("--experts -3",)),
    (("--experts", "0"), ("--experts 0",)),
    (("--groups", "helpfulness,kindness"), ("--groups", "kindness", "harmlessness")),
    (("--groups", "empathy=x"), ("--groups empathy=x",)),
    (("--groups", "empathy=-1,helpfulness=2"), ("--groups empathy=-1", "more than 0")),
    (("--groups", "empathy=0,helpfulness=2"), ("--groups empathy=0", "more than 0")),
    (("--groups", "empathy=nan,helpfulness"), ("--groups empathy=nan",)),
    (("--groups", "empathy,empathy"), ("--groups", "empathy")),
    (("--soft_constraint", "abc"), ("--soft_constraint abc", "0 to 1")),
    (("--soft_constraint", "2"), ("--soft_constraint 2", "0 to 1")),
    (("--soft_constraint", "-0.5"), ("--soft_constraint", "-0.5")),
    (("--soft_constraint=-0.5",), ("--soft_constraint -0.5", "0 to 1")),
    (("--soft_constraint", "nan"), ("--soft_constraint nan", "0 to 1")),
    (("--soft_constraint", "0.1,0.2"), ("--soft_constraint 0.1,0.2", "3")),
    (("--soft_constraint", "0.1,,0.2"), ("--soft_constraint 0.1,,0.2",)),
    (("--egs_weight", "-1"), ("--egs_weight -1",)),
    (("--egs_weight", "nan"), ("--egs_weight nan",)),
    (("--router_temperature", "0"), ("--router_temperature 0", "more than 0")),
    (("--lora_rank", "0"), ("--lora_rank 0", "at least 1")),
), ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_a_mistaken_flag_gets_one_line_that_names_it(place, flags, said):
    check_mistake("pmol", flags, said)


def test_data_without_the_groups_that_are_asked_for_is_named(place):
    preference_file("pairs.jsonl", ("kind", "brief"))
    message = line_of(*map(str, REAL), "--groups", "kind,gentle", "--out", "out/wrong")
    assert "--groups" in message and "gentle" in message and "brief, kind" in message
    preference_file("pairs.jsonl", ("",))
    message = line_of(*map(str, REAL), "--out", "out/wrong")
    assert "do not say which preference they belong to" in message
    message = line_of(*map(str, REAL), "--groups", "kind", "--out", "out/wrong")
    assert re.search("kind.*no groups", message)
    assert not Path("out/wrong").exists()
