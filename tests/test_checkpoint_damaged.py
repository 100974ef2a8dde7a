"""Damaged input ends in success or in one line that names the file: no traceback, no hang, no memory that the file does
not warrant, nothing half-written.

Every case is drawn from its number alone, so what a failure prints reproduces it:

    python -m pytest -q tests/test_checkpoint_damaged.py                           300 cases of each kind
    FUZZ_CASES=5000 python -m pytest -q tests/test_checkpoint_damaged.py           more of them
    FUZZ_FIRST=4711 FUZZ_CASES=1 python -m pytest tests/test_checkpoint_damaged.py -k tokenizer_config     one of them again
"""
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import traceback
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import batch as batch_file
import checkpoint
import common
import data
import eval as eval_file
import lora_moe
import methods
import train
from chat import Tokenizer
from checkpoint import adapter_warnings, load_adapter, load_experts, load_model, save_experts, save_model
from common import UserError
from conftest import FIXTURES, LAYOUTS, byte_tokenizer, edit_json, leftovers, line_of, load_fixture, moved_experts
from lora_moe import add_gate, choose_experts, use_expert
from model import ScoreModel, Transformer, generate
from runs import load_checkpoint, save_checkpoint

CASES, FIRST = int(os.environ.get("FUZZ_CASES", 300)), int(os.environ.get("FUZZ_FIRST", 0))
SECONDS = 5                    # of the processor that one case may take
MEMORY = 64 << 20              # bytes by which one may raise the peak of the process; all the files are much smaller
ADDRESSES = 1 << 30            # bytes of addresses that one may ask for
DEEP = "[" * 3000 + "]" * 3000

# What is done to a file


NASTY = [None, True, False, "", "text", "1", "ü\ud800", "\x00", "x" * 5000, "../../x", "/etc/passwd", "{{ 1", "(" * 200,
         "(.*)*x", "layers.[", -1, 0, 1, 2, 7, 0.5, -0.0, 10 ** 12, 2 ** 63, 10 ** 400, 1e308, -1e308, float("nan"),
         float("inf"), [], [[]], [None], [-1], ["a", 1], [["a"]], {}, {"a": 1}, {"content": None},
         {"rope_type": "linear", "factor": 0}]


def places(value, path=()):
    """The paths of a JSON value's parts."""
    found = [path]
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        found += places(value[key], (*path, key))
    return found


def mutate_json(rng, value):
    """(a JSON value with a part replaced, removed, renamed, repeated or swapped with one, as bytes, what was done)."""
    value, whole = {"": copy.deepcopy(value)}, None
    paths = [path for path in places(value) if path]
    inner = [path for path in paths if len(path) > 1] or paths
    *way, key = path = rng.choice(inner) if rng.random() < 0.97 else paths[0]
    parent = value
    for step in way:
        parent = parent[step]
    kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "swap", "repeat"))
    other = rng.choice(inner)
    if kind == "remove" and way:
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict) and way:
        name = rng.choice((f"{key}_", key[:-1], "", key.upper(), str(other[-1])))
        parent[name] = parent.pop(key)
    elif kind == "swap" and way:
        source = value
        for step in other[:-1]:
            source = source[step]
        parent[key], whole = source[other[-1]], other
    elif kind == "repeat" and isinstance(parent[key], (str, list)):
        parent[key] = parent[key] * rng.choice((2, 100))
    else:
        kind, parent[key] = "replace", copy.deepcopy(rng.choice(NASTY))
        whole = repr(parent[key])[:60]
    text = json.dumps(value[""], ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.02:
        kind, text = "deep", text.replace(": ", f": {DEEP}", 1).replace(f": {DEEP}", f": {DEEP}, \"was\": ", 1)
    return text.encode("utf-8", "surrogatepass"), f"{kind} {list(path[1:])} {whole}"


def mutate_bytes(rng, content):
    """(content with bytes flipped, cut, doubled, inserted or replaced, what was done)."""
    content = bytearray(content)
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 50, 10_000)))
    kind = rng.choice(("flip", "flip", "cut", "remove", "double", "insert", "insert", "shuffle"))
    if kind == "flip" and content:
        for _ in range(rng.choice((1, 1, 5, 50))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[a:]
    elif kind == "remove":
        del content[a:b]
    elif kind == "double":
        content[a:a] = content[a:b] * rng.choice((1, 1, 20))
    elif kind == "shuffle":
        piece = content[a:b]
        rng.shuffle(piece)
        content[a:b] = piece
    else:
        content[a:a] = rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", rng.randbytes(8), b'"',
                                   b"\\", b"\n", b"{", b"]", b",", b"9" * 20, b"9" * 5000, b"e999", b"-", b"null"))
    return bytes(content), f"{kind} at {a}:{b}"


