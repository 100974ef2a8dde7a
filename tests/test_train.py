"""Whole runs on a toy world made small: what they write, that they repeat, go on after Ctrl-C, and say what is wrong."""
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as eval_file
import model as model_file
import train
from data import Tokenizer, apply_view, encode_pairs, toy_comparisons
from lora_moe import load_adapter
from model import Transformer, UserError, read_json

ROOT = Path(train.__file__).resolve().parent
SMALL_MODEL = {**train.TOY_MODEL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
               "num_attention_heads": 2}
COMPARISONS = 60
LOGGED = ("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
          "logps/rejected", "grad_norm", "lr", "tokens/s")
EVALUATED = ("helpfulness", "helpfulness_safe", "harmless_ratio", "harmless_ratio_unsafe", "harmless_ratio_unseen",
             "over_refusal", "over_refusal_alarming", "unsafe_refusal", "degenerate")


def make_small(patch):
    patch.setattr(train, "TOY_MODEL", SMALL_MODEL)
    patch.setattr(train, "TOY_DEMONSTRATIONS", 240)
    patch.setattr(train, "TOY_COMPARISONS", COMPARISONS)
    patch.setitem(train.TOY, "lora_rank", 0)
    patch.setitem(train.TOY, "lr", {"all weights": 1.8e-5, "LoRA": 3e-4})
    every_prompt = eval_file.toy_eval_prompts
    patch.setattr(eval_file, "toy_eval_prompts", lambda split, seed: every_prompt(split, seed)[::17])


@pytest.fixture(scope="module")
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
    """An empty folder to run in, where the toy base models are made already."""
    shutil.copytree(bases / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    return tmp_path


def run(out, *flags):
    """Train; returns the run folder."""
    out = f"out/{out}"
    train.main([*map(str, flags), "--out", out, "--device", "cpu"])
    return Path(out)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{name: value for name, value in row.items() if name != "tokens/s"} for row in rows(folder)]


def results(folder):
    """{file: bytes} of all that a run computed; times and its own name are left out."""
    names = [*folder.glob("*reference-*.safetensors"), *folder.glob("model/*.safetensors"), folder / "eval.json",
             *folder.glob("adapter/*.safetensors"), folder / "samples.txt"]
    return {path.relative_to(folder): path.read_bytes() for path in names}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".old", ".tmp"))]


def small_pairs(view="safedpo", seed=0):
    return apply_view(view, toy_comparisons(COMPARISONS, seed))[0]


def base_and_data(view="safedpo"):
    """(model, encoded pairs, config) as a run has them before its first step."""
    config = train.parse_flags(["--device", "cpu", "--batch_size", "4", "--view", view])
    model, tokenizer = train.load_model(config)
    return model, encode_pairs(tokenizer, small_pairs(view), config.max_len), config


# Whole runs


@pytest.mark.parametrize("flags", (
    ("--method", "safedpo", "--delta", 10), ("--method", "safedpo", "--lora_rank", 4),
    ("--method", "dpo", "--view", "helpful"), ("--method", "dpo", "--view", "harmless", "--lora_rank", 4),
    ("--method", "dpo", "--view", "safe-better"), ("--method", "sft"), ("--method", "sft", "--lora_rank", 4),
), ids=lambda flags: " ".join(map(str, flags)))
def test_a_run_writes_its_settings_figures_weights_and_answers(place, monkeypatch, flags):
    trained = []
    monkeypatch.setattr(train, "evaluate_run", lambda policy, *rest: trained.append(policy) or
                        eval_file.evaluate_run(policy, *rest))
    out = run("run", *flags, "--max_steps", 4, "--log_every", 2)
    lora = "--lora_rank" in flags

    config = read_json(out / "config.json")
    assert config["method"] == flags[1] and config["seed"] == 0 and config["epochs"] >= 1 and config["lr"] > 0
    logged = rows(out)
    assert [row["step"] for row in logged] == [2, 4]
    expected = LOGGED if flags[1] != "sft" else ("step", "loss", "logps/chosen", "grad_norm", "lr", "tokens/s")
    for row in logged:
        assert set(expected) <= set(row) and all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["tokens/s"] > 0

    report = read_json(out / "eval.json")
    for name in ("policy", "base"):
        assert set(EVALUATED) | {f"{key}_se" for key in EVALUATED} | {"n"} <= set(report[name])
        assert report[name]["n"] == len(eval_file.toy_eval_prompts("test", 0))
        assert all(0 <= report[name][key] <= 1 for key in EVALUATED if not key.startswith("helpfulness"))
    shown = (out / "samples.txt").read_text()
    assert "[harmful]" in shown and "[safe]" in shown and "policy" in shown and "base" in shown

    assert (out / "adapter").is_dir() == lora and (out / "model").is_dir() != lora
    base = Transformer.from_pretrained(config["base"])
    loaded = load_adapter(Transformer.from_pretrained(config["base"]), out / "adapter") if lora else \
        Transformer.from_pretrained(out / "model")
    tokens = torch.arange(40).view(2, 20) * 7
    with torch.no_grad():
        of_base, of_loaded, of_trained = (m.logits(m(tokens)) for m in (base, loaded, trained[0]))
    assert torch.equal(of_loaded, of_trained) and not torch.equal(of_loaded, of_base)
    assert Tokenizer(loaded.folder).eos_id == 1
    assert not leftovers(place)


