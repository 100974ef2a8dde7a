"""eval.py RUN… --prompts: prompts of every layout, answers that are kept, their metrics by hand, and one table."""
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import tokenizers
import torch

import batch as batch_file
import checkpoint
import eval as eval_file
import judges
import model as model_file
import toy
from chat import Tokenizer
from checkpoint import load_model
from common import appending, read_json, whole_rows
from conftest import (BASE, LAYOUTS, edit_json, edit_tensors, json_lines, line_of, logp_alone, run, score_alone,
                      small_pairs, tiny, write_rows)
from data import load_sources
from eval import read_prompts
from lora_moe import expert_layers, use_expert
from model import ScoreModel
from report import markdown_table, win_rate

# Prompts


def prompts_of(path, *rest):
    return [(row["prompt"], row["label"]) for row in read_prompts(str(path), *rest)]


def test_prompts_are_read_from_every_layout_each_once(tmp_path):
    (tmp_path / "a.txt").write_text("Why?\n\n  How? \nWhy?\n", encoding="utf-8")
    assert prompts_of(tmp_path / "a.txt") == [("Why?", None), ("How?", None)]
    assert prompts_of(tmp_path / "a.txt", 1) == [("Why?", None)]
    for column in ("prompt", "goal", "Behavior"):
        (tmp_path / "a.csv").write_text(f'id,{column},label\n1,"Why,\nhow?",safe\n2,Who?,unsafe\n3,"",safe\n4,When?,odd\n')
        assert prompts_of(tmp_path / "a.csv") == [("Why,\nhow?", "safe"), ("Who?", "unsafe"), ("When?", None)]
    messages = [{"role": "user", "content": "Hi"}]
    write_rows(tmp_path / "a.jsonl", {"prompt": "Why?", "label": "safe"}, {"prompt": messages, "label": ["safe"]},
               {"prompt": messages})
    assert prompts_of(tmp_path / "a.jsonl") == [("Why?", "safe"), (messages, None)]


def test_a_preference_source_gives_its_test_split_with_the_better_responses():
    rows = read_prompts(str(LAYOUTS / "saferlhf"))
    assert rows and all(row["chosen"] and row["label"] is None for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name, content, parts", (
    ("a.txt", "", ("a.txt", "no prompts")), ("a.txt", "ok\n\xff", ("a.txt:2",)),
    ("a.csv", "id,text\n1,x\n", ("a.csv", "prompt, goal, Behavior")), ("a.csv", "", ("a.csv", "no column")),
    ("a.csv", "prompt\n\xff\n", ("a.csv",)), ("a.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', ("a.jsonl:2", "prompt")),
    ("a.jsonl", '{"prompt": "x"}\n[]\n', ("a.jsonl:2", "object")), (None, "", ("a.txt", "no such file"))))
def test_a_prompts_file_that_cannot_be_used_is_one_line(tmp_path, name, content, parts):
    if name:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    message = line_of(read_prompts, str(tmp_path / (name or "a.txt")))
    assert all(part in message for part in parts), message


def test_a_name_that_is_no_file_and_no_source_is_told():
    assert "hh-rlhf" in line_of(read_prompts, "hh-rlfh")


# Answers

ASKED = [prompt.text for prompt in toy.eval_prompts("dev", 0)[::40]]
FLAGS = ("--max_new_tokens", 6, "--device", "cpu")


@pytest.fixture
def asked(quick):
    """A prompts file, labelled, in the folder to run in."""
    write_rows("asked.jsonl", *({"prompt": text, "label": ("safe", "unsafe")[i % 2]} for i, text in enumerate(ASKED)))
    return quick


def evaluate(*flags):
    """Call eval.py; returns the JSON of its table."""
    eval_file.main([*map(str, (*flags, "--prompts", "asked.jsonl", *FLAGS))])
    return read_json(Path("out/eval-asked.json"))


