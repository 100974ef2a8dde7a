"""A run's folder: lock, settings, log, alarms and checkpoints; and the processes that share a run."""
import itertools
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
from filelock import Timeout

from common import (BROKEN, UserError, atomic_folder, first_line, gathered, is_sharded, one_line, read_json,
                    recover_folder, shard_like, whole_rows, write_text)


# Several processes: torchrun starts them, each has a copy of the model and does its part of every step


@dataclass(frozen=True)
class Processes:
    """The rank of this process among `count` of them. All of them call a method, in the same order. If one dies, the
    method raises UserError in the others."""
    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls):
        """The processes that torchrun started, each with its own GPU; without it, this one alone."""
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                           timeout=timedelta(days=1))  # one may evaluate while the others wait
            if rank:
                sys.stdout = open(os.devnull, "w")  # only the first one prints
        return cls(rank, count)

    def mesh(self, device):
        """The processes, as what weights are sharded over; None where there is one."""
        if self.count > 1:
            return distributed.device_mesh.init_device_mesh(torch.device(device).type, (self.count,))

    def split(self, items):
        """Yield (item, counted) of this process's part of a list. All processes get equally many, because with sharded
        weights all must run each forward pass. An item with counted False is another process's, and must not count."""
        for i in range(self.rank, math.ceil(len(items) / self.count) * self.count, self.count):
            yield items[i % len(items)], i < len(items)

    def run_once(self, function):
        """Call function() in the first process alone; all of them get its result."""
        result = [function() if self.rank == 0 else None]
        if self.count > 1:
            with one_line_if_lost():
                distributed.broadcast_object_list(result, device=torch.device("cpu"))
        return result[0]

    def all_reduce(self, tensors):
        """Sum every tensor over the processes, in place, a few at a time."""
        tensors = list(tensors) if self.count > 1 else []
        ends = np.cumsum([tensor.numel() for tensor in tensors]) // BUCKET
        for bucket in np.unique(ends):
            members = [tensor for tensor, end in zip(tensors, ends) if end == bucket]
            flat = torch.cat([tensor.flatten() for tensor in members])
            with one_line_if_lost():
                distributed.all_reduce(flat)
            for tensor, summed in zip(members, flat.split([tensor.numel() for tensor in members])):
                tensor.copy_(summed.view_as(tensor))

    def gather(self, sums):
        """[{name: number} of each process]."""
        of_all = [{name: float(value) for name, value in sums.items()}] * self.count
        if self.count > 1:
            with one_line_if_lost():
                distributed.all_gather_object(of_all, of_all[0])
        return of_all

    def sum(self, sums):
        """{name: its sum over the processes}; a name may be absent in some."""
        return add_up(self.gather(sums))


ALONE = Processes()
BUCKET = 1 << 24  # numbers that are sent at a time


def add_up(sums):
    """{name: sum of what the dictionaries have under it}."""
    return {name: sum(numbers.get(name, 0.0) for numbers in sums) for name in dict.fromkeys(itertools.chain(*sums))}


@contextmanager
def one_line_if_lost():
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UserError(f"another process of this run has ended ({first_line(error)[:80]})") from None


# A run folder: config.json, metrics.jsonl, checkpoint/, and what was trained. Beside a finished run or a checkpoint, a
# new run works in .new/, and takes its place when it is finished itself.
WEIGHT_FOLDERS = ("model", "adapter", "experts")  # a run has one of them: all weights, one expert, a mixture
RUN_FILES = ("config.json", "metrics.jsonl", "tokens.txt", "experts.json", "eval*.json", "samples*.txt",
             "answers*.jsonl", "checkpoint", *WEIGHT_FOLDERS)


def read_settings(out):
    """The config.json of a run folder, {} without one; it says "finished" only while the weights are there."""
    settings = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    return {**settings, "finished": settings.get("finished", False) and any((out / n).is_dir() for n in WEIGHT_FOLDERS)}