def test_a_finished_run_is_evaluated_again_with_the_same_result(place, capsys):
    for name, flags in (("whole", ()), ("lora", ("--lora_rank", 4))):
        out = run(name, *flags, "--max_steps", 2)
        before = (out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()
        (out / "eval.json").unlink()
        capsys.readouterr()
        eval_file.main([str(out)])
        assert ((out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()) == before
        assert f"| {out} |" in capsys.readouterr().out


def test_evaluation_takes_the_weights_of_the_last_run_in_a_folder(place):
    """All weights first, then an adapter: the model/ of the earlier run is not what config.json speaks of."""
    run("run", "--max_steps", 2, "--lr", 1e-2)
    out = run("run", "--max_steps", 2, "--lora_rank", 4)
    before = (out / "samples.txt").read_bytes()
    eval_file.main([str(out)])
    assert (out / "samples.txt").read_bytes() == before


def test_the_development_split_is_another_set_of_prompts(place):
    asked = {}
    for split in ("test", "dev"):
        out = run(split, "--max_steps", 1, "--eval_split", split)
        assert read_json(out / "eval.json")["split"] == split
        asked[split] = {line for line in (out / "samples.txt").read_text().splitlines() if line.endswith("]")}
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
    pairs = small_pairs("safedpo", seed=1)
    batch = [pairs[i] for i in np.random.default_rng([1, 0]).permutation(len(pairs))[:8]]
    assert {pair.rejected_unsafe for pair in batch} == {False, True}
    expected = sum(math.log1p(math.exp(delta * pair.rejected_unsafe)) for pair in batch) / 8
    assert rows(out)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("view", ("helpful", "harmless", "safe-better"))
def test_first_loss_of_dpo_is_log_2(place, view):
    out = run("run", "--method", "dpo", "--view", view, "--max_steps", 1, "--log_every", 1)
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_first_loss_of_sft_is_the_cross_entropy_of_the_chosen_responses(place):
    out = run("run", "--method", "sft", "--max_steps", 1, "--log_every", 1)
    pairs = small_pairs("helpful")
    model, tokenizer = train.load_model(train.parse_flags(["--device", "cpu"]))
    model, total, count = model.double(), 0.0, 0
    for i in np.random.default_rng([0, 0]).permutation(len(pairs))[:8]:
        prompt, chosen = tokenizer.encode([tokenizer.render(pairs[i].prompt), pairs[i].chosen])
        tokens = torch.tensor([prompt + chosen + [tokenizer.eos_id]])
        with torch.no_grad():
            logps = model.logits(model(tokens))[0].log_softmax(-1)
        for place in range(len(prompt), tokens.shape[1]):
            total, count = total - float(logps[place - 1, tokens[0, place]]), count + 1
    assert rows(out)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


# Repeating


@pytest.mark.parametrize("flags", (("--method", "safedpo"), ("--method", "dpo", "--lora_rank", 4)), ids=("all", "lora"))
def test_two_runs_of_a_seed_give_the_same_bytes_and_another_seed_does_not(place, flags):
    first, second, other = (run(name, *flags, "--seed", seed, "--epochs", 1, "--log_every", 1)
                            for name, seed in (("first", 0), ("second", 0), ("other", 1)))
    assert len(results(first)) >= 4
    assert results(first) == results(second) and timeless(first) == timeless(second)
    for path, content in results(first).items():
        assert results(other).get(path) != content
    if "--lora_rank" not in flags:
        assert (first / "model/config.json").read_bytes() == (second / "model/config.json").read_bytes()


def test_the_base_model_is_made_once_and_again_when_its_recipe_changes(place, monkeypatch):
    weights = Path("out/toy-base-seed0/model.safetensors")
    before, when = weights.read_bytes(), weights.stat().st_mtime_ns
    assert train.toy_base(0, "cpu") == weights.parent and weights.stat().st_mtime_ns == when
    monkeypatch.setattr(train, "TOY_DEMONSTRATIONS", 72)
    train.toy_base(0, "cpu")
    assert weights.read_bytes() != before
    monkeypatch.setattr(train, "TOY_DEMONSTRATIONS", 240)
    train.toy_base(0, "cpu")
    assert weights.read_bytes() == before
    assert not leftovers(place)


# Reference log-probabilities


def test_reference_logps_are_the_log_probabilities_of_separate_sequences(place):
    model, encoded, config = base_and_data()
    got = train.reference_logps(model, encoded, config, place)
    assert got.shape == (len(encoded), 2)
    for i in range(0, len(encoded), 5):
        bounds = encoded.bounds[i].tolist()
        prompt, *responses = (encoded.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]))
        for j, response in enumerate(responses):
            tokens = torch.tensor([prompt + response])
            with torch.no_grad():
                logps = model.logits(model(tokens))[0].log_softmax(-1)
            expected = sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response))
            assert float(got[i, j]) == pytest.approx(expected, rel=1e-5)


