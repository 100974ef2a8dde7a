"""Means with their errors, tables, pictures, and diagnostics of routers, gates and mixtures."""
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batch import batches, encode, longest, precision
from common import UserError, read_json, whole_rows
from lora_moe import expert_layers, mixture_logps, router_weights


# Means with their errors, tables and pictures of them


def mean_and_error(values):
    """(mean, standard error of the mean) of a list of numbers; (nan, nan) of an empty one, error 0 of a single one."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def means_and_errors(values):
    """{name: [number for each prompt]} -> {name: mean, name_se: its standard error}."""
    return {key: number for name, numbers in values.items()
            for key, number in zip((name, f"{name}_se"), mean_and_error(list(map(float, numbers))))}


def win_rate(outcomes, seed=0):
    """wins / (wins + losses) of outcomes 1, 0 (a tie) and -1, and its standard error by bootstrap; nan if all tie."""
    outcomes = np.array([one for one in outcomes if one is not None], dtype=int)
    if not outcomes.any():
        return math.nan, math.nan
    draws = np.random.default_rng(seed).choice(outcomes, (1000, len(outcomes)))
    wins, losses = (draws > 0).sum(1), (draws < 0).sum(1)
    rates = wins / np.where(wins + losses > 0, wins + losses, math.nan)
    return float((outcomes > 0).sum() / (outcomes != 0).sum()), float(np.nanstd(rates))


def markdown_table(rows, columns, better=()):
    """Markdown table of {row name: metrics}: mean ± standard error, an empty cell for nan. columns: {key: heading};
    better: {key: 1 or -1}, columns whose best cell is bold if no other lies within its and its own standard error."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    best = {}
    for key in better:
        order = sorted((-better[key] * row[key], name) for name, row in rows.items() if not math.isnan(row[key]))[:2]
        errors = [rows[name][f"{key}_se"] for _, name in order]
        if len(order) == 2 and order[1][0] - order[0][0] > sum(errors):
            best[key] = order[0][1]
    for name, metrics in rows.items():
        cells = ("" if math.isnan(metrics[key]) else f"{metrics[key]:.3f} ± {metrics[f'{key}_se']:.3f}"
                 for key in columns)
        lines.append(f"| {name} | " + " | ".join(f"**{cell}**" if best.get(key) == name else cell
                                                 for key, cell in zip(columns, cells)) + " |")
    return "\n".join(lines)


def terminal_table(rows, columns, starts=()):
    """Aligned table of {row name: metrics}, at most WIDTH columns wide; ↑ and ↓ mark a cell that differs by more than
    two standard errors of the difference from that of the row's start. columns: {key: heading}, "/" breaks a heading;
    starts: {row name: name of its start}, where that is not the first row."""
    starts = {name: next(iter(rows)) for name in rows} | dict(starts)
    cells = [["", *(heading.rpartition("/")[0] for heading in columns.values())],
             ["", *(heading.rpartition("/")[2] for heading in columns.values())]]
    for name, metrics in rows.items():
        cells.append([name])
        first = rows[starts[name]]
        for key in columns:
            change, error = metrics[key] - first[key], math.hypot(metrics[f"{key}_se"], first[f"{key}_se"])
            mark = " " if not abs(change) > 2 * error else "↑" if change > 0 else "↓"
            text = f"{metrics[key]:.3f}±" + f"{metrics[f'{key}_se']:.3f}".removeprefix("0") + mark
            cells[-1].append("" if math.isnan(metrics[key]) else text)
    return aligned(cells)


WIDTH = 120  # characters of a terminal's line


