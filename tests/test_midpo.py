"""MidPO in whole runs on a toy world made small: score models, margins, experts, routers, and which stages are kept."""
import json
import math
import shutil
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import eval as eval_file
import train
from data import Tokenizer, apply_view, toy_comparisons
from lora_moe import expert_layers
from model import ModelConfig, ScoreModel, Transformer, UserError, generate, read_json
from test_train import (COMPARISONS, SMALL_MODEL, bases, interrupt_at, line_of, make_small, place,  # noqa: F401
                        rows, run, small_pairs)

STAGES = ["reward", "cost", "safety", "helpful"]
FLAGS = ("--method", "midpo", "--max_steps", 4, "--log_every", 1, "--batch_size", 4)
ADAPTERS = "out/run/safety/adapter,out/run/helpful/adapter"


def hurry(patch):
    """In a handful of steps score models come to differ from 0, and experts from the base; answers are short."""
    for name, rate in (("reward", 3e-2), ("cost", 3e-2), ("spe-dpo", 1e-2)):
        patch.setitem(train.METHODS[name].toy, "lr", rate)
    patch.setattr(eval_file, "generate", lambda model, prompts, count, *rest, **named:
                  generate(model, prompts, min(count, 5), *rest, **named))


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def finished(bases, tmp_path_factory):
    """A folder in which out/run is a whole run of MidPO."""
    folder = tmp_path_factory.mktemp("midpo")
    shutil.copytree(bases / "out", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small(patch)
        hurry(patch)
        run("run", *FLAGS)
    return folder


@pytest.fixture
def mixture(finished, place):
    """out/run in a folder of its own, a copy of the finished run with the times of its files."""
    shutil.copytree(finished / "out" / "run", "out/run")
    return Path("out/run")


def base_model():
    return Transformer.from_pretrained("out/toy-base-seed0")


def scorer(folder, template=None):
    """(prompt, response) -> a score model's plain forward pass over this one sequence, read at its EOS."""
    model, tokenizer = ScoreModel.from_pretrained(folder), Tokenizer(folder, template)

    @torch.no_grad()
    def score(prompt, response):
        tokens = sum(tokenizer.encode([tokenizer.render(prompt), response]), []) + [tokenizer.eos_id]
        return float(model.model(torch.tensor([tokens]))[0, -1] @ model.score.weight[0])
    return score


def softplus(z):
    """−log σ(−z)."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


# Score models


@pytest.mark.parametrize("lora", ((), ("--lora_rank", 4)), ids=("all weights", "lora"))
@pytest.mark.parametrize("method", ("reward", "cost"))
def test_a_score_model_is_saved_and_its_held_out_figures_are_those_of_single_sequences(place, method, lora):
    out = run("run", "--method", method, *lora, "--max_steps", 6, "--log_every", 1)
    logged = rows(out)
    names = {"loss", "accuracy", "margin"} | ({"sign_accuracy"} if method == "cost" else set())
    assert all(names <= row.keys() and row["grad_norm"] > 0 for row in logged)
    assert logged[0]["loss"] == pytest.approx((1 if method == "reward" else 3) * math.log(2), rel=1e-6)
    assert logged[0]["accuracy"] == logged[0]["margin"] == 0.0, "every score is 0 before the first step"
    assert not (out / "adapter").exists() and not (out / "checkpoint").exists()

    seen = {comparison.prompt for comparison in toy_comparisons(COMPARISONS, 0)}
    held_out = [c for c in toy_comparisons(COMPARISONS // 4, 1_000_000) if c.prompt not in seen]
    losses, ordered, margins, signs, score = [], [], [], [], scorer(out / "model")
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

    base, stored = load_file("out/toy-base-seed0/model.safetensors"), load_file(out / "model/model.safetensors")
    same = {name for name, tensor in base.items() if torch.equal(tensor, stored[name])}
    trained = {name for name in base if "down_proj" in name} if lora else set(base)
    assert stored.keys() == base.keys() | {"score.weight"} and stored["score.weight"].abs().min() > 0
    assert same == base.keys() - trained


def test_a_fresh_score_model_scores_everything_zero_and_can_learn(place):
    model, tokenizer = ScoreModel.from_policy(base_model()), Tokenizer("out/toy-base-seed0")
    texts = [(pair.prompt, response) for pair in small_pairs("helpful")[:10] for response in (pair.chosen, "", "x")]
    assert eval_file.score(model, tokenizer, texts) == [0.0] * 30
    model(torch.tensor([[3, 4, 5]]), torch.tensor([2])).sum().backward()
    assert model.score.weight.grad.abs().min() > 0 and not model.model.norm.weight.grad.any()


def test_packed_and_batched_scores_are_those_of_single_sequences(mixture):
    texts = [(pair.prompt, text) for pair in small_pairs("helpful")[:12] for text in (pair.chosen, pair.rejected)]
    for name in ("reward", "cost"):
        score = scorer(mixture / name / "model")
        alone = [score(*text) for text in texts]
        judge = eval_file.load_judge(mixture / name / "model")
        assert eval_file.score(*judge, texts, batch_size=5) == pytest.approx(alone, rel=1e-4, abs=1e-5)
        assert statistics.stdev(alone) > 1e-3


# Margins


SIGNS = {"safety": -1, "helpful": 1}  # by how much the chosen one's cost is lower, or its reward higher
JUDGES = {"safety": "cost", "helpful": "reward"}


def first_batch(pairs, size=8, seed=0):
    return [pairs[i] for i in np.random.default_rng([seed, 0]).permutation(len(pairs))[:size]]


def check_first_row(out, margins):
    """At the first step Δr is 0, and −log σ(Δr − m) is log(1 + e^m)."""
    row = rows(out)[0]
    assert max(margins) > 1e-3
    assert row["loss"] == pytest.approx(statistics.mean(map(softplus, margins)), rel=1e-5)
    assert row["score_margin"] == pytest.approx(statistics.mean(margins), rel=1e-4, abs=1e-6)
    assert row["score_clipped"] == pytest.approx(sum(margin == 0 for margin in margins) / len(margins))
    assert row["rewards/margins"] == 0.0


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_spe_dpo_on_toy_trains_its_score_model_first_and_takes_its_margins(place, view, capsys):
    flags = ("--method", "spe-dpo", "--view", view, "--max_steps", 6, "--log_every", 1)
    out, judge = run("run", *flags), JUDGES[view]
    other = {"cost": "reward", "reward": "cost"}[judge]
    assert (out / judge / "model").is_dir() and not (out / other).exists() and (out / "adapter").is_dir()
    pairs, score = small_pairs(view), scorer(out / judge / "model")
    scores = [[score(pair.prompt, text) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    margins = [max(0.0, SIGNS[view] * (chosen - rejected)) for chosen, rejected in scores]
    check_first_row(out, first_batch(margins))
    said = capsys.readouterr().out
    clipped = sum(margin == 0 for margin in margins) / len(margins)
    assert f"margins by {out / judge / 'model'}: mean" in said and f"clipped to 0 in {clipped:.1%} of the pairs" in said

    again = run("given", *flags, f"--{judge}_model", out / judge / "model")
    assert rows(again)[0]["loss"] == rows(out)[0]["loss"] and not (again / judge).exists()
    assert (again / "adapter/adapter_model.safetensors").read_bytes() == (
        out / "adapter/adapter_model.safetensors").read_bytes()


def preference_file(path, names, count=40):
    """Comparisons of the toy world in the layout of PKU-SafeRLHF, scored at random under these names."""
    rng, lines = np.random.default_rng(5), []
    for c in toy_comparisons(count, 0):
        lines.append({"prompt": c.prompt, "response_0": c.responses[0], "response_1": c.responses[1],
                      "is_response_0_safe": not c.unsafe[0], "is_response_1_safe": not c.unsafe[1],
                      "better_response_id": c.better, "safer_response_id": c.safer,
                      "scores": {name: rng.normal(size=2).tolist() for name in names}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_margins_come_from_the_scores_in_a_data_file(place, view):
    lines = preference_file(place / "scored.jsonl", ("reward", "cost"))
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


def test_a_score_model_outranks_the_scores_in_the_data(mixture):
    preference_file(Path("scored.jsonl"), ("reward", "cost"))
    folder = mixture / "reward" / "model"
    out = run("other", "--method", "spe-dpo", "--view", "helpful", "--data", "scored.jsonl", "--held_out", 0,
              "--max_steps", 1, "--log_every", 1, "--reward_model", folder)
    margins, score = [], scorer(folder)
    for pair in first_batch(apply_view("helpful", toy_comparisons(40, 0))[0]):
        margins.append(max(0.0, score(pair.prompt, pair.chosen) - score(pair.prompt, pair.rejected)))
    check_first_row(out, margins)


@pytest.mark.parametrize("view", ("safety", "helpful"))
def test_without_a_score_model_or_scores_one_line_says_what_to_give(place, view):
    """Scores of the other sort do not do."""
    for names in ((), {"safety": ("reward",), "helpful": ("cost",)}[view]):
        preference_file(place / "scored.jsonl", names)
        message = line_of("--method", "spe-dpo", "--view", view, "--data", "scored.jsonl", "--out", "out/wrong")
        assert f"--{JUDGES[view]}_model" in message and f"scores.{JUDGES[view]}" in message
    assert not Path("out/wrong").exists()


def stranger(folder, seed=0):
    """A score model with random weights, a small vocabulary, special tokens and a chat template of its own."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<what>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "<what>", "<end>", "<begin>"],
                                             show_progress=False)
    backend.train_from_iterator([c.prompt + " " + c.responses[0] for c in toy_comparisons(50, 0)], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<begin>", "eos_token": "<end>", "chat_template":
        "{{ bos_token }}{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:"}))
    shape = ModelConfig.from_hf({**SMALL_MODEL, "vocab_size": 150, "hidden_size": 16, "bos_token_id": 3,
                                 "eos_token_id": 2})
    model = ScoreModel.from_policy(Transformer(shape).init_weights(seed, deviation=0.3))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
    model.folder = folder
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("template", (None, "plain"))
def test_a_score_model_reads_texts_with_its_own_tokenizer_and_template(place, template):
    """The policy's ids, up to 757, are not in its vocabulary of 150."""
    folder = stranger(place / "stranger")
    out = run("run", "--method", "spe-dpo", "--view", "safety", "--max_steps", 1, "--log_every", 1,
              "--cost_model", folder, *(("--score_template", template) if template else ()))
    margins, score = [], scorer(folder, template)
    for pair in first_batch(small_pairs("safety")):
        chosen, rejected = (score(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        margins.append(max(0.0, rejected - chosen))
    check_first_row(out, margins)


def test_a_score_model_that_puts_every_pair_the_other_way_is_not_taken_for_none(place):
    """Its margins are all 0, and SPE-DPO with margins of 0 is DPO; or one line says what is wrong with the model."""
    model = ScoreModel.from_policy(base_model())
    model.save_pretrained(place / "zero")
    try:
        out = run("run", "--method", "spe-dpo", "--view", "safety", "--max_steps", 1, "--log_every", 1,
                  "--cost_model", "zero")
        assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    except UserError as error:
        assert "zero" in str(error) and "name a score model" not in str(error), str(error)


# Stages


def test_a_run_of_midpo_leaves_every_stage_in_a_folder_of_its_own(mixture):
    wanted = {"reward": ("reward", "helpful", "model"), "cost": ("cost", "cost", "model"),
              "safety": ("spe-dpo", "safety", "adapter"), "helpful": ("spe-dpo", "helpful", "adapter")}
    for name, (method, view, weights) in wanted.items():
        config = read_json(mixture / name / "config.json")
        assert (config["method"], config["view"], config["seed"]) == (method, view, 0)
        assert (mixture / name / weights).is_dir() and len(rows(mixture / name)) == 4
    for name in ("safety", "helpful"):
        config = read_json(mixture / name / "config.json")
        assert (config["lora_rank"], config["lora_alpha"], config["lora_targets"]) == (16, 32.0, "down_proj")
        assert config["beta"] == 0.1 and config["weight_decay"] == 0.01
    config = read_json(mixture / "config.json")
    assert config["method"] == "midpo" and config["view"] == "dual" and config["weight_decay"] == 0.0
    assert sorted(path.name for path in mixture.iterdir() if path.is_dir()) == sorted([*STAGES, "experts"])
    for row in rows(mixture):
        assert {"router/l1", "router/safety", "router/helpfulness", "rewards/margins"} <= row.keys()
        assert 0 < row["router/safety"] < 1 and 0 < row["router/helpfulness"] < 1
        assert row["router/l1"] == pytest.approx(row["router/safety"] + 1 - row["router/helpfulness"], rel=1e-5)


def test_a_second_call_keeps_the_stages_and_gives_the_same_bytes(mixture, capsys):
    before, experts = {name: stamps(mixture / name) for name in STAGES}, (mixture / "experts/experts.safetensors")
    content = experts.read_bytes()
    run("run", *FLAGS)
    said = capsys.readouterr().out
    for name in STAGES:
        assert f"{mixture / name}: complete for these settings, kept" in said
        assert before[name] == stamps(mixture / name)
    assert experts.read_bytes() == content


def runs_of(patch, *flags):
    """The names of the folders in which this command would train, in order; nothing is trained."""
    started = []
    with patch.context() as inner:
        inner.setattr(train, "run", lambda config: started.append(Path(config.out).name))
        run("run", *FLAGS, *flags)
    return started


@pytest.mark.parametrize("flags, again", (
    (("--router_l1", 1), []), (("--router_hidden", 8), []), (("--router_activation", "relu"), []), (("--lr", 1e-4), []),
    (("--weight_decay", 0.1), []), (("--eval_every", 2), []), (("--temperature", 0.1), []), (("--epochs", 9), []),
    (("--beta", 0.2), STAGES[2:]), (("--label_smoothing", 0.1), STAGES[2:]), (("--lora_rank", 4), STAGES[2:]),
    (("--lora_alpha", 8), STAGES[2:]),
    (("--seed", 1), STAGES), (("--batch_size", 2), STAGES), (("--max_steps", 3), STAGES),
    (("--flip_preference", 0.1), STAGES), (("--max_len", 100), STAGES), (("--dtype", "bfloat16"), STAGES),
    (("--harmful_share", 0.5), STAGES), (("--model", "out/toy-base-seed1"), STAGES)),
    ids=lambda value: " ".join(map(str, value)))
def test_a_changed_setting_trains_the_stages_that_it_matters_to(mixture, monkeypatch, flags, again):
    assert runs_of(monkeypatch) == ["run"]
    assert runs_of(monkeypatch, *flags) == [*again, "run"]


def test_the_router_alone_is_trained_again_with_another_l1_and_the_experts_with_another_beta(mixture):
    config, before = read_json(mixture / "config.json"), {name: stamps(mixture / name) for name in STAGES}
    run("run", *FLAGS, "--router_l1", 1)
    assert before == {name: stamps(mixture / name) for name in STAGES}
    assert config["router_l1"] == 0.001 and read_json(mixture / "config.json")["router_l1"] == 1
    run("run", *FLAGS, "--router_l1", 1, "--beta", 0.2)
    after = {name: stamps(mixture / name) for name in STAGES}
    assert [name for name in STAGES if before[name] != after[name]] == ["safety", "helpful"]
    assert read_json(mixture / "safety/config.json")["beta"] == 0.2


@pytest.mark.parametrize("name, weights", (("reward", "model"), ("safety", "adapter"), ("helpful", "adapter")))
def test_a_stage_without_its_weights_is_run_again(mixture, monkeypatch, name, weights):
    shutil.rmtree(mixture / name / weights)
    again = runs_of(monkeypatch)
    assert again[0] == name and again[-1] == "run" and "cost" not in again
    assert name == "reward" or again == [name, "run"]


def test_the_safety_expert_is_trained_again_when_the_cost_model_changes(mixture, monkeypatch):
    """First with the cost model as it was, to the same bytes of all; then with one that scores otherwise."""
    stored = {path: path.read_bytes() for path in mixture.rglob("*.safetensors")}
    shutil.rmtree(mixture / "cost/model")
    before = {name: stamps(mixture / name) for name in STAGES}
    run("run", *FLAGS)
    after = {name: stamps(mixture / name) for name in STAGES}
    changed = [name for name in STAGES if before[name] != after[name]]
    assert {"cost", "safety"} <= set(changed) and "reward" not in changed
    assert stored == {path: path.read_bytes() for path in mixture.rglob("*.safetensors")}

    model = ScoreModel.from_pretrained(mixture / "cost/model")
    model.score.weight.data.mul_(20)
    model.save_pretrained(mixture / "cost/model")
    assert "safety" in runs_of(monkeypatch)
    run("run", *FLAGS)
    adapter = mixture / "safety/adapter/adapter_model.safetensors"
    assert adapter.read_bytes() != stored[adapter]


def test_what_is_given_is_not_trained(mixture, monkeypatch):
    shutil.copytree(mixture, "given")
    shutil.rmtree(mixture)
    reward, cost = (("--reward_model", "given/reward/model"), ("--cost_model", "given/cost/model"))
    assert runs_of(monkeypatch) == [*STAGES, "run"]
    assert runs_of(monkeypatch, *reward) == ["cost", "safety", "helpful", "run"]
    assert runs_of(monkeypatch, *cost) == ["reward", "safety", "helpful", "run"]
    assert runs_of(monkeypatch, *reward, *cost) == ["safety", "helpful", "run"]
    assert runs_of(monkeypatch, "--init_adapter", ADAPTERS.replace("out/run", "given")) == ["run"]
    for names, needed in (((), ["reward", "cost"]), (("reward",), ["cost"]), (("cost",), ["reward"]),
                          (("reward", "cost"), [])):
        preference_file(Path("scored.jsonl"), names)
        assert runs_of(monkeypatch, "--data", "scored.jsonl") == [*needed, "safety", "helpful", "run"]


def test_midpo_on_a_data_file_with_scores_trains_no_score_model(place):
    preference_file(place / "scored.jsonl", ("reward", "cost"))
    out = run("run", *FLAGS, "--data", "scored.jsonl")
    assert not (out / "reward").exists() and not (out / "cost").exists() and (out / "experts").is_dir()
    assert all(rows(out / name)[0]["score_margin"] > 0.1 for name in ("safety", "helpful"))


@pytest.mark.parametrize("name, step, number", (("safety", 2, signal.SIGINT), ("run", 1, signal.SIGTERM)))
def test_an_interrupted_run_of_midpo_goes_on_to_the_same_bytes(finished, place, monkeypatch, name, step, number):
    """Whether the signal comes while an expert is trained or while the routers are."""
    schedule, trained = train.learning_rate, train.train

    def train_here(model, encoded, reference, config, *rest):
        undo = interrupt_at(monkeypatch, step, number) if Path(config.out).name == name else lambda: None
        trained(model, encoded, reference, config, *rest)
        undo()

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", train_here)
        with pytest.raises(KeyboardInterrupt):
            run("run", *FLAGS)
    monkeypatch.setattr(train, "learning_rate", schedule)
    out = run("run", *FLAGS, "--resume")
    for path in sorted((finished / "out/run").rglob("*.safetensors")):
        assert path.read_bytes() == (out / path.relative_to(finished / "out/run")).read_bytes(), path.name
    assert not list(out.rglob("checkpoint"))


# The routers


def test_the_experts_and_the_base_are_frozen_bit_for_bit_while_routers_learn(mixture):
    stored, base = load_file(mixture / "experts/experts.safetensors"), load_file("out/toy-base-seed0/model.safetensors")
    fresh = train.load_model(train.parse_flags([*map(str, FLAGS), "--init_adapter", ADAPTERS, "--device", "cpu"]))[0]
    seen = 0
    for name, tensor in stored.items():
        if name.endswith("lora_A") or name.endswith("lora_B"):
            parts = [load_file(mixture / view / "adapter/adapter_model.safetensors")[f"base_model.model.{name}.weight"]
                     for view in ("safety", "helpful")]
            assert torch.equal(tensor, torch.cat(parts, dim=0 if name.endswith("A") else 1)), name
            assert parts[0].any() and not torch.equal(*parts)
            seen += 1
        else:
            assert ".router.networks." in name and not torch.equal(tensor, fresh.state_dict()[name]), name
    assert seen == 2 and len(stored) == 2 + 2 * 6
    loaded = eval_file.load_policy(mixture)[0].state_dict()
    assert all(torch.equal(loaded[name.replace("down_proj.", "down_proj.base.")], base[name]) for name in base)
    assert load_file("out/toy-base-seed0/model.safetensors").keys() == base.keys()


def test_nothing_but_the_routers_moves_in_memory_either(mixture, monkeypatch):
    moved, trained = [], train.train

    def watch(model, *rest):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained(model, *rest)
        moved.extend(name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name]))
        assert not any(p.grad is not None for name, p in model.named_parameters() if ".router." not in name)

    monkeypatch.setattr(train, "train", watch)
    run("run", *FLAGS)
    assert len(moved) == 2 * 6 and all(".router." in name for name in moved)


