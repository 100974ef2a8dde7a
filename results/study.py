"""The tables of results/README.md: train every row of a study with several seeds, then print mean ± standard error.

    python results/study.py all                            all methods in one table, seeds 3 to 7, test prompts
    python results/study.py all --rates 0.5,1,2            development split, seeds 0 to 2: every row at each of these
                                                         multiples of its learning rate, and which one is best
    python results/study.py pmol --rows "^10:" --seeds 3,4 some rows, some seeds
    python results/study.py all --against MidPO            how far the other rows are above this one, seed by seed

Each seed makes a base model, comparisons, an order of training and samples of its own. Runs go to out/study/ and are
kept when finished, so a call that was interrupted goes on: after a change of the code, delete out/. Each runs on one
thread, `--jobs` at a time. CPU seconds and peak memory are those of the whole process of a run: training, and judging
the policy, with what is in out/cache used and not computed again (Linux: other systems count memory otherwise). A study
prints the flags of each row, and the whole of it on test prompts writes its picture, if it has one, to results/.
"""
import argparse
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import study_pictures  # noqa: E402
import toy  # noqa: E402
from common import read_json  # noqa: E402
from report import markdown_table, mean_and_error  # noqa: E402
from study_runs import costs, forgetting, make_base, metrics_of, train  # noqa: E402

MIDPO, SHARE = "--method midpo --lr 3e-4", "--harmful_share 0.7"  # MidPO's default share, for all rows of "all"
HELPFUL = f"--method dpo --view helpful {SHARE} --lr 1.6e-4"
SAFE_BETTER = f"--method dpo --view safe-better {SHARE} --lr 8e-5"
SAFEDPO = f"--method safedpo --delta 0 {SHARE} --lr 1.6e-4"
TWO = "--data {transformed}"  # the pairs of T(D), by preference
TEN = ("helpfulness", "harmlessness", "empathy", "brevity", "politeness", "cheer", "directness", "soberness", "reserve",
       "caution")
# Number of preferences -> learning rate of PMoL, of one LoRA and of all weights: the best (--rates) of 0.5, 1 and 2
# times 1.6e-4 (all weights: 1.6e-5) up to four, 3e-4 (3e-5) for more, 1.5e-4 for one LoRA of six; 0.25 was tried too
# where 0.5 was best
RATES = {2: (8e-5, 8e-5, 8e-6), 3: (8e-5, 8e-5, 8e-6), 4: (1.6e-4, 8e-5, 1.6e-5), 6: (1.5e-4, 7.5e-5, 7.5e-6),
         10: (3e-4, 1.5e-4, 3e-5)}
FRIENDLY = "0.8,0.8,0.2,0.2,0.2,0.2,0.2,0.2,0.2,0.8"  # s_c of TEN: lower for those that only differ in courtesies
ATTENTION = "--lora_targets q_proj,v_proj,down_proj"
ANNEALED = "--q_temperature 8,1"
SMALL_MARGINS = "--lora_rank 16 --harmful_share 0.7 --weight_decay 0.01 --beta 1 --epochs 2 --lr 1.6e-4"
STRONG = "--beta 1 --epochs 4 --lr 1.6e-4"  # with which Δr passes 10
VISIBLE = "--groups politeness,directness"  # an opening for a job, none for a class: the prompt says which
REWARDS = "--groups sentiment,informativeness,grammar --annotators 0"
CONFLICTING = "--groups sentiment,informativeness,concision"  # the third is lost where the others are won
LATENT = ("--method mix-dpo --latent annotator --annotators 150 --batch_size 20 --expert_noise 0.1 --epochs 3 "
          f"--lr 8e-4 --experts 3 {CONFLICTING}")


def mixed(count):
    return f"--groups {','.join(TEN[:count])}"


def pmol(count, flags="", rate=0):
    return f"--method pmol --experts {count} --lr {rate or RATES[count][0]} {mixed(count)} {flags}".strip()


