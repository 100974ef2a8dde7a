"""Diagnostics of a trained mixture: from margins given by hand, and margins of a model against single sequences."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import report as report_file
import toy
import train
from batch import Encoded
from checkpoint import load_model, save_model
from common import read_json
from conftest import BASE, grouped_file, load_run, log_softmax, pair_logps, preference_pairs, run
from lora_moe import expert_layers
from report import expert_margins

ANNOTATORS = tuple(f"{taste} {number:03}" for number in range(3) for taste in ("curtness", "warmth"))
EVEN = [math.log(0.5)] * 2
# Margins of two comparisons for each annotator: expert 0 orders those of the warm ones rightly, expert 1 the others
APART = [[2.0, -1.0] if name.startswith("warmth") else [-3.0, 1.0] for name in ANNOTATORS for _ in range(2)]


def planted(group):
    """A part of the data of which only the groups matter."""
    return Encoded(np.zeros(0, dtype=np.int32), np.zeros((len(group), 4), dtype=np.int64),
                   {"group": np.array(group)}, groups=ANNOTATORS)


@pytest.fixture
def report_of(monkeypatch):
    """report_of(margins, log_gate, (groups, margins) of held-out pairs) -> mixture_report's numbers and warnings."""
    def report_of(margins, log_gate, held_out=None, types=toy.annotator_types(ANNOTATORS)):
        encoded = planted([u for u in range(len(ANNOTATORS)) for _ in range(len(margins) // len(ANNOTATORS))])
        other = held_out and planted(held_out[0])
        parts = {id(encoded): (torch.tensor(margins), torch.tensor(log_gate).expand(len(margins), -1)),
                 id(other): (held_out and torch.tensor(held_out[1]), None)}
        monkeypatch.setattr(report_file, "expert_margins", lambda model, part, *settings: parts[id(part)])
        report, text = report_file.mixture_report(None, encoded, other, types, beta=0.3, batch_size=4)
        table = report_file.mixture_table(report)
        assert text.endswith(table)
        return report, text.removesuffix(table).splitlines()
    return report_of


def test_experts_that_serve_one_annotator_type_each_are_seen_as_such(report_of):
    held_out = [1, 0, 3, 2, 1, -1], [[1.0, -1.0], [-1.0, 2.0], [0.5, -1.0], [1.0, 1.0], [-0.5, -1.0], [9.0, 9.0]]
    report, warnings = report_of(APART, EVEN, held_out)
    assert report["recovered"] == 1.0 and warnings == []
    assert report["accuracy"] == {"curtness": pytest.approx([1 / 2, 1]), "warmth": pytest.approx([2 / 3, 0])}
    assert report["held_out"] == {"curtness": 2, "warmth": 3}, "the last one is of no known annotator"
    warm = 1 / (1 + math.exp(-2)) / (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1)))
    curt = 1 / (1 + math.exp(3)) / (1 / (1 + math.exp(3)) + 1 / (1 + math.exp(-1)))
    assert report["responsibility"] == pytest.approx([(warm + curt) / 2, 1 - (warm + curt) / 2], rel=1e-5)
    swapped, _ = report_of([margins[::-1] for margins in APART], EVEN)
    assert swapped["recovered"] == 1.0, "up to the names of the experts"


def test_an_annotators_type_is_read_from_all_their_comparisons_and_their_gate(report_of):
    margins = [list(pair) for pair in APART]
    margins[2] = [-0.4, 0.4]                                  # one contrary comparison does not outweigh the other
    assert report_of(margins, EVEN)[0]["recovered"] == 1.0
    margins[2] = margins[3] = [-2.0, 2.0]                     # warmth 000 is now a curt one
    assert report_of(margins, EVEN)[0]["recovered"] == pytest.approx(5 / 6)
    flat = [[0.0, 0.0]] * 12
    log_gate = [[math.log(0.9), math.log(0.1)] if name.startswith("warmth") else [math.log(0.1), math.log(0.9)]
                for name in ANNOTATORS for _ in range(2)]
    assert report_of(flat, log_gate)[0]["recovered"] == 1.0


def test_the_prior_of_an_annotator_is_the_gate_once_not_once_for_each_comparison(report_of):
    """A prior of log 9 = 2.2 in favour of expert 0 outweighs one comparison of log-odds 1.5 against it, and not two."""
    margins = [[2.0, -2.0] if name.startswith("warmth") else [-1.5, 1.5] for name in ANNOTATORS for _ in range(2)]
    assert report_of(margins, [math.log(0.9), math.log(0.1)])[0]["recovered"] == 1.0
    once = margins[::2]
    assert report_of(once, [math.log(0.9), math.log(0.1)])[0]["recovered"] == 0.5


def test_more_experts_than_annotator_types_and_fewer(report_of):
    margins = [[-1.0, 2.0, -1.0] if name.startswith("warmth") else [-3.0, -1.0, 1.0] for name in ANNOTATORS]
    assert report_of(margins, [math.log(1 / 3)] * 3)[0]["recovered"] == 1.0
    report, _ = report_of([[1.0]] * 6, [0.0])
    assert "recovered" not in report and report["responsibility"] == [1.0]


def test_a_collapsed_mixture_and_experts_that_agree_are_told_in_words(report_of):
    apart = [[2.0, -1.0], [-3.0, 1.0]] * 6
    _, warnings = report_of(apart, [math.log(0.001), math.log(0.999)])
    assert len(warnings) == 1 and "collapsed" in warnings[0] and "expert 1 takes" in warnings[0]
    _, warnings = report_of([[2.0, 1.0], [-3.0, -1.0]] * 6, EVEN)
    assert len(warnings) == 1 and "the experts agree" in warnings[0] and "100%" in warnings[0]
    _, warnings = report_of([[2.0, 1.0]] * 12, [math.log(0.001), math.log(0.999)])
    assert len(warnings) == 2
    assert report_of(apart, EVEN)[1] == []


def test_groups_that_are_no_simulated_annotators_are_types_of_their_own(report_of):
    """Six users whose names end in a number, as those of toy's annotators do."""
    held_out = [1, 0, 3], [[1.0, -1.0], [-1.0, 2.0], [0.5, -1.0]]
    report, _ = report_of(APART, EVEN, held_out, types=ANNOTATORS)
    assert set(report["accuracy"]) == {"curtness 000", "warmth 000", "warmth 001"} and "recovered" not in report


def test_users_of_a_file_keep_their_names(quick, capsys):
    """The numbers of simulated annotators are taken off, those of "rater 12" and "rater 7" are part of their names."""
    grouped_file("pairs.jsonl", ("rater 12", "rater 7"), 36)
    out = run("run", *FLAGS[:2], "--max_steps", 1, "--data", "pairs.jsonl", "--held_out", 0.3, "--method", "moe-dpo")
    report = read_json(out / "experts.json")
    assert {*report["accuracy"]} == {*report["held_out"]} == {"rater 12", "rater 7"}
    assert f"accuracy, rater 12, n = {report['held_out']['rater 12']} " in capsys.readouterr().out


def test_the_table_of_a_mixture_is_rounded_says_n_and_what_its_numbers_mean():
    report = {"responsibility": [1 / 3, 2 / 3], "recovered": 0.98765, "accuracy": {"warmth": [5 / 6, 0.0]},
              "held_out": {"warmth": 6}}
    lines = report_file.mixture_table(report).splitlines()
    assert [line.split() for line in lines[:3]] == [["expert", "0", "1"], ["responsibility", "0.333", "0.667"],
                                                    ["accuracy,", "warmth,", "n", "=", "6", "0.833", "0.000"]]
    legend = "\n".join(lines[3:])
    assert all(f"{name}: share of " in legend for name in ("responsibility", "accuracy", "recovered, 0.988"))
    assert max(map(len, lines)) <= 120
    assert "recovered" not in report_file.mixture_table({"responsibility": [1.0]})


FLAGS = ("--lora_rank", 4, "--annotators", 6, "--max_steps", 3, "--log_every", 1, "--batch_size", 6)


def save_merged(model, k, folder):
    """The base plus expert k of a mixture of rank 4 on it, with the tokenizer's files, in a folder."""
    plain = load_model(BASE)
    for name, layer in expert_layers(model).items():
        part = slice(4 * k, 4 * k + 4)
        plain.get_submodule(name).weight.data += layer.alpha / 4 * layer.lora_B.data[:, part] @ layer.lora_A.data[part]
    save_model(plain, Path(folder))


def test_margins_of_a_model_are_those_of_single_sequences(quick):
    """Δr of every pair under every expert, and the gate."""
    out = run("run", *FLAGS, "--method", "moe-dpo", "--lr", 3e-2)
    model = checkpoint.load_policy(out)[0]
    config, _, tokenizer = load_run(*FLAGS, "--method", "moe-dpo", groups=ANNOTATORS)
    encoded, _ = train.load_data(config, tokenizer)
    encoded.labels["reference"] = train.reference_logps(model, encoded, config).numpy()
    margins, log_gate = expert_margins(model, encoded, config.beta, 4 * config.batch_size)
    assert margins.shape == log_gate.shape == (60, 2)
    for k in (0, 1):
        save_merged(model, k, f"expert{k}")
    pairs, values = preference_pairs(["warmth", "curtness"], annotators=6), []
    for i in (0, 17, 59):
        base = pair_logps(BASE, pairs[i])
        for k in (0, 1):
            chosen, rejected = pair_logps(f"expert{k}", pairs[i])
            values.append(float(margins[i, k]))
            assert values[-1] == pytest.approx(0.3 * (chosen - base[0] - rejected + base[1]), rel=1e-3, abs=1e-3)
        user = encoded.groups.index(pairs[i].group)
        logits = (model.gate.bias + model.gate.weight[user]).tolist()
        assert log_gate[i].tolist() == pytest.approx(log_softmax(logits), rel=1e-4, abs=1e-5)
    assert np.std(values) > 1e-2


def test_margins_with_a_reference_for_each_expert_use_its_own(quick):
    """Both experts are the base as yet: Δr_k is against reference k alone."""
    folders = ("out/toy-base-seed1", BASE)
    config, model, tokenizer = load_run(*FLAGS, "--method", "mix-dpo", "--references", ",".join(folders))
    encoded, _ = train.load_data(config, tokenizer)
    encoded.labels["reference"] = train.reference_logps(model, encoded, config).numpy()
    margins, _ = expert_margins(model, encoded, config.beta, 4 * config.batch_size)
    pair = preference_pairs(["warmth", "curtness"], annotators=6)[5]
    base = pair_logps(BASE, pair)
    for k, folder in enumerate(folders):
        chosen, rejected = pair_logps(folder, pair)
        wanted = 0.3 * (base[0] - chosen - base[1] + rejected)
        assert float(margins[5, k]) == pytest.approx(wanted, rel=1e-3, abs=1e-4) and (k == 1 or abs(wanted) > 1e-3)