def test_first_loss_of_the_routers_is_dpo_plus_the_l1_term_of_single_sequences(mixture):
    """The L1 term is over every token of the packed batch once: a pair's prompt, and both of its responses."""
    config = train.parse_flags([*map(str, FLAGS), "--init_adapter", ADAPTERS, "--device", "cpu"])
    model, tokenizer = train.load_model(config)
    base, losses, distances = base_model(), [], []

    @torch.no_grad()
    def logp(network, prompt, response):
        logps = network.logits(network(torch.tensor([prompt + response])))[0].log_softmax(-1)
        return sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))

    def distance(start):
        for _, layer in expert_layers(model):
            for safety, helpfulness in layer.weights[0, start:].tolist():
                distances.append(abs(safety) + abs(helpfulness - 1))

    pairs = apply_view("dual", toy_comparisons(COMPARISONS, 0, config.harmful_share))[0]
    for pair in first_batch(pairs, 4):
        prompt, *responses = tokenizer.encode([tokenizer.render(pair.prompt), pair.chosen, pair.rejected])
        rewards = []
        for i, response in enumerate(responses):
            response = response + [tokenizer.eos_id]
            rewards.append(0.1 * (logp(model, prompt, response) - logp(base, prompt, response)))
            distance(len(prompt) if i else 0)
        losses.append(softplus(rewards[1] - rewards[0]))
    l1, dpo = statistics.mean(distances), statistics.mean(losses)
    assert abs(dpo - math.log(2)) > 1e-3 and 0 < l1 < 2
    for weight in (0, 0.001, 1, 30):
        row = rows(run("run", *FLAGS, "--router_l1", weight))[0]
        assert row["router/l1"] == pytest.approx(l1, rel=1e-5)
        assert row["loss"] == pytest.approx(dpo + weight * l1, rel=1e-5)


