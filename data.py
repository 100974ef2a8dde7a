"""Preference data: rows of files -> comparisons -> pairs.

Read in this order: Comparison and Pair, a parser for each layout of rows, the files of a source and which prompts are
held out (`load_sources`), labels, and the views that order comparisons into pairs (`VIEWS`, `apply_view`).
"""
import codecs
import difflib
import gzip
import json
import lzma
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np

from common import HUB_FAILED, KINDS, NOT_JSON, UserError, hash_bytes, one_line


@dataclass(slots=True)
class Comparison:
    """Two responses to one prompt, with the labels that the views need, or for SFT a single response."""
    prompt: str | list                 # text, a dialogue as in hh-rlhf, or messages [{"role": …, "content": …}, …]
    responses: tuple                   # their texts, numbered 0 and 1
    better: int = 0                    # the more helpful response
    safer: int | None = None           # the safer response
    unsafe: tuple[bool, bool] | None = None
    group: str = ""                    # the preference or annotator that the labels belong to
    scores: dict = field(default_factory=dict)  # name of a score model -> its scores of the two responses
    ended: tuple = (True, True)        # False for a response that was cut before its end
    later_turns: int = 0               # turns of the assistant after this one in its dialogue
    row: str = ""                      # file:line


@dataclass(slots=True)
class Pair:
    """A comparison after a view: what the loss pushes up, and what it pushes down. None is a label that is absent."""
    prompt: str | list
    chosen: str
    rejected: str = ""
    chosen_unsafe: bool | None = None
    rejected_unsafe: bool | None = None
    group: str = ""
    margin: float | None = None        # SPE-DPO's m: by how much a score model prefers the chosen one, at least 0
    ended: tuple = (True, True)        # chosen, rejected
    row: str = ""


# Rows of a file: a parser for each layout takes a row and returns the prompt, the responses and a list of
# (numbers of the one or two responses that are compared, labels). It raises UserError for a wrong row.
MAX_LINE = 4 << 20  # bytes; a longer line is not one comparison, and is not read into memory


def get(row, name, kind, absent=None):
    """row[name], checked to be of a kind in KINDS. absent: the value where an optional field is missing."""
    if absent is not None and row.get(name) is None:
        return absent
    if name not in row:
        raise UserError(f"no field '{name}'")
    if not KINDS[kind](row[name]):
        half = " without half of a surrogate pair" if kind == "text" and isinstance(row[name], str) else ""
        raise UserError(f"'{name}' is {json.dumps(row[name], default=str)[:40]}, expected {kind}{half}")
    return row[name]


def get_prompt(row, name="prompt"):
    """The prompt of a row: text, or chat messages of which the last is the user's."""
    prompt = row.get(name)
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": get(row, name, "text")}]
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"'{name}' has a message whose role is not system, user or assistant")
        get(message, "content", "text")
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"'{name}' must end with a message of the user")
    if not messages[-1]["content"].strip():
        raise UserError(f"'{name}' is empty")
    return prompt


def parse_saferlhf(row):
    """PKU-SafeRLHF: both labels on each comparison."""
    labels = dict(unsafe=tuple(not get(row, f"is_response_{i}_safe", "true or false") for i in (0, 1)),
                  better=get(row, "better_response_id", "0 or 1"), safer=get(row, "safer_response_id", "0 or 1"))
    return get_prompt(row), tuple(get(row, f"response_{i}", "text") for i in (0, 1)), [((0, 1), labels)]


def parse_pairs(row):
    """{prompt, chosen, rejected[, chosen_unsafe, rejected_unsafe, group, ended]}: of two equally safe responses, the
    chosen one counts as the safer."""
    labels = dict(group=get(row, "group", "text", ""))
    labels["ended"] = tuple(get(row, "ended", "a list of two flags", (True, True)))
    if row.get("chosen_unsafe") is not None or row.get("rejected_unsafe") is not None:
        unsafe = tuple(get(row, f"{name}_unsafe", "true or false") for name in ("chosen", "rejected"))
        labels.update(unsafe=unsafe, safer=int(unsafe == (True, False)))
    return get_prompt(row), (get(row, "chosen", "text"), get(row, "rejected", "text")), [((0, 1), labels)]


