"""Mix- and MoE-DPO: the mixture's loss against its likelihood, experts against merged models, the gate, whole runs."""
import itertools
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as eval_file
import losses
import train
from data import Encoded, Tokenizer, apply_view, pack, toy_preferences
from eval import choose_experts, pooled_states
from lora_moe import (Gate, add_experts, expert_layers, load_experts, merge_experts, save_adapter, save_experts,
                      set_routers, use_expert)
from losses import dpo_loss, moe_dpo_loss
from model import Transformer, UserError, generate, read_json
from test_losses import brute_force, encoded_of, sequences, tiny
from test_pmol import files_of, in_a_hurry  # noqa: F401
from test_train import bases, check_mistake, interrupt_at, line_of, place, rows, run, timeless  # noqa: F401

PAIRS = [(3, 5, 2), (1, 4, 6), (7, 1, 3), (2, 3, 1), (9, 8, 7)]


# The loss: draws, and the likelihood one pair and one expert at a time in float64


def draw(experts, pairs, seed=0, scale=8.0):
    """(policy (K, N, 2), reference (K, N, 2), gate logits (N, K)) in float64; policy and logits ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-scale * torch.rand(experts, pairs, 2, generator=generator, dtype=torch.float64)
                         for _ in range(2))
    logits = torch.randn(pairs, experts, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference, logits.requires_grad_()


def copies(policy, reference, logits):
    """The same numbers as new leaves, for a second backward pass."""
    return policy.detach().clone().requires_grad_(), reference, logits.detach().clone().requires_grad_()


def sigmoids(policy, reference, beta):
    """{(expert, pair): σ(Δr)}."""
    found = {}
    for k, n in itertools.product(range(policy.shape[0]), range(policy.shape[1])):
        chosen, rejected = (beta * (policy[k, n, j] - reference[k, n, j]) for j in (0, 1))
        found[k, n] = 1 / (1 + torch.exp(-(chosen - rejected)))
    return found


def weights_of(logits, n):
    exponentials = [torch.exp(logit) for logit in logits[n]]
    return [exponential / sum(exponentials) for exponential in exponentials]


def minus_log_likelihood(policy, reference, logits, beta, annotator=None):
    """−(1/N) Σ_u log Σ_k w_k Π_i σ(Δr_k,i), every pair being an annotator of its own where none are given."""
    K, N = policy.shape[:2]
    fit, total = sigmoids(policy, reference, beta), 0.0
    annotator = list(range(N)) if annotator is None else annotator
    for u in set(annotator):
        own = [n for n in range(N) if annotator[n] == u]
        w = weights_of(logits, own[0])
        total = total - torch.log(sum(w[k] * math.prod(fit[k, n] for n in own) for k in range(K)))
    return total / N


def same_value_and_gradients(loss, inputs, expected, expected_inputs, tolerance=1e-9):
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for got, want in ((inputs[0].grad, expected_inputs[0].grad), (inputs[2].grad, expected_inputs[2].grad)):
        assert want.abs().max() > 1e-6
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("experts, pairs, beta", ((1, 4, 0.3), (2, 1, 0.1), (2, 7, 1.0), (5, 3, 0.3)))
def test_the_loss_and_its_gradients_are_those_of_the_mixtures_likelihood(experts, pairs, beta):
    inputs = draw(experts, pairs)
    other = copies(*inputs)
    loss, _ = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), beta)
    expected = minus_log_likelihood(*other, beta)
    if experts == 1:  # a softmax over one logit has no gradient
        inputs[2].grad, other[2].grad = torch.ones_like(inputs[2]), torch.ones_like(inputs[2])
    same_value_and_gradients(loss, inputs, expected, other)


def test_in_float32_the_loss_is_the_likelihood_as_well():
    policy, reference, logits = draw(3, 6)
    loss, _ = moe_dpo_loss(policy.float(), reference.float(), logits.float().log_softmax(-1), 0.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(minus_log_likelihood(policy, reference, logits, 0.3).item(), rel=1e-5)


def test_the_bound_lies_below_the_likelihood_for_any_other_responsibilities():
    policy, reference, logits = (value.detach() for value in draw(3, 4))
    loss = float(moe_dpo_loss(policy, reference, logits.log_softmax(-1), 0.5)[0])
    fit, generator = sigmoids(policy, reference, 0.5), torch.Generator().manual_seed(1)
    bounds = []
    for trial in range(200):
        q = torch.rand(4, 3, generator=generator, dtype=torch.float64) ** (1 + trial % 5)
        q = q / q.sum(-1, keepdim=True)
        bounds.append(sum(q[n, k] * (torch.log(fit[k, n]) + torch.log(weights_of(logits, n)[k]) - torch.log(q[n, k]))
                          for n in range(4) for k in range(3)) / 4)
    assert max(bounds) < -loss
    posterior = [[weights_of(logits, n)[k] * fit[k, n] for k in range(3)] for n in range(4)]
    tight = sum(p / sum(row) * torch.log(sum(row)) for row in posterior for p in row) / 4
    assert float(tight) == pytest.approx(-loss, rel=1e-9)


def test_the_posters_weights_are_their_formula_and_never_below_the_likelihood():
    for seed, experts in itertools.product(range(5), (1, 2, 4)):
        inputs = draw(experts, 6, seed)
        other = copies(*inputs)
        loss, _ = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), 0.3, "weights")
        fit = sigmoids(other[0], other[1], 0.3)
        expected = -sum(weights_of(other[2], n)[k] * torch.log(fit[k, n]) for k in range(experts) for n in range(6)) / 6
        likelihood = float(minus_log_likelihood(*other, 0.3).detach())
        if experts == 1:
            assert float(loss.detach()) == pytest.approx(likelihood, rel=1e-12)
        else:
            same_value_and_gradients(loss, inputs, expected, other)
            assert float(loss.detach()) > likelihood + 1e-4


@pytest.mark.parametrize("objective", ("elbo", "weights"))
def test_one_expert_is_exactly_dpo(objective):
    policy, reference, _ = (value.detach().float() for value in draw(1, 9))
    one, plain = policy.clone().requires_grad_(), policy[0].clone().requires_grad_()
    loss, figures = moe_dpo_loss(one, reference, torch.zeros(9, 1), 0.1, objective)
    expected, wanted = dpo_loss(*plain.T, *reference[0].T, 0.1)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(one.grad[0], plain.grad)
    for name in ("rewards/margins", "rewards/accuracies"):
        assert figures[name] == wanted[name]


@pytest.mark.parametrize("objective", ("elbo", "weights"))
@pytest.mark.parametrize("annotator", (None, [0, 0, 1, 1]), ids=("comparison", "annotator"))
@pytest.mark.parametrize("temperature", (0.3, 1.0, 4.0))
def test_everything_is_finite_at_differences_of_ten_thousand(objective, annotator, temperature):
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)))                    # (4, K)
    policy = torch.zeros(2, 4, 2)
    policy[..., 0] = 1e4 * signs.T
    logits = torch.tensor([[0.0, 0.0], [3.0, -3.0], [-200.0, 0.0], [0.0, 200.0]])
    inputs = policy.requires_grad_(), torch.zeros(2, 4, 2), logits.requires_grad_()
    loss, figures = moe_dpo_loss(*inputs[:2], logits.log_softmax(-1), 1.0, objective,
                                 annotator and torch.tensor(annotator), temperature)
    loss.backward()
    assert torch.isfinite(loss) and all(math.isfinite(value) for value in figures.values())
    assert torch.isfinite(inputs[0].grad).all() and torch.isfinite(logits.grad).all()
    if objective == "elbo" and annotator is None and temperature == 1:
        log_w = [[math.log(0.5)] * 2, [-math.log1p(math.exp(-6)), -6 - math.log1p(math.exp(-6))], [-200, 0], [-200, 0]]
        best = [max(w + (-1e4 if sign < 0 else 0) for w, sign in zip(*both)) for both in zip(log_w, signs.tolist())]
        best[0] = -1e4                                        # both experts are wrong: log Σ w e^-1e4
        best[2] = -200.0                                      # the sure gate's expert is wrong, the other one right
        best[3] = 0.0
        assert float(loss.detach()) == pytest.approx(-sum(best) / 4, rel=1e-5)


def test_an_annotators_comparisons_share_one_latent_expert():
    for seed, annotator in enumerate(([3, 0, 3, 7, 0, 3], [5] * 6, [2, 1, 0, 5, 4, 3])):
        policy, reference, logits = draw(2, 6, seed)
        with torch.no_grad():
            for n, u in enumerate(annotator):  # what the gate knows of an annotator is the same in all comparisons
                logits[n] = logits[annotator.index(u)]
        inputs, other = copies(policy, reference, logits), copies(policy, reference, logits)
        loss, _ = moe_dpo_loss(inputs[0], reference, inputs[2].log_softmax(-1), 0.4, annotator=torch.tensor(annotator))
        tied = torch.stack([other[2][annotator.index(u)] for u in annotator])
        expected = minus_log_likelihood(other[0], reference, tied, 0.4, annotator)
        loss.backward()
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        assert torch.allclose(inputs[0].grad, other[0].grad, rtol=1e-9, atol=1e-12)
        for u in set(annotator):
            own = [n for n in range(6) if annotator[n] == u]
            assert torch.allclose(inputs[2].grad[own].sum(0), other[2].grad[own].sum(0), rtol=1e-9, atol=1e-12)


def test_a_tempered_e_step_gives_the_bound_of_its_own_responsibilities():
    for temperature in (0.5, 2.0, 5.0):
        inputs = draw(3, 5)
        other = copies(*inputs)
        loss, figures = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), 0.5, q_temperature=temperature)
        fit, expected, shares = sigmoids(other[0], other[1], 0.5), 0.0, [0.0] * 3
        for n in range(5):
            joint = [weights_of(other[2], n)[k] * fit[k, n] for k in range(3)]
            q = [float(j.detach()) ** (1 / temperature) for j in joint]
            q = [some / sum(q) for some in q]
            expected = expected + sum(q[k] * (math.log(q[k]) - torch.log(joint[k])) for k in range(3)) / 5
            shares = [share + some / 5 for share, some in zip(shares, q)]
        same_value_and_gradients(loss, inputs, expected, other)
        assert float(loss.detach()) > float(minus_log_likelihood(*copies(*inputs), 0.5).detach()) + 1e-4
        assert [float(figures[f"responsibility/{k}"]) for k in range(3)] == pytest.approx(shares, rel=1e-9)


@pytest.mark.parametrize("objective", ("elbo", "weights"))
def test_figures_are_means_over_the_pairs(objective):
    inputs = draw(2, 8)
    _, figures = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), 0.5, objective)
    policy, reference, logits = (value.detach() for value in inputs)
    fit, expected = sigmoids(policy, reference, 0.5), Counter()
    for n in range(8):
        w = weights_of(logits, n)
        p = sum(w[k] * fit[k, n] for k in (0, 1))
        margins = [0.5 * float((policy - reference)[k, n, 0] - (policy - reference)[k, n, 1]) for k in (0, 1)]
        expected.update({"log_likelihood": math.log(p) / 8, "rewards/accuracies": float(p > 0.5) / 8,
                         "rewards/margins": float(sum(w[k] * margins[k] for k in (0, 1))) / 8,
                         **{f"gate/{k}": float(w[k]) / 8 for k in (0, 1)},
                         **{f"responsibility/{k}": float(w[k] * fit[k, n] / p) / 8 for k in (0, 1)}})
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(dict(expected), rel=1e-6)
    assert 0 < expected["rewards/accuracies"] < 1 and not any(value.requires_grad for value in figures.values())


def loss_at(c, comparisons, annotators):
    """Two annotators label the same comparisons in opposite ways; expert 0 puts a margin of c where the first one's
    label is, expert 1 where the second one's is."""
    c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([1.0] * comparisons + [-1.0] * comparisons, dtype=torch.float64)
    policy = torch.stack([torch.stack([sign * c * signs, 0 * signs], -1) for sign in (1, -1)])  # (K, N, 2)
    gate = torch.full((2 * comparisons, 2), math.log(0.5), dtype=torch.float64)
    who = torch.tensor([0] * comparisons + [1] * comparisons) if annotators else None
    loss, _ = moe_dpo_loss(policy, torch.zeros_like(policy), gate, 1.0, annotator=who)
    loss.backward()
    return float(loss.detach()), float(c.grad)


