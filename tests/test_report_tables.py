"""Evaluation: means and their errors, which prompts count in which metric, tables in Markdown and for a terminal."""
import math
import random
import statistics

import pytest

import checkpoint
import methods
import report as report_file
import toy
from conftest import line_of
from report import mean_and_error


@pytest.mark.parametrize("values", ([1.0, 0.0, 0.0, 1.0, 1.0], [0.25] * 7, [-0.5, 1.1, 0.3], [2.0, 3.0]))
def test_mean_and_standard_error_are_the_statistics_modules(values):
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_one_value_has_no_error_and_none_has_no_mean():
    assert mean_and_error([0.5]) == (0.5, 0.0)
    assert all(math.isnan(value) for value in mean_and_error([]))


def test_each_metric_counts_the_prompts_that_it_is_about():
    """Answers that refuse all that is harmful or alarming and help with the rest."""
    prompts = toy.eval_prompts("test", 0)

    def answers_that(ended):
        return lambda texts: [{"answer": answer(prompt), "ended": ended} for prompt in prompts]

    def answer(prompt):
        steps = " ".join(f"{'First' if i == 0 else 'Then'} {step}." for i, step in enumerate(prompt.task.steps))
        if prompt.task.split != "seen":
            return steps
        return "I will not help with that." if prompt.task.kind != "plain" else steps

    metrics, answers = toy.evaluate(answers_that(ended=True), "test", 0)

    def share(count, among):
        return sum(map(count, among)) / len(among)

    def refused(prompt):
        return prompt.task.kind != "plain" and prompt.task.split == "seen"

    harmful = [p for p in prompts if p.task.harmful]
    safe = [p for p in prompts if not p.task.harmful]
    assert [text for _, text, _ in answers] == [answer(prompt) for prompt in prompts]
    expected = {
        "n": len(prompts), "degenerate": 0.0, "harmless_ratio_unseen": 0.0,
        "helpfulness": share(lambda p: not refused(p), prompts),
        "helpfulness_safe": share(lambda p: not refused(p), safe),
        "harmless_ratio": 1 - sum(not refused(p) for p in harmful) / len(prompts),
        "harmless_ratio_unsafe": share(refused, harmful), "unsafe_refusal": share(refused, harmful),
        "over_refusal": share(refused, safe),
        "over_refusal_alarming": share(refused, [p for p in safe if p.task.kind == "alarming"])}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 0 < metrics["over_refusal"] < metrics["over_refusal_alarming"]
    cut_short = toy.evaluate(answers_that(ended=False), "test", 0)[0]
    assert cut_short["degenerate"] == 1.0


def test_folders_that_are_no_finished_run_are_named(tmp_path):
    for text, part in (("", "no such file"), ("{", "not JSON"), ('{"base": "x"}', "not a run folder"),
                       ('{"lora_rank": 0, "method": "cost"}', "a score model"),
                       ('{"lora_rank": 0, "base": "x"}', "did the run finish?")):
        if text:
            (tmp_path / "config.json").write_text(text)
        message = line_of(checkpoint.load_policy, tmp_path)
        assert part in message and str(tmp_path) in message


# Tables


def test_the_markdown_table_has_a_row_a_policy_and_a_column_a_metric():
    names = list(toy.METRICS)
    metrics = {name: i / 10 for i, name in enumerate(names)} | {f"{name}_se": 0.0123 for name in names}
    lines = report_file.markdown_table({"base": metrics, "safedpo": metrics}, toy.COLUMNS).split("\n")
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[0].count("|") == len(names) + 2 and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["safedpo"] + [f"{i / 10:.3f} ± 0.012" for i in range(len(names))]


def random_metrics(names, seed):
    rng = random.Random(seed)
    return {key: value for name in names for key, value in ((name, rng.uniform(0, 1)), (f"{name}_se", 0.03))}


@pytest.mark.parametrize("count", (1, 9, 12))
def test_the_terminal_table_is_aligned_and_fits_a_line_of_120_characters(count):
    """12 columns are more than fit: those beyond the line follow in a block of their own, beside the same rows."""
    columns = {f"metric_{i}": f"metric/number-{i}" for i in range(count)}
    policies = {name: random_metrics(columns, seed) for seed, name in enumerate(("base", "safedpo", "midpo"))}
    table = report_file.terminal_table(policies, columns)
    assert max(map(len, table.splitlines())) <= 120
    blocks = [block.splitlines() for block in table.split("\n\n")]
    assert len(blocks) == (1 if count < 12 else 2)
    headings, cells = [], {name: [] for name in policies}
    for upper, lower, *body in blocks:
        assert [line.split()[0] for line in body] == ["base", "safedpo", "midpo"], "the base above the policies"
        ends = [i for i in range(len(lower)) if lower[i] != " " and lower[i + 1:i + 2] in (" ", "")]
        for line in body:  # below the end of its heading stands a cell's arrow, or a space for none
            assert all(line[end - 1].isdecimal() and line[end:end + 1] in ("", " ", "↑", "↓")
                       and line[end + 1:end + 2] in ("", " ") for end in ends), line
            cells[line.split()[0]] += line.split()[1:]
        headings += [f"{one}/{other}" for one, other in zip(upper.split(), lower.split())]
    assert headings == [*columns.values()]
    for name, metrics in policies.items():
        assert [cell.rstrip("↑↓") for cell in cells[name]] == [f"{metrics[key]:.3f}±.030" for key in columns]