def parse_hh(row):
    """hh-rlhf: two whole dialogues, equal up to the last "Assistant:". The few that are not equal answer different
    questions, so they give no comparison."""
    dialogues = [get(row, name, "text").rpartition("\n\nAssistant:") for name in ("chosen", "rejected")]
    (prompt, other), _, answers = zip(*dialogues)
    if not (prompt.startswith("\n\nHuman:") and other.startswith("\n\nHuman:")):
        near = difflib.get_close_matches("prompt", set(row) - {"chosen", "rejected"}, 1, 0) or ["none"]
        raise UserError(f"no field 'prompt' (nearest: {near[0]}); without one, chosen and rejected must be dialogues "
                        "as in hh-rlhf: start with \"\\n\\nHuman:\" and have an \"\\n\\nAssistant:\" turn")
    question, labels = prompt.rpartition("\n\nHuman:")[2], [((0, 1), {})]
    if prompt != other:
        labels = "the dialogues differ before the last answer"
    elif "\n\nAssistant:" in question or not question.strip():
        labels = "the turn before the answer is not the human's"
    return prompt, tuple(map(str.strip, answers)), labels


ASPECTS = ("helpfulness", "honesty", "truthfulness", "instruction_following")


def parse_ultrafeedback(row):
    """UltraFeedback: for each aspect, the best rated completion against the worst (all six pairs would repeat the same
    texts); none where all are rated alike. Ratings are text, "N/A" where there is none."""
    prompt, completions = get_prompt(row, "instruction"), get(row, "completions", "a list of objects")
    responses, labels = tuple(get(completion, "response", "text") for completion in completions), []
    for aspect in ASPECTS:
        ratings, group = {}, aspect.replace("_", "-")
        for i, completion in enumerate(completions):
            rating = get(get(get(completion, "annotations", "an object"), aspect, "an object"), "Rating", "text")
            if rating.strip().isdecimal() and len(rating) < 10:
                ratings[i] = int(rating)
            elif rating != "N/A":
                raise UserError(f"the {aspect} rating of completion {i} is {rating[:20]!r}, expected a digit or N/A")
        if ratings and min(ratings.values()) < max(ratings.values()):
            labels.append(((max(ratings, key=ratings.get), min(ratings, key=ratings.get)), dict(group=group)))
    return prompt, responses, labels or "no aspect tells the completions apart"


def parse_demonstration(row):
    """{prompt, response} or {prompt, chosen}, for SFT."""
    return get_prompt(row), (get(row, "response" if "response" in row else "chosen", "text"),), [((0,), {})]


def parse_messages(row):
    """{messages}, for SFT: each turn of the assistant is a response to the messages before it."""
    messages = get(row, "messages", "a list")
    turns = [i for i, turn in enumerate(messages) if i and isinstance(turn, dict) and turn.get("role") == "assistant"]
    labels = [((k,), dict(prompt=get_prompt({"messages": messages[:i]}, "messages"), later_turns=len(turns) - 1 - k))
              for k, i in enumerate(turns)]
    return None, tuple(get(messages[i], "content", "text") for i in turns), labels or "no turn of the assistant"


LAYOUTS = {"PKU-SafeRLHF": (("prompt", "response_0", "response_1"), parse_saferlhf),
           "UltraFeedback": (("instruction", "completions"), parse_ultrafeedback),
           "pairs": (("prompt", "chosen", "rejected"), parse_pairs), "hh-rlhf": (("chosen", "rejected"), parse_hh),
           "demonstrations": (("prompt", "response"), parse_demonstration),
           "chosen only": (("prompt", "chosen"), parse_demonstration), "messages": (("messages",), parse_messages)}


