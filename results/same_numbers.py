"""Compare two commits: for each method, do 30 steps write the same weights, metrics and eval.json, to the last bit?

    python results/same_numbers.py OLD NEW [--work DIR] [--only NAME,NAME]      about ten minutes on two cores

OLD and NEW are commits, or "." for the files as they are here. Each commit's files are laid out in DIR/<commit>, where
finished runs are kept, so a second call with the same OLD runs NEW alone. Both run on one thread, side by side.
Compared are the bytes of every trained tensor, the rows of metrics.jsonl (without what measures time; NEW may add
columns) and eval.json. The exit status is 1 where something differs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

STEPS = "--max_steps 30 --seed 3"
RUNS = {
    "sft": "--method sft", "dpo": "--method dpo", "dpo-all": "--method dpo --lora_rank 0",
    "safedpo": "--method safedpo --delta 10", "reward": "--method reward", "cost": "--method cost",
    "spe-dpo": "--method spe-dpo", "midpo": "--method midpo", "pmol": "--method pmol", "mix-dpo": "--method mix-dpo",
    "mix-fixed": "--method mix-dpo --gate 0.3,0.7", "moe-constant": "--method moe-dpo --gate constant",
    "moe-prompt": "--method moe-dpo --gate prompt", "moe-user": "--method moe-dpo --gate user",
    "moe-trunk": "--method moe-dpo --share trunk"}
TIMES = {"tokens/s", "seconds"}


def lay_out(commit, work):
    """The folder that holds the files of a commit, or of the working tree."""
    if commit == ".":
        folder = work / f"tree-{os.getpid()}"
        folder.mkdir(parents=True)
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True,
                               text=True).stdout.splitlines()
        subprocess.run(["tar", "cf", folder / "files.tar", *(name for name in names if Path(name).is_file())], check=True)
    else:
        commit = subprocess.run(["git", "rev-parse", f"{commit}^{{commit}}"], check=True, capture_output=True,
                                text=True).stdout.strip()
        folder = work / commit
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "archive", "-o", folder / "files.tar", commit], check=True)
    subprocess.run(["tar", "xf", folder / "files.tar", "-C", folder], check=True)
    return folder


def run_all(folder, names):
    """Train in a folder, one run after the other; {name: what the program said} of the runs that failed."""
    failed, environment = {}, {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in names:
        command = [sys.executable, "train.py", *RUNS[name].split(), *STEPS.split(), "--out", f"out/{name}"]
        if (folder / f"out/{name}/config.json").is_file():
            command.append("--resume")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            failed[name] = (done.stderr.strip() or "nothing").splitlines()[-1]
        print(f"{folder.name[:10]} {name}", flush=True)
    return failed


def contents(run):
    """{what: its content} of a run folder and of the runs under it, tensors as (type, shape, bytes)."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    tensor = file.get_tensor(key)
                    found[f"{name}: {key}"] = tensor.dtype, tensor.shape, tensor.numpy().tobytes()
        elif path.name == "metrics.jsonl":
            for line in path.read_text().splitlines():
                row = json.loads(line)
                for key in row.keys() - TIMES:
                    found[f"{name}: step {row['step']}: {key}"] = repr(row[key])
        elif path.name == "eval.json":
            found[name] = json.loads(path.read_text())
    return found


def compare(old, new, names):
    """Print what differs; returns the number of runs in which something does."""
    wrong = 0
    for name in names:
        before, after = contents(old / "out" / name), contents(new / "out" / name)
        added = {key for key in after.keys() - before.keys() if "metrics.jsonl" not in key}
        differ = [key for key in before if before[key] != after.get(key)] + sorted(added)
        tensors = sum(isinstance(value, tuple) for value in before.values())
        print(f"{name}: {len(before)} values, {tensors} of them tensors: "
              + ("the same" if before and not differ else f"{len(differ)} differ, such as {differ[:3]}"))
        wrong += bool(differ) or not before
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "same_numbers")
    parser.add_argument("--only", default=",".join(RUNS))
    args = parser.parse_args()
    names = args.only.split(",")
    folders = [lay_out(commit, args.work.resolve()) for commit in (args.old, args.new)]
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda folder: run_all(folder, names), dict.fromkeys(folders)))
    for folder, errors in zip(folders, failed):
        for name, error in errors.items():
            print(f"{folder}: {name} failed: {error}")
    sys.exit(bool(compare(*folders, names) or any(failed)))


if __name__ == "__main__":
    main()