def single(count, flags="", rate=0, inputs=384, outputs=128):
    """One LoRA with as many trainable parameters as PMoL with so many experts of rank 16, routers included. inputs,
    outputs: of the layers with experts, together; those of down_proj if nothing is said."""
    rank = round(16 * count + (count + 1) * inputs / (inputs + outputs))
    return f"--method dpo --lora_rank {rank} --lr {rate or RATES[count][1]} {mixed(count)} {flags}".strip()


def whole(count):
    return f"--method dpo --lora_rank 0 --lr {RATES[count][2]} {mixed(count)}"


def midpo_with(layers, rate):
    """MidPO with experts on these layers (a flag, or none) at this learning rate, by the score models of `MIDPO`."""
    experts = (f"--method spe-dpo --view {view} --{score}_model {{0}}/{score}/model {SHARE}{layers} "
               f"--lr {rate}" for view, score in (("safety", "cost"), ("helpful", "reward")))
    return " then ".join([MIDPO, *experts, f"{MIDPO} --init_adapter {{1}}/adapter,{{2}}/adapter"])


def uses(name, flags):
    """Rows for the ways of using a mixture; known: where it is known which preference counts, its own expert's."""
    return {f"{name}: {use}": (flags, f"eval.json uses {use}") for use in ("mixture", "sparse", "known")}


def policies(rows):
    """Rows whose metrics are those of the closing table."""
    return {name: (flags, "eval.json policy") for name, flags in rows.items()}


