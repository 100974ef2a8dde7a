"""Answer held-out prompts, judge the answers and print one table; score or make the pairs of a preference file.

    python eval.py out/safedpo out/dpo          finished toy runs side by side, judged by the oracle
    python eval.py out/safedpo --split dev      on the development split, where settings are chosen
    python eval.py out/midpo --static 0.5,0.5   with its experts merged at fixed weights
    python eval.py RUN… --prompts FILE|SOURCE   any runs, any prompts, every judge that is named
    python eval.py --merge out/safedpo --out DIR     as a plain checkpoint
    python eval.py --export out/moe-dpo --out DIR    as one PEFT adapter for each expert, and gate.json
    python eval.py --score pairs.jsonl --reward_model DIR --cost_model DIR --out scored.jsonl
    python eval.py --make_pairs prompts.txt --model gpt2 --reward_model DIR,module:function --out pairs.jsonl
"""
import csv
import json
import math
import re
from collections import ChainMap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

import toy
from batch import Encoded, encode
from checkpoint import (cached_logps, export_experts, find_folder, load_policy, load_start, load_with_tokenizer,
                        read_config, save_model, started_from, weights_hash)
from common import (CACHE, DTYPES, Parser, UserError, appending, as_command, check_device, check_read, check_values,
                    content_hash, files_hash, first_line, one_line, progress, read_json, setting, source_names,
                    whole_rows, write_text)
from data import check_source, get_prompt, load_sources, parse_line, read_lines, source_files
from judges import health, judge_answers, load_scorer, make_pairs, score_answers, score_file, score_models
from lora_moe import (choose_experts, count_experts, gate_of, gate_report, is_routed, merge_experts, set_routers,
                      use_expert)
from methods import SharedFlags
from model import stream
from report import (load_pyplot, markdown_table, means_and_errors, plot, router_report, router_table, terminal_table,
                    win_rate)
from runs import ALONE, Processes, read_settings


# Prompts and answers


def read_prompts(name, count=0, seed=0, held_out=0.02):
    """[{"prompt", "label", "chosen"}], each prompt once, the first `count` of them (0: all). A .txt file has a prompt
    on each line, a .csv file a column of them, a row of a .jsonl file a "prompt", text or messages; label is "safe",
    "unsafe" or None. Another name is a preference source: the prompts that it holds out (see `load_comparisons`), with
    the better response as `chosen`. Raises UserError."""
    path, rows, number = Path(name), [], 0
    if path.suffix not in (".txt", ".csv", ".jsonl"):
        check_source(name)
        held = load_sources((name,), seed, held_out)[1]
        rows = [dict(prompt=c.prompt, chosen=c.responses[c.better]) for c in held if c.responses[c.better].strip()]
    elif not path.is_file():
        raise UserError(f"{name}: no such file")
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file)
                columns = ("prompt", "goal", "Behavior")  # XSTest's, AdvBench's and HarmBench's
                column = next((column for column in columns if column in (table.fieldnames or ())), None)
                if column is None:
                    raise UserError(f"no column {', '.join(columns)}")
                rows = [dict(row, prompt=text) for row in table if (text := (row[column] or "").strip())]
        for number, line in read_lines(path) if path.suffix in (".txt", ".jsonl") else ():
            row = parse_line(line) if path.suffix == ".jsonl" else {"prompt": line.decode("utf-8").strip()}
            rows.append(dict(prompt=get_prompt(row), label=row.get("label")))
    except (UserError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}{f':{number}' if number else ''}: {first_line(error)}") from None
    unique = {}
    for row in rows:
        label = row["label"] if row.get("label") in ("safe", "unsafe") else None
        unique.setdefault(json.dumps(row["prompt"]), dict(prompt=row["prompt"], label=label, chosen=row.get("chosen")))
    if not unique:
        raise UserError(f"{name}: no prompts")
    return [*unique.values()][:count or None]


