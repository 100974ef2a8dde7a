"""Whole runs on a toy world made small: what they write, their first loss, that they repeat and resume, the loop."""
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import eval as eval_file
import methods
import model as model_file
import toy
import train
from batch import encode_pairs
from chat import Tokenizer
from checkpoint import load_adapter, load_model
from common import read_json
from conftest import (BASE, ROOT, SHAPES, SIZES, brute_force, check_that_it_is_evaluated_again_alike, files_of,
                      first_batch, ids_of, interrupt_at, json_lines, leftovers, load_run, logits_of, logp_alone,
                      packed_logps, rows, run, small_pairs, timeless, write_rows)
from lora_moe import perturb_experts
from model import ModelConfig, Transformer

TIMES = ("step", "epoch", "seconds", "lr", "tokens/s")
LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
          "logps/rejected", "grad_norm")
EVALUATED = ("helpfulness", "helpfulness_safe", "harmless_ratio", "harmless_ratio_unsafe", "harmless_ratio_unseen",
             "over_refusal", "over_refusal_alarming", "unsafe_refusal", "degenerate")

# Whole runs


@pytest.mark.parametrize("flags", (
    ("--method", "safedpo", "--delta", 10), ("--method", "safedpo", "--lora_rank", 4),
    ("--method", "dpo", "--view", "helpful"), ("--method", "dpo", "--view", "harmless", "--lora_rank", 4),
    ("--method", "dpo", "--view", "safe-better"), ("--method", "sft"), ("--method", "sft", "--lora_rank", 4),
), ids=lambda flags: " ".join(map(str, flags)))
def test_a_run_writes_its_settings_metrics_weights_and_answers(place, policies, flags):
    out = run("run", *flags, "--max_steps", 4, "--log_every", 2)
    lora = "--lora_rank" in flags

    config = read_json(out / "config.json")
    assert config["method"] == flags[1] and config["seed"] == 0 and config["epochs"] >= 1 and config["lr"] > 0
    logged = rows(out)
    assert [row["step"] for row in logged] == [2, 4]
    expected = LOGGED if flags[1] != "sft" else ("loss", "logps/chosen", "grad_norm")
    for row in logged:
        assert {*TIMES, *expected} <= set(row) and all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["tokens/s"] > 0

    report = read_json(out / "eval.json")
    for name in ("policy", "base"):
        assert set(EVALUATED) | {f"{key}_se" for key in EVALUATED} | {"n"} <= set(report[name])
        assert report[name]["n"] == len(toy.eval_prompts("test", 0))
        assert all(0 <= report[name][key] <= 1 for key in EVALUATED if not key.startswith("helpfulness"))
    samples = (out / "samples.txt").read_text()
    assert all(part in samples for part in ("[harmful]", "[safe]", "policy", "base"))

    assert (out / "adapter").is_dir() == lora and (out / "model").is_dir() != lora
    base = load_model(config["base"])
    loaded = load_adapter(load_model(config["base"]), out / "adapter") if lora else \
        load_model(out / "model")
    tokens = torch.arange(40).view(2, 20) * 7
    of_base, of_loaded, of_trained = (logits_of(model, tokens) for model in (base, loaded, policies[0]))
    assert torch.equal(of_loaded, of_trained) and not torch.equal(of_loaded, of_base)
    assert Tokenizer(loaded.folder).eos_id == 1
    assert not leftovers(place)


def test_a_finished_run_is_evaluated_again_with_the_same_result(place, capsys):
    for name, flags in (("whole", ()), ("lora", ("--lora_rank", 4)), ("template", ("--template", "alpaca"))):
        out = run(name, *flags, "--max_steps", 2)
        capsys.readouterr()
        check_that_it_is_evaluated_again_alike(out)
        assert f"\n{out} " in capsys.readouterr().out


def test_evaluation_takes_the_weights_of_the_last_run_in_a_folder(place):
    """All weights first, then an adapter: the model/ of the earlier run is not what config.json describes."""
    run("run", "--max_steps", 2, "--lr", 1e-2)
    out = run("run", "--max_steps", 2, "--lora_rank", 4, "--overwrite")
    before = (out / "samples.txt").read_bytes()
    eval_file.main([str(out)])
    assert (out / "samples.txt").read_bytes() == before