def test_anonymous_comparisons_of_opposite_tastes_say_nothing_and_repeated_ones_by_an_annotator_do():
    """½ σ(c) + ½ σ(−c) = ½ for every c; ½ σ(c)^n + ½ σ(−c)^n rises with c as soon as n > 1."""
    scales = (0.1, 0.5, 1.0, 3.0, 20.0)
    for n in (1, 4):
        for c in scales:
            assert loss_at(c, n, annotators=False) == pytest.approx((math.log(2), 0.0), abs=1e-12)
            assert n > 1 or loss_at(c, n, annotators=True) == pytest.approx((math.log(2), 0.0), abs=1e-12)
    for n in (2, 5):
        found = [loss_at(c, n, annotators=True) for c in scales]
        for c, (loss, slope) in zip(scales, found):
            right = 1 / (1 + math.exp(-c))
            assert loss == pytest.approx(-math.log(0.5 * right ** n + 0.5 * (1 - right) ** n) / n, rel=1e-9)
            assert slope < 0
        assert all(after < before for (before, _), (after, _) in zip(found, found[1:]))


# Experts: K policies in one pass against K models with one expert merged


KINDS = {  # the settings that make experts in a model: whole adapters, LoRA heads and full copies of the head
    "adapters": ("llama", dict(lora_targets="q_proj,down_proj")),
    "adapters on gpt2": ("gpt2", dict(lora_targets="down_proj")),
    "LoRA heads": ("llama", dict(share="trunk")), "heads": ("llama", dict(share="trunk", lora_rank=0)),
    "untied heads": ("qwen2", dict(share="trunk", lora_rank=0))}