# study -> row of the table -> (flags of train.py, where in the run folder its metrics are: file, then keys)
STUDIES = {
    # Learning rates: the best (--rates) of 0.5, 1 and 2 times 1.6e-4, of DPO on harmless pairs and SafeDPO with Δ = 10
    # 8e-5, of MidPO's routers 3e-4
    "all": {
        **policies({
            "DPO, helpful pairs": HELPFUL, "DPO, harmless pairs": f"--method dpo --view harmless {SHARE} --lr 8e-5",
            "DPO, safe-better pairs": SAFE_BETTER,
            "SACPO: DPO, helpful then harmless": f"{HELPFUL} then --method dpo --view harmless {SHARE} "
                                                 "--init_adapter {before}/adapter --lr 3.2e-4",
            "SafeDPO, Δ = 0": SAFEDPO,
            "SafeDPO, Δ = 10": f"--method safedpo --delta 10 {SHARE} --lr 8e-5"}),
        "SPE-DPO, safety expert": (MIDPO, "safety/eval.json policy"),
        "SPE-DPO, helpfulness expert": (MIDPO, "helpful/eval.json policy"),
        "both experts merged at 0.5": (MIDPO, "eval-static-0.5,0.5.json policy"),
        **policies({
            "MidPO": MIDPO,
            "PMoL, two preferences": f"--method pmol {TWO} --lora_targets down_proj --lr 1.6e-4",
            "MoE-DPO, gate on prompts": f"--method moe-dpo --gate prompt --beta 0.1 {TWO} --lr 1.6e-4"}),
    },
    "delta": policies({f"Δ = {delta}": f"record margins --method safedpo --delta {delta} {STRONG}"
                       for delta in (0, 2, 5, 10, 20, 50)}),
    "noise": policies({f"{name}, {flip} {share}": f"{flags} --{flip} {share}".replace(f" --{flip} 0.0", "")
                       for name, flags in (("SafeDPO, Δ = 0", SAFEDPO), ("DPO, safe-better pairs", SAFE_BETTER),
                                           ("MidPO", MIDPO))
                       for flip in ("flip_safety", "flip_preference") for share in (0.0, 0.2, 0.4)}),
    "l1": policies({f"{share}: L1 {weight}": f"{MIDPO} then {MIDPO} --harmful_share {share} --router_l1 {weight} "
                                             "--init_adapter {before}/safety/adapter,{before}/helpful/adapter"
                    for share in (0.45, 0.7) for weight in (0, 0.001, 0.01, 0.1, 1)}),
    "targets": policies({  # at three rates of the experts
        row: flags for name, layers in (("down_proj", ""), ("attention", " --lora_targets q_proj,k_proj,v_proj,o_proj"),
                                        ("all linear", " --lora_targets all-linear"))
        for row, flags in ((f"{name}, 1.6e-4", MIDPO + layers),
                           *((f"{name}, {rate}", midpo_with(layers, rate)) for rate in ("8e-5", "4e-5")))}),
    # The score models are regularised, so that margins are about 1.4 and 3.4: Δr passes them or comes near
    "spe": {name: (f"{first}--method {method} --view {view} {SMALL_MARGINS}{flag}", "eval.json policy")
            for view, score in (("helpful", "reward"), ("safety", "cost"))
            for name, first, method, flag in (
                (f"DPO, {view}", "", "dpo", ""),
                *((f"SPE-DPO, {view}{what}", f"--method {score} --score_l2 0.1 {data} then ", "spe-dpo",
                   f" --{score}_model {{before}}/model")
                  for what, data in (("", SHARE), (", margins out of sample", "--data {others}"))))},
    "conflict": policies({"one LoRA on both": "record conflict --method dpo --data {joint}",
                          "safety expert": "record conflict:harmlessness --method dpo --data {joint}",
                          "helpfulness expert": "record conflict:helpfulness --method dpo --data {joint}"}),
    "tastes": {  # the best (--rates) of 0.5, 1 and 2 times 2e-4
        "DPO, rank 32": (f"--method dpo --lora_rank 32 {VISIBLE} --beta 0.3 --lr 1e-4", "eval.json policy preferences"),
        **{f"gate: {gate}": (f"--method moe-dpo --annotators 0 --gate {gate} {VISIBLE} --lr {rate}",
                             "eval.json uses mixture")
           for gate, rate in (("prompt", 4e-4), ("user", 1e-4), ("0.5,0.5", 4e-4))},
    },
    "safedpo": policies({
        f"{name}, {what}": f"{flags} {weights}"
        for name, flags, rate in (("DPO, helpful pairs", "--method dpo --view helpful", "8e-5"),
                                  ("Δ = 10 without T", "--method safedpo --view helpful --delta 10", "8e-5"),
                                  ("SafeDPO, Δ = 0", "--method safedpo --delta 0", "1.6e-4"),
                                  ("SafeDPO, Δ = 10", "--method safedpo --delta 10", "1.6e-4"))
        for what, weights in (("LoRA", f"--lora_rank 16 --lr {rate}"), ("all weights", "--lora_rank 0 --lr 1.6e-5"))}),
    "pmol": {
        **{f"{count}: {name}": (flags(count), "eval.json policy preferences") for count in RATES
           for name, flags in (("PMoL", pmol), ("single LoRA of the same size", single), ("all weights", whole))},
        **{f"{count}: PMoL, {name}": (pmol(count, flag), "eval.json policy preferences") for count in (3, 10)
           for name, flag in (("no soft loss", "--egs_weight 0"), ("no empty expert", "--no_empty_expert"),
                              ("s_c = 0", "--soft_constraint 0"), ("s_c = 1", "--soft_constraint 1"))},
        "10: PMoL, attention too": (pmol(10, ATTENTION, 1.5e-4), "eval.json policy preferences"),
        "10: single LoRA, attention too": (single(10, ATTENTION, 3.75e-5, 640, 384), "eval.json policy preferences"),
        "10: PMoL, s_c = 0.8 or 0.2": (pmol(10, f"--soft_constraint {FRIENDLY}"), "eval.json policy preferences"),
    },
    "moe": {  # learning rates: DPO's and the gate on users' are the best (--rates) of 1e-4, 2e-4, 4e-4 and 8e-4
        "DPO, rank 32": ("--method dpo --lora_rank 32 --groups warmth,curtness --annotators 100 --beta 0.3 --lr 4e-4",
                         "eval.json policy preferences"),
        **uses("gate on users", "--method moe-dpo --lr 2e-4"),
        "objective Σ w L: mixture": ("--method moe-dpo --objective weights --lr 2e-4", "eval.json uses mixture"),
        "no gate, comparison latents: mixture": ("--method mix-dpo --lr 2e-4", "eval.json uses mixture"),
        "gate on users, one comparison each: mixture": ("--method moe-dpo --annotators 3000 --lr 2e-4",
                                                        "eval.json uses mixture"),
    },
    "moe-conflicting": {  # learning rates: the best (--rates) of 2e-4, 4e-4, 8e-4 and 1.6e-3
        "DPO, rank 48": (f"--method dpo --lora_rank 48 --beta 0.3 {CONFLICTING} --annotators 150 --lr 8e-4",
                         "eval.json policy preferences"),
        **uses("annotator latents", LATENT),
        **uses("annotator latents, q annealed", f"{LATENT} {ANNEALED}"),
    },
    "moe3": {
        "DPO": (f"--method dpo --beta 0.3 --lr 2e-4 --lora_targets lm_head --lora_rank 32 {REWARDS}",
                "eval.json policy preferences"),  # the layer of the two heads, and as many parameters
        **uses("shared trunk, gate on rewards", f"--method moe-dpo --share trunk --lr 2e-4 {REWARDS}"),
        "shared trunk, no gate: mixture": (f"--method mix-dpo --share trunk --lr 2e-4 {REWARDS}",
                                           "eval.json uses mixture"),
    },
}


