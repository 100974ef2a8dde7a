"""Preference losses as pure functions of log-probabilities, and what computes those: packed batches of token ids.

Every loss takes tensors of shape (N,), one entry per pair, in nats, float32, and returns (mean loss, metrics): metrics
is a dict of detached means under the names that TRL logs. With the implicit reward r(x, y) = beta · (log π(y|x) −
log π_ref(y|x)), DPO, SafeDPO and SPE-DPO are −log σ(r_chosen − r_rejected − offset) and differ in the offset alone.
Below the losses, `encode` tokenises prompts with their responses; both responses to a prompt share one copy of it in a
packed row (`Encoded`, `pack`, `Batch`); `sequence_logps` gives log π(y|x) of every response. Then come what several
processes share, diagnostics, tables, and the sandbox of chat templates.

Letters in shape comments: N pairs, R responses per prompt, B rows, T tokens per row, M response tokens in the batch,
D width, V vocabulary.
"""
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batch import batches, precision
from common import UserError, read_json, whole_rows


# Losses


def preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, offset, label_smoothing=0.0):
    """−(1−ε) log σ(Δr − offset) − ε log σ(−(Δr − offset)), with Δr = r(x, chosen) − r(x, rejected).

    The common part of DPO, SafeDPO and SPE-DPO. offset: (N,) or a number, in units of reward.
    """
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    logit = margin - offset
    loss = -(1 - label_smoothing) * F.logsigmoid(logit)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-logit)
    metrics = {
        "rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected, "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
        "logps/chosen": policy_chosen, "logps/rejected": policy_rejected,
    }
    return loss.mean(), {name: value.detach().mean() for name, value in metrics.items()}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """DPO: −log σ(Δr) (arXiv 2305.18290, Eq. 7); label_smoothing ε is the conservative variant.

    All log-probs (N,), in nats; beta > 0. Returns (loss, metrics).
    """
    return preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, 0.0, label_smoothing)


def safedpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_unsafe, rejected_unsafe, beta,
                 delta, label_smoothing=0.0):
    """SafeDPO: −log σ(Δr − (h_rejected − h_chosen)·Δ) (arXiv 2505.20065, Eq. 15).

    h is 1 for an unsafe response, 0 for a safe one: chosen_unsafe and rejected_unsafe, (N,), bool or float.
    Pairs come from `safedpo_transform`, so the chosen response is safe and the offset is Δ on safe/unsafe
    pairs and 0 on safe/safe ones. delta ≥ 0 leaves the optimum where it is (Prop. 4.4); 0 is DPO.
    """
    offset = (rejected_unsafe.float() - chosen_unsafe.float()) * delta
    return preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, offset, label_smoothing)


def spe_dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, margin, beta, label_smoothing=0.0):
    """SPE-DPO: −log σ(Δr − m) with m = max(0, s(chosen) − s(rejected)) (arXiv 2506.02460, Section 3.1).

    margin: (N,), m in units of the score model, clipped at 0 by `data.score_margin`. m = 0 is DPO.
    """
    loss, metrics = preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, margin,
                                    label_smoothing)
    return loss, {**metrics, "score_margin": margin.mean(), "score_clipped": (margin == 0).float().mean()}


def router_l1(safety, helpfulness):
    """MidPO's L1 term: mean over layers and tokens of |α| + |γ − 1| (arXiv 2506.02460, Section 3.2).

    safety α, helpfulness γ: (L, tokens), the weights of the two experts. It pulls to "helpfulness on, safety off".
    """
    return (safety.abs() + (helpfulness - 1).abs()).mean()


def group_targets(num_groups, num_experts, soft_constraint):
    """PMoL's balanced targets D: (G, K), row i for data of preference i; rows sum to 1.

    D_i[k] ∝ 1 for the K/G experts of group i and ∝ 1 − s_c for the others: s_c = 0 balances the load over all
    experts, s_c = 1 keeps preference i to its own group. arXiv 2411.01245 gives no formula: this form is ours.
    soft_constraint: one number in [0, 1], or one per group.
    """
    own_group = torch.arange(num_experts) // (num_experts // num_groups) == torch.arange(num_groups)[:, None]  # (G, K)
    others = (1 - torch.as_tensor(soft_constraint, dtype=torch.float32)).expand(num_groups)[:, None]
    target = torch.where(own_group, 1.0, others)
    return target / target.sum(-1, keepdim=True)


