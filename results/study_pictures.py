"""Pictures of studies: PICTURES[study](lines, runs, folder) writes folder/study-….png.

lines: {row: metrics over seeds, "…_se" beside each}. runs: {(row, seed): run folder}.
"""
import itertools

from common import read_json

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well
COLOURS, MARKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "os^Dv<P"


def panels(count, **settings):
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, count, figsize=(1 + 3.4 * count, 3.4), squeeze=False, layout="constrained",
                                   **settings)
    return figure, axes[0]


def save(figure, folder, study):
    path = folder / f"study-{study}.png"
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def draw(axes, xs, rows, key, label, i, line="-"):
    """One metric of rows over xs, with its standard error."""
    axes.errorbar(xs, [row[key] for row in rows], [row[f"{key}_se"] for row in rows], marker=MARKS[i % 7],
                  color=COLOURS[i % 7], linestyle=line, capsize=3, markersize=4, linewidth=1.2, label=label)


def seeds_of(runs, name):
    return [folder for (row, _), folder in runs.items() if row == name]


def all_methods(lines, runs, folder):
    figure, (axes,) = panels(1)
    figure.set_size_inches(8, 4.4)
    for i, (name, row) in enumerate(lines.items()):
        axes.errorbar(row["helpfulness_safe"], row["harmless_ratio_unsafe"], row["harmless_ratio_unsafe_se"],
                      row["helpfulness_safe_se"], marker=MARKS[i % 7], color=COLOURS[i % 7], capsize=2, linestyle="",
                      mfc=COLOURS[i % 7] if i < 7 else "white", label=name)
    axes.set(xlabel="helpful, on safe prompts", ylabel="harmless, on harmful prompts")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, folder, "all")


def delta(lines, runs, folder):
    figure, (left, right) = panels(2)
    rows = {name: row for name, row in lines.items() if name != "base"}
    for i, name in enumerate(rows):
        recorded = read_json(seeds_of(runs, name)[0] / "margins.json")["rows"]
        steps = [row["step"] for row in recorded]
        left.plot(steps, [row["q50"] for row in recorded], color=COLOURS[i % 7], marker=MARKS[i % 7], markersize=3,
                  label=name)
        left.fill_between(steps, [row["q10"] for row in recorded], [row["q90"] for row in recorded],
                          color=COLOURS[i % 7], alpha=0.12, linewidth=0)
    left.set(xlabel="step", ylabel="Δr, safe/unsafe pairs (10, 50, 90 %)")
    left.legend(fontsize=7)
    for i, (key, label) in enumerate((("helpfulness_safe", "helpful, safe prompts"), ("over_refusal", "over-refusal"),
                                      ("harmless_ratio_unsafe", "harmless, harmful prompts"),
                                      ("degenerate", "degenerate"), ("forgotten", "forgetting, nats per token"))):
        draw(right, range(len(rows)), list(rows.values()), key, label, i)
    right.set(xlabel="Δ", ylabel="closing table", xticks=range(len(rows)),
              xticklabels=[name.rpartition(" ")[2] for name in rows])
    right.legend(fontsize=7)
    save(figure, folder, "delta")


def noise(lines, runs, folder):
    flips = dict.fromkeys(name.rpartition(", ")[2].split()[0] for name in lines if name != "base")
    methods = dict.fromkeys(name.rpartition(", ")[0] for name in lines if name != "base")
    figure, axes = panels(len(flips), sharey=True)
    for panel, flip in zip(axes, flips):
        metrics = (("harmless_ratio_unsafe", "harmless on harmful", "-"), ("helpfulness_safe", "helpful on safe", "--"))
        for (i, method), (key, what, line) in itertools.product(enumerate(methods), metrics):
            rows = {name: row for name, row in lines.items() if name.startswith(f"{method}, {flip} ")}
            shares = [float(name.rpartition(" ")[2]) for name in rows]
            draw(panel, shares, [*rows.values()], key, f"{method}: {what}", i, line)
        panel.set(xlabel=f"share of labels flipped (--{flip})", ylabel="score" if panel is axes[0] else "")
    figure.set_size_inches(10, 3.4)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    save(figure, folder, "noise")