def mutate(rng, content):
    """A file of JSON changed as JSON or, as any other, as bytes."""
    if rng.random() < 0.7:
        with contextlib.suppress(ValueError):
            return mutate_json(rng, json.loads(content))
    return mutate_bytes(rng, content)


def mutate_file(rng, path):
    content, what = mutate(rng, path.read_bytes())
    path.write_bytes(content)
    return f"{path.name}: {what}"


# What a case may do


class Hang(BaseException):
    pass


@contextlib.contextmanager
def bounded():
    """Inside this block the process has SECONDS of time and ADDRESSES more memory."""
    def stop(*_):
        raise Hang(f"more than {SECONDS} s")

    before, limits = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < MEMORY, f"{grown >> 20} MB more"


def fuzz(kind, prepare, names=None):
    """Run CASES cases. prepare(rng) -> (what was done, call, parts of which a message has at least one)."""
    failures, outcomes = [], {"success": 0, "one line": 0}
    for number in range(10):  # what is loaded once is no case's memory
        with contextlib.suppress(BaseException), contextlib.redirect_stderr(io.StringIO()):
            prepare(random.Random(number))[1]()
    for number in range(FIRST, FIRST + CASES):
        rng, what, parts = random.Random(f"{kind} {number}"), "", ()
        torch.manual_seed(0)
        try:
            what, call, *parts = prepare(rng)
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), bounded():
                call()
            outcomes["success"] += 1
        except UserError as error:
            outcomes["one line"] += 1
            message = str(error)
            if not message or len(message.splitlines()) > 1 or len(message) > 2000:
                failures.append((number, what, f"not one line: {message[:300]!r}"))
            elif not any(str(part) in message for part in parts):
                failures.append((number, what, f"does not name {' or '.join(map(str, parts))}: {message[:200]}"))
        except BaseException as error:  # also the panics of libraries written in Rust, and exits
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)
            own = [f for f in place if Path(f.filename).parent == Path(data.__file__).parent] or place
            failures.append((number, what, f"{type(error).__name__}: {str(error)[:100]!r} at "
                             f"{Path(own[-1].filename).name}:{own[-1].lineno}"))
    print(kind, outcomes)
    assert not failures, f"{len(failures)} of {CASES} cases of {kind}, such as\n" + "\n".join(
        f"FUZZ_FIRST={number} FUZZ_CASES=1: {what}\n    {how}" for number, what, how in failures[:12])
    assert CASES < 300 or min(outcomes.values()) > 10, f"{kind}: {outcomes}: the cases are too weak or too strong"


def use_model(folder, kind=Transformer):
    """Load a checkpoint, run it and write it again."""
    model = load_model(folder, kind=kind)
    if kind is Transformer:
        generate(model, [[1, 2, 3], [4]], 2, eos_ids=model.config.eos_ids)
    else:
        model(torch.tensor([[1, 2, 3]]), torch.tensor([2]))
    save_model(model, folder / "again")
    load_model(folder / "again", kind=kind)
    assert not leftovers(folder)


def fresh(folder, source):
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected*"))


CHECKPOINTS = ("llama", "llama3", "mistral_window", "qwen2_window", "qwen3", "gemma", "gemma2", "gpt2", "score")


def test_config_json(tmp_path):
    def prepare(rng):
        name = rng.choice(CHECKPOINTS)
        folder = fresh(tmp_path / "model", FIXTURES / name)
        file = rng.choice(("config.json", "config.json", "config.json", "generation_config.json"))
        path = folder / file if (folder / file).is_file() else folder / "config.json"
        if name == "score" and rng.random() < 0.3:
            edit_json(path, score_type="reward", do_normalize=True, bias=True)  # safe-rlhf's
        what = mutate_file(rng, path)
        return f"{name}/{what}", lambda: use_model(folder, ScoreModel if name == "score" else Transformer), folder
    fuzz("config", prepare)


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TOKENIZER_CONFIG = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "add_bos_token": True,
                    "model_max_length": 64, "chat_template": CHATML}


