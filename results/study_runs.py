"""What study.py does with one row: train it with a seed, and read or measure its metrics in the run folder."""
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors import safe_open

import toy
from batch import encode
from chat import Tokenizer
from checkpoint import cached_logps, load_policy, load_start
from common import read_json, write_text
from data import apply_view
from eval import answer
from lora_moe import choose_experts, gate_of, use_expert
from model import generate
from runs import ALONE, read_settings

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/study")

# Training


def run(command):
    """Run it to its end, which must be a good one; returns what it cost."""
    with subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{output[-2000:]}")
    trained = {folder: int(seconds) for seconds, folder in re.findall(r"training (\d+) s, .*; the run is in (\S+)/",
                                                                      output)}
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024, "training": trained}


def make_base(seed):
    """The toy base model of a seed, before the runs that share it: else the first of them would pay for it."""
    if not Path(f"out/toy-base-seed{seed}/recipe.txt").is_file():
        run([ROOT / "train.py", "--method", "sft", "--max_steps", 1, "--seed", seed, "--out", OUT / f"base-seed{seed}"])


PAIRS = "others", "transformed", "joint"
WRITING = threading.Lock()  # rows that want the same file come at the same time


def pairs_file(name, seed):
    """A file of 3,000 comparisons, or of the pairs that they give for two preferences, each pair labelled by its one.

    others: not the seed's own comparisons, for score models that have not seen the pairs that they score.
    transformed: SafeDPO's T(D); a pair of safe responses is about helpfulness, one with an unsafe response about
    harmlessness. joint: all comparisons by helpfulness, and those of which one response is safe by harmlessness; on
    harmful prompts the two contradict each other.
    """
    path = OUT / f"{name}-seed{seed}.jsonl"
    if path.is_file():
        return path
    comparisons = toy.make_comparisons(toy.COMPARISONS, seed + 1000 * (name == "others"), harmful_share=0.7)
    if name == "others":
        rows = [{"prompt": one.prompt, "response_0": one.responses[0], "response_1": one.responses[1],
                 "better_response_id": one.better, "safer_response_id": one.safer,
                 "is_response_0_safe": not one.unsafe[0], "is_response_1_safe": not one.unsafe[1]}
                for one in comparisons]
    else:
        views = ("safedpo",) if name == "transformed" else ("helpful", "safety")
        rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
                 "group": "harmlessness" if (pair.rejected_unsafe if view == "safedpo" else view == "safety") else
                          "helpfulness"} for view in views for pair in apply_view(view, comparisons)[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_folder(flags, seed, split):
    """Of the last of these steps."""
    *before, step = flags.split(" then ")
    name = re.sub(r"[^\w.,=-]+", "_", step.replace("--", ""))[:150].replace(",", "+")  # --init_adapter splits at ","
    if before or "{" in step or len(name) == 150:  # the steps before belong to it, or the name is not all of it
        name += "-" + hashlib.blake2b(flags.encode(), digest_size=4).hexdigest()
    return OUT / f"{name}-seed{seed}-{split}"


def train(flags, seed, split):
    """Run train.py with these flags, unless it was run to its end before; returns the run folder.

    "A then B" runs A, then B with A's folder in the place of {before}; {0} is the folder of the first of several steps.
    {transformed} and so on stand for `pairs_file`s; a step that begins with "record" is run by study_record.py.
    """
    *first, step = flags.split(" then ")
    folders = [train(" then ".join(first[:i + 1]), seed, split) for i in range(len(first))]
    before, out = folders[-1] if folders else "", run_folder(flags, seed, split)
    if (out / "cost.json").is_file():
        return out
    with WRITING:
        files = {name: pairs_file(name, seed) for name in PAIRS if f"{{{name}}}" in step}
    words = step.format(*folders, before=before, **files).split()
    script = [ROOT / "train.py"]
    if words[0] == "record":
        script, words = [ROOT / "results/study_record.py", words[1]], words[2:]
    shutil.rmtree(out, ignore_errors=True)  # what an interrupted run has finished would be missing from the cost
    cost = run([*script, *words, "--seed", seed, "--eval_split", split, "--out", out])
    if not read_settings(out).get("finished"):
        sys.exit(f"{out}: was stopped")
    write_text(out / "cost.json", json.dumps({**cost, "before": str(before)}) + "\n")
    print(f"done in {cost['cpu_seconds']:.0f} CPU seconds: {out}", file=sys.stderr, flush=True)
    return out


# Reading


def of_known(uses, accuracy):
    """Metrics where it is known which preference counts: the score of a preference is that of the expert that orders
    most of its held-out pairs rightly. uses: {expert's number: metrics}. accuracy: {preference: [of each expert]}."""
    names = [key for key in uses["0"] if f"{key}_se" in uses["0"] and key not in ("mixing", "degenerate")]
    served = [(uses[str(accuracy[name].index(max(accuracy[name])))], name) for name in names]
    metrics = {key: expert[key] for expert, name in served for key in (name, f"{name}_se")}
    for mean, parts in (("mixing", served), ("degenerate", [(expert, "degenerate") for expert, _ in served])):
        metrics[mean] = statistics.mean(expert[key] for expert, key in parts)
        metrics[f"{mean}_se"] = math.hypot(*(expert[f"{key}_se"] for expert, key in parts)) / len(parts)
    return metrics


def metrics_of(out, where, split):
    """The metrics of a finished run, and its `diagnostics`; experts merged at fixed weights are evaluated now. where:
    file, then keys."""
    file, *keys = where.split()
    if split == "dev":
        file = file.replace(".json", "-dev.json")
    if "static" in file and not (out / file).is_file():
        weights = re.search(r"static-([\d.,]+?)(-dev)?\.json", file)[1]
        run([ROOT / "eval.py", out, "--static", weights, "--split", split])
    metrics = read_json(out / file)
    more = {"degenerate, closing table": metrics[keys[0]]["degenerate"]} if "preferences" in keys else {}
    for key in keys:
        metrics = metrics[key] if key != "known" else of_known(metrics, read_json(out / "experts.json")["accuracy"])
    if "helpfulness_safe" in metrics:
        more["score"] = metrics["helpfulness_safe"] + metrics["harmless_ratio_unsafe"]
    if keys[0] in ("policy", "uses"):
        more |= diagnostics((out / file).parent)
    return metrics | {name: value for key, value in more.items() for name, value in ((key, value), (f"{key}_se", 0))}


def diagnostics(out):
    """Of a finished run: Δr in the last twentieth of its training, margins of the score model, what the run cost, and
    how its experts share the pairs."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {name: statistics.fmean(row.get(key, math.nan) for row in part) for name, key, part in (
        ("margins", "rewards/margins", rows[-max(1, len(rows) // 20):]), ("score_margin", "score_margin", rows))}
    if (out / "cost.json").is_file():  # not of a prerequisite
        cost = read_json(out / "cost.json")
        found |= {"minutes": cost["cpu_seconds"] / 60, "memory": cost["peak_mib"] / 1024}
    if (out / "experts.json").is_file():
        experts = read_json(out / "experts.json")
        found |= {"recovered": experts.get("recovered", math.nan), "own": min(map(max, experts["accuracy"].values()))}
    if (out / "margins.json").is_file():
        last = read_json(out / "margins.json")["rows"][-1]
        found |= {name: last[name] for name in ("q10", "q50", "q90", "passed")}
    return found


def parameters(folder, routers=True):
    """Numbers in the safetensors files that a run folder keeps of its training."""
    total = 0
    for path in [path for kind in ("adapter", "experts", "model") for path in (folder / kind).glob("*.safetensors")]:
        with safe_open(path, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()
                         if routers or "router" not in name)
    return total


def training_seconds(out, part):
    """Seconds of training alone: of a run with its prerequisites and the steps before it, or of one prerequisite."""
    cost = read_json(out / "cost.json")
    if part:
        return sum(seconds for folder, seconds in cost["training"].items() if Path(folder) == out / part)
    before = training_seconds(Path(cost["before"]), "") if cost["before"] else 0
    return before + sum(cost["training"].values())


def token_ratio(model, start, tokenizer, prompts, rounds=7, new_tokens=32):
    """CPU time of a greedily generated token, in a batch of these prompts, no answer ending early, as a multiple of the
    start's: the median of rounds that ask both in turn."""
    rendered = list(tokenizer.render_all(prompts))
    if gate_of(model):
        use_expert(model, choose_experts(model, tokenizer, rendered, "mixture", "", 0))
    tokens, ratios = tokenizer.encode(rendered), []
    for _ in range(rounds):
        times = []
        for one in (start, model):
            started = time.process_time()
            generate(one, tokens, new_tokens)
            times.append(time.process_time() - started)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def costs(out, where):
    """[trained parameters, seconds of training, time per token as a multiple of the base's] of a row of study "all"."""
    torch.set_num_threads(1)
    file = where.split()[0]
    part, static = file.rpartition("/")[0], "static" in file
    prompts = [prompt.text for prompt in toy.eval_prompts("dev", 0)[:16]]
    model, tokenizer, config = load_policy(out / part)
    start = load_start({**config, "init_adapter": ()})
    ratio = 1.0 if static else token_ratio(model, start, tokenizer, prompts)
    return [parameters(out / part, not static), training_seconds(out, part), ratio]


@torch.no_grad()
def forgetting(out, mixed, split):
    """How much of the base's language a run has lost: by how many nats per token its loss on the base's own answers,
    sampled for safe prompts of held-out frames, is above the base's. mixed: preferences that the run was trained on;
    only prompts that belong to none of them count."""
    torch.set_num_threads(1)
    config = read_json(out / "config.json")
    contexts = {context for name in mixed for context in toy.PREFERENCES[name][0] if not toy.PREFERENCES[name][1]}
    prompts = [toy.make_prompt(task, frame).text for task in toy.tasks() for frame in toy.frames(split)
               if not task.harmful and frame[1] not in contexts][::7]
    if not prompts:
        return math.nan
    tokenizer, start = Tokenizer(config["base"]), load_start({**config, "init_adapter": ()})
    answers = [row["answer"] for row in answer(start, tokenizer, prompts, seed=config["seed"], temperature=1.0)]
    kept = [i for i, text in enumerate(answers) if text.strip()]
    encoded = encode(tokenizer, tokenizer.render_all(prompts[i] for i in kept), [(answers[i],) for i in kept], 256)
    before, after = (cached_logps(model, encoded, "float32", "cpu", ALONE) for model in (start, load_policy(out)[0]))
    lost = before - after
    return float(lost.sum() / (encoded.bounds[:, 2] - encoded.bounds[:, 1]).sum())