def test_a_heavy_l1_term_switches_helpfulness_on_and_safety_off(mixture):
    """Against what the pairs pull to: the two adapters change places, so that DPO alone does the opposite."""
    swapped = ",".join(ADAPTERS.split(",")[::-1])
    flags = (*FLAGS[:-1], 8, "--init_adapter", swapped, "--max_steps", 12, "--lr", 1e-2)
    free, pulled = (rows(run(f"pulled-{weight}", *flags, "--router_l1", weight))[-1] for weight in (0, 10))
    assert pulled["router/safety"] < 0.3 < 0.7 < pulled["router/helpfulness"] and pulled["router/l1"] < 0.6
    assert free["router/helpfulness"] < 0.4 < 0.6 < free["router/safety"] and free["router/l1"] > 1.2


@pytest.mark.parametrize("activation", ("", "silu"))
def test_checkpointing_trains_the_same_routers(mixture, activation):
    flags = (*FLAGS, "--init_adapter", ADAPTERS, "--router_activation", activation, "--router_l1", 0.1)
    kept, again = run("kept", *flags), run("again", *flags, "--checkpointing")
    for one, other in zip(rows(kept), rows(again)):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    one, other = (load_file(out / "experts/experts.safetensors") for out in (kept, again))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_midpo_runs_in_bfloat16(place):
    out = run("run", *FLAGS, "--dtype", "bfloat16")
    for folder in (out, *(out / name for name in STAGES)):
        assert all(math.isfinite(value) for row in rows(folder) for value in row.values())
    stored = load_file(out / "experts/experts.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


# The finished mixture


@torch.no_grad()
def test_the_loaded_mixture_generates_what_step_by_step_argmax_without_a_cache_gives(mixture):
    policy, tokenizer, _ = eval_file.load_policy(mixture)
    for _, layer in expert_layers(policy):  # the base repeats one word; with experts this large something happens
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(0)))
        for parameter in layer.router.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 0)
    prompts = tokenizer.encode([tokenizer.render(p.text) for p in eval_file.toy_eval_prompts("test", 0)[:5]])
    assert len({len(prompt) for prompt in prompts}) > 1
    answers = generate(policy, prompts, 12)
    assert len({token for answer in answers for token in answer}) > 3
    for prompt, answer in zip(prompts, answers):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(policy.logits(policy(torch.tensor([tokens])))[0, -1].argmax()))
        assert tokens[len(prompt):] == answer
        assert all(layer.weights[0].std(dim=0).min() > 0.01 for _, layer in expert_layers(policy))