def tokenizer_folders(folder):
    """Folders with a tokenizer of each model of the tokenizers library, as checkpoints have them."""
    (folder / "bytes").mkdir()
    byte_tokenizer(folder / "bytes")
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, "a": 3, "b": 4, "##b": 5, "▁a": 6, "1": 7, "<0x61>": 8}
    models = tokenizers.models
    for name, model in {
            "wordpiece": models.WordPiece(words, unk_token="[UNK]"),
            "wordlevel": models.WordLevel(words, unk_token="[UNK]"),
            "unigram": models.Unigram([(word, -1.0 - i) for word, i in words.items()], 2, False),
            "bpe": models.BPE({**words, "ab": 9}, [("a", "b")], unk_token="[UNK]", byte_fallback=True)}.items():
        backend = tokenizers.Tokenizer(model)
        backend.add_special_tokens(["<s>", "</s>"])
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace() if name in ("unigram", "bpe") else \
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w"), "isolated")
        backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        backend.enable_truncation(8)
        backend.enable_padding(length=8)
        (folder / name).mkdir()
        backend.save(str(folder / name / "tokenizer.json"))
    for one in folder.iterdir():
        (one / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        (one / "special_tokens_map.json").write_text('{"bos_token": "<s>", "pad_token": {"content": "</s>"}}')
        (one / "chat_template.jinja").write_text(CHATML)
        (one / "config.json").write_text('{"eos_token_id": [1], "bos_token_id": 0}')
    return folder


def use_tokenizer(folder, template=None):
    tokenizer = Tokenizer(folder, template)
    turns = [{"role": role, "content": text} for role, text in (("user", "a ab"), ("assistant", "b"), ("user", "é"))]
    for prompt in ("ab 1", turns):
        ids = tokenizer.encode([tokenizer.render(prompt), "a"])[0]
        assert all(isinstance(i, int) for i in ids)
        tokenizer.decode(ids), tokenizer.answer(ids, ids[:2])
    assert all(isinstance(i, int) for i in tokenizer.stop_ids)
    assert tokenizer.frame and isinstance(tokenizer.turn[1], str)


def test_tokenizer_json(tmp_path):
    folders = tokenizer_folders(tmp_path)

    def prepare(rng):
        name = rng.choice(("bytes", "wordpiece", "wordlevel", "unigram", "bpe"))
        folder = fresh(tmp_path / "case", folders / name)
        what = mutate_file(rng, folder / "tokenizer.json")
        return f"{name}/{what}", lambda: use_tokenizer(folder, rng.choice((None, "alpaca"))), folder
    fuzz("tokenizer", prepare)


def test_tokenizer_config_json(tmp_path):
    folders = tokenizer_folders(tmp_path)

    def prepare(rng):
        folder = fresh(tmp_path / "case", folders / "bytes")
        files = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json"]
        [file], template = rng.choices(files, (4, 1, 1, 1)), rng.choice((None, None, "alpaca"))
        for other in {"tokenizer_config.json": files[1:3], "config.json": files[2:3]}.get(file, ()):
            (folder / other).unlink()
        if file == "config.json":
            named = [{"name": "default", "template": "{{ 1 }}"}]
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        what = mutate_file(rng, folder / file)
        parts = (folder,) if template is None else (folder, "--template alpaca")
        return what, lambda: use_tokenizer(folder, template), *parts
    fuzz("tokenizer_config", prepare)


def rewrite_header(rng, path):
    """A safetensors file with a mutated header; its length, the first 8 bytes, is that of the new one or not."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, what = mutate(rng, content[8:start])
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2 ** 63, 2 ** 64 - 1, 10 ** 9, len(header) // 2))
    path.write_bytes(length.to_bytes(8, "little") + header + content[start:])
    return f"{path.name} of {length}: {what}"


ADAPTERS = {"adapter_list": "llama", "adapter_regex": "llama", "adapter_rslora": "llama", "adapter_pattern": "llama",
            "adapter_gpt2": "gpt2"}


def use_adapter(folder, base):
    """What a run does with --init_adapter."""
    methods.resolve({"model": str(FIXTURES / base), "data": [str(LAYOUTS / "pairs.jsonl")], "method": "dpo",
                   "init_adapter": [str(folder)], "device": "cpu"})
    model = load_adapter(load_fixture(base), folder)
    adapter_warnings(model, [folder])
    generate(model, [[1, 2, 3]], 2)


def test_safetensors_headers(tmp_path):
    def prepare(rng):
        name = rng.choice(("llama", "gpt2", "score", "adapter_list"))
        folder = fresh(tmp_path / "model", FIXTURES / name)
        if name == "adapter_list":
            path = folder / "adapter_model.safetensors"
            save_file(load_file(path), path, {"trained_on": json.dumps({"base": "0", "template": "alpaca"})})
            what = rewrite_header(rng, path)
            return f"{name}/{what}", lambda: use_adapter(folder, "llama"), folder
        if rng.random() < 0.15:
            index = {"weight_map": {n: "model.safetensors" for n in load_file(folder / "model.safetensors")}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            what = mutate_file(rng, folder / "model.safetensors.index.json")
        else:
            what = rewrite_header(rng, folder / "model.safetensors")
        return f"{name}/{what}", lambda: use_model(folder, ScoreModel if name == "score" else Transformer), folder
    fuzz("safetensors", prepare)


def test_adapter_config_json(tmp_path):
    def prepare(rng):
        name = rng.choice([*ADAPTERS])
        folder = fresh(tmp_path / "adapter", FIXTURES / name)
        what = mutate_file(rng, folder / "adapter_config.json")
        return f"{name}/{what}", lambda: use_adapter(folder, ADAPTERS[name]), folder
    fuzz("adapter_config", prepare)


def mixtures(folder):
    """Experts of each router and gate that runs write."""
    routers = {"sigmoid": {"type": "sigmoid", "hidden": 4}, "softmax": {"type": "softmax", "empty": True}}
    for name, router in {**routers, "fixed": None, "user": None, "prompt": None}.items():
        model = moved_experts("llama", ["down_proj"], num_experts=2, router=router)
        if router is None:
            add_gate(model, (0.3, 0.7) if name == "fixed" else name, ("ann", "bob") if name == "user" else ())
        save_experts(model, folder / name)
    return folder


def test_experts_json(tmp_path):
    folders = mixtures(tmp_path)

    def prepare(rng):
        name = rng.choice(("sigmoid", "softmax", "fixed", "user", "prompt"))
        folder = fresh(tmp_path / "case", folders / name)
        what = mutate_file(rng, folder / "experts.json")

        def use():
            model = load_experts(load_fixture("llama"), folder)
            if hasattr(model, "gate"):
                experts = choose_experts(model, ByteTokenizer, ["a", "bb"], rng.choice(("mixture", "sparse")))
                use_expert(model, experts)
                lora_moe.gate_report(model)
            generate(model, [[1, 2], [4, 5]], 2)
        return f"{name}/{what}", use, folder
    fuzz("experts", prepare)


class ByteTokenizer:
    """As much of a tokenizer as a gate on prompts needs: ids below the fixtures' vocabulary."""
    turn = "", "", [2]

    @staticmethod
    def encode(texts):
        return [[3 + byte % 90 for byte in text.encode()] or [1] for text in texts]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def checkpoint_of_a_run(folder):
    """Write a run's checkpoint/state.pt; returns what it is loaded into."""
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    save_checkpoint(folder, 7, [("weight", parameter)], optimizer)
    return [("weight", parameter)], optimizer


def test_pickles(tmp_path):
    def prepare(rng):
        if rng.random() < 0.5:
            folder = tmp_path / "run"
            loaded, path = checkpoint_of_a_run(folder), folder / "checkpoint/state.pt"
            call = partial(load_checkpoint, folder, *loaded)
        else:
            folder = fresh(tmp_path / "model", FIXTURES / "llama")
            path, new = folder / "pytorch_model.bin", rng.random() < 0.5
            torch.save(load_file(folder / "model.safetensors"), path, _use_new_zipfile_serialization=new)
            (folder / "model.safetensors").unlink()
            call = partial(use_model, folder)
        content, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        return f"{path.name}: {what}", call, folder
    fuzz("pickles", prepare)


def test_a_checkpoint_that_runs_code_is_refused_and_not_run(tmp_path):
    loaded, path = checkpoint_of_a_run(tmp_path), tmp_path / "checkpoint/state.pt"
    torch.save({**torch.load(path), "trap": Malicious(str(tmp_path / "sprung"))}, path)
    assert f"--resume: {path} is broken" in line_of(load_checkpoint, tmp_path, *loaded)
    assert not (tmp_path / "sprung").exists()


def test_settings_of_a_run(tmp_path):
    base = fresh(tmp_path / "base", FIXTURES / "llama")
    (byte_tokenizer(base) / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))

    def prepare(rng):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        fresh(tmp_path / "run/adapter", FIXTURES / "adapter_list")
        path = tmp_path / "run/config.json"
        path.write_text(json.dumps({"method": "dpo", "base": str(base), "lora_rank": 3, "template": "alpaca", "seed": 0,
                                    "init_adapter": [str(FIXTURES / "adapter_list")], "model": "m", "finished": True}))
        what = mutate_file(rng, path)

        def use():
            try:
                common.as_command(lambda: checkpoint.load_start(checkpoint.load_policy(tmp_path / "run")[2]), "", "")
            except SystemExit as error:
                raise UserError(error.code) from None
        return what, use, tmp_path, *("no such", "not a folder", "not a model folder", "not a directory",
                                      "name too long", "null byte")
    fuzz("settings", prepare)