def earlier_run(settings, free):
    """The folder, out or out/.new, of a run with these settings: finished, and kept, or begun, and to be resumed; None
    if the run starts anew. settings: for config.json; free: names of those that may differ. Raises UserError where only
    --resume or --overwrite says what is meant: the folder has a checkpoint, or a finished run with other settings."""
    out, resume, overwrite, changes = Path(settings["out"]), settings["resume"], settings["overwrite"], {}
    for folder in (out / ".new", out):
        before = read_settings(folder)
        if before["finished"] or (folder / "checkpoint").is_dir():
            changes[folder] = ", ".join(
                f"{name} {before.get(name)} (now {value})" if name != "inputs" else "other contents of its input files"
                for name, value in sorted(settings.items()) if name not in free and before.get(name) != value)
            if not changes[folder] and (resume or before["finished"] and not overwrite):
                return folder
    for folder, changed in changes.items() if not overwrite else ():
        if not changed or resume or folder == out and read_settings(out)["finished"]:
            what = f"{changed}; give the same settings, another --out" if changed else "a checkpoint; give --resume"
            raise UserError(f"the run in {folder} has {what}, or --overwrite to train anew in its place")


def open_run(settings, free, lock):
    """Make the folder to work in, out or out/.new, with config.json; None if the run is finished, and kept. lock: a
    FileLock, which the system frees when this process ends, however it does. Raises UserError when another run writes
    there, the folder has files of something else, and as `earlier_run` does."""
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    with one_line(f"--out {out}: another run is writing there; wait for it, or name another folder", Timeout):
        lock.acquire(timeout=0)
    finish_move(out)
    for folder in (out, out / ".new"):  # what processes that were killed have left
        for leftover in folder.glob("*.[0-9]*.partial"):
            leftover.unlink()
        for name in ("checkpoint", *WEIGHT_FOLDERS):
            recover_folder(folder / name)
    foreign = [path.name for path in out.glob("[!.]*") if path.is_file() and not any(map(path.match, RUN_FILES))]
    if foreign and not (out / "config.json").is_file():
        raise UserError(f"--out {out}: has files of something else, such as {min(foreign)}; name another folder")
    if folder := earlier_run(settings, free):
        return None if read_settings(folder)["finished"] else folder
    work = out / ".new" if read_settings(out)["finished"] or (out / "checkpoint").is_dir() else out
    for folder, fate in ((work, "is removed"), (out, "stays until this run is finished")):
        if (folder / "checkpoint").is_dir():
            print(f"{folder}: the checkpoint of an interrupted run {fate}", flush=True)
    work.mkdir(exist_ok=True)
    remove_run(work)
    write_text(work / "config.json", json.dumps(settings, indent=2) + "\n")
    return work


def remove_run(folder):
    for path in [path for pattern in RUN_FILES for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def close_run(out, work):
    """Mark a run as finished, and move it from out/.new to its place."""
    write_text(work / "config.json", json.dumps({**read_settings(work), "finished": True}, indent=2) + "\n")
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    finish_move(out)


def finish_move(out):
    """Put a finished run in out/.new in the place of the earlier one; goes on wherever a kill interrupted it."""
    new, moving = out / ".new", out / ".moving"
    if read_settings(new)["finished"]:
        remove_run(out)
        new.rename(moving)  # from here on, what lies in out is the new run's
    for path in moving.glob("*"):
        path.rename(out / path.name)
    if moving.is_dir():
        moving.rmdir()


def save_checkpoint(out, step, parameters, optimizer, sums=(), write=True):
    """Write checkpoint/. sums: what each process has summed since the last row of metrics.jsonl. With sharded weights
    all processes call it, and one of them writes."""
    state = gathered({"step": step, "parameters": dict(parameters), "optimizer": optimizer.state_dict(),
                      "sums": list(sums)}, write, "cpu")
    if not write:
        return
    with atomic_folder(out / "checkpoint") as temporary, one_line(
            f"{out / 'checkpoint'}: cannot be written; the one before is intact", RuntimeError):  # torch's zip writer
        torch.save(state, temporary / "state.pt")


@torch.no_grad()
def load_checkpoint(out, parameters, optimizer):
    """Restore what `save_checkpoint` wrote, if anything: (steps done, sums). UserError if it does not fit."""
    path = out / "checkpoint" / "state.pt"
    if not path.is_file():
        return 0, []
    with one_line(f"--resume: {path} is broken, remove it or --overwrite the run", BROKEN):
        sharded = any(is_sharded(parameter) for _, parameter in parameters)  # each process reads its rows from the disk
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=sharded)
        stored = state["parameters"]
        for name, parameter in parameters:
            if name not in stored or stored[name].shape != parameter.shape:
                raise UserError(f"--resume: {path} was saved by a run with other settings ({name} does not fit)")
            parameter.copy_(shard_like(stored[name], parameter))
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, moments in state["optimizer"]["state"].items():
            for name in moments.keys() - {"step"}:
                moments[name] = shard_like(moments[name], members[number])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["sums"]