def test_the_finished_mixture_is_evaluated_again_with_the_same_result(mixture):
    before = (mixture / "eval.json").read_bytes(), (mixture / "samples.txt").read_bytes()
    eval_file.main([str(mixture), "--device", "cpu"])
    assert ((mixture / "eval.json").read_bytes(), (mixture / "samples.txt").read_bytes()) == before


@torch.no_grad()
@pytest.mark.parametrize("split", ("test", "dev"))
def test_the_report_on_routers_is_the_median_at_the_last_token_of_each_prompt_alone(mixture, split):
    eval_file.main([str(mixture), "--device", "cpu", "--split", split])
    policy, tokenizer, _ = eval_file.load_policy(mixture)
    prompts = eval_file.toy_eval_prompts(split, 0)
    report = read_json(mixture / "eval.json")["router"]
    assert report.keys() == {name for name, _ in expert_layers(policy)} and len(prompts) > 30
    for name, layer in expert_layers(policy):
        given, weights = [], {True: [], False: []}
        hook = layer.router.register_forward_hook(lambda module, inputs, output: given.append(output[0, -1].tolist()))
        for prompt in prompts:
            policy(torch.tensor(tokenizer.encode([tokenizer.render(prompt.text)])))
            weights[prompt.task.harmful].append(given[-1])
        hook.remove()
        assert len(given) == len(prompts) and statistics.stdev(safety for safety, _ in given) > 1e-5
        for kind, harmful in (("harmful", True), ("safe", False)):
            medians = [statistics.median(column) for column in zip(*weights[harmful])]
            assert report[name][kind] == pytest.approx(medians, abs=1e-6)
        shares = [[weight / sum(row) for weight in row] for row in given]
        entropy = statistics.mean(-sum(share * math.log(share) for share in row) for row in shares)
        assert report[name]["entropy"] == pytest.approx(entropy, rel=1e-5)


