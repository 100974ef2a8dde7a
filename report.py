"""Means with their errors, tables, pictures, and diagnostics of routers, gates and mixtures."""
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batch import batches, encode, precision
from common import UserError, read_json, whole_rows
from lora_moe import expert_layers, mixture_logps, router_weights
from losses import implicit_rewards

WIDTH = 120  # characters of a terminal's line
# Okabe and Ito's colours, then Tol's; with the markers no two of 70 styles look alike
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
           "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733", "#888888")
STYLES = [{"color": PALETTE[i % 14], "marker": "os^Dv"[i % 5], "markersize": 6} for i in range(70)]
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 8}  # where a legend stands: to the right
FRONTIERS = {"helpfulness_safe": "harmless_ratio", "scaled": "harmless_ratio", "reward": "harmlessness",
             "judged_helpfulness": "judged_harm"}  # the metrics of helpfulness and harmlessness that a picture may show
# Settings by which runs are not named: folders, and what changes no weights
UNNAMED = {"out", "base", "inputs", "finished", "resume", "device", "batch_size", "grad_accum", "batch_tokens",
           "compile", "fsdp", "checkpointing", "save_every", "log_every", "eval_every", "wandb", "eval_split",
           "temperature", "overwrite"}


def mean_and_error(values):
    """(mean, standard error of the mean) of a list of numbers; (nan, nan) of an empty one, error 0 of a single one."""
    if not values:
        return math.nan, math.nan
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def means_and_errors(values):
    """{name: [number for each prompt]} -> {name: mean, name_se: its standard error}."""
    return {key: number for name, numbers in values.items()
            for key, number in zip((name, f"{name}_se"), mean_and_error(list(map(float, numbers))))}


def win_rate(outcomes, seed=0):
    """wins / (wins + losses) of outcomes 1, 0 (a tie) and -1, and its standard error by bootstrap; nan if all tie."""
    outcomes = np.array([outcome for outcome in outcomes if outcome is not None], dtype=int)
    if not outcomes.any():
        return math.nan, math.nan
    draws = np.random.default_rng(seed).choice(outcomes, (1000, len(outcomes)))
    wins, losses = (draws > 0).sum(1), (draws < 0).sum(1)
    rates = wins / np.where(wins + losses > 0, wins + losses, math.nan)
    return float((outcomes > 0).sum() / (outcomes != 0).sum()), float(np.nanstd(rates))


def markdown_table(rows, columns, better=()):
    """Markdown table of {row name: metrics}: mean ± standard error, an empty cell for nan. columns: {key: heading};
    better: {key: 1 or -1}, columns whose best cell is bold if it leads by more than the two standard errors."""
    def cell(row, key):
        text = "" if math.isnan(row[key]) else f"{row[key]:.3f} ± {row[f'{key}_se']:.3f}"
        gaps = [better[key] * (row[key] - other[key]) - row[f"{key}_se"] - other[f"{key}_se"] for other in rows.values()
                if other is not row and not math.isnan(other[key])] if key in better else []
        return f"**{text}**" if gaps and min(gaps) > 0 else text

    lines = ["| |" + "".join(f" {heading} |" for heading in columns.values()), "|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cell(row, key) for key in columns) + " |"
                                for name, row in rows.items())])


def terminal_table(rows, columns, starts=()):
    """Aligned table of {row name: metrics}, at most WIDTH columns wide; ↑ and ↓ mark a cell that differs by more than
    two standard errors of the difference from that of the row's start. columns: {key: heading}, "/" breaks a heading;
    starts: {row name: name of its start}, where that is not the first row."""
    upwards = itertools.zip_longest(*(heading.split("/")[::-1] for heading in columns.values()), fillvalue="")
    cells = [["", *line] for line in upwards][::-1]
    for name, row in rows.items():
        start = rows[dict(starts).get(name, next(iter(rows)))]
        cells.append([name])
        for key in columns:
            change, error = row[key] - start[key], math.hypot(row[f"{key}_se"], start[f"{key}_se"])
            mark = "↑" if change > 2 * error else "↓" if change < -2 * error else " "
            text = f"{row[key]:.3f}±" + f"{row[f'{key}_se']:.3f}".removeprefix("0") + mark
            cells[-1].append("" if math.isnan(row[key]) else text)
    return aligned(cells)


