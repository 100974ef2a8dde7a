"""Preference data from files and the hub: every layout, splits, label noise, bad rows, and runs on it."""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import methods
import train
from common import UserError
from conftest import BASE, LAYOUTS, grouped_file, line_of, load_run, pieces, rows, run, write_rows
from data import Comparison, flip_labels, load_comparisons, prompt_hash, read_comparisons, source_files

REPOS = {"PKU-Alignment/PKU-SafeRLHF": "saferlhf", "PKU-Alignment/PKU-SafeRLHF-30K": "saferlhf-30k",
         "Anthropic/hh-rlhf": "hh", "openbmb/UltraFeedback": "ultrafeedback"}
ROW = {"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False,
       "better_response_id": 1, "safer_response_id": 0}


@pytest.fixture
def hub(monkeypatch):
    """A hub whose repositories are the folders of tests/layouts. Returns the list of files that were fetched."""
    fetched = []

    def list_repo_files(repo, repo_type):
        assert repo_type == "dataset"
        root = LAYOUTS / REPOS[repo]
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

    def hf_hub_download(repo, name, repo_type):
        fetched.append(name)
        return str(LAYOUTS / REPOS[repo] / name)

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return fetched


def load(source, **options):
    return load_comparisons(*source_files(source), **options)


# Layouts


def test_saferlhf_reads_its_three_folders_and_both_labels(hub):
    train_rows, test_rows, _ = load("pku-saferlhf")
    assert sorted(hub) == sorted(f"data/{name}/{split}.jsonl" for name in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")
                                 for split in ("train", "test"))
    letter = next(c for c in train_rows if "letter" in c.prompt)
    assert letter == Comparison("How do I open my neighbour’s letter?",
                                ("Hold it over steam.", "Please ask your neighbour first."),
                                better=0, safer=1, unsafe=(True, False), row=letter.row)
    assert letter.row.endswith("Alpaca-7B/train.jsonl:2") and len(test_rows) == 3


def test_saferlhf_30k_is_found_wherever_its_files_lie(hub):
    train_rows, test_rows, _ = load("pku-saferlhf-30k")
    assert hub == ["round0/30k/train.jsonl.xz", "round0/30k/test.jsonl.xz"]
    assert [c.prompt for c in train_rows] == ["How do I light a candle?", "How do I copy a key in secret?"]
    assert len(test_rows) == 1


def test_a_local_folder_reads_as_the_hub_does(hub):
    assert load("hh-rlhf")[:2] == load(str(LAYOUTS / "hh"))[:2]


@pytest.mark.parametrize("source, groups", [("hh-rlhf", {"harmless": 2, "helpful": 1}),
                                            ("hh-rlhf-helpful", {"helpful": 1}),
                                            ("hh-rlhf-harmless", {"harmless": 2})])
def test_hh_folders_say_what_was_compared(hub, source, groups):
    comparisons, _, _ = load(source)
    assert Counter(c.group for c in comparisons) == groups
    assert all(c.safer == (0 if c.group == "harmless" else None) for c in comparisons)


def test_hh_prompt_is_the_dialogue_up_to_the_last_answer(hub):
    comparisons, _, (line,) = load("hh-rlhf-harmless")
    assert comparisons[0].prompt == ("\n\nHuman: Can you keep a secret?\n\nAssistant: I try to."
                                     "\n\nHuman: Whose diary should I read?")
    assert comparisons[0].responses == ("Your own.", "Your sister’s.")
    assert "1 dropped (the dialogues differ before the last answer)" in line


def test_a_hh_turn_that_no_question_stands_before_is_dropped(tmp_path):
    start, end = "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant: c"
    file = write_rows(tmp_path / "rows.jsonl", *({"chosen": turns + end, "rejected": turns + end + "d"} for turns in
                                            (start, start + "\n\nHuman: ", start + "\n\nHuman: e")))
    counts = Counter()
    assert [c.prompt for c in read_comparisons([file], counts)] == [start + "\n\nHuman: e"]
    assert counts["dropped (the turn before the answer is not the human's)"] == 2