def get_scores(row, count):
    """{"reward": [one for each response], …} of a row; {} if it has none."""
    scores = get(row, "scores", "an object", {})
    for name in scores:
        if len(get(scores, name, "a list")) != count:
            raise UserError(f"scores '{name}': {len(scores[name])} numbers for {count} responses")
        for i, value in enumerate(scores[name]):
            get({f"scores.{name}[{i}]": value}, f"scores.{name}[{i}]", "a finite number")
    return scores


def read_lines(path):
    """Yield (line number, line as bytes or, of a parquet file, as a dict), blank lines left out."""
    with one_line(f"{path}: cannot be read to its end", (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error)):
        if path.suffix == ".parquet":
            with one_line(f"{path}: parquet files need the pyarrow package, pip install pyarrow", ImportError):
                from pyarrow import parquet  # its errors are ValueErrors
            batches = parquet.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                rest = line
                while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE + 1)
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line


def not_a_number(constant):
    raise UserError(f"{constant} is not a number that JSON has")


DECODER = json.JSONDecoder(parse_constant=not_a_number)


def parse_line(line):
    """The row on a line of `read_lines`, a dictionary."""
    if isinstance(line, dict):
        return line
    if len(line) > MAX_LINE:
        raise UserError(f"the line is longer than {MAX_LINE >> 20} MB")
    with one_line("not JSON", NOT_JSON):
        row = DECODER.decode(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise UserError("not a JSON object; one on each line is expected")
    return row


def read_rows(paths, counts, skip_bad_rows=False):
    """Yield (row, prompt, responses, labels, "file:line") of every row in files of one layout. counts: a Counter of the
    rows. A bad one raises UserError with file:line; with skip_bad_rows it is counted and left out."""
    layout, first_bad = None, None
    for path in paths:
        for number, line in read_lines(path):
            try:
                row = parse_line(line)
                fits = next((name for name, (fields, _) in LAYOUTS.items() if row.keys() >= set(fields)), layout)
                if fits is None:
                    layouts = "; ".join(", ".join(fields) for fields, _ in LAYOUTS.values())
                    raise UserError(f"fields {', '.join(row) or '(none)'} fit no known layout ({layouts})")
                if layout not in (fits, None):
                    raise UserError(f"a row in the layout of {fits}, after rows in that of {layout}")
                prompt, responses, labels = LAYOUTS[fits][1](row)
                row["scores"] = get_scores(row, len(responses))
                layout = fits
            except UserError as error:
                first_bad = first_bad or f"{path}:{number}: {error}"
                if not skip_bad_rows:
                    raise UserError(first_bad) from None
                counts[f"bad rows skipped (first: {first_bad})"] += 1
                continue
            counts["rows"] += 1
            if layout == "hh-rlhf" and not isinstance(labels, str):  # its folder says what the annotators were asked
                group = re.match("harmless|helpful|", path.parent.name)[0]
                labels = [((0, 1), dict(safer=0 if group == "harmless" else None, group=group))]
            yield row, prompt, responses, labels, f"{path}:{number}"
    if layout is None:
        raise UserError(first_bad or f"{', '.join(map(str, paths))}: no rows")


# Sources: where files are, which comparisons are held out; labels that are missing, and label noise
# name: (dataset on the hub, pattern of the files to take from it)
SOURCES = {"pku-saferlhf": ("PKU-Alignment/PKU-SafeRLHF", ""),
           "pku-saferlhf-30k": ("PKU-Alignment/PKU-SafeRLHF-30K", ""),
           "pku-saferlhf-10k": ("PKU-Alignment/PKU-SafeRLHF-10K", ""), "hh-rlhf": ("Anthropic/hh-rlhf", ""),
           "hh-rlhf-harmless": ("Anthropic/hh-rlhf", "^harmless-base/"),
           "hh-rlhf-helpful": ("Anthropic/hh-rlhf", "^helpful-base/"), "ultrafeedback": ("openbmb/UltraFeedback", "")}


def source_files(source):
    """(training files, test files) of a named source, a folder in its layout, or a single file. Files are told
    apart by their names; where none is named after a split, all are for training."""
    (repo, wanted), root = SOURCES.get(source, (None, "")), Path(source)
    if repo:
        with one_line(f"--data {source}: give a folder that holds its files; the hub does not list {repo}", HUB_FAILED):
            names = huggingface_hub.list_repo_files(repo, repo_type="dataset")
    elif root.is_file():
        return [root], []
    else:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    names = sorted(name for name in names if re.search(wanted, name))
    tables = [name for name in names if re.search(r"\.jsonl(\.gz|\.xz)?$", name)]
    tables = tables or [name for name in names if name.endswith(".parquet")]

    def named(split):
        return [name for name in tables if re.search(rf"(^|[/_.-])({split})([/_.-]|\d)", name.lower())]

    test = named("test")
    train = named("train") or [name for name in tables if name not in named("test|validation|valid|dev|eval")]
    if not train:
        raise UserError(f"--data {source}: no .jsonl, .jsonl.gz, .jsonl.xz or .parquet file to train on")
    with one_line(f"--data {source}: {repo} cannot be downloaded", HUB_FAILED):
        return tuple([Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset")) if repo else root / name
                      for name in names] for names in (train, test))


def check_source(source):
    """Raise UserError if this is neither a file or folder nor a name in SOURCES."""
    if source not in SOURCES and not Path(source).exists():
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(source, SOURCES, 1))
        raise UserError(f"--data {source}: neither a file or folder here nor one of toy, {', '.join(SOURCES)}{near}")