def mixture(kind, experts=3, seed=0, groups=("a", "b"), **settings):
    """A tiny model under experts that differ, as a run builds it."""
    shape, others = KINDS[kind]
    config = train.Config(**{"experts": experts, "lora_rank": 2, "lora_alpha": 3.0, "gate": "constant", "seed": seed,
                             "expert_noise": 0.3, "device": "cpu", **others, **settings})
    return train.whole_experts(config, tiny(shape), groups)


def encoded_pairs(items=PAIRS, groups=None):
    encoded = encoded_of(items)
    encoded.labels = {"group": np.array(groups or [0] * len(items))}
    return encoded


def merged_alone(kind, model, k, dtype=torch.float64):
    """A plain model with expert k merged, W + scale · B_k A_k, and the leaves {name of A or B: tensor} behind it."""
    plain, leaves = tiny(KINDS[kind][0]).to(dtype), {}
    for name, layer in expert_layers(model):
        A, B = (parameter.detach().to(dtype).requires_grad_() for parameter in (layer.lora_A, layer.lora_B))
        leaves.update({f"{name}.lora_A": A, f"{name}.lora_B": B})
        rank = layer.lora_A.shape[0] // layer.num_experts
        own = slice(k * rank, (k + 1) * rank)
        target = plain.get_submodule(name)
        weight = target.weight.detach().clone()
        del target._parameters["weight"]  # a head that is tied leaves the embedding as it is
        target.weight = weight + layer.alpha / rank * B[:, own] @ A[own]
    return plain, leaves


def check_experts(kind, model, pull):
    """expert_logps and its gradients against one merged model for each expert, in float64 and without packing."""
    encoded, indices = encoded_pairs(), [3, 0, 4, 1, 2]
    logps, log_gate = train.expert_logps(model, pack(encoded, indices))
    assert logps.shape == (3, 5, 2) and log_gate.shape == (5, 3) and logps.dtype == torch.float32
    (logps * pull).sum().backward()
    gradients = {}
    for k in range(3):
        plain, leaves = merged_alone(kind, model, k)
        expected = brute_force(plain, encoded, indices)
        (expected * pull[k].double()).sum().backward()
        assert float((logps[k].detach() - expected.detach()).norm() / expected.detach().norm()) < 1e-5
        for name, leaf in leaves.items():
            gradients[name] = gradients.get(name, 0) + leaf.grad
    assert float((logps[0] - logps[1]).detach().abs().max()) > 1e-2, "these experts differ"
    found = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    for name, expected in gradients.items():
        if found[name] is None:
            assert name == "lm_head.lora_A" and not model.lm_head.lora_A.requires_grad
        else:
            assert float((found[name] - expected).norm() / expected.norm()) < 1e-4, name
    return logps.detach(), found


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
    monkeypatch.setattr(losses, "CHUNK_BYTES", 3 * 4 * 61)
    check_experts(kind, mixture(kind), PULL)


def test_full_copies_of_the_head_start_as_the_base_and_learn_any_difference():
    model, plain = mixture("heads", expert_noise=0.0), tiny("llama")
    batch = pack(encoded_pairs(), list(range(5)))
    logps, _ = train.expert_logps(model, batch)
    with torch.no_grad():
        expected = losses.sequence_logps(plain, plain(batch.tokens, batch.positions, batch.mask()), batch)
    for k in range(3):
        assert torch.allclose(logps[k].detach(), expected, rtol=1e-5, atol=1e-5)
    trainable = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"lm_head.lora_B": (61, 3 * 16), "gate.bias": (3,)}, "K matrices of the head's own shape"


# The gate


@pytest.fixture
def pooled():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def log_softmax(values):
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


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
    found = gate(pooled, group).double()
    bias = gate.bias.tolist()
    for n in range(5):
        if kind == "constant":
            logits = bias
        elif kind == "prompt":
            logits = [b + sum(pooled[n, d].item() * gate.weight[d, k].item() for d in range(4))
                      for k, b in enumerate(bias)]
        else:
            own = gate.weight[group[n]].tolist() if group[n] >= 0 else \
                [sum(gate.weight[u, k].item() for u in range(3)) / 3 for k in range(3)]
            logits = [b + w for b, w in zip(bias, own)]
        assert found[n if kind != "constant" else 0].tolist() == pytest.approx(log_softmax(logits), rel=1e-5, abs=1e-6)
    assert found.shape == (1 if kind == "constant" else 5, 3)
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * len(found), rel=1e-6)