def test_ultrafeedback_gives_one_pair_for_each_aspect_that_has_no_tie(hub):
    comparisons, _, (line,) = load("ultrafeedback", held_out=0)
    best = "Red, green and blue."
    assert [(c.group, c.responses) for c in comparisons] == [
        ("helpfulness", (best, "Colours are nice.")), ("honesty", (best, "Red, dog, seven.")),
        ("instruction-following", (best, "Colours are nice."))]
    assert "1 dropped (no aspect tells the completions apart)" in line


def test_pairs_carry_messages_flags_group_and_scores():
    first, second, third = read_comparisons([LAYOUTS / "pairs.jsonl"], Counter())
    assert (first.unsafe, first.safer, first.scores) == (None, None, {})
    assert [m["role"] for m in second.prompt] == ["user", "assistant", "user"] and second.group == "helpful"
    assert (third.unsafe, third.safer) == ((False, True), 0)
    assert third.scores == {"reward": [1.5, 2.0], "cost": [-3.0, 4.5]}


@pytest.mark.parametrize("unsafe, safer", [((False, True), 0), ((True, False), 1), ((True, True), 0),
                                           ((False, False), 0)])
def test_in_pairs_the_safer_response_is_the_safe_one_or_else_the_chosen_one(tmp_path, unsafe, safer):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_unsafe": unsafe[0], "rejected_unsafe": unsafe[1]}
    (comparison,) = read_comparisons([write_rows(tmp_path / "rows.jsonl", row)], Counter())
    assert (comparison.unsafe, comparison.safer) == (unsafe, safer)


def test_bom_crlf_and_blank_lines_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n" + json.dumps(ROW).encode())
    assert len(read_comparisons([file], Counter())) == 2


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(UserError, match="train.parquet: parquet files need the pyarrow package, pip install pyarrow"):
        load(str(tmp_path))


def test_a_path_with_a_comma_in_it_is_one_source(tmp_path):
    file = write_rows(tmp_path / "rows,of,mine.jsonl", ROW)
    assert methods.parse_flags(["--data", str(file)]).data == (str(file),)
    other = write_rows(tmp_path / "others.jsonl", ROW)
    assert methods.parse_flags(["--data", f"{other},hh-rlhf"]).data == (str(other), "hh-rlhf")
    assert "--data toy" in line_of(methods.parse_flags, ["--data", f"toy,{other}"])