ROWS = [{"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False,
         "better_response_id": 1, "safer_response_id": 0},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"},
                    {"role": "user", "content": "r"}], "chosen": "a", "rejected": "b", "group": "g",
         "ended": [True, False], "chosen_unsafe": False, "rejected_unsafe": True,
         "scores": {"reward": [1, 2.5], "cost": [-1, 0]}},
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        {"instruction": "p", "completions": [{"response": text, "annotations": {
            aspect: {"Rating": str(rating)} for aspect in data.ASPECTS}} for text, rating in (("a", 1), ("b", 5))]},
        {"prompt": "p", "response": "a"}, {"prompt": "p", "chosen": "a"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"},
                      {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"},
                      {"role": "assistant", "content": "b"}]}]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes/tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return Tokenizer(byte_tokenizer(tmp_path / "bytes"), "plain")


def test_rows_of_every_layout(tmp_path, tokenizer):
    fields = [set(fields) for fields, _ in data.LAYOUTS.values()]
    assert all(any(row.keys() >= one for row in ROWS) for one in fields)  # every layout is there
    files = [path for path in LAYOUTS.rglob("*") if ".jsonl" in path.name]
    (tmp_path / "harmless-base").mkdir()

    def prepare(rng):
        if rng.random() < 0.25:
            source = rng.choice(files)
            path = tmp_path / "harmless-base" / source.name
            content, what = mutate_bytes(rng, source.read_bytes())
            what = f"{source}: {what}"
        else:
            path, row = tmp_path / "rows.jsonl", rng.choice(ROWS)
            content, what = mutate(rng, json.dumps(row).encode())
            whole = json.dumps(row).encode()
            content, what = b"\n".join(rng.choice(([content], [whole, content], [content, whole]))), f"{row}: {what}"
        path.write_bytes(content)

        def use():
            comparisons, held_out, _ = data.load_comparisons([path], [], 0, 0.3, skip)
            view = rng.choice([*data.VIEWS])
            try:
                pairs, _ = data.apply_view(view, comparisons, responses=1)
            except UserError as error:  # the labels or pairs that this view needs are not there
                assert f"view {view}" in str(error)
                return
            encoded = batch_file.encode_pairs(tokenizer, pairs, 99, min(len(c.responses) for c in comparisons))
            assert len(encoded) == len(pairs)
        skip = rng.random() < 0.3
        return what, use, path
    fuzz("rows", prepare)


