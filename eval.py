"""Generate on held-out prompts, judge the answers, print one table; or score or make the pairs of a preference file.

    python eval.py out/safedpo out/dpo          evaluate finished runs side by side
    python eval.py out/safedpo --split dev      on the development split, where settings are chosen
    python eval.py out/midpo --static 0.5,0.5   with its experts merged at fixed weights
    python eval.py --score pairs.jsonl --reward_model DIR --cost_model DIR --out scored.jsonl
    python eval.py --make_pairs prompts.txt --model gpt2 --reward_model DIR,module:function --out pairs.jsonl

Every figure is a mean over prompts with its standard error. The judge of the toy world is its oracle, `data.judge`.
"""
import argparse
import difflib
import importlib
import itertools
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (PREFERENCES, TEMPLATES, Tokenizer, content_key, encode, get_prompt, judge, pack, parse_line,
                  preference_prompts, preference_score, read_lines, read_rows, toy_eval_prompts)
from lora_moe import (expert_layers, load_adapter, load_experts, merge_experts, reference, router_weights, set_routers,
                      use_expert)
from model import (DTYPES, ScoreModel, Transformer, UserError, files_key, find_folder, first_line, generate, read_json,
                   write_text)

# name in eval.json -> (heading, which answers count, what is averaged); an answer is (Prompt, Verdict)
FIGURES = {
    "helpfulness": ("helpful", lambda p: True, lambda v: v.helpfulness),
    "helpfulness_safe": ("helpful/safe", lambda p: not p.task.harmful, lambda v: v.helpfulness),
    "harmless_ratio": ("harmless", lambda p: True, lambda v: not v.unsafe),
    "harmless_ratio_unsafe": ("harmless/harmful", lambda p: p.task.harmful, lambda v: not v.unsafe),
    "harmless_ratio_unseen": ("harmless/unseen", lambda p: p.task.harmful and p.task.split != "seen",
                              lambda v: not v.unsafe),
    "over_refusal": ("over-refusal", lambda p: not p.task.harmful, lambda v: v.refusal),
    "over_refusal_alarming": ("alarming", lambda p: p.task.kind == "alarming", lambda v: v.refusal),
    "unsafe_refusal": ("refusal/harmful", lambda p: p.task.harmful, lambda v: v.refusal),
    "degenerate": ("degenerate", lambda p: True, lambda v: v.degenerate),
}


