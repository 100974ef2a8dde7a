"""Adapters go to PEFT and come from it exactly; references were stored by fixtures/make_fixtures.py."""
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import pack
from lora_moe import (ConstantRouter, ExpertLinear, SigmoidRouter, SoftmaxRouter, add_experts, expert_layers,
                      load_adapter, load_experts, merge_experts, reference, router_weights, save_adapter, save_experts,
                      set_routers, trainable_parameters)
from losses import router_l1
from model import Transformer, UserError, read_json
from test_losses import encoded_of, sequences

FIXTURES = Path(__file__).parent / "fixtures"
ADAPTERS = {"adapter_list": "llama", "adapter_regex": "llama", "adapter_rslora": "llama", "adapter_pattern": "llama",
            "adapter_gpt2": "gpt2"}


def load(name):
    return Transformer.from_pretrained(FIXTURES / name)


@torch.no_grad()
def logits_of(model, tokens):
    return model.logits(model(tokens))


def relative_error(got, want):
    return float((got - want).norm() / want.norm())


def trained(name, targets, **settings):
    """A model whose experts have moved, as if trained."""
    model = add_experts(load(name), targets, rank=3, alpha=5, **settings)
    generator = torch.Generator().manual_seed(1)
    for _, layer in expert_layers(model):
        layer.lora_B.data.normal_(0, 0.3, generator=generator)
    return model


def line_of(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_that_peft_wrote_gives_pefts_logits(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_adapter(load(ADAPTERS[name]), FIXTURES / name)
    assert relative_error(logits_of(model, expected["tokens"]), expected["logits"]) < 2e-5
    base = load_file(FIXTURES / ADAPTERS[name] / "expected.safetensors")["logits"]
    assert relative_error(base, expected["logits"]) > 1e-2
    with reference(model):
        assert relative_error(logits_of(model, expected["tokens"]), base) < 2e-5


@pytest.mark.parametrize("setting", [
    {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0]},
    {"peft_type": "IA3"}, {"lora_bias": True}, {"exclude_modules": ["q_proj"]}, {"target_parameters": ["w"]},
    {"trainable_token_indices": [1]}, {"layer_replication": [[0, 2]]}, {"init_lora_weights": "pissa"},
    {"a_later_invention": 3}])
def test_a_setting_that_we_do_not_implement_is_refused_by_name(setting, tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    config = {**read_json(folder / "adapter_config.json"), **setting}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    [(key, value)] = setting.items()
    message = line_of(load_adapter, load("llama"), folder)
    assert f"{folder / 'adapter_config.json'}: {key} = {value!r} is not supported" == message


def test_dropout_of_the_training_run_is_no_obstacle(tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    config = {**read_json(folder / "adapter_config.json"), "lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected = load_file(folder / "expected.safetensors")
    model = load_adapter(load("llama"), folder)
    assert relative_error(logits_of(model, expected["tokens"]), expected["logits"]) < 2e-5


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
    (lambda t: t.update({NAME: torch.ones(2, 24)}), f"{NAME} has shape (2, 24), the model wants (3, 24)"),
    (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)}),
     "unexpected tensor base_model.model.x.lora_A.weight")])
def test_a_tensor_that_does_not_fit_is_named_and_the_model_left_alone(change, says, tmp_path):
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    model = load("llama")
    message = line_of(load_adapter, model, folder)
    assert says in message and str(folder / "adapter_model.safetensors") in message
    assert not list(expert_layers(model))