def prompt_hash(prompt, seed=0):
    """64-bit hash of a prompt without the spaces at its ends. Which prompts are held out depends on its value."""
    text = prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return int(hash_bytes(f"{seed} {text}".encode(), size=8), 16)


def read_comparisons(paths, counts, skip_bad_rows=False):
    """The comparisons in files of one layout. counts: a Counter of rows, and of rows that gave none, by reason."""
    comparisons = []
    for row, prompt, responses, labels, where in read_rows(paths, counts, skip_bad_rows):
        if isinstance(labels, str):
            counts[f"dropped ({labels})"] += 1
            continue
        for numbers, fields in labels:
            scores = {name: [values[i] for i in numbers] for name, values in row["scores"].items()}
            fields = {"prompt": prompt, "scores": scores, "row": where, **fields}
            comparisons.append(Comparison(responses=tuple(responses[i] for i in numbers), **fields))
    return comparisons


def load_comparisons(train_files, test_files, seed=0, held_out=0.02, skip_bad_rows=False):
    """(training comparisons, held-out comparisons, lines of counts to print); no prompt is in both. The test files are
    held out where there are any. Otherwise held_out is the fraction of the prompts to hold out: the hash of seed and
    prompt decides, so adding or moving rows does not move other prompts between the two."""
    counts = Counter()
    train = read_comparisons(train_files, counts, skip_bad_rows)
    test = (read_comparisons(test_files, counts, skip_bad_rows) if test_files else
            [c for c in train if prompt_hash(c.prompt, seed) < held_out * 2**64])
    kept, dropped = without_prompts(train, test)
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    return kept, test, [f"data: {counted}; {len(kept)} comparisons to train on, {len(test)} held out",
                        *(dropped if test_files else ())]


def without_prompts(train, test):
    """(the training comparisons whose prompt is not in the test comparisons, a line with the number of others)."""
    prompts = {prompt_hash(c.prompt) for c in test}
    kept = [c for c in train if prompt_hash(c.prompt) not in prompts]
    dropped = len(train) - len(kept)
    return kept, [f"split: {dropped} training comparisons dropped, their prompts are held out"] if dropped else []