def aligned(cells):
    """Rows of texts -> lines with columns of equal width, the first one to the left. Columns beyond WIDTH follow in
    blocks of their own, each with the first column."""
    widths, blocks = [max(map(len, column)) for column in zip(*cells)], [[]]
    for i in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(1 + widths[j] for j in (*blocks[-1], i)) > WIDTH:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join("\n".join(
        " ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in block))).rstrip()
        for row in cells if row[0] or any(row[i] for i in block)) for block in blocks)


def kinds_and_experts(report, config):
    """(kinds of prompts, names of the slots) of a `router_report`, by the settings of its run: MidPO has an expert for
    safety and one for helpfulness, PMoL's last slot is the empty expert; others are numbered."""
    kinds = [kind for kind in next(iter(report.values())) if kind != "entropy"]
    experts = [str(k) for k in range(len(next(iter(report.values()))[kinds[0]]["median"]))]
    if config["method"] == "pmol" and not config["no_empty_expert"]:
        experts[-1] = "empty"
    return kinds, ["safety", "helpfulness"] if config["method"] == "midpo" else experts


def router_table(report, config):
    """The medians of `router_report` for a terminal: the weight of each expert by layer and kind of prompt."""
    kinds, experts = kinds_and_experts(report, config)
    widths = [max(5, len(expert)) for expert in experts]
    cells = [["router weights", *kinds, "entropy"],
             ["of expert", *[" ".join(map(str.rjust, experts, widths))] * len(kinds), ""]]
    for layer, at in report.items():
        cells.append([layer, *(" ".join(f"{weight:{width}.3f}" for weight, width in zip(at[kind]["median"], widths))
                               for kind in kinds), f"{at['entropy']:.3f}"])
    return aligned(cells)


# What routers and the experts of a mixture have learned


@torch.no_grad()
def prompt_weights(model, tokenizer, prompts, answers, batch_size=64):
    """Router weights at the last token of each prompt, where the answer begins, and their means over the tokens of each
    answer: two tensors (L, N, slots), float32 on the CPU."""
    rendered, responses = tokenizer.render_all(prompts), [(text,) for text in answers]
    encoded = encode(tokenizer, rendered, responses, model.config.max_positions)
    at_prompt, over_answer = [], []
    for _, batch in batches(encoded, batch_size, next(model.parameters()).device, longest_first=False):
        model(batch.tokens, batch.positions, batch.mask())
        weights = router_weights(model, batch.predictor).float()                        # (L, M, slots)
        lengths = batch.owner.bincount()                                                # tokens of each answer, EOS too
        sums = weights.new_zeros(len(weights), len(lengths), weights.shape[-1]).index_add(1, batch.owner, weights)
        at_prompt.append(weights[:, lengths.cumsum(0) - lengths].cpu())
        over_answer.append((sums / lengths[:, None]).cpu())
    return torch.cat(at_prompt, dim=1), torch.cat(over_answer, dim=1)


def router_report(model, tokenizer, prompts):
    """{layer: {kind: {"median", "q10", "q90": of each slot's weight at the last prompt token, "answer": its median over
    answers of the mean over an answer's tokens}, …, "entropy": mean of the weights' entropy at the last prompt token}}.

    prompts: {kind: [(prompt, answer)]}, such as harmful and safe ones (MidPO's Figure 5), or those of each preference.
    """
    weights = {kind: prompt_weights(model, tokenizer, *zip(*of_kind)) for kind, of_kind in prompts.items()}
    report = {}
    for i, name in enumerate(expert_layers(model)):
        report[name] = {kind: {key: values[i].quantile(level, dim=0).tolist() for key, values, level in (
            ("median", at_prompt, 0.5), ("q10", at_prompt, 0.1), ("q90", at_prompt, 0.9), ("answer", over_answer, 0.5))}
            for kind, (at_prompt, over_answer) in weights.items()}
        together = torch.cat([at_prompt[i] for at_prompt, _ in weights.values()])       # (all N, slots)
        report[name]["entropy"] = float(torch.special.entr(together / together.sum(-1, keepdim=True)).sum(-1).mean())
    return report


@torch.no_grad()
def expert_margins(model, encoded, beta, batch_size, dtype="float32"):
    """Δr of every pair under each expert of a mixture, (N, K), and the gate's log w, (N, K): float32 on the CPU."""
    device, margins, log_gates = next(model.parameters()).device, [], []
    for _, batch in batches(encoded, batch_size, device, longest_first=False):
        with precision(dtype, device):
            logps, log_gate = mixture_logps(model, batch)                               # (K, N, 2), (N, K)
        margins.append(implicit_rewards(*logps.unbind(-1), *batch.reference.unbind(-1), beta)[-1].T.cpu())
        log_gates.append(log_gate.cpu())
    return torch.cat(margins), torch.cat(log_gates)


