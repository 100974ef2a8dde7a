"""A run's folder: --resume, --overwrite, nothing finished is lost, kills during the move, the log, inputs in --out."""
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import eval as eval_file
import methods
import runs as runs_file
import train
from common import content_hash, read_json
from conftest import edit_json, files_of, interrupt_at, mistake, rows, run, timeless, write_rows

FLAGS = ("--method", "safedpo", "--lora_rank", 4, "--max_steps", 4, "--log_every", 1)
ADAPTER = Path("adapter/adapter_model.safetensors")


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def interrupted(patch, step, *flags):
    """A run that a signal ends during this step."""
    with patch.context() as here, pytest.raises(KeyboardInterrupt):
        interrupt_at(here, step, signal.SIGTERM)
        run("run", *flags)


# --resume


def test_resume_starts_or_goes_on_from_a_checkpoint_and_leaves_a_finished_run_alone(quick, monkeypatch, capsys):
    whole = files_of(run("whole", *FLAGS))
    interrupted(monkeypatch, 1, *FLAGS, "--resume")  # there is nothing yet: it starts
    assert Path("out/run/checkpoint").is_dir() and len(rows(Path("out/run"))) == 2
    out = run("run", *FLAGS, "--resume")             # it goes on
    assert files_of(out) == whole and timeless(out) == timeless(Path("out/whole"))
    before = stamps(out)
    capsys.readouterr()
    run("run", *FLAGS, "--resume")                   # it is finished
    assert stamps(out) == before and "out/run: finished" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_again(quick, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        run("run", *FLAGS)
    assert files_of(run("run", *FLAGS, "--resume")) == files_of(run("whole", *FLAGS))


def test_a_checkpoint_comes_by_time_without_being_asked_for(quick, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(train, "save_checkpoint", lambda out, step, *rest: saved.append(step))
    run("run", *FLAGS)
    assert saved == [1, 2, 3, 4]


def test_midpo_from_given_adapters_is_left_alone_when_it_is_finished(quick):
    run("run", "--method", "midpo", "--max_steps", 2, "--batch_size", 4)
    flags = ("--method", "midpo", "--max_steps", 2, "--batch_size", 4, "--init_adapter", "out/run/safety/adapter",
             "--init_adapter", "out/run/helpful/adapter", "--resume")
    before = files_of(run("routed", *flags))
    assert files_of(run("routed", *flags)) == before and Path("out/routed/experts").is_dir()


def test_a_resumed_run_with_other_settings_says_which(quick, monkeypatch):
    interrupted(monkeypatch, 1, *FLAGS)
    other = (*FLAGS, "--delta", 3, "--seed", 1, "--batch_size", 4, "--resume", "--out", "out/run")
    for part in ("delta 10.0 (now 3.0)", "pairs_per_step 8 (now 4)", "seed 0 (now 1)"):
        assert part in mistake(*other)
    run("run", *FLAGS, "--resume")
    assert "delta 10.0 (now 3.0)" in mistake(*other)


def test_a_resumed_run_may_split_its_steps_in_another_way(quick, monkeypatch):
    interrupted(monkeypatch, 1, *FLAGS)
    assert run("run", *FLAGS, "--batch_size", 4, "--grad_accum", 2, "--resume")


# A finished run is replaced with --overwrite alone; it stays until the new run is finished


def test_the_same_command_typed_twice_keeps_the_run_and_says_so(quick, capsys):
    before = stamps(run("run", *FLAGS))
    capsys.readouterr()
    out = run("run", *FLAGS)
    assert stamps(out) == before and capsys.readouterr().out == "out/run: finished with these settings, kept\n"


def test_other_settings_of_a_finished_run_are_named_at_once_and_replace_it_with_overwrite(quick, monkeypatch):
    before = stamps(run("run", *FLAGS))
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", lambda *_: pytest.fail("it is said before anything long begins"))
        for flags, changed in ((("--delta", 0), "delta 10.0 (now 0.0)"), (("--seed", 1), "seed 0 (now 1)")):
            message = mistake(*FLAGS, *flags, "--out", "out/run")
            assert "the run in out/run has" in message and changed in message and "--overwrite" in message
        write_rows("pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
        assert "other contents of its input files" in mistake(*FLAGS, "--data", "pairs.jsonl", "--out", "out/run")
    assert stamps(Path("out/run")) == before
    out = run("run", *FLAGS, "--delta", 0, "--overwrite")
    assert read_json(out / "config.json")["delta"] == 0 and files_of(out) == files_of(run("new", *FLAGS, "--delta", 0))


def test_overwrite_trains_the_same_run_anew(quick):
    before, content = stamps(run("run", *FLAGS)), files_of(Path("out/run"))
    out = run("run", *FLAGS, "--overwrite")
    weights = out / ADAPTER
    assert stamps(out)[weights] != before[weights] and files_of(out) == content


def test_a_checkpoint_of_these_settings_is_not_left_unused_by_accident(quick, monkeypatch):
    interrupted(monkeypatch, 1, *FLAGS)
    before = stamps(Path("out/run"))
    message = mistake(*FLAGS, "--out", "out/run")
    assert "out/run has a checkpoint" in message and "--resume" in message and "--overwrite" in message
    assert stamps(Path("out/run")) == before
    out = run("run", *FLAGS, "--overwrite")
    assert files_of(out) == files_of(run("whole", *FLAGS)) and not (out / ".new").exists()


def test_checkpoints_of_other_settings_are_left_or_removed_with_a_line(quick, monkeypatch, capsys):
    interrupted(monkeypatch, 1, *FLAGS)
    interrupted(monkeypatch, 1, *FLAGS, "--delta", 3)
    assert "out/run: the checkpoint of an interrupted run stays" in capsys.readouterr().out
    interrupted(monkeypatch, 1, *FLAGS, "--delta", 4)
    printed = capsys.readouterr().out
    assert "out/run/.new: the checkpoint of an interrupted run is removed" in printed
    assert "out/run: the checkpoint of an interrupted run stays" in printed
    assert "delta 4.0 (now 3.0)" in mistake(*FLAGS, "--delta", 3, "--resume", "--out", "out/run")
    whole = files_of(run("whole", *FLAGS))
    assert files_of(run("run", *FLAGS, "--resume"))[ADAPTER] == whole[ADAPTER], "it goes on with the one that fits"


def test_with_both_flags_a_run_goes_on_and_replaces_another(quick, monkeypatch):
    """As a job that is started again and again has them on its command line."""
    run("run", *FLAGS)
    new = (*FLAGS, "--delta", 3, "--overwrite", "--resume")
    interrupted(monkeypatch, 2, *new)
    assert read_json("out/run/config.json")["delta"] == 10 and Path("out/run/.new/checkpoint").is_dir()
    schedule, done = train.learning_rate, []
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, *rest: done.append(step) or schedule(step, *rest))
        out = run("run", *new)
    assert done == [3] and read_json(out / "config.json")["delta"] == 3
    before = stamps(out)
    assert stamps(run("run", *new)) == before


@pytest.mark.parametrize("finished", (True, False), ids=("finished", "checkpoint"))
def test_a_new_run_leaves_the_old_one_alone_until_it_is_finished(quick, monkeypatch, finished):
    if finished:
        run("run", *FLAGS)
    else:
        interrupted(monkeypatch, 1, *FLAGS)
    before = files_of(Path("out/run"))
    interrupted(monkeypatch, 2, *FLAGS, "--delta", 3, *["--overwrite"] * finished)
    new = {path: text for path, text in files_of(Path("out/run")).items() if path.parts[0] != ".new"}
    assert new == before and Path("out/run/.new/checkpoint").is_dir()
    out = run("run", *FLAGS, "--delta", 3, "--resume")
    assert read_json(out / "config.json")["delta"] == 3
    assert not (out / ".new").exists() and not (out / "checkpoint").exists()
    assert files_of(out) == files_of(run("fresh", *FLAGS, "--delta", 3))


def test_another_kind_of_weights_takes_the_place_of_the_old_ones(quick):
    run("run", *FLAGS)
    eval_file.main(["out/run", "--split", "dev"])
    out = run("run", "--method", "safedpo", "--max_steps", 2, "--overwrite")
    assert (out / "model").is_dir() and not (out / "adapter").exists() and not (out / "eval-dev.json").exists()


class Killed(Exception):
    pass


def test_a_kill_at_any_moment_of_the_move_loses_neither_run(quick, monkeypatch):
    run("old", *FLAGS)
    run("new", *FLAGS, "--delta", 3)
    old, new = files_of(Path("out/old")), files_of(Path("out/new"))
    outcomes = set()
    for stop in range(40):
        shutil.rmtree("out/run", ignore_errors=True)
        shutil.copytree("out/old", "out/run")
        shutil.copytree("out/new", "out/run/.new")
        edit_json(Path("out/run/.new/config.json"), finished="absent")
        calls = iter(range(stop))

        def killing(change):
            def change_or_be_killed(path, *rest, **settings):
                if path.exists() and next(calls, None) is None:
                    raise Killed
                return change(path, *rest, **settings)
            return change_or_be_killed
        with monkeypatch.context() as patch:
            for place, names in ((Path, ("replace", "rename", "rmdir", "unlink")), (shutil, ("rmtree",))):
                for name in names:
                    patch.setattr(place, name, killing(getattr(place, name)))
            try:
                runs_file.close_run(Path("out/run"), Path("out/run/.new"))
                whole = True
            except Killed:
                whole = False
        runs_file.finish_move(Path("out/run"))
        shutil.rmtree("out/run/.new", ignore_errors=True)  # not yet marked: the old run is still there
        assert files_of(Path("out/run")) in (old, new)
        outcomes.add(files_of(Path("out/run")) == new)
        if whole:
            break
    assert whole and stop > 12 and outcomes == {True, False}


# Inputs, splits and what is said


def test_a_runs_settings_have_a_hash_of_each_of_its_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("base", "rows", "reward", "cost", "safety", "helpful", "reference")
    for name in names:
        Path(name).mkdir()
        (Path(name) / "file").write_text("as it was")
    config = replace(methods.parse_flags(["--device", "cpu"]), data=("rows",), reward_model="reward", cost_model="cost",
                     init_adapter=("safety", "helpful"), references=("reference",))
    before = train.run_settings(config, Path("base"))
    for name in names:
        (Path(name) / "file").write_text("as it is now")
        after = train.run_settings(config, Path("base"))
        assert {key for key in names if after["inputs"][key] != before["inputs"][key]} == {name}
        before = after


def test_the_hash_of_files_sees_where_one_ends_and_the_next_begins(tmp_path):
    def hash_of(*texts):
        paths = [tmp_path / str(i) for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text)
        return content_hash(*paths)

    contents = (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("abc",), ("c", "ab"), ("abc", "", ""))
    assert len({hash_of(*texts) for texts in contents}) == len(contents)
    assert hash_of("ab", "c") == hash_of("ab", "c")
    assert len({content_hash(*settings) for settings in (("a", "b"), ("ab",), ("b", "a"), ("a", None))}) == 4


def test_the_hash_of_arrays_and_tensors_sees_type_shape_and_every_number():
    values = np.arange(100_000, dtype=np.int32)  # so many that numpy and torch print some only
    changed = values.copy()
    changed[50_000] = 0
    parts = (values, changed, values.reshape(100, 1000), values.astype(np.int64), torch.zeros(2),
             torch.zeros(2, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0), "zeros")
    assert len({content_hash(part) for part in parts}) == len(parts)
    assert content_hash(values) == content_hash(torch.from_numpy(values)) == content_hash(values[::-1][::-1])
    assert content_hash(values, "a") != content_hash("a", values)


def test_an_input_that_lies_in_the_run_folder_is_refused(quick):
    out = run("run", "--method", "safedpo", "--max_steps", 1)
    before = files_of(out)
    for flags in (("--model", "out/run/model"), ("--model", "out/run"),
                  ("--method", "spe-dpo", "--cost_model", "out/run/model")):
        assert "lies in --out out/run" in mistake(*flags, "--out", "out/run")
    assert files_of(out) == before


def test_the_development_split_does_not_overwrite_the_test_results(quick):
    out = run("run", *FLAGS)
    before = (out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()
    eval_file.main(["out/run", "--split", "dev"])
    assert ((out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()) == before
    assert read_json(out / "eval-dev.json")["split"] == "dev" and (out / "samples-dev.txt").is_file()


def test_held_out_metrics_are_shown_as_they_come_and_at_the_end(quick, capsys):
    run("run", *FLAGS, "--eval_every", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "eval/loss" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    count = rows(Path("out/run"))[-1]["eval/n"]
    assert all("eval/rewards/accuracies" in line and line.endswith(f" (n = {count} held-out pairs)") for line in lines)


@pytest.mark.parametrize("flags, line", (
    (("--batch_size", 7), "1 epoch of 56 pairs, in 8 steps of 7; --max_steps 1"),
    (("--batch_size", 9), "1 epoch of 56 pairs, in 6 steps of 9, leaving out the last 2; --max_steps 1"),
    (("--batch_size", 64), "1 epoch of 56 pairs, in 1 step of 64, repeating 8"),
    (("--epochs", 3, "--grad_accum", 2),
     "3 epochs of 56 pairs, in 10 steps of 16, leaving out the last 8; --max_steps 1"),
    (("--method", "sft"), "1 epoch of 60 examples, in 7 steps of 8, leaving out the last 4; --max_steps 1")))
def test_the_steps_of_a_run_and_what_they_leave_out_or_repeat_are_said(quick, capsys, flags, line):
    run("run", "--method", "safedpo", "--epochs", 1, "--max_steps", 1, *flags)
    assert line in capsys.readouterr().out.splitlines()


def test_without_a_terminal_each_row_is_a_line_and_there_is_no_bar(quick, capsys):
    run("run", "--method", "safedpo", "--max_steps", 5, "--log_every", 2)
    shown = capsys.readouterr()
    lines = [line.split("  ") for line in shown.out.splitlines() if line.startswith("step") and ":" not in line]
    assert [line[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"] and not shown.err
    for line, row in zip(lines, rows(Path("out/run")), strict=True):
        assert line[1:3] == [f"loss {row['loss']:.4g}", f"acc {row['rewards/accuracies']:.2f}"]
        assert line[-1] == f"tok/s {row['tokens/s']:.0f}"


def test_on_a_terminal_there_is_a_bar_instead(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run("run", "--method", "safedpo", "--max_steps", 2, "--log_every", 1)
    shown = capsys.readouterr()
    assert "step 1/2" not in shown.out and "loss=" in shown.err and "2/2" in shown.err


def test_rows_have_the_epoch_and_the_seconds_since_the_start_where_a_resumed_run_goes_on(quick, monkeypatch):
    flags = ("--method", "safedpo", "--epochs", 1, "--max_steps", 4, "--log_every", 1)
    interrupted(monkeypatch, 2, *flags)
    *before, last = rows(Path("out/run"))
    write_rows("out/run/metrics.jsonl", *before, {**last, "seconds": 1000})
    logged = rows(run("run", *flags, "--resume"))
    assert [row["epoch"] for row in logged] == [round(8 * step / 56, 4) for step in (1, 2, 3, 4)]
    seconds = [row["seconds"] for row in logged]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == 1000 < seconds[3] < 1060


def test_wandb_gets_every_row_and_is_missed_before_anything_is_read(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with monkeypatch.context() as patch:
        patch.setattr(train, "base_folder", lambda *_: pytest.fail("the run begins"))
        assert "pip install wandb" in mistake(*FLAGS, "--wandb", "project", "--out", "out/none")
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        __spec__=SimpleNamespace(origin="wandb.py"), init=lambda project, config: SimpleNamespace(log=sent.append)))
    assert sent == rows(run("run", *FLAGS, "--wandb", "project"))


def test_the_run_folder_shows_the_tokens_of_the_first_pair(quick):
    text = (run("run", *FLAGS) / "tokens.txt").read_text()
    assert text.startswith("prompt (") and "\nchosen (" in text and "['</s>']" in text


def test_reference_log_probs_are_shared_by_runs_that_need_the_same(quick, monkeypatch):
    computed = []
    response_logps = checkpoint.response_logps
    monkeypatch.setattr(checkpoint, "response_logps", lambda *rest: computed.append(1) or response_logps(*rest))
    for name, flags in (("a", ("--delta", 10)), ("b", ("--delta", 3)), ("c", ("--beta", 0.5, "--batch_size", 4))):
        run(name, *FLAGS, *flags)
    assert len(computed) == 2  # training and held-out pairs, once
    run("d", *FLAGS, "--view", "helpful")
    assert len(computed) == 4


def test_folders_of_ones_own_in_the_run_folder_stay(quick):
    for name in ("old", "done", "new"):
        Path(f"out/run/{name}").mkdir(parents=True)
        Path(f"out/run/{name}/notes.txt").write_text("mine")
    for flags in ((), ("--delta", 3, "--overwrite"), ("--delta", 3, "--resume")):
        run("run", *FLAGS, *flags)
    assert all(Path(f"out/run/{name}/notes.txt").read_text() == "mine" for name in ("old", "done", "new"))