def load_sources(sources, seed=0, held_out=0.02, skip_bad_rows=False):
    """`load_comparisons` of several sources together, no prompt in both. Where there are several, each is a group."""
    train, test, lines = [], [], []
    for source in sources:
        to_train, to_test, about = load_comparisons(*source_files(source), seed, held_out, skip_bad_rows)
        for comparison in (*to_train, *to_test) if len(sources) > 1 else ():
            comparison.group = source
        train, test, lines = train + to_train, test + to_test, lines + about
    train, dropped = without_prompts(train, test)
    return train, test, lines + dropped


LABELS = {"safer": "safety labels (chosen_unsafe and rejected_unsafe, or safer_response_id)",
          "unsafe": "safety flags (chosen_unsafe and rejected_unsafe, or is_response_0_safe and is_response_1_safe)",
          "chosen_unsafe": "safety flags (chosen_unsafe and rejected_unsafe)", "margin": "scores of that name"}


def require(items, label, who):
    """Raise UserError if some of these comparisons or pairs lack a label that `who` needs; names the first such row."""
    lacking = [item for item in items if getattr(item, label) is None]
    if lacking:
        message = f"{who}: {len(lacking)} of {len(items)} comparisons have no {LABELS[label]}"
        path, _, number = lacking[0].row.rpartition(":")
        if path:
            line = next(line for n, line in read_lines(Path(path)) if n == int(number))
            fields = [name for name in parse_line(line) if name != "scores"]
            near = difflib.get_close_matches("chosen_unsafe", set(fields) - {"chosen", "rejected"}, 1, 0.7)
            message += f"; the first is {lacking[0].row}, with fields {', '.join(fields)}" + "".join(
                f": is {name} meant to be chosen_unsafe?" for name in near)
        raise UserError(message)


def carry_scores(sources, name):
    """True if the first row of every source has scores of this name."""
    return all(name in next(read_rows(source_files(source)[0], Counter()))[0]["scores"] for source in sources)


def flip_labels(comparisons, flip_safety, flip_preference, seed):
    """Flip labels at random, in place: each response's safety flag with probability flip_safety, and which response
    is better with probability flip_preference. Where exactly one flag says safe, `safer` follows it, so that the two
    labels agree. Returns a line with their counts."""
    if flip_safety:
        require(comparisons, "unsafe", "--flip_safety")
    draws = np.random.default_rng([seed, 1]).random((len(comparisons), 3)) < (flip_safety, flip_safety, flip_preference)
    for comparison, (first, second, preference) in zip(comparisons, draws.tolist()):
        if first or second:
            unsafe = comparison.unsafe = comparison.unsafe[0] != first, comparison.unsafe[1] != second
            comparison.safer = int(unsafe[0]) if unsafe[0] != unsafe[1] else comparison.safer
        comparison.better ^= preference
    return f"label noise: {draws[:, :2].sum()} safety flags and {draws[:, 2].sum()} preferences flipped"


# Views: a comparison -> (what became of it, its Pair or None). `@view` above a function names the labels it needs
VIEWS = {}


def view(name, needs=(), score="reward"):
    """Register a view. needs: labels that every comparison must have, of "safer" and "unsafe"; score: the score model
    that judges its pairs, for SPE-DPO's margins."""
    def register(function):
        function.needs, function.score = needs, score
        VIEWS[name] = function
        return function
    return register


def score_margin(score, chosen, rejected):
    """SPE-DPO's m = max(0, s(chosen) - s(rejected)) by the named score, where s is minus the cost for a cost
    (arXiv 2506.02460): 0 where the score orders the two the other way."""
    return max(0.0, rejected - chosen if score == "cost" else chosen - rejected)


