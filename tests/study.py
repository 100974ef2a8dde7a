"""The tables of results/README.md: train every row of a study with several seeds, then print mean ± standard error.

    python tests/study.py safedpo              about 25 minutes on two CPU cores; finished runs are kept
    python tests/study.py midpo --split dev    on the development split, where settings are chosen

Studies: safedpo, midpo, pmol, moe, moe3. Each seed makes a base model, comparisons, an order of training and samples
of its own. Runs go to out/study/, two at a time on two cores, one thread each. CPU seconds and peak memory are those of
the whole process of a run: training, and judging the base and the policy (Linux: other systems count memory otherwise).
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from eval import markdown_table  # noqa: E402
from losses import mean_and_error  # noqa: E402
from model import read_json, write_text  # noqa: E402

MIDPO = "--method midpo"
EXPERTS = "--lora_rank 16 --harmful_share 0.7 --weight_decay 0.01"
TEN = ("helpfulness", "harmlessness", "empathy", "brevity", "politeness", "cheer", "directness", "soberness", "reserve",
       "caution")
# Number of preferences -> learning rate of PMoL, of one LoRA and of all weights: of the few tried on the development
# split (seed 0) the best that left at most about 5 % more answers degenerate; where none was tried, that of the nearest
RATES = {2: (8e-5, 8e-5, 1.6e-5), 3: (8e-5, 8e-5, 1.6e-5), 4: (1.6e-4, 8e-5, 1.6e-5), 6: (1.6e-4, 8e-5, 3e-5),
         10: (3e-4, 1.6e-4, 3e-5)}
LATENT = ("--method mix-dpo --latent annotator --annotators 150 --batch_size 20 --expert_noise 0.1 --lr 4.5e-4 "
          "--epochs 3")
REWARDS = "--groups sentiment,informativeness,grammar --annotators 0"


def mixed(count):
    return f"--groups {','.join(TEN[:count])}"


def pmol(count, flags=""):
    return f"--method pmol --experts {count} --lr {RATES[count][0]} {mixed(count)} {flags}".strip()


def single(count):
    """One LoRA with as many trainable parameters as PMoL with so many experts of rank 16, routers included."""
    rank = round(16 * count + (count + 1) * 384 / (384 + 128))  # down_proj: 384 inputs, 128 outputs
    return f"--method dpo --lora_rank {rank} --lr {RATES[count][1]} {mixed(count)}"


def whole(count):
    return f"--method dpo --lora_rank 0 --lr {RATES[count][2]} {mixed(count)}"


def uses(name, flags, *experts):
    """Rows for the ways of using a mixture; an expert of a preference is the one that serves it best."""
    return {f"{name}: {use}": (flags, f"eval.json uses {use.replace(' ', '_')}")
            for use in ("mixture", "sparse", *(f"expert for {preference}" for preference in experts))}


# study -> row of the table -> (flags of train.py, where in the run folder its metrics are: file, then keys)
STUDIES = {
    "safedpo": {
        **{f"SafeDPO Δ = {delta}, LoRA": (f"--method safedpo --delta {delta} --lora_rank 16", "eval.json policy")
           for delta in (0, 2, 5, 10, 20, 50)},
        "DPO-HELPFUL": ("--method dpo --view helpful --lora_rank 0", "eval.json policy"),
        "DPO-HARMLESS": ("--method dpo --view harmless --lora_rank 0", "eval.json policy"),
        "DPO-SAFEBETTER": ("--method dpo --view safe-better --lora_rank 0", "eval.json policy"),
        "Δ = 10 without T": ("--method safedpo --view helpful --delta 10 --lora_rank 0", "eval.json policy"),
        **{f"SafeDPO Δ = {delta}": (f"--method safedpo --delta {delta} --lora_rank 0", "eval.json policy")
           for delta in (0, 2, 5, 10, 20, 50)},
    },
    "midpo": {
        "DPO, safety pairs": (f"--method dpo --view safety {EXPERTS}", "eval.json policy"),
        "DPO, helpfulness pairs": (f"--method dpo --view helpful {EXPERTS} --epochs 1", "eval.json policy"),
        "SPE-DPO, safety expert": (MIDPO, "safety/eval.json policy"),
        "SPE-DPO, helpfulness expert": (MIDPO, "helpful/eval.json policy"),
        "both experts at 0.5": (MIDPO, "eval-static-0.5,0.5.json policy"),
        "MidPO": (MIDPO, "eval.json policy"),
    },
    "pmol": {
        **{f"{count}: {name}": (flags(count), "eval.json policy preferences") for count in RATES
           for name, flags in (("PMoL", pmol), ("single LoRA of the same size", single), ("all weights", whole))},
        **{f"{count}: PMoL, {name}": (pmol(count, flag), "eval.json policy preferences") for count in (3, 10)
           for name, flag in (("no soft loss", "--egs_weight 0"), ("no empty expert", "--no_empty_expert"))},
        **{f"3: PMoL, s_c = {s_c}": (pmol(3, f"--soft_constraint {s_c}"), "eval.json policy preferences")
           for s_c in (0, 1)},
    },
    "moe": {
        "DPO": ("--method dpo --groups warmth,curtness --annotators 100 --beta 0.3 --lr 3e-4",
                "eval.json policy preferences"),
        **uses("gate on users", "--method moe-dpo", "warmth", "curtness"),
        **uses("annotator latents", LATENT, "warmth", "curtness"),
        "objective Σ w L: mixture": ("--method moe-dpo --objective weights", "eval.json uses mixture"),
        "no gate, comparison latents: mixture": ("--method mix-dpo", "eval.json uses mixture"),
        "gate on users, one comparison each: mixture": ("--method moe-dpo --annotators 3000", "eval.json uses mixture"),
    },
    "moe3": {
        "DPO": (f"--method dpo --beta 0.3 --lr 2e-4 --lora_targets lm_head --lora_rank 32 {REWARDS}",
                "eval.json policy preferences"),  # the layer of the two heads, and as many parameters
        **uses("shared trunk, gate on rewards", f"--method moe-dpo --share trunk --lr 2e-4 {REWARDS}",
               "sentiment", "informativeness"),
        "shared trunk, no gate: mixture": (f"--method mix-dpo --share trunk --lr 2e-4 {REWARDS}",
                                           "eval.json uses mixture"),
    },
}


def run(command, threads):
    """Run it to its end, which must be a good one; returns what it cost."""
    with subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output[-2000:]}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def make_base(seed):
    """The toy base model of a seed, before the runs that share it: else the first of them would pay for it."""
    if not Path(f"out/toy-base-seed{seed}").is_dir():
        run([ROOT / "train.py", "--method", "sft", "--max_steps", 1, "--seed", seed,
             "--out", f"out/study/base-seed{seed}"], os.cpu_count())


def train(flags, seed, split):
    """Run train.py on one thread unless it was run to its end before; returns the run folder."""
    name = flags.replace("--", "").replace(" ", "_")
    out = Path("out/study") / f"{name}-seed{seed}-{split}"
    if not (out / "cost.json").is_file():
        cost = run([ROOT / "train.py", *flags.split(), "--seed", seed, "--eval_split", split, "--out", out], 1)
        write_text(out / "cost.json", json.dumps(cost) + "\n")
        print(f"done in {cost['cpu_seconds']:.0f} CPU seconds: {out}", file=sys.stderr, flush=True)
    return out


def metrics_of(out, where, split):
    """The metrics of a finished run; experts merged at fixed weights are evaluated now."""
    file, *keys = where.split()
    if "static" in file and not (out / file).is_file():
        run([ROOT / "eval.py", out, "--static", file.removeprefix("eval-static-").removesuffix(".json"),
             "--split", split], os.cpu_count())
    metrics = read_json(out / file)
    for key in keys:
        if key.startswith("expert_for_"):
            preference = key.removeprefix("expert_for_")
            key = max(filter(str.isdecimal, metrics), key=lambda k: metrics[k][preference])
        metrics = metrics[key]
    more = {}
    if "uses" in keys:  # diagnostics of the experts: types recovered, pairs ordered rightly
        experts = read_json(out / "experts.json")
        more.update(recovered=experts.get("recovered", math.nan), own=min(map(max, experts["accuracy"].values())))
    if "preferences" in keys:
        more["degenerate, closing table"] = read_json(out / file)[keys[0]]["degenerate"]
    if keys[0] != "base" and {"uses", "preferences"} & {*keys}:
        cost = read_json(out / "cost.json")
        more.update(minutes=cost["cpu_seconds"] / 60, memory=cost["peak_mib"] / 1024)
    return metrics | {name: value for key, value in more.items() for name, value in ((key, value), (f"{key}_se", 0))}


def over_seeds(runs):
    """Mean and standard error over seeds of every metric: [metrics, …] -> metrics."""
    keys = [key for key, value in runs[0].items() if f"{key}_se" in runs[0]]
    means = {key: mean_and_error([metrics[key] for metrics in runs]) for key in keys}
    return {name: value for key in keys for name, value in zip((key, f"{key}_se"), means[key])}


def filled(line, columns):
    """A row with a value for every column: nan, an empty cell, for those that it lacks."""
    return {key: line.get(key, math.nan) for name in columns for key in (name, f"{name}_se")}


def by_count(lines, key):
    """One metric of the rows "2: PMoL", "3: PMoL", …, the number of preferences across: a Markdown table."""
    rows = {}
    for name, line in lines.items():
        count, _, what = name.partition(": ")
        rows.setdefault(what, {}).update({count: line.get(key, math.nan), f"{count}_se": line.get(f"{key}_se")})
    columns = {str(count): str(count) for count in RATES}
    return markdown_table({what: filled(row, columns) for what, row in rows.items()}, columns)


def router_table(reports, kinds=("harmful", "safe")):
    """Median weight of each expert at the last prompt token, by layer and kind of prompt, over seeds."""
    rows = {}
    for layer in reports[0]:
        rows[layer] = over_seeds([{key: value for kind in kinds for i, weight in enumerate(report[layer][kind]["median"])
                                   for key, value in ((f"{kind} {i}", weight), (f"{kind} {i}_se", 0))}
                                  for report in reports])
    columns = {key: key for key in next(iter(rows.values())) if not key.endswith("_se")}
    return markdown_table(rows, columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    args = parser.parse_args()
    rows = STUDIES[args.study]
    seeds = range(args.seeds)
    for seed in seeds:
        make_base(seed)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # runs of one thread use the cores better than threads of one run
        futures = {(flags, seed): pool.submit(train, flags, seed, args.split)
                   for seed in seeds for flags in dict.fromkeys(flags for flags, _ in rows.values())}
        runs = {key: future.result() for key, future in futures.items()}
    lines = {}
    for name, (flags, where) in rows.items():
        file, who, *keys = where.split()
        shown = ["preferences"] if who == "uses" else keys
        base = over_seeds([metrics_of(runs[flags, seed], " ".join(["eval.json", "base", *shown]), args.split)
                           for seed in seeds])
        lines.setdefault(name.partition(": ")[0] + ": base" if args.study == "pmol" else "base", base)
        lines[name] = over_seeds([metrics_of(runs[flags, seed], where, args.split) for seed in seeds])
    if args.study == "pmol":
        for key, heading in {"mixing": "Mixing score", "degenerate, closing table": "Degenerate answers to the prompts of the closing table",
                             "minutes": "CPU minutes of a run", "memory": "Peak memory of a run, GiB"}.items():
            print(f"{heading}, by the number of preferences\n\n{by_count(lines, key)}\n")
        return
    columns = toy.COLUMNS
    if args.study.startswith("moe"):
        columns = {key: key for key in base if not key.endswith("_se") and not key.startswith("degenerate")}
        columns |= {"recovered": "types recovered"} if args.study == "moe" else {}  # of three rewards there are none
        columns |= {"own": "own pairs right", "degenerate": "degenerate"}
    print(markdown_table({name: filled(line, columns) for name, line in lines.items()}, columns))
    if args.study == "midpo":
        print("\nRouter: expert 0 is safety, 1 helpfulness\n")
        print(router_table([metrics_of(runs[MIDPO, seed], "eval.json router", args.split) for seed in seeds]))


if __name__ == "__main__":
    main()
