"""Interrupted runs: killed at random moments, on a full disk, by a loss that is not finite, in a folder that another
run holds. The same command with --resume ends with the same bytes.

    KILLS=20 python -m pytest -q tests/test_runs_kills.py     20 kills of each method; else 2
"""
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

import chat
import methods
import runs as runs_file
import train
from common import as_command, progress, whole_rows
from conftest import change_loss, files_of, interrupt_at, json_lines, line_of, mistake, rows, run, timeless
from runs import ALONE, LONG, alarms

KILLS = int(os.environ.get("KILLS", 2))
METHODS = {
    "sft": (), "dpo": ("--lora_rank", 4), "safedpo": (), "reward": (), "cost": (), "spe-dpo": (), "midpo": (),
    "pmol": ("--lora_rank", 4), "mix-dpo": ("--latent", "annotator", "--lora_rank", 4, "--annotators", 12),
    "moe-dpo": ("--lora_rank", 4)}


def in_a_child(*flags, before=lambda: None):
    """The process number of a run in a fork of this process; its last words go to errors.txt."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, and a killed one would never give it back
        signal.alarm(120)
        sys.stdout = open(os.devnull, "w")
        sys.stderr = open("errors.txt", "w")
        before()
        flags = [*map(str, flags), "--out", "out/run", "--device", "cpu"]
        as_command(lambda: train.main(flags), "train.py", "interrupted")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        status = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(status)


def ended(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(quick, method):
    """Also during a save (there is one after every step), an evaluation, and between the stages of midpo."""
    flags = ("--method", method, *METHODS[method], "--max_steps", 5, "--batch_size", 4, "--save_every", 1,
             "--log_every", 2, "--eval_every", 2)
    started = time.monotonic()
    whole = run("whole", *flags)
    seconds, draws = time.monotonic() - started, np.random.default_rng(sum(map(ord, method)))
    for _ in range(KILLS):
        for part in draws.dirichlet(np.ones(draws.integers(2, 5)))[1:]:  # one kill after the other, in what a run takes
            number = in_a_child(*flags, "--resume")
            time.sleep(seconds * part)
            os.kill(number, signal.SIGKILL)
            ended(number)
        assert ended(in_a_child(*flags, "--resume")) == 0, Path("errors.txt").read_text()
        out = Path("out/run")
        assert {path.name for path in files_of(out)} - {".lock"} == {path.name for path in files_of(whole)} - {".lock"}
        for path, content in files_of(whole).items():
            if path.name not in ("config.json", "metrics.jsonl"):  # stages name their folder in theirs
                assert files_of(out)[path] == content, path
        for metrics in whole.rglob("metrics.jsonl"):
            assert timeless(metrics.parent) == timeless(out / metrics.parent.relative_to(whole))
        shutil.rmtree(out)  # a finished run would only be left alone


def test_a_full_disk_ends_a_run_in_one_line_and_leaves_the_checkpoint_before_it(quick):
    """Here a limit to the size of a file, as a full disk says it: by an error when more is written."""
    flags = ("--method", "safedpo", "--max_steps", 6, "--save_every", 3)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save, saved = runs_file.save_checkpoint, []

        def save_twice(*settings):
            if saved:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            saved.append(1)
            save(*settings)
        train.save_checkpoint = save_twice

    assert ended(in_a_child(*flags, before=fill)) == 1
    errors = Path("errors.txt").read_text()
    assert "Traceback" not in errors and "checkpoint" in errors.splitlines()[-1]
    assert torch.load("out/run/checkpoint/state.pt", weights_only=True)["step"] == 3
    assert files_of(run("run", *flags, "--resume")) == files_of(run("whole", *flags))


def test_killed_between_the_two_renames_of_a_save_the_checkpoint_before_it_counts(quick):
    flags = ("--method", "safedpo", "--max_steps", 6, "--log_every", 1)
    whole = run("whole", *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2, signal.SIGTERM)
        run("run", *flags)
    out = Path("out/run")
    (out / "checkpoint").rename(out / "checkpoint.old")
    shutil.copytree(out / "checkpoint.old", out / "checkpoint.partial")
    steps, train_step = [], train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *settings: (steps.append(1), train_step(*settings))[1])
        run("run", *flags, "--resume")
    assert len(steps) < 6 and files_of(out) == files_of(whole) and timeless(out) == timeless(whole)


# Losses that are not finite


def poisoned(monkeypatch, steps):
    """From now on the loss of these steps is not a number."""
    calls = iter(range(10 ** 6))

    def poison(loss, metrics):
        if torch.is_grad_enabled() and next(calls) in steps:
            return loss * float("nan"), {name: value * float("nan") for name, value in metrics.items()}
        return loss, metrics
    change_loss(monkeypatch, poison)


FLAGS = ("--method", "safedpo", "--lora_rank", 4, "--log_every", 2, "--lr", 1e-3)


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_named(quick, monkeypatch, capsys):
    poisoned(monkeypatch, {1, 4, 5})
    logged = rows(run("run", *FLAGS, "--max_steps", 6))
    assert [row.get("skipped", 0) for row in logged] == [1, 0, 2]
    assert all(np.isfinite(value) for row in logged for value in row.values())
    assert "loss" not in logged[2] and 0.1 < logged[0]["loss"] / logged[1]["loss"] < 10
    printed = capsys.readouterr().out
    config = methods.parse_flags([*map(str, FLAGS), "--device", "cpu"])
    order = train.training_order(train.load_data(config, chat.Tokenizer(train.base_folder(config)))[0], config)
    for i in (1, 4, 5):
        assert f"pairs {', '.join(map(str, order[8 * i:8 * i + 8]))}" in printed
    assert "  skipped 3" in printed


def test_a_skipped_step_changes_no_weight(quick, monkeypatch):
    good = files_of(run("good", *FLAGS, "--max_steps", 1, "--warmup", 0))
    poisoned(monkeypatch, range(1, 6))
    bad = files_of(run("bad", *FLAGS, "--max_steps", 6, "--warmup", 0))
    path = Path("adapter/adapter_model.safetensors")
    assert good[path] == bad[path], "the first step has the same rate in both"


def test_a_gradient_that_overflows_is_skipped_too(quick, monkeypatch):
    change_loss(monkeypatch, lambda loss, metrics: (loss * 1e38 * 1e38 ** 0.5, metrics))
    [row] = rows(run("run", *FLAGS, "--max_steps", 2))
    assert row["skipped"] == 2


def test_ten_skipped_steps_in_a_row_end_the_run_and_the_checkpoint_before_stays(quick, monkeypatch):
    poisoned(monkeypatch, range(3, 100))
    message = line_of(run, "run", *FLAGS, "--epochs", 9, "--save_every", 2)
    assert "10 steps in a row" in message and "--lr" in message and rows(Path("out/run"))[-1]["skipped"] > 0
    good = torch.load("out/run/checkpoint/state.pt", weights_only=True)
    assert all(value.isfinite().all() for value in good["parameters"].values())
    assert not Path("out/run/adapter").exists()


# Alarms


def metrics(count=LONG, **values):
    """Rows of metrics.jsonl; a value is a number or a function of the row's number."""
    return [{key: value(i) if callable(value) else value for key, value in values.items()} for i in range(count)]


