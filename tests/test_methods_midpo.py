"""MidPO in whole runs: its five runs and which of them are kept, the routers, and the finished mixture."""
import math
import shutil
import signal
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import eval as eval_file
import methods
import toy
import train
from checkpoint import load_model, save_model
from common import read_json
from conftest import (BASE, COMPARISONS, check_that_it_is_evaluated_again_alike, edit_json, first_batch, ids_of,
                      interrupt_at, line_of, load_run, logp_alone, make_small, mistake, rows, run, scored_file,
                      shorten_answers, softplus)
from data import apply_view
from lora_moe import expert_layers
from model import ScoreModel, generate

STAGES = ["reward", "cost", "safety", "helpful"]
FLAGS = ("--method", "midpo", "--max_steps", 4, "--log_every", 1, "--batch_size", 4)
ADAPTERS = "out/run/safety/adapter,out/run/helpful/adapter"


@pytest.fixture(scope="module")
def finished(bases, tmp_path_factory):
    """A folder in which out/run is a whole run of MidPO."""
    folder = tmp_path_factory.mktemp("midpo")
    shutil.copytree(bases / "out", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small(patch)
        shorten_answers(patch, 16)
        run("run", *FLAGS)
    return folder


@pytest.fixture
def mixture(finished, place):
    """out/run in a folder of its own, a copy of the finished run with the times of its files."""
    shutil.copytree(finished / "out" / "run", "out/run")
    return Path("out/run")


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def stage_stamps(mixture):
    return {name: stamps(mixture / name) for name in STAGES}


# The plan


def test_the_plan_lists_the_five_runs_and_changes_nothing(place):
    """Score models, then the experts by their margins, then the routers over the experts."""
    config = methods.parse_flags([*map(str, FLAGS), *"--beta 0.2 --seed 1 --out out/new --device cpu".split()])
    before = asdict(config)
    runs, results = methods.METHODS["midpo"].prerequisites(config)
    plan = [*runs, replace(config, **results)]
    assert [(one.out, one.method, one.view) for one in plan] == [
        ("out/new/reward", "reward", "helpful"), ("out/new/cost", "cost", "cost"),
        ("out/new/safety", "spe-dpo", "safety"), ("out/new/helpful", "spe-dpo", "helpful"),
        ("out/new", "midpo", "dual")]
    *_, safety, helpful, router = plan
    assert (safety.cost_model, helpful.reward_model) == ("out/new/cost/model", "out/new/reward/model")
    assert safety.beta == helpful.beta == router.beta == 0.2 and {one.seed for one in plan} == {1}
    assert router.init_adapter == ("out/new/safety/adapter", "out/new/helpful/adapter")
    assert asdict(config) == before and config.init_adapter == () and not Path("out/new").exists()


@pytest.mark.parametrize("flags, overwrite", (((), True), (("--resume",), False), (("--overwrite",), True)))
def test_prerequisites_go_on_and_are_made_again_by_other_settings_unless_these_are_resumed(place, flags, overwrite):
    config = methods.parse_flags([*map(str, FLAGS), *flags, "--out", "out/new", "--device", "cpu"])
    runs, _ = methods.METHODS["midpo"].prerequisites(config)
    assert len(runs) == 4 and {(each.resume, each.overwrite) for each in runs} == {(True, overwrite)}


def test_safedpo_has_no_prerequisites(place):
    config = methods.parse_flags(["--method", "safedpo", "--device", "cpu"])
    assert methods.METHODS["safedpo"].prerequisites(config) == ([], {})


# The runs before the routers


def test_a_run_of_midpo_leaves_every_stage_in_a_folder_of_its_own(mixture):
    wanted = {"reward": ("reward", "helpful", "model"), "cost": ("cost", "cost", "model"),
              "safety": ("spe-dpo", "safety", "adapter"), "helpful": ("spe-dpo", "helpful", "adapter")}
    for name, (method, view, weights) in wanted.items():
        config = read_json(mixture / name / "config.json")
        assert (config["method"], config["view"], config["seed"]) == (method, view, 0)
        assert (mixture / name / weights).is_dir() and len(rows(mixture / name)) == 4
    for name in ("safety", "helpful"):
        config = read_json(mixture / name / "config.json")
        assert (config["lora_rank"], config["lora_alpha"], config["lora_targets"]) == (16, 32.0, ["down_proj"])
        assert config["beta"] == 0.1 and config["weight_decay"] == 0.01
    config = read_json(mixture / "config.json")
    assert config["method"] == "midpo" and config["view"] == "dual" and config["weight_decay"] == 0.0
    assert sorted(path.name for path in mixture.iterdir() if path.is_dir()) == sorted([*STAGES, "experts"])
    for row in rows(mixture):
        assert {"router/l1", "router/safety", "router/helpfulness", "rewards/margins"} <= row.keys()
        assert 0 < row["router/safety"] < 1 and 0 < row["router/helpfulness"] < 1
        assert row["router/l1"] == pytest.approx(row["router/safety"] + 1 - row["router/helpfulness"], rel=1e-5)


def test_a_second_call_keeps_all_and_one_that_overwrites_keeps_the_stages_and_gives_the_same_bytes(mixture, capsys):
    everything, before, experts = stamps(mixture), stage_stamps(mixture), mixture / "experts/experts.safetensors"
    content = experts.read_bytes()
    run("run", *FLAGS)
    assert capsys.readouterr().out == f"{mixture}: finished with these settings, kept\n"
    assert stamps(mixture) == everything
    run("run", *FLAGS, "--overwrite")
    printed = capsys.readouterr().out
    for name in STAGES:
        assert f"{mixture / name}: finished with these settings, kept" in printed
    assert before == stage_stamps(mixture)
    assert experts.read_bytes() == content and stamps(mixture) != everything


def runs_of(patch, *flags):
    """The names of the folders in which this command would train, in order; nothing is trained."""
    started = []
    with patch.context() as inner:
        inner.setattr(train, "run", lambda config, _: started.append(Path(config.out).name))
        run("run", *FLAGS, *flags)
    return started


@pytest.mark.parametrize("flags, again", (
    (("--router_l1", 1), []), (("--router_hidden", 8), []), (("--lr", 1e-4), []),
    (("--weight_decay", 0.1), []), (("--eval_every", 2), []), (("--temperature", 0.1), []), (("--epochs", 9), []),
    (("--beta", 0.2), STAGES[2:]), (("--label_smoothing", 0.1), STAGES[2:]), (("--lora_rank", 4), STAGES[2:]),
    (("--lora_alpha", 8), STAGES[2:]),
    (("--seed", 1), STAGES), (("--batch_size", 2), STAGES), (("--max_steps", 3), STAGES),
    (("--flip_preference", 0.1), STAGES), (("--max_len", 100), STAGES), (("--dtype", "bfloat16"), STAGES),
    (("--harmful_share", 0.5), STAGES), (("--model", "out/toy-base-seed1"), STAGES)),
    ids=lambda value: " ".join(map(str, value)))
def test_a_changed_setting_trains_the_stages_that_it_matters_to(mixture, monkeypatch, flags, again):
    assert runs_of(monkeypatch) == []
    assert runs_of(monkeypatch, *flags, "--overwrite") == [*again, "run"]


def test_other_settings_of_a_finished_run_are_refused_before_its_stages_are_made_again(mixture):
    before = stamps(mixture)
    message = mistake(*FLAGS, "--out", mixture, "--beta", 0.2)
    assert "beta 0.1 (now 0.2)" in message and "--overwrite" in message and stamps(mixture) == before


def test_the_router_alone_is_trained_again_with_another_l1_and_the_experts_with_another_beta(mixture):
    config, before = read_json(mixture / "config.json"), stage_stamps(mixture)
    run("run", *FLAGS, "--router_l1", 1, "--overwrite")
    assert before == stage_stamps(mixture)
    assert config["router_l1"] == 0.001 and read_json(mixture / "config.json")["router_l1"] == 1
    run("run", *FLAGS, "--router_l1", 1, "--beta", 0.2, "--overwrite")
    after = stage_stamps(mixture)
    assert [name for name in STAGES if before[name] != after[name]] == ["safety", "helpful"]
    assert read_json(mixture / "safety/config.json")["beta"] == 0.2


@pytest.mark.parametrize("name, weights", (("reward", "model"), ("safety", "adapter"), ("helpful", "adapter")))
def test_a_stage_without_its_weights_is_run_again(mixture, monkeypatch, name, weights):
    shutil.rmtree(mixture / name / weights)
    assert "other contents of its input files" in mistake(*FLAGS, "--out", mixture)
    again = runs_of(monkeypatch, "--overwrite")
    assert again[0] == name and again[-1] == "run" and "cost" not in again
    assert name == "reward" or again == [name, "run"]


def test_the_safety_expert_is_trained_again_when_the_cost_model_changes(mixture, monkeypatch):
    """First with the cost model as it was, to the same bytes of all; then with one that scores otherwise."""
    stored = {path: path.read_bytes() for path in mixture.rglob("*.safetensors")}
    shutil.rmtree(mixture / "cost/model")
    before = stage_stamps(mixture)
    run("run", *FLAGS, "--overwrite")
    after = stage_stamps(mixture)
    changed = [name for name in STAGES if before[name] != after[name]]
    assert {"cost", "safety"} <= set(changed) and "reward" not in changed
    assert stored == {path: path.read_bytes() for path in mixture.rglob("*.safetensors")}

    model = load_model(mixture / "cost/model", kind=ScoreModel)
    model.score.weight.data.mul_(20)
    save_model(model, mixture / "cost/model")
    assert "safety" in runs_of(monkeypatch, "--overwrite")
    run("run", *FLAGS, "--overwrite")
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
        scored_file("scored.jsonl", names)
        assert runs_of(monkeypatch, "--data", "scored.jsonl") == [*needed, "safety", "helpful", "run"]


def test_midpo_on_a_data_file_with_scores_trains_no_score_model(place):
    scored_file("scored.jsonl", ("reward", "cost"))
    out = run("run", *FLAGS, "--data", "scored.jsonl")
    assert not (out / "reward").exists() and not (out / "cost").exists() and (out / "experts").is_dir()
    assert all(rows(out / name)[0]["score_margin"] > 0.1 for name in ("safety", "helpful"))


@pytest.mark.parametrize("name, step, number", (("safety", 2, signal.SIGINT), ("run", 1, signal.SIGTERM)))
def test_an_interrupted_run_of_midpo_goes_on_to_the_same_bytes(finished, place, monkeypatch, name, step, number):
    """Whether the signal comes while an expert is trained or while the routers are."""
    minimise = train.train

    def train_and_interrupt(model, encoded, held_out, config, *rest):
        with monkeypatch.context() as patch:
            if Path(config.out).name == name:
                interrupt_at(patch, step, number)
            minimise(model, encoded, held_out, config, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", train_and_interrupt)
        run("run", *FLAGS)
    out = run("run", *FLAGS, "--resume")
    for path in sorted((finished / "out/run").rglob("*.safetensors")):
        assert path.read_bytes() == (out / path.relative_to(finished / "out/run")).read_bytes(), path.name
    assert not list(out.rglob("checkpoint"))


# The routers


def test_the_experts_and_the_base_are_frozen_bit_for_bit_while_routers_learn(mixture):
    stored, base = load_file(mixture / "experts/experts.safetensors"), load_file(f"{BASE}/model.safetensors")
    fresh, experts = load_run(*FLAGS, "--init_adapter", ADAPTERS)[1].state_dict(), 0
    for name, tensor in stored.items():
        if name.endswith("lora_A") or name.endswith("lora_B"):
            parts = [load_file(mixture / view / "adapter/adapter_model.safetensors")[f"base_model.model.{name}.weight"]
                     for view in ("safety", "helpful")]
            assert torch.equal(tensor, torch.cat(parts, dim=0 if name.endswith("A") else 1)), name
            assert parts[0].any() and not torch.equal(*parts)
            experts += 1
        else:
            assert ".router.networks." in name and not torch.equal(tensor, fresh[name]), name
    assert experts == 2 and len(stored) == 2 + 2 * 6
    loaded = checkpoint.load_policy(mixture)[0].state_dict()
    assert all(torch.equal(loaded[name.replace("down_proj.", "down_proj.base.")], base[name]) for name in base)
    assert load_file(f"{BASE}/model.safetensors").keys() == base.keys()


def test_nothing_but_the_routers_moves_in_memory_either(mixture, monkeypatch):
    moved, minimise = [], train.train

    def watch(model, *rest):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        minimise(model, *rest)
        moved.extend(name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name]))
        assert not any(p.grad is not None for name, p in model.named_parameters() if ".router." not in name)

    monkeypatch.setattr(train, "train", watch)
    run("run", *FLAGS, "--overwrite")
    assert len(moved) == 2 * 6 and all(".router." in name for name in moved)


