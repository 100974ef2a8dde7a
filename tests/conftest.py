"""Shared by the tests: a toy world made small, whole runs in it, and sequences computed one at a time to compare with.

Models this small are fastest on one thread.
"""
import itertools
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

import batch as batch_file  # noqa: E402
import checkpoint  # noqa: E402
import eval as eval_file  # noqa: E402
import methods  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from batch import Encoded, pack, policy_logps  # noqa: E402
from chat import Tokenizer  # noqa: E402
from checkpoint import load_model  # noqa: E402
from common import UserError, read_json  # noqa: E402
from data import apply_view  # noqa: E402
from lora_moe import add_experts, perturb_experts  # noqa: E402
from model import ModelConfig, ScoreModel, Transformer, stream  # noqa: E402

FIXTURES, LAYOUTS = ROOT / "tests" / "fixtures", ROOT / "tests" / "layouts"
FAMILY_FIXTURES = ("llama", "llama3", "mistral", "mistral_window", "qwen2", "qwen2_window", "qwen3", "gemma", "gemma2",
                   "gpt2")  # checkpoints with transformers' logits and greedy continuations
BASE = "out/toy-base-seed0"  # in the folders that `place` makes

# Mistakes


def line_of(call, *args, **settings):
    """The message of the UserError that a call raises; it is one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def mistake(*flags):
    """The one line that train.py answers these flags with."""
    flags = [*map(str, flags)]
    return line_of(train.main, flags if "--device" in flags else [*flags, "--device", "cpu"])


def check_mistake(method, flags, parts):
    """These flags are answered with one line that has these parts, and no run folder is made."""
    message = mistake("--method", method, *flags, "--max_steps", 1, "--out", "out/wrong")
    assert all(part in message for part in parts), message
    assert not Path("out/wrong").exists()


def change_loss(patch, change):
    """From now on the loss and the metrics of every method are change(loss, metrics)."""
    for name, method in methods.METHODS.items():
        patch.setitem(methods.METHODS, name, replace(
            method, loss=lambda *inputs, loss=method.loss: change(*loss(*inputs))))


# Files


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, *rows):
    """A file with a row on each line: objects, or text that is written as it is. Returns its path."""
    path = Path(path)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def edit_json(path, **changes):
    """Change these keys of a JSON file; "absent" removes one."""
    values = {**read_json(path), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def edit_tensors(path, change):
    """Rewrite a safetensors file after `change` has been applied to the dictionary of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def files_of(folder):
    """{file: bytes} of all that a run computed; its metrics.jsonl holds times, its config.json its name."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path not in (folder / "metrics.jsonl", folder / "config.json")}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".old", ".tmp"))]


# Numbers


def relative_error(got, want):
    return float((got - want).norm() / want.norm())


def softplus(z):
    """−log σ(−z) in double precision, also where exp(z) overflows."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def log_softmax(values):
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


@torch.no_grad()
def logits_of(model, tokens):
    return model.logits(model(tokens))


# Random models and tokens