def expert_group_soft_loss(router_weights, group, target):
    """PMoL's expert group soft loss: mean over layers and tokens of KL(D_i ‖ w[:K]) (arXiv 2411.01245, Section 3).

    router_weights: (L, tokens, K + 1), the last slot being the empty expert, or (L, tokens, K) without one; group:
    (tokens,), the preference i of each token's pair; target: (G, K) of `group_targets`. w[:K] is not renormalised:
    KL(D‖w[:K]) = KL(D‖w[:K]/Σ) − log(1 − w_empty), so this also keeps the empty expert from taking everything.
    """
    target = target[group]                                                                    # (tokens, K)
    logs = router_weights[..., :target.shape[-1]].clamp(min=torch.finfo(torch.float32).tiny).log()
    return -(torch.special.entr(target).sum(-1) + (target * logs).sum(-1)).mean()             # 0 · log 0 = 0


def moe_dpo_loss(policy_logps, ref_logps, log_gate, beta, objective="elbo", annotator=None, q_temperature=1.0):
    """Mix-/MoE-DPO: a mixture of Bradley–Terry models, p = Σ_k w_k σ(Δr_k) (arXiv 2510.08256, Section 3).

    policy_logps, ref_logps: (K, N, 2), chosen and rejected, each expert against its own reference; log_gate: (N, K),
    log w(x). With Δr_k = beta · (log-ratio of chosen − log-ratio of rejected), the loss per pair is, by objective:
    - "elbo": −Σ_k q_k [log σ(Δr_k) + log w_k − log q_k], q_k ∝ w_k σ(Δr_k) without gradient (the E-step). Its value
      and its gradients are those of −log p. q_temperature T ≠ 1 tempers the E-step, q^(1/T): the bound is then loose.
    - "weights": −Σ_k w_k log σ(Δr_k), the form in the paper's poster; by Jensen's inequality an upper bound on −log p.
    annotator (N,): pairs of the same annotator share one latent expert, q ∝ w Π_i σ(Δr_k,i); their prior is the mean
    of the gate's log w over them, renormalised. None: each pair has a latent expert of its own.
    Returns (loss, metrics).
    """
    ratios = beta * (policy_logps - ref_logps)
    margins = (ratios[..., 0] - ratios[..., 1]).T                             # (N, K)
    fit = F.logsigmoid(margins)
    if objective == "weights":
        loss, q = -(log_gate.exp() * fit).sum(-1), (log_gate + fit).detach().softmax(-1)
    else:
        prior, evidence, count = log_gate, fit, 1
        if annotator is not None:
            same = (annotator[:, None] == annotator).to(fit.dtype)            # (N, N)
            count = same.sum(-1, keepdim=True)                                # (N, 1) pairs of this one's annotator
            prior, evidence = (same @ log_gate / count).log_softmax(-1), same @ fit
        log_q = ((prior + evidence).detach() / q_temperature).log_softmax(-1)
        q = log_q.exp()
        loss = (q * (log_q - prior - evidence) / count).sum(-1)               # annotators add up over their pairs
    gate = log_gate.detach().exp()
    likelihood = (log_gate + fit).detach().logsumexp(-1)
    metrics = {"log_likelihood": likelihood.mean(), "rewards/margins": (gate * margins.detach()).sum(-1).mean(),
               "rewards/accuracies": ((gate * margins.detach().sigmoid()).sum(-1) > 0.5).float().mean(),
               **{f"responsibility/{k}": share for k, share in enumerate(q.mean(0))},
               **{f"gate/{k}": share for k, share in enumerate(gate.mean(0))}}
    return loss.mean(), metrics


def reward_loss(chosen, rejected):
    """Bradley–Terry: −log σ(s(chosen) − s(rejected)) (arXiv 2203.02155, Eq. 1). Scores (N,); (loss, metrics)."""
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), {"accuracy": (margin > 0).float().mean(), "margin": margin.detach().mean()}


def cost_loss(safer, other, safer_unsafe, other_unsafe):
    """Bradley–Terry on which response is the more unsafe, plus −log σ(sign · c) for each response, sign being +1 where
    it is unsafe and −1 where it is safe (arXiv 2310.12773, Eq. 6): c > 0 comes to mean unsafe.

    safer, other: costs (N,); safer_unsafe, other_unsafe: (N,) flags, 1 for unsafe. Returns (loss, metrics).
    """
    signed = torch.cat([safer * (2 * safer_unsafe - 1), other * (2 * other_unsafe - 1)])  # (2N,)
    loss, metrics = reward_loss(other, safer)
    return loss - 2 * F.logsigmoid(signed).mean(), {**metrics, "sign_accuracy": (signed > 0).float().mean()}