@pytest.mark.parametrize("name, values, fine", (
    ("falling", {"rewards/chosen": lambda i: -1.1 - i / 10, "rewards/rejected": lambda i: -3 - i / 10},
     {"rewards/chosen": lambda i: 1 - i / 10, "rewards/rejected": lambda i: -3 - i / 10}),
    ("stuck", {"rewards/accuracies": lambda i: 0.5 + 0.1 * (-1) ** i}, {"rewards/accuracies": 0.6}),
    ("router/safety", {"router/safety": 0.01}, {"router/safety": 0.03}),
    ("empty", {"router/empty": 0.96}, {"router/empty": 0.9}),
    ("mixture", {"responsibility/0": 0.01, "responsibility/1": 0.99},
     {"responsibility/0": 0.1, "responsibility/1": 0.9}),
))
def test_alarms_ring_after_ten_rows_and_say_what_to_try(name, values, fine):
    count = 2 * LONG if name == "stuck" else LONG
    ((rung, warning),) = alarms(metrics(count, **values))
    assert rung == name and "try" in warning
    assert not [*alarms(metrics(count - 1, **values)), *alarms(metrics(count, **fine))]


def test_an_alarm_is_one_line_once(quick, monkeypatch, capsys):
    monkeypatch.setattr(runs_file, "alarms", lambda logged: [("stuck", "it is stuck")] if len(logged) > 1 else [])
    run("run", *FLAGS, "--max_steps", 6, "--log_every", 1)
    assert capsys.readouterr().out.count("warning, step 2: it is stuck") == 1


# Two runs, one folder


def test_a_second_run_into_a_folder_refuses(quick):
    before = files_of(run("run", *FLAGS, "--max_steps", 1))
    with FileLock("out/run/.lock"):  # as a run holds it
        message = mistake(*FLAGS, "--max_steps", 1, "--overwrite", "--out", "out/run")
    assert "out/run: another run is writing there" in message
    assert files_of(Path("out/run")) == before
    assert run("run", *FLAGS, "--max_steps", 1, "--overwrite")


def test_half_a_row_breaks_no_reader_of_metrics(quick):
    out = run("run", *FLAGS, "--max_steps", 4)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in whole_rows(out / "metrics.jsonl")] == [2, 4]
    log = runs_file.RunLog(out, 9, methods.Config(), ALONE, progress(), "pairs")
    assert [row["step"] for row in log.rows] == [row["step"] for row in json_lines(out / "metrics.jsonl")] == [2, 4]
