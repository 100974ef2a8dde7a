"""Expert layers and their routers against loops over tokens and experts in float64, and mixtures on disk."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lora_moe
from batch import pack
from checkpoint import load_experts, load_model, save_experts, save_model
from common import read_json
from conftest import (FIXTURES, edit_tensors, encoded_of, line_of, load_fixture, logits_of, moved_experts, pieces,
                      relative_error)
from lora_moe import (ConstantRouter, ExpertLinear, SigmoidRouter, SoftmaxRouter, add_experts, disable_experts,
                      expert_layers, is_routed, merge_experts, router_weights, set_routers)
from losses import expert_group_soft_loss, group_targets, router_l1
from report import router_table

# One layer


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


def plain_weights(layer, token):
    """The weights of one token, a list of float64 numbers, network by network and layer by layer."""
    if isinstance(layer.router, SigmoidRouter):
        weights = []
        for first, second, last in layer.router.networks:
            inner = first.weight.double() @ token + first.bias.double()
            inner = second.weight.double() @ inner + second.bias.double()
            [score] = last.weight.double() @ inner + last.bias.double()
            weights.append(1 / (1 + (-score).exp()))
        return weights
    exponents = [(row.double() @ token / layer.router.temperature).exp() for row in layer.router.linear.weight]
    return [exponent / sum(exponents) for exponent in exponents]


def plain_output(layer, x):
    """The layer on x (T, D_in) in float64: a loop over tokens and experts, each with a B and an A of its own."""
    rows = []
    for token in x.double():
        row = layer.base.weight.double() @ token + layer.base.bias.double()
        weights = plain_weights(layer, token)
        for k in range(layer.num_experts):
            A = layer.lora_A.double()[k * RANK:(k + 1) * RANK]
            B = layer.lora_B.double()[:, k * RANK:(k + 1) * RANK]
            row = row + weights[k] * ALPHA / RANK * (B @ (A @ token))
        rows.append(row)
    return torch.stack(rows)


KINDS = [(SigmoidRouter, {"hidden": 4}), (SoftmaxRouter, {}), (SoftmaxRouter, {"empty": False}),
         (SoftmaxRouter, {"temperature": 0.3})]


@pytest.mark.parametrize("num_experts", (1, 2, 5))
@pytest.mark.parametrize("kind, settings", KINDS, ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_routed_experts_and_all_gradients_equal_a_loop_over_tokens_and_experts(kind, settings, num_experts):
    layer = routed(kind, num_experts, **settings).double()
    generator = torch.Generator().manual_seed(5)
    x, pull = (torch.randn(2, 3, width, generator=generator).double() for width in (D_IN, D_OUT))
    results = []
    for compute in (layer, lambda x: plain_output(layer, x.flatten(0, 1)).view(2, 3, D_OUT)):
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
    weights = torch.stack([torch.stack(plain_weights(layer, token)) for token in x.flatten(0, 1)]).detach()
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
    want = plain_output(layer, x)
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
    model = moved_experts("llama", ["down_proj"], num_experts=num_experts, router=router, seed=seed)
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
    for layer in expert_layers(model).values():
        layer.base.register_forward_hook(lambda *_: calls.append(1))
    model(batch.tokens, batch.positions, batch.mask())
    weights = router_weights(model, kept)
    assert len(calls) == 2 and weights.shape == (2, int(encoded.lengths().sum()), 2 + (router is SOFTMAX))

    alone = {}
    for i in range(len(encoded)):
        prompt, *responses = pieces(encoded, i)
        for part, response in enumerate(responses, 1):
            model(torch.tensor([prompt + response]))
            for l, layer in enumerate(expert_layers(model).values()):
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
    first, second, other = (add_experts(load_fixture("llama"), ["down_proj"], 3, 5, 2, seed=seed, router=router)
                            for seed in (7, 7, 8))
    assert router_state(first).keys() == router_state(second).keys() == router_state(other).keys()
    assert all(torch.equal(tensor, router_state(second)[name]) for name, tensor in router_state(first).items())
    assert not any(torch.equal(tensor, router_state(other)[name]) for name, tensor in router_state(first).items())
    drawn = [tuple(tensor.flatten().tolist()) for tensor in router_state(first).values()]
    assert len(set(drawn)) == len(drawn)
    assert all(torch.equal(a, b) for a, b in zip((layer.lora_A for layer in expert_layers(first).values()),
                                                 (layer.lora_A for layer in expert_layers(second).values())))


def test_new_routers_leave_the_experts_and_the_base_alone():
    model = routed_llama(SIGMOID)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = router_state(model)
    set_routers(model, SOFTMAX, seed=3)
    assert all(isinstance(layer.router, SoftmaxRouter) for layer in expert_layers(model).values())
    after = model.state_dict()
    assert after.keys() - before.keys() and not old.keys() & after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in old)


@pytest.mark.parametrize("router", (SIGMOID, SOFTMAX), ids=lambda router: router["type"])
def test_a_mixture_switched_off_is_the_base_model(router):
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model, base = routed_llama(router), logits_of(load_fixture("llama"), tokens)
    assert relative_error(logits_of(model, tokens), base) > 1e-3
    with disable_experts(model):
        assert torch.equal(logits_of(model, tokens), base)


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


# A router of one's own: it overrides `mix` alone, and losses still read probabilities


class HardRouter(SoftmaxRouter):
    """The slot with the largest probability alone; gradients pass straight through to the probabilities."""

    def mix(self, probabilities):
        one_hot = F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
        return one_hot + probabilities - probabilities.detach()


@pytest.fixture
def hard(monkeypatch):
    """{"type": "hard"}, registered as a user would."""
    monkeypatch.setitem(lora_moe.ROUTERS, "hard", HardRouter)
    return {"type": "hard"}


def test_a_hard_router_gives_the_output_of_its_one_hot_mixture():
    """Against a loop over tokens: the base, and the one expert with the largest weight, or none."""
    layer, x = routed(HardRouter, 3), torch.randn(40, D_IN, generator=torch.Generator().manual_seed(6))
    chosen = []
    for token, output in zip(x.double(), layer(x).double()):
        weights = torch.stack(plain_weights(layer, token))
        chosen.append(int(weights.argmax()))
        want = layer.base.weight.double() @ token + layer.base.bias.double()
        if chosen[-1] < 3:
            own = slice(chosen[-1] * RANK, (chosen[-1] + 1) * RANK)
            want = want + ALPHA / RANK * layer.lora_B.double()[:, own] @ (layer.lora_A.double()[own] @ token)
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
    assert set(chosen) == {0, 1, 2, 3}, "also the empty expert"


def test_gradients_of_a_hard_router_pass_straight_through_to_its_probabilities():
    """The output is linear in the weights: the router's gradient is that of the soft mixture."""
    layer = routed(HardRouter, 3).double()
    generator = torch.Generator().manual_seed(5)
    x, pull = (torch.randn(9, width, generator=generator).double() for width in (D_IN, D_OUT))
    (layer(x) * pull).sum().backward()
    straight = layer.router.linear.weight.grad
    layer.router.linear.weight.grad = None
    (plain_output(layer, x) * pull).sum().backward()
    assert relative_error(straight, layer.router.linear.weight.grad) < 1e-5 and straight.abs().max() > 1e-2