def mixture_report(model, encoded, held_out, types, beta, batch_size, dtype="float32"):
    """Diagnostics of a trained mixture: (report, text for a terminal, with a warning for each way its experts failed to
    specialise). types: the type of each of encoded.groups, which training does not read.

    report: "responsibility" of each expert; "recovered": the share of annotators whose responsible expert, by their
    pairs, is that of their type, under the best assignment of experts to types; with held-out pairs (or None),
    "accuracy": {type: [share of its pairs that each expert orders correctly]}, "held_out": {type: number of its pairs}.
    """
    margins, log_gate = expert_margins(model, encoded, beta, batch_size, dtype)
    group = torch.from_numpy(encoded.labels["group"])                                         # (N,), -1: no annotator
    K, count, names, labelled = margins.shape[1], len(types), sorted(set(types)), group >= 0
    pairs = group[labelled].bincount(minlength=count)[:, None]                                # of each annotator
    evidence = F.logsigmoid(margins[labelled]) + log_gate[labelled] / pairs[group[labelled]]  # their gate counts once
    responsible = torch.zeros(count, K).index_add(0, group[labelled], evidence).argmax(-1).tolist()
    responsibility = (F.logsigmoid(margins) + log_gate).softmax(-1).mean(0).tolist()
    report, warnings = {"responsibility": responsibility}, []
    if max(responsibility) > 0.95:
        warnings.append(f"the mixture has collapsed: expert {responsibility.index(max(responsibility))} takes "
                        f"{max(responsibility):.0%} of all responsibility")
    agree = float((margins > 0).eq(margins[:, :1] > 0).all(-1).float().mean())
    if agree > 0.95 and K > 1:
        warnings.append(f"the experts agree: they order {agree:.0%} of the pairs in the same way")
    if 0 < len(names) <= K <= 6:
        owners = Counter(zip(types, responsible))                                   # (type, expert): annotators
        report["recovered"] = max(sum(owners[pair] for pair in zip(names, experts))
                                  for experts in itertools.permutations(range(K), len(names))) / count
    if held_out is not None:
        right = expert_margins(model, held_out, beta, batch_size, dtype)[0] > 0
        pair_types = np.array([*types, "unknown"])[held_out.labels["group"]]
        right_of = {name: right[torch.from_numpy(pair_types == name)].float()
                    for name in sorted({*pair_types.tolist()} & {*(names or ["unknown"])})}
        report |= {"accuracy": {name: of_type.mean(0).tolist() for name, of_type in right_of.items()},
                   "held_out": {name: len(of_type) for name, of_type in right_of.items()}}
    return report, "\n".join([*warnings, mixture_table(report)])


def mixture_table(report):
    """The numbers of `mixture_report` for a terminal, with what they mean."""
    rows = {"responsibility": report["responsibility"]} | {
        f"accuracy, {name}, n = {report['held_out'][name]}": row for name, row in report.get("accuracy", {}).items()}
    cells = [[name, *(f"{number:.3f}" for number in numbers)] for name, numbers in rows.items()]
    lines = [aligned([["expert", *map(str, range(len(cells[0]) - 1))], *cells]),
             "responsibility: share of the training pairs that the expert accounts for",
             "accuracy: share of the n held-out pairs of an annotator type that the expert alone orders correctly"]
    if "recovered" in report:
        lines.append(f"recovered, {report['recovered']:.3f}: share of annotators whose expert is that of their type")
    return "\n".join(lines)


def run_names(configs):
    """{run: config.json} -> {run: what sets it apart}: its method, if there are several, and the settings in which runs
    of its method differ, except folders and those that change no weights. Runs of the same name get their folders."""
    names = {}
    for run, config in configs.items():
        peers = [other for other in configs.values() if other["method"] == config["method"]]
        differ = {"Δ" if key == "delta" else key: value for key, value in config.items() if key not in UNNAMED
                  and f"{config['out']}/" not in str(value) and any(other.get(key) != value for other in peers)}
        names[run] = ", ".join([config["method"]] * (len(peers) < len(configs) or not differ) + [
            f"{key} = " + (f"{value:g}" if isinstance(value, float) else re.sub("[]['\"]", "", str(value)) or "none")
            for key, value in differ.items()])
    return {run: name if [*names.values()].count(name) == 1 else run for run, name in names.items()}