def answers_as_they_end(model, tokenizer, prompts, seed, temperature, top_p=1.0, use="mixture", users="",
                        max_new_tokens=64, batch_size=None, skip=(), show_progress=False):
    """Yield {"prompt", "number", "answer", "ids", "ended", "expert"} of each prompt, text or messages, batch_size at a
    time (default: all). skip: numbers of prompts that are left out. What comes does not depend on the batch."""
    left = [i for i in range(len(prompts)) if i not in skip]
    if not left:
        return
    rendered = list(tokenizer.render_all(prompts))
    experts = choose_experts(model, tokenizer, rendered, use, users, seed)[left] if gate_of(model) else None
    tokens, stops = tokenizer.encode([rendered[i] for i in left]), {*tokenizer.stop_ids, *model.config.eos_ids}
    prepare = None if experts is None else lambda numbers: use_expert(model, experts[numbers])
    answers = stream(model, tokens, max_new_tokens, batch_size or len(left), temperature, top_p, stops, seed, prepare)
    for i, ids in progress(answers, "answers", len(prompts), show=show_progress, initial=len(skip), unit="answer"):
        yield {"prompt": prompts[left[i]], "number": left[i], "answer": tokenizer.answer(tokens[i], ids), "ids": ids,
               "ended": ids[-1] in stops, "expert": None if experts is None else int(experts[i])}


def answer(model, tokenizer, prompts, **settings):
    """The rows of `answers_as_they_end`, in the order of the prompts."""
    return sorted(answers_as_they_end(model, tokenizer, prompts, **settings), key=lambda row: row["number"])


def kept_answers(model, tokenizer, prompts, folder, name, processes=ALONE, batch_size=None, **settings):
    """The rows of `answer`, kept in folder/answers-name-….jsonl as they come, a file for each process: an interrupted
    call goes on where it stopped."""
    tokens, folder = tokenizer.encode(tokenizer.render_all(prompts)), Path(folder)
    work = content_hash(weights_hash(model), tokens, sorted(tokenizer.stop_ids), settings)[:12]

    def read():
        return {row["number"]: row for path in folder.glob(f"answers-*-{work}*.jsonl") for row in whole_rows(path)}

    done = {i for i in range(len(prompts)) if i % processes.count != processes.rank} | read().keys()
    path = folder / f"answers-{name}-{work}{f'-{processes.rank}' if processes.rank else ''}.jsonl"
    with appending(path) as (_, append):
        for row in answers_as_they_end(model, tokenizer, prompts, **settings, batch_size=batch_size, skip=done,
                                       show_progress=processes.rank == 0):
            append(row)
    processes.gather({})  # all of them are done
    rows = read()
    return [rows[number] for number in range(len(prompts))]


# The toy world's table


def evaluate_run(policy, base, tokenizer, out, split, seed, temperature, static="", preferences=()):
    """Evaluate a policy beside its base; write eval.json and samples.txt into the run folder (eval-dev.json for the
    development split, eval-static-….json for experts merged at fixed weights). preferences: of the toy world, those
    that the run mixed: they are scored as well. Returns (eval.json, samples)."""
    settings = {"seed": seed, "temperature": temperature}
    uses = ("sparse", *map(str, range(count_experts(policy)))) if gate_of(policy) else ()
    answer_by = {"base": partial(kept_answers, base, tokenizer, folder=CACHE, name="toy", **settings),  # for other runs
                 "policy": partial(answer, policy, tokenizer, **settings)}
    report, answers = toy.report(answer_by, preferences, uses, split, seed)
    report |= {"split": split, **settings}
    if is_routed(policy):
        kinds = toy.prompts_by_kind(answers["policy"], preferences, split, seed)
        report["router"] = router_report(policy, tokenizer, kinds)
    suffix = f"-static-{static}" * bool(static) + "-dev" * (split == "dev")
    write_text(Path(out) / f"eval{suffix}.json", json.dumps(report, indent=2) + "\n")
    write_text(Path(out) / f"samples{suffix}.txt", toy.samples(answers, count=20) + "\n")
    return report, toy.samples(answers)


def merge_static(policy, weights):
    """The plain model with the experts merged at fixed weights, such as "0.5,0.5"; a single expert has weight 1."""
    count = count_experts(policy)
    if not weights and (is_routed(policy) or count > 1):
        raise UserError("--merge: a plain checkpoint has no routers or gate; --static 0.5,0.5 merges at fixed weights")
    if weights:
        with one_line(f"--static {weights}: expected numbers with commas", ValueError):
            values = [float(weight) for weight in weights.split(",")]
        if len(values) != count or not all(map(math.isfinite, values)):
            raise UserError(f"--static {weights}: expected {count} finite numbers: the run has {count} experts")
        set_routers(policy, {"type": "constant", "weights": values})
    return merge_experts(policy)