def test_first_loss_of_the_routers_is_dpo_plus_the_l1_term_of_single_sequences(mixture):
    """The L1 term is over every token of the packed batch once: a pair's prompt, and both of its responses."""
    config, model, tokenizer = load_run(*FLAGS, "--init_adapter", ADAPTERS)
    base, losses, distances = load_model(BASE), [], []

    def distance(start):
        for layer in expert_layers(model).values():
            for safety, helpfulness in layer.weights[0, start:].tolist():
                distances.append(abs(safety) + abs(helpfulness - 1))

    pairs = apply_view("dual", toy.make_comparisons(COMPARISONS, 0, config.harmful_share))[0]
    for pair in first_batch(pairs, 4):
        prompt, *responses = ids_of(tokenizer, pair)
        rewards = []
        for i, response in enumerate(responses):
            with torch.no_grad():
                ratio = logp_alone(model, prompt, response) - logp_alone(base, prompt, response)
            rewards.append(0.1 * float(ratio))
            distance(len(prompt) if i else 0)
        losses.append(softplus(rewards[1] - rewards[0]))
    l1, dpo = statistics.mean(distances), statistics.mean(losses)
    assert abs(dpo - math.log(2)) > 1e-4 and 0 < l1 < 2
    for weight in (0, 0.001, 1, 30):
        row = rows(run("run", *FLAGS, "--router_l1", weight, "--overwrite"))[0]
        assert row["router/l1"] == pytest.approx(l1, rel=1e-5)
        assert row["loss"] == pytest.approx(dpo + weight * l1, rel=1e-5)