def test_the_development_split_is_another_set_of_prompts(place):
    asked = {}
    for split in ("test", "dev"):
        out = run(split, "--max_steps", 1, "--eval_split", split)
        end = "-dev" * (split == "dev")
        assert read_json(out / f"eval{end}.json")["split"] == split
        asked[split] = {line for line in (out / f"samples{end}.txt").read_text().splitlines() if line.endswith("]")}
    assert asked["test"] and asked["dev"] and not asked["test"] & asked["dev"]


def test_training_moves_the_margin_the_right_way(place):
    out = run("run", "--method", "dpo", "--lr", 3e-3, "--epochs", 8, "--log_every", 1, "--beta", 1)
    first, last = rows(out)[0], rows(out)[-1]
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0.1 and last["rewards/accuracies"] > 0.7
    assert abs(first["rewards/margins"]) < 1e-4


# The first step


@pytest.mark.parametrize("delta", (0, 2, 10))
@pytest.mark.parametrize("lora", (0, 4))
def test_first_loss_of_safedpo_is_its_closed_form_on_the_pairs_of_the_first_batch(place, delta, lora):
    out = run("run", "--delta", delta, "--lora_rank", lora, "--max_steps", 1, "--log_every", 1, "--seed", 1)
    batch = first_batch(small_pairs("safedpo", seed=1), seed=1)
    assert {pair.rejected_unsafe for pair in batch} == {False, True}
    expected = sum(math.log1p(math.exp(delta * pair.rejected_unsafe)) for pair in batch) / 8
    assert rows(out)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("view", ("helpful", "harmless", "safe-better"))
def test_first_loss_of_dpo_is_log_2(place, view):
    out = run("run", "--method", "dpo", "--view", view, "--max_steps", 1, "--log_every", 1)
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_first_loss_of_sft_is_the_cross_entropy_of_the_chosen_responses(place):
    out = run("run", "--method", "sft", "--max_steps", 1, "--log_every", 1)
    model, tokenizer, total, count = load_model(BASE).double(), Tokenizer(BASE), 0.0, 0
    for pair in first_batch(small_pairs("helpful")):
        prompt, chosen, _ = ids_of(tokenizer, pair)
        total, count = total - float(logp_alone(model, prompt, chosen).detach()), count + len(chosen)
    assert rows(out)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_bfloat16_rounds_the_forward_pass_and_trains_float32_weights(place):
    flags = ("--method", "dpo", "--max_steps", 1, "--log_every", 1)
    full, half = run("full", *flags), run("half", *flags, "--dtype", "bfloat16")
    exact, rounded = (rows(out)[0]["logps/chosen"] for out in (full, half))
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact
    assert {tensor.dtype for tensor in load_file(half / "model/model.safetensors").values()} == {torch.float32}


# Repeating


@pytest.mark.parametrize("flags", (("--method", "safedpo"), ("--method", "dpo", "--lora_rank", 4)), ids=("all", "lora"))
def test_two_runs_of_a_seed_give_the_same_bytes_and_another_seed_does_not(place, flags):
    first, second, other = (run(name, *flags, "--seed", seed, "--epochs", 1, "--log_every", 1)
                            for name, seed in (("first", 0), ("second", 0), ("other", 1)))
    assert files_of(first) == files_of(second) and timeless(first) == timeless(second)
    computed = {path: content for path, content in files_of(first).items()
                if path.suffix == ".safetensors" or path.name in ("eval.json", "samples.txt")}
    assert len(computed) == 3
    for path, content in computed.items():
        assert files_of(other).get(path) != content, path


def test_the_first_weights_of_the_base_model_are_drawn_by_its_seed(place, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: None)
    two, three = (load_file(train.toy_base(seed, "cpu") / "model.safetensors") for seed in (2, 3))
    assert not any(torch.equal(tensor, three[name]) for name, tensor in two.items() if tensor.dim() > 1)


@pytest.mark.parametrize("shape", ("llama", "gpt2"))
def test_the_first_weights_are_smaller_where_a_layer_adds_to_the_residual_stream(shape):
    """As in GPT-2: normal, by 1/√(2 · layers), as every layer adds to the stream twice."""
    config = {**SIZES, **SHAPES[shape], "num_hidden_layers": 8, "n_layer": 8, "hidden_size": 64, "n_embd": 64}
    for name, weight in toy.init_weights(Transformer(ModelConfig.from_hf(config)), 0, 0.1).state_dict().items():
        adds = "self_attn.o_proj" in name or "mlp.down_proj" in name
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.1 / 4 if adds else 0.1, rel=0.1), name
            assert abs(weight.mean().item()) < 0.01, name


