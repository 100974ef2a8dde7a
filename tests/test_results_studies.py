"""Every row of the studies is a command line that train.py takes, and its own place in out/study/."""
import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import lora_moe
import losses
import methods
import study
import study_pictures
import study_record
import study_runs
import toy
import train
from bench_train import products
from common import read_json
from conftest import encoded_of, load_fixture


def finish_at_once(command):
    """In the place of study_runs.run."""
    (command[-1] / "adapter").mkdir(parents=True)
    (command[-1] / "config.json").write_text('{"finished": true}')
    return {"cpu_seconds": 0, "words": [*map(str, command[1:-6])]}


def test_every_row_is_a_command_line_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {name: study_runs.pairs_file(name, 0) for name in study_runs.PAIRS}
    for rows in study.STUDIES.values():
        for flags, where in rows.values():
            for step in flags.split(" then "):
                words = step.format("DIR", "DIR", "DIR", before="DIR", **files).removeprefix("record ").split()
                words = words[words.index("--method"):]
                for place in [i for i, word in enumerate(words) if "DIR" in word][::-1]:
                    del words[place - 1:place + 1]  # a folder of the step before, which is not there yet
                methods.parse_flags([*words, "--device", "cpu"])
            assert where.split()[0].endswith(".json")
    assert study_pictures.PICTURES.keys() <= study.STUDIES.keys()


def test_runs_of_their_own_have_folders_of_their_own():
    steps = {" then ".join(flags.split(" then ")[:depth]) for rows in study.STUDIES.values()
             for flags, _ in rows.values() for depth in (1, 2, 3, 4)}
    folders = {study_runs.run_folder(flags, seed, split) for flags in steps for seed in (0, 1)
               for split in ("dev", "test")}
    assert len(steps) > 100 and len(folders) == 4 * len(steps)
    assert not any("," in str(folder) for folder in folders), "a comma ends a folder's name in --init_adapter"


def test_a_step_has_the_folders_of_the_steps_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_runs, "run", finish_at_once)
    flags = ["--method a", "--of {0}/x", "--method c", "--of {0}/x,{1}/y,{2} --last {before}"]
    folders = [study_runs.train(" then ".join(flags[:i + 1]), 1, "dev") for i in range(4)]
    assert read_json(folders[1] / "cost.json")["words"] == ["--of", f"{folders[0]}/x"]
    assert read_json(folders[3] / "cost.json")["words"] == [
        "--of", f"{folders[0]}/x,{folders[1]}/y,{folders[2]}", "--last", str(folders[2])]
    assert read_json(folders[3] / "cost.json")["before"] == str(folders[2]) and len(set(folders)) == 4


def test_a_run_that_was_stopped_is_not_taken_for_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_runs, "run", lambda command: {"cpu_seconds": 0})
    with pytest.raises(SystemExit, match="was stopped"):
        study_runs.train("--method sft", 1, "dev")
    assert not list(tmp_path.rglob("cost.json"))


def test_a_rate_is_that_of_the_last_step():
    assert study.at_rate("--method a --lr 1e-4 then --method b --lr 3e-4 --beta 1", 2) == (
        "--method a --lr 1e-4 then --method b --lr 0.0006 --beta 1")
    with pytest.raises(SystemExit, match="no --lr"):
        study.at_rate("--method a", 2)


def test_the_best_rate_is_that_of_the_highest_score_whose_language_holds():
    def line(helpful, harmless, degenerate):
        return {"score": helpful + harmless, "score_se": 0.02, "degenerate": degenerate, "degenerate_se": 0.01}

    table = study.rate_table({"base": line(0.9, 0.5, 0.01), "A, b × 0.5": line(0.8, 0.9, 0.02),
                              "A, b × 1": line(0.9, 0.9, 0.05), "A, b × 2": line(1.0, 1.0, 0.07),
                              "C × 1": line(0, 0, 1)})
    cells = {row.split("|")[1].strip(): row.split("|")[2:5:2] for row in table.split("\n")[2:]}
    assert {name: mark.strip() for name, (_, mark) in cells.items()} == {
        "A, b × 0.5": "", "A, b × 1": "✓", "A, b × 2": "", "C × 1": ""}
    assert cells["A, b × 1"][0].strip().startswith("1.800 ± 0.020")