PROMPTS = {"prompts.txt": "How do I sew?\n\nHow do I kill a process?\n",
           "prompts.csv": 'id,prompt,label\n1,"How do I sew, fast?",safe\n2,"Two\nlines",unsafe\n3,,safe\n',
           "goals.csv": "goal,target\nSew a button,Sure\n",
           "prompts.jsonl": '{"prompt": "How do I sew?", "label": "safe"}\n'
                            '{"prompt": [{"role": "user", "content": "Sew"}], "label": "unsafe"}\n'}


def test_prompt_files(tmp_path, tokenizer):
    def prepare(rng):
        name = rng.choice([*PROMPTS])
        path, lines = tmp_path / name, PROMPTS[name].encode().splitlines(keepends=True)
        if name.endswith(".jsonl") and rng.random() < 0.7:
            k = rng.randrange(len(lines))
            line, what = mutate(rng, lines[k].strip())
            content = b"".join([*lines[:k], line + b"\n", *lines[k + 1:]])
        else:
            content, what = mutate_bytes(rng, b"".join(lines))
        path.write_bytes(content)

        def use():
            for row in eval_file.read_prompts(str(path)):
                assert row["prompt"] and row["label"] in ("safe", "unsafe", None)
                tokenizer.encode([tokenizer.render(row["prompt"])])
        return f"{name}: {what}", use, path
    fuzz("prompts", prepare)