def sft_loss(logps, lengths):
    """Cross-entropy per response token: −Σ log π(y|x) / Σ |y|. logps, lengths: (N,). Returns (loss, metrics)."""
    loss = -logps.sum() / lengths.sum().clamp(min=1)
    return loss, {"perplexity": loss.detach().exp(), "logps/chosen": logps.detach().mean()}


# Diagnostics of mixtures and gates, and warnings about a run


@torch.no_grad()
def expert_margins(forward, model, encoded, beta, batch_size, dtype="float32"):
    """Δr of every pair under each expert, (N, K), and the gate's log w, (N, K): float32 on the CPU.

    forward: function of model and batch to log-probs of every expert, (K, N, 2), and log w.
    """
    device, margins, log_gates = next(model.parameters()).device, [], []
    for _, batch in batches(encoded, batch_size, device, longest_first=False):
        with precision(dtype, device):
            logps, log_gate = forward(model, batch)
        reference = batch.labels["reference"]                           # (N, 2), or (N, 2, K): one for each expert
        ratios = logps - (reference.permute(2, 0, 1) if reference.dim() == 3 else reference)
        margins.append(beta * (ratios[..., 0] - ratios[..., 1]).T.cpu())
        log_gates.append(log_gate.cpu())
    return torch.cat(margins), torch.cat(log_gates)


def annotator_type(group):
    """A group's name without a number at its end: "warmth 017" is an annotator of the type "warmth"."""
    return re.sub(r" \d+$", "", group)


def mixture_diagnostics(margins, log_gate, group, types):
    """How the experts of a mixture share the pairs: (report, warnings), a warning for each way of not specialising.

    margins: (N, K) Δr of every pair under each expert; log_gate: (N, K) the gate's log w; group: (N,) each pair's
    annotator, -1 for none; types: of each annotator, which training does not read. report: "responsibility" of each
    expert; "recovered": the share of annotators whose responsible expert, by their pairs, is that of their type, under
    the best assignment of experts to types.
    """
    K, count, names, labelled = margins.shape[1], len(types), sorted(set(types)), group >= 0
    evidence = torch.zeros(count, K).index_add(0, group[labelled], F.logsigmoid(margins[labelled]))
    pairs = group[labelled].bincount(minlength=count)[:, None].clamp(min=1)
    prior = torch.zeros(count, K).index_add(0, group[labelled], log_gate[labelled]) / pairs
    responsible = (evidence + prior).argmax(-1).tolist()                                      # of each annotator
    share = (F.logsigmoid(margins) + log_gate).softmax(-1).mean(0).tolist()
    report, warnings = {"responsibility": share}, []
    if max(share) > 0.95:
        warnings.append(f"the mixture has collapsed: expert {share.index(max(share))} takes {max(share):.0%} of all "
                        "responsibility")
    agree = float((margins > 0).eq(margins[:, :1] > 0).all(-1).float().mean())
    if agree > 0.95 and K > 1:
        warnings.append(f"the experts agree: they order {agree:.0%} of the pairs in the same way")
    if 0 < len(names) <= K <= 6:
        owners = Counter(zip(types, responsible))                                   # (type, expert): annotators
        report["recovered"] = max(sum(owners[pair] for pair in zip(names, experts))
                                  for experts in itertools.permutations(range(K), len(names))) / count
    return report, warnings


@torch.no_grad()
def gate_report(model):
    """{"kind", "experts": their names, "weights": of the experts for all or, of a gate on users, for an unknown user,
    "users": {user: weights}}; a gate on prompts has instead "weight" (D, K) and "bias": its weights are softmax(mean
    hidden state of the prompt under the base · weight + bias)."""
    gate, users = model.gate, model.gate.spec["groups"]
    report = {"kind": gate.kind, "experts": [f"expert-{k}" for k in range(len(model.gate.bias))]}
    if gate.kind == "prompt":
        return report | {"weight": gate.weight.tolist(), "bias": gate.bias.tolist()}
    report["weights"] = gate(group=torch.tensor([-1], device=gate.bias.device)).exp()[0].tolist()
    if gate.kind == "user":
        numbers = torch.arange(len(users), device=gate.bias.device)
        report["users"] = dict(zip(users, gate(group=numbers).exp().tolist()))
    return report


# Means with their errors, tables and pictures of them


def mean_and_error(values):
    """(mean, standard error of the mean) of a list of numbers; (nan, nan) of an empty one, error 0 of a single one."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


def measured(values):
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