def test_the_base_model_is_made_once_and_again_when_its_recipe_changes(place, monkeypatch):
    weights = Path(f"{BASE}/model.safetensors")
    before, when, count = weights.read_bytes(), weights.stat().st_mtime_ns, toy.DEMONSTRATIONS
    assert train.toy_base(0, "cpu") == weights.parent and weights.stat().st_mtime_ns == when
    monkeypatch.setattr(toy, "DEMONSTRATIONS", 72)
    train.toy_base(0, "cpu")
    assert weights.read_bytes() != before
    monkeypatch.setattr(toy, "DEMONSTRATIONS", count)
    train.toy_base(0, "cpu")
    assert weights.read_bytes() == before
    assert not leftovers(place)


# Reference log-probabilities


def base_and_data(*flags):
    """(config, model, encoded pairs) as a run has them before its first step."""
    config, model, tokenizer = load_run("--batch_size", 4, *flags)
    return config, model, encode_pairs(tokenizer, small_pairs(config.view), config.max_len)


def test_reference_logps_are_the_log_probabilities_of_separate_sequences(place):
    config, model, encoded = base_and_data()
    logps = train.reference_logps(model, encoded, config)
    assert logps.shape == (len(encoded), 2)
    indices = list(range(0, len(encoded), 5))
    with torch.no_grad():
        expected = brute_force(model, encoded, indices)
    assert logps[indices].tolist() == [pytest.approx(row, rel=1e-5) for row in expected.tolist()]


def test_the_reference_is_the_model_without_its_experts(place):
    config, model, encoded = base_and_data("--lora_rank", 2)
    expected = train.reference_logps(model, encoded, config)
    perturb_experts(model, 1.0)
    assert torch.equal(train.reference_logps(model, encoded, config), expected)
    assert not torch.allclose(packed_logps(model, encoded, range(len(encoded))).detach(), expected, rtol=1e-2)


def test_answers_of_the_start_are_kept_and_never_misused(quick):
    """A mark is written into the stored file: it comes back exactly where the file may be read."""
    def base_of(name, *flags):
        run(name, "--max_steps", 1, *flags)
        return read_json(f"out/{name}/eval.json")["base"]

    true = base_of("first")
    kept, = Path("out/cache").glob("answers-toy-*")
    write_rows(kept, *({**row, "answer": "I will not help with that."} for row in json_lines(kept)))
    assert base_of("another", "--delta", 1)["over_refusal"] == 1 > true["over_refusal"]
    assert base_of("warmer", "--temperature", 1.0)["over_refusal"] < 1
    started = run("adapter", "--max_steps", 3, "--lora_rank", 2, "--lr", 0.3)
    assert base_of("further", "--init_adapter", started / "adapter")["over_refusal"] < 1
    kept.unlink()
    assert base_of("again") == true


def test_reference_logps_are_kept_and_never_misused(place):
    """A mark is written into the stored file: it comes back exactly where the file may be read."""
    def stored():
        return [*place.glob("out/cache/*.safetensors")]

    config, model, encoded = base_and_data()
    true = train.reference_logps(model, encoded, config)

    def marked(change=lambda: None, undo=lambda: None, **settings):
        for path in stored():
            path.unlink()
        train.reference_logps(model, encoded, config)
        save_file({"logps": torch.full((len(encoded), 2), 7.0)}, stored()[0])
        change()
        logps = train.reference_logps(model, encoded, replace(config, **settings))
        undo()
        return bool((logps == 7.0).all())

    assert marked()
    weight, bounds, tokens = model.model.norm.weight.data, encoded.bounds, encoded.tokens
    assert not marked(lambda: weight[3].add_(1e-3), lambda: weight[3].sub_(1e-3))
    changed = tokens.copy()
    changed[-2] += 1
    assert not marked(lambda: setattr(encoded, "tokens", changed), lambda: setattr(encoded, "tokens", tokens))
    changed = bounds.copy()
    changed[0, 1] -= 1
    assert not marked(lambda: setattr(encoded, "bounds", changed), lambda: setattr(encoded, "bounds", bounds))
    assert not marked(dtype="bfloat16")
    assert marked(lr=1.0), "what does not matter to the reference changes nothing"
    for path in stored():
        path.unlink()
    assert torch.allclose(train.reference_logps(model, encoded, config), true, rtol=1e-5)


