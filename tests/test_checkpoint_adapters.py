"""Adapters go to PEFT and come from it exactly; references were stored by fixtures/make_fixtures.py."""
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import load_adapter, load_model, save_adapter, save_model
from common import UserError, read_json
from conftest import FIXTURES, edit_json, edit_tensors, line_of, load_fixture, logits_of, moved_experts, relative_error
from lora_moe import (add_experts, disable_experts, expert_layers, merge_experts, perturb_experts, set_routers,
                      trainable_parameters)

ADAPTERS = {"adapter_list": "llama", "adapter_regex": "llama", "adapter_rslora": "llama", "adapter_pattern": "llama",
            "adapter_gpt2": "gpt2"}


# From PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_that_peft_wrote_gives_pefts_logits(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_adapter(load_fixture(ADAPTERS[name]), FIXTURES / name)
    assert relative_error(logits_of(model, expected["tokens"]), expected["logits"]) < 2e-5
    base = load_file(FIXTURES / ADAPTERS[name] / "expected.safetensors")["logits"]
    assert relative_error(base, expected["logits"]) > 1e-2
    with disable_experts(model):
        assert relative_error(logits_of(model, expected["tokens"]), base) < 2e-5


@pytest.mark.parametrize("setting", [
    {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0]},
    {"peft_type": "IA3"}, {"lora_bias": True}, {"exclude_modules": ["q_proj"]}, {"target_parameters": ["w"]},
    {"trainable_token_indices": [1]}, {"layer_replication": [[0, 2]]}, {"init_lora_weights": "pissa"},
    {"a_later_invention": 3}])
def test_a_setting_that_we_do_not_implement_is_refused_by_name(setting, tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", **setting)
    [(key, value)] = setting.items()
    message = line_of(load_adapter, load_fixture("llama"), folder)
    assert f"{folder / 'adapter_config.json'}: {key} = {value!r} is not supported" == message


def test_dropout_of_the_training_run_is_no_obstacle(tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", lora_dropout=0.1)
    expected = load_file(folder / "expected.safetensors")
    model = load_adapter(load_fixture("llama"), folder)
    assert relative_error(logits_of(model, expected["tokens"]), expected["logits"]) < 2e-5


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
    (lambda t: t.update({NAME: torch.ones(2, 24)}), f"{NAME} has shape (2, 24), the settings make it (3, 24)"),
    (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)}),
     "unexpected tensor base_model.model.x.lora_A.weight")])
