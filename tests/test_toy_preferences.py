"""The toy world's preferences: scores by hand, labels that agree with the oracle, and prompts that ask for them."""
import itertools
import math
import random
import statistics
from collections import Counter
from functools import partial

import numpy as np
import pytest

import eval as eval_file
import toy
from chat import Tokenizer
from checkpoint import load_model
from conftest import BASE
from toy import (CLOSINGS, CONTEXTS, OPENINGS, PREFERENCES, REFUSALS, WARM, Prompt, draw_answer, make_preferences,
                 oracle, preference_prompts, preference_score, tasks)

FIRST_TEN = ("helpfulness", "harmlessness", "empathy", "brevity", "politeness", "cheer", "directness", "soberness",
             "reserve", "caution")
NAMES = tuple(PREFERENCES)
TASK = next(task for task in tasks() if task.kind == "plain" and len(task.steps) == 4)
HARMFUL = next(task for task in tasks() if task.kind == "harmful" and len(task.steps) == 4)
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
    steps = rng.sample([f"{verb} the {noun}" for verb in toy.VERBS for noun in toy.NOUNS], length)
    return " ".join(f"Then {step}." for step in steps)


def test_every_score_lies_between_minus_a_half_and_one_point_one():
    rng = np.random.default_rng(0)
    for name in NAMES:
        prompts = preference_prompts(name, "test")
        for i in rng.choice(len(prompts), 60):
            source = random.Random(int(i))
            answers = [draw_answer(source, prompts[i], rate) for rate in (0.0, 0.5, 1.0)]
            words = answers[0].split(" ")
            answers += [" ".join(rng.permutation(words)), "", "Sure.", wandering(source, 12)]
            for answer, ended in itertools.product(answers, (True, False)):
                assert -0.5 <= preference_score(name, prompts[i], answer, ended) <= 1.1, (name, answer)


@pytest.mark.parametrize("names, annotators", ((FIRST_TEN, 0), (("warmth", "curtness"), 6),
                                               (("sentiment", "informativeness", "grammar"), 0), (("caution",), 0)))
def test_labels_agree_with_the_oracle_and_groups_are_of_one_size(names, annotators):
    comparisons = make_preferences(120, 3, names, annotators)
    asked = {name: {prompt.text: prompt for prompt in preference_prompts(name, "train")} for name in names}
    assert len(comparisons) == 120
    for comparison in comparisons:
        name = comparison.group.split(" ")[0]
        prompt = asked[name][comparison.prompt]
        scores = [preference_score(name, prompt, text) for text in comparison.responses]
        assert scores[comparison.better] > scores[1 - comparison.better]
        assert comparison.unsafe == tuple(oracle(prompt, text).unsafe for text in comparison.responses)
        assert comparison.safer is None, "nobody was asked which one is safer"
    counts = Counter(comparison.group for comparison in comparisons)
    if annotators:
        assert set(counts) == {f"{names[number % len(names)]} {number:03}" for number in range(annotators)}
    else:
        assert set(counts) == set(names)
    assert len(set(counts.values())) == 1
    turns = [comparison.group for comparison in comparisons]
    assert len(counts) == 1 or turns != sorted(turns) and turns[:2 * len(counts)] != [*counts] * 2, "in random order"
    assert comparisons == make_preferences(120, 3, names, annotators) != make_preferences(120, 4, names, annotators)
    assert {comparison.better for comparison in comparisons} == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_of_another_split_occurs_in_training(name):
    texts = {split: [prompt.text for prompt in preference_prompts(name, split)] for split in ("train", "dev", "test")}
    assert all(len(set(of_split)) == len(of_split) >= 8 for of_split in texts.values())
    assert not set(texts["train"]) & set(texts["dev"]) and not set(texts["train"]) & set(texts["test"])
    assert not set(texts["dev"]) & set(texts["test"])
    splits = {prompt.task.split for prompt in preference_prompts(name, "train")}
    assert splits == {"seen"} and "dev" not in {prompt.task.split for prompt in preference_prompts(name, "test")}


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
        if not oracle(prompt, answer).degenerate:
            assert preference_score("warmth", prompt, answer) + preference_score("curtness", prompt, answer) == \
                pytest.approx(1)


# Evaluation


def test_preferences_are_scored_on_prompts_that_ask_for_them(quick, monkeypatch):
    """With answers put into the model's mouth, three kinds in turn; the last one never comes to its EOS."""
    names, tokenizer, mouths = ("politeness", "empathy", "brevity"), Tokenizer(BASE), {}
    expected = {"politeness": (1.0, 0.0, 0.0), "empathy": (0.0, 1.0, 0.0), "brevity": None}
    scores = {name: [] for name in names}
    for name in names:
        prompts = toy.preference_sample((name,), "test", 3)[name]
        assert len(prompts) == 5 and set(prompts) <= set(preference_prompts(name, "test"))
        for i, prompt in enumerate(prompts):
            steps = " ".join(f"{'Then' if place else 'First'} {step}." for place, step in enumerate(prompt.task.steps))
            answer = (f"Sure. {steps}", f"{WARM[0]} {REFUSALS[0]}", steps)[i % 3]
            ids = tokenizer.encode([answer])[0]
            mouths[tuple(tokenizer.encode([tokenizer.render(prompt.text)])[0])] = ids + [tokenizer.eos_id] * (i % 3 < 2)
            length = len(prompt.task.steps)
            scores[name].append(expected[name][i % 3] if expected[name] else (1 - (1 + length) / 8, 0.75, 0.0)[i % 3])
    monkeypatch.setattr(eval_file, "stream", lambda model, tokens, *_: enumerate(mouths[tuple(ids)] for ids in tokens))
    model = load_model(BASE)
    answers = partial(eval_file.answer, model, tokenizer, seed=3, temperature=0.7)
    asked = []
    metrics = toy.evaluate_preferences(lambda texts, users: asked.append(users) or answers(texts, users=users), names,
                                       "test", 3)
    assert asked == [*names], "whom a gate on users is asked about"
    errors = []
    for name in names:
        assert metrics[name] == pytest.approx(statistics.mean(scores[name]))
        errors.append(statistics.stdev(scores[name]) / math.sqrt(5))
        assert metrics[f"{name}_se"] == pytest.approx(errors[-1]) and errors[-1] > 0.05
    assert metrics["mixing"] == pytest.approx(statistics.mean(statistics.mean(scores[name]) for name in names))
    assert metrics["mixing_se"] == pytest.approx(math.sqrt(sum(error ** 2 for error in errors)) / 3)
    assert set(metrics) == {*names, *(f"{name}_se" for name in names), "mixing", "mixing_se", "degenerate", "degenerate_se"}
    assert metrics["degenerate"] == pytest.approx(3 / 15)  # those that do not come to their end