VOCABULARY = 61
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64)
SHAPES = {
    "llama": dict(model_type="llama", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2"),
    "gemma2 with a window shorter than the sequences":
        dict(model_type="gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": dict(model_type="gpt2", n_embd=16, n_head=2, n_layer=2, n_positions=64),
}


def tiny(shape, seed=0):
    """A random model whose every weight, norms and biases included, is far from its starting value."""
    torch.manual_seed(seed)
    model = toy.init_weights(Transformer(ModelConfig.from_hf({**SIZES, **SHAPES[shape]})), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def load_fixture(name):
    return load_model(FIXTURES / name)


def moved_experts(name, targets, **settings):
    """A fixture's model whose experts have moved, as if trained."""
    return perturb_experts(add_experts(load_fixture(name), targets, rank=3, alpha=5, **settings), 0.3, seed=1)


def encoded_of(items, seed=0, distinct=False):
    """Random tokens for prompts and responses of these lengths: [(prompt, response, …), …] -> Encoded.

    distinct: all tokens differ, so that a token says where it came from; no model has that many.
    """
    rng, bounds, position = np.random.default_rng(seed), [], 0
    for item in items:
        bounds.append([position + n for n in itertools.accumulate(item, initial=0)])
        position = bounds[-1][-1]
    tokens = rng.permutation(position) + 1 if distinct else rng.integers(0, VOCABULARY, position)
    return Encoded(tokens.astype(np.int32), np.array(bounds, dtype=np.int64))


def pieces(encoded, index):
    """[prompt, response, …] of one prompt, as lists of tokens."""
    bounds = encoded.bounds[index].tolist()
    return [encoded.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])]


# Sequences one at a time


def logp_alone(model, prompt, response):
    """log π(response | prompt), a tensor, of token ids in one unpacked sequence: one token's log-softmax at a time."""
    tokens = torch.tensor([prompt + response])
    logps = model.logits(model(tokens))[0].log_softmax(-1)
    return sum((logps[len(prompt) - 1 + i, token] for i, token in enumerate(response)), logps.new_zeros(()))


def brute_force(model, encoded, indices):
    """(N, R): `logp_alone` of every prompt with each of its responses."""
    rows = []
    for index in indices:
        prompt, *responses = pieces(encoded, index)
        rows.append(torch.stack([logp_alone(model, prompt, response) for response in responses]))
    return torch.stack(rows)


def packed_logps(model, encoded, indices):
    return policy_logps(model, pack(encoded, indices))


def ids_of(tokenizer, pair):
    """(prompt, chosen, rejected) of a Pair as token ids, the responses ended by EOS."""
    prompt, *responses = tokenizer.encode([tokenizer.render(pair.prompt), pair.chosen, pair.rejected])
    return prompt, *(response + [tokenizer.eos_id] for response in responses)


@torch.no_grad()
def pair_logps(folder, pair):
    """[log π(chosen), log π(rejected)] of a Pair under the model in this folder."""
    model = load_model(folder)
    prompt, *responses = ids_of(Tokenizer(folder), pair)
    return [float(logp_alone(model, prompt, response)) for response in responses]


def score_alone(folder, template=None):
    """(prompt, response) -> the score of this one sequence: the head of the score model in a folder at its EOS."""
    model, tokenizer = load_model(folder, kind=ScoreModel).eval(), Tokenizer(folder, template)

    @torch.no_grad()
    def score(prompt, response):
        tokens = sum(tokenizer.encode([tokenizer.render(prompt), response]), []) + [tokenizer.eos_id]
        return float(model.model(torch.tensor([tokens]))[0, -1].double() @ model.score.weight[0].double())
    return score


# A toy world made small, and runs in it


SMALL_MODEL = {**toy.MODEL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
               "num_attention_heads": 2}
COMPARISONS = 60
eval_prompts, preference_sample = cache(toy.eval_prompts), cache(toy.preference_sample)


def make_small(patch):
    """A small base model, few comparisons and few prompts to answer; all weights are trained unless --lora_rank.

    In a handful of steps score models come to differ from 0, and MidPO's experts from the base.
    """
    patch.setattr(toy, "MODEL", SMALL_MODEL)
    patch.setattr(toy, "DEMONSTRATIONS", 312)
    patch.setattr(toy, "COMPARISONS", COMPARISONS)
    patch.setitem(methods.TOY, "lora_rank", 0)
    patch.setitem(methods.TOY, "lr", lambda values: 3e-4 if values["lora_rank"] else 1.8e-5)
    for name, rate in (("reward", 3e-2), ("cost", 3e-2), ("spe-dpo", 1e-2)):
        patch.setitem(methods.METHODS[name].toy, "lr", rate)
    patch.setattr(toy, "eval_prompts", lambda split, seed: eval_prompts(split, seed)[::17])


def shorten_answers(patch, tokens):
    """Answers have this many tokens at most."""
    patch.setattr(eval_file, "stream", lambda model, prompts, count, *rest:
                  stream(model, prompts, min(count, tokens), *rest))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A folder whose out/ holds the toy base models of seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small(patch)
        for seed in (0, 1):
            train.toy_base(seed, "cpu")
    return folder


@pytest.fixture
def place(bases, tmp_path, monkeypatch):
    """An empty folder to run in, in a small toy world whose base models are made already."""
    shutil.copytree(bases / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    shorten_answers(monkeypatch, 16)
    return tmp_path


def make_quick(patch):
    """Still shorter answers to fewer prompts."""
    shorten_answers(patch, 4)
    patch.setattr(toy, "eval_prompts", lambda split, seed: eval_prompts(split, seed)[::51])
    patch.setattr(toy, "preference_sample", lambda names, split, seed: preference_sample(tuple(names), split, seed, 5))


@pytest.fixture
def quick(place, monkeypatch):
    make_quick(monkeypatch)
    return place


def run(out, *flags, device="cpu"):
    """Train; returns the run folder."""
    out = f"out/{out}"
    train.main([*map(str, flags), "--out", out, "--device", device])
    return Path(out)


def rows(folder):
    return json_lines(folder / "metrics.jsonl")


def timeless(folder):
    return [{name: value for name, value in row.items() if name not in ("tokens/s", "seconds")} for row in rows(folder)]


def load_run(*flags, groups=()):
    """(config, model, tokenizer) as a run with these flags has them before its first step."""
    config = methods.parse_flags([*map(str, flags), "--device", "cpu"])
    config = methods.METHODS[config.method].settle(config, groups)
    base = train.base_folder(config)
    return config, train.build_model(config, base, groups), Tokenizer(base, config.template)


def small_pairs(view="safedpo", seed=0):
    """The pairs that runs in the small world train on."""
    return apply_view(view, toy.make_comparisons(COMPARISONS, seed))[0]


def preference_pairs(names, seed=0, count=COMPARISONS, annotators=0):
    """Those of runs that mix these preferences."""
    return apply_view("helpful", toy.make_preferences(count, seed, names, annotators))[0]


def first_batch(pairs, size=8, seed=0):
    """The pairs of the first step."""
    return [pairs[i] for i in np.random.default_rng([seed, 0]).permutation(len(pairs))[:size]]


def grouped_file(path, groups, count=36):
    """Pairs of the toy language in a file, labelled by these groups in turn; "" leaves the field out. Returns rows."""
    pairs = preference_pairs(("helpfulness", "harmlessness", "empathy"), 3, count)
    lines = []
    for pair, group in zip(pairs, itertools.cycle(groups)):
        lines.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "group": group})
        if not group:
            del lines[-1]["group"]
    write_rows(path, *lines)
    return lines