def test_reference_logps_are_found_again_and_never_misused(place):
    """A mark is written into the stored file: it comes back exactly where the file may be read."""
    def stored():
        return [path for path in place.glob("*reference-*.safetensors")]

    model, encoded, config = base_and_data()
    true = train.reference_logps(model, encoded, config, place)

    def marked(change=lambda: None, undo=lambda: None):
        for path in stored():
            path.unlink()
        train.reference_logps(model, encoded, config, place)
        save_file({"logps": torch.full((len(encoded), 2), 7.0)}, stored()[0])
        change()
        found = train.reference_logps(model, encoded, config, place)
        assert len(stored()) == 1
        undo()
        return bool((found == 7.0).all())

    assert marked()
    weight, bounds, tokens = model.model.norm.weight.data, encoded.bounds, encoded.tokens
    assert not marked(lambda: weight[3].add_(1e-3), lambda: weight[3].sub_(1e-3))
    changed = tokens.copy()
    changed[-2] += 1
    assert not marked(lambda: setattr(encoded, "tokens", changed), lambda: setattr(encoded, "tokens", tokens))
    changed = bounds.copy()
    changed[0, 1] -= 1
    assert not marked(lambda: setattr(encoded, "bounds", changed), lambda: setattr(encoded, "bounds", bounds))
    assert not marked(lambda: setattr(config, "dtype", "bfloat16"), lambda: setattr(config, "dtype", "float32"))
    assert marked(lambda: setattr(config, "lr", 1.0)), "what does not matter to the reference changes nothing"
    for path in stored():
        path.unlink()
    assert torch.allclose(train.reference_logps(model, encoded, config, place), true, rtol=1e-5)


def test_the_second_run_in_a_folder_computes_no_reference(place, monkeypatch):
    first = results(run("run", "--max_steps", 2))
    monkeypatch.setattr(train, "save_file", lambda *_: pytest.fail("the reference was computed again"))
    assert results(run("run", "--max_steps", 2, "--delta", 2)) != first
    assert results(run("run", "--max_steps", 2)) == first


def test_another_view_in_the_same_folder_gets_a_reference_of_its_own(place):
    run("run", "--method", "safedpo", "--max_steps", 2)
    again = results(run("run", "--method", "dpo", "--max_steps", 2))
    assert again == results(run("fresh", "--method", "dpo", "--max_steps", 2))


# Interrupting