@pytest.mark.parametrize("kind", ("adapters", "adapters on gpt2", "LoRA heads"))
def test_pooled_states_are_the_bases_mean_over_the_prompt_alone(kind):
    model, plain, encoded = mixture(kind), tiny(KINDS[kind][0]), encoded_pairs()
    found = pooled_states(model, encoded, batch_size=2)
    assert found.shape == (5, 16) and found.dtype == np.float32
    for n in range(5):
        prompt = sequences(encoded, n)[0][0]
        with torch.no_grad():
            expected = plain(torch.tensor([prompt]))[0].mean(0)
        assert found[n].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert all(layer.enabled for _, layer in expert_layers(model)), "the experts are on again"


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
        before = train.expert_logps(model, batch)
        save_experts(model, tmp_path / "experts")
        loaded = load_experts(tiny(KINDS[kind][0]), tmp_path / "experts")
        after = train.expert_logps(loaded, batch)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert loaded.gate.spec == model.gate.spec
    assert before[1].unique(dim=0).shape[0] == {"prompt": 5, "user": 3}.get(gate, 1)


def test_a_damaged_gate_is_named_in_one_line(tmp_path):
    save_experts(gated("adapters", "user"), tmp_path / "experts")
    path, settings = tmp_path / "experts/experts.safetensors", tmp_path / "experts/experts.json"
    whole, config = load_file(path), read_json(settings)

    def said(tensors=whole, **gate):
        save_file(tensors, path)
        settings.write_text(json.dumps({**config, "gate": {**config["gate"], **gate}}))
        with pytest.raises(UserError) as caught:
            load_experts(tiny("llama"), tmp_path / "experts")
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        return str(caught.value)

    without = {name: tensor for name, tensor in whole.items() if name != "gate.weight"}
    assert "gate.weight is missing or not of shape (2, 3)" in said(without)
    assert "gate.bias" in said({**whole, "gate.bias": torch.zeros(4)})
    assert "gate.weight" in said(groups=["a", "b", "c"])
    assert "gate.weight" in said(kind="constant")
    assert "temperature" in said(temperature=2)


# Which expert answers


def test_experts_are_drawn_by_the_gate_once_for_each_prompt():
    model = SimpleNamespace(gate=Gate("fixed", 3, weights=(0.2, 0.7, 0.1)))
    prompts = ["x"] * 4000
    found = choose_experts(model, None, prompts, "mixture", seed=3)
    for k, weight in enumerate((0.2, 0.7, 0.1)):  # five standard errors
        assert abs(float((found == k).float().mean()) - weight) < 5 * math.sqrt(weight * (1 - weight) / 4000)
    assert torch.equal(found, choose_experts(model, None, prompts, "mixture", seed=3))
    assert not torch.equal(found, choose_experts(model, None, prompts, "mixture", seed=4))
    assert choose_experts(model, None, prompts[:5], "sparse").tolist() == [1] * 5
    for k in (0, 2):
        assert choose_experts(model, None, prompts[:5], str(k)).tolist() == [k] * 5


def test_a_gate_on_users_is_asked_about_those_of_the_population():
    gate = Gate("user", 2, groups=("warm 0", "curt 0", "warm 1", "curt 1"))
    gate.weight.data = torch.tensor([[9.0, 0.0], [0.0, 9.0], [8.0, 0.0], [0.0, 30.0]])
    model = SimpleNamespace(gate=gate)
    assert choose_experts(model, None, ["x"] * 5, "sparse", "warm").tolist() == [0] * 5
    assert choose_experts(model, None, ["x"] * 5, "sparse", "curt").tolist() == [1] * 5
    for population in ("", "nobody"):  # somebody unknown has the mean of all vectors
        assert choose_experts(model, None, ["x"] * 3, "sparse", population).tolist() == [1] * 3


def test_a_gate_on_prompts_looks_at_the_bases_states_of_each_rendered_prompt(place):
    tokenizer, base = Tokenizer("out/toy-base-seed0"), Transformer.from_pretrained("out/toy-base-seed0")
    texts = [tokenizer.render(text) for text in ("How do I bake a pie?", "Tell me how to sew a flag.", "Why?")]
    with torch.no_grad():
        states = torch.stack([base(torch.tensor([ids]))[0].mean(0) for ids in tokenizer.encode(texts)])
    model = add_experts(Transformer.from_pretrained("out/toy-base-seed0"), ["down_proj"], 2, 4, num_experts=4)
    for _, layer in expert_layers(model):
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
    prompts = [rng.integers(0, 61, length).tolist() for length in (3, 7, 1, 5, 5)]
    prompts[4] = prompts[3]
    chosen = torch.tensor([2, 0, 1, 1, 2])
    use_expert(model, chosen)
    found = generate(model, prompts, 12, eos_ids=(7,))
    for k in range(3):
        plain, _ = merged_alone(kind, model, k)
        for i in (chosen == k).nonzero().flatten().tolist():
            tokens = list(prompts[i])
            with torch.no_grad():
                while len(tokens) - len(prompts[i]) < 12 and (tokens == prompts[i] or tokens[-1] != 7):
                    tokens.append(int(plain.logits(plain(torch.tensor([tokens])))[0, -1].argmax()))
            assert found[i] == tokens[len(prompts[i]):]
    assert found[3] != found[4], "the same prompt under two experts"
    for k in range(3):  # and one expert for all rows
        use_expert(model, k)
        alone = generate(model, prompts, 12, eos_ids=(7,))
        assert [alone[i] for i in range(5) if chosen[i] == k] == [found[i] for i in range(5) if chosen[i] == k]