def over_seeds(runs):
    """Mean and standard error over seeds of every metric: [metrics, …] -> metrics. Of a single seed, its standard error
    over prompts."""
    keys = [key for key, value in runs[0].items() if f"{key}_se" in runs[0]]
    if len(runs) == 1:
        return {name: runs[0][name] for key in keys for name in (key, f"{key}_se")}
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
    columns = {str(count): str(count) for count in RATES if any(str(count) in row for row in rows.values())}
    return markdown_table({what: filled(row, columns) for what, row in rows.items()}, columns)


def router_table(reports, kinds=("harmful", "safe")):
    """Median weight of each expert at the last prompt token, by layer and kind of prompt, over seeds."""
    rows = {}
    for layer in reports[0]:
        rows[layer] = over_seeds([
            {key: value for kind in kinds for i, weight in enumerate(report[layer][kind]["median"])
             for key, value in ((f"{kind} {i}", weight), (f"{kind} {i}_se", 0))} for report in reports])
    columns = {key: key for key in next(iter(rows.values())) if not key.endswith("_se")}
    return markdown_table(rows, columns)


def with_columns(table, columns):
    """A Markdown table with more columns: {heading: [a cell's text for each row]}."""
    lines = table.split("\n")
    for heading, cells in columns.items():
        lines = [f"{line}---|" if i == 1 else f"{line} {cell} |"
                 for i, (line, cell) in enumerate(zip(lines, (heading, "", *cells), strict=True))]
    return "\n".join(lines)


def cost_columns(rows, runs, seeds):
    """What a row of "all" costs: of the first seed, as timing depends on what else the machine does."""
    found = [costs(runs[flags, seeds[0]], where) for flags, where in rows.values()]
    return {"trained weights, thousands": ["", *(f"{count / 1000:.0f}" for count, _, _ in found)],
            "training, s": ["", *(f"{seconds}" for _, seconds, _ in found)],
            "time per token, × base": ["1", *(f"{ratio:.2f}" for _, _, ratio in found)]}


def differences(rows, runs, seeds, split, against):
    """{row: how far its metrics are above those of the row `against`}, seed by seed, as the rows of a seed share base
    model and comparisons."""
    found = {name: [metrics_of(runs[flags, seed], where, split) for seed in seeds]
             for name, (flags, where) in rows.items()}
    pairs = {name: [*zip(of_row, found[against])] for name, of_row in found.items() if name != against}
    return {name: over_seeds([{key: mine[key] - other.get(key, math.nan) for key in mine} for mine, other in of_row])
            for name, of_row in pairs.items()}


