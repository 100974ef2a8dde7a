"""Answer held-out prompts, judge the answers and print one table; score or make the pairs of a preference file.

    python eval.py out/safedpo out/dpo          evaluate finished runs side by side
    python eval.py out/safedpo --split dev      on the development split, where settings are chosen
    python eval.py out/midpo --static 0.5,0.5   with its experts merged at fixed weights
    python eval.py --merge out/safedpo --out DIR     as a plain checkpoint
    python eval.py --export out/moe-dpo --out DIR    as one PEFT adapter for each expert, and gate.json
    python eval.py --score pairs.jsonl --reward_model DIR --cost_model DIR --out scored.jsonl
    python eval.py --make_pairs prompts.txt --model gpt2 --reward_model DIR,module:function --out pairs.jsonl

Every metric is a mean over prompts with its standard error. The judge of the toy world is its oracle.
"""
import argparse
import difflib
import hashlib
import importlib
import itertools
import json
import math
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import toy
from data import (TEMPLATE_NAMES, TEMPLATES, Tokenizer, annotator_type, encode, get_prompt, parse_line, read_lines,
                  read_rows, score_margin)
from lora_moe import (count_experts, disable_experts, expert_layers, expert_logps, export_experts, is_mixture,
                      is_routed, load_trained, merge_experts, router_weights, set_routers, use_expert)
from losses import batches, policy_logps, precision
from model import (DTYPES, FAMILIES, ScoreModel, Transformer, UserError, atomic_file, content_hash, files_hash,
                   find_folder, first_line, generate, read_config, read_json, write_text)

# Answers


@torch.no_grad()
def pooled_states(model, encoded, batch_size=64):
    """The mean of each prompt's hidden states under the frozen base, for the gate: (N, D) float32."""
    pooled = np.empty((len(encoded), model.config.hidden_size), dtype=np.float32)
    for indices, batch in batches(encoded, batch_size, next(model.parameters()).device, longest_first=False):
        with disable_experts(model):
            hidden = model(batch.tokens, batch.positions, batch.mask()).float()
        in_prompt = (batch.part == 0) & (batch.pair >= 0)                               # (B, T)
        sums = hidden.new_zeros(len(indices), hidden.shape[-1])
        sums.index_add_(0, batch.pair[in_prompt], hidden[in_prompt])                    # (N, D)
        pooled[indices] = (sums / batch.pair[in_prompt].bincount()[:, None]).cpu()
    return pooled


def choose_experts(model, tokenizer, prompts, use="mixture", users="", seed=0):
    """The expert that answers each rendered prompt, (N,).

    use: "mixture" draws it from the gate's w(x), once for each prompt; "sparse" takes the one with the largest w; a
    number names it. users: for a user gate, cycle through users with this name prefix; if empty, use the average user.
    """
    if use.isdecimal():
        return torch.full((len(prompts),), int(use))
    numbers = [i for i, name in enumerate(model.gate.spec["groups"]) if users and name.startswith(users)] or [-1]
    device, pooled = model.gate.bias.device, None
    if model.gate.kind == "prompt":
        encoded = encode(tokenizer, prompts, [("",)] * len(prompts), max_len=1 << 20)
        pooled = torch.from_numpy(pooled_states(model, encoded)).to(device)
    user = torch.tensor([numbers[i % len(numbers)] for i in range(len(prompts))], device=device)
    with torch.no_grad():
        weights = model.gate(pooled, user).exp().cpu().expand(len(prompts), -1)         # (N, K)
    if use == "sparse":
        return weights.argmax(-1)
    return torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def answer(model, tokenizer, prompts, seed, temperature, use="mixture", users="", max_new_tokens=64):
    """[(response text, whether it came to its end)] to prompts, text or messages. use, users: see `choose_experts`."""
    rendered = [tokenizer.render(prompt) for prompt in prompts]
    if model.gate is not None:
        use_expert(model, choose_experts(model, tokenizer, rendered, use, users, seed))
    tokens, stops = tokenizer.encode(rendered), {*tokenizer.stop_ids, *model.config.eos_ids}
    outputs = generate(model, tokens, max_new_tokens, temperature, eos_ids=stops, seed=seed)
    return [(tokenizer.answer(prompt, ids), ids[-1] in stops) for prompt, ids in zip(tokens, outputs)]


# The toy oracle as a judge