def test_the_second_run_in_a_folder_computes_no_reference(place, monkeypatch):
    first = files_of(run("run", "--max_steps", 2))
    monkeypatch.setattr(checkpoint, "response_logps", lambda *_: pytest.fail("the reference was computed again"))
    assert files_of(run("run", "--max_steps", 2, "--delta", 2, "--overwrite")) != first
    assert files_of(run("run", "--max_steps", 2, "--overwrite")) == first


def test_another_view_in_the_same_folder_gets_a_reference_of_its_own(place):
    run("run", "--method", "safedpo", "--max_steps", 2)
    again = files_of(run("run", "--method", "dpo", "--max_steps", 2, "--overwrite"))
    assert again == files_of(run("fresh", "--method", "dpo", "--max_steps", 2))


# Interrupting


@pytest.mark.parametrize("flags, number", (
    (("--method", "safedpo"), signal.SIGINT), (("--method", "dpo", "--lora_rank", 4), signal.SIGTERM),
), ids=("all weights, Ctrl-C", "lora, SIGTERM"))
def test_an_interrupted_run_goes_on_to_the_same_bytes(place, monkeypatch, flags, number):
    flags = (*flags, "--max_steps", 6, "--log_every", 1)
    straight = run("straight", *flags)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2, number)
        run("broken", *flags)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    broken = Path("out/broken")
    assert not leftovers(place)
    assert [row["step"] for row in rows(broken)] == [1, 2, 3]
    assert (broken / "checkpoint").is_dir() and not (broken / "model").exists() and not (broken / "adapter").exists()
    schedule, done = train.learning_rate, []
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest: done.append(step) or schedule(step, *rest))
    run("broken", *flags, "--resume")
    assert sorted(set(done)) == [3, 4, 5], "steps that were done are not done again"
    assert files_of(broken) == files_of(straight) and timeless(broken) == timeless(straight)