def test_a_tensor_that_does_not_fit_is_named_and_the_model_left_alone(change, says, tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    edit_tensors(folder / "adapter_model.safetensors", change)
    model = load_fixture("llama")
    message = line_of(load_adapter, model, folder)
    assert says in message and str(folder / "adapter_model.safetensors") in message
    assert not expert_layers(model)


def test_missing_and_truncated_adapter_files_are_named(tmp_path):
    assert "adapter_config.json: no such file" in line_of(load_adapter, load_fixture("llama"), tmp_path)
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    assert f"{path}: broken, cut short" in line_of(load_adapter, load_fixture("llama"), folder)
    path.unlink()
    assert f"{path}: no such file" in line_of(load_adapter, load_fixture("llama"), folder)


def test_an_adapter_for_another_family_is_refused():
    assert "no layer is called 'c_attn'" in line_of(load_adapter, load_fixture("llama"), FIXTURES / "adapter_gpt2")


def test_a_pattern_is_about_layers_whose_name_ends_in_it(tmp_path):
    """As PEFT matches it: a regular expression of one or more whole parts at the end of a layer's name."""
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    alpha = read_json(folder / "adapter_config.json")["lora_alpha"]

    def of_pattern(*keys):
        edit_json(folder / "adapter_config.json", alpha_pattern={key: 99 for key in keys})
        layers = expert_layers(load_adapter(load_fixture("llama"), folder))
        assert {layer.alpha for layer in layers.values()} <= {alpha, 99}
        return {name.removeprefix("model.layers.") for name, layer in layers.items() if layer.alpha == 99}

    assert of_pattern("self_attn", "layers.1", "model", "q", "proj", "_proj") == set()
    assert of_pattern("q_proj") == {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert of_pattern("1.self_attn.q_proj") == {"1.self_attn.q_proj"}
    assert of_pattern(r"layers\.0\..*_proj", "nothing") == {
        name for name in of_pattern("q_proj", "v_proj", "[a-z]+_proj") if name.startswith("0.")}


# To PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapter_is_the_one_that_peft_wrote(name, tmp_path):
    model = load_adapter(load_fixture(ADAPTERS[name]), FIXTURES / name)
    model.origin = ADAPTERS[name]
    save_adapter(model, tmp_path / "saved")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (FIXTURES / name, tmp_path / "saved"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    theirs, ours = (read_json(folder / "adapter_config.json") for folder in (FIXTURES / name, tmp_path / "saved"))
    apart = {"target_modules", "rank_pattern", "alpha_pattern"}  # several spellings of the same layers
    assert {key: theirs[key] for key in ours.keys() - apart} == {key: ours[key] for key in ours.keys() - apart}
    if name in ("adapter_list", "adapter_rslora", "adapter_gpt2"):
        assert all(theirs[key] == ours[key] for key in apart)


@pytest.mark.parametrize("name, targets", [
    ("llama", ["down_proj"]), ("llama", r"model\.layers\.0\..*"), ("qwen3", "all-linear"), ("llama", ["lm_head"]),
    ("gpt2", "all-linear"), ("gpt2", ["q_proj", "v_proj"]), ("gpt2", ["layers.1.self_attn.k_proj", "mlp.down_proj"])])
@pytest.mark.parametrize("rslora", [False, True])
def test_saved_adapters_load_again_with_the_same_logits(name, targets, rslora, tmp_path):
    tokens = load_file(FIXTURES / name / "expected.safetensors")["tokens"]
    model = moved_experts(name, targets, rslora=rslora)
    logits = logits_of(model, tokens)
    save_adapter(model, tmp_path / "saved")
    again = load_adapter(load_fixture(name), tmp_path / "saved")
    assert relative_error(logits_of(again, tokens), logits) < 1e-6
    save_adapter(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("saved", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_saved_gpt2_adapter_is_pefts_formula_on_the_fused_layer(tmp_path):
    """scale · B A of the written c_attn, in float64, is what q, k and v add to theirs, stacked."""
    model = moved_experts("gpt2", ["q_proj", "v_proj"])
    save_adapter(model, tmp_path / "saved")
    tensors, config = load_file(tmp_path / "saved" / "adapter_model.safetensors"), read_json(
        tmp_path / "saved" / "adapter_config.json")
    module = "transformer.h.1.attn.c_attn"
    A, B = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    scale = config["alpha_pattern"][module] / config["rank_pattern"][module]
    layers = expert_layers(model)
    q, v = (layers[f"model.layers.1.self_attn.{part}_proj"] for part in "qv")
    q, v = (5 / 3 * layer.lora_B.double() @ layer.lora_A.double() for layer in (q, v))
    torch.testing.assert_close(scale * B @ A, torch.cat([q, torch.zeros_like(q), v]))


def test_a_routed_mixture_is_not_written_as_a_peft_adapter(tmp_path):
    model = moved_experts("llama", ["q_proj"], num_experts=2, router={"type": "softmax"})
    with pytest.raises(AssertionError, match="without a router"):
        save_adapter(model, tmp_path / "saved")


# Merging


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_saved_adapter_is_a_plain_checkpoint_with_the_same_logits(name, tmp_path):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_adapter(load_fixture(ADAPTERS[name]), FIXTURES / name)
    with pytest.raises(UserError, match="carries experts"):
        save_model(model, tmp_path / "merged")
    save_model(merge_experts(model), tmp_path / "merged")
    plain = load_model(tmp_path / "merged")
    assert relative_error(logits_of(plain, expected["tokens"]), expected["logits"]) < 1e-5
    stored = load_file(FIXTURES / ADAPTERS[name] / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == stored.keys()


# Experts


def test_fresh_experts_change_nothing_and_are_all_that_trains():
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model = load_fixture("llama")
    before = logits_of(model, tokens)
    add_experts(model, ["q_proj", "mlp.up_proj"], rank=2, alpha=4)
    assert torch.equal(logits_of(model, tokens), before)
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 8 and all(re.search(r"(q|up)_proj\.lora_[AB]$", name) for name in names)


def test_all_linear_spares_the_head():
    names = [*expert_layers(add_experts(load_fixture("llama"), "all-linear", rank=1, alpha=1))]
    assert len(names) == 14 and "lm_head" not in names


@pytest.mark.parametrize("family, layers", [("llama", ("down", "gate", "up")), ("gpt2", ("down", "up"))])
def test_mlp_selects_the_layers_of_the_mlps_in_every_family(family, layers):
    model = add_experts(load_fixture(family), "mlp", rank=1, alpha=1)
    assert sorted(expert_layers(model)) == [
        f"model.layers.{i}.mlp.{layer}_proj" for i in range(model.config.num_layers) for layer in layers]


def test_targets_that_select_nothing_are_named():
    assert "no layer is called 'c_attn'; there are down_proj, gate_proj" in line_of(
        add_experts, load_fixture("llama"), ["q_proj", "c_attn"], 1, 1)
    assert "'nothing.*' selects no layer" in line_of(add_experts, load_fixture("llama"), "nothing.*", 1, 1)


def test_experts_are_not_wrapped_twice():
    model = add_experts(load_fixture("llama"), ["q_proj"], rank=1, alpha=1)
    with pytest.raises(AssertionError, match="has experts already"):
        add_experts(model, ["q_proj"], rank=1, alpha=1)
    with pytest.raises(AssertionError, match="has experts already"):
        load_adapter(model, FIXTURES / "adapter_list")


# Several adapters in one model


def adapter(folder, seed, name="llama", targets=("down_proj",), rank=3, alpha=5, rslora=False):
    """A folder with one expert in PEFT's format, random from its seed."""
    model = add_experts(load_fixture(name), list(targets), rank, alpha, rslora=rslora, seed=seed)
    save_adapter(perturb_experts(model, 0.3, seed), folder)
    return folder


@pytest.mark.parametrize("name, targets", [("llama", ["down_proj"]), ("llama", ["q_proj", "mlp.up_proj"]),
                                           ("gpt2", ["q_proj", "k_proj", "v_proj", "mlp.down_proj"])])
@pytest.mark.parametrize("rslora", (False, True))
def test_two_adapters_with_constant_weights_add_their_weighted_deltas(name, targets, rslora, tmp_path):
    """The deltas scale · B A come from each adapter's own model and go into base weights in float64."""
    folders = [adapter(tmp_path / str(seed), seed, name, targets, rslora=rslora) for seed in (1, 2)]
    tokens = load_file(FIXTURES / name / "expected.safetensors")["tokens"]
    weights = (0.3, -1.25)
    plain = load_fixture(name).double()
    for folder, weight in zip(folders, weights):
        single = load_adapter(load_fixture(name), folder)
        for module, layer in expert_layers(single).items():
            scale = layer.alpha / (math.sqrt(layer.rank) if rslora else layer.rank)
            delta = scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
            plain.get_submodule(module).weight.data.add_(weight * delta)
    both = set_routers(load_adapter(load_fixture(name), *folders), {"type": "constant", "weights": list(weights)})
    assert {layer.num_experts for layer in expert_layers(both).values()} == {2}
    want = logits_of(plain, tokens)
    assert relative_error(logits_of(both, tokens).double(), want) < 1e-5
    assert relative_error(logits_of(load_fixture(name), tokens).double(), want) > 1e-2
    assert relative_error(logits_of(merge_experts(both), tokens).double(), want) < 1e-5


@pytest.mark.parametrize("other", ({"rank": 2, "alpha": 5}, {"rank": 3, "alpha": 6}, {"targets": ("up_proj",)},
                                   {"targets": ("down_proj", "up_proj")}, {"rslora": True}), ids=str)
def test_adapters_of_different_shapes_do_not_go_together(other, tmp_path):
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2, **other)
    model = load_fixture("llama")
    assert line_of(load_adapter, model, first, second) == (
        f"{second}: its layers, rank or alpha differ from those of {first}")
    assert not expert_layers(model), "the model is left alone"


def test_a_missing_second_adapter_is_named(tmp_path):
    model, first = load_fixture("llama"), adapter(tmp_path / "first", 1)
    assert f"{tmp_path / 'none' / 'adapter_config.json'}: no such file" == line_of(
        load_adapter, model, first, tmp_path / "none")
    assert not expert_layers(model)