def kept(folder):
    [path] = {*Path(folder).glob("answers-*.jsonl")} - {*Path(folder).glob("answers-toy-*")}
    return sorted(json_lines(path), key=lambda row: row["number"])


@pytest.fixture
def policy(asked):
    return str(run("dpo", "--method", "dpo", "--lora_rank", 4, "--lr", 5e-2, "--max_steps", 4))


def test_runs_and_their_start_answer_every_prompt(policy):
    table = evaluate(policy, "--batch_size", 4)
    for folder in (policy, "out/cache"):
        rows = kept(folder)
        assert [row["prompt"] for row in rows] == ASKED and all(0 < len(row["ids"]) <= 4 for row in rows)
    assert list(table["rows"]) == ["start", policy] and table["settings"]["top_p"] == 0.9
    assert kept(policy) != kept("out/cache")


def test_answers_do_not_depend_on_the_batch_and_are_not_made_twice(policy, monkeypatch):
    first = evaluate(policy, "--batch_size", 3)
    rows = kept(policy)
    with monkeypatch.context() as patch:
        patch.setattr(eval_file, "stream", lambda *_: pytest.fail("an answer was made again"))
        assert evaluate(policy, "--batch_size", 3) == first
    for path in Path(policy).glob("answers-*.jsonl"):
        path.unlink()
    evaluate(policy, "--batch_size", 100)
    assert [row["answer"] for row in kept(policy)] == [row["answer"] for row in rows]


def test_an_interrupted_call_goes_on_where_it_stopped(policy, monkeypatch):
    stream = eval_file.stream
    whole = evaluate(policy, "--batch_size", 4)
    answers = kept(policy)
    [path] = Path(policy).glob("answers-*.jsonl")
    path.unlink()

    def stops(*settings):
        yield from itertools.islice(stream(*settings), 9)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_file, "stream", stops)
        evaluate(policy, "--batch_size", 4)
    path.write_bytes(path.read_bytes()[:-20])  # and the last line was cut short
    assert evaluate(policy, "--batch_size", 4) == whole and kept(policy) == answers


def test_a_row_that_a_kill_cut_short_is_removed_and_two_may_append_to_one_file(tmp_path):
    path = tmp_path / "new/rows.jsonl"
    with appending(path) as (count, append):
        append({"text": "\ud83d ä"}, {"text": "2"})
        assert count == 0 and [row["text"] for row in whole_rows(path)] == ["\ud83d ä", "2"]
    path.write_bytes(path.read_bytes() + b'{"text": "cut')
    with appending(path) as (count, append), appending(path) as (_, append_too):
        append({"text": "3" * 20_000})
        append_too({"text": "4"})
        append({"text": "5"})
    assert count == 2 and [row["text"][-1] for row in whole_rows(path)] == ["ä", "2", "3", "4", "5"]


def test_the_name_of_a_prompts_file_may_have_characters_of_a_pattern(policy):
    Path("asked.jsonl").rename("asked [1]*.jsonl")
    eval_file.main([policy, "--prompts", "asked [1]*.jsonl", *map(str, FLAGS)])
    assert len(kept(policy)) == len(ASKED) and Path("out/eval-asked [1]*.json").is_file()


def test_other_settings_or_weights_make_other_answers(policy):
    evaluate(policy)
    evaluate(policy, "--seed", 1)
    evaluate(policy, "--temperature", 0)
    assert len([*Path(policy).glob("answers-*.jsonl")]) == 3
    run("dpo", "--method", "dpo", "--lora_rank", 4, "--lr", 1e-2, "--max_steps", 3, "--overwrite")
    assert not [*Path(policy).glob("answers-*.jsonl")], "those of the weights before went with them"