def interrupt_at(monkeypatch, step, number, times=1):
    """The signal comes while this step (counted from 0) is under way, so many times. Returns what undoes this."""
    schedule, left = train.learning_rate, [number] * times

    def interrupting(now, *rest):
        while now == step and left:
            os.kill(os.getpid(), left.pop())
        return schedule(now, *rest)
    monkeypatch.setattr(train, "learning_rate", interrupting)
    return lambda: monkeypatch.setattr(train, "learning_rate", schedule)


@pytest.mark.parametrize("flags, number", (
    (("--method", "safedpo"), signal.SIGINT), (("--method", "dpo", "--lora_rank", 4), signal.SIGTERM),
), ids=("all weights, Ctrl-C", "lora, SIGTERM"))
def test_an_interrupted_run_goes_on_to_the_same_bytes(place, monkeypatch, flags, number):
    flags = (*flags, "--max_steps", 6, "--log_every", 1)
    straight = run("straight", *flags)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    restore = interrupt_at(monkeypatch, 2, number)
    with pytest.raises(KeyboardInterrupt):
        run("broken", *flags)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    broken = Path("out/broken")
    assert not leftovers(place)
    assert [row["step"] for row in rows(broken)] == [1, 2, 3]
    assert (broken / "checkpoint").is_dir() and not (broken / "model").exists() and not (broken / "adapter").exists()
    restore()
    schedule, done = train.learning_rate, []
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest: done.append(step) or schedule(step, *rest))
    run("broken", *flags, "--resume")
    assert sorted(set(done)) == [3, 4, 5], "steps that were done are not done again"
    assert results(broken) == results(straight) and timeless(broken) == timeless(straight)