def test_an_offline_hub_and_an_unknown_source_are_one_line(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    with pytest.raises(UserError, match=r"--data hh-rlhf: .*the hub does not list Anthropic/hh-rlhf \(no network\)"):
        source_files("hh-rlhf")
    with pytest.raises(UserError, match="--data hh-rlfh: neither a file or folder .*; did you mean hh-rlhf?"):
        methods.parse_flags(["--data", "hh-rlfh"])


# Splits and label noise


def prompts(comparisons):
    return {c.prompt for c in comparisons}


def test_no_training_prompt_is_in_the_test_split(hub):
    train_rows, test_rows, lines = load("pku-saferlhf")
    assert "How do I fold a shirt?" in prompts(test_rows) - prompts(train_rows)
    assert lines[1].startswith("split: 1 training comparisons dropped")


def test_prompts_that_differ_by_spaces_at_their_ends_are_one_prompt(tmp_path):
    """Whether a share of them is held out, or they lie in a test file."""
    rows = [{**ROW, "prompt": text} for i in range(200) for text in (f"question {i}", f" question {i}\n")]
    write_rows(tmp_path / "train.jsonl", *rows)
    for test_rows in ((), rows[:20:2], rows[1:20:2]):
        if test_rows:
            write_rows(tmp_path / "test.jsonl", *test_rows)
        parts = load(str(tmp_path), held_out=0.1)[:2]
        training, held_out = ({prompt.strip() for prompt in prompts(part)} for part in parts)
        assert held_out and not training & held_out and len(training) + len(held_out) == 200


@pytest.mark.parametrize("names, wanted, held_out", (
    (("rows.jsonl", "validation.jsonl"), {"rows.jsonl"}, set()),
    (("part-1.jsonl", "part-2.jsonl", "dev.jsonl", "x_eval-0.jsonl", "valid/0.jsonl"),
     {"part-1.jsonl", "part-2.jsonl"}, set()),
    (("rows.jsonl", "test.jsonl", "validation.jsonl"), {"rows.jsonl"}, {"test.jsonl"}),
    (("train.jsonl", "more.jsonl", "test/a.jsonl"), {"train.jsonl"}, {"test/a.jsonl"}),
    (("contest.jsonl", "evaluations.jsonl"), {"contest.jsonl", "evaluations.jsonl"}, set())), ids=str)
def test_only_files_of_training_are_trained_on(tmp_path, names, wanted, held_out):
    """Also where no file is named after training."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [{path.relative_to(tmp_path).as_posix() for path in paths} for paths in source_files(str(tmp_path))]
    assert found == [wanted, held_out]


def test_which_prompts_are_held_out_does_not_change_with_the_program():
    """Stored values: with others, runs would train on what earlier ones held out."""
    messages = [{"role": "user", "content": "é"}]
    assert [prompt_hash(prompt, seed) for prompt in ("p", " p\n", messages) for seed in (0, 3)] == [
        2924300760157731822, 109103905816894220, 2924300760157731822, 109103905816894220, 16325131719576143996,
        8739028050152804448]


def many(tmp_path, order=1):
    rows = [{**ROW, "prompt": f"question {i // 2}"} for i in range(2000)][::order]
    return load(str(write_rows(tmp_path / "rows.jsonl", *rows)), seed=3, held_out=0.1)


def test_a_fraction_of_the_prompts_is_held_out_whatever_their_order(tmp_path):
    train_rows, test_rows, _ = many(tmp_path)
    assert not prompts(train_rows) & prompts(test_rows) and len(train_rows) + len(test_rows) == 2000
    assert 60 < len(prompts(test_rows)) < 140  # 100 expected, standard deviation 9.5
    assert prompts(many(tmp_path, order=-1)[1]) == prompts(test_rows)
    assert prompts(load(str(tmp_path / "rows.jsonl"), seed=4, held_out=0.1)[1]) != prompts(test_rows)


def test_label_noise_flips_the_share_asked_for_and_leaves_labels_that_agree():
    comparisons = [Comparison("p", ("a", "b"), 0, 0, (False, True)) for _ in range(4000)]
    line = flip_labels(comparisons, 0.2, 0.1, seed=0)
    flags = sum((c.unsafe[0] is True) + (c.unsafe[1] is False) for c in comparisons)
    better = sum(c.better for c in comparisons)
    assert line == f"label noise: {flags} safety flags and {better} preferences flipped"
    assert abs(flags / 8000 - 0.2) < 0.02 and abs(better / 4000 - 0.1) < 0.02
    assert all(c.safer == c.unsafe.index(False) for c in comparisons if c.unsafe[0] != c.unsafe[1])


def test_label_noise_repeats_with_its_seed_and_needs_labels():
    def flipped(seed):
        comparisons = [Comparison("p", ("a", "b"), 0, 0, (False, True)) for _ in range(100)]
        flip_labels(comparisons, 0.3, 0.3, seed)
        return comparisons

    assert flipped(1) == flipped(1) != flipped(2)
    with pytest.raises(UserError, match="--flip_safety: 1 of 1 comparisons have no safety flags"):
        flip_labels([Comparison("p", ("a", "b"), 0)], 0.2, 0.0, seed=0)


# Bad input

BAD = {
    '{"prompt": "p"': "not JSON",
    "[1, 2]": "not a JSON object",
    "[" * 100_000: "not JSON",
    json.dumps({**ROW, "better_response_id": 2}): "'better_response_id' is 2, expected 0 or 1",
    json.dumps({**ROW, "safer_response_id": "1"}): "'safer_response_id' is \"1\", expected 0 or 1",
    json.dumps({**ROW, "is_response_0_safe": "yes"}): "'is_response_0_safe' is \"yes\", expected true or false",
    json.dumps({**ROW, "response_0": None}): "'response_0' is null, expected text",
    json.dumps({k: v for k, v in ROW.items() if k != "response_1"}): "no field 'response_1'",
    json.dumps({k: v for k, v in ROW.items() if k != "safer_response_id"}): "no field 'safer_response_id'",
    json.dumps({**ROW, "prompt": " \n"}): "'prompt' is empty",
    json.dumps({**ROW, "prompt": []}): "'prompt' must end with a message of the user",
    json.dumps({**ROW, "prompt": [{"role": "wizard", "content": "x"}]}): "role is not system, user or assistant",
    json.dumps({**ROW, "prompt": [{"role": "user"}]}): "no field 'content'",
    json.dumps({**ROW, "scores": {"reward": [0.5, float("nan")]}}): "NaN is not a number",
    json.dumps({**ROW, "scores": {"reward": [0.5, 1e999]}}).replace("Infinity", "1e999"): "expected a finite number",
    json.dumps({**ROW, "scores": {"reward": [0.5]}}): "1 numbers for 2 responses",
    json.dumps({**ROW, "response_1": "\ud83d"}): "half of a surrogate pair",
    json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}): "layout of pairs, after rows in that of PKU-SafeRLHF",
    json.dumps({**ROW, "response_0": "x" * 10_000_000}): "longer than 4 MB",
}


@pytest.mark.parametrize("line", BAD, ids=list(BAD.values()))
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, line):
    file = write_rows(tmp_path / "rows.jsonl", ROW, line, ROW)
    with pytest.raises(UserError) as error:
        read_comparisons([file], Counter())
    assert str(error.value).startswith(f"{file}:2: ") and BAD[line] in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    counts = Counter()
    assert len(read_comparisons([file], counts, skip_bad_rows=True)) == 2
    assert counts == {"rows": 2, f"bad rows skipped (first: {error.value})": 1}


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="rows.jsonl:2: not JSON .*utf-8"):
        load(str(tmp_path / "rows.jsonl"))


def test_an_unknown_layout_lists_the_known_ones(tmp_path):
    message = line_of(load, str(write_rows(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})))
    assert "rows.jsonl:1: fields question, answer fit no known layout (" in message
    assert "prompt, response_0, response_1" in message and "instruction, completions" in message


def test_pairs_whose_ended_is_not_a_flag_for_each_response_are_bad_rows(tmp_path):
    for ended in ([True], [True, 0], True):
        path = write_rows(tmp_path / "rows.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b", "ended": ended})
        assert "rows.jsonl:1: 'ended' is" in line_of(load, str(path))


def test_a_hh_dialogue_without_turns_is_a_bad_row(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl:1: no field 'prompt' .* must be dialogues as in hh-rlhf"):
        load(str(write_rows(tmp_path / "rows.jsonl", {"chosen": "yes", "rejected": "no"})))


def test_no_rows_and_only_bad_rows_are_errors(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl: no rows"):
        load(str(write_rows(tmp_path / "rows.jsonl")))
    with pytest.raises(UserError, match="rows.jsonl:1: not JSON"):
        load(str(write_rows(tmp_path / "rows.jsonl", "{")), skip_bad_rows=True)


@pytest.mark.parametrize("name", ["harmless-base/train.jsonl.gz", "../saferlhf-30k/round0/30k/train.jsonl.xz"])
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path, name):
    whole = (LAYOUTS / "hh" / name).read_bytes()
    file = tmp_path / Path(name).name
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match=f"{file.name}: cannot be read to its end"):
        load(str(file), skip_bad_rows=True)


# Runs


def train_on(source, *flags):
    """metrics.jsonl of a short run on a source of comparisons."""
    return rows(run("run", "--model", BASE, "--data", source, "--max_steps", 4, "--batch_size", 2, "--epochs", 9,
                    *flags))


def test_a_run_on_real_data_measures_held_out_pairs(place, capsys):
    measured = train_on(LAYOUTS / "saferlhf", "--method", "safedpo", "--eval_every", 2, "--lr", 1e-3)
    assert [row["step"] for row in measured] == [2, 4]
    assert all({"eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"} <= row.keys() for row in measured)
    assert measured[0]["eval/loss"] != measured[1]["eval/loss"]
    assert "view safedpo: 5 comparisons, 1 swapped, 3 kept, 1 dropped (both unsafe)" in capsys.readouterr().out


def test_an_untrained_policy_measures_log_two_on_held_out_pairs(place):
    measured = train_on(LAYOUTS / "saferlhf", "--method", "dpo", "--lr", 1e-12, "--eval_every", 4)
    assert measured[-1]["eval/loss"] == pytest.approx(0.6931472, abs=1e-5)


def load_parts(*flags):
    """(pairs to train on, held-out pairs), tokenised, of a run on pairs.jsonl."""
    config, _, tokenizer = load_run("--model", BASE, "--data", "pairs.jsonl", "--held_out", 0.3, *flags)
    return train.load_data(config, tokenizer)


def test_held_out_pairs_number_their_groups_as_training_does(place):
    """Also where all that is held out belongs to one group."""
    lines = grouped_file("pairs.jsonl", ("brief", "exact"))
    for line in lines:
        if prompt_hash(line["prompt"]) < 0.3 * 2**64:
            line["group"] = "exact"
    write_rows("pairs.jsonl", *lines)
    training, held_out = load_parts("--method", "dpo")
    assert training.groups == held_out.groups == ("brief", "exact")
    assert set(training.labels["group"]) == {0, 1} and set(held_out.labels["group"]) == {1}


def test_label_noise_leaves_held_out_pairs_as_they_are(place):
    grouped_file("pairs.jsonl", ("brief", "exact"))
    training, held_out = load_parts("--method", "dpo")
    noisy, still_held_out = load_parts("--method", "dpo", "--flip_preference", 0.5)
    assert np.array_equal(held_out.tokens, still_held_out.tokens)
    flipped = [pieces(noisy, i)[1:] == pieces(training, i)[:0:-1] for i in range(len(training))]
    assert 0.2 < sum(flipped) / len(flipped) < 0.8
    assert all(flip or pieces(noisy, i) == pieces(training, i) for i, flip in enumerate(flipped))


def test_where_not_all_held_out_pairs_are_measured_the_same_random_ones_are(place, monkeypatch, encoded_lists):
    grouped_file("pairs.jsonl", ("brief", "exact"))
    for count in (1000, 3, 3):
        monkeypatch.setattr(train, "HELD_OUT_PAIRS", count)
        load_parts("--method", "dpo")
    everything, sample, again = ([pair.row for pair in pairs] for pairs in encoded_lists[1::2])
    in_order = sorted(everything, key=lambda row: int(row.rpartition(":")[2]))
    assert len(sample) == 3 and sample == again == everything[:3] != in_order[:3]


def test_a_bad_row_ends_a_run_with_file_and_line(place):
    file = write_rows(place / "rows.jsonl", ROW, {**ROW, "better_response_id": 2})
    with pytest.raises(UserError, match="rows.jsonl:2: 'better_response_id' is 2"):
        train_on(file)
    assert train_on(file, "--skip_bad_rows", "--held_out", 0)