def evaluate_toy(model, tokenizer, split, seed, temperature=0.7):
    """Answer the split's prompts and let the oracle judge them.

    Returns (metrics, answers): metrics has the keys of toy.METRICS, "<key>_se" for each, and n; answers is a list of
    (Prompt, response text, Verdict).
    """
    prompts = toy.eval_prompts(split, seed)
    texts = answer(model, tokenizer, [prompt.text for prompt in prompts], seed, temperature)
    answers = [(prompt, text, toy.oracle(prompt, text, ended)) for prompt, (text, ended) in zip(prompts, texts)]
    metrics = {"n": len(answers)}
    for name, (_, counts, value) in toy.METRICS.items():
        values = [float(value(verdict)) for prompt, _, verdict in answers if counts(prompt)]
        metrics[name], metrics[f"{name}_se"] = mean_and_error(values)
    return metrics, answers


def evaluate_preferences(model, tokenizer, names, split, seed, temperature=0.7, use="mixture"):
    """The oracle's score for each preference on prompts that ask for it: {name, "mixing", "degenerate"}, f"{key}_se" for
    each; the mixing score is the preferences' mean (arXiv 2411.01245, Section 4)."""
    metrics, degenerate = {}, []
    for name, prompts in toy.preference_sample(names, split, seed).items():
        texts = answer(model, tokenizer, [prompt.text for prompt in prompts], seed, temperature, use, name)
        answers = [(prompt, text, ended) for prompt, (text, ended) in zip(prompts, texts)]
        metrics[name], metrics[f"{name}_se"] = mean_and_error([toy.preference_score(name, *one) for one in answers])
        degenerate += [float(toy.oracle(*one).degenerate) for one in answers]
    metrics["mixing"] = sum(metrics[name] for name in names) / len(names)
    metrics["mixing_se"] = math.hypot(*(metrics[f"{name}_se"] for name in names)) / len(names)
    metrics["degenerate"], metrics["degenerate_se"] = mean_and_error(degenerate)
    return metrics


def evaluate_run(policy, base, tokenizer, out, split, seed, temperature, static="", preferences=()):
    """Evaluate a policy beside its base; write eval.json and samples.txt into the run folder (eval-dev.json for the
    development split, eval-static-….json for experts merged at fixed weights).

    preferences: those of the toy world that the run mixed, which are scored as well. Returns (eval.json, samples).
    """
    metrics, answers = {}, {}
    for who, model in (("base", base), ("policy", policy)):
        metrics[who], answers[who] = evaluate_toy(model, tokenizer, split, seed, temperature)
        if preferences:
            metrics[who]["preferences"] = evaluate_preferences(model, tokenizer, preferences, split, seed, temperature)
    report = {"policy": metrics["policy"], "base": metrics["base"], "split": split, "seed": seed,
              "temperature": temperature}
    if policy.gate is not None and preferences:
        report["uses"] = {"mixture": metrics["policy"]["preferences"]}
        for use in ("sparse", *map(str, range(count_experts(policy)))):
            report["uses"][use] = evaluate_preferences(policy, tokenizer, preferences, split, seed, temperature, use)
    elif is_routed(policy):
        prompts = toy.preference_sample(preferences, split, seed)
        for prompt in () if preferences else toy.eval_prompts(split, seed):
            prompts.setdefault("harmful" if prompt.task.harmful else "safe", []).append(prompt)
        report["router"] = router_report(policy, tokenizer, prompts)
    suffix = f"-static-{static}" * bool(static) + "-dev" * (split == "dev")
    write_text(Path(out) / f"eval{suffix}.json", json.dumps(report, indent=2) + "\n")
    write_text(Path(out) / f"samples{suffix}.txt", toy.samples(answers, count=20) + "\n")
    return report, toy.samples(answers)


# Tables