def answer_logps(model, tokenizer, prompts, answers, args, processes):
    """(2, N) nats per token: log π of every sampled answer, and of the response that the data prefers (nan without
    one); of a mixture under the expert that gave the answer."""
    rendered = list(tokenizer.render_all(row["prompt"] for row in prompts))
    pieces = [ids for prompt, row in zip(tokenizer.encode(rendered), answers) for ids in (prompt, row["ids"])]
    ends = np.cumsum([0, *map(len, pieces)])
    sets = [Encoded(np.concatenate(pieces, dtype=np.int32), np.column_stack([ends[:-1:2], ends[1::2], ends[2::2]]))]
    if all(row["chosen"] for row in prompts):
        sets.append(encode(tokenizer, rendered, [(row["chosen"],) for row in prompts],
                           min(args.max_len, model.config.max_positions)))
    logps = np.full((2, len(answers)), math.nan)
    for k in sorted({row["expert"] for row in answers}) if gate_of(model) else (None,):
        if k is not None:
            use_expert(model, k)
        answered = [k in (None, row["expert"]) for row in answers]
        for i, encoded in enumerate(sets):
            values = cached_logps(model, encoded, args.dtype, args.device, processes)[:, 0].numpy()
            logps[i, answered] = (values / np.diff(encoded.bounds)[:, 1])[answered]
    return logps


# Any prompts, any judges, one table

# key of a metric: (heading, 1 or -1: more or less of it is better, 0: neither); "/" breaks a heading in a terminal
COLUMNS = {
    "scaled": ("helpful/scaled", 1), "reward": ("reward", 1), "harmless_ratio": ("harmless/cost ≤ 0", 1),
    "harmlessness": ("harmless/−cost", 1), "wins_reward": ("wins/reward", 1), "wins_cost": ("wins/−cost", 1),
    "wins_helpful": ("wins/helpful", 1), "wins_harmless": ("wins/harmless", 1),
    "judged_helpfulness": ("judge/helpful 1-10", 1), "judged_harm": ("judge/harm 0-10", -1),
    "judged_refusal": ("judge/refused", 0), "refused": ("by rule/refused", 0),
    "refused_safe": ("by rule/refused safe", -1), "refused_unsafe": ("by rule/refused unsafe", 1),
    "kl": ("KL to start/per token", 0), "chosen": ("log-prob/of chosen", 0), "tokens": ("tokens", 0),
    "unended": ("unended", -1), "repeats": ("repeats", -1)}


def answer_prompts(model, tokenizer, prompts, folder, args, processes):
    """(a model's `kept_answers`, metrics by their log-probs: {metric: (N,)})."""
    answers = kept_answers(model, tokenizer, [row["prompt"] for row in prompts], folder, Path(args.prompts).stem,
                           processes, args.batch_size, seed=args.seed, temperature=args.temperature, top_p=args.top_p,
                           use=args.use, users=args.users, max_new_tokens=args.max_new_tokens or 512)
    logps, chosen = answer_logps(model, tokenizer, prompts, answers, args, processes)
    return answers, {"logps": logps, "chosen": chosen, "kl": np.zeros(len(prompts))}


def answer_by_all(runs, prompts, args, processes):
    """({row: answers}, {row: metrics by log-probs}, {row: the row that it started from}, {"routers": {run:
    `router_report`}, "gates": {run: `gate_report`}}). The rows are the models that the runs started from, each followed
    by its runs; the KL to the start is by the answers' log-ratios. One model is in memory at a time."""
    of_runs, groups, reports, answers, metrics, starts = {}, {}, {"routers": {}, "gates": {}}, {}, {}, {}
    for run in runs:
        policy, tokenizer, config = load_policy(run, args.dtype, args.device)
        policy = merge_static(policy, args.static) if args.static else policy
        of_runs[run] = answer_prompts(policy, tokenizer, prompts, run, args, processes)
        if is_routed(policy):
            by_label = {}
            for prompt, row in zip(prompts, of_runs[run][0]):
                by_label.setdefault(prompt["label"] or "all", []).append((row["prompt"], row["answer"]))
            reports["routers"][run] = router_report(policy, tokenizer, by_label)
        if gate_of(policy) and policy.gate.kind == "user":
            reports["gates"][run] = report = gate_report(policy)
            if not any(user.startswith(args.users) for user in report["users"]):
                raise UserError(f"--users {args.users}: {run} has no user whose name begins so")
        start = (config["base"], config["template"], *started_from(config))
        groups.setdefault(start, (tokenizer, config, []))[2].append(run)
        policy = None  # before the next one takes its memory
    for tokenizer, config, members in groups.values():
        start, model = f"start of {members[0]}" if answers else "start", load_start(config, args.dtype, args.device)
        answers[start], metrics[start] = answer_prompts(model, tokenizer, prompts, CACHE, args, processes)
        starts |= dict.fromkeys([start, *members], start)
        for run in members:
            answers[run], metrics[run] = of_runs[run]
            logps, _ = answer_logps(model, tokenizer, prompts, answers[run], args, processes)
            metrics[run]["kl"] = metrics[run]["logps"] - logps
        model = None
    return answers, metrics, starts, reports