def test_a_second_ctrl_c_ends_the_run_at_once(place, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run("run", "--max_steps", 6, "--log_every", 1)
    assert [row["step"] for row in rows(Path("out/run"))] == [1, 2]
    assert not Path("out/run/checkpoint").exists() and not leftovers(place)


@pytest.mark.parametrize("number, status", ((signal.SIGINT, 130), (signal.SIGTERM, 0)))
def test_ctrl_c_and_sigterm_on_the_command_line_save_a_checkpoint_and_say_so(place, number, status):
    command = [sys.executable, str(ROOT / "train.py"), "--model", BASE, "--out", "out/run", "--device",
               "cpu", "--lr", "1e-5", "--epochs", "1000", "--log_every", "1", "--max_len", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = Path("out/run/metrics.jsonl"), time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("train.py: interrupted") and "--resume" in last
    assert Path("out/run/checkpoint").is_dir() and not leftovers(place)
    assert [row["step"] for row in rows(Path("out/run"))] == list(range(1, len(rows(Path("out/run"))) + 1))


def kill_at_the_end(monkeypatch, *flags):
    """A run that ends before it writes its weights; the checkpoints are there."""
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_model", killed)
        run("run", *flags)


def test_a_run_resumed_from_an_older_checkpoint_does_its_later_steps_again(place, monkeypatch):
    flags = ("--max_steps", 6, "--log_every", 1)
    straight = run("straight", *flags)
    kill_at_the_end(monkeypatch, *flags, "--save_every", 4)
    out = run("run", *flags, "--save_every", 4, "--resume")
    assert files_of(out) == files_of(straight) and timeless(out) == timeless(straight)


def test_ctrl_c_while_weights_are_written_leaves_no_half_of_them(place, monkeypatch):
    def interrupted(tensors, folder, **settings):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("run", "--max_steps", 1)
    assert not Path("out/run/model").exists() and not leftovers(place)
    shutil.rmtree("out/toy-base-seed1")
    with pytest.raises(KeyboardInterrupt):
        train.toy_base(1, "cpu")
    assert not Path("out/toy-base-seed1").exists() and not leftovers(place)


# The loop's parts


def test_accumulated_small_batches_train_as_one_large_batch(place):
    """Also in grad_norm, which the optimiser's own scaling cannot hide."""
    base = load_file(f"{BASE}/model.safetensors")
    flags = ("--method", "safedpo", "--max_steps", 3, "--log_every", 1)
    whole = run("whole", *flags, "--batch_size", 4)
    parts = run("parts", *flags, "--batch_size", 2, "--grad_accum", 2)
    other = run("other", *flags, "--batch_size", 2)
    for a, b in zip(timeless(whole), timeless(parts)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    moved = [torch.cat([(tensor - base[name]).flatten() for name, tensor in
                        load_file(out / "model/model.safetensors").items()]) for out in (whole, parts, other)]
    assert (moved[0] - moved[1]).norm() < 1e-2 * moved[0].norm()
    assert (moved[0] - moved[2]).norm() > 1e-1 * moved[0].norm()


def test_the_optimiser_is_adamw_with_these_betas_and_no_decay_of_vectors():
    """Three steps on the same gradients in float64: m and v are running means with weights 0.9 and 0.95."""
    config = methods.resolve({"lr": 0.1, "weight_decay": 0.5, "device": "cpu"})
    gradients = {"matrix": (2.0, -0.5, 0.1), "vector": (-1.0, 3.0, 0.25)}
    parameters = {"matrix": torch.nn.Parameter(torch.ones(1, 1)), "vector": torch.nn.Parameter(torch.ones(1))}
    optimizer, expected = train.make_optimizer(parameters.items(), config), {}
    for name, decay in (("matrix", 0.5), ("vector", 0.0)):
        weight, m, v = 1.0, 0.0, 0.0
        for t, gradient in enumerate(gradients[name], 1):
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
            weight -= 0.1 * (decay * weight + m / (1 - 0.9 ** t) / (math.sqrt(v / (1 - 0.95 ** t)) + 1e-8))
        expected[name] = weight
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = torch.full_like(parameter, gradients[name][step])
        optimizer.step()
    assert {name: parameter.item() for name, parameter in parameters.items()} == pytest.approx(expected, rel=1e-5)


def moves(weights, before):
    """{name: how far a run moved a tensor from its start}."""
    return {name: tensor - before[name] for name, tensor in load_file(weights).items()}


def test_weight_decay_shrinks_matrices_and_spares_vectors(place):
    """Adam's own step is the same in both runs: they differ by lr · decay · weight."""
    base, flags = load_file(f"{BASE}/model.safetensors"), ("--method", "dpo", "--max_steps", 1, "--lr", 1e-3)
    outs = run("plain", *flags, "--weight_decay", 0), run("shrunk", *flags, "--weight_decay", 2)
    plain, shrunk = (moves(out / "model/model.safetensors", base) for out in outs)
    for name, weight in base.items():
        expected = 2 * rows(outs[0])[0]["lr"] * weight if weight.dim() > 1 else torch.zeros_like(weight)
        assert torch.allclose(plain[name] - shrunk[name], expected, rtol=1e-3, atol=1e-7), name


def test_routers_and_gates_learn_at_router_lr_times_the_rate(quick):
    """Adam's first step is lr · sign(gradient), whatever the gradient's size."""
    flags = ("--method", "mix-dpo", "--lora_rank", 2, "--expert_noise", 0.3, "--weight_decay", 0, "--annotators", 6,
             "--max_steps", 1, "--lr", 1e-4, "--router_lr", 30)
    out, before = run("run", *flags), load_run(*flags)[1].state_dict()
    rate, moved = rows(out)[0]["lr"], moves(out / "experts/experts.safetensors", before)
    assert moved["gate.bias"].abs().tolist() == pytest.approx([30 * rate] * 2, rel=1e-2)
    experts = torch.cat([move.flatten() for name, move in moved.items() if "lora_" in name])
    assert experts.abs().median() == pytest.approx(rate, rel=1e-2)


def test_gradients_are_clipped_to_the_given_norm(place):
    """Adam divides by the gradient's size plus 1e-8: what is clipped far below that moves nothing."""
    base, flags = load_file(f"{BASE}/model.safetensors"), ("--method", "dpo", "--max_steps", 1, "--weight_decay", 0)
    sizes, norms = [], []
    for clip in (0, 1e-12):
        out = run("run", *flags, "--grad_clip", clip, "--overwrite")
        sizes.append(max(float(move.abs().max()) for move in moves(out / "model/model.safetensors", base).values()))
        norms.append(rows(out)[0]["grad_norm"])
    assert 0 < sizes[1] < 1e-2 * sizes[0] and norms[0] == norms[1] > 1e-3, "the logged norm is the one before clipping"


def test_checkpointing_computes_every_layer_twice_in_a_step_and_trains_the_same(place, monkeypatch):
    computed, forward = [], model_file.Block.forward

    def counting(block, *inputs):
        computed.append(torch.is_grad_enabled())
        return forward(block, *inputs)
    monkeypatch.setattr(model_file.Block, "forward", counting)
    losses = {}
    for name, again in (("kept", ()), ("again", ("--checkpointing",))):
        computed.clear()
        losses[name] = [row["loss"] for row in rows(run(name, "--max_steps", 3, "--log_every", 1, *again))]
        assert sum(computed) == 3 * toy.MODEL["num_hidden_layers"] * (1 + len(again))
    assert losses["again"] == pytest.approx(losses["kept"], rel=1e-6)


@pytest.mark.parametrize("steps, warmup", ((100, 0.03), (100, 0.0), (7, 0.5), (1, 0.03), (1, 0.0)))
def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup):
    config = methods.resolve({"lr": 2.0, "warmup": warmup, "device": "cpu"})
    rates = [train.learning_rate(step, steps, config) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    expected = [2.0 * k / (warm + 1) for k in range(1, warm + 1)]
    expected += [2.0 * math.cos(math.pi / 2 * k / (steps - warm)) ** 2 for k in range(steps - warm)]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert all(0 < rate <= 2.0 for rate in rates)
    if steps == 100:
        assert max(rates) == 2.0 and rates[-1] < 2e-3


def test_the_logged_learning_rate_is_the_schedules(place):
    out = run("run", "--max_steps", 5, "--log_every", 1, "--warmup", 0.4, "--lr", 1e-4)
    expected = [1e-4 / 3, 2e-4 / 3] + [1e-4 * math.cos(math.pi / 2 * k / 3) ** 2 for k in range(3)]
    assert [row["lr"] for row in rows(out)] == pytest.approx(expected)


def test_logged_metrics_are_means_over_the_steps_since_the_last_row(place):
    each = rows(run("each", "--max_steps", 6, "--log_every", 1))
    means = rows(run("means", "--max_steps", 6, "--log_every", 4))
    assert [row["step"] for row in means] == [4, 6]
    for name in LOGGED:
        assert means[0][name] == pytest.approx(statistics.mean(row[name] for row in each[:4]), rel=1e-5, abs=1e-6)
        assert means[1][name] == pytest.approx(statistics.mean(row[name] for row in each[4:]), rel=1e-5, abs=1e-6)


def test_lora_trains_the_expert_and_leaves_the_base_alone(place, policies):
    run("run", "--lora_rank", 2, "--lora_targets", "q_proj,down_proj", "--max_steps", 2)
    base = load_file(f"{BASE}/model.safetensors")
    state = {name.replace(".base.", "."): tensor for name, tensor in policies[0].state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    moved = [name for name, tensor in policies[0].state_dict().items() if name.endswith("lora_B") and tensor.any()]
    assert len(moved) == 2


SHORT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import eval as eval_file, toy, train
prompts = toy.eval_prompts
toy.DEMONSTRATIONS, toy.COMPARISONS, toy.eval_prompts = 480, 60, lambda *which: prompts(*which)[::51]
"""
TRAIN = SHORT + "train.main('--method safedpo --device cpu --out out/run --epochs 1'.split())"
EVALUATE = SHORT + "eval_file.main('out/run --split dev --device cpu'.split())"


def run_with(threads, folder, script):
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"})


def computed(folder):
    """files_of without the adapter's settings, which name the folder of the base model."""
    return {str(path): data for path, data in files_of(folder).items() if path.name != "adapter_config.json"}


def test_base_run_and_table_do_not_depend_on_the_number_of_threads(tmp_path):
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        run_with(threads, folder, TRAIN)  # makes a short base model first
        run_with(threads, folder, EVALUATE)
    for part in ("toy-base-seed0", "run"):
        one, two = (computed(tmp_path / threads / "out" / part) for threads in "12")
        assert one == two and len(one) >= 4
    assert {"eval.json", "eval-dev.json"} < one.keys()


def test_only_the_toy_world_is_bound_to_one_thread(tmp_path):
    before = torch.get_num_threads()
    try:
        for model, expected in (("gpt2", 2), (tmp_path, 2), ("toy", 1)):
            torch.set_num_threads(2)
            toy.one_thread(model)
            assert torch.get_num_threads() == expected
        (tmp_path / "recipe.txt").write_text("")  # as in the folder of a toy base model
        torch.set_num_threads(2)
        toy.one_thread(tmp_path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