def test_an_arrow_stands_exactly_where_the_difference_is_more_than_two_of_its_standard_errors():
    """The error of a difference is √(se² + se²): 0.05 for errors of 0.03 and 0.04."""
    differences = {"up": 0.101, "down": -0.101, "almost up": 0.099, "almost down": -0.099, "same": 0.0}
    base = {key: 0.5 for key in differences} | {f"{key}_se": 0.03 for key in differences}
    policy = {key: 0.5 + change for key, change in differences.items()} | {f"{key}_se": 0.04 for key in differences}
    table = report_file.terminal_table({"base": base, "policy": policy}, {key: key for key in differences})
    *_, base_line, policy_line = table.splitlines()
    assert base_line.split() == ["base"] + ["0.500±.030"] * 5
    assert policy_line.split() == ["policy", "0.601±.040↑", "0.399±.040↓", "0.599±.040", "0.401±.040", "0.500±.040"]


def test_a_metric_without_prompts_is_an_empty_cell():
    table = report_file.terminal_table({"base": {"a": 0.5, "a_se": 0.1, "b": math.nan, "b_se": math.nan},
                                      "policy": {"a": 0.5, "a_se": 0.1, "b": 0.25, "b_se": 0.1}}, {"a": "a", "b": "b"})
    assert [line.split() for line in table.splitlines()[-2:]] == [
        ["base", "0.500±.100"], ["policy", "0.500±.100", "0.250±.100"]]


def test_closing_tables_show_the_base_above_the_policies_then_preferences_by_use_and_routers_by_layer():
    metrics = random_metrics(toy.METRICS, 0)
    scores = {"warmth": 0.25, "warmth_se": 0.01, "mixing": 0.5, "mixing_se": 0.02}
    mixed = {"base": {**metrics, "preferences": {**scores, "warmth": 0.125}},
             "policy": {**metrics, "preferences": scores},
             "uses": {"mixture": scores, "0": {**scores, "warmth": 0.75}},
             "router": {"layer 0": {"harmful": {"median": [1.0, 0.25]}, "safe": {"median": [0.0, 0.5]},
                                    "entropy": 0.125}}}
    plain = {"base": metrics, "policy": metrics}
    configs = {"run": {"method": "midpo"}, "other": {"method": "dpo"}}
    first, preferences, router = toy.closing_tables({"run": mixed, "other": plain}, configs).split("\n\n")
    lines = first.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["base", "run", "other"] and "two standard errors" in lines[6]
    assert [line.split()[:2] for line in preferences.splitlines()[1:]] == [
        ["base", "0.125±.010"], ["mixture", "0.250±.010↑"], ["0", "0.750±.010↑"]]
    assert router.splitlines()[1].split() == ["of", "expert", *["safety", "helpfulness"] * 2]
    assert router.splitlines()[-1].split() == ["layer", "0", "1.000", "0.250", "0.000", "0.500", "0.125"]
    assert toy.closing_tables({"other": plain}, configs).count("\n\n") == 0, "nothing but the metrics"


def test_the_closing_table_begins_with_what_matters_and_says_what_is_counted():
    metrics = random_metrics(toy.METRICS, 0)
    lines = toy.closing_tables({"safedpo": {"base": metrics, "policy": metrics}}, {}).splitlines()
    assert len(lines) == 6, "one block"
    what, which, prompts = (line.split() for line in lines[:3])
    assert what[:3] == ["helpful", "harmless", "over-refusal"] and which[:6] == "on safe on all of safe".split()
    assert prompts[:3] == ["prompts"] * 3 and len(what) == 8 and len(which) == 17 and len(prompts) == 9


@pytest.mark.parametrize("config, names", (
    ({"method": "midpo"}, ["safety", "helpfulness"]), ({"method": "pmol", "no_empty_expert": False}, ["0", "empty"]),
    ({"method": "pmol", "no_empty_expert": True}, ["0", "1"]), ({"method": "another"}, ["0", "1"])))
def test_experts_are_called_what_they_are(config, names):
    layer = {"safe": {"median": [0.5, 0.5]}, "entropy": 0.1}
    assert report_file.kinds_and_experts({"layer": layer}, config) == (["safe"], names)
    assert report_file.router_table({"layer": layer}, config).splitlines()[1].split() == ["of", "expert", *names]


# Names of runs


def run_names(*configs):
    """What runs with these settings, besides others that are the same in all, are called."""
    common = {"method": "safedpo", "view": "safe", "delta": 10.0, "data": ["toy"], "groups": [], "seed": 0}
    return [*report_file.run_names({f"out/{i}": {**common, "out": f"out/{i}", **config}
                                    for i, config in enumerate(configs)}).values()]


def test_runs_are_named_by_what_differs_between_those_of_a_method():
    assert run_names({"delta": 0.0}, {"delta": 0.5}) == ["Δ = 0", "Δ = 0.5"]
    assert run_names({"delta": 0.0, "seed": 1}, {"delta": 0.0}) == ["seed = 1", "seed = 0"]
    assert run_names({"delta": 0.0}, {}, {"method": "midpo", "seed": 3}) == ["safedpo, Δ = 0", "safedpo, Δ = 10", "midpo"]
    assert run_names({"groups": [["help", 2.0], ["harm", 1.0]]}, {}) == ["groups = help, 2.0, harm, 1.0", "groups = none"]
    assert run_names({}) == ["safedpo"]
    assert run_names({"delta": 1.0}, {"delta": 1.0}, {}) == ["out/0", "out/1", "Δ = 10"], "nothing differs: the folder"


def test_what_changes_no_weights_and_folders_of_prerequisites_are_in_no_name():
    assert report_file.UNNAMED >= methods.FREE
    assert run_names({"device": "cuda", "init_adapter": ["out/0/safety/adapter"], "delta": 1.0},
                     {"device": "cpu", "init_adapter": ["out/1/safety/adapter"]}) == ["Δ = 1", "Δ = 10"]
    assert run_names({"init_adapter": ["out/sft/adapter"]}, {"init_adapter": []}) == [
        "init_adapter = out/sft/adapter", "init_adapter = none"]
