"""Two processes under torchrun (gloo, on the CPU) compute what one does: steps, runs, a run that goes on, a lost rank.

    torchrun --nproc_per_node 2 tests/test_runs_processes.py      the worker of the first test
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train_low_memory import check_that_a_step_in_two_processes_is_that_of_one

from common import as_command
from conftest import ROOT, files_of, json_lines, leftovers, make_small, relative_error, timeless
from runs import Processes
from test_train_steps import METHODS, check_equal, inputs_of, step_of

SMALL = ROOT / "tests" / "small_train.py"
FLAGS = ("--method", "safedpo", "--lora_rank", 4, "--log_every", 1, "--lr", 1e-3, "--epochs", 10)


def start(script, *flags, count=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, script, *flags]
    return subprocess.Popen([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def torchrun(script, *flags, count=2, status=0):
    process = start(script, *flags, count=count)
    output = process.communicate(timeout=120)[0]
    assert (process.returncode == 0) == (status == 0), output[-3000:]
    return output


def train(out, *flags, count=2):
    return torchrun(SMALL, *FLAGS, "--out", out, *flags, count=count)


def check_close(out, other):
    for row, same in zip(timeless(Path(out)), timeless(Path(other)), strict=True):
        assert row == pytest.approx(same, rel=1e-5, abs=1e-5)
    weights, others = (load_file(Path(folder) / "adapter" / "adapter_model.safetensors") for folder in (out, other))
    for name in weights:
        assert relative_error(weights[name], others[name]) < 1e-4, name


def test_all_processes_get_equally_many_items_and_each_item_counts_once():
    for count, items in ((1, 3), (2, 5), (3, 2), (4, 8)):
        parts = [[*Processes(rank, count).split([*range(items)])] for rank in range(count)]
        assert len({*map(len, parts)}) == 1
        assert sorted(item for part in parts for item, counted in part if counted) == [*range(items)]


def test_a_step_that_two_processes_share_is_the_step_of_one(place):
    for method in METHODS:
        inputs_of(method)
    output = torchrun(__file__)
    assert output.count("same step") == len(METHODS) + 1, output[-3000:]


def test_a_run_of_two_processes_is_that_of_one_and_goes_on_with_another_number(place):
    """Steps of eight pairs; only the first process writes and prints."""
    output = train("out/two", "--batch_size", 4)
    assert output.count("view safedpo:") == 1 and "the run is in out/two/" in output
    train("out/one", "--batch_size", 8, count=1)
    check_close("out/two", "out/one")
    for count, number in ((1, signal.SIGTERM), (2, signal.SIGKILL)):
        out = f"out/resumed-by-{count}"
        end(begin(out, "--save_every", 2), number)
        assert (Path(out) / "checkpoint").is_dir() and not (Path(out) / "adapter").exists()
        train(out, "--batch_size", 8 // count, "--resume", count=count)
        check_close(out, "out/one")
    assert files_of(Path(out)) == files_of(Path("out/two")) and timeless(Path(out)) == timeless(Path("out/two"))
    assert not leftovers(Path("out"))


def begin(out, *flags):
    """A run of two processes that has done its fourth step."""
    process = start(SMALL, *FLAGS, "--out", out, "--batch_size", 4, *flags)
    metrics, deadline = Path(out) / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    return process


def workers(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in listed.split()]


def end(process, number):
    """Send a signal: SIGTERM to torchrun, which hands it on; SIGKILL to all, as when the power fails."""
    children = workers(process)
    process.send_signal(number)
    for child in children if number == signal.SIGKILL else ():
        os.kill(child, number)
    process.communicate(timeout=60)


@pytest.mark.parametrize("flags", ((), ("--fsdp",)))
def test_where_one_process_dies_the_run_ends_with_a_line_that_says_so(place, flags):
    process = begin("out/run", "--epochs", 1000, *flags)
    os.kill(workers(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode and "another process of this run has ended" in output


def test_processes_end_without_the_end_of_the_interpreter(place):
    """Threads of the process group, which torch keeps (here in default arguments), would abort one now and then."""
    Path("command.py").write_text("import atexit, common, runs\n"
                                  "atexit.register(print, 'the end of the interpreter')\n"
                                  "def main():\n"
                                  "    runs.Processes.join()\n"
                                  "    import torch.distributed.nn\n"
                                  "    print('done')\n"
                                  "common.as_command(main, '', '')\n")
    output = torchrun("command.py")
    assert "done" in output and "the end of" not in output


def test_two_processes_share_the_answers_to_prompts_and_give_those_of_one(place):
    train("out/one", "--max_steps", 3, count=1)
    things = ("bread", "a cake", "a pie", "rolls", "it")
    Path("asked.txt").write_text("".join(f"How do I bake {thing}?\n" for thing in things))
    tables = []
    for count in (2, 1):
        torchrun(ROOT / "eval.py", "out/one", "--prompts", "asked.txt", "--max_new_tokens", 6, "--device", "cpu",
                 count=count)
        tables.append(json.loads(Path("out/eval-asked.json").read_text())["rows"])
        kept = sorted(Path("out/one").glob("answers-*.jsonl"))
        assert [len(json_lines(path)) for path in kept] == ([2, 3] if count == 2 else [5])
        for path in (*kept, *Path("out/cache").iterdir()):
            path.unlink()
    assert tables[0].keys() == tables[1].keys()
    for name in tables[0]:
        assert tables[0][name] == pytest.approx(tables[1][name], rel=1e-4, abs=1e-6)


def work():
    """What two processes do for the first test."""
    make_small(pytest.MonkeyPatch())
    processes = Processes.join()
    for name in METHODS:
        whole = step_of(name, 1)
        check_equal(whole, step_of(name, 2, processes))
        check_equal(whole, step_of(name, 2, processes, "--fsdp"))
        print(json.dumps(name), "same step", flush=True)
    check_that_a_step_in_two_processes_is_that_of_one(processes)
    print("--low_memory same step", flush=True)


if __name__ == "__main__":
    as_command(work, "test_runs_processes.py", "interrupted")