def scored_file(path, names, count=40):
    """Comparisons of the toy world in the layout of PKU-SafeRLHF, scored at random under these names. Returns rows."""
    rng, lines = np.random.default_rng(5), []
    for c in toy.make_comparisons(count, 0):
        lines.append({"prompt": c.prompt, "response_0": c.responses[0], "response_1": c.responses[1],
                      "is_response_0_safe": not c.unsafe[0], "is_response_1_safe": not c.unsafe[1],
                      "better_response_id": c.better, "safer_response_id": c.safer,
                      "scores": {name: rng.normal(size=2).tolist() for name in names}})
    write_rows(path, *lines)
    return lines


def interrupt_at(patch, step, number, times=1):
    """Send this signal while this step (counted from 0) is under way, so many times, as long as the patch holds."""
    schedule, left = train.learning_rate, [number] * times

    def interrupting(now, *rest):
        while now == step and left:
            os.kill(os.getpid(), left.pop())
        return schedule(now, *rest)
    patch.setattr(train, "learning_rate", interrupting)


@pytest.fixture
def policies(monkeypatch):
    """The trained models that runs hand over to be evaluated, in order."""
    handed_over = []

    def evaluate_run(policy, *rest, **named):
        handed_over.append(policy)
        return eval_file.evaluate_run(policy, *rest, **named)
    monkeypatch.setattr(train, "evaluate_run", evaluate_run)
    return handed_over


@pytest.fixture
def passes(monkeypatch):
    """[(Encoded, indices)] of the forward passes that runs train on, in order."""
    packed = []

    def recording(encoded, indices, *rest):
        packed.append((encoded, list(indices)))
        return pack(encoded, indices, *rest)
    monkeypatch.setattr(train, "pack", recording)
    return packed


@pytest.fixture
def encoded_lists(monkeypatch):
    """The lists of pairs that runs tokenise, in order: those to train on, then the held-out ones."""
    lists, encode_pairs = [], batch_file.encode_pairs

    def recording(tokenizer, pairs, *rest):
        lists.append(pairs)
        return encode_pairs(tokenizer, pairs, *rest)
    monkeypatch.setattr(train, "encode_pairs", recording)
    return lists


def check_that_it_is_evaluated_again_alike(out):
    """eval.py writes the bytes that the run wrote."""
    before = (out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()
    (out / "eval.json").unlink()
    (out / "samples.txt").unlink()
    eval_file.main([str(out)])
    assert ((out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()) == before


def check_that_it_loads_and_is_evaluated_alike(out, policy):
    """The run folder holds every tensor of the trained model, and eval.py writes the bytes that the run wrote."""
    trained, loaded = policy.state_dict(), checkpoint.load_policy(out)[0].state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[key], loaded[key]) for key in trained)
    check_that_it_is_evaluated_again_alike(out)


def byte_tokenizer(folder):
    """Write a tokenizer.json in which every byte is a token and a BOS goes before a text, as in Llama's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special,
                                                                   show_progress=False))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    return folder