def test_the_soft_loss_of_a_hard_router_is_its_formula_on_the_probabilities():
    """Mean over tokens of Σ_k D_k (log D_k − log p_k), in float64; its gradient by a logit is (p_k − D_k) / tokens."""
    layer, x = routed(HardRouter, 4), torch.randn(20, D_IN, generator=torch.Generator().manual_seed(7))
    target, group = group_targets(2, 4, 0.5), torch.arange(20) % 2
    layer(x)
    loss = expert_group_soft_loss(layer.weights[None], group, target)
    loss.backward()
    total, gradient = 0.0, torch.zeros(5, D_IN, dtype=torch.float64)
    for token, i in zip(x.double(), group.tolist()):
        p, D = [float(weight.detach()) for weight in plain_weights(layer, token)], [*target[i].tolist(), 0.0]
        total += sum(d * (math.log(d) - math.log(p[k])) for k, d in enumerate(D) if d) / 20
        gradient += torch.tensor([p[k] - d for k, d in enumerate(D)], dtype=torch.float64)[:, None] * token / 20
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert relative_error(layer.router.linear.weight.grad.double(), gradient) < 1e-5
    assert (layer.weights > 0).all() and (layer.weights < 1).all(), "probabilities, not one-hot weights"


def test_a_step_down_the_soft_loss_raises_the_probabilities_of_the_own_group():
    layer, x = routed(HardRouter, 4), torch.randn(20, D_IN, generator=torch.Generator().manual_seed(7))
    target, group = group_targets(2, 4, 1.0), torch.zeros(20, dtype=torch.long)

    def own_share():
        layer(x)
        return float(layer.weights[:, :2].sum(-1).mean().detach())

    before = own_share()
    expert_group_soft_loss(layer.weights[None], group, target).backward()
    with torch.no_grad():
        layer.router.linear.weight -= layer.router.linear.weight.grad
    assert own_share() > before + 0.01


def test_a_registered_router_is_made_in_every_layer_by_its_name(hard):
    """Also its output is another than that of a soft router with the same parameters."""
    model, soft = routed_llama(hard, num_experts=3), routed_llama(SOFTMAX, num_experts=3)
    tokens = torch.arange(40).view(2, 20)
    assert {type(layer.router) for layer in expert_layers(model).values()} == {HardRouter} and is_routed(model)
    assert all(torch.equal(tensor, router_state(soft)[name]) for name, tensor in router_state(model).items())
    assert relative_error(logits_of(model, tokens), logits_of(soft, tokens)) > 1e-2
    weights = router_weights(model, torch.arange(40))
    assert weights.shape == (2, 40, 4) and torch.allclose(weights.sum(-1), torch.ones(2, 40))
    assert (weights > 0).all(), "probabilities, not one-hot weights"