def read(rows, runs, seeds, split, by_number):
    """{row: metrics over seeds}, the bases' among them. by_number: a base for each number of preferences."""
    lines = {}
    for name, (flags, where) in rows.items():
        file, who, *keys = where.split()
        shown = ["preferences"] if who == "uses" else keys
        base = name.partition(": ")[0] + ": base" if by_number else "base"
        if base not in lines:  # a run with --init_adapter starts from that, the step before from the base
            first = flags.partition(" then ")[0] if "--init_adapter" in flags else flags
            lines[base] = over_seeds([metrics_of(runs[first, seed], " ".join(["eval.json", "base", *shown]), split)
                                      for seed in seeds])
        lines[name] = over_seeds([metrics_of(runs[flags, seed], where, split) for seed in seeds])
    return lines


def add_forgetting(lines, rows, runs, seeds, split):
    """lines[row]["forgotten"]: over safe prompts that belong to no preference of the row."""
    for name, (flags, _) in rows.items():
        count = int(name.partition(":")[0]) if "--groups" in flags else 0
        values = [forgetting(runs[flags, seed], TEN[:count], split) for seed in seeds]
        lines[name]["forgotten"], lines[name]["forgotten_se"] = mean_and_error(values)


def print_pmol(lines):
    headings = {"mixing": "Mixing score",
                "degenerate, closing table": "Degenerate answers to the closing table's prompts",
                "forgotten": "Forgetting: nats per token lost on the base's own answers, safe prompts of no preference",
                "minutes": "CPU minutes of a run", "memory": "Peak memory of a run, GiB"}
    for key, heading in headings.items():
        print(f"{heading}, by the number of preferences\n\n{by_count(lines, key)}\n")


def at_rate(flags, factor):
    """These flags with `factor` times the learning rate of their last step."""
    if "--lr " not in flags:
        sys.exit(f"--rates: no --lr in the row {flags}")
    head, _, tail = flags.rpartition("--lr ")
    rate, _, rest = tail.partition(" ")
    return f"{head}--lr {float(rate) * factor:g} {rest}".strip()


def rate_table(lines, score=""):
    """Of rows "name × factor" the score, the degenerate answers, and which factor is best: that of the highest score
    with at most 5 points more degenerate answers than the base. score: a metric; if none, the mixing score, or without
    preferences the sum of helpfulness on safe and harmlessness on harmful prompts."""
    lines, best = dict(lines), {}
    score = score or ("mixing" if any("mixing" in line for line in lines.values()) else "score")
    bases = {name.removesuffix("base"): lines.pop(name) for name in list(lines) if name.endswith("base")}
    for name, line in lines.items():
        group = next(group for group in bases if name.startswith(group))
        row = name.rpartition(" × ")[0]
        if line["degenerate"] <= bases[group]["degenerate"] + 0.05:
            best[row] = max(best.get(row, name), name, key=lambda name: lines[name][score])
    table = markdown_table(lines, {score: "score", "degenerate": "degenerate"})
    return with_columns(table, {"best": ["✓" if name in best.values() else "" for name in lines]})


def columns_of(study, lines):
    """{metric: heading} of a study's table."""
    if study.startswith("moe") or study == "tastes":
        columns = {key: key for key in next(iter(lines.values()))
                   if not key.endswith("_se") and not key.startswith("degenerate")}
        columns |= {"recovered": "types recovered"} if study == "moe" else {}  # of three rewards there are none
        return columns | {"own": "own pairs right", "degenerate": "degenerate"}
    columns = {key: toy.COLUMNS[key].replace("/", " ") for key in (
        "helpfulness_safe", "harmless_ratio", "harmless_ratio_unseen", "over_refusal", "over_refusal_alarming",
        "degenerate")}
    if study == "spe":
        columns = {"helpfulness": "helpful"} | columns | {"score_margin": "margin", "margins": "Δr at the end"}
    if study == "delta":
        columns |= {"forgotten": "forgetting, nats", "q50": "median Δr", "passed": "share of Δr > Δ"}
    return columns