@pytest.mark.parametrize("kind", ("adapters", "LoRA heads", "untied heads"))
def test_a_mixture_at_fixed_weights_merges_into_a_plain_model(kind):
    """Also where the head is the embedding: the embedding stays what it was."""
    model, tokens = mixture(kind), torch.arange(20).view(2, 10)
    set_routers(model, {"type": "constant", "weights": [0.5, 0.2, 0.3]})
    with torch.no_grad():
        expected = model.logits(model(tokens))
        plain = merge_experts(model)
        found = plain.logits(plain(tokens))
    assert not list(expert_layers(plain))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


# The order of the pairs


def test_an_annotators_pairs_stand_together_and_every_epoch_has_an_order_of_its_own():
    group = np.random.default_rng(0).integers(0, 9, 70)
    orders = train.epoch_order(70, 3, seed=5, group=group, together=True).reshape(3, 70)
    for order in orders:
        assert sorted(order) == list(range(70))
        turns = [number for number, _ in itertools.groupby(group[order])]
        assert len(turns) == len(set(turns)) == 9
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(dict.fromkeys(group[order])) for order in orders}) == 3, "the annotators take other turns"
    within = [tuple(order[group[order] == 4]) for order in orders]
    assert len(set(within)) > 1, "and so do an annotator's pairs"


@pytest.mark.parametrize("shares", ([1, 1, 1], [3, 1, 2], [0.5, 8, 1]))
def test_every_stretch_of_the_order_has_the_groups_in_their_shares(shares):
    group = np.random.default_rng(1).integers(0, 3, 300)
    orders = np.split(train.epoch_order(300, 2, seed=0, group=group, shares=shares), 2)
    for order in orders:
        assert set(order) <= set(range(300)) and abs(len(order) - 300) <= 1
        for start, length in itertools.product(range(0, 280), (8, 20)):
            counts = np.bincount(group[order[start:start + length]], minlength=3)
            for i, share in enumerate(shares):
                assert abs(counts[i] - length * share / sum(shares)) <= 1.5
        for i, share in enumerate(shares):  # a group is gone through as evenly as its share lets it be
            times = np.bincount(order[group[order] == i], minlength=300)[group == i]
            assert times.max() - times.min() <= 1
    assert not np.array_equal(*orders)


def test_without_shares_or_annotators_the_order_is_a_plain_permutation():
    group = np.random.default_rng(2).integers(0, 3, 50)
    expected = np.concatenate([np.random.default_rng([7, epoch]).permutation(50) for epoch in range(3)])
    assert np.array_equal(train.epoch_order(50, 3, 7), expected)
    assert np.array_equal(train.epoch_order(50, 3, 7, group), expected)


# Whole runs