def test_a_saved_hard_mixture_is_hard_when_it_loads_again(hard, tmp_path):
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model = routed_llama(hard, num_experts=3)
    save_experts(model, tmp_path / "saved")
    again = load_experts(load_fixture("llama"), tmp_path / "saved")
    assert {type(layer.router) for layer in expert_layers(again).values()} == {HardRouter}
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


# Mixtures merged, and on disk


@pytest.mark.parametrize("weights", ([0.5, 0.5], [1.0, 0.0], [0.2, 1.5]), ids=str)
def test_a_mixture_merged_at_constant_weights_runs_as_it_did_with_them(weights, tmp_path):
    tokens = load_file(FIXTURES / "llama" / "expected.safetensors")["tokens"]
    model = set_routers(routed_llama(SIGMOID), {"type": "constant", "weights": weights})
    running = logits_of(model, tokens)
    assert relative_error(running, logits_of(load_fixture("llama"), tokens)) > 1e-2
    save_model(merge_experts(model), tmp_path / "merged")
    assert not expert_layers(model)
    assert relative_error(logits_of(model, tokens), running) < 1e-5
    assert relative_error(logits_of(load_model(tmp_path / "merged"), tokens), running) < 1e-5


def test_routed_weights_cannot_be_merged():
    with pytest.raises(AssertionError, match="only constant weights"):
        merge_experts(routed_llama(SIGMOID))


ROUTERS = (SIGMOID, SOFTMAX, {"type": "softmax", "empty": False, "temperature": 2.0},
           {"type": "constant"}, {"type": "constant", "weights": [0.25, 1.5]})


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("name, targets", [("llama", ["down_proj"]), ("gpt2", "all-linear")])
def test_saved_mixtures_load_again_with_the_same_logits(router, name, targets, tmp_path):
    tokens = load_file(FIXTURES / name / "expected.safetensors")["tokens"]
    model = moved_experts(name, targets, num_experts=2, rslora=True, router=router, seed=5)
    logits = logits_of(model, tokens)
    assert relative_error(logits, logits_of(load_fixture(name), tokens)) > 1e-3
    save_experts(model, tmp_path / "saved")
    again = load_experts(load_fixture(name), tmp_path / "saved")
    assert torch.equal(logits_of(again, tokens), logits)
    save_experts(again, tmp_path / "twice")
    for file in ("experts.json", "experts.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    stored = load_file(tmp_path / "saved" / "experts.safetensors")
    assert all("lora_" in key or ".router." in key for key in stored), "the base's own weights are not in the file"


def damage_tensors(change):
    return lambda folder: edit_tensors(folder / "experts.safetensors", change)


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
    (cut, "experts.safetensors", "broken, cut short"),
    (lambda folder: (folder / "experts.safetensors").unlink(), "experts.safetensors", "no such file"),
    (lambda folder: (folder / "experts.json").unlink(), "experts.json", "no such file"),
    (lambda folder: (folder / "experts.json").write_text("{"), "experts.json", "not JSON"),
    *((damage_settings(lambda config, key=key: config.pop(key)), "experts.json", key)
      for key in ("layers", "num_experts", "rank", "alpha", "rslora", "router")),
    (damage_settings(lambda config: config["router"].pop("type")), "experts.json", "type"),
    (damage_settings(lambda config: config["router"].update(type="topk")), "experts.json", "topk"),
    (damage_settings(lambda config: config["router"].update(depth=9)), "experts.json", "depth"),
    (damage_settings(lambda config: config["layers"].append("model.layers.9.mlp.down_proj")), "experts.json",
     "model.layers.9.mlp.down_proj"),
    (damage_settings(lambda config: config.update(rank=0)), "experts.json", "rank"),
    (damage_settings(lambda config: config.update(rank=4)), "experts.safetensors", "lora_A"),
    (damage_settings(lambda config: config.update(num_experts=1)), "experts.safetensors", "lora_A"),
], ids=("no expert", "no router", "expert shape", "router shape", "extra expert", "base weight", "cut", "no tensors",
        "no settings", "half of settings", "no layers", "no num_experts", "no rank", "no alpha", "no rslora",
        "no router spec", "no type", "unknown type", "unknown setting", "unknown layer", "rank 0",
        "other rank", "other number"))
def test_a_damaged_mixture_is_answered_with_one_line_that_names_the_file(damage, file, says, tmp_path):
    folder = tmp_path / "saved"
    save_experts(routed_llama(SIGMOID), folder)
    damage(folder)
    message = line_of(load_experts, load_fixture("llama"), folder)
    assert str(folder / file) in message and says in message, message


def test_the_routers_table_numbers_the_experts():
    layer = {"harmful": {"median": [0.25, 1.0]}, "safe": {"median": [0.0, 0.5]}, "entropy": 0.125}
    assert router_table({"layers.0": layer}, {"method": "another"}).split("\n") == [
        "router weights     harmful        safe entropy", "of expert          0     1     0     1",
        "layers.0       0.250 1.000 0.000 0.500   0.125"]