def evaluate_answers(runs, args):
    """Answer prompts with runs and what they started from, judge the answers in every way that is asked for, print one
    table, and write it with all settings to --out.md and --out.json. Several processes share the answering alone."""
    baseline, judges = args.baseline or "start", {"rule": "a refusal rule (judges.py: refuses), English only"}
    address = r"https?://[\w.-]+(:\d{1,5})?(/[\w./-]*)?" if args.judge_model else ""
    if not re.fullmatch(address, args.judge):  # mistakes first, then the long work
        raise UserError("--judge, an address as http://localhost:8000/v1 without a key, and --judge_model go together")
    if "start" in runs:
        raise UserError("a run folder cannot be called start, which is a row of the table")
    unknown = {baseline, *args.scale} - {"start", *runs}
    if unknown or len(args.scale) not in (0, 2):
        raise UserError(f"--baseline names one row of the table and --scale two, of: start, {', '.join(runs)}"
                        + "".join(f"; not {name}" for name in unknown))
    processes = Processes.join()
    for kind, folder in score_models(args).items():
        read_config(find_folder(folder))
        judges[kind] = f"{folder} ({files_hash(find_folder(folder))[:12]})"
    if args.plot:
        load_pyplot()
    configs = {run: read_json(Path(run) / "config.json") for run in runs}
    splits = {(config["seed"], config["held_out"]) for config in configs.values()
              if args.prompts in config.get("data", ())}
    if len(splits) > 1 and not source_files(args.prompts)[1]:
        raise UserError(f"--prompts {args.prompts}: the runs hold out different prompts of it (--seed, --held_out)")
    prompts = read_prompts(args.prompts, args.n, *next(iter(splits), ()))
    answers, by_logps, starts, reports = answer_by_all(runs, prompts, args, processes)
    if processes.rank:
        return
    out = Path((args.out or f"out/eval-{Path(args.prompts).stem}").removesuffix(".md").removesuffix(".json"))
    judged = [by_logps, health(prompts, answers), score_answers(answers, baseline, args)]
    try:
        if args.judge:
            metrics, judges["judge"] = judge_answers(answers, baseline, args, out)
            judged.append(metrics)
    finally:  # the table of the other judges is written if this one fails
        write_table(judged, judges, starts, reports, configs, len(prompts), out, args)


def averages(metrics):
    """{key of COLUMNS: mean of the values, or share of the wins; key_se: its standard error}, nan without values."""
    row = means_and_errors({key: [v for v in metrics.get(key, ()) if v is not None] for key in COLUMNS})
    for key in [key for key in metrics if key.startswith("wins_")]:
        row[key], row[f"{key}_se"] = win_rate(metrics[key])
    return row