def test_a_heavy_l1_term_switches_helpfulness_on_and_safety_off(mixture):
    """Against what the pairs pull to: the two adapters change places, so that DPO alone does the opposite."""
    swapped = ",".join(ADAPTERS.split(",")[::-1])
    flags = (*FLAGS[:-1], 8, "--init_adapter", swapped, "--max_steps", 12, "--lr", 1e-2)
    free, pulled = (rows(run(f"pulled-{weight}", *flags, "--router_l1", weight))[-1] for weight in (0, 10))
    assert pulled["router/safety"] < 0.3 < 0.7 < pulled["router/helpfulness"] and pulled["router/l1"] < 0.6
    assert free["router/helpfulness"] < 0.4 < 0.6 < free["router/safety"] and free["router/l1"] > 1.2


def test_checkpointing_trains_the_same_routers(mixture):
    flags = (*FLAGS, "--init_adapter", ADAPTERS, "--router_l1", 0.1)
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
    policy, tokenizer, _ = checkpoint.load_policy(mixture)
    for layer in expert_layers(policy).values():  # the base repeats one word; with experts this large something happens
        layer.lora_B.copy_(2 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)))
        for parameter in layer.router.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 0)
    prompts = tokenizer.encode([tokenizer.render(p.text) for p in toy.eval_prompts("test", 0)[:5]])
    assert len({len(prompt) for prompt in prompts}) > 1
    answers = generate(policy, prompts, 12)
    assert len({token for answer in answers for token in answer}) > 3
    for prompt, answer in zip(prompts, answers):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(policy.logits(policy(torch.tensor([tokens])))[0, -1].argmax()))
        assert tokens[len(prompt):] == answer
        assert all(layer.weights[0].std(dim=0).min() > 0.01 for layer in expert_layers(policy).values())