FLAGS = ("--lora_rank", 4, "--annotators", 6, "--max_steps", 3, "--log_every", 1, "--batch_size", 6)
RUNS = {
    "mix": ("--method", "mix-dpo"), "moe": ("--method", "moe-dpo"),
    "fixed gate": ("--method", "mix-dpo", "--gate", "0.7,0.3"),
    "prompt gate": ("--method", "moe-dpo", "--gate", "prompt"),
    "user gate": ("--method", "mix-dpo", "--gate", "user"), "heads": ("--method", "moe-dpo", "--share", "trunk"),
    "full heads": ("--method", "moe-dpo", "--share", "trunk", "--lora_rank", 0, "--expert_noise", 0),
    "annotators": ("--method", "mix-dpo", "--latent", "annotator"),
    "weights": ("--method", "mix-dpo", "--objective", "weights", "--experts", 3),
    "one expert": ("--method", "mix-dpo", "--experts", 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_a_mixture_that_evaluation_reads_again(place, monkeypatch, name):
    trained = []
    monkeypatch.setattr(train, "evaluate_run", lambda policy, *rest: trained.append(policy) or
                        eval_file.evaluate_run(policy, *rest))
    out = run("run", *FLAGS, *RUNS[name], "--lr", 3e-2)
    experts = {"weights": 3, "one expert": 1}.get(name, 2)

    logged = rows(out)
    assert [row["step"] for row in logged] == [1, 2, 3]
    for row in logged:
        assert all(math.isfinite(value) for value in row.values()) and row["grad_norm"] > 0
        for sort in ("gate", "responsibility"):
            assert sum(row[f"{sort}/{k}"] for k in range(experts)) == pytest.approx(1, rel=1e-5)
    assert logged[0]["loss"] == pytest.approx(math.log(2), rel=1e-5), "all experts are the base as yet"
    assert logged[0]["log_likelihood"] == pytest.approx(-math.log(2), rel=1e-5)
    expected = [0.7, 0.3] if name == "fixed gate" else [1 / experts] * experts
    assert [logged[0][f"gate/{k}"] for k in range(experts)] == pytest.approx(expected, rel=1e-5)
    assert [logged[0][f"responsibility/{k}"] for k in range(experts)] == pytest.approx(expected, rel=1e-5)
    assert (logged[-1]["gate/0"] == pytest.approx(expected[0], rel=1e-6)) == (name in ("fixed gate", "one expert")) or \
        name == "full heads"

    assert (out / "experts").is_dir() and not (out / "adapter").exists() and not (out / "model").exists()
    report = read_json(out / "experts.json")
    assert len(report["responsibility"]) == experts and sum(report["responsibility"]) == pytest.approx(1, rel=1e-5)
    assert set(report["accuracy"]) == {"curtness", "warmth"}
    assert all(len(shares) == experts and all(0 <= share <= 1 for share in shares)
               for shares in report["accuracy"].values())
    report = read_json(out / "eval.json")
    assert set(report["uses"]) == {"mixture", "sparse", *map(str, range(experts))}
    for figures in (report["base"]["preferences"], *report["uses"].values()):
        assert figures["mixing"] == pytest.approx((figures["warmth"] + figures["curtness"]) / 2)

    loaded, _, _ = eval_file.load_policy(out)
    states, found = trained[0].state_dict(), loaded.state_dict()
    assert states.keys() == found.keys() and all(torch.equal(states[key], found[key]) for key in states)
    before = (out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()
    (out / "eval.json").unlink()
    eval_file.main([str(out)])
    assert ((out / "eval.json").read_bytes(), (out / "samples.txt").read_bytes()) == before


def test_two_runs_of_a_seed_give_the_same_bytes_and_another_seed_does_not(place):
    flags = (*FLAGS, "--method", "moe-dpo", "--expert_noise", 0.1)
    first, second, other = (run(name, *flags, "--seed", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert files_of(first) == files_of(second) and timeless(first) == timeless(second)
    assert len(files_of(first)) >= 6
    assert timeless(first) != timeless(other)


@pytest.mark.parametrize("flags", (("--gate", "prompt"), ("--latent", "annotator", "--gate", "user")),
                         ids=("prompt", "annotator"))
def test_an_interrupted_run_goes_on_to_the_same_bytes(place, monkeypatch, flags):
    flags = (*FLAGS, "--method", "moe-dpo", *flags)
    straight = run("straight", *flags)
    restore = interrupt_at(monkeypatch, 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run("broken", *flags)
    restore()
    assert (Path("out/broken") / "checkpoint").is_dir() and not (Path("out/broken") / "experts").exists()
    broken = run("broken", *flags, "--resume")
    assert files_of(broken) == files_of(straight) and timeless(broken) == timeless(straight)


def first_batch(annotators=6, size=6, count=60):
    """The pairs of the first step of a run with FLAGS."""
    pairs = apply_view("helpful", toy_preferences(count, 0, ["warmth", "curtness"], annotators))[0]
    return [pairs[i] for i in np.random.default_rng([0, 0]).permutation(len(pairs))[:size]]


def logps_alone(folder, pair):
    """[log π(chosen), log π(rejected)] of a plain model, from single sequences."""
    model, tokenizer, found = Transformer.from_pretrained(folder), Tokenizer(folder), []
    for response in (pair.chosen, pair.rejected):
        prompt, answer = tokenizer.encode([tokenizer.render(pair.prompt), response])
        tokens = prompt + answer + [tokenizer.eos_id]
        with torch.no_grad():
            logps = model.logits(model(torch.tensor([tokens])))[0].double().log_softmax(-1)
        found.append(sum(float(logps[t - 1, tokens[t]]) for t in range(len(prompt), len(tokens))))
    return found


def test_each_expert_is_compared_with_its_own_reference(place):
    folders = ["out/toy-base-seed1", "out/toy-base-seed0"]
    out = run("run", *FLAGS, "--method", "mix-dpo", "--gate", "0.6,0.4", "--references", ",".join(folders))
    losses_of, margins = [], []
    for pair in first_batch():
        policy = logps_alone("out/toy-base-seed0", pair)
        deltas = [0.3 * ((policy[0] - known[0]) - (policy[1] - known[1]))
                  for known in (logps_alone(folder, pair) for folder in folders)]
        losses_of.append(-math.log(sum(w / (1 + math.exp(-delta)) for w, delta in zip((0.6, 0.4), deltas))))
        margins.append(0.6 * deltas[0] + 0.4 * deltas[1])
    row = rows(out)[0]
    assert max(map(abs, margins)) > 1e-2
    assert row["loss"] == pytest.approx(sum(losses_of) / 6, rel=1e-4)
    assert row["rewards/margins"] == pytest.approx(sum(margins) / 6, rel=1e-3, abs=1e-5)


def test_a_mixture_can_start_from_adapters_one_expert_each(place):
    for k in (0, 1):
        model = add_experts(Transformer.from_pretrained("out/toy-base-seed0"), ["down_proj"], 2, 4, seed=k)
        for _, layer in expert_layers(model):
            layer.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(k))
        save_adapter(model, f"adapter{k}")
        merge_experts(model).save_pretrained(Path(f"merged{k}"))
    out = run("run", *FLAGS, "--method", "mix-dpo", "--init_adapter", "adapter0,adapter1")
    total, deltas = 0.0, []
    for pair in first_batch():
        base = logps_alone("out/toy-base-seed0", pair)
        for k in (0, 1):
            chosen, rejected = logps_alone(f"merged{k}", pair)
            deltas.append(0.3 * (chosen - base[0] - rejected + base[1]))
        total -= math.log(sum(0.5 / (1 + math.exp(-delta)) for delta in deltas[-2:])) / 6
    assert np.std(deltas) > 1e-2 and rows(out)[0]["loss"] == pytest.approx(total, rel=1e-4)


def test_experts_of_every_kind_come_apart_in_training(place):
    """Copies that start alike and get the same gradient would stay alike for ever."""
    for flags in ((), ("--share", "trunk"), ("--share", "trunk", "--lora_rank", 0)):
        out = run("run", *FLAGS, "--method", "mix-dpo", *flags, "--lr", 1e-2)
        tensors = load_file(out / "experts/experts.safetensors")
        (name, B), *_ = [(name, tensor) for name, tensor in tensors.items() if name.endswith("lora_B")]
        A = tensors[name.replace("lora_B", "lora_A")]
        first, second = (b @ a for b, a in zip(B.chunk(2, 1), A.chunk(2)))
        assert first.abs().max() > 0 and float((first - second).norm()) > 1e-3 * float(first.norm()), flags


def test_shares_of_the_populations_are_those_of_the_pairs_that_are_trained_on(place, monkeypatch):
    """Groups with annotators: the shares are of tastes, not of the first annotators."""
    seen, pack_them = [], train.pack
    monkeypatch.setattr(train, "pack", lambda encoded, indices: seen.append((encoded, list(indices))) or
                        pack_them(encoded, indices))
    run("run", *FLAGS, "--method", "moe-dpo", "--groups", "warmth=3,curtness=1", "--max_steps", 8)
    steps = [[encoded.groups[encoded.labels["group"][i]] for i in indices] for encoded, indices in seen
             if len(indices) == 6]
    tastes = Counter(name.split()[0] for names in steps for name in names)
    who = {name for names in steps for name in names}
    assert tastes["warmth"] / sum(tastes.values()) == pytest.approx(0.75, abs=0.08)
    assert len(who) == 6, who


def test_fixed_weights_need_not_sum_to_one(place):
    out = run("run", *FLAGS, "--method", "mix-dpo", "--gate", "3,1")
    assert [rows(out)[0][f"gate/{k}"] for k in (0, 1)] == pytest.approx([0.75, 0.25])


def test_a_mixture_can_be_evaluated_merged_at_fixed_weights(place):
    for name, flags in (("adapters", ()), ("heads", ("--share", "trunk"))):
        out = run(name, *FLAGS, "--method", "mix-dpo", *flags)
        eval_file.main([str(out), "--static", "0.5,0.5"])
        assert 0 <= read_json(out / "eval-static-0.5,0.5.json")["policy"]["degenerate"] <= 1


def preference_file(path, groups, count=24):
    """Pairs in a file, from the toy language, labelled by these groups in turn; "" leaves the field out."""
    pairs = apply_view("helpful", toy_preferences(count, 3, ["warmth", "curtness"]))[0]
    lines = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "group": group}
             for pair, group in zip(pairs, itertools.cycle(groups))]
    for line in lines:
        if not line["group"]:
            del line["group"]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_toy_base_trains_on_a_file_as_well(place):
    """The answers to the toy prompts are judged, by a gate that knows none of the annotators there."""
    out = run("run", *FLAGS, "--method", "moe-dpo", "--data", preference_file("pairs.jsonl", ("ann", "bob")))
    assert read_json(out / "experts/experts.json")["gate"]["groups"] == ["ann", "bob"]
    assert 0 <= read_json(out / "eval.json")["policy"]["degenerate"] <= 1


@pytest.mark.parametrize("method, gate", (("mix-dpo", "constant"), ("moe-dpo", "prompt")))
def test_a_models_default_gate(place, method, gate):
    preference_file("pairs.jsonl", ("ann", "", "bob"))
    out = run("run", *FLAGS, "--method", method, "--data", "pairs.jsonl", "--held_out", 0,
              "--model", "out/toy-base-seed0")
    assert read_json(out / "experts/experts.json")["gate"]["kind"] == gate
    assert rows(out)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert not (out / "eval.json").exists()


ASPECTS = ("helpfulness", "honesty", "instruction-following", "truthfulness")


def test_ultrafeedback_trains_one_expert_for_each_of_its_four_aspects(place):
    rng, lines = np.random.default_rng(0), []
    for number in range(14):
        ratings = [rng.permutation(5) + 1 for _ in range(4)]
        lines.append({"instruction": f"Name {number} things.", "completions": [
            {"response": f"{number} words {i}", "annotations": {
                aspect.replace("-", "_"): {"Rating": str(ratings[a][i])} for a, aspect in enumerate(ASPECTS)}}
            for i in range(5)]})
    Path("rated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = run("run", "--method", "moe-dpo", "--gate", "user", "--experts", 4, "--data", "rated.jsonl",
              "--model", "out/toy-base-seed0", "--held_out", 0.2, "--lora_rank", 2, "--max_steps", 3, "--log_every", 1)
    gate = read_json(out / "experts/experts.json")["gate"]
    assert gate["kind"] == "user" and tuple(gate["groups"]) == ASPECTS
    assert load_file(out / "experts/experts.safetensors")["gate.weight"].shape == (4, 4)
    report = read_json(out / "experts.json")
    assert tuple(report["accuracy"]) == ASPECTS and len(report["responsibility"]) == 4
    assert 0.25 <= report["recovered"] <= 1


# Mistakes


@pytest.mark.parametrize("flags, said", (
    (("--gate", "0.5"), ("--gate 0.5", "1 weights for 2 experts")),
    (("--gate", "0.2,0.3,0.5"), ("--gate", "3 weights for 2 experts")),
    (("--gate", "nonsense"), ("--gate nonsense", "prompt", "user")),
    (("--gate", "0,0"), ("--gate 0,0",)),
    (("--gate=-1,2",), ("--gate -1,2",)),
    (("--gate", "1,0"), ("--gate 1,0", "positive")),
    (("--gate", "nan,1"), ("--gate nan,1",)),
    (("--latent", "nobody"), ("--latent nobody", "comparison", "annotator")),
    (("--objective", "sum"), ("--objective sum", "elbo", "weights")),
    (("--share", "head"), ("--share head", "trunk")),
    (("--references", "out/toy-base-seed0"), ("--references", "1 folders for 2 experts")),
    (("--references", "nowhere/a,nowhere/b"), ("nowhere/a",)),
    (("--q_temperature", "0"), ("--q_temperature 0",)),
    (("--expert_noise=-1",), ("--expert_noise -1",)),
    (("--experts=-2",), ("--experts -2",)),
    (("--router_lr", "0"), ("--router_lr 0", "more than 0")),
    (("--annotators=-1",), ("--annotators -1",)),
    (("--lora_rank", "0"), ("--lora_rank 0",)),
    (("--lora_targets", "down_proj,lm_head"), ("lm_head",)),
    (("--groups", "kindness,warmth"), ("--groups", "kindness")),
), ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_a_mistaken_flag_gets_one_line_that_names_it(place, flags, said):
    check_mistake("moe-dpo", flags, said)


@pytest.mark.parametrize("flags", (("--gate", "user"), ("--gate", "constant", "--latent", "annotator")), ids=" ".join)
def test_annotators_are_asked_for_where_the_data_names_none(place, flags):
    preference_file("pairs.jsonl", ("",))
    message = line_of("--method", "moe-dpo", *flags, "--data", "pairs.jsonl", "--model", "out/toy-base-seed0",
                      "--max_steps", "1", "--out", "out/wrong")
    assert flags[-2] in message and "these comparisons do not say who made them" in message
    assert not Path("out/wrong").exists()


# What the experts have become


ANNOTATORS = tuple(f"{taste} {number:03}" for number in range(3) for taste in ("curtness", "warmth"))


def planted(group, groups=ANNOTATORS):
    """A part of the data of which only the groups matter."""
    return Encoded(np.zeros(0, dtype=np.int32), np.zeros((len(group), 4), dtype=np.int64),
                   {"group": np.array(group)}, groups=groups)


def report_of(monkeypatch, margins, log_gate, held_out=None, experts=2):
    """expert_report with these margins and gates on the training pairs, and others on the held-out ones."""
    encoded = planted([u for u in range(len(ANNOTATORS)) for _ in range(len(margins) // len(ANNOTATORS))])
    other = held_out and planted(held_out[0])
    parts = {id(encoded): (torch.tensor(margins), torch.tensor(log_gate).expand(len(margins), -1)),
             id(other): (held_out and torch.tensor(held_out[1]), None)}
    monkeypatch.setattr(train, "expert_margins", lambda model, encoded, reference, config: parts[id(encoded)])
    return train.expert_report(None, encoded, other, [None, None], SimpleNamespace(experts=experts))


EVEN = [math.log(0.5)] * 2


def test_experts_that_serve_one_population_each_are_seen_as_such(monkeypatch):
    margins = [[2.0, -1.0] if name.startswith("warmth") else [-3.0, 1.0] for name in ANNOTATORS for _ in range(2)]
    held_out = [1, 0, 3, 2, 1, -1], [[1.0, -1.0], [-1.0, 2.0], [0.5, -1.0], [1.0, 1.0], [-0.5, -1.0], [9.0, 9.0]]
    found, said = report_of(monkeypatch, margins, EVEN, held_out)
    assert found["recovered"] == 1.0 and said == []
    assert found["accuracy"] == {"curtness": pytest.approx([1 / 2, 1]), "warmth": pytest.approx([2 / 3, 0])}
    warm = 1 / (1 + math.exp(-2)) / (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1)))
    curt = 1 / (1 + math.exp(3)) / (1 / (1 + math.exp(3)) + 1 / (1 + math.exp(-1)))
    assert found["responsibility"] == pytest.approx([(warm + curt) / 2, 1 - (warm + curt) / 2], rel=1e-5)
    swapped, _ = report_of(monkeypatch, [row[::-1] for row in margins], EVEN)
    assert swapped["recovered"] == 1.0, "up to the names of the experts"


def test_an_annotators_type_is_read_from_all_their_comparisons_and_their_gate(monkeypatch):
    margins = [[2.0, -1.0] if name.startswith("warmth") else [-3.0, 1.0] for name in ANNOTATORS for _ in range(2)]
    margins[2] = [-0.4, 0.4]                                  # one contrary comparison does not outweigh the other
    assert report_of(monkeypatch, margins, EVEN)[0]["recovered"] == 1.0
    margins[2] = margins[3] = [-2.0, 2.0]                     # warmth 000 is now a curt one
    assert report_of(monkeypatch, margins, EVEN)[0]["recovered"] == pytest.approx(5 / 6)
    flat = [[0.0, 0.0]] * 12
    log_gate = [[math.log(0.9), math.log(0.1)] if name.startswith("warmth") else [math.log(0.1), math.log(0.9)]
                for name in ANNOTATORS for _ in range(2)]
    assert report_of(monkeypatch, flat, log_gate)[0]["recovered"] == 1.0


def test_more_experts_than_populations_and_fewer(monkeypatch):
    margins = [[-1.0, 2.0, -1.0] if name.startswith("warmth") else [-3.0, -1.0, 1.0] for name in ANNOTATORS]
    assert report_of(monkeypatch, margins, [math.log(1 / 3)] * 3, experts=3)[0]["recovered"] == 1.0
    found, _ = report_of(monkeypatch, [[1.0]] * 6, [0.0], experts=1)
    assert "recovered" not in found and found["responsibility"] == [1.0]


def test_a_collapsed_mixture_and_experts_that_agree_are_told_in_words(monkeypatch):
    apart = [[2.0, -1.0], [-3.0, 1.0]] * 6
    _, said = report_of(monkeypatch, apart, [math.log(0.001), math.log(0.999)])
    assert len(said) == 1 and "collapsed" in said[0] and "expert 1 takes" in said[0]
    _, said = report_of(monkeypatch, [[2.0, 1.0], [-3.0, -1.0]] * 6, EVEN)
    assert len(said) == 1 and "the experts agree" in said[0] and "100%" in said[0]
    _, said = report_of(monkeypatch, [[2.0, 1.0]] * 12, [math.log(0.001), math.log(0.999)])
    assert len(said) == 2
    assert report_of(monkeypatch, apart, EVEN)[1] == []


def test_planted_margins_are_found_in_a_model(place):
    """expert_margins against single sequences: Δr of every pair under every expert, and the gate."""
    out = run("run", *FLAGS, "--method", "moe-dpo", "--lr", 3e-2)
    model, tokenizer, _ = eval_file.load_policy(out)
    config = train.Config(**{name: value for name, value in read_json(out / "config.json").items()
                             if name not in ("base", "inputs")})
    encoded, _ = train.load_data(config, tokenizer)
    reference = train.reference_logps(model, encoded, config, out)
    margins, log_gate = train.expert_margins(model, encoded, reference, config)
    assert margins.shape == log_gate.shape == (60, 2)
    plains = [Transformer.from_pretrained("out/toy-base-seed0") for _ in range(2)]
    for k, plain in enumerate(plains):
        for name, layer in expert_layers(model):
            weight = plain.get_submodule(name).weight
            weight.data += layer.alpha / 4 * layer.lora_B.data[:, 4 * k:4 * k + 4] @ layer.lora_A.data[4 * k:4 * k + 4]
        plain.folder = Path(f"expert{k}")
        plain.save_pretrained(Path(f"expert{k}"))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path("out/toy-base-seed0") / file, f"expert{k}/{file}")
    pairs = apply_view("helpful", toy_preferences(60, 0, ["warmth", "curtness"], 6))[0]
    found = []
    for i in (0, 17, 59):
        base = logps_alone("out/toy-base-seed0", pairs[i])
        for k in range(2):
            chosen, rejected = logps_alone(f"expert{k}", pairs[i])
            found.append(float(margins[i, k]))
            assert found[-1] == pytest.approx(0.3 * (chosen - base[0] - rejected + base[1]), rel=1e-3, abs=1e-3)
        own = encoded.groups.index(pairs[i].group)
        logits = (model.gate.bias + model.gate.weight[own]).tolist()
        assert log_gate[i].tolist() == pytest.approx(log_softmax(logits), rel=1e-4, abs=1e-5)
    assert np.std(found) > 1e-2