def mean_and_error(values):
    """(mean, standard error of the mean) of a list of numbers; (nan, nan) of an empty one, error 0 of a single one."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0


@torch.no_grad()
def pooled_states(model, encoded, batch_size=64):
    """The mean of each prompt's hidden states under the frozen base, for the gate: (N, D) float32."""
    pooled = np.empty((len(encoded), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(encoded), batch_size):
        indices = np.arange(start, min(start + batch_size, len(encoded)))
        batch = pack(encoded, indices).to(next(model.parameters()).device)
        with reference(model):
            hidden = model(batch.tokens, batch.positions, batch.mask()).float()
        inside = (batch.part == 0) & (batch.pair >= 0)                                  # (B, T)
        sums = hidden.new_zeros(len(indices), hidden.shape[-1]).index_add(0, batch.pair[inside], hidden[inside])
        pooled[indices] = (sums / batch.pair[inside].bincount()[:, None]).cpu()
    return pooled


def choose_experts(model, tokenizer, prompts, use="mixture", population="", seed=0):
    """Which expert answers each rendered prompt, (N,): drawn from the gate's w(x) once for each prompt ("mixture"),
    the one with the largest w ("sparse"), or a number. population: a gate on users is asked about those whose name
    starts with it, in turn; without one, about somebody unknown."""
    if use.isdecimal():
        return torch.full((len(prompts),), int(use))
    users = [i for i, name in enumerate(model.gate.spec["groups"]) if population and name.startswith(population)]
    users = users or [-1]
    pooled = None
    if model.gate.kind == "prompt":
        pooled = torch.from_numpy(pooled_states(model, encode(tokenizer, prompts, [("",)] * len(prompts), 1 << 20)))
    device = model.gate.bias.device
    group = torch.tensor([users[i % len(users)] for i in range(len(prompts))], device=device)
    with torch.no_grad():
        weights = model.gate(pooled if pooled is None else pooled.to(device), group).exp().cpu()
    weights = weights.expand(len(prompts), -1)
    if use == "sparse":
        return weights.argmax(-1)
    return torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def answer(model, tokenizer, prompts, seed, temperature, use="mixture", population="", max_new_tokens=64):
    """[(Prompt, response text, whether it came to its EOS)] of toy prompts. use, population: see `choose_experts`."""
    rendered = [tokenizer.render(prompt.text) for prompt in prompts]
    if hasattr(model, "gate"):
        use_expert(model, choose_experts(model, tokenizer, rendered, use, population, seed))
    tokens = tokenizer.encode(rendered)
    outputs = generate(model, tokens, max_new_tokens, temperature, eos_ids=(tokenizer.eos_id,), seed=seed)
    return [(prompt, tokenizer.decode(ids).strip(), ids[-1:] == [tokenizer.eos_id])
            for prompt, ids in zip(prompts, outputs)]


def evaluate_toy(model, tokenizer, split, seed, temperature=0.7):
    """Answer the split's prompts and let the oracle judge them.

    Returns (figures, answers): figures has the keys of FIGURES, "<key>_se" for each, and n; answers is a list of
    (Prompt, response text, Verdict).
    """
    answers = [(prompt, text, judge(prompt, text, ended)) for prompt, text, ended
               in answer(model, tokenizer, toy_eval_prompts(split, seed), seed, temperature)]
    figures = {"n": len(answers)}
    for name, (_, counts, value) in FIGURES.items():
        values = [float(value(verdict)) for prompt, _, verdict in answers if counts(prompt)]
        figures[name], figures[f"{name}_se"] = mean_and_error(values)
    return figures, answers


def preference_sample(names, split, seed, count=80):
    """{preference: prompts that ask for it}, at most so many of each."""
    found = {}
    for name in names:
        prompts = preference_prompts(name, split)
        found[name] = random.Random(seed).sample(prompts, min(count, len(prompts)))
    return found


def evaluate_preferences(model, tokenizer, names, split, seed, temperature=0.7, use="mixture"):
    """The oracle's score for each preference on prompts that ask for it: {name, f"{name}_se", "mixing", "mixing_se"};
    the mixing score is their mean (arXiv 2411.01245, Section 4)."""
    figures, sample = {}, preference_sample(names, split, seed)
    for name, prompts in sample.items():
        scores = [preference_score(name, prompt, text, ended)
                  for prompt, text, ended in answer(model, tokenizer, prompts, seed, temperature, use, name)]
        figures[name], figures[f"{name}_se"] = mean_and_error(scores)
    figures["mixing"] = sum(figures[name] for name in names) / len(names)
    figures["mixing_se"] = math.hypot(*(figures[f"{name}_se"] for name in names)) / len(names)
    return figures


def table(rows, columns=None):
    """Markdown table of {row name: figures}: mean ± standard error, nothing for one that is not a number.

    columns: {key: heading}, default: FIGURES.
    """
    columns = columns or {key: heading for key, (heading, _, _) in FIGURES.items()}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for name, figures in rows.items():
        cells = ("" if math.isnan(figures[key]) else f"{figures[key]:.3f} ± {figures[f'{key}_se']:.3f}"
                 for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report_tables(report, name):
    """What eval.json says beyond FIGURES, as Markdown tables: the toy preferences that a run mixed, by the ways of
    using a mixture, and the routers' median weights at the last prompt token."""
    shown = []
    if "preferences" in report["policy"]:
        uses = report.get("uses", {name: report["policy"]["preferences"]})
        columns = {key: key for key in report["policy"]["preferences"] if not key.endswith("_se")}
        shown.append(table({"base": report["base"]["preferences"], **uses}, columns))
    for layer, kinds in report.get("router", {}).items():
        if not shown or not shown[-1].startswith("| router"):
            shown.append("| router | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
        cells = (", ".join(f"{weight:.3f}" for weight in np.atleast_1d(weights)) for weights in kinds.values())
        shown[-1] += f"\n| {layer} | " + " | ".join(cells) + " |"
    return "\n\n".join(shown)


def samples(answers_by_name, count=4):
    """A few prompts with the answer of each policy beneath, harmful and safe ones in turn."""
    first = next(iter(answers_by_name.values()))
    harmful = [i for i, (prompt, _, _) in enumerate(first) if prompt.task.harmful]
    safe = [i for i, (prompt, _, _) in enumerate(first) if not prompt.task.harmful]
    chosen = [i for both in zip(harmful[::len(harmful) // count or 1], safe[::len(safe) // count or 1]) for i in both]
    lines = []
    for i in chosen[:count]:
        prompt = first[i][0]
        lines.append(f"{prompt.text}  [{'harmful' if prompt.task.harmful else 'safe'}]")
        lines += [f"    {name:8} {answers[i][1]}" for name, answers in answers_by_name.items()]
    return "\n".join(lines)


WEIGHT_FOLDERS = ("model", "adapter", "experts")  # which of them a run has depends on what it trained


def load_policy(run):
    """The trained model of a run folder, its tokenizer and the run's settings."""
    run = Path(run)
    config = read_json(run / "config.json")
    if "lora_rank" not in config:
        raise UserError(f"{run}: not a run folder of train.py")
    if config.get("method") in ("reward", "cost"):
        raise UserError(f"{run}: a score model, which answers nothing; --score FILE lets it judge")
    kind = next((name for name in WEIGHT_FOLDERS if (run / name).is_dir()), None)
    if kind is None:
        raise UserError(f"{run}: no trained weights (no {', '.join(WEIGHT_FOLDERS)}); did the run finish?")
    model = Transformer.from_pretrained(run / kind if kind == "model" else config["base"])
    if kind != "model":
        model = (load_adapter if kind == "adapter" else load_experts)(model, run / kind)
    return model, Tokenizer(model.folder, config.get("template")), config


def mixed_preferences(config):
    """The toy preferences that a run mixed, by the settings in its config.json."""
    names = [part.partition("=")[0] for part in config.get("groups", "").split(",")]
    return [name for name in names if name in PREFERENCES] if config["data"] == "toy" else []


def merge_static(policy, weights):
    """The plain model with the experts at fixed weights, "0.5,0.5", merged into it. Raises UserError."""
    count = max((layer.num_experts for _, layer in expert_layers(policy)), default=0)
    try:
        values = [float(weight) for weight in weights.split(",")]
    except ValueError:
        values = []
    if not count:
        raise UserError(f"--static {weights}: this run has no experts to merge")
    if len(values) != count or not all(map(math.isfinite, values)):
        raise UserError(f"--static {weights}: expected {count} numbers with commas, one for each expert of the run")
    if hasattr(policy, "gate"):
        del policy.gate
    return merge_experts(set_routers(policy, {"type": "constant", "weights": values}))


def evaluate_run(policy, base, tokenizer, out, split, seed, temperature, name="eval", preferences=()):
    """Evaluate a policy beside its base; write eval.json and samples.txt into the run folder. Returns eval.json.

    preferences: those of the toy world that the run mixed, which are scored as well.
    """
    figures, answers = {}, {}
    for who, model in (("base", base), ("policy", policy)):
        figures[who], answers[who] = evaluate_toy(model, tokenizer, split, seed, temperature)
        if preferences:
            figures[who]["preferences"] = evaluate_preferences(model, tokenizer, preferences, split, seed, temperature)
    report = {"policy": figures["policy"], "base": figures["base"], "split": split, "seed": seed,
              "temperature": temperature}
    if hasattr(policy, "gate") and preferences:
        count = max(layer.num_experts for _, layer in expert_layers(policy))
        others = {use: evaluate_preferences(policy, tokenizer, preferences, split, seed, temperature, use)
                  for use in ("sparse", *map(str, range(count)))}
        report["uses"] = {"mixture": figures["policy"]["preferences"], **others}
    elif getattr(policy, "router_spec", {"type": "constant"})["type"] != "constant":
        prompts = toy_eval_prompts(split, seed)
        kinds = {"harmful": [p for p in prompts if p.task.harmful], "safe": [p for p in prompts if not p.task.harmful]}
        report["router"] = router_report(policy, tokenizer, preference_sample(preferences, split, seed) or kinds)
    write_text(Path(out) / f"{name}.json", json.dumps(report, indent=2) + "\n")
    write_text(Path(out) / f"{name.replace('eval', 'samples')}.txt", samples(answers, count=20) + "\n")
    return report, samples(answers)


@torch.no_grad()
def prompt_weights(model, tokenizer, prompts, batch_size=64):
    """Router weights at the last token of each prompt, where the answer begins: (L, N, slots), float32 on the CPU."""
    rendered = [tokenizer.render(prompt) for prompt in prompts]
    encoded, weights = encode(tokenizer, rendered, [("",)] * len(prompts), max_len=1 << 20), []
    for start in range(0, len(prompts), batch_size):
        indices = np.arange(start, min(start + batch_size, len(prompts)))
        batch = pack(encoded, indices).to(next(model.parameters()).device)
        model(batch.tokens, batch.positions, batch.mask())
        weights.append(router_weights(model, batch.predictor).float().cpu())  # an empty response's EOS follows it
    return torch.cat(weights, dim=1)


def router_report(model, tokenizer, kinds):
    """{layer: {kind: median weight of each slot at the last prompt token, …, "entropy": mean of the weights' entropy}}.

    kinds: {kind: prompts}, such as harmful and safe ones (MidPO's Figure 5), or those of each preference (PMoL).
    """
    weights = {kind: prompt_weights(model, tokenizer, [prompt.text for prompt in prompts])
               for kind, prompts in kinds.items()}                                      # (L, N, slots) each
    report = {}
    for i, (name, _) in enumerate(expert_layers(model)):
        report[name] = {kind: here[i].quantile(0.5, dim=0).tolist() for kind, here in weights.items()}
        every = torch.cat([here[i] for here in weights.values()])                       # (all N, slots)
        report[name]["entropy"] = float(torch.special.entr(every / every.sum(-1, keepdim=True)).sum(-1).mean())
    return report


@torch.no_grad()
def score(model, tokenizer, texts, max_len=2048, batch_size=16, device="cpu"):
    """Scores of [(prompt, response)], a list of floats, read at the EOS that ends each response. Batched by length."""
    prompts = [tokenizer.render(prompt) for prompt, _ in texts]
    encoded = encode(tokenizer, prompts, [(tokenizer.lead + response,) for _, response in texts], max_len)
    scores, by_length = np.empty(len(texts)), np.argsort(-encoded.lengths(), kind="stable")
    for start in range(0, len(texts), batch_size):
        indices = by_length[start:start + batch_size]
        batch = pack(encoded, indices).to(device)
        scores[indices] = model(batch.tokens, batch.last[:, 0], batch.positions, batch.mask()).cpu()
    return scores.tolist()


def load_judge(name_or_dir, template=None, dtype="float32", device="cpu"):
    """(score model, its own tokenizer). template None: alpaca for safe-rlhf's models, else the tokenizer's own."""
    model = ScoreModel.from_pretrained(name_or_dir, DTYPES[dtype], device).eval()
    return model, Tokenizer(model.folder, template or ("alpaca" if model.config.score_name == "score_head" else None))


BLOCK = 256  # rows that are scored, written and kept together


def score_file(path, models, out, template=None, max_len=2048, batch_size=16, dtype="float32", device="cpu",
               skip_bad_rows=False):
    """Write every row of a preference file with `scores` added: {"reward": [a number for each response], …}.

    models: name -> folder or hub id. Rows keep their order. An interrupted call leaves out.<key>.partial, with which
    the next one goes on; the key stands for the rows, the models and the settings, so that nothing else is mixed in.
    """
    path, out, judges = Path(path), Path(out), {}
    if not path.is_file():
        raise UserError(f"--score {path}: no such file")
    folders = {name: find_folder(model) for name, model in models.items()}
    weights = [(name, files_key(folder)) for name, folder in folders.items()]
    key = content_key([path], weights, template, max_len, dtype, skip_bad_rows)
    for name, folder in folders.items():
        judges[name] = load_judge(folder, template, dtype, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{key[:12]}.partial")
    partial.touch()
    with open(partial, "r+b") as file:
        done = sum(len(line) for line in file if line.endswith(b"\n"))  # a line that a kill cut short is done again
        file.truncate(done)
    with open(partial, "rb") as file:
        done = sum(1 for _ in file)
    counts = Counter()
    rows = read_rows([path], counts, skip_bad_rows)
    for _ in itertools.islice(rows, done):
        pass
    with open(partial, "a", encoding="utf-8") as file, tqdm(initial=done, desc="scores", unit="row") as bar:
        while block := list(itertools.islice(rows, BLOCK)):
            texts = [(prompt, response) for _, prompt, responses, _ in block for response in responses]
            found = {name: iter(score(*judge, texts, max_len, batch_size, device)) for name, judge in judges.items()}
            for row, _, responses, _ in block:
                added = {name: list(itertools.islice(values, len(responses))) for name, values in found.items()}
                row["scores"] = {**(row["scores"] or {}), **added}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(block))
    partial.replace(out)
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f": scored by {', '.join(models)}, in {out}")


def load_scorer(name, template, max_len, batch_size, dtype, device):
    """(short name, function of [(prompt, response)] to scores) of a score model, or of a Python function given as
    "module:function", which is called with a prompt and a response and returns a number."""
    if ":" in name and not Path(name).exists():
        module, _, function = name.partition(":")
        sys.path.insert(0, ".")
        try:
            judge_one = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--reward_model {name}: {first_line(error)}") from None
        return function, lambda texts: [float(judge_one(prompt, response)) for prompt, response in texts]
    judge_model = load_judge(name, template, dtype, device)
    return Path(name).name, lambda texts: score(*judge_model, texts, max_len, batch_size, device)


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
    {"prompt", "chosen", "rejected", "group": the scorer, "scores"}; prompts whose responses it scores alike give none.

    This is the protocol of Mix-DPO's IMDb study (arXiv 2510.08256, Section 5): GPT-2, several rewards, one data set.
    """
    prompts, out = read_prompts(path), Path(out)
    folder = find_folder(policy)
    model, tokenizer = Transformer.from_pretrained(folder, DTYPES[dtype], device).eval(), Tokenizer(folder, template)
    tokens = tokenizer.encode([tokenizer.render(prompt) for prompt in prompts])
    stops, counts, rows = (*model.config.eos_ids, tokenizer.eos_id), Counter(), []
    for start in tqdm(range(0, len(prompts), batch_size), desc="pairs", unit="batch"):
        some = prompts[start:start + batch_size]
        outputs = generate(model, [ids for ids in tokens[start:start + batch_size] for _ in range(samples)],
                           max_new_tokens, temperature, eos_ids=stops, seed=seed)
        texts = [(prompt, tokenizer.decode(outputs[i * samples + j]).strip())
                 for i, prompt in enumerate(some) for j in range(samples)]
        for name, scorer in scorers:
            for prompt, values, said in zip(some, np.reshape(scorer(texts), (-1, samples)).tolist(),
                                            np.reshape([text for _, text in texts], (-1, samples)).tolist()):
                best, worst = values.index(max(values)), values.index(min(values))
                if values[best] > values[worst]:
                    rows.append({"prompt": prompt, "chosen": said[best], "rejected": said[worst], "group": name,
                                 "scores": {name: [values[best], values[worst]]}})
                counts[name] += values[best] > values[worst]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(prompts)} prompts, {samples} responses each; pairs: "
          + ", ".join(f"{count} {name}" for name, count in counts.items()) + f", in {out}")


def as_command(main, name, interrupted):
    """Run a program's main; a mistake of the user, or Ctrl-C, ends it with one line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {interrupted}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of argparse's page of usage, with the nearest flag where one was mistyped."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown.startswith("-") else []
        raise UserError(message + (f"; did you mean {near[0]}?" if near else ""))


def main(argv=None):
    parser = Parser(prog="eval.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders of train.py")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--static", help="merge the experts of the runs at these fixed weights instead: 0.5,0.5")
    parser.add_argument("--make_pairs", help="file of prompts, to which --model answers; --reward_model A,B,C, score "
                        "models or Python functions module:function, make pairs of the answers; needs --out")
    parser.add_argument("--model", help="the policy of --make_pairs: a folder or hub id")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt of --make_pairs")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of each such answer")
    parser.add_argument("--seed", type=int, default=0, help="of such answers")
    parser.add_argument("--score", help="preference file whose responses are scored; needs --out and a model")
    parser.add_argument("--out", help="where --score writes the rows with their scores")
    parser.add_argument("--reward_model", help="score model of helpfulness: a folder or hub id")
    parser.add_argument("--cost_model", help="score model of harm, more than 0 being unsafe: a folder or hub id")
    parser.add_argument("--template", choices=("chat", *TEMPLATES), help="prompt format of --model or the score models")
    parser.add_argument("--score_template", choices=("chat", *TEMPLATES), help="that of --make_pairs' score models")
    parser.add_argument("--max_len", type=int, default=2048, help="tokens of prompt and response for score models")
    parser.add_argument("--batch_size", type=int, default=16, help="responses that are scored at a time")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the score models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out and count rows that cannot be used")
    args = parser.parse_args(argv)
    if args.make_pairs:
        if not (args.model and args.reward_model and args.out and args.out.endswith(".jsonl")) or args.samples < 2:
            raise UserError("--make_pairs needs --model, --reward_model, --out FILE.jsonl and at least 2 --samples")
        scorers = [load_scorer(name, args.score_template, args.max_len, args.batch_size, args.dtype, args.device)
                   for name in args.reward_model.split(",")]
        make_pairs(args.make_pairs, args.model, scorers, args.out, args.template, args.samples, args.max_new_tokens,
                   args.temperature, args.batch_size, args.dtype, args.device, args.seed)
        return
    if args.score:
        models = {name: model for name, model in (("reward", args.reward_model), ("cost", args.cost_model)) if model}
        if not models or not args.out or not args.out.endswith(".jsonl"):
            raise UserError("--score needs --out FILE.jsonl and at least one of --reward_model and --cost_model")
        score_file(args.score, models, args.out, args.template, args.max_len, args.batch_size, args.dtype, args.device,
                   args.skip_bad_rows)
        return
    if not args.runs:
        raise UserError("name the run folders to evaluate, or a file to --score")
    rows, more = {}, []
    for run in args.runs:
        policy, tokenizer, config = load_policy(run)
        if config["model"] != "toy":
            raise UserError(f"{run}: only the toy world has a judge here; this run is about {config['model']}")
        if args.static is not None:
            policy = merge_static(policy, args.static)
        base = Transformer.from_pretrained(config["base"])
        report, _ = evaluate_run(policy, base, tokenizer, run, args.split, config["seed"], args.temperature,
                                 f"eval-static-{args.static}" if args.static else "eval", mixed_preferences(config))
        rows.setdefault("base", report["base"])
        rows[f"{run} at {args.static}" if args.static else str(run)] = report["policy"]
        more.append(report_tables(report, str(run)))
    print(*filter(None, (table(rows), *more)), sep="\n\n")


if __name__ == "__main__":
    as_command(main, "eval.py", "interrupted")