def write_table(judged, judges, starts, reports, configs, n, out, args):
    """Print the table on n prompts; write it to out.md, with all settings and reports to out.json, and with --plot
    pictures. judged: [{row: metrics}]; judges: {kind: name}; starts, reports: see `answer_by_all`; configs: {run: its
    settings}."""
    table = {name: averages(ChainMap(*(metrics[name] for metrics in judged))) for name in starts}
    headings = {key: heading for key, (heading, _) in COLUMNS.items()
                if any(math.isfinite(row[key]) for row in table.values())}
    baseline = args.baseline or "start"
    wins = f"wins against {baseline}, " * any(key.startswith("wins") for key in headings)
    about = [f"{n} prompts of {args.prompts}, {wins}temperature {args.temperature}, top_p {args.top_p}, "
             f"seed {args.seed}", *(f"{kind}: {judge}" for kind, judge in judges.items())]
    warnings = [f"warning: {run} answers in {growth:.1f} times as many tokens as its start; judges may like length"
                for run in configs if (growth := table[run]["tokens"] / table[starts[run]]["tokens"]) > 1.5]
    print(terminal_table(table, headings, starts), "↑ ↓: more than two standard errors away from the start", *about,
          *warnings, *(router_table(report, configs[run]) for run, report in reports["routers"].items()),
          f"written to {out}.md and {out}.json", sep="\n")
    markdown = markdown_table(table, {key: heading.replace("/", " ") for key, heading in headings.items()},
                              {key: better for key, (_, better) in COLUMNS.items() if better})
    write_text(f"{out}.md", "\n".join([markdown, "", *(f"- {line}" for line in about), ""]))
    numbers = {name: {key: None if math.isnan(row[key]) else row[key] for column in headings
                      for key in (column, f"{column}_se")} for name, row in table.items()}
    report = {"settings": asdict(args), "judges": judges, "baseline": baseline, "rows": numbers, **reports}
    write_text(f"{out}.json", json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(table, headings, *reports.values(), [*configs], out)


@dataclass(frozen=True)
class Settings(SharedFlags):
    """The flags of this program."""
    split: str = setting("test", "toy prompts", "runs", ("dev", "test"))
    prompts: str = setting("", "other prompts: a .txt, .csv or .jsonl file, or what a preference source holds out")
    n: int = setting(0, "that many of the prompts; 0: all", least=0)
    temperature: float = setting(0.7, "of the answers", least=0)
    top_p: float = setting(0.9, "share of the probability that their tokens are drawn from", above=0, most=1)
    use: str = setting("mixture", "how a mixture answers: mixture, sparse (its likeliest expert) or an expert's number")
    users: str = setting("", "users that a user gate answers for, by name or its beginning (default: the average)")
    baseline: str = setting("", "row that wins are counted against: a run (default: the model that they started from)")
    scale: tuple = setting((), "BASE,HELPFUL: rows whose mean reward becomes 0 and 10", read=source_names)
    judge: str = setting("", "address of a judge with OpenAI's interface, ending in /v1; its key: JUDGE_API_KEY")
    judge_model: str = setting("", "name of the model there")
    plot: bool = setting(False, "write pictures of the table, of routers and of the training (needs matplotlib)")
    judge_dry_run: bool = setting(False, "write the judge's requests to a file and ask nothing")
    static: str = setting("", "with the experts of the runs merged at these fixed weights: 0.5,0.5")
    merge: str = setting("", "run folder whose expert is merged into a plain checkpoint, --out; several at --static")
    export: str = setting("", "run folder of a mixture: --out gets a PEFT adapter for each expert, and gate.json")
    make_pairs: str = setting("", "prompts: pairs of answers by --reward_model DIR,module:function", "preference data")
    score: str = setting("", "preference file whose responses are scored")
    out: str = setting("", "folder (--merge, --export), .jsonl file (--score, --make_pairs) or name of a table")
    model: str = setting("", "the policy of --make_pairs: a folder or hub id")
    samples: int = setting(4, "answers to each prompt of --make_pairs", least=2)
    max_new_tokens: int = setting(None, "tokens of an answer (default: 512, of --make_pairs 64)", least=1)
    seed: int = setting(0, "of answers", least=0)
    max_len: int = setting(2048, "tokens of prompt and response for score models", least=8)
    batch_size: int = setting(16, "responses at a time", least=1)
    dtype: str = setting("float32", "of the score models", choices=tuple(DTYPES))


def evaluate_runs(runs, args):
    """Evaluate finished toy runs, each beside the base that it started from, and print one table."""
    reports, configs, gates = {}, {}, {}
    for run in runs:
        policy, tokenizer, config = load_policy(run, args.dtype, args.device)
        if config["model"] != "toy":
            raise UserError(f"{run}: this run is about {config['model']}; name what to ask it with --prompts")
        policy = merge_static(policy, args.static) if args.static else policy
        start, name = load_start(config, args.dtype, args.device), f"{run} at {args.static}" if args.static else run
        preferences = [group for group, _ in config["groups"]] if config["data"] == ["toy"] else []
        reports[name], _ = evaluate_run(policy, start, tokenizer, run, args.split, config["seed"], args.temperature,
                                        args.static, preferences)
        configs[name] = config
        if gate_of(policy) and policy.gate.kind == "user":
            gates[run] = gate_report(policy)
    print(toy.closing_tables(reports, configs))
    if args.plot:
        by_run = dict(zip(runs, reports.values()))
        rows = {"base": by_run[runs[0]]["base"]} | {run: report["policy"] for run, report in by_run.items()}
        routers = {run: report["router"] for run, report in by_run.items() if "router" in report}
        plot(rows, toy.COLUMNS, routers, gates, runs, args.out or "out/eval")


def write_pairs(args):
    """--make_pairs: sample answers of --model to every prompt, and pair the best with the worst by each scorer."""
    if not (args.model and args.reward_model and args.out.endswith(".jsonl")):
        raise UserError("--make_pairs needs --model, --reward_model and --out FILE.jsonl")
    scorers = dict(load_scorer(name, args, args.score_template) for name in source_names(args.reward_model))
    if len(scorers) < len(source_names(args.reward_model)):
        raise UserError(f"--reward_model {args.reward_model}: two of them have the same name")
    prompts = [row["prompt"] for row in read_prompts(args.make_pairs, args.n) for _ in range(args.samples)]
    model, tokenizer = load_with_tokenizer(args.model, args.template, args.dtype, args.device)
    answers = answer(model, tokenizer, prompts, seed=args.seed, temperature=args.temperature, show_progress=True,
                     max_new_tokens=args.max_new_tokens or 64, batch_size=args.batch_size * args.samples)
    pairs = make_pairs(answers, args.samples, scorers, args.batch_size)
    write_text(args.out, "".join(json.dumps(pair) + "\n" for pair in pairs))
    by_scorer = ", ".join(f"{sum(pair['group'] == name for pair in pairs)} {name}" for name in scorers)
    print(f"{len(prompts) // args.samples} prompts, {args.samples} responses each; pairs: {by_scorer}, in {args.out}")


def write_out(args):
    """--merge and --export: what was trained, in formats that other software reads."""
    if not args.out or Path(args.out).exists():
        raise UserError(f"--out {args.out or '(none)'}: name a folder that is not there yet")
    policy, tokenizer, config = load_policy(args.merge or args.export, args.dtype, args.device)
    if args.merge:
        template = tokenizer.chat_template if config["template"] not in (None, "chat") else None
        save_model(merge_static(policy, args.static), args.out, template)
    else:
        export_experts(policy, args.out, config["template"])
    print(f"{args.merge or args.export}: written to {args.out}")


PROGRAMS = {  # flag: (what it asks for, the other flags that are read, besides dtype and device)
    "merge": (write_out, "static out"), "export": (write_out, "out"),
    "make_pairs": (write_pairs, "n out model samples max_new_tokens seed temperature reward_model template "
                   "score_template max_len batch_size"),
    "score": (score_file, "out reward_model cost_model template max_len batch_size skip_bad_rows"),
    "prompts": (evaluate_answers, "n out max_new_tokens seed temperature top_p use users static baseline scale plot "
                "judge judge_model judge_dry_run reward_model cost_model score_template max_len batch_size"),
    "": (evaluate_runs, "split temperature static plot out")}


def main(argv=None):
    parser = Parser(Settings, "eval.py", __doc__.partition("\n")[0], vars(Settings()))
    parser.add_argument("runs", nargs="*", default=[], help="run folders of train.py")
    given = vars(parser.parse_args(argv))
    runs = given.pop("runs")
    if given.pop("help", False):
        return parser.print_help()
    check_values(Settings, given)
    args, asked = Settings(**given), next((flag for flag in PROGRAMS if given.get(flag)), "")
    check_device(args.device)
    for run in filter(None, (*runs, args.merge, args.export)):
        toy.one_thread(str(read_settings(Path(run)).get("base")))
    program, read = PROGRAMS[asked]
    check_read(given, dict.fromkeys(vars(args).keys() - {asked, "dtype", "device", *read.split()},
                                    f"with --{asked}" if asked else "for the toy world's table"))
    if asked not in ("prompts", ""):
        return program(args)
    if not runs:
        raise UserError("name the run folders to evaluate, or a file to --score; --help shows what else there is")
    program(runs, args)


if __name__ == "__main__":
    as_command(main, "eval.py", "interrupted")
