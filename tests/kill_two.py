"""Kill runs of two processes at random moments and go on with --resume: the same bytes and rows as undisturbed ones.

    python tests/kill_two.py [--kills 2] [--methods dpo,midpo]      each kill takes about fifteen seconds on two cores
"""
import argparse
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import files_of, make_small, timeless, train
from test_runs_kills import METHODS
from test_runs_processes import SMALL, end, start, torchrun


def kill_and_resume(method, kills, draws):
    """Raise AssertionError where a run of this method, killed so many times, ends in another way."""
    flags = ("--method", method, *METHODS[method], "--max_steps", 6, "--batch_size", 2, "--save_every", 1,
             "--log_every", 2)
    started = time.monotonic()
    torchrun(SMALL, *flags, "--out", "out/run")
    seconds = time.monotonic() - started
    shutil.move("out/run", "out/whole")
    for _ in range(kills):
        process = start(SMALL, *flags, "--out", "out/run", "--resume")
        time.sleep(seconds * draws.uniform(0.5, 1))  # half of the time is Python's start
        end(process, signal.SIGKILL)
    torchrun(SMALL, *flags, "--out", "out/run", "--resume")
    out, whole = Path("out/run"), Path("out/whole")
    assert files_of(out).keys() == files_of(whole).keys()
    for path, content in files_of(whole).items():
        assert path.name in ("config.json", "metrics.jsonl") or files_of(out)[path] == content, path
    for metrics in whole.rglob("metrics.jsonl"):
        assert timeless(metrics.parent) == timeless(out / metrics.parent.relative_to(whole))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    make_small(pytest.MonkeyPatch())
    for name in args.methods.split(","):
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            train.toy_base(0, "cpu")
            kill_and_resume(name, args.kills, np.random.default_rng(sum(map(ord, name))))
            os.chdir("/")
        print(f"{name}: killed {args.kills} times, the same bytes", flush=True)
