"""A mixture's experts against K models with one expert merged, its gate against formulas, and which expert answers."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import batch as batch_file
import methods
from batch import pack
from chat import Tokenizer
from checkpoint import load_experts, load_model, save_experts
from common import read_json
from conftest import (BASE, VOCABULARY, brute_force, edit_json, encoded_of, line_of, log_softmax, logits_of, pieces,
                      relative_error, tiny)
from lora_moe import (Gate, add_experts, choose_experts, expert_layers, expert_logps, merge_experts, mixture_logps,
                      perturb_experts, pooled_states, set_routers, use_expert)
from model import generate, stream

PAIRS = [(3, 5, 2), (1, 4, 6), (7, 1, 3), (2, 3, 1), (9, 8, 7)]


# K policies in one pass


KINDS = {  # the settings that make experts in a model: whole adapters, LoRA heads and full copies of the head
    "adapters": ("llama", dict(lora_targets="q_proj,down_proj")),
    "adapters on gpt2": ("gpt2", dict(lora_targets="down_proj")),
    "LoRA heads": ("llama", dict(share="trunk")), "heads": ("llama", dict(share="trunk", lora_rank=0)),
    "untied heads": ("qwen2", dict(share="trunk", lora_rank=0))}


def mixture(kind, experts=3, seed=0, groups=("a", "b"), **settings):
    """A tiny model under experts that differ, as a run builds it."""
    shape, others = KINDS[kind]
    config = methods.resolve({}, {"method": "mix-dpo", "experts": experts, "lora_rank": 2, "lora_alpha": 3.0,
                                "seed": seed, "expert_noise": 0.3, "device": "cpu", **others, **settings})
    return perturb_experts(methods.build_mixture(config, tiny(shape), groups), config.expert_noise, seed)


def encoded_pairs(items=PAIRS, groups=None):
    encoded = encoded_of(items)
    encoded.labels = {"group": np.array(groups or [0] * len(items))}
    return encoded


def merged_alone(kind, model, k, dtype=torch.float64):
    """A plain model with expert k merged, W + scale · B_k A_k, and the leaves {name of A or B: tensor} behind it."""
    plain, leaves = tiny(KINDS[kind][0]).to(dtype), {}
    for name, layer in expert_layers(model).items():
        A, B = (parameter.detach().to(dtype).requires_grad_() for parameter in (layer.lora_A, layer.lora_B))
        leaves.update({f"{name}.lora_A": A, f"{name}.lora_B": B})
        rank = layer.lora_A.shape[0] // layer.num_experts
        part = slice(k * rank, (k + 1) * rank)
        target = plain.get_submodule(name)
        weight = target.weight.detach().clone()
        del target._parameters["weight"]  # a head that is tied leaves the embedding as it is
        target.weight = weight + layer.alpha / rank * B[:, part] @ A[part]
    return plain, leaves


def check_experts(kind, model, pull):
    """expert_logps and their gradients against one merged model for each expert, in float64 and without packing."""
    encoded, indices = encoded_pairs(), [3, 0, 4, 1, 2]
    logps, log_gate = mixture_logps(model, pack(encoded, indices))
    assert logps.shape == (3, 5, 2) and log_gate.shape == (5, 3) and logps.dtype == torch.float32
    (logps * pull).sum().backward()
    gradients = {}
    for k in range(3):
        plain, leaves = merged_alone(kind, model, k)
        expected = brute_force(plain, encoded, indices)
        (expected * pull[k].double()).sum().backward()
        assert relative_error(logps[k].detach(), expected.detach()) < 1e-5
        for name, leaf in leaves.items():
            gradients[name] = gradients.get(name, 0) + leaf.grad
    assert float((logps[0] - logps[1]).detach().abs().max()) > 1e-2, "these experts differ"
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        if parameters[name].grad is None:
            assert name == "lm_head.lora_A" and not model.lm_head.lora_A.requires_grad
        else:
            assert relative_error(parameters[name].grad, expected) < 1e-4, name


PULL = torch.linspace(-1, 2, 30).view(3, 5, 2)  # a different pull on every response under every expert


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_every_experts_logps_and_gradients(kind):
    model, passes = mixture(kind), []
    model.model.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape[0]))
    check_experts(kind, model, PULL)
    rows_of_batch = pack(encoded_pairs(), list(range(5))).tokens.shape[0]
    assert passes == [rows_of_batch * (1 if "heads" in kind else 3)], "the trunk runs once, for heads on single rows"


@pytest.mark.parametrize("kind", ("adapters", "LoRA heads", "heads"))
def test_checkpointing_changes_neither_logps_nor_gradients(kind):
    model = mixture(kind).train()
    model.model.checkpointing = True
    check_experts(kind, model, PULL)


@pytest.mark.parametrize("kind", ("adapters", "LoRA heads", "heads"))
def test_many_chunks_of_the_vocabulary_change_neither_logps_nor_gradients(kind, monkeypatch):
    """Heads are recomputed in the backward pass, each chunk under the expert that it was computed for."""
    monkeypatch.setattr(batch_file, "CHUNK_BYTES", 3 * 4 * VOCABULARY)
    check_experts(kind, mixture(kind), PULL)


@pytest.mark.parametrize("kind", ("LoRA heads", "heads"))
def test_logps_of_heads_on_a_shared_trunk_leave_the_routers_as_they_were(kind):
    """Also in the backward pass, which computes the logits again."""
    model, batch = mixture(kind), pack(encoded_pairs(), list(range(5)))
    use_expert(model, 1)
    router, before = model.lm_head.router, model.lm_head.router.weights.clone()
    expert_logps(model, batch).sum().backward()
    assert model.lm_head.router is router and torch.equal(router.weights, before)
    tokens = torch.arange(20).view(2, 10)
    plain, _ = merged_alone(kind, model, 1, torch.float32)
    assert relative_error(logits_of(model, tokens), logits_of(plain, tokens)) < 1e-5, "expert 1 still answers"


def test_full_copies_of_the_head_start_as_the_base_and_learn_any_difference():
    model, plain = mixture("heads", expert_noise=0.0), tiny("llama")
    batch = pack(encoded_pairs(), list(range(5)))
    logps = expert_logps(model, batch)
    with torch.no_grad():
        expected = batch_file.policy_logps(plain, batch)
    for k in range(3):
        assert torch.allclose(logps[k].detach(), expected, rtol=1e-5, atol=1e-5)
    trainable = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"lm_head.lora_B": (61, 3 * 16), "gate.bias": (3,)}, "K matrices of the head's own shape"


# The gate


@pytest.fixture
def pooled():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def test_a_fixed_gate_has_its_weights_and_nothing_to_learn():
    gate = Gate("fixed", 3, weights=(0.2, 0.7, 0.1))
    assert gate(None, torch.tensor([0, 1])).exp().tolist() == [pytest.approx([0.2, 0.7, 0.1])]
    assert not [name for name, parameter in gate.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", ("constant", "prompt", "user"))
def test_a_learned_gate_is_uniform_at_first_and_then_its_formula(kind, pooled):
    gate, group = Gate(kind, 3, width=4, groups=("u", "v", "w")), torch.tensor([0, 2, -1, 1, 2])
    assert torch.allclose(gate(pooled, group), torch.full((1, 3), -math.log(3)))
    generator = torch.Generator().manual_seed(0)
    for parameter in gate.parameters():
        parameter.data.normal_(0, 2, generator=generator)
    log_w = gate(pooled, group).double()
    bias = gate.bias.tolist()
    for n in range(5):
        if kind == "constant":
            logits = bias
        elif kind == "prompt":
            logits = [b + sum(pooled[n, d].item() * gate.weight[d, k].item() for d in range(4))
                      for k, b in enumerate(bias)]
        else:
            user = gate.weight[group[n]].tolist() if group[n] >= 0 else \
                [sum(gate.weight[u, k].item() for u in range(3)) / 3 for k in range(3)]
            logits = [b + w for b, w in zip(bias, user)]
        assert log_w[n if kind != "constant" else 0].tolist() == pytest.approx(log_softmax(logits), rel=1e-5, abs=1e-6)
    assert log_w.shape == (1 if kind == "constant" else 5, 3)
    assert log_w.exp().sum(-1).tolist() == pytest.approx([1.0] * len(log_w), rel=1e-6)


@pytest.mark.parametrize("kind", ("adapters", "adapters on gpt2", "LoRA heads"))
def test_pooled_states_are_the_bases_mean_over_the_prompt_alone(kind):
    model, plain, encoded = mixture(kind), tiny(KINDS[kind][0]), encoded_pairs()
    states = pooled_states(model, encoded, batch_size=2)
    assert states.shape == (5, 16) and states.dtype == np.float32
    for n in range(5):
        prompt = pieces(encoded, n)[0]
        with torch.no_grad():
            expected = plain(torch.tensor([prompt]))[0].mean(0)
        assert states[n].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert all(layer.enabled for layer in expert_layers(model).values()), "the experts are on again"


def gated(kind, gate):
    """A mixture whose gate says something about every prompt."""
    model = mixture(kind, gate=gate)
    for parameter in model.gate.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 1, generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.parametrize("kind, gate", (("adapters", "0.5,0.2,0.3"), ("adapters", "constant"), ("LoRA heads", "prompt"),
                                        ("heads", "user"), ("adapters on gpt2", "user")))
def test_a_saved_mixture_loads_again_with_its_gate(kind, gate, tmp_path):
    model, encoded = gated(kind, gate), encoded_pairs(groups=[0, 1, -1, 1, 0])
    encoded.labels["pooled"] = pooled_states(model, encoded)
    batch = pack(encoded, [4, 2, 0, 1, 3])
    with torch.no_grad():
        before = mixture_logps(model, batch)
        save_experts(model, tmp_path / "experts")
        loaded = load_experts(tiny(KINDS[kind][0]), tmp_path / "experts")
        after = mixture_logps(loaded, batch)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert loaded.gate.spec == model.gate.spec
    assert before[1].unique(dim=0).shape[0] == {"prompt": 5, "user": 3}.get(gate, 1)


def test_a_damaged_gate_is_named_in_one_line(tmp_path):
    save_experts(gated("adapters", "user"), tmp_path / "experts")
    path, settings = tmp_path / "experts/experts.safetensors", tmp_path / "experts/experts.json"
    whole, spec = load_file(path), read_json(settings)["gate"]

    def answer(tensors=whole, **changes):
        save_file(tensors, path)
        edit_json(settings, gate={**spec, **changes})
        message = line_of(load_experts, tiny("llama"), tmp_path / "experts")
        assert str(tmp_path) in message
        return message

    without = {name: tensor for name, tensor in whole.items() if name != "gate.weight"}
    assert "tensor gate.weight is missing" in answer(without)
    assert "gate.bias" in answer({**whole, "gate.bias": torch.zeros(4)})
    assert "gate.weight" in answer(groups=["a", "b", "c"])
    assert "gate.weight" in answer(kind="constant")
    assert "temperature" in answer(temperature=2)


# Which expert answers


def test_experts_are_drawn_by_the_gate_once_for_each_prompt():
    model = SimpleNamespace(gate=Gate("fixed", 3, weights=(0.2, 0.7, 0.1)))
    prompts = ["x"] * 4000
    drawn = choose_experts(model, None, prompts, "mixture", seed=3)
    for k, weight in enumerate((0.2, 0.7, 0.1)):  # five standard errors
        assert abs(float((drawn == k).float().mean()) - weight) < 5 * math.sqrt(weight * (1 - weight) / 4000)
    assert torch.equal(drawn, choose_experts(model, None, prompts, "mixture", seed=3))
    assert not torch.equal(drawn, choose_experts(model, None, prompts, "mixture", seed=4))
    assert choose_experts(model, None, prompts[:5], "sparse").tolist() == [1] * 5
    for k in (0, 2):
        assert choose_experts(model, None, prompts[:5], str(k)).tolist() == [k] * 5


def test_a_user_gate_is_asked_about_the_users_with_a_prefix_in_turn():
    gate = Gate("user", 2, groups=("warm 0", "curt 0", "warm 1", "curt 1"))
    gate.weight.data = torch.tensor([[9.0, 0.0], [0.0, 9.0], [8.0, 0.0], [0.0, 30.0]])
    model = SimpleNamespace(gate=gate)
    assert choose_experts(model, None, ["x"] * 5, "sparse", "warm").tolist() == [0] * 5
    assert choose_experts(model, None, ["x"] * 5, "sparse", "curt").tolist() == [1] * 5
    gate.weight.data[2] = torch.tensor([0.0, 8.0])  # the second one who is warm has another expert
    assert choose_experts(model, None, ["x"] * 5, "sparse", "warm").tolist() == [0, 1, 0, 1, 0]
    for prefix in ("", "nobody"):  # an unknown user has the mean of all vectors
        assert choose_experts(model, None, ["x"] * 3, "sparse", prefix).tolist() == [1] * 3


def test_a_gate_on_prompts_looks_at_the_bases_states_of_each_rendered_prompt(place):
    tokenizer, base = Tokenizer(BASE), load_model(BASE)
    texts = [tokenizer.render(text) for text in ("How do I bake a pie?", "Tell me how to sew a flag.", "Why?")]
    with torch.no_grad():
        states = torch.stack([base(torch.tensor([ids]))[0].mean(0) for ids in tokenizer.encode(texts)])
    model = add_experts(load_model(BASE), ["down_proj"], 2, 4, num_experts=4)
    for layer in expert_layers(model).values():
        layer.lora_B.data.normal_(0, 1)
    model.gate = Gate("prompt", 4, width=32)
    model.gate.weight.data = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    model.gate.bias.data = -states.mean(0) @ model.gate.weight.data  # what all states have in common decides nothing
    expected = (states - states.mean(0)) @ model.gate.weight.data
    assert choose_experts(model, tokenizer, texts, "sparse").tolist() == expected.argmax(-1).tolist()
    assert len(set(expected.argmax(-1).tolist())) > 1


@pytest.mark.parametrize("kind", ("adapters", "adapters on gpt2", "LoRA heads", "heads"))
def test_rows_answered_by_different_experts_equal_each_alone_with_its_expert_merged(kind):
    model = mixture(kind, expert_noise=1.5).double()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (3, 7, 1, 5, 5)]
    prompts[4] = prompts[3]
    chosen = torch.tensor([2, 0, 1, 1, 2])
    answers = dict(stream(model, prompts, 12, 3, eos_ids=(7,), prepare=lambda them: use_expert(model, chosen[them])))
    for k in range(3):
        plain, _ = merged_alone(kind, model, k)
        for i in (chosen == k).nonzero().flatten().tolist():
            tokens = list(prompts[i])
            with torch.no_grad():
                while len(tokens) - len(prompts[i]) < 12 and (tokens == prompts[i] or tokens[-1] != 7):
                    tokens.append(int(plain.logits(plain(torch.tensor([tokens])))[0, -1].argmax()))
            assert answers[i] == tokens[len(prompts[i]):]
    assert answers[3] != answers[4], "the same prompt under two experts"
    for k in range(3):  # and one expert for all rows
        use_expert(model, k)
        alone = generate(model, prompts, 12, eos_ids=(7,))
        assert [alone[i] for i in range(5) if chosen[i] == k] == [answers[i] for i in range(5) if chosen[i] == k]


@pytest.mark.parametrize("kind", ("adapters", "LoRA heads", "untied heads"))
def test_a_mixture_at_fixed_weights_merges_into_a_plain_model(kind):
    """Also where the head is the embedding: the embedding stays what it was."""
    model, tokens = mixture(kind), torch.arange(20).view(2, 10)
    set_routers(model, {"type": "constant", "weights": [0.5, 0.2, 0.3]})
    expected = logits_of(model, tokens)
    plain = merge_experts(model)
    assert not expert_layers(plain)
    assert relative_error(logits_of(plain, tokens), expected) < 1e-5