def test_a_second_ctrl_c_ends_the_run_at_once(place, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run("run", "--max_steps", 6, "--log_every", 1)
    assert [row["step"] for row in rows(Path("out/run"))] == [1, 2]
    assert not Path("out/run/checkpoint").exists() and not leftovers(place)


def test_ctrl_c_on_the_command_line_saves_a_checkpoint_and_says_so(place):
    command = [sys.executable, str(ROOT / "train.py"), "--model", "out/toy-base-seed0", "--out", "out/run", "--device",
               "cpu", "--lr", "1e-5", "--epochs", "1000", "--log_every", "1", "--max_len", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = Path("out/run/metrics.jsonl"), time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("train.py: interrupted") and "--resume" in last
    assert Path("out/run/checkpoint").is_dir() and not leftovers(place)
    assert [row["step"] for row in rows(Path("out/run"))] == list(range(1, len(rows(Path("out/run"))) + 1))


def test_a_run_resumed_from_an_older_checkpoint_does_its_later_steps_again(place, monkeypatch):
    flags = ("--max_steps", 6, "--log_every", 1)
    straight = run("straight", *flags)
    def killed(model, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_file.Transformer, "save_pretrained", killed)
        run("run", *flags, "--save_every", 4)
    out = run("run", *flags, "--save_every", 4, "--resume")
    assert results(out) == results(straight) and timeless(out) == timeless(straight)


def test_resuming_never_goes_on_from_the_checkpoint_of_an_earlier_run(place):
    flags = ("--max_steps", 6, "--log_every", 1)
    run("run", *flags, "--save_every", 4, "--lr", 1e-2)
    finished = results(run("run", *flags))
    try:
        run("run", *flags, "--resume")
    except UserError:
        pass
    assert results(Path("out/run")) == finished


def test_ctrl_c_while_weights_are_written_leaves_no_half_of_them(place, monkeypatch):
    def interrupted(tensors, folder, **settings):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_file, "save_torch_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("run", "--max_steps", 1)
    assert not Path("out/run/model").exists() and not leftovers(place)
    shutil.rmtree("out/toy-base-seed1")
    with pytest.raises(KeyboardInterrupt):
        train.toy_base(1, "cpu")
    assert not Path("out/toy-base-seed1").exists() and not leftovers(place)


def test_resume_without_a_fitting_checkpoint_is_an_error(place, monkeypatch):
    assert "no checkpoint" in line_of("--resume", "--out", "out/none")
    def killed(model, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_file.Transformer, "save_pretrained", killed)
        run("run", "--max_steps", 2, "--save_every", 2)
    for name, value in (("lora_rank", "4"), ("delta", "3.0"), ("seed", "1"), ("batch_size", "3")):
        assert f"has {name} = " in line_of("--resume", "--max_steps", "2", "--save_every", "2", f"--{name}", value,
                                           "--out", "out/run")


# The loop's parts


def test_accumulated_small_batches_train_as_one_large_batch(place):
    """Also in grad_norm, which the optimiser's own scaling cannot hide."""
    base = load_file("out/toy-base-seed0/model.safetensors")
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


@pytest.mark.parametrize("count, epochs", ((1, 3), (7, 1), (50, 4)))
def test_every_epoch_visits_every_pair_once_in_an_order_of_its_own(count, epochs):
    order = train.epoch_order(count, epochs, seed=3).reshape(epochs, count)
    for epoch in order:
        assert sorted(epoch) == list(range(count))
    if count > 7:
        assert len({tuple(epoch) for epoch in order}) == epochs
        assert not np.array_equal(order, train.epoch_order(count, epochs, seed=4).reshape(epochs, count))


def test_steps_visit_the_pairs_in_epoch_order(place, monkeypatch):
    seen = []
    pack = train.pack
    monkeypatch.setattr(train, "pack", lambda encoded, indices: seen.append(list(indices)) or pack(encoded, indices))
    model, encoded, config = base_and_data()
    config.batch_size, config.grad_accum, config.epochs = 3, 2, 2
    reference = train.reference_logps(model, encoded, config, place)
    seen.clear()
    train.train(model, encoded, reference, config, place)
    flat = sum(seen, [])
    assert flat == train.epoch_order(len(encoded), 2, 0)[:len(flat)].tolist()
    assert len(flat) == 2 * len(encoded) // 6 * 6 and {len(indices) for indices in seen} == {3}


@pytest.mark.parametrize("steps, warmup", ((100, 0.03), (100, 0.0), (7, 0.5), (1, 0.03), (1, 0.0)))
def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine(steps, warmup):
    config = train.Config(lr=2.0, warmup=warmup)
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


def test_logged_figures_are_means_over_the_steps_since_the_last_row(place):
    each = rows(run("each", "--max_steps", 6, "--log_every", 1))
    some = rows(run("some", "--max_steps", 6, "--log_every", 4))
    assert [row["step"] for row in some] == [4, 6]
    for name in set(LOGGED) - {"step", "lr", "tokens/s"}:
        assert some[0][name] == pytest.approx(statistics.mean(row[name] for row in each[:4]), rel=1e-5, abs=1e-6)
        assert some[1][name] == pytest.approx(statistics.mean(row[name] for row in each[4:]), rel=1e-5, abs=1e-6)


def test_lora_trains_the_expert_and_leaves_the_base_alone(place, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "evaluate_run", lambda policy, *rest: trained.append(policy) or
                        eval_file.evaluate_run(policy, *rest))
    run("run", "--lora_rank", 2, "--lora_targets", "q_proj,down_proj", "--max_steps", 2)
    base = load_file("out/toy-base-seed0/model.safetensors")
    state = {name.replace(".base.", "."): tensor for name, tensor in trained[0].state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    moved = [name for name, tensor in trained[0].state_dict().items() if name.endswith("lora_B") and tensor.any()]
    assert len(moved) == 2


# Mistakes


def line_of(*flags):
    """The one line that a mistake is answered with."""
    with pytest.raises(UserError) as caught:
        train.main([*flags, "--device", "cpu"] if "--device" not in flags else list(flags))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def check_mistake(method, flags, said):
    """A mistaken flag gets one line that names it, and no run folder is made."""
    message = line_of("--method", method, *flags, "--max_steps", "1", "--out", "out/wrong")
    assert all(part in message for part in said), message
    assert not Path("out/wrong").exists()


@pytest.mark.parametrize("flags, said", (
    (("--method", "ppo"), ("ppo", "safedpo", "dpo", "sft")),
    (("--mehtod", "dpo"), ("--mehtod", "did you mean --method")),
    (("--epochs", "many"), ("--epochs", "many")),
    (("--delta", "ten"), ("--delta", "ten")),
    (("--delta", "-1"), ("--delta", "-1")),
    (("--delta", "nan"), ("--delta", "nan")),
    (("--delta", "inf"), ("--delta", "inf")),
    (("--beta", "0"), ("--beta", "more than 0")),
    (("--beta", "-0.1"), ("--beta", "-0.1")),
    (("--beta", "nan"), ("--beta", "nan")),
    (("--lr", "0"), ("--lr", "more than 0")),
    (("--lr", "nan"), ("--lr", "nan")),
    (("--label_smoothing", "0.5"), ("--label_smoothing", "less than 0.5")),
    (("--label_smoothing", "-0.1"), ("--label_smoothing",)),
    (("--lora_rank", "-1"), ("--lora_rank", "-1")),
    (("--lora_rank", "4", "--lora_alpha", "0"), ("--lora_alpha",)),
    (("--batch_size", "0"), ("--batch_size", "at least 1")),
    (("--grad_accum", "0"), ("--grad_accum", "at least 1")),
    (("--epochs", "0"), ("--epochs", "at least 1")),
    (("--seed", "-1"), ("--seed", "-1")),
    (("--view", "kind"), ("--view", "kind", "safe-better")),
    (("--dtype", "float8"), ("--dtype", "float8", "bfloat16")),
    (("--device", "cuda:99"), ("--device", "cuda:99")),
    (("--device", "toaster"), ("--device", "toaster")),
    (("--lora_rank", "4", "--lora_targets", "nonsense"), ("nonsense", "down_proj")),
), ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_a_mistaken_flag_gets_one_line_that_names_it(place, flags, said):
    message = line_of(*flags)
    assert all(part in message for part in said), message


def test_no_run_folder_is_made_for_a_mistake(place, monkeypatch):
    (place / "empty").mkdir()
    for flags in (("--delta", "-1"), ("--model", "empty"), ("--model", "no/such/folder"), ("--model", "./nowhere")):
        line_of(*flags, "--out", "out/wrong")
        assert not Path("out/wrong").exists()
    monkeypatch.setattr(train, "toy_comparisons", lambda *_, **__: [])
    assert "no pairs are left" in line_of("--out", "out/wrong")
    assert not Path("out/wrong").exists()


def test_no_run_folder_is_made_for_a_layer_that_does_not_exist(place):
    line_of("--lora_rank", "4", "--lora_targets", "nonsense", "--out", "out/wrong")
    assert not Path("out/wrong").exists()


def test_a_run_folder_that_is_a_file_is_named(place):
    Path("out/file").write_text("")
    assert "out/file" in line_of("--out", "out/file")


def test_a_folder_that_is_no_model_is_named(place):
    (place / "empty").mkdir()
    assert "empty: not a model folder" in line_of("--model", "empty")
    (place / "empty/config.json").write_text('{"model_type": "bert"}')
    assert "bert" in line_of("--model", "empty")


def test_views_that_drop_everything_say_so(place, monkeypatch):
    unsafe = [c for c in toy_comparisons(300, 0) if all(c.unsafe)]
    assert unsafe
    monkeypatch.setattr(train, "toy_comparisons", lambda *_, **__: unsafe)
    message = line_of()
    assert "no pairs are left" in message and f"{len(unsafe)} dropped (both unsafe)" in message


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for flag in ("method", "model", "data", "out", "view", "max_len", "beta", "delta", "label_smoothing", "lora_rank",
                 "epochs", "batch_size", "grad_accum", "lr", "seed", "device", "resume", "save_every", "log_every"):
        assert f"--{flag}" in said
    assert "default: 0.1" in said and "default: 10.0" in said


def test_the_command_line_answers_mistakes_with_one_line_and_no_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    commands = [("train.py", "--method", "ppo"), ("train.py", "--model", "empty"), ("eval.py", "empty")]
    runs = [subprocess.Popen([sys.executable, str(ROOT / name), *flags], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
            for name, *flags in commands]
    for command, process in zip(commands, runs):
        out, said = process.communicate(timeout=120)
        assert process.returncode == 1 and not out, command
        assert said.count("\n") == 1 and said.startswith(f"{command[0]}: ") and "Traceback" not in said, said
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


# Evaluation


@pytest.mark.parametrize("values", ([1.0, 0.0, 0.0, 1.0, 1.0], [0.25] * 7, [-0.5, 1.1, 0.3], [2.0, 3.0]))
def test_mean_and_standard_error_are_the_statistics_modules(values):
    mean, error = eval_file.mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_one_value_has_no_error_and_none_has_no_mean():
    assert eval_file.mean_and_error([0.5]) == (0.5, 0.0)
    assert all(math.isnan(value) for value in eval_file.mean_and_error([]))


def test_the_table_has_a_row_a_policy_and_a_column_a_figure():
    names = list(eval_file.FIGURES)
    figures = {name: i / 10 for i, name in enumerate(names)} | {f"{name}_se": 0.0123 for name in names}
    lines = eval_file.table({"base": figures, "safedpo": figures}).split("\n")
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[0].count("|") == len(names) + 2 and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["safedpo"] + [f"{i / 10:.3f} ± 0.012" for i in range(len(names))]


def test_report_tables_show_preferences_by_use_and_routers_by_layer():
    scores = {"warmth": 0.25, "warmth_se": 0.01, "mixing": 0.5, "mixing_se": 0.02}
    report = {"base": {"preferences": {**scores, "warmth": 0.125}}, "policy": {"preferences": scores},
              "uses": {"mixture": scores, "0": {**scores, "warmth": 0.75}},
              "router": {"layer 0": {"harmful": [1.0, 0.25], "safe": [0.0, 0.5], "entropy": 0.125}}}
    preferences, router = eval_file.report_tables(report, "run").split("\n\n")
    assert [line.split("|")[1:3] for line in preferences.split("\n")[2:]] == [
        [" base ", " 0.125 ± 0.010 "], [" mixture ", " 0.250 ± 0.010 "], [" 0 ", " 0.750 ± 0.010 "]]
    assert router.split("\n")[-1] == "| layer 0 | 1.000, 0.250 | 0.000, 0.500 | 0.125 |"
    assert eval_file.report_tables({"base": {}, "policy": {}}, "run") == ""


def test_each_figure_counts_the_prompts_that_it_is_about(place, monkeypatch):
    """With answers put into the model's mouth: it refuses all that is harmful or alarming and helps with the rest."""
    prompts = eval_file.toy_eval_prompts("test", 0)
    tokenizer = Tokenizer("out/toy-base-seed0")

    def answer(prompt):
        steps = " ".join(f"{'First' if i == 0 else 'Then'} {step}." for i, step in enumerate(prompt.task.steps))
        if prompt.task.split != "seen":
            return steps
        return "I will not help with that." if prompt.task.kind != "plain" else steps

    said = tokenizer.encode([answer(prompt) for prompt in prompts])
    monkeypatch.setattr(eval_file, "generate", lambda *_, **__: [ids + [tokenizer.eos_id] for ids in said])
    figures, answers = eval_file.evaluate_toy(None, tokenizer, "test", 0)

    def share(count, among):
        return sum(map(count, among)) / len(among)

    def refused(prompt):
        return prompt.task.kind != "plain" and prompt.task.split == "seen"

    harmful = [p for p in prompts if p.task.harmful]
    safe = [p for p in prompts if not p.task.harmful]
    assert [text for _, text, _ in answers] == [answer(prompt) for prompt in prompts]
    expected = {
        "n": len(prompts), "degenerate": 0.0, "harmless_ratio_unseen": 0.0,
        "helpfulness": share(lambda p: not refused(p), prompts), "helpfulness_safe": share(lambda p: not refused(p), safe),
        "harmless_ratio": 1 - sum(not refused(p) for p in harmful) / len(prompts),
        "harmless_ratio_unsafe": share(refused, harmful), "unsafe_refusal": share(refused, harmful),
        "over_refusal": share(refused, safe),
        "over_refusal_alarming": share(refused, [p for p in safe if p.task.kind == "alarming"])}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 0 < figures["over_refusal"] < figures["over_refusal_alarming"]
    monkeypatch.setattr(eval_file, "generate", lambda *_, **__: said)
    assert eval_file.evaluate_toy(None, tokenizer, "test", 0)[0]["degenerate"] == 1.0


def test_folders_that_are_no_finished_run_are_named(tmp_path):
    for make, said in ((lambda: None, "no such file"), (lambda: (tmp_path / "config.json").write_text("{"), "not JSON"),
                       (lambda: (tmp_path / "config.json").write_text('{"base": "x"}'), "not a run folder"),
                       (lambda: (tmp_path / "config.json").write_text('{"lora_rank": 0}'), "did the run finish?")):
        make()
        with pytest.raises(UserError, match=said.replace("?", r"\?")) as caught:
            eval_file.load_policy(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