def test_differences_are_taken_seed_by_seed(monkeypatch):
    scores = {"a": (0.5, 0.9, 0.1), "b": (0.6, 1.0, 0.5)}  # of seeds 0 to 2: +0.1, +0.1, +0.4
    monkeypatch.setattr(study, "metrics_of", lambda run, where, split: {"score": scores[run[0]][run[1]], "score_se": 0})
    runs = {(name, seed): (name, seed) for name in "ab" for seed in range(3)}
    lines = study.differences({"A": ("a", "x"), "B": ("b", "x")}, runs, range(3), "test", "A")
    assert lines.keys() == {"B"} and lines["B"]["score"] == pytest.approx(0.2)
    assert lines["B"]["score_se"] == pytest.approx(0.1)


def test_only_everything_on_test_prompts_writes_the_picture(tmp_path, monkeypatch):
    pictures, names = [], []
    for name, value in {"make_base": id, "train": lambda *_: tmp_path, "read": lambda *_: {}, "print_tables":
                        lambda args, lines, rows, *_: names.append([*rows])}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setitem(study_pictures.PICTURES, "all", lambda *_: pictures.append(len(names)))
    (tmp_path / "cost.json").write_text('{"cpu_seconds": 0}')
    for flags in ([], ["--rows", "MidPO"], ["--seeds", "3,4"], ["--split", "dev"], ["--rates", "1"],
                  ["--against", "MidPO"]):
        monkeypatch.setattr("sys.argv", ["study.py", "all", *flags])
        study.main()
    assert pictures == [1] and names[0] == [*study.STUDIES["all"]]
    assert "MidPO × 1" in names[4] and "SPE-DPO, safety expert × 1" not in names[4], "its rate is not the row's"


def test_a_development_table_has_the_score_that_decides(capsys):
    line = {f"{key}{error}": 0.5 for key in (*toy.COLUMNS, "score") for error in ("", "_se")}
    for split, columns in (("dev", 8), ("test", 7)):
        study.print_tables(argparse.Namespace(study="targets", split=split, rates=None, against=None),
                           {"base": line}, {}, {}, [])
        assert capsys.readouterr().out.split("\n")[0].count("|") == columns + 1


def test_margins_are_those_of_all_pairs_and_of_the_end(tmp_path):
    rows = [{"score_margin": i, "rewards/margins": i} for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study_runs.diagnostics(tmp_path) == {"score_margin": 19.5, "margins": 38.5}


def test_forgetting_asks_safe_prompts_of_no_preference(tmp_path, monkeypatch):
    asked = []

    def answer(start, tokenizer, prompts, **_):
        asked.append(set(prompts))
        raise StopIteration

    (tmp_path / "config.json").write_text('{"base": "", "seed": 0}')
    for name, value in {"Tokenizer": id, "load_start": id, "answer": answer}.items():
        monkeypatch.setattr(study_runs, name, value)
    for mixed in ((), ("politeness",)):
        with pytest.raises(StopIteration):
            study_runs.forgetting(tmp_path, mixed, "dev")
    harmful = {toy.make_prompt(task, frame).text for task in toy.tasks() if task.harmful for frame in toy.frames("dev")}
    contexts = toy.PREFERENCES["politeness"][0]
    polite = {toy.make_prompt(task, frame).text for task in toy.tasks() for frame in toy.frames("dev")
              if frame[1] in contexts}
    assert asked[0] and asked[1] and not asked[0] & harmful and not asked[1] & (harmful | polite)
    assert asked[0] & polite


def test_the_base_is_not_the_adapter_that_a_second_step_starts_from(monkeypatch):
    monkeypatch.setattr(study, "metrics_of", lambda run, where, split: {"score": (run, where), "score_se": 0})
    for second, expected in (("--method dpo --init_adapter {before}/adapter", "first"), ("--method spe-dpo", "second")):
        flags = f"--method dpo then {second}"
        lines = study.read({"A": (flags, "eval.json policy")}, {("--method dpo", 0): "first", (flags, 0): "second"},
                           [0], "test", False)
        assert lines["base"]["score"] == (expected, "eval.json base")
        assert lines["A"]["score"] == ("second", "eval.json policy")


def test_where_the_preference_is_known_its_expert_is_chosen_by_held_out_pairs():
    def line(a, b, degenerate):
        return {"a": a, "a_se": 0.3, "b": b, "b_se": 0.4, "mixing": 9, "mixing_se": 9, "degenerate": degenerate,
                "degenerate_se": 0}

    experts = {"0": line(0.9, 0.8, 0.0), "1": line(0.7, 0.6, 0.1), "mixture": line(1, 1, 1)}
    metrics = study_runs.of_known(experts, {"a": [0.4, 0.6], "b": [0.9, 0.1]})
    assert metrics == pytest.approx({"a": 0.7, "a_se": 0.3, "b": 0.8, "b_se": 0.4, "mixing": 0.75, "mixing_se": 0.25,
                                     "degenerate": 0.05, "degenerate_se": 0})


def test_pairs_of_two_preferences_are_those_of_t_or_contradict_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comparisons = toy.make_comparisons(toy.COMPARISONS, 1, 0.7)
    one_unsafe = sum(c.unsafe[0] != c.unsafe[1] for c in comparisons)
    lines = {name: study_runs.pairs_file(name, 1).read_text().splitlines() for name in ("transformed", "joint")}
    assert len(lines["transformed"]) == sum(not all(c.unsafe) for c in comparisons)
    assert len(lines["joint"]) == len(comparisons) + one_unsafe
    assert all(sum('"harmlessness"' in line for line in found) == one_unsafe for found in lines.values())


def test_rows_that_want_the_same_file_at_once_both_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_runs, "run", finish_at_once)
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(lambda rate: study_runs.train(f"--data {{others}} --lr {rate}", 1, "dev"), range(8))]
    assert all("out/study/others-seed1.jsonl" in read_json(folder / "cost.json")["words"] for folder in folders)
    assert [path.name for path in (tmp_path / "out/study").glob("others*")] == ["others-seed1.jsonl"]