@torch.no_grad()
def test_static_weights_evaluate_the_merged_model_beside_the_runs_own_result(mixture, monkeypatch, capsys):
    """W + 0.5 · 32/16 · (B_s A_s + B_h A_h), from the adapters' files in float64."""
    judged, evaluate = [], eval_file.evaluate_toy
    monkeypatch.setattr(eval_file, "evaluate_toy", lambda model, *rest: judged.append(model) or evaluate(model, *rest))
    before = {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
    eval_file.main([str(mixture), "--static", "0.5,0.5", "--device", "cpu"])
    report = read_json(mixture / "eval-static-0.5,0.5.json")
    assert report["policy"]["n"] == len(eval_file.toy_eval_prompts("test", 0)) and "router" not in report
    assert f"| {mixture} at 0.5,0.5 |" in capsys.readouterr().out
    added = {path.name for path in mixture.rglob("*") if path.is_file() and path not in before}
    assert added == {"eval-static-0.5,0.5.json", "samples-static-0.5,0.5.txt"}
    assert all(path.read_bytes() == content for path, content in before.items())
    merged, base = judged[1], judged[0]
    assert not list(expert_layers(merged)) and merged.state_dict().keys() == base.state_dict().keys()
    for name, weight in base.state_dict().items():
        wanted = weight.double()
        if "down_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for view in ("safety", "helpful"):
                adapter = load_file(mixture / view / "adapter/adapter_model.safetensors")
                A, B = (adapter[f"{module}.lora_{part}.weight"].double() for part in "AB")
                wanted = wanted + 0.5 * 32 / 16 * B @ A
            assert (wanted - weight).norm() > 1e-3 * weight.norm()
        assert torch.allclose(merged.state_dict()[name].double(), wanted, atol=1e-6), name


@pytest.mark.parametrize("weights", ("0.5", "0.5,0.5,0.5", "a,b", "0.5,", "nan,1", "inf,0"))
def test_static_weights_that_do_not_fit_are_answered_with_one_line(mixture, weights):
    before = {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        eval_file.main([str(mixture), "--static", weights, "--device", "cpu"])
    assert f"--static {weights}" in str(caught.value) and "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}


def test_a_run_without_experts_has_no_static_weights(place):
    out = run("run", "--method", "dpo", "--max_steps", 1)
    with pytest.raises(UserError, match="--static 0.5,0.5") as caught:
        eval_file.main([str(out), "--static", "0.5,0.5", "--device", "cpu"])
    assert "\n" not in str(caught.value)


# Adapters that are given


def test_two_given_adapters_take_the_place_of_the_stages(mixture):
    out = run("given", *FLAGS, "--init_adapter", ADAPTERS)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"experts"}
    assert (out / "experts/experts.safetensors").read_bytes() == (mixture / "experts/experts.safetensors").read_bytes()
    assert rows(out)[0]["loss"] == rows(mixture)[0]["loss"]


@pytest.mark.parametrize("given", (
    "out/run/safety/adapter", f"{ADAPTERS},out/run/helpful/adapter", "out/run/safety/adapter,out/none",
    "out/run/safety/adapter,out/run/helpful", "out/run/safety/adapter,out/run/reward/model",
    "out/run/safety/adapter,other/adapter", "out/run/safety/adapter,"),
    ids=("one", "three", "no folder", "run folder", "no adapter", "other rank", "empty name"))
def test_adapters_that_are_not_two_of_one_shape_are_answered_with_one_line(mixture, given):
    if "other" in given:
        config = read_json(mixture / "helpful/adapter/adapter_config.json")
        shutil.copytree(mixture / "helpful/adapter", "other/adapter")
        Path("other/adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    message = line_of(*map(str, FLAGS), "--init_adapter", given, "--out", "out/wrong")
    assert "adapter" in message
    assert not Path("out/wrong").exists()