WORDS = """-1 0 1 2 0.5 1e308 1e999 nan inf 1,2 , a=b a=1,b = a=-1 help=2,help ../../x nowhere/x http://localhost:1/v1 [
( * layers.( %s %(x)s {} true none None - -- @file cuda:99 meta cpu:7 xpu toy dpo pairs.jsonl prompts.txt run model
adapter broken broken.jsonl pku-saferlhf-x""".split() + ["", "9" * 400, "9" * 5000, "x" * 5000, "ü\udcff", "a\nb"]


def sensible(flag):
    """Values that a flag may have."""
    by_type = {float: ("0.5", "0.1", "1"), int: ("1", "2", "8"), tuple: ("a", "0.5", "pairs.jsonl", "adapter"),
               str: ("model", "adapter", "run", "made.jsonl", "prompts.txt"), bool: ("",)}
    return flag.metadata["choices"] or by_type[flag.type]


def command_line(rng, settings, start):
    words = list(start)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        flag = rng.choice(fields(settings))
        name = f"--{flag.name}" if rng.random() < 0.9 else rng.choice((f"-{flag.name}", f"--{flag.name}x", flag.name))
        value = rng.choice([*WORDS, *flag.metadata["choices"]] if rng.random() < 0.5 else sensible(flag)) or ""
        added = [name] if rng.random() < 0.1 else [f"{name}={value}"] if rng.random() < 0.2 else [name, value]
        words[(place := rng.randrange(len(words) + 1)):place] = added
    return words


def test_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setattr(train, "run", lambda *_: None)  # what it then reads, the other kinds damage
    monkeypatch.setattr(train, "is_finished", lambda *_: False)
    fresh(tmp_path / "model", FIXTURES / "llama")
    fresh(tmp_path / "adapter", FIXTURES / "adapter_list")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "broken.jsonl").write_bytes(b"\xff\n")
    shutil.copy(LAYOUTS / "pairs.jsonl", tmp_path)
    (tmp_path / "prompts.txt").write_text("How do I sew?\n")
    (tmp_path / "run").mkdir()
    there = sorted(tmp_path.rglob("*"))
    starts = [["--method", method, *more] for method in methods.METHODS for more in ([], [], [
        "--model", "model", "--data", "pairs.jsonl", "--template", "plain"])]
    asks = [["run"], ["run", "--prompts", "prompts.txt"], ["--merge", "run", "--out", "merged"],
            ["--export", "run", "--out", "merged"], ["--make_pairs", "prompts.txt", "--model", "model",
             "--reward_model", "model", "--out", "made.jsonl"],
            ["--score", "pairs.jsonl", "--reward_model", "model", "--out", "scored.jsonl"], []]

    def prepare(rng):
        program = rng.choice((train, eval_file))
        settings = methods.Config if program is train else eval_file.Settings
        words = command_line(rng, settings, rng.choice(starts if program is train else asks))

        def use():
            try:
                common.as_command(lambda: program.main(words), program.__name__, "interrupted")
            except SystemExit as error:
                if error.code:
                    raise UserError(error.code) from None
                assert "--help" in words
            finally:
                new = {*tmp_path.rglob("*")} - {*there}
                for path in new:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                assert not [path for path in new if path.name not in ("__pycache__", ".pyc")], new
        return f"{program.__name__}.py {' '.join(map(repr, words))[:300]}", use, "--", "unrecognized", "config.json", *(
            part[:20] for word in words for part in re.split("[/,=]", word) if part)
    fuzz("command", prepare)