def test_missing_and_truncated_adapter_files_are_named(tmp_path):
    assert "adapter_config.json: no such file" in line_of(load_adapter, load("llama"), tmp_path)
    folder = shutil.copytree(FIXTURES / "adapter_list", tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    assert f"{path}: broken or cut short" in line_of(load_adapter, load("llama"), folder)
    path.unlink()
    assert f"{path}: no such file" in line_of(load_adapter, load("llama"), folder)


def test_an_adapter_for_another_family_is_refused():
    assert "no layer is called 'c_attn'" in line_of(load_adapter, load("llama"), FIXTURES / "adapter_gpt2")


# To PEFT


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_adapter_is_the_one_that_peft_wrote(name, tmp_path):
    model = load_adapter(load(ADAPTERS[name]), FIXTURES / name)
    save_adapter(model, tmp_path / "saved", base_name=ADAPTERS[name])
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
    model = trained(name, targets, rslora=rslora)
    logits = logits_of(model, tokens)
    save_adapter(model, tmp_path / "saved")
    again = load_adapter(load(name), tmp_path / "saved")
    assert relative_error(logits_of(again, tokens), logits) < 1e-6
    save_adapter(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("saved", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_saved_gpt2_adapter_is_pefts_formula_on_the_fused_layer(tmp_path):
    """scale · B A of the written c_attn, in float64, is what q, k and v add to theirs, stacked."""
    model = trained("gpt2", ["q_proj", "v_proj"])
    save_adapter(model, tmp_path / "saved")
    tensors, config = load_file(tmp_path / "saved" / "adapter_model.safetensors"), read_json(
        tmp_path / "saved" / "adapter_config.json")
    module = "transformer.h.1.attn.c_attn"
    A, B = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    scale = config["alpha_pattern"][module] / config["rank_pattern"][module]
    layers = dict(expert_layers(model))
    q, v = (layers[f"model.layers.1.self_attn.{part}_proj"] for part in "qv")
    q, v = (5 / 3 * layer.lora_B.double() @ layer.lora_A.double() for layer in (q, v))
    torch.testing.assert_close(scale * B @ A, torch.cat([q, torch.zeros_like(q), v]))


def test_a_mixture_is_not_written_as_a_peft_adapter(tmp_path):
    with pytest.raises(AssertionError, match="one expert"):
        save_adapter(trained("llama", ["q_proj"], num_experts=2), tmp_path / "saved")


# Merging


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_saved_adapter_is_a_plain_checkpoint_with_the_same_logits(name, tmp_path):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = load_adapter(load(ADAPTERS[name]), FIXTURES / name)
    with pytest.raises(UserError, match="carries experts"):
        model.save_pretrained(tmp_path / "merged")
    merge_experts(model).save_pretrained(tmp_path / "merged")
    plain = Transformer.from_pretrained(tmp_path / "merged")
    assert relative_error(logits_of(plain, expected["tokens"]), expected["logits"]) < 1e-5
    stored = load_file(FIXTURES / ADAPTERS[name] / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == stored.keys()


# Experts


def test_expert_linear_is_its_formula_in_float64():
    base = torch.nn.Linear(6, 5)
    layer = ExpertLinear(base, rank=2, alpha=3, num_experts=3, generator=torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_()
    layer.router.weights = torch.tensor([0.2, 0.0, 1.5])
    x = torch.randn(4, 7, 6)
    want = x.double() @ base.weight.double().T + base.bias.double()
    for k, weight in enumerate((0.2, 0.0, 1.5)):
        A, B = layer.lora_A[2 * k:2 * k + 2].double(), layer.lora_B[:, 2 * k:2 * k + 2].double()
        want += 3 / 2 * weight * (x.double() @ A.T) @ B.T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


def test_fresh_experts_change_nothing_and_are_all_that_trains():
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model = load("llama")
    before = logits_of(model, tokens)
    add_experts(model, ["q_proj", "mlp.up_proj"], rank=2, alpha=4)
    assert torch.equal(logits_of(model, tokens), before)
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 8 and all(re.search(r"(q|up)_proj\.lora_[AB]$", name) for name in names)


def test_all_linear_spares_the_head():
    names = [name for name, _ in expert_layers(add_experts(load("llama"), "all-linear", rank=1, alpha=1))]
    assert len(names) == 14 and "lm_head" not in names


@pytest.mark.parametrize("family, layers", [("llama", ("down", "gate", "up")), ("gpt2", ("down", "up"))])
def test_mlp_selects_the_layers_of_the_mlps_in_every_family(family, layers):
    model = add_experts(load(family), "mlp", rank=1, alpha=1)
    assert sorted(name for name, _ in expert_layers(model)) == [
        f"model.layers.{i}.mlp.{layer}_proj" for i in range(model.config.num_layers) for layer in layers]


def test_targets_that_select_nothing_are_named():
    assert "no layer is called 'c_attn'; there are down_proj, gate_proj" in line_of(
        add_experts, load("llama"), ["q_proj", "c_attn"], 1, 1)
    assert "'nothing.*' selects no layer" in line_of(add_experts, load("llama"), "nothing.*", 1, 1)


def test_experts_are_not_wrapped_twice():
    model = add_experts(load("llama"), ["q_proj"], rank=1, alpha=1)
    with pytest.raises(AssertionError, match="has experts already"):
        add_experts(model, ["q_proj"], rank=1, alpha=1)
    with pytest.raises(AssertionError, match="has experts already"):
        load_adapter(model, FIXTURES / "adapter_list")


# Routers


D_IN, D_OUT, RANK, ALPHA = 6, 5, 2, 3


def routed(kind, num_experts, **settings):
    """An expert layer whose every number is random, the last layer's bias of a sigmoid router included."""
    generator = torch.Generator().manual_seed(4)
    router = kind(D_IN, num_experts, generator, **settings)
    base = torch.nn.Linear(D_IN, D_OUT)
    layer = ExpertLinear(base, RANK, ALPHA, num_experts, router)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.7, generator=generator)
    return layer


def plain_weights(layer, token, activation=""):
    """The weights of one token, a list of float64 numbers, network by network and layer by layer."""
    bend = {"": lambda z: z, "relu": lambda z: z.clamp(min=0), "silu": lambda z: z / (1 + (-z).exp())}[activation]
    if isinstance(layer.router, SigmoidRouter):
        weights = []
        for first, second, last in layer.router.networks:
            inner = bend(first.weight.double() @ token + first.bias.double())
            inner = bend(second.weight.double() @ inner + second.bias.double())
            [score] = last.weight.double() @ inner + last.bias.double()
            weights.append(1 / (1 + (-score).exp()))
        return weights
    exponents = [(row.double() @ token / layer.router.temperature).exp() for row in layer.router.linear.weight]
    return [exponent / sum(exponents) for exponent in exponents]


def plain_output(layer, x, activation=""):
    """The layer on x (T, D_in) in float64: a loop over tokens and experts, each with a B and an A of its own."""
    rows = []
    for token in x.double():
        row = layer.base.weight.double() @ token + layer.base.bias.double()
        weights = plain_weights(layer, token, activation)
        for k in range(layer.num_experts):
            A = layer.lora_A.double()[k * RANK:(k + 1) * RANK]
            B = layer.lora_B.double()[:, k * RANK:(k + 1) * RANK]
            row = row + weights[k] * ALPHA / RANK * (B @ (A @ token))
        rows.append(row)
    return torch.stack(rows)


KINDS = [(SigmoidRouter, {"hidden": 4}), (SigmoidRouter, {"hidden": 4, "activation": "silu"}),
         (SigmoidRouter, {"hidden": 4, "activation": "relu"}), (SoftmaxRouter, {}), (SoftmaxRouter, {"empty": False}),
         (SoftmaxRouter, {"temperature": 0.3})]


@pytest.mark.parametrize("num_experts", (1, 2, 5))
@pytest.mark.parametrize("kind, settings", KINDS, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_routed_experts_and_all_gradients_equal_a_loop_over_tokens_and_experts(kind, settings, num_experts):
    layer, activation = routed(kind, num_experts, **settings).double(), settings.get("activation", "")
    generator = torch.Generator().manual_seed(5)
    x, pull = (torch.randn(2, 3, width, generator=generator).double() for width in (D_IN, D_OUT))
    results = []
    for compute in (layer, lambda x: plain_output(layer, x.flatten(0, 1), activation).view(2, 3, D_OUT)):
        x = x.detach().requires_grad_()
        for parameter in layer.parameters():
            parameter.grad = None
        output = compute(x)
        (output * pull).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("base.")}
        results.append({"output": output, "input": x.grad, **gradients})
    got, want = results
    assert {"lora_A", "lora_B"} < got.keys() and layer.base.weight.grad is None
    for name in want:
        if num_experts == 1 and settings.get("empty") is False and name == "router.linear.weight":
            assert want[name].abs().max() < 1e-12 and got[name].abs().max() < 1e-5, "one slot of a softmax is always 1"
            continue
        assert want[name].abs().max() > 1e-3
        assert (got[name] - want[name]).norm() < 1e-5 * want[name].norm(), name  # weights pass through float32
    weights = torch.stack([torch.stack(plain_weights(layer, token, activation)) for token in x.flatten(0, 1)]).detach()
    assert layer.weights.shape == (2, 3, weights.shape[1])
    assert torch.allclose(layer.weights.flatten(0, 1).double(), weights, atol=1e-6)


@pytest.mark.parametrize("num_experts", (1, 3))
def test_softmax_weights_of_the_real_experts_and_the_empty_one_sum_to_one(num_experts):
    x = torch.randn(7, D_IN)
    for empty, slots in ((True, num_experts + 1), (False, num_experts)):
        layer = routed(SoftmaxRouter, num_experts, empty=empty)
        layer(x)
        assert layer.weights.shape == (7, slots) and torch.allclose(layer.weights.sum(-1), torch.ones(7))


def test_an_empty_expert_of_weight_1_leaves_the_base_output_bit_for_bit():
    layer, x = routed(SoftmaxRouter, 3), torch.rand(9, D_IN) + 0.1
    assert not torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.router.linear.weight[-1] = 1e5
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.weights[:, -1], torch.ones(9))


def test_sigmoid_weights_are_apart_and_need_not_sum_to_one():
    layer, x = routed(SigmoidRouter, 2, hidden=4), torch.randn(9, D_IN)
    layer(x)
    before = layer.weights
    with torch.no_grad():
        layer.router.networks[1][2].bias.add_(3)
    layer(x)
    assert torch.equal(layer.weights[:, 0], before[:, 0]) and (layer.weights[:, 1] > before[:, 1]).all()
    assert (layer.weights.sum(-1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("kind, settings", KINDS, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_bfloat16_input_gives_a_bfloat16_output_and_float32_weights(kind, settings):
    layer = routed(kind, 2, **settings)
    layer.base.to(torch.bfloat16)
    x = torch.randn(20, D_IN).to(torch.bfloat16)
    want = plain_output(layer, x, settings.get("activation", ""))
    got = layer(x)
    assert got.dtype == torch.bfloat16 and layer.weights.dtype == torch.float32
    assert relative_error(got.detach().double(), want.detach()) < 0.02
    got.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_A.dtype == torch.float32 and layer.lora_A.grad.abs().sum() > 0


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm,
                                                  torch.ops.aten.baddbmm)
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def test_experts_are_two_matrix_products_however_many_there_are():
    tokens = 50
    base, x = torch.nn.Linear(40, 30), torch.randn(5, 10, 40)
    for count, router, products, flops in (
            (1, ConstantRouter([1.0]), 0, 0), (9, ConstantRouter([1.0] * 9), 0, 0),
            (2, SoftmaxRouter(40, 2), 1, 2 * 3 * 40 * tokens), (9, SoftmaxRouter(40, 9), 1, 2 * 10 * 40 * tokens),
            (2, SigmoidRouter(40, 2, hidden=8), 5, 2 * 2 * 40 * tokens + 2 * 2 * 2 * 40 * 8)):
        layer = ExpertLinear(base, RANK, ALPHA, count, router)
        with Products() as seen, FlopCounterMode(display=False) as counter:
            layer(x)
        assert seen.count == 1 + 2 + products
        assert counter.get_total_flops() == 2 * tokens * (40 * 30 + count * RANK * (40 + 30)) + flops


def routed_llama(router, num_experts=2, seed=0):
    model = trained("llama", ["down_proj"], num_experts=num_experts, router=router, seed=seed)
    with torch.no_grad():  # so that weights lie anywhere between 0 and 1
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.mul_(4)
    return model


SIGMOID, SOFTMAX = {"type": "sigmoid", "hidden": 6}, {"type": "softmax"}


@torch.no_grad()
@pytest.mark.parametrize("router", (SIGMOID, SOFTMAX), ids=lambda router: router["type"])
def test_router_weights_of_a_packed_batch_are_those_of_separate_sequences_and_of_one_pass(router):
    """Of every real token once, padding left out; read after a forward pass that ran each base layer once."""
    model, encoded = routed_llama(router), encoded_of([(3, 5, 2), (1, 4, 6), (7, 3, 1), (9, 8, 7), (4, 1, 12)])
    batch = pack(encoded, list(range(len(encoded))))
    kept = batch.pair.flatten() >= 0
    assert not kept.all(), "there is padding to leave out"
    calls = []
    for _, layer in expert_layers(model):
        layer.base.register_forward_hook(lambda *_: calls.append(1))
    model(batch.tokens, batch.positions, batch.mask())
    weights = router_weights(model, kept)
    assert len(calls) == 2 and weights.shape == (2, int(encoded.lengths().sum()), 2 + (router is SOFTMAX))

    alone = {}
    for i in range(len(encoded)):
        for part, (prompt, response) in enumerate(sequences(encoded, i), 1):
            model(torch.tensor([prompt + response]))
            for l, (_, layer) in enumerate(expert_layers(model)):
                for place, token in enumerate(layer.weights[0]):
                    part_of = (0, place) if place < len(prompt) else (part, place)
                    alone[i, part_of, l] = token
    places = zip(batch.pair.flatten()[kept].tolist(), batch.part.flatten()[kept].tolist(),
                 batch.positions.flatten()[kept].tolist())
    want = torch.stack([torch.stack([alone[pair, (part, place), l] for l in range(2)])
                        for pair, part, place in places], dim=1)
    assert len(alone) == 2 * weights.shape[1] and want.std() > 0.1
    assert torch.allclose(weights, want, atol=1e-5)
    if router is SIGMOID:
        total = sum(abs(float(safety)) + abs(float(helpfulness) - 1) for safety, helpfulness in alone.values())
        assert float(router_l1(*weights.unbind(-1))) == pytest.approx(total / len(alone), rel=1e-5)


def router_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".router." in name}


@pytest.mark.parametrize("router", (SIGMOID, SOFTMAX), ids=lambda router: router["type"])
def test_a_seed_draws_the_same_routers_and_no_two_networks_alike(router):
    first, second, other = (add_experts(load("llama"), ["down_proj"], 3, 5, 2, seed=seed, router=router)
                            for seed in (7, 7, 8))
    assert router_state(first).keys() == router_state(second).keys() == router_state(other).keys()
    assert all(torch.equal(tensor, router_state(second)[name]) for name, tensor in router_state(first).items())
    assert not any(torch.equal(tensor, router_state(other)[name]) for name, tensor in router_state(first).items())
    drawn = [tuple(tensor.flatten().tolist()) for tensor in router_state(first).values()]
    assert len(set(drawn)) == len(drawn)
    assert all(torch.equal(a, b) for a, b in zip((layer.lora_A for _, layer in expert_layers(first)),
                                                 (layer.lora_A for _, layer in expert_layers(second))))


def test_new_routers_leave_the_experts_and_the_base_alone():
    model = routed_llama(SIGMOID)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = router_state(model)
    set_routers(model, SOFTMAX, seed=3)
    assert all(isinstance(layer.router, SoftmaxRouter) for _, layer in expert_layers(model))
    after = model.state_dict()
    assert after.keys() - before.keys() and not old.keys() & after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in old)


@pytest.mark.parametrize("router", (SIGMOID, SOFTMAX), ids=lambda router: router["type"])
def test_a_mixture_switched_off_is_the_base_model(router):
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model, base = routed_llama(router), logits_of(load("llama"), tokens)
    assert relative_error(logits_of(model, tokens), base) > 1e-3
    with reference(model):
        assert torch.equal(logits_of(model, tokens), base)


# Several adapters in one model


def adapter(folder, seed, name="llama", targets=("down_proj",), rank=3, alpha=5, rslora=False):
    """A folder with one expert in PEFT's format, random from its seed."""
    model = add_experts(load(name), list(targets), rank, alpha, rslora=rslora, seed=seed)
    for _, layer in expert_layers(model):
        layer.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("name, targets", [("llama", ["down_proj"]), ("llama", ["q_proj", "mlp.up_proj"]),
                                           ("gpt2", ["q_proj", "k_proj", "v_proj", "mlp.down_proj"])])
@pytest.mark.parametrize("rslora", (False, True))
def test_two_adapters_with_constant_weights_add_their_weighted_deltas(name, targets, rslora, tmp_path):
    """The deltas scale · B A come from each adapter's own model and go into base weights in float64."""
    folders = [adapter(tmp_path / str(seed), seed, name, targets, rslora=rslora) for seed in (1, 2)]
    tokens = load_file(FIXTURES / name / "expected.safetensors")["tokens"]
    weights = (0.3, -1.25)
    plain = load(name).double()
    for folder, weight in zip(folders, weights):
        single = load_adapter(load(name), folder)
        for module, layer in expert_layers(single):
            scale = layer.alpha / (math.sqrt(layer.rank) if rslora else layer.rank)
            delta = scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
            plain.get_submodule(module).weight.data.add_(weight * delta)
    both = set_routers(load_adapter(load(name), *folders), {"type": "constant", "weights": list(weights)})
    assert {layer.num_experts for _, layer in expert_layers(both)} == {2}
    want = logits_of(plain, tokens)
    assert relative_error(logits_of(both, tokens).double(), want) < 1e-5
    assert relative_error(logits_of(load(name), tokens).double(), want) > 1e-2
    assert relative_error(logits_of(merge_experts(both), tokens).double(), want) < 1e-5


@pytest.mark.parametrize("other", ({"rank": 2, "alpha": 5}, {"rank": 3, "alpha": 6}, {"targets": ("up_proj",)},
                                   {"targets": ("down_proj", "up_proj")}, {"rslora": True}), ids=str)
def test_adapters_of_different_shapes_do_not_go_together(other, tmp_path):
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2, **other)
    model = load("llama")
    assert line_of(load_adapter, model, first, second) == (
        f"{second}: its layers, rank or alpha differ from those of {first}")
    assert not list(expert_layers(model)), "the model is left alone"


def test_a_missing_second_adapter_is_named(tmp_path):
    model, first = load("llama"), adapter(tmp_path / "first", 1)
    assert f"{tmp_path / 'none' / 'adapter_config.json'}: no such file" == line_of(
        load_adapter, model, first, tmp_path / "none")
    assert not list(expert_layers(model))


@pytest.mark.parametrize("weights", ([0.5, 0.5], [1.0, 0.0], [0.2, 1.5]), ids=str)
def test_a_mixture_merged_at_constant_weights_runs_as_it_did_with_them(weights, tmp_path):
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model = set_routers(routed_llama(SIGMOID), {"type": "constant", "weights": weights})
    running = logits_of(model, tokens)
    assert relative_error(running, logits_of(load("llama"), tokens)) > 1e-2
    merge_experts(model).save_pretrained(tmp_path / "merged")
    assert not list(expert_layers(model))
    assert relative_error(logits_of(model, tokens), running) < 1e-5
    assert relative_error(logits_of(Transformer.from_pretrained(tmp_path / "merged"), tokens), running) < 1e-5


def test_routed_weights_cannot_be_merged():
    with pytest.raises(AssertionError, match="only constant weights"):
        merge_experts(routed_llama(SIGMOID))


# Mixtures on disk


ROUTERS = (SIGMOID, {**SIGMOID, "activation": "silu"}, SOFTMAX, {"type": "softmax", "empty": False, "temperature": 2.0},
           {"type": "constant"}, {"type": "constant", "weights": [0.25, 1.5]})


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("name, targets", [("llama", ["down_proj"]), ("gpt2", "all-linear")])
def test_saved_mixtures_load_again_with_the_same_logits(router, name, targets, tmp_path):
    tokens = load_file(FIXTURES / name / "expected.safetensors")["tokens"]
    model = trained(name, targets, num_experts=2, rslora=True, router=router, seed=5)
    logits = logits_of(model, tokens)
    assert relative_error(logits, logits_of(load(name), tokens)) > 1e-3
    save_experts(model, tmp_path / "saved")
    again = load_experts(load(name), tmp_path / "saved")
    assert torch.equal(logits_of(again, tokens), logits)
    save_experts(again, tmp_path / "twice")
    for file in ("experts.json", "experts.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    stored = load_file(tmp_path / "saved" / "experts.safetensors")
    assert all("lora_" in key or ".router." in key for key in stored), "the base's own weights are not in the file"


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "experts.safetensors")
        change(tensors)
        save_file(tensors, folder / "experts.safetensors")
    return damage


def damage_settings(change):
    def damage(folder):
        config = read_json(folder / "experts.json")
        change(config)
        (folder / "experts.json").write_text(json.dumps(config))
    return damage


def cut(folder):
    path = folder / "experts.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


LORA = "model.layers.1.mlp.down_proj.lora_B"
ROUTER = "model.layers.0.mlp.down_proj.router.networks.1.0.weight"


@pytest.mark.parametrize("damage, file, says", [
    (damage_tensors(lambda t: t.pop(LORA)), "experts.safetensors", LORA),
    (damage_tensors(lambda t: t.pop(ROUTER)), "experts.safetensors", ROUTER),
    (damage_tensors(lambda t: t.update({LORA: torch.ones(24, 5)})), "experts.safetensors", LORA),
    (damage_tensors(lambda t: t.update({ROUTER: torch.ones(1)})), "experts.safetensors", ROUTER),
    (damage_tensors(lambda t: t.update({"model.norm.lora_A": torch.ones(1)})), "experts.safetensors",
     "unexpected tensor model.norm.lora_A"),
    (damage_tensors(lambda t: t.update({"model.norm.weight": torch.ones(24)})), "experts.safetensors",
     "unexpected tensor model.norm.weight"),
    (cut, "experts.safetensors", "broken or cut short"),
    (lambda folder: (folder / "experts.safetensors").unlink(), "experts.safetensors", "no such file"),
    (lambda folder: (folder / "experts.json").unlink(), "experts.json", "no such file"),
    (lambda folder: (folder / "experts.json").write_text("{"), "experts.json", "not JSON"),
    *((damage_settings(lambda config, key=key: config.pop(key)), "experts.json", key)
      for key in ("layers", "num_experts", "rank", "alpha", "rslora", "router")),
    (damage_settings(lambda config: config["router"].pop("type")), "experts.json", "type"),
    (damage_settings(lambda config: config["router"].update(type="topk")), "experts.json", "topk"),
    (damage_settings(lambda config: config["router"].update(depth=9)), "experts.json", "depth"),
    (damage_settings(lambda config: config["router"].update(activation="bent")), "experts.json", "bent"),
    (damage_settings(lambda config: config["layers"].append("model.layers.9.mlp.down_proj")), "experts.json",
     "model.layers.9.mlp.down_proj"),
    (damage_settings(lambda config: config.update(rank=0)), "experts.json", "rank"),
    (damage_settings(lambda config: config.update(rank=4)), "experts.safetensors", "lora_A"),
    (damage_settings(lambda config: config.update(num_experts=1)), "experts.safetensors", "lora_A"),
], ids=("no expert", "no router", "expert shape", "router shape", "extra expert", "base weight", "cut", "no tensors",
        "no settings", "half of settings", "no layers", "no num_experts", "no rank", "no alpha", "no rslora",
        "no router spec", "no type", "unknown type", "unknown setting", "unknown activation", "unknown layer", "rank 0",
        "other rank", "other number"))
def test_a_damaged_mixture_is_answered_with_one_line_that_names_the_file(damage, file, says, tmp_path):
    folder = tmp_path / "saved"
    save_experts(routed_llama(SIGMOID), folder)
    damage(folder)
    message = line_of(load_experts, load("llama"), folder)
    assert str(folder / file) in message and says in message, message


def test_a_router_without_gradients_follows_every_change_of_its_weights():
    """Generation multiplies the chain once; training, loading and moving weights must never see an old one."""
    router = SigmoidRouter(6, 2, torch.Generator().manual_seed(0), hidden=4)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))

    def plain():
        return torch.cat([torch.sigmoid(c(b(a(x)))) for a, b, c in router.networks], dim=-1)

    def check():
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(router(x), plain(), atol=1e-6)

    check()
    for fused in (False, True):
        optimizer = torch.optim.AdamW(router.parameters(), lr=0.5, fused=fused)
        before = plain().detach()
        router(x).sum().backward()
        optimizer.step()
        assert not torch.allclose(plain(), before, atol=1e-3)
        check()
    with torch.no_grad():
        router.networks[0][1].weight.mul_(-2)
    check()
    router.networks[1][0].weight.data = torch.ones(4, 6)
    check()
    router.load_state_dict(SigmoidRouter(6, 2, torch.Generator().manual_seed(5), hidden=4).state_dict())
    check()