def test_the_finished_mixture_is_evaluated_again_with_the_same_result(mixture):
    check_that_it_is_evaluated_again_alike(mixture)


@torch.no_grad()
@pytest.mark.parametrize("split", ("test", "dev"))
def test_the_report_on_routers_is_the_median_at_the_last_token_of_each_prompt_alone(mixture, split):
    eval_file.main([str(mixture), "--device", "cpu", "--split", split])
    policy, tokenizer, _ = checkpoint.load_policy(mixture)
    prompts = toy.eval_prompts(split, 0)
    report = read_json(mixture / ("eval-dev.json" if split == "dev" else "eval.json"))["router"]
    assert report.keys() == expert_layers(policy).keys() and len(prompts) > 30
    for name, layer in expert_layers(policy).items():
        given, weights = [], {True: [], False: []}
        hook = layer.router.register_forward_hook(lambda module, inputs, output: given.append(output[0, -1].tolist()))
        for prompt in prompts:
            policy(torch.tensor(tokenizer.encode([tokenizer.render(prompt.text)])))
            weights[prompt.task.harmful].append(given[-1])
        hook.remove()
        assert len(given) == len(prompts) and statistics.stdev(safety for safety, _ in given) > 1e-5
        for kind, harmful in (("harmful", True), ("safe", False)):
            medians = [statistics.median(column) for column in zip(*weights[harmful])]
            assert report[name][kind]["median"] == pytest.approx(medians, abs=1e-6)
        shares = [[weight / sum(row) for weight in row] for row in given]
        entropy = statistics.mean(-sum(share * math.log(share) for share in row) for row in shares)
        assert report[name]["entropy"] == pytest.approx(entropy, rel=1e-5)