def aligned(cells):
    """Rows of texts -> lines with columns of equal width, the first one to the left. Columns beyond WIDTH follow in
    blocks of their own, each with the first column."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    blocks, used = [[]], widths[0]
    for i, width in enumerate(widths[1:], 1):
        if blocks[-1] and used + 1 + width > WIDTH:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(i)
        used += 1 + width
    return "\n\n".join("\n".join(" ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in block))).rstrip()
                                 for row in cells) for block in blocks)


def router_table(report):
    """The medians of `router_report` for a terminal: the weight of each expert by layer and kind of prompt."""
    kinds = next(iter(report.values()))
    cells = [["router weights", *kinds],
             ["of expert", *("" if kind == "entropy" else " ".join(f"{k:<5}" for k in range(len(at["median"])))
                             for kind, at in kinds.items())]]
    for layer, kinds in report.items():
        cells.append([layer, *(" ".join(f"{weight:.3f}" for weight in ([at] if kind == "entropy" else at["median"]))
                               for kind, at in kinds.items())])
    return aligned(cells)


# Reports of routers and of a mixture's experts


@torch.no_grad()
def prompt_weights(model, tokenizer, prompts, answers, batch_size=64):
    """Router weights at the last token of each prompt, where the answer begins, and their means over the tokens of each
    answer: two tensors (L, N, slots), float32 on the CPU."""
    rendered = [tokenizer.render(prompt) for prompt in prompts]
    encoded = encode(tokenizer, rendered, [(text,) for text in answers], longest(model))
    parts = []
    for _, batch in batches(encoded, batch_size, next(model.parameters()).device, longest_first=False):
        model(batch.tokens, batch.positions, batch.mask())
        weights = router_weights(model, batch.predictor).float()                        # (L, M, slots)
        counts = batch.owner.bincount()                                                 # tokens of each answer, EOS too
        sums = weights.new_zeros(len(weights), len(counts), weights.shape[-1]).index_add(1, batch.owner, weights)
        parts.append((weights[:, counts.cumsum(0) - counts].cpu(), (sums / counts[:, None]).cpu()))
    return (torch.cat(part, dim=1) for part in zip(*parts))


def router_report(model, tokenizer, prompts):
    """{layer: {kind: {"median", "q10", "q90": of each slot's weight at the last prompt token, "answer": its median over
    answers of the mean over an answer's tokens}, …, "entropy": mean of the weights' entropy at the last prompt token}}.

    prompts: {kind: [(prompt, answer)]}, such as harmful and safe ones (MidPO's Figure 5), or those of each preference
    (PMoL); the last slot of PMoL's routers is the empty expert.
    """
    weights = {kind: [*prompt_weights(model, tokenizer, *zip(*of_kind))] for kind, of_kind in prompts.items()}
    report = {}
    for i, (name, _) in enumerate(expert_layers(model)):
        report[name] = {kind: {key: part[i].quantile(share, dim=0).tolist() for key, part, share in (
            ("median", last, 0.5), ("q10", last, 0.1), ("q90", last, 0.9), ("answer", mean, 0.5))}
            for kind, (last, mean) in weights.items()}
        together = torch.cat([last[i] for last, _ in weights.values()])                 # (all N, slots)
        report[name]["entropy"] = float(torch.special.entr(together / together.sum(-1, keepdim=True)).sum(-1).mean())
    return report


# Diagnostics of mixtures and gates, and warnings about a run


@torch.no_grad()
def expert_margins(model, encoded, beta, batch_size, dtype="float32"):
    """Δr of every pair under each expert of a mixture, (N, K), and the gate's log w, (N, K): float32 on the CPU."""
    device, margins, log_gates = next(model.parameters()).device, [], []
    for _, batch in batches(encoded, batch_size, device, longest_first=False):
        with precision(dtype, device):
            logps, log_gate = mixture_logps(model, batch)                               # (K, N, 2), (N, K)
        reference = batch.labels["reference"].view(logps.shape[1], 2, -1)               # (N, 2, 1), or one for each: K
        ratios = logps.permute(1, 2, 0) - reference                                     # (N, 2, K)
        margins.append(beta * (ratios[:, 0] - ratios[:, 1]).cpu())
        log_gates.append(log_gate.cpu())
    return torch.cat(margins), torch.cat(log_gates)


def mixture_report(model, encoded, held_out, types, beta, batch_size, dtype="float32"):
    """Diagnostics of a trained mixture: (report, text for a terminal, with a warning for each way its experts failed to
    specialise). types: of each annotator in encoded.groups, which training does not read.

    report: "responsibility" of each expert; "recovered": the share of annotators whose responsible expert, by their
    pairs, is that of their type, under the best assignment of experts to types; with held-out pairs (or None),
    "accuracy": {type: [share of its pairs that each expert orders rightly]}, "held_out": {type: number of its pairs}.
    """
    margins, log_gate = expert_margins(model, encoded, beta, batch_size, dtype)
    group = torch.from_numpy(encoded.labels["group"])                                         # (N,), -1: no annotator
    K, count, names, labelled = margins.shape[1], len(types), sorted(set(types)), group >= 0
    evidence = torch.zeros(count, K).index_add(0, group[labelled], F.logsigmoid(margins[labelled]))
    pairs = group[labelled].bincount(minlength=count)[:, None].clamp(min=1)
    prior = torch.zeros(count, K).index_add(0, group[labelled], log_gate[labelled]) / pairs
    responsible = (evidence + prior).argmax(-1).tolist()                                      # of each annotator
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
    rows = {"responsibility": report["responsibility"]}
    for name, accuracy in report.get("accuracy", {}).items():
        rows[f"accuracy, {name}, n = {report['held_out'][name]}"] = accuracy
    cells = [[name, *(f"{number:.3f}" for number in numbers)] for name, numbers in rows.items()]
    lines = [aligned([["expert", *map(str, range(len(cells[0]) - 1))], *cells]),
             "responsibility: share of the training pairs that the expert accounts for",
             "accuracy: share of the n held-out pairs of an annotator type that the expert by itself orders rightly"]
    if "recovered" in report:
        lines.append(f"recovered, {report['recovered']:.3f}: share of annotators whose expert is that of their type")
    return "\n".join(lines)


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's colours
FRONTIERS = {"helpfulness_safe": "harmless_ratio", "scaled": "harmless_ratio", "reward": "harmlessness",
             "judged_helpfulness": "judged_harm"}


def load_pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs the matplotlib package: pip install matplotlib") from None
    return pyplot


def plot(rows, headings, routers, gates, runs, out):
    """Pictures in out-….png and .svg: helpfulness against harmlessness of {row: metrics}, runs of a method and
    view joined in their order; the weights of {run: `router_report`} by layer, with 10 to 90 % of the prompts; those of
    {run: `gate_report`} by user; training curves."""
    pyplot = load_pyplot()

    def save(figure, name):
        for kind in ("png", "svg"):
            figure.savefig(f"{out}-{name}.{kind}", dpi=150)
        print(f"{out}-{name}.png")

    for x, y in [(x, y) for x, y in FRONTIERS.items() if all(
            math.isfinite(row.get(key, math.nan)) for key in (x, y) for row in rows.values())][:1]:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for i, (name, row) in enumerate(rows.items()):
            axes.errorbar(row[x], row[y], row[f"{y}_se"], row[f"{x}_se"], "os^Dv"[i % 5], color=PALETTE[i % 7],
                          capsize=3, label=name)
        for _, sweep in itertools.groupby(runs, lambda run: [read_json(Path(run) / "config.json")[key]
                                                             for key in ("method", "view")]):
            axes.plot(*zip(*((rows[run][x], rows[run][y]) for run in sweep)), color="#999999", zorder=0)
        axes.set(xlabel=headings[x].replace("/", ", "), ylabel=headings[y].replace("/", ", "))
        axes.legend(fontsize=8)
        save(figure, "frontier")
    for run, report in routers.items():
        kinds = [kind for kind in next(iter(report.values())) if kind != "entropy"]
        slots = len(next(iter(report.values()))[kinds[0]]["median"])
        figure, panels = pyplot.subplots(1, slots, figsize=(1 + 2.5 * slots, 3), sharey=True, squeeze=False,
                                         layout="constrained")
        for k, axes in enumerate(panels[0]):
            for i, kind in enumerate(kinds):
                median, low, high = ([layer[kind][key][k] for layer in report.values()]
                                     for key in ("median", "q10", "q90"))
                axes.plot(median, f"-{'os^Dv'[i % 5]}", color=PALETTE[i % 7], label=kind)
                axes.fill_between(range(len(median)), low, high, color=PALETTE[i % 7], alpha=0.2)
            axes.set(title=f"expert {k}", xlabel="wrapped layer", ylim=(-0.05, 1.05))
            axes.set_ylabel("" if k else "router weight")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0][-1].legend(fontsize=8)
        save(figure, f"routers-{Path(run).name}")
    for run, gate in gates.items():
        users = sorted(gate["users"].items())
        figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
        for k, name in enumerate(gate["experts"]):
            axes.plot([weights[k] for _, weights in users], "os^Dv"[k % 5], color=PALETTE[k % 7], label=name)
        axes.set(xlabel=f"users, from {users[0][0]} to {users[-1][0]}", ylabel="gate weight")
        axes.legend(fontsize=8)
        save(figure, f"gate-{Path(run).name}")
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for axes, key in zip(panels, ("loss", "rewards/accuracies", "rewards/margins")):
        for i, run in enumerate(runs):
            logged = whole_rows(Path(run) / "metrics.jsonl")
            axes.plot(*zip(*((row["step"], row[key]) for row in logged if key in row)), color=PALETTE[i % 7], label=run)
        axes.set(xlabel="optimiser step", ylabel=key)
    panels[0].legend(fontsize=8)
    save(figure, "training")