def mean_and_error(values):
    """(mean, standard error of the mean) of a list of numbers; (nan, nan) of an empty one, error 0 of a single one."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


TOY_COLUMNS = {key: heading for key, (heading, _, _) in toy.METRICS.items()}


def markdown_table(rows, columns=TOY_COLUMNS):
    """Markdown table of {row name: metrics}: mean ± standard error, an empty cell for nan. columns: {key: heading}."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for name, metrics in rows.items():
        cells = ("" if math.isnan(metrics[key]) else f"{metrics[key]:.3f} ± {metrics[f'{key}_se']:.3f}"
                 for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def terminal_table(rows, columns=TOY_COLUMNS):
    """Aligned table of {row name: metrics}, at most WIDTH columns wide; ↑ and ↓ mark a cell that differs from the
    first row's by more than two standard errors of the difference. columns: {key: heading}; "/" breaks a heading."""
    first = next(iter(rows.values()))
    cells = [["", *(heading.rpartition("/")[0] for heading in columns.values())],
             ["", *(heading.rpartition("/")[2] for heading in columns.values())]]
    for name, metrics in rows.items():
        cells.append([name])
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


def closing_tables(reports):
    """The tables of {run name: eval.json} for a terminal: the toy metrics of base and policies, then for each run the
    preferences that it mixed, by the ways of using a mixture, and its routers' median weights."""
    base = next(iter(reports.values()))["base"]
    shown = [terminal_table({"base": base, **{name: report["policy"] for name, report in reports.items()}})
             + "\n↑ ↓: more than two standard errors away from base"]
    for name, report in reports.items():
        if "preferences" in report["policy"]:
            uses = report.get("uses", {name: report["policy"]["preferences"]})
            columns = {key: key for key in report["policy"]["preferences"] if not key.endswith("_se")}
            shown.append(terminal_table({"base": report["base"]["preferences"], **uses}, columns))
        if "router" in report:
            cells = [["router weights", *next(iter(report["router"].values()))]]
            for layer, kinds in report["router"].items():
                cells.append([layer, *(" ".join(f"{weight:.3f}" for weight in np.atleast_1d(weights))
                                       for weights in kinds.values())])
            shown.append(aligned(cells))
    return "\n\n".join(shown)


# Finished runs


def load_policy(run, dtype="float32", device="cpu"):
    """The trained model of a run folder, its tokenizer and the run's settings."""
    run = Path(run)
    config = read_json(run / "config.json")
    if "lora_rank" not in config:
        raise UserError(f"{run}: not a run folder of train.py")
    if config.get("method") in ("reward", "cost"):
        raise UserError(f"{run}: a score model, which answers nothing; --score FILE lets it judge")
    model = load_trained(run, config["base"], DTYPES[dtype], device)
    return model, Tokenizer(config["base"], config.get("template")), config


def toy_preferences(config):
    """The toy preferences that a run mixed, by the settings in its config.json."""
    return [name for name, _ in config["groups"]] if config["data"] == ["toy"] else []


def merge_static(policy, weights):
    """The plain model with the experts merged at fixed weights, such as "0.5,0.5"; a single expert has weight 1."""
    count = count_experts(policy)
    if not weights and (is_routed(policy) or count > 1):
        raise UserError("--merge: this run mixes its experts by token or by prompt, which no plain checkpoint does; "
                        "--static 0.5,0.5 merges them at fixed weights")
    if not weights and count == 0:
        return policy
    weights = weights or "1"
    try:
        values = [float(weight) for weight in weights.split(",")]
    except ValueError:
        values = []
    if not count:
        raise UserError(f"--static {weights}: this run trained all weights, it has no experts to merge")
    if len(values) != count or not all(map(math.isfinite, values)):
        raise UserError(f"--static {weights}: expected {count} numbers with commas, one for each expert of the run")
    policy.gate = None
    return merge_experts(set_routers(policy, {"type": "constant", "weights": values}))


# Reports of routers and of a mixture's experts


@torch.no_grad()
def prompt_weights(model, tokenizer, prompts, batch_size=64):
    """Router weights at the last token of each prompt, where the answer begins: (L, N, slots), float32 on the CPU."""
    encoded = encode(tokenizer, [tokenizer.render(prompt) for prompt in prompts], [("",)] * len(prompts), 1 << 20)
    weights = []
    for _, batch in batches(encoded, batch_size, next(model.parameters()).device, longest_first=False):
        model(batch.tokens, batch.positions, batch.mask())
        weights.append(router_weights(model, batch.predictor).float().cpu())  # the EOS of an empty response follows it
    return torch.cat(weights, dim=1)


def router_report(model, tokenizer, prompts):
    """{layer: {kind: median weight of each slot at the last prompt token, …, "entropy": mean of the weights' entropy}}.

    prompts: {kind: toy Prompts}, such as harmful and safe ones (MidPO's Figure 5), or those of each preference (PMoL).
    """
    weights = {kind: prompt_weights(model, tokenizer, [prompt.text for prompt in of_kind])
               for kind, of_kind in prompts.items()}                                    # (L, N, slots) each
    report = {}
    for i, (name, _) in enumerate(expert_layers(model)):
        report[name] = {kind: layers[i].quantile(0.5, dim=0).tolist() for kind, layers in weights.items()}
        together = torch.cat([layers[i] for layers in weights.values()])                # (all N, slots)
        entropy = torch.special.entr(together / together.sum(-1, keepdim=True)).sum(-1)
        report[name]["entropy"] = float(entropy.mean())
    return report


@torch.no_grad()
def expert_margins(model, encoded, beta, batch_size, dtype="float32"):
    """Δr of every pair under each expert, (N, K), and the gate's log w, (N, K): float32 on the CPU."""
    device, K = next(model.parameters()).device, count_experts(model)
    margins, log_gates = torch.empty(2, len(encoded), K)
    for indices, batch in batches(encoded, batch_size, device, longest_first=False):
        with precision(dtype, device):
            logps = expert_logps(model, batch)                                          # (K, N, 2)
            log_gates[indices] = model.gate(batch.labels.get("pooled"), batch.labels["group"]).cpu()
        ref_logps = batch.labels["reference"]                           # (N, 2), or (N, 2, K): one for each expert
        ratios = logps - (ref_logps.permute(2, 0, 1) if ref_logps.dim() == 3 else ref_logps)
        margins[indices] = beta * (ratios[..., 0] - ratios[..., 1]).T.cpu()
    return margins, log_gates


def mixture_report(model, encoded, held_out, beta, batch_size, dtype="float32"):
    """Diagnostics of a trained mixture, and a warning for each way its experts failed to specialise.

    held_out may be None. Returns (report, warnings). report: "responsibility" of each expert; "accuracy" {annotator
    type: [share of its held-out pairs that each expert orders rightly]}; "recovered": the share of annotators whose
    responsible expert, by their training pairs, is that of their type, under the best assignment of experts to types.
    Training does not read the types; they stand in the groups' names.
    """
    margins, log_gate = expert_margins(model, encoded, beta, batch_size, dtype)
    K, count, group = margins.shape[1], len(encoded.groups), torch.from_numpy(encoded.labels["group"])
    labelled = group >= 0
    evidence = torch.zeros(count, K).index_add(0, group[labelled], F.logsigmoid(margins[labelled]))
    pairs = group[labelled].bincount(minlength=count)[:, None].clamp(min=1)
    prior = torch.zeros(count, K).index_add(0, group[labelled], log_gate[labelled]) / pairs
    responsible = (evidence + prior).argmax(-1).tolist()                                 # of each group
    types = [annotator_type(name) for name in encoded.groups]
    names = sorted(set(types))
    share = (F.logsigmoid(margins) + log_gate).softmax(-1).mean(0).tolist()
    report, warnings = {"responsibility": share}, []
    if max(share) > 0.95:
        warnings.append(f"the mixture has collapsed: expert {share.index(max(share))} takes {max(share):.0%} of all "
                        "responsibility")
    agree = float((margins > 0).eq(margins[:, :1] > 0).all(-1).float().mean())
    if agree > 0.95 and K > 1:
        warnings.append(f"the experts agree: they order {agree:.0%} of the pairs in the same way")
    if 0 < len(names) <= K <= 6:
        owners = Counter(zip(types, responsible))                                        # (type, expert): groups
        report["recovered"] = max(sum(owners[pair] for pair in zip(names, experts))
                                  for experts in itertools.permutations(range(K), len(names))) / count
    if held_out is not None:
        right = expert_margins(model, held_out, beta, batch_size, dtype)[0] > 0
        pair_types = np.array([*types, "unknown"])[held_out.labels["group"]]
        report["accuracy"] = {name: right[torch.from_numpy(pair_types == name)].float().mean(0).tolist()
                              for name in names or ["unknown"]}
    return report, warnings


# Score models


def load_score_model(name_or_dir, template=None, dtype="float32", device="cpu"):
    """(score model, its tokenizer). template None: alpaca for safe-rlhf's models, else the tokenizer's own."""
    folder = find_folder(name_or_dir)
    kind = (read_config(folder).hf.get("architectures") or ["?"])[0]
    if kind in FAMILIES.values():
        raise UserError(f"{name_or_dir}: a language model ({kind}), not a score model: it has no score.weight nor "
                        "score_head.weight")
    model = ScoreModel.from_pretrained(folder, DTYPES[dtype], device).eval()
    return model, Tokenizer(model.folder, template or ("alpaca" if model.config.score_name == "score_head" else None))


@torch.no_grad()
def score(model, tokenizer, texts, max_len=2048, batch_size=16, device="cpu"):
    """Scores of [(prompt, response)], a list of floats, read at the EOS that ends each response."""
    prompts = [tokenizer.render(prompt) for prompt, _ in texts]
    encoded = encode(tokenizer, prompts, [(response,) for _, response in texts], max_len)
    scores = np.empty(len(texts))
    for indices, batch in batches(encoded, batch_size, device):
        scores[indices] = model(batch.tokens, batch.last[:, 0], batch.positions, batch.mask()).cpu()
    return scores.tolist()


def add_margins(train, held_out, name, folder, template=None, dtype="float32", device="cpu"):
    """Give pairs their margins m = max(0, ±(s(chosen) − s(rejected))) by the score model in `folder`, in place; without
    one they keep those of the scores in the data. Returns a line about the training pairs' margins.

    name: "reward" or "cost", whichever judges their view. Raises UserError when a pair has no margin.
    """
    if folder:
        score_model = load_score_model(folder, template, dtype, device)
        for pairs in (train, held_out):
            texts = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
            scores = np.reshape(score(*score_model, texts, device=device, batch_size=64) if texts else [], (-1, 2))
            for pair, (chosen, rejected) in zip(pairs, scores.tolist()):
                pair.margin = score_margin(name, chosen, rejected)
    margins = [pair.margin for pair in train]
    if None in margins:
        raise UserError(f"no margins: {margins.count(None)} of {len(margins)} pairs have no scores.{name}; name a "
                        f"score model with --{name}_model, or score the data (eval.py --score)")
    return (f"margins by {folder or 'the scores in the data'}: mean {np.mean(margins):.3g}, clipped to 0 in "
            f"{margins.count(0.0) / len(margins):.1%} of the pairs")


@torch.no_grad()
def response_logps(model, encoded, batch_size, dtype="float32", device="cpu"):
    """log π(y|x) of every response of an encoded set: (N, R) float32 on the CPU, in nats."""
    logps = torch.empty(len(encoded), encoded.bounds.shape[1] - 2)
    bar = tqdm(batches(encoded, batch_size, device), desc="log-probs", unit="batch", leave=False,
               total=math.ceil(len(encoded) / batch_size))
    for indices, batch in bar:
        with precision(dtype, device):
            logps[indices] = policy_logps(model, batch).cpu()
    return logps


LOGPS_CACHE = Path("out/cache")  # may be deleted at any time
LOGPS_BATCH = 32  # pairs; not --batch_size, as how a batch is packed changes the last bits of a log-prob


def cached_logps(model, encoded, dtype="float32", device="cpu"):
    """`response_logps` of a model as it is, kept under out/cache by a hash of all that they depend on: weights, experts
    in use, tokens and precision. Every run that needs the same finds them."""
    digest = hashlib.blake2b(dtype.encode(), digest_size=16)
    experts = dict(expert_layers(model))
    used = {name: layer.router.weights for name, layer in experts.items() if layer.enabled}
    for name, tensor in (*model.state_dict().items(), *used.items()):
        if used or not is_mixture(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    for array in (encoded.tokens, encoded.bounds):
        digest.update(np.ascontiguousarray(array))
    path = LOGPS_CACHE / f"logps-{digest.hexdigest()}.safetensors"
    if path.is_file():
        return load_file(path)["logps"]
    logps = response_logps(model, encoded, LOGPS_BATCH, dtype, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file({"logps": logps}, temporary)
    return logps


BLOCK = 256  # rows that are scored and written at a time


def score_file(path, models, out, template=None, max_len=2048, batch_size=16, dtype="float32", device="cpu",
               skip_bad_rows=False):
    """Write every row of a preference file with `scores` added: {"reward": [a number for each response], …}.

    models: name -> folder or hub id. Rows keep their order. An interrupted call leaves out.<hash>.partial, with which
    the next one goes on; the hash of rows, models and settings keeps other scores out of it.
    """
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise UserError(f"--score {path}: no such file")
    folders = {name: find_folder(model) for name, model in models.items()}
    weights = [(name, files_hash(folder)) for name, folder in folders.items()]
    work = content_hash([path], weights, template, max_len, dtype, skip_bad_rows)
    score_models = {name: load_score_model(folder, template, dtype, device) for name, folder in folders.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{work[:12]}.partial")
    partial.touch()
    with open(partial, "r+b") as file:
        whole = [len(line) for line in file if line.endswith(b"\n")]
        file.truncate(sum(whole))  # a line that a kill cut short is written again
    counts = Counter()
    rows = (row for row in read_rows([path], counts, skip_bad_rows) if row[1] is not None)  # not those of messages
    for _ in itertools.islice(rows, len(whole)):
        pass
    with open(partial, "a", encoding="utf-8") as file, tqdm(initial=len(whole), desc="scores", unit="row") as bar:
        while block := list(itertools.islice(rows, BLOCK)):
            texts = [(prompt, response) for _, prompt, responses, *_ in block for response in responses]
            scores = {name: iter(score(*score_model, texts, max_len, batch_size, device))
                      for name, score_model in score_models.items()}
            for row, _, responses, *_ in block:
                added = {name: list(itertools.islice(values, len(responses))) for name, values in scores.items()}
                row["scores"] = {**(row["scores"] or {}), **added}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(block))
    partial.replace(out)
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f": scored by {', '.join(models)}, in {out}")


def load_scorer(name, template, max_len, batch_size, dtype, device):
    """(short name, function of [(prompt, response)] to scores) of a score model, or of a Python function of your own,
    "module:function", which is called with a prompt and a response and returns a number."""
    if ":" in name and not Path(name).exists():
        module, _, function = name.partition(":")
        sys.path.insert(0, ".")
        try:
            score_one = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--reward_model {name}: {first_line(error)}") from None
        return function, lambda texts: [float(score_one(prompt, response)) for prompt, response in texts]
    score_model = load_score_model(name, template, dtype, device)
    return Path(name).name, lambda texts: score(*score_model, texts, max_len, batch_size, device)


def read_prompts(path):
    """The prompts of a file: a line of text each, or .jsonl rows that have a "prompt". Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--make_pairs {path}: no such file")
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in read_lines(path):
            try:
                prompts.append(get_prompt(parse_line(line)))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    else:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--make_pairs {path}: no prompts")
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def make_pairs(path, policy, scorers, out, template=None, samples=4, max_new_tokens=64, temperature=1.0, batch_size=16,
               dtype="float32", device="cpu", seed=0):
    """Sample responses to each prompt from a policy, and for each scorer write the best against the worst of them:
    {"prompt", "chosen", "rejected", "ended", "group": the scorer, "scores"}; none where all responses score alike.

    This is the protocol of Mix-DPO's IMDb study (arXiv 2510.08256, Section 5): GPT-2, several rewards, one data set.
    """
    prompts, out = read_prompts(path), Path(out)
    folder = find_folder(policy)
    model, tokenizer = Transformer.from_pretrained(folder, DTYPES[dtype], device).eval(), Tokenizer(folder, template)
    tokens = tokenizer.encode([tokenizer.render(prompt) for prompt in prompts])
    stops, counts, rows = {*model.config.eos_ids, *tokenizer.stop_ids}, Counter(), []
    for start in tqdm(range(0, len(prompts), batch_size), desc="pairs", unit="batch"):
        batch = [(prompt, ids) for prompt, ids in zip(prompts[start:start + batch_size], tokens[start:])
                 for _ in range(samples)]
        outputs = generate(model, [ids for _, ids in batch], max_new_tokens, temperature, eos_ids=stops, seed=seed)
        texts = [(prompt, tokenizer.answer(before, ids)) for (prompt, before), ids in zip(batch, outputs)]
        for name, scorer in scorers:
            scores = scorer(texts)
            for i in range(0, len(texts), samples):
                best, worst = (f(range(i, i + samples), key=lambda j: scores[j]) for f in (max, min))
                if scores[best] > scores[worst]:
                    rows.append({"prompt": texts[i][0], "chosen": texts[best][1], "rejected": texts[worst][1],
                                 "ended": [outputs[j][-1] in stops for j in (best, worst)], "group": name,
                                 "scores": {name: [scores[best], scores[worst]]}})
                counts[name] += scores[best] > scores[worst]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(prompts)} prompts, {samples} responses each; pairs: "
          + ", ".join(f"{count} {name}" for name, count in counts.items()) + f", in {out}")


# Command lines, of this program and of train.py: a flag is declared once, as a field of a dataclass


def setting(default, help, heading="", choices=(), read=None, free=False, least=None, above=None, below=None,
            most=None):
    """A field that is a flag. heading: starts a group of --help; read: flag's text -> value; free: may change when a
    run is resumed; the rest are bounds, of each number where there are several."""
    return field(default=default, metadata=dict(help=help, heading=heading, choices=choices, read=read, free=free,
                                                bounds=(least, above, below, most)))


def numbers(text):
    """"0.5,1" -> (0.5, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, not {text!r}") from None


def source_names(text):
    """"a,b" -> ("a", "b"); a path with a comma in it is one. Such a flag may also be given several times."""
    return (text,) if Path(text).exists() else tuple(text.split(","))


def weighted_names(text):
    """"help=2,harm" -> (("help", 2.0), ("harm", 1.0)); "help,harm" -> (("help", None), ("harm", None))."""
    parts = [part.partition("=") for part in text.split(",") if part]
    if len({name for name, _, _ in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"a name stands there twice: {text}")
    try:
        shares = [float(share or 1) if "=" in text else None for _, _, share in parts]
    except ValueError:
        shares = [math.nan]
    if not all(share is None or 0 < share < math.inf for share in shares):
        raise argparse.ArgumentTypeError(f"a share must be a number more than 0: {text}")
    return tuple((name, share) for (name, _, _), share in zip(parts, shares))


def check_values(settings, values):
    """Raise UserError for a value that is not one of its field's choices, or out of its bounds."""
    for flag in fields(settings):
        value, (least, above, below, most) = values.get(flag.name), flag.metadata["bounds"]
        if value is not None and flag.metadata["choices"] and value not in flag.metadata["choices"]:
            raise UserError(f"--{flag.name} {value}: choose from {', '.join(filter(None, flag.metadata['choices']))}")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, (int, float)):
                continue
            wrong = ("not a finite number" if not math.isfinite(number) else
                     f"must be at least {least}" if least is not None and number < least else
                     f"must be more than {above}" if above is not None and number <= above else
                     f"must be less than {below}" if below is not None and number >= below else
                     f"must be at most {most}" if most is not None and number > most else "")
            if wrong:
                raise UserError(f"--{flag.name} {number}: {wrong}")


class Parser(argparse.ArgumentParser):
    """The parser of a dataclass of flags: its result has the given ones only. values: what --help shows as defaults;
    hidden: flags that --help leaves out."""

    def __init__(self, settings, program, description, values, hidden=()):
        super().__init__(prog=program, description=description, usage=f"{program} [flags]", allow_abbrev=False,
                         add_help=False, argument_default=argparse.SUPPRESS)
        for flag in fields(settings):
            if flag.metadata["heading"]:
                group = self.add_argument_group(flag.metadata["heading"])
            choices, value = filter(None, flag.metadata["choices"]), values.get(flag.name)
            help = ": ".join(filter(None, (flag.metadata["help"], ", ".join(choices))))
            if not (value is None or value is False or value in ("", ())):
                help += f" (default: {','.join(map(str, value)) if isinstance(value, tuple) else value})"
            help = argparse.SUPPRESS if flag.name in hidden else help.replace("%", "%%")
            if flag.type is bool:
                group.add_argument(f"--{flag.name}", action="store_true", help=help)
            else:
                kind = flag.type.__name__ if flag.type in (int, float) else "text"
                group.add_argument(f"--{flag.name}", type=flag.metadata["read"] or flag.type, metavar=kind, help=help,
                                   action="extend" if flag.metadata["read"] is source_names else "store")
        self.add_argument("--help", action="store_true", help="show this text and stop")

    def error(self, message):
        """One line instead of argparse's page of usage, with the nearest flag where one was mistyped."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown.startswith("-") else []
        raise UserError(message + (f"; did you mean {near[0]}?" if near else ""))


@contextmanager
def stop_signals():
    """Yield a list that is no longer empty once Ctrl-C or SIGTERM came; a second one ends the program at once."""
    came, before = [], {}

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_command(main, name, interrupted):
    """Run a program's main; a mistake of the user, or Ctrl-C, ends it with one line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {interrupted}")


@dataclass(frozen=True)
class Settings:
    """The flags of this program."""
    split: str = setting("test", "toy prompts", "runs", ("dev", "test"))
    temperature: float = setting(0.7, "of the answers", least=0)
    static: str = setting("", "with the experts of the runs merged at these fixed weights: 0.5,0.5")
    merge: str = setting("", "run folder whose expert is merged into a plain checkpoint, --out; several at --static")
    export: str = setting("", "run folder of a mixture: --out gets a PEFT adapter for each expert, and gate.json")
    make_pairs: str = setting("", "file of prompts that --model answers; --reward_model A,B,C, score models or Python "
                                  "functions module:function, make pairs of the answers", "preference data")
    score: str = setting("", "preference file whose responses are scored")
    out: str = setting("", "folder of --merge or --export; .jsonl file of --score or --make_pairs")
    model: str = setting("", "the policy of --make_pairs: a folder or hub id")
    samples: int = setting(4, "answers to each prompt of --make_pairs", least=2)
    max_new_tokens: int = setting(64, "tokens of each such answer", least=1)
    seed: int = setting(0, "of such answers", least=0)
    reward_model: str = setting("", "score model of helpfulness: a folder or hub id")
    cost_model: str = setting("", "score model of harm, more than 0 being unsafe: a folder or hub id")
    template: str = setting(None, "prompt format of --model, or of --score's models", choices=TEMPLATE_NAMES)
    score_template: str = setting(None, "prompt format of --make_pairs' score models", choices=TEMPLATE_NAMES)
    max_len: int = setting(2048, "tokens of prompt and response for score models", least=8)
    batch_size: int = setting(16, "responses at a time", least=1)
    dtype: str = setting("float32", "of the score models", choices=tuple(DTYPES))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps, …")
    skip_bad_rows: bool = setting(False, "leave out and count the rows that cannot be used, instead of stopping")


def evaluate_runs(runs, args):
    """Evaluate finished toy runs, each beside the base that it started from, and print one table."""
    reports = {}
    for run in runs:
        policy, tokenizer, config = load_policy(run, args.dtype, args.device)
        if config["model"] != "toy":
            raise UserError(f"{run}: only the toy world has a judge here; this run is about {config['model']}")
        if args.static:
            policy = merge_static(policy, args.static)
        base = Transformer.from_pretrained(config["base"], DTYPES[args.dtype], args.device)
        report, _ = evaluate_run(policy, base, tokenizer, run, args.split, config["seed"], args.temperature,
                                 args.static, toy_preferences(config))
        reports[f"{run} at {args.static}" if args.static else str(run)] = report
    print(closing_tables(reports))


def write_out(args):
    """--merge and --export: what was trained, in formats that other software reads."""
    if not args.out or Path(args.out).exists():
        raise UserError(f"--out {args.out}: name a folder that is not there yet")
    policy, tokenizer, config = load_policy(args.merge or args.export, args.dtype, args.device)
    if args.merge:
        template = tokenizer.chat_template if config["template"] in TEMPLATES else None
        merge_static(policy, args.static).save_pretrained(args.out, template)
    else:
        export_experts(policy, args.out, config["template"])
    print(f"{args.merge or args.export}: written to {args.out}")


def main(argv=None):
    parser = Parser(Settings, "eval.py", __doc__.partition("\n")[0], vars(Settings()))
    parser.add_argument("runs", nargs="*", default=[], help="run folders of train.py")
    given = vars(parser.parse_args(argv))
    runs = given.pop("runs")
    if given.pop("help", False):
        return parser.print_help()
    check_values(Settings, given)
    args = Settings(**given)
    if args.make_pairs:
        if not (args.model and args.reward_model and args.out.endswith(".jsonl")):
            raise UserError("--make_pairs needs --model, --reward_model and --out FILE.jsonl")
        scorers = [load_scorer(name, args.score_template, args.max_len, args.batch_size, args.dtype, args.device)
                   for name in source_names(args.reward_model)]
        make_pairs(args.make_pairs, args.model, scorers, args.out, args.template, args.samples, args.max_new_tokens,
                   args.temperature, args.batch_size, args.dtype, args.device, args.seed)
    elif args.score:
        models = {name: model for name, model in (("reward", args.reward_model), ("cost", args.cost_model)) if model}
        if not models or not args.out.endswith(".jsonl"):
            raise UserError("--score needs --out FILE.jsonl and at least one of --reward_model and --cost_model")
        score_file(args.score, models, args.out, args.template, args.max_len, args.batch_size, args.dtype, args.device,
                   args.skip_bad_rows)
    elif args.merge or args.export:
        write_out(args)
    elif runs:
        evaluate_runs(runs, args)
    else:
        raise UserError("name the run folders to evaluate, or a file to --score")


if __name__ == "__main__":
    as_command(main, "eval.py", "interrupted")