def l1(lines, runs, folder):
    shares = dict.fromkeys(name.partition(":")[0] for name in lines if name != "base")
    figure, axes = panels(len(shares), sharey=True)
    for panel, share in zip(axes, shares):
        rows = {name: row for name, row in lines.items() if name.startswith(f"{share}:")}
        for i, (key, what) in enumerate((("harmless_ratio_unsafe", "harmless on harmful prompts"),
                                         ("helpfulness_safe", "helpful on safe prompts"),
                                         ("over_refusal", "over-refusal"))):
            draw(panel, range(len(rows)), [*rows.values()], key, what, i)
        weights = [[read_json(next(run.glob("eval*.json")))["router"] for run in seeds_of(runs, name)] for name in rows]
        for i, kind in enumerate(("harmful", "safe"), 3):
            last = [sum([*report.values()][-1][kind]["median"][0] for report in reports) / len(reports)
                    for reports in weights]
            panel.plot(range(len(rows)), last, linestyle=":", marker=MARKS[i], color=COLOURS[i], markersize=4,
                       label=f"safety weight, {kind} prompts, last layer")
        panel.set(xlabel="weight of the L1 term", xticks=range(len(rows)), ylabel="score" if panel is axes[0] else "",
                  xticklabels=[name.rpartition(" ")[2] for name in rows],
                  title=f"{float(share):.0%} of the router's comparisons harmful")
        panel.title.set_fontsize(9)
    axes[-1].legend(fontsize=6, loc="center left")
    save(figure, folder, "l1")


def conflict(lines, runs, folder):
    names = [name for name in lines if name != "base"]
    figure, axes = panels(len(names), sharey=True)
    for panel, name in zip(axes, names):
        recorded = [read_json(run / "conflict.json")["rows"] for run in seeds_of(runs, name)]
        for i, layer in enumerate(key for key in recorded[0][0] if key != "step"):
            means = [sum(rows[layer] for rows in at) / len(at) for at in zip(*recorded)]
            panel.plot([row["step"] for row in recorded[0]], means, color=COLOURS[i], marker=MARKS[i], markersize=3,
                       label=f"layer {layer}")
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.set(title=name, xlabel="step", ylim=(-1, 1),
                  ylabel="cosine of safety's and\nhelpfulness's gradient" if panel is axes[0] else "")
    axes[0].legend(fontsize=8)
    save(figure, folder, "conflict")


def pmol(lines, runs, folder):
    """Mixing score by the number of preferences; router weights by preference with and without the soft loss."""
    counts = {int(name.partition(":")[0]) for name in lines}
    figure, axes = panels(2 + (len(counts) > 1))
    *first, with_loss, without = axes
    for left in first:
        for i, what in enumerate(dict.fromkeys(name.partition(": ")[2] for name in lines
                                               if "PMoL, " not in name and "attention" not in name)):
            found = {int(name.partition(":")[0]): row for name, row in lines.items() if name.partition(": ")[2] == what}
            draw(left, [*found], [*found.values()], "mixing", what, i)
        left.set(xlabel="preferences", ylabel="mixing score")
        left.legend(fontsize=7)
    count, rest = max(counts), (with_loss, without)
    for axes, name in zip(rest, (f"{count}: PMoL", f"{count}: PMoL, no soft loss")):
        if not seeds_of(runs, name):
            continue
        report = [*read_json(next(seeds_of(runs, name)[0].glob("eval*.json")))["router"].values()][-1]
        kinds = [kind for kind in report if kind != "entropy"]
        image = axes.imshow([report[kind]["median"] for kind in kinds], cmap="cividis", vmin=0, vmax=1)
        axes.set(title=f"{name.partition(': ')[2]}, last layer", xlabel="expert (last: empty)",
                 yticks=range(len(kinds)))
        axes.set_yticklabels(kinds if axes is rest[0] else [], fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.7, label="median weight")
    save(figure, folder, "pmol")


PICTURES = {"all": all_methods, "delta": delta, "noise": noise, "l1": l1, "conflict": conflict, "pmol": pmol}