LONG = 10  # rows of metrics.jsonl that an alarm looks at
SHOWN = {  # of a row, in the bar or the line: name -> (metric, format)
    "loss": ("loss", ".4g"), "acc": ("rewards/accuracies", ".2f"), "margin": ("rewards/margins", ".4g"),
    "tok/s": ("tokens/s", ".0f")}


def alarms(rows):
    """Yield (name, warning with what to try) where training goes wrong, by the rows of metrics.jsonl so far."""
    def last(key):
        values = [row[key] for row in rows[-LONG:] if key in row]
        return values if len(values) == LONG else [math.nan]

    chosen, rejected, accuracy = map(last, ("rewards/chosen", "rewards/rejected", "rewards/accuracies"))
    if all(max(values) < -1 and values[-1] < values[0] for values in (chosen, rejected)):
        yield "falling", (f"chosen responses become less likely too, by a reward of {chosen[-1]:.2f}: try a lower --lr,"
                          " a higher --beta, fewer --epochs, or --method sft on them first")
    if len(rows) >= 2 * LONG and abs(sum(accuracy) / LONG - 0.5) < 0.05:
        yield "stuck", ("the accuracy stays at 0.5: try a higher --lr; see in tokens.txt what the model reads, and "
                        "whether the labels contradict each other")
    for key in ("router/safety", "router/helpfulness"):
        if max(last(key)) < 0.02:
            yield key, f"MidPO's routers have switched off {key[7:]} everywhere: try a lower --router_l1 or --lr"
    if min(last("router/empty")) > 0.95:
        yield "empty", "PMoL's routers send everything to the empty expert: try a higher --egs_weight or a lower --lr"
    for key in rows[-1]:
        if key.startswith("responsibility/") and min(last(key)) > 0.98 and "responsibility/1" in rows[-1]:
            yield "mixture", (f"expert {key[15:]} takes all of the mixture: try --expert_noise 0.1, a higher "
                              "--q_temperature, or a gate that knows more")


class RunLog:
    """metrics.jsonl, which the first process writes, and what is shown of it: the last row in the bar (without a
    terminal, a line for each row), held-out metrics, and each of `alarms` once; --wandb gets all of it. done: the steps
    that a resumed run has done before; unit: the word for what it trains on, such as pairs."""

    def __init__(self, out, done, config, processes, bar, unit):
        self.path, self.bar, self.unit, self.warned, self.skipped = out / "metrics.jsonl", bar, unit, set(), 0
        self.say = (lambda line: print(line, flush=True)) if bar.disable else bar.write
        self.writes, self.wandb = processes.rank == 0, None
        if self.writes:
            self.rows = [row for row in whole_rows(self.path) if row["step"] <= done]  # the others come again
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self.started = time.perf_counter() - (self.rows[-1].get("seconds", 0) if self.rows else 0)
        if self.writes and config.wandb:
            import wandb
            self.wandb = wandb.init(project=config.wandb, config=asdict(config))

    def write(self, row, steps):
        """Add a row and its time, in seconds since training started. steps: [(pairs, whether loss and gradient were
        finite)] since the row before. Returns how many of the steps up to them were skipped in a row, at most."""
        most = 0
        for pairs, finite in steps:
            self.skipped = 0 if finite else self.skipped + 1
            most = max(most, self.skipped)
            if not finite:
                self.say(f"step skipped, its loss or gradient is not finite: {self.unit} {', '.join(map(str, pairs))}")
        if self.writes:
            self.rows.append(row := {**row, "seconds": round(time.perf_counter() - self.started, 3)})
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(row)
            self.show(row)
        return most

    def show(self, row):
        """Print a row's main metrics, its held-out ones, and the alarms that it sets off."""
        shown = {name: format(row[metric], form) for name, (metric, form) in SHOWN.items() if metric in row}
        if skipped := sum(logged.get("skipped", 0) for logged in self.rows):
            shown["skipped"] = str(skipped)
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say("  ".join([f"step {row['step']}/{self.bar.total}", *map(" ".join, shown.items())]))
        held_out = {name: value for name, value in row.items() if name.startswith("eval/")}
        if count := held_out.pop("eval/n", 0):
            self.say(f"step {row['step']}: {', '.join(f'{name} {held_out[name]:.4g}' for name in held_out)} "
                     f"(n = {count} held-out {self.unit})")
        for name, warning in alarms(self.rows):
            if name not in self.warned:
                self.say(f"warning, step {row['step']}: {warning}")
            self.warned.add(name)