@torch.no_grad()
def test_static_weights_evaluate_the_merged_model_beside_the_runs_own_result(mixture, monkeypatch, capsys):
    """W + 0.5 · 32/16 · (B_s A_s + B_h A_h), from the adapters' files in float64."""
    models, evaluate_run = [], eval_file.evaluate_run
    monkeypatch.setattr(eval_file, "evaluate_run", lambda *settings: models.extend(settings[:2]) or evaluate_run(*settings))
    before = {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
    eval_file.main([str(mixture), "--static", "0.5,0.5", "--device", "cpu"])
    report = read_json(mixture / "eval-static-0.5,0.5.json")
    assert report["policy"]["n"] == len(toy.eval_prompts("test", 0)) and "router" not in report
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{mixture} at 0.5,0.5 ") and above.startswith("base ")
               for above, line in zip(lines, lines[1:]))
    added = {path.name for path in mixture.rglob("*") if path.is_file() and path not in before}
    assert added == {"eval-static-0.5,0.5.json", "samples-static-0.5,0.5.txt"}
    assert all(path.read_bytes() == content for path, content in before.items())
    merged, base = models
    assert not expert_layers(merged) and merged.state_dict().keys() == base.state_dict().keys()
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
    assert f"--static {weights}" in line_of(eval_file.main, [str(mixture), "--static", weights, "--device", "cpu"])
    assert before == {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}


def test_a_run_without_experts_has_no_static_weights(place):
    out = run("run", "--method", "dpo", "--max_steps", 1)
    assert "--static 0.5,0.5" in line_of(eval_file.main, [str(out), "--static", "0.5,0.5", "--device", "cpu"])


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
        shutil.copytree(mixture / "helpful/adapter", "other/adapter")
        edit_json(Path("other/adapter/adapter_config.json"), lora_alpha=5)
    message = mistake(*FLAGS, "--init_adapter", given, "--out", "out/wrong")
    assert "adapter" in message
    assert not Path("out/wrong").exists()
