"""eval.py --make_pairs: answers are sampled from a policy and scored; the best is paired with the worst."""
import json
from collections import Counter
from pathlib import Path

import pytest

import eval as eval_file
from chat import Tokenizer
from common import UserError, read_json
from conftest import BASE, json_lines, line_of, mistake, rows, run, score_alone, write_rows
from data import read_comparisons

JUDGES = """
def words(prompt, response):
    return len(response.split())

def short(prompt, response):
    return -len(response)

def same(prompt, response):
    return 1
"""


@pytest.fixture
def asked(place, monkeypatch):
    """A folder with prompts and a module of judges."""
    Path("prompts.txt").write_text("How do I bake bread?\n\nTell me how to fix a lamp.\nHow do I bake bread?\n")
    Path("toy_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(place))
    return place


def make(*flags, prompts="prompts.txt", scorers="toy_judges:words,toy_judges:short", out="pairs.jsonl"):
    eval_file.main(["--make_pairs", prompts, "--model", BASE, "--reward_model", scorers, "--out", out,
                    "--device", "cpu", "--max_new_tokens", "24", "--temperature", "1", *flags])
    return json_lines(out)


def test_the_best_of_the_answers_stands_against_the_worst(asked, monkeypatch):
    generated, stream = {}, eval_file.stream

    def recording(*arguments):
        for number, ids in stream(*arguments):
            generated[number] = ids
            yield number, ids

    monkeypatch.setattr(eval_file, "stream", recording)
    pairs, tokenizer = make("--samples", "5"), Tokenizer(BASE)
    answers = [tokenizer.decode(generated[number]).strip() for number in range(10)]
    by_prompt = {"How do I bake bread?": answers[:5], "Tell me how to fix a lamp.": answers[5:]}  # each prompt once
    for judge, group in ((lambda text: len(text.split()), "words"), (lambda text: -len(text), "short")):
        for prompt, texts in by_prompt.items():
            pair = next((p for p in pairs if p["prompt"] == prompt and p["group"] == group), None)
            if max(map(judge, texts)) == min(map(judge, texts)):
                assert pair is None
                continue
            assert judge(pair["chosen"]) == max(map(judge, texts)) and judge(pair["rejected"]) == min(map(judge, texts))
            assert {pair["chosen"], pair["rejected"]} <= set(texts)
            assert pair["scores"][group] == [judge(pair["chosen"]), judge(pair["rejected"])]


def test_the_file_is_preference_data_whose_groups_are_the_judges(asked):
    make()
    comparisons = read_comparisons([Path("pairs.jsonl")], Counter())
    assert {c.group for c in comparisons} <= {"words", "short"} and len(comparisons) >= 2
    out = run("mixed", "--method", "moe-dpo", "--gate", "user", "--model", BASE, "--data", "pairs.jsonl", "--max_steps",
              1, "--lora_rank", 2, "--held_out", 0, "--batch_size", 2)
    assert len(rows(out)) == 1 and (out / "experts").is_dir()


def test_score_models_are_named_by_their_folder_or_their_run(asked):
    reward, cost = (run(name, "--method", name, "--max_steps", 4) / "model" for name in ("reward", "cost"))
    Path(cost).rename("judge")
    pairs = make(scorers=f"{reward},judge")
    assert {pair["group"] for pair in pairs} == {"reward", "judge"}
    for name, folder in (("reward", reward), ("judge", "judge")):
        score = score_alone(folder)
        for pair in (pair for pair in pairs if pair["group"] == name):
            assert pair["scores"] == {name: pytest.approx([score(pair["prompt"], pair[part])
                                                           for part in ("chosen", "rejected")], abs=1e-3)}


def test_the_same_seed_samples_the_same_answers_and_another_does_not(asked):
    first, second, other = make(), make(), make("--seed", "1")
    assert first == second != other


def test_a_judge_that_finds_all_alike_makes_no_pairs(asked):
    assert make(scorers="toy_judges:same") == []


def test_prompts_may_be_rows_of_a_file(asked):
    Path("rows.jsonl").write_text('{"prompt": "How do I bake bread?", "chosen": "a", "rejected": "b"}\n'
                                  '{"prompt": [{"role": "user", "content": "Teach me to learn chess."}]}\n')
    assert {json.dumps(pair["prompt"]) for pair in make(prompts="rows.jsonl", scorers="toy_judges:words")} <= {
        '"How do I bake bread?"', '[{"role": "user", "content": "Teach me to learn chess."}]'}


@pytest.mark.parametrize("change, part", (
    (dict(prompts="none.txt"), "none.txt: no such file"),
    (dict(scorers="no_such_module:words"), "no_such_module"),
    (dict(scorers="toy_judges:nothing"), "nothing"),
    (dict(scorers="no/such/model"), "no/such/model"),
    (dict(out="pairs.txt"), "--out FILE.jsonl"),
), ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_is_wrong_is_answered_with_one_line(asked, change, part):
    assert part in line_of(make, **change)
    assert not Path("pairs.jsonl").exists()


def test_one_answer_to_a_prompt_makes_no_pair(asked):
    assert "--samples 1: must be at least 2" in line_of(make, "--samples", "1")


def test_a_broken_row_of_prompts_is_named_by_its_line(asked):
    Path("rows.jsonl").write_text('{"prompt": "fine"}\n{"question": "not a prompt"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: no field 'prompt'"):
        make(prompts="rows.jsonl")


def test_several_sources_are_a_group_each(place):
    for name in ("kind", "brief"):
        Path(name).mkdir()
        write_rows(f"{name}/pairs.jsonl", *({"prompt": f"{name} {i}", "chosen": "First lift the zib.",
                                             "rejected": "Sure."} for i in range(4)))
    out = run("two", "--method", "pmol", "--model", BASE, "--data", "kind/pairs.jsonl,brief/pairs.jsonl", "--held_out",
              0, "--max_steps", 1, "--lora_rank", 2)
    assert [name for name, _ in read_json(out / "config.json")["groups"]] == ["brief/pairs.jsonl", "kind/pairs.jsonl"]
    assert "nowhere.jsonl" in mistake("--data", "kind/pairs.jsonl,nowhere.jsonl")