def print_tables(args, lines, rows, runs, seeds):
    """The tables of a study: of its rows, of the choice of rates, or of differences to one row."""
    if args.rates:
        return print(rate_table(lines, args.score))
    columns = columns_of(args.study, lines)
    if args.against:
        columns = {"mixing": "mixing score"} if args.study == "pmol" else columns
        lines = differences(rows, runs, seeds, args.split, args.against)
    elif args.study == "pmol":
        return print_pmol(lines)
    elif args.split == "dev" and any("score" in line for line in lines.values()):
        columns |= {"score": "score"}  # what settings are chosen by
    table = markdown_table({name: filled(line, columns) for name, line in lines.items()}, columns)
    costly = args.study == "all" and not args.against
    print(with_columns(table, cost_columns(rows, runs, seeds)) if costly else table)
    if costly and (MIDPO, seeds[0]) in runs:
        print("\nRouter: expert 0 is safety, 1 helpfulness\n")
        print(router_table([metrics_of(runs[MIDPO, seed], "eval.json router", args.split) for seed in seeds]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", help="with commas (default: 0,1,2 on the development split, 3,4,5,6,7 on test)")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--rows", default="", help="a regular expression: only the rows whose names it is found in")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--rates", help="multiples of the rows' learning rates, with commas: choose, print no table")
    question.add_argument("--against", help="a row: print how far the others are above it, seed by seed")
    parser.add_argument("--score", default="", help="of --rates: the metric that decides (default: see rate_table)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    everything = not (args.rows or args.seeds or args.rates or args.against) and args.split == "test"
    rows = {name: row for name, row in STUDIES[args.study].items() if re.search(args.rows, name)}
    if args.rates:  # of the run itself, not of what must be trained before or is merged from it
        args.split = "dev"
        rows = {f"{name} × {factor}": (at_rate(flags, float(factor)), where) for name, (flags, where) in rows.items()
                for factor in args.rates.split(",") if where.startswith("eval.json")}
    seeds = [int(seed) for seed in (args.seeds or ("0,1,2" if args.split == "dev" else "3,4,5,6,7")).split(",")]
    if args.against and (args.against not in rows or len(seeds) < 2):
        parser.error("--against: name one of the rows, and two seeds or more")
    runs, pool = {}, ThreadPoolExecutor(args.jobs)
    try:
        list(pool.map(make_base, seeds))
        for depth in (1, 2, 3, 4):  # first the runs that others go on from
            jobs = {(flags, seed): pool.submit(train, flags, seed, args.split) for seed in seeds for flags in
                    dict.fromkeys(" then ".join(flags.split(" then ")[:depth]) for flags, _ in rows.values())}
            runs |= {key: job.result() for key, job in jobs.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, nothing more is started
    lines = read(rows, runs, seeds, args.split, args.study == "pmol")
    if args.study in ("pmol", "delta") and not (args.rates or args.against):
        add_forgetting(lines, rows, runs, seeds, args.split)
    print_tables(args, lines, rows, runs, seeds)
    minutes = sum(read_json(folder / "cost.json")["cpu_seconds"] for folder in runs.values()) / 60
    print(f"\nseeds {', '.join(map(str, seeds))}, {args.split} prompts, {len(runs)} runs, {minutes:.0f} CPU minutes; "
          "flags of train.py:")
    for name, (flags, _) in rows.items():
        print(f"    {name}: {flags}")
    if args.study in study_pictures.PICTURES and everything:
        study_pictures.PICTURES[args.study](lines, {(name, seed): runs[flags, seed] for name, (flags, _) in rows.items()
                                                    for seed in seeds}, ROOT / "results")


if __name__ == "__main__":
    main()