def load_pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs the matplotlib package: pip install matplotlib") from None
    return pyplot


def plot(rows, headings, routers, gates, runs, out):
    """Pictures in out-….png and .svg: helpfulness against harmlessness of {row: metrics}, runs of a method and
    view joined in their order; the weights of {run: `router_report`} by layer, with 10 to 90 % of the prompts; those of
    {run: `gate_report`} by user; training curves, a row of panels for each method, as their losses do not compare."""
    pyplot, figures = load_pyplot(), {}
    configs = {run: read_json(Path(run) / "config.json") for run in runs}
    names = {row: row for row in rows} | run_names(configs)
    names |= {f"start of {run}": f"start of {names[run]}" for run in runs}
    styles = dict(zip(rows, STYLES))
    for x, y in [pair for pair in FRONTIERS.items() if all(
            math.isfinite(row.get(key, math.nan)) for key in pair for row in rows.values())][:1]:
        figures["frontier"], axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        heights = sorted(row[y] for row in rows.values())
        level, gap = math.inf, 0.045 * (heights[-1] - heights[0]) or 0.01
        for below, (name, row) in zip(reversed(range(len(rows))), sorted(rows.items(), key=lambda item: -item[1][y])):
            axes.errorbar(row[x], row[y], row[f"{y}_se"], row[f"{x}_se"], capsize=3, mfc="none", **styles[name])
            level, color = max(min(level - gap, row[y]), heights[0] + below * gap), styles[name]["color"]
            axes.annotate(names[name], (row[x], row[y]), (1.03, level), textcoords=("axes fraction", "data"),
                          va="center", color=color,
                          arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "relpos": (0, 0.5)})
        for _, sweep in itertools.groupby(runs, lambda run: [configs[run][key] for key in ("method", "view")]):
            axes.plot(*zip(*((rows[run][x], rows[run][y]) for run in sweep)), color="#cccccc", zorder=0)
        axes.set(xlabel=headings[x].replace("/", " "), ylabel=headings[y].replace("/", " "),
                 title=f"better: {'down' if y == 'judged_harm' else 'up'} and to the right")
    for run, report in routers.items():
        kinds, experts = kinds_and_experts(report, configs[run])
        figures[f"routers-{Path(run).name}"], panels = pyplot.subplots(
            1, len(experts), figsize=(2 + 2.7 * len(experts), 3), squeeze=False, layout="constrained")
        for (k, expert), axes in zip(enumerate(experts), panels[0]):
            for kind, style in zip(kinds, STYLES):
                median, low, high = ([layer[kind][key][k] for layer in report.values()]
                                     for key in ("median", "q10", "q90"))
                axes.plot(median, label=f"{kind} prompts", **style)
                axes.fill_between(range(len(median)), low, high, color=style["color"], alpha=0.2)
            axes.set(title=f"expert: {expert}", xlabel="wrapped layer", ylabel="router weight", ylim=(-0.05, 1.05))
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(**BESIDE)
    for run, gate in gates.items():
        users = sorted(gate["users"].items())
        figures[f"gate-{Path(run).name}"], axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
        for (k, expert), style in zip(enumerate(gate["experts"]), STYLES):
            axes.plot([weights[k] for _, weights in users], linestyle="", label=expert, **style)
        axes.set(title=names[run], xlabel=f"users, from {users[0][0]} to {users[-1][0]}", ylabel="gate weight")
        axes.legend(**BESIDE)
    methods = [*dict.fromkeys(config["method"] for config in configs.values())]
    figures["training"], panels = pyplot.subplots(len(methods), 3, figsize=(11, 0.5 + 2.5 * len(methods)),
                                                  squeeze=False, layout="constrained")
    for method, of_method in zip(methods, panels):
        for key, axes in zip(("loss", "rewards/accuracies", "rewards/margins"), of_method):
            for run in [run for run in runs if configs[run]["method"] == method]:
                logged = [(row["step"], row[key]) for row in whole_rows(Path(run) / "metrics.jsonl") if key in row]
                axes.plot(*zip(*logged), markevery=0.2, label=names[run], **styles[run])
            axes.set(title=f"{method}: {key}", xlabel="optimiser step")
        axes.legend(*of_method[0].get_legend_handles_labels(), **BESIDE)  # the loss is in every log
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            figure.savefig(f"{out}-{name}.{kind}", dpi=150)
        print(f"{out}-{name}.png")
