"""Reward and cost models: how they are trained, SPE-DPO's margins by them, and eval.py --score, against one sequence at
a time."""
import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import batch as batch_file
import checkpoint
import eval as eval_file
import judges as judges_file
import toy
from chat import Tokenizer
from checkpoint import load_model, save_model
from common import UserError
from conftest import (BASE, COMPARISONS, LAYOUTS, SMALL_MODEL, edit_json, edit_tensors, first_batch, json_lines,
                      mistake, rows, run, score_alone, scored_file, small_pairs, softplus, write_rows)
from data import apply_view, read_comparisons
from model import ModelConfig, ScoreModel, Transformer


def random_score_model(tokenizer_folder, folder, seed=0, **shape):
    """A score model with random weights, saved in a folder with a tokenizer's files. Returns the folder as text."""
    size = Tokenizer(tokenizer_folder).backend.get_vocab_size()
    shape = ModelConfig.from_hf({**SMALL_MODEL, "vocab_size": size, "hidden_size": 16, **shape})
    model = ScoreModel.from_policy(toy.init_weights(Transformer(shape), seed, deviation=0.3))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed + 3))
    model.folder = tokenizer_folder
    save_model(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def judges(bases, tmp_path_factory):
    """{"reward": folder, "cost": folder} of two random score models with the toy tokenizer."""
    folder = tmp_path_factory.mktemp("judges")
    return {name: random_score_model(bases / BASE, folder / name, seed + 2, num_hidden_layers=seed + 1)
            for seed, name in enumerate(("reward", "cost"))}


# Training


@pytest.mark.parametrize("lora", ((), ("--lora_rank", 4)), ids=("all weights", "lora"))
@pytest.mark.parametrize("method", ("reward", "cost"))
def test_a_score_model_is_saved_and_its_held_out_metrics_are_those_of_single_sequences(place, method, lora):
    out = run("run", "--method", method, *lora, "--max_steps", 6, "--log_every", 1)
    logged = rows(out)
    names = {"loss", "accuracy", "margin"} | ({"sign_accuracy"} if method == "cost" else set())
    assert all(names <= row.keys() and row["grad_norm"] > 0 for row in logged)
    assert logged[0]["loss"] == pytest.approx((1 if method == "reward" else 3) * math.log(2), rel=1e-6)
    assert logged[0]["accuracy"] == logged[0]["margin"] == 0.0, "every score is 0 before the first step"
    assert not (out / "adapter").exists() and not (out / "checkpoint").exists()

    train_prompts = {comparison.prompt for comparison in toy.make_comparisons(COMPARISONS, 0)}
    held_out = [c for c in toy.make_comparisons(COMPARISONS // 4, 1_000_000) if c.prompt not in train_prompts]
    losses, ordered, margins, signs, score = [], [], [], [], score_alone(out / "model")
    for pair in apply_view("helpful" if method == "reward" else "cost", held_out)[0]:
        chosen, rejected = (score(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        better, worse = (chosen, rejected) if method == "reward" else (rejected, chosen)
        margins.append(better - worse)
        ordered.append(better > worse)
        losses.append(softplus(worse - better))
        if method == "cost":
            signed = [cost if unsafe else -cost for cost, unsafe in
                      ((chosen, pair.chosen_unsafe), (rejected, pair.rejected_unsafe))]
            losses[-1] += sum(softplus(-cost) for cost in signed)
            signs += [cost > 0 for cost in signed]
    assert len(set(margins)) > 10 and statistics.stdev(margins) > 1e-3
    expected = {"loss": losses, "accuracy": ordered, "margin": margins} | ({"sign_accuracy": signs} if signs else {})
    for name, values in expected.items():
        assert logged[-1][f"eval/{name}"] == pytest.approx(statistics.mean(map(float, values)), rel=1e-4, abs=1e-6)

    base, stored = load_file(f"{BASE}/model.safetensors"), load_file(out / "model/model.safetensors")
    same = {name for name, tensor in base.items() if torch.equal(tensor, stored[name])}
    trained = {name for name in base if "down_proj" in name} if lora else set(base)
    assert stored.keys() == base.keys() | {"score.weight"} and stored["score.weight"].abs().min() > 0
    assert same == base.keys() - trained


def test_a_fresh_score_model_scores_everything_zero_and_can_learn(place):
    model, tokenizer = ScoreModel.from_policy(load_model(BASE)), Tokenizer(BASE)
    texts = [(pair.prompt, response) for pair in small_pairs("helpful")[:10] for response in (pair.chosen, "", "x")]
    assert batch_file.score(model, tokenizer, texts) == [0.0] * 30
    model(torch.tensor([[3, 4, 5]]), torch.tensor([2])).sum().backward()
    assert model.score.weight.grad.abs().min() > 0 and not model.model.norm.weight.grad.any()


def test_packed_and_batched_scores_are_those_of_single_sequences(judges):
    texts = [(pair.prompt, text) for pair in small_pairs("helpful")[:12] for text in (pair.chosen, pair.rejected)]
    for folder in judges.values():
        score = score_alone(folder)
        alone = [score(*text) for text in texts]
        judge = checkpoint.load_score_model(folder)
        assert batch_file.score(*judge, texts, batch_size=5) == pytest.approx(alone, rel=1e-4, abs=1e-5)
        assert statistics.stdev(alone) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("template, form", ((None, "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:{}</s>"),
                                            ("plain", "{}\n{}</s>")), ids=("their own", "plain"))
def test_score_models_of_safe_rlhf_are_asked_in_their_own_format(judges, tmp_path, template, form):
    """Unless another one is named."""
    folder = shutil.copytree(judges["cost"], tmp_path / "beaver")
    edit_tensors(folder / "model.safetensors", lambda t: t.update({"score_head.weight": t.pop("score.weight")}))
    edit_json(folder / "config.json", architectures=["LlamaForScore"], score_type="cost", bias=False)
    edit_json(folder / "tokenizer_config.json", add_bos_token=True)
    model, tokenizer = load_model(judges["cost"], kind=ScoreModel), Tokenizer(folder)
    texts, alone = [(pair.prompt, pair.chosen) for pair in small_pairs("helpful")[:4]], []
    for text in texts:
        ids = tokenizer.encode([tokenizer.bos + form.format(*text)])
        alone.append(float(model(torch.tensor(ids), torch.tensor([len(ids[0]) - 1]))))
    scores = batch_file.score(*checkpoint.load_score_model(folder, template), texts)
    assert scores == pytest.approx(alone, rel=1e-4, abs=1e-5) and statistics.stdev(alone) > 1e-2


# Margins of SPE-DPO


SIGNS = {"safety": -1, "helpful": 1}  # by how much the chosen one's cost is lower, or its reward higher
JUDGES = {"safety": "cost", "helpful": "reward"}


def margins_by(folder, view, pairs, template=None):
    """m = max(0, ±(s(chosen) − s(rejected))) of every pair by the score model in a folder, one sequence at a time."""
    score = score_alone(folder, template)
    return [max(0.0, SIGNS[view] * (score(pair.prompt, pair.chosen) - score(pair.prompt, pair.rejected)))
            for pair in pairs]


def check_first_row(out, margins):
    """At the first step Δr is 0, and −log σ(Δr − m) is log(1 + e^m)."""
    row = rows(out)[0]
    assert max(margins) > 1e-3
    assert row["loss"] == pytest.approx(statistics.mean(map(softplus, margins)), rel=1e-5)
    assert row["score_margin"] == pytest.approx(statistics.mean(margins), rel=1e-4, abs=1e-6)
    assert row["score_clipped"] == pytest.approx(sum(margin == 0 for margin in margins) / len(margins))
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5), "policy and reference are packed differently"


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_spe_dpo_on_toy_trains_its_score_model_first_and_takes_its_margins(place, view, capsys):
    flags = ("--method", "spe-dpo", "--view", view, "--max_steps", 6, "--log_every", 1)
    out, judge = run("run", *flags), JUDGES[view]
    other = {"cost": "reward", "reward": "cost"}[judge]
    assert (out / judge / "model").is_dir() and not (out / other).exists() and (out / "adapter").is_dir()
    margins = margins_by(out / judge / "model", view, small_pairs(view))
    check_first_row(out, first_batch(margins))
    printed = capsys.readouterr().out
    clipped = sum(margin == 0 for margin in margins) / len(margins)
    assert f"margins by {out / judge / 'model'}: mean" in printed
    assert f"clipped to 0 in {clipped:.1%} of the pairs" in printed

    again = run("given", *flags, f"--{judge}_model", out / judge / "model")
    assert rows(again)[0]["loss"] == rows(out)[0]["loss"] and not (again / judge).exists()
    assert (again / "adapter/adapter_model.safetensors").read_bytes() == (
        out / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_margins_come_from_the_scores_in_a_data_file(place, view):
    lines = scored_file("scored.jsonl", ("reward", "cost"))
    flags = ("--data", "scored.jsonl", "--held_out", 0, "--max_steps", 1, "--log_every", 1, "--batch_size", 6)
    out, margins = run("run", "--method", "spe-dpo", "--view", view, *flags), []
    for line in lines:
        if view == "safety" and line["is_response_0_safe"] == line["is_response_1_safe"]:
            continue
        chosen = line["safer_response_id" if view == "safety" else "better_response_id"]
        scores = line["scores"][JUDGES[view]]
        margins.append(max(0.0, SIGNS[view] * (scores[chosen] - scores[1 - chosen])))
    check_first_row(out, first_batch(margins, 6))
    assert not (out / "cost").exists() and not (out / "reward").exists()


def test_a_score_model_outranks_the_scores_in_the_data(place, judges):
    scored_file("scored.jsonl", ("reward", "cost"))
    out = run("other", "--method", "spe-dpo", "--view", "helpful", "--data", "scored.jsonl", "--held_out", 0,
              "--max_steps", 1, "--log_every", 1, "--reward_model", judges["reward"])
    pairs = first_batch(apply_view("helpful", toy.make_comparisons(40, 0))[0])
    check_first_row(out, margins_by(judges["reward"], "helpful", pairs))


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_without_a_score_model_or_scores_one_line_says_what_to_give(place, view):
    """Scores of the other sort do not do."""
    for names in ((), {"safety": ("reward",), "helpful": ("cost",)}[view]):
        scored_file("scored.jsonl", names)
        message = mistake("--method", "spe-dpo", "--view", view, "--data", "scored.jsonl", "--out", "out/wrong")
        assert f"--{JUDGES[view]}_model" in message and f"scores.{JUDGES[view]}" in message
    assert not Path("out/wrong").exists()


def tokenizer_of_its_own(folder):
    """A folder with a small vocabulary, special tokens and a chat template that are not the toy world's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<what>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "<what>", "<end>", "<begin>"],
                                             show_progress=False)
    backend.train_from_iterator([c.prompt + " " + c.responses[0] for c in toy.make_comparisons(50, 0)], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<begin>", "eos_token": "<end>", "chat_template":
        "{{ bos_token }}{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:"}))
    return folder


@pytest.mark.parametrize("template", (None, "plain"))
def test_a_score_model_reads_texts_with_its_own_tokenizer_and_template(place, template):
    """The policy's ids, up to 757, are not in its vocabulary of 150."""
    folder = random_score_model(tokenizer_of_its_own(place / "stranger"), place / "stranger/model", bos_token_id=3,
                                eos_token_id=2)
    assert Tokenizer(folder).backend.get_vocab_size() == 150
    out = run("run", "--method", "spe-dpo", "--view", "safety", "--max_steps", 1, "--log_every", 1,
              "--cost_model", folder, *(("--score_template", template) if template else ()))
    check_first_row(out, margins_by(folder, "safety", first_batch(small_pairs("safety")), template))


def test_a_score_model_that_puts_every_pair_the_other_way_is_not_taken_for_none(place):
    """Its margins are all 0, and SPE-DPO with margins of 0 is DPO."""
    save_model(ScoreModel.from_policy(load_model(BASE)), place / "zero")
    out = run("run", "--method", "spe-dpo", "--view", "safety", "--max_steps", 1, "--log_every", 1,
              "--cost_model", "zero")
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


# eval.py --score


ROW = {"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False,
       "better_response_id": 1, "safer_response_id": 0}


def score_file(judges, out, file=LAYOUTS / "pairs.jsonl"):
    eval_file.main(["--score", str(file), "--out", str(out), "--reward_model", judges["reward"],
                    "--cost_model", judges["cost"], "--device", "cpu"])
    return json_lines(out)


def test_scores_are_those_of_each_response_alone_and_rows_keep_their_order(judges, tmp_path):
    scored, before = score_file(judges, tmp_path / "scored.jsonl"), json_lines(LAYOUTS / "pairs.jsonl")
    assert [{**row, "scores": None} for row in scored] == [{**row, "scores": None} for row in before]
    for name, folder in judges.items():
        alone = score_alone(folder)
        for row in scored:
            expected = [alone(row["prompt"], row[field]) for field in ("chosen", "rejected")]
            assert row["scores"][name] == pytest.approx(expected, abs=1e-5)
    comparisons = read_comparisons([tmp_path / "scored.jsonl"], Counter())
    assert [c.scores["reward"] for c in comparisons] == [row["scores"]["reward"] for row in scored]


def test_ultrafeedback_scores_follow_the_completions_into_the_pairs(judges, tmp_path):
    [row] = score_file(judges, tmp_path / "scored.jsonl", LAYOUTS / "ultrafeedback" / "evol_instruct.jsonl")
    values = row["scores"]["cost"]
    comparisons = read_comparisons([tmp_path / "scored.jsonl"], Counter())
    assert len(values) == 4
    assert [c.scores["cost"] for c in comparisons] == [[values[0], values[j]] for j in (2, 3, 2)]


def test_scores_that_a_row_has_by_other_names_stay(judges, tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "scores": {"mine": [1, 2.5], "reward": [7.0, 7.0]}}
    eval_file.main(["--score", str(write_rows(tmp_path / "rows.jsonl", row)), "--out", str(tmp_path / "out.jsonl"),
                    "--reward_model", judges["reward"], "--device", "cpu"])
    [scored], alone = json_lines(tmp_path / "out.jsonl"), score_alone(judges["reward"])
    assert scored["scores"] == {"mine": [1, 2.5], "reward": pytest.approx([alone("p", "a"), alone("p", "b")], abs=1e-5)}


def test_interrupted_scoring_goes_on_where_it_stopped(judges, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", *({**ROW, "prompt": f"question {i}"} for i in range(10)))
    whole = score_file(judges, tmp_path / "whole.jsonl", file)
    monkeypatch.setattr(judges_file, "BLOCK", 4)
    score, calls = batch_file.score, []

    def stops(*arguments):
        calls.append(len(arguments[2]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(judges_file, "score", stops)
    with pytest.raises(KeyboardInterrupt):
        score_file(judges, tmp_path / "out.jsonl", file)
    assert not (tmp_path / "out.jsonl").exists()
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    with open(partial, "ab") as torn:
        torn.write(b'{"prompt": "ques')
    resumed = score_file(judges, tmp_path / "out.jsonl", file)
    assert calls[5:] == [4, 4] and not partial.exists()  # the two rows that were left, once for each model
    assert len(resumed) == 10
    for one, other in zip(whole, resumed):
        assert other["scores"] == {name: pytest.approx(values, abs=1e-5) for name, values in one["scores"].items()}


def test_a_partial_file_by_another_score_model_is_not_gone_on_with(judges, tmp_path, monkeypatch):
    """Also where the other one has taken its place in the same folder."""
    file = write_rows(tmp_path / "rows.jsonl", *({**ROW, "prompt": f"question {i}"} for i in range(4)))
    out, reward, score = tmp_path / "out.jsonl", str(shutil.copytree(judges["reward"], tmp_path / "judge")), batch_file.score

    def stops(*arguments):
        if any(len(path.read_text().splitlines()) == 2 for path in tmp_path.glob("*.partial")):
            raise KeyboardInterrupt
        return score(*arguments)
    monkeypatch.setattr(judges_file, "BLOCK", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(judges_file, "score", stops)
        score_file({**judges, "reward": reward}, out, file)
    shutil.copytree(judges["cost"], reward, dirs_exist_ok=True)
    for others in ({"reward": judges["cost"], "cost": judges["reward"]}, {**judges, "reward": reward}):
        for name, folder in others.items():
            alone = score_alone(folder)
            for row in score_file(others, out, file):
                expected = [alone(row["prompt"], row[f"response_{i}"]) for i in (0, 1)]
                assert row["scores"][name] == pytest.approx(expected, abs=1e-5)


def test_a_partial_file_of_other_rows_is_not_gone_on_with(judges, tmp_path):
    (tmp_path / "out.jsonl.0123456789ab.partial").write_text('{"prompt": "something else"}\n')
    scored = score_file(judges, tmp_path / "out.jsonl", write_rows(tmp_path / "rows.jsonl", ROW))
    assert [row["prompt"] for row in scored] == ["p"]


def test_scoring_without_a_model_or_with_a_bad_row_is_one_line(judges, tmp_path):
    with pytest.raises(UserError, match="--score needs --out FILE.jsonl and at least one of --reward_model"):
        eval_file.main(["--score", str(LAYOUTS / "pairs.jsonl")])
    file = write_rows(tmp_path / "rows.jsonl", ROW, {**ROW, "prompt": ""})
    with pytest.raises(UserError, match="rows.jsonl:2: 'prompt' is empty"):
        score_file(judges, tmp_path / "out.jsonl", file)