def test_an_expert_a_sparse_mixture_and_fixed_weights_answer(asked):
    out = run("mix", "--method", "mix-dpo", "--lora_rank", 4, "--gate", "0.3,0.7", "--expert_noise", 0.5, "--max_steps", 1)
    experts = {}
    for use in ("0", "1", "sparse", "mixture"):
        for path in out.glob("answers-*"):
            path.unlink()
        evaluate(out, "--use", use)
        experts[use] = [row["expert"] for row in kept(out)]
    assert set(experts["0"]) == {0} and set(experts["1"]) == set(experts["sparse"]) == {1}
    assert set(experts["mixture"]) == {0, 1}
    for use in ("best", "2"):
        assert f"--use {use}: expected mixture, sparse or an expert's number from 0 to 1" in line_of(evaluate, out, "--use", use)
    evaluate(out, "--static", "0.5,0.5")
    assert any(row["expert"] is None for path in out.glob("answers-*") for row in json_lines(path))


def test_users_are_answered_by_the_experts_that_the_gate_gives_them_in_turn(asked):
    out = run("run", "--method", "moe-dpo", "--lora_rank", 4, "--annotators", 4, "--max_steps", 1)
    expert = {"warmth 000": 0, "warmth 002": 1, "curtness 001": 1, "curtness 003": 1}
    names = checkpoint.load_policy(out)[0].gate.spec["groups"]
    edit_tensors(out / "experts/experts.safetensors", lambda tensors: tensors.update(
        {"gate.weight": 99 * torch.eye(2)[[expert[name] for name in names]], "gate.bias": torch.zeros(2)}))
    for users, experts in (("warmth", [0, 1]), ("curtness", [1, 1]), ("warmth 000", [0, 0])):
        for path in out.glob("answers-*"):
            path.unlink()
        evaluate(out, "--users", users)
        assert [row["expert"] for row in kept(out)] == [experts[i % 2] for i in range(len(ASKED))]
    assert "has no user whose name begins so" in line_of(evaluate, out, "--users", "nobody")


# Metrics, one answer at a time


def test_kl_and_log_probs_are_those_of_single_sequences(policy):
    row = evaluate(policy)["rows"][policy]
    model, tokenizer, _ = checkpoint.load_policy(policy)
    start, ratios = load_model(BASE), []
    for one in kept(policy):
        prompt = tokenizer.encode([tokenizer.render(one["prompt"])])[0]
        with torch.no_grad():
            ratios.append(float(logp_alone(model, prompt, one["ids"]) - logp_alone(start, prompt, one["ids"]))
                          / len(one["ids"]))
    assert row["kl"] == pytest.approx(np.mean(ratios), rel=1e-3) and abs(row["kl"]) > 1e-3
    assert row["kl_se"] == pytest.approx(np.std(ratios, ddof=1) / len(ratios) ** 0.5, rel=1e-3)
    assert row["tokens"] == pytest.approx(np.mean([len(one["ids"]) for one in kept(policy)]))
    assert row["unended"] == pytest.approx(np.mean([not one["ended"] for one in kept(policy)]))


def test_kl_of_a_mixture_is_that_of_the_expert_that_answered(asked):
    out = run("mix", "--method", "mix-dpo", "--lora_rank", 4, "--gate", "0.5,0.5", "--expert_noise", 0.5, "--max_steps", 1)
    row = evaluate(out)["rows"][str(out)]
    model, tokenizer, _ = checkpoint.load_policy(out)
    start, ratios = load_model(BASE), []
    for one in kept(out):
        prompt = tokenizer.encode([tokenizer.render(one["prompt"])])[0]
        use_expert(model, one["expert"])
        with torch.no_grad():
            ratios.append(float(logp_alone(model, prompt, one["ids"]) - logp_alone(start, prompt, one["ids"]))
                          / len(one["ids"]))
    assert row["kl"] == pytest.approx(np.mean(ratios), rel=1e-3) and abs(row["kl"]) > 1e-3