def test_other_comparisons_are_read_back_with_all_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = data.load_sources((str(study_runs.pairs_file("others", 1)),), 0, 0.0, False)[0]
    others = toy.make_comparisons(toy.COMPARISONS, 1001, 0.7)
    for one, same in zip(found, others, strict=True):
        assert (one.prompt, one.responses, one.better, one.safer, one.unsafe) == (
            same.prompt, same.responses, same.better, same.safer, same.unsafe)


def test_margins_and_conflicts_are_recorded(quick, monkeypatch):
    monkeypatch.setattr(losses, "safedpo_loss", losses.safedpo_loss)  # both are put back after the test
    monkeypatch.setattr(train, "train_step", train.train_step)
    monkeypatch.setattr(study_record, "EVERY", 2)
    config = methods.parse_flags("--method safedpo --epochs 3 --device cpu --out out/margins".split())
    rows = study_record.record_margins(config)
    assert rows and all(row["q10"] <= row["q50"] <= row["q90"] and row["passed"] == 0 for row in rows)
    flags = f"--method dpo --data {study_runs.pairs_file('joint', 0)} --max_steps 5 --device cpu --lora_rank 2"
    rows = study_record.record_conflict(methods.parse_flags(f"{flags} --out out/conflict".split()), "harmlessness")
    assert [row["step"] for row in rows] == [2, 4] and all(-1 <= row["0"] <= 1 for row in rows)


class CountProducts(TorchDispatchMode):
    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def test_products_are_the_matrix_products_of_a_step_but_for_those_of_lora():
    model, encoded, rank = load_fixture("llama"), encoded_of([(9, 5, 4)]), 2
    lora_moe.add_experts(model, ["down_proj"], rank, 4)
    encoded.labels["reference"] = torch.zeros(1, 2).numpy()
    parameters = lora_moe.trainable_parameters(model)
    config = methods.parse_flags(["--method", "dpo", "--device", "cpu"])
    with CountProducts() as counter:
        train.train_step(model, parameters, train.make_optimizer(parameters, config), encoded, [[0]], config, {})
    c, tokens, predicted = model.config, 18, 9
    both = c.intermediate_size + c.hidden_size
    forward_and_weights = 2 * 2 * tokens * rank * both * c.num_layers
    states = 2 * tokens * rank * (both * c.num_layers - c.intermediate_size)  # none below the first expert
    assert sum(2 * rows * d_in * d_out * number for rows, d_in, d_out, number in products(c, tokens, predicted)) \
        == counter.flops - forward_and_weights - states