def ordered(comparison, chosen, score="reward"):
    """The Pair in which response number `chosen` is the chosen one. Its margin is by the named score."""
    if len(comparison.responses) == 1:
        return Pair(comparison.prompt, comparison.responses[0], ended=comparison.ended, row=comparison.row)
    rejected, unsafe, scores = 1 - chosen, comparison.unsafe or (None, None), comparison.scores.get(score)
    margin = score_margin(score, scores[chosen], scores[rejected]) if scores else None
    return Pair(comparison.prompt, comparison.responses[chosen], comparison.responses[rejected], unsafe[chosen],
                unsafe[rejected], comparison.group, margin, (comparison.ended[chosen], comparison.ended[rejected]),
                comparison.row)


@view("helpful")
def helpful(comparison):
    """DPO-HELPFUL: chosen is the more helpful response, safe or not."""
    return "kept", ordered(comparison, comparison.better)


@view("harmless", needs=("safer",), score="cost")
def harmless(comparison):
    """DPO-HARMLESS: chosen is the safer response, helpful or not."""
    return "kept", ordered(comparison, comparison.safer, "cost")


@view("safe-better", needs=("safer", "unsafe"))
def safe_better(comparison):
    """DPO-SAFEBETTER: the DPO-HELPFUL pairs whose chosen response is safe."""
    if comparison.unsafe[comparison.better]:
        return "dropped (the better response is unsafe)", None
    return "kept", ordered(comparison, comparison.better)


@view("safedpo", needs=("safer", "unsafe"))
def safedpo_transform(comparison):
    """SafeDPO's T (arXiv 2505.20065, Section 4): keep if the better response is safe, else swap, else drop."""
    chosen_unsafe, rejected_unsafe = comparison.unsafe[comparison.better], comparison.unsafe[1 - comparison.better]
    if not chosen_unsafe:
        return "kept", ordered(comparison, comparison.better)
    if not rejected_unsafe:
        return "swapped", ordered(comparison, 1 - comparison.better)
    return "dropped (both unsafe)", None


@view("safety", needs=("safer", "unsafe"), score="cost")
def safety_expert(comparison):
    """MidPO's safety pairs (arXiv 2506.02460): exactly one response is safe, chosen is the safer one."""
    if comparison.unsafe[0] == comparison.unsafe[1]:
        return "dropped (both safe or both unsafe)", None
    return "kept", ordered(comparison, comparison.safer, "cost")


@view("dual", needs=("safer", "unsafe"))
def dual(comparison):
    """MidPO's D_dual: both responses are safe, and the safer one is also the better one."""
    if any(comparison.unsafe):
        return "dropped (a response is unsafe)", None
    if comparison.safer != comparison.better:
        return "dropped (safer is not better)", None
    return "kept", ordered(comparison, comparison.better)


@view("cost", needs=("safer", "unsafe"), score="cost")
def cost_pairs(comparison):
    """Pairs of a cost model: those of DPO-HARMLESS, with safety flags."""
    return harmless(comparison)


def apply_view(name, comparisons, responses=2):
    """Pairs of a view, and one line that says what became of the comparisons. responses: 1 for SFT, whose rows may have
    a single one. Raises UserError when labels or responses that are needed are absent, or when no pair is left."""
    for label in VIEWS[name].needs:
        require(comparisons, label, f"view {name}")
    single = next((comparison.row for comparison in comparisons if len(comparison.responses) < responses), None)
    if single is not None:
        raise UserError(f"{single}: one response, for --method sft; this method compares two (chosen, rejected)")
    outcomes, pairs = Counter(), []
    for comparison in comparisons:
        outcome, pair = VIEWS[name](comparison)
        texts = [text.strip() for text in (pair.chosen, pair.rejected)[:len(comparison.responses)]] if pair else []
        if "" in texts or len(set(texts)) < len(texts):
            outcome, pair = f"dropped ({'an empty response' if '' in texts else 'identical responses'})", None
        outcomes[outcome] += 1
        pairs += [pair] if pair else []
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items(), reverse=True))
    line = f"view {name}: {len(comparisons)} comparisons, {counted or 'nothing kept'}"
    if not pairs:
        raise UserError(f"{line}: no pairs are left to train on")
    return pairs, line