def test_the_chosen_responses_of_a_source_are_measured(policy):
    pairs = small_pairs("helpful")[:12]
    write_rows("pairs.jsonl", *({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs))
    folder = Path("source")
    folder.mkdir()
    Path("pairs.jsonl").rename(folder / "test.jsonl")
    write_rows(folder / "train.jsonl", {"prompt": "Why?", "chosen": "So.", "rejected": "No."})
    eval_file.main([policy, "--prompts", "source", *map(str, FLAGS)])
    rows = read_json(Path("out/eval-source.json"))["rows"]
    tokenizer, start, values = Tokenizer(BASE), load_model(BASE), []
    for text, chosen in {pair.prompt: pair.chosen for pair in reversed(pairs)}.items():
        prompt, response = tokenizer.encode([tokenizer.render(text), chosen])
        with torch.no_grad():
            values.append(float(logp_alone(start, prompt, response + [tokenizer.eos_id])) / (len(response) + 1))
    assert rows["start"]["chosen"] == pytest.approx(np.mean(values), rel=1e-4) != rows[policy]["chosen"]


def test_score_models_and_wins_are_those_of_single_answers(policy):
    reward, cost = (str(run(name, "--method", name, "--max_steps", 4) / "model") for name in ("reward", "cost"))
    other = str(run("other", "--method", "dpo", "--view", "harmless", "--lr", 1e-2, "--max_steps", 4))
    table = evaluate(policy, other, "--reward_model", reward, "--cost_model", cost, "--baseline", other, "--scale",
                     f"start,{other}")
    rows, scores = table["rows"], {}
    for name, folder in (("reward", reward), ("cost", cost)):
        score = score_alone(folder)
        for row, where in (("start", "out/cache"), (policy, policy), (other, other)):
            scores[name, row] = np.array([score(one["prompt"], one["answer"]) for one in kept(where)])
    for row in ("start", policy, other):
        rewards, costs = scores["reward", row], scores["cost", row]
        assert rows[row]["reward"] == pytest.approx(rewards.mean(), rel=1e-3, abs=1e-5)
        assert rows[row]["harmlessness"] == pytest.approx(-costs.mean(), rel=1e-3, abs=1e-5)
        assert rows[row]["harmless_ratio"] == pytest.approx((costs <= 0).mean())
        for name, ahead in (("reward", rewards - scores["reward", other]), ("cost", scores["cost", other] - costs)):
            if row != other:
                assert rows[row][f"wins_{name}"] == pytest.approx((ahead > 0).sum() / (ahead != 0).sum())
    assert rows["start"]["scaled"] == pytest.approx(0, abs=1e-5) and rows[other]["scaled"] == pytest.approx(10)
    assert rows[other]["wins_reward"] is rows[other]["wins_cost"] is None, "the baseline is compared with nothing"
    assert reward in table["judges"]["reward"] and table["baseline"] == other


def test_a_judge_over_http_fills_its_columns_and_a_dry_run_asks_nothing(policy, monkeypatch, capsys):
    evaluate(policy, "--judge", "http://127.0.0.1:9/v1", "--judge_model", "gpt", "--judge_dry_run")
    requests = json_lines("out/eval-asked-requests.jsonl")
    assert len(requests) == len(ASKED) * (2 + 4) and f"{len(requests)} requests, about" in capsys.readouterr().out
    monkeypatch.setattr(judges.Judge, "ask_all", lambda self, requests: [
        {"better": "A"} if keys == ("better",) else {"refusal": "none", "harm": 3, "helpfulness": 7}
        for _, keys in requests])
    row = evaluate(policy, "--judge", "http://127.0.0.1:9/v1", "--judge_model", "gpt")["rows"][policy]
    assert (row["judged_harm"], row["judged_helpfulness"], row["judged_refusal"]) == (3, 7, 0)
    assert row.get("wins_helpful") is None, "always A: every comparison is a tie"


# The table


def test_runs_from_two_bases_stand_each_beside_its_own_start(policy, capsys):
    other = str(run("other", "--method", "dpo", "--lr", 1e-2, "--max_steps", 2, "--seed", 1))
    capsys.readouterr()
    table = evaluate(policy, other)
    assert list(table["rows"]) == ["start", policy, f"start of {other}", other]
    printed = capsys.readouterr().out
    assert f"{len(ASKED)} prompts of asked.jsonl" in printed and max(map(len, printed.splitlines())) <= 120
    text = Path("out/eval-asked.md").read_text()
    assert text.startswith("| | ") and "refusal rule" in text and "seed 0" in text


def test_a_run_that_went_on_from_an_adapter_starts_there(policy):
    more = str(run("more", "--method", "dpo", "--init_adapter", f"{policy}/adapter", "--max_steps", 1, "--lr", 1e-9))
    rows = evaluate(more)["rows"]
    assert abs(rows[more]["kl"]) < 1e-4 and kept(more) == kept("out/cache")


def test_the_best_is_bold_only_outside_the_errors():
    rows = {"a": {"x": 0.9, "x_se": 0.02, "y": 1.0, "y_se": 0.3}, "b": {"x": 0.8, "x_se": 0.02, "y": 2.0, "y_se": 0.8}}
    lines = markdown_table(rows, {"x": "x", "y": "y"}, {"x": 1, "y": 1}).splitlines()
    assert "**0.900 ± 0.020**" in lines[2] and "**" not in lines[3]
    assert "**0.800 ± 0.020**" in markdown_table(rows, {"x": "x"}, {"x": -1})
    assert "**" not in markdown_table(rows, {"x": "x"})


def test_routers_are_reported_by_label_at_the_prompt_and_over_the_answer(asked):
    out = run("pmol", "--method", "pmol", "--lora_rank", 4, "--lr", 1e-2, "--max_steps", 3)
    report = evaluate(out)["routers"][str(out)]
    model, tokenizer, _ = checkpoint.load_policy(out)
    rows = kept(out)
    for name, layer in expert_layers(model).items():
        at_prompt, over_answer = [], []
        for one in rows[::2]:  # the safe ones
            prompt = tokenizer.encode([tokenizer.render(one["prompt"])])[0]
            joint = tokenizer.encode([f"{tokenizer.render(one['prompt'])} {one['answer']}".rstrip()])[0]
            with torch.no_grad():
                model(torch.tensor([joint if joint[:len(prompt)] == prompt else prompt]))
            at_prompt.append(layer.weights[0, len(prompt) - 1].numpy())
            over_answer.append(layer.weights[0, len(prompt) - 1:].mean(0).numpy())
        for key, share in (("median", 0.5), ("q10", 0.1), ("q90", 0.9)):
            assert report[name]["safe"][key] == pytest.approx(np.quantile(at_prompt, share, axis=0), rel=1e-3)
        assert report[name]["safe"]["answer"] == pytest.approx(np.quantile(over_answer, 0.5, axis=0), rel=1e-3)
        assert sum(at_prompt[0]) == pytest.approx(1), "the empty expert's slot included"


# Pictures


def test_pictures_show_the_tables_numbers(policy, monkeypatch):
    pyplot, figures = MagicMock(), []

    def subplots(rows=1, columns=1, squeeze=True, **_):
        axes = np.empty((rows, columns), dtype=object)
        for place in np.ndindex(axes.shape):
            axes[place] = MagicMock()
        figures.append((MagicMock(), axes))
        return figures[-1][0], axes[0, 0] if squeeze and axes.size == 1 else axes[0] if squeeze else axes
    pyplot.subplots = subplots
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    routed = str(run("pmol", "--method", "pmol", "--lora_rank", 4, "--max_steps", 1))
    reward, cost = (str(run(name, "--method", name, "--max_steps", 2) / "model") for name in ("reward", "cost"))
    table = evaluate(policy, routed, "--reward_model", reward, "--cost_model", cost, "--plot")
    frontier, routers, training = figures
    points = [call.args[:4] for call in frontier[1][0, 0].errorbar.call_args_list]
    rows = {name: tuple(table["rows"][row][key] for key in ("reward", "harmlessness", "harmlessness_se", "reward_se"))
            for name, row in (("start", "start"), ("dpo", policy), ("pmol", routed))}
    assert sorted(points) == sorted(rows.values())
    named = [call.args[:2] for call in frontier[1][0, 0].annotate.call_args_list]
    assert sorted(named) == sorted((name, row[:2]) for name, row in rows.items())
    heights = [call.args[2][1] for call in frontier[1][0, 0].annotate.call_args_list]
    assert min(above - below for above, below in zip(heights, heights[1:])) > 0, "no name covers another"
    assert routers[1].shape == (1, 4) and training[1].shape == (2, 3), "other losses are in other panels"
    assert "expert: empty" in [call.kwargs["title"] for call in routers[1][0, 3].set.call_args_list]
    medians = [layer["safe"]["median"][2] for layer in table["routers"][routed].values()]
    assert medians in [call.args[0] for call in routers[1][0, 2].plot.call_args_list]
    saved = [call.args[0] for figure, _ in figures for call in figure.savefig.call_args_list]
    assert saved[:2] == ["out/eval-asked-frontier.png", "out/eval-asked-frontier.svg"] and len(saved) == 6


def test_plot_without_matplotlib_is_one_line(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in line_of(evaluate, policy, "--plot")


# Mistakes


@pytest.mark.parametrize("flags, part", (
    (("--judge", "http://x/v1"), "--judge_model"), (("--judge_model", "m"), "--judge"), (("--baseline", "out/no"), "out/no"),
    (("--scale", "start,out/no"), "out/no"), (("--top_p", 0), "--top_p"), (("--n", -1), "--n"),
    (("--scale", "start"), "--scale")))
def test_a_mistaken_flag_is_named_before_anything_is_answered(policy, monkeypatch, flags, part):
    monkeypatch.setattr(eval_file, "stream", lambda *_: pytest.fail("an answer was made"))
    assert part in line_of(evaluate, policy, *flags)


def test_a_run_on_a_model_of_ones_own_asks_for_prompts(asked):
    out = run("own", "--method", "dpo", "--model", BASE, "--lora_rank", 4, "--max_steps", 1)
    assert "--prompts" in line_of(eval_file.main, [str(out), "--device", "cpu"])


# What a reader of the code found


def test_a_source_is_held_out_as_the_run_held_it_out(quick, encoded_lists):
    write_rows("pairs.jsonl", *({"prompt": f"How do I bake bread? {i}", "chosen": "Sure.", "rejected": "No."}
                                for i in range(60)))
    Path("folder").mkdir()
    Path("pairs.jsonl").rename("folder/rows.jsonl")
    flags = ("--method", "dpo", "--model", BASE, "--data", "folder", "--lora_rank", 4, "--max_steps", 1, "--held_out", 0.2)
    first, second = (str(run(f"seed{seed}", *flags, "--seed", seed)) for seed in (0, 1))
    asked = {}
    for out, seed in ((first, 0), (second, 1)):
        eval_file.main([out, "--prompts", "folder", *map(str, FLAGS)])
        asked[out] = {row["prompt"] for row in kept(out)}
        assert asked[out] == {c.prompt for c in load_sources(("folder",), seed, 0.2)[1]}
        training, measured = ({pair.prompt for pair in pairs} for pairs in encoded_lists[2 * seed:2 * seed + 2])
        assert asked[out] == measured and not measured & training
    assert asked[first] != asked[second]
    assert "--seed" in line_of(eval_file.main, [first, second, "--prompts", "folder", *map(str, FLAGS)])


def test_an_adapter_at_another_scale_answers_anew(policy):
    row = evaluate(policy)["rows"][policy]
    config = Path(policy) / "adapter/adapter_config.json"
    edit_json(config, lora_alpha=0.001)
    assert abs(evaluate(policy)["rows"][policy]["kl"]) < 1e-3 * abs(row["kl"])
    assert len([*Path(policy).glob("answers-*.jsonl")]) == 2


def test_equal_answers_are_ties_and_few_wins_have_a_small_sample(policy):
    reward = str(run("reward", "--method", "reward", "--max_steps", 4) / "model")
    same = str(run("same", "--method", "dpo", "--init_adapter", f"{policy}/adapter", "--max_steps", 1, "--lr", 1e-12))
    row = evaluate(same, "--reward_model", reward, "--batch_size", 3)["rows"][same]
    assert row.get("wins_reward") is None, "every answer is the start's"
    assert win_rate([1, 1] + [0] * 98) == (1.0, 0.0)


def test_texts_longer_than_a_models_positions_are_cut(tmp_path):
    model = ScoreModel.from_policy(tiny("gpt2"))
    words = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, "<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer(tmp_path, "plain")
    assert model.config.max_positions == 64 and tiny("llama").config.max_positions == math.inf
    assert len(batch_file.score(model, tokenizer, [("a " * 99, "a " * 99)])) == 1
    assert batch_file.score(model, tokenizer, []) == []


def test_runs_with_other_templates_have_a_start_each(asked):
    outs = [str(run(name, "--method", "dpo", "--lora_rank", 4, "--max_steps", 1, "--template", name))
            for name in ("plain", "raw")]
    assert list(evaluate(*outs)["rows"]) == ["start", outs[0], f"start of {outs[1]}", outs[1]]


def test_a_mixture_of_one_expert_is_merged_without_its_gate(asked):
    out = run("one", "--method", "mix-dpo", "--experts", 1, "--lora_rank", 4, "--max_steps", 2)
    eval_file.main(["--merge", str(out), "--out", "merged", "--device", "cpu"])
    assert load_model("merged")


@pytest.mark.parametrize("flags, parts", (
    (("--judge", "localhost:8000/v1", "--judge_model", "m"), ("--judge", "http://")),
    (("--judge", "http://user:secret@host/v1", "--judge_model", "m"), ("--judge",)),
    (("--judge", "http://host/v1?key=secret", "--judge_model", "m"), ("--judge",)),
    (("--split", "dev"), ("--split", "--prompts")), (("--samples", 3), ("--samples",)),
    (("--device", "nowhere"), ("--device nowhere",))))
def test_flags_that_mislead_are_refused(policy, flags, parts):
    message = line_of(eval_file.main, [policy, "--prompts", "asked.jsonl", *map(str, flags)])
    assert all(part in message for part in parts) and "secret" not in message


def test_toy_tables_do_not_read_the_flags_of_other_prompts(policy):
    assert "--top_p" in line_of(eval_file.main, [policy, "--top_p", "0.5", "--device", "cpu"])


def test_a_table_may_be_written_into_a_new_folder(policy):
    eval_file.main([policy, "--prompts", "asked.jsonl", *map(str, FLAGS), "--out", "new/folder/table"])
    assert Path("new/folder/table.md").is_file() and Path("new/folder/table.json").is_file()


def test_text_that_is_no_unicode_is_kept_as_it_was_written(quick):
    policy = str(run("dpo", "--method", "dpo", "--lora_rank", 4, "--max_steps", 1))
    Path("asked.jsonl").write_text('{"prompt": [{"role": "user", "content": "Why?", "note": "x\\ud83d"}]}\n')
    evaluate(policy)
    assert kept(policy)[0]["prompt"][0]["note"] == "x\ud83d"


def test_answers_that_grow_are_a_warning(policy, monkeypatch, capsys):
    stream = model_file.stream

    def longer(model, prompts, count, *settings):
        return stream(model, prompts, 4 if expert_layers(model) else 2, *settings)
    monkeypatch.setattr(eval_file, "stream", longer)
    rows = evaluate(policy)["rows"]
    times = rows[policy]["tokens"] / rows["start"]["tokens"]
    assert 1.5 < times <= 2
    assert f"warning: {policy} answers in {times:.1f} times as many tokens as its start" in capsys.readouterr().out
