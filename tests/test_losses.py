"""Losses against formulas written out in float64, and packed log-probabilities against single sequences."""
import itertools
import math

import numpy as np
import pytest
import torch

import losses
from data import Encoded, pack
from losses import (cost_loss, dpo_loss, preference_loss, reward_loss, router_l1, safedpo_loss, sequence_logps,
                    sft_loss, spe_dpo_loss)
from model import ModelConfig, Transformer

SIZES = dict(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=64)
SHAPES = {
    "llama": dict(model_type="llama", num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2"),
    "gemma2 with a window shorter than the sequences":
        dict(model_type="gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gpt2": dict(model_type="gpt2", n_embd=16, n_head=2, n_layer=2, n_positions=64),
}
UNSAFE = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))  # (4, 2): chosen, rejected


def draw(count, seed=0, scale=20.0):
    """Four tensors of log-probabilities, (count,) each, that ask for gradients where a policy gives them."""
    generator = torch.Generator().manual_seed(seed)
    values = [-scale * torch.rand(count, generator=generator) for _ in range(4)]
    return [value.requires_grad_(i < 2) for i, value in enumerate(values)]


def expected_loss(logps, beta, offset, smoothing=0.0):
    """The mean loss and its gradients by the two policy log-probs, one pair at a time, in double precision."""
    pairs = list(zip(*(value.tolist() for value in logps)))
    total, by_chosen, by_rejected = 0.0, [], []
    for (policy_w, policy_l, ref_w, ref_l), shift in zip(pairs, offset):
        z = beta * ((policy_w - ref_w) - (policy_l - ref_l)) - shift
        minus_log_sigmoid = max(-z, 0.0) + math.log1p(math.exp(-abs(z)))
        minus_log_one_minus = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
        total += (1 - smoothing) * minus_log_sigmoid + smoothing * minus_log_one_minus
        sigmoid = math.exp(-minus_log_sigmoid)
        slope = beta * (sigmoid - (1 - smoothing)) / len(pairs)
        by_chosen.append(slope)
        by_rejected.append(-slope)
    return total / len(pairs), by_chosen, by_rejected


def check(loss, logps, expected, tolerance=1e-5):
    value, by_chosen, by_rejected = expected
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, rel=tolerance)
    assert logps[0].grad.tolist() == pytest.approx(by_chosen, rel=tolerance, abs=1e-7)
    assert logps[1].grad.tolist() == pytest.approx(by_rejected, rel=tolerance, abs=1e-7)


# Preference losses


@pytest.mark.parametrize("count", (1, 7))
@pytest.mark.parametrize("beta", (0.05, 0.1, 1.0))
@pytest.mark.parametrize("smoothing", (0.0, 0.1, 0.4))
def test_dpo_equals_its_formula_with_gradients(count, beta, smoothing):
    logps = draw(count)
    loss, _ = dpo_loss(*logps, beta, smoothing)
    check(loss, logps, expected_loss(logps, beta, [0.0] * count, smoothing))


@pytest.mark.parametrize("delta", (0, 2, 10))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("flags", (torch.float32, torch.bool))
def test_safedpo_equals_its_formula_for_every_combination_of_unsafe_flags(delta, smoothing, flags):
    logps = draw(4)
    loss, _ = safedpo_loss(*logps, *UNSAFE.to(flags).T, 0.1, delta, smoothing)
    offset = [(rejected - chosen) * delta for chosen, rejected in UNSAFE.tolist()]
    check(loss, logps, expected_loss(logps, 0.1, offset, smoothing))


def test_safedpo_offset_is_zero_on_safe_pairs_and_delta_on_safe_unsafe_pairs():
    logps = [value.detach() for value in draw(1)]
    safe, unsafe = torch.zeros(1), torch.ones(1)
    plain = float(dpo_loss(*logps, 0.1)[0])
    assert float(safedpo_loss(*logps, safe, safe, 0.1, 10.0)[0]) == plain
    assert float(safedpo_loss(*logps, unsafe, unsafe, 0.1, 10.0)[0]) == plain
    assert float(safedpo_loss(*logps, safe, unsafe, 0.1, 10.0)[0]) > plain + 5
    assert float(safedpo_loss(*logps, unsafe, safe, 0.1, 10.0)[0]) < plain


def test_safedpo_without_delta_is_dpo():
    logps = [value.detach() for value in draw(4)]
    assert torch.equal(safedpo_loss(*logps, *UNSAFE.T, 0.1, 0.0)[0], dpo_loss(*logps, 0.1)[0])


def test_preference_loss_takes_a_number_or_one_offset_a_pair():
    logps = draw(5)
    loss, _ = preference_loss(*logps, 0.3, 1.5)
    check(loss, logps, expected_loss(logps, 0.3, [1.5] * 5))
    logps = draw(5)
    offset = torch.linspace(-3, 4, 5)
    loss, _ = preference_loss(*logps, 0.3, offset, 0.1)
    check(loss, logps, expected_loss(logps, 0.3, offset.tolist(), 0.1))


@pytest.mark.parametrize("beta, smoothing", ((0.1, 0.0), (1.0, 0.0), (1.0, 0.1)))
@pytest.mark.parametrize("gap", (-1e4, 1e4))
def test_losses_stay_exact_at_differences_of_ten_thousand(gap, beta, smoothing):
    """exp(1e4) overflows even float64; the loss is then linear or zero, and its slope β or 0."""
    far, zero = torch.full((1,), gap), torch.zeros(1)
    for delta, flags in ((0.0, (0.0, 0.0)), (10.0, (0.0, 1.0))):
        logps = [far.clone().requires_grad_(), zero.clone().requires_grad_(), zero, zero]
        loss, figures = safedpo_loss(*logps, *torch.tensor([flags]).T, beta, delta, smoothing)
        assert torch.isfinite(loss)
        check(loss, logps, expected_loss(logps, beta, [delta * flags[1]], smoothing))
        assert float(figures["rewards/margins"]) == pytest.approx(beta * gap)
    logps = [zero.clone().requires_grad_(), zero.clone().requires_grad_(), far, -far]
    loss, _ = dpo_loss(*logps, beta, smoothing)
    check(loss, logps, expected_loss(logps, beta, [0.0], smoothing))


@pytest.mark.parametrize("smoothing", (0.0, 0.3))
def test_dpo_starts_at_log_2(smoothing):
    policy = torch.tensor([-3.0, -40.0, -7.5])
    loss, figures = dpo_loss(policy, 2 * policy, policy, 2 * policy, 0.1, smoothing)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    assert float(figures["rewards/margins"]) == 0.0


@pytest.mark.parametrize("delta", (0.0, 0.5, 2.0, 10.0, 50.0, 1000.0))
def test_safedpo_starts_at_its_closed_form(delta):
    """log(1 + e^Δ) on safe/unsafe pairs, log 2 on safe/safe ones."""
    policy = torch.tensor([-3.0, -40.0, -7.5, -1.0])
    rejected_unsafe = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss, _ = safedpo_loss(policy, policy / 2, policy, policy / 2, torch.zeros(4), rejected_unsafe, 0.1, delta)
    per_pair = [math.log(2), delta + math.log1p(math.exp(-delta))]
    assert float(loss) == pytest.approx(sum(per_pair) / 2, rel=1e-6)


def test_figures_have_the_fields_names_and_values():
    chosen, rejected = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True), torch.tensor([-2.0, -1.0, -5.0])
    ref_chosen, ref_rejected = torch.tensor([-3.0, -2.0, -2.0]), torch.tensor([-2.0, -3.0, -3.0])
    _, figures = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)
    # rewards: chosen 1, 0, -1; rejected 0, 1, -1; margins 1, -1, 0: a tie is not a win
    expected = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 1 / 3,
                "logps/chosen": -7 / 3, "logps/rejected": -8 / 3}
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(expected, abs=1e-6)
    assert not any(value.requires_grad for value in figures.values())


def test_figures_leave_the_offset_out_of_the_margin():
    logps = [value.detach() for value in draw(4)]
    _, plain = dpo_loss(*logps, 0.1)
    _, shifted = safedpo_loss(*logps, *UNSAFE.T, 0.1, 10.0)
    assert plain == shifted


def test_sft_loss_is_the_mean_over_tokens_not_over_responses():
    logps = torch.tensor([-6.0, -1.0, 0.0], requires_grad=True)
    loss, figures = sft_loss(logps, torch.tensor([10, 4, 0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5)
    assert logps.grad.tolist() == pytest.approx([-1 / 14] * 3)
    assert float(figures["perplexity"]) == pytest.approx(math.exp(0.5))
    assert float(figures["logps/chosen"]) == pytest.approx(-7 / 3)


def test_sft_loss_of_no_tokens_is_zero():
    loss, _ = sft_loss(torch.zeros(2, requires_grad=True), torch.zeros(2, dtype=torch.long))
    assert float(loss.detach()) == 0.0


# SPE-DPO


@pytest.mark.parametrize("beta", (0.05, 1.0))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_spe_dpo_equals_its_formula_with_gradients(beta, smoothing):
    logps, margin = draw(5), torch.tensor([0.0, 0.3, 1.0, 4.0, 25.0])
    loss, _ = spe_dpo_loss(*logps, margin, beta, smoothing)
    check(loss, logps, expected_loss(logps, beta, margin.tolist(), smoothing))


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_spe_dpo_with_margin_zero_is_dpo(smoothing):
    logps = draw(6)
    losses = (spe_dpo_loss(*logps, torch.zeros(6), 0.1, smoothing)[0], dpo_loss(*logps, 0.1, smoothing)[0])
    first, second = (torch.autograd.grad(loss, logps[:2]) for loss in losses)
    assert torch.equal(*losses) and all(map(torch.equal, first, second))


def test_a_larger_margin_pulls_harder_until_the_policy_has_it():
    """The slope is β·σ(m − Δr) / N: half of β where the policy's margin is m, all of it far below."""
    policy, zero = torch.full((4,), 0.0, requires_grad=True), torch.zeros(4)
    margin = torch.tensor([0.0, 1.0, 3.0, 40.0])
    spe_dpo_loss(policy, zero, zero, zero, margin, 0.5)[0].backward()
    expected = [-0.5 / (1 + math.exp(-m)) / 4 for m in margin.tolist()]
    assert policy.grad.tolist() == pytest.approx(expected, rel=1e-6)
    reached = torch.full((4,), 2.0, requires_grad=True)
    spe_dpo_loss(reached, zero, zero, zero, torch.ones(4), 0.5)[0].backward()
    assert reached.grad.tolist() == pytest.approx([-0.5 / 2 / 4] * 4, rel=1e-6)


@pytest.mark.parametrize("gap", (-1e4, 1e4))
@pytest.mark.parametrize("margin", (0.0, 3.0, 1e4))
def test_spe_dpo_stays_exact_at_differences_of_ten_thousand(gap, margin):
    far, zero = torch.full((1,), gap), torch.zeros(1)
    logps = [far.clone().requires_grad_(), zero.clone().requires_grad_(), zero, zero]
    loss, _ = spe_dpo_loss(*logps, torch.tensor([margin]), 1.0)
    assert torch.isfinite(loss)
    check(loss, logps, expected_loss(logps, 1.0, [margin]))


def test_spe_dpo_logs_the_mean_margin_and_the_share_clipped_to_zero():
    logps = [value.detach() for value in draw(8)]
    margin = torch.tensor([0.0, 2.0, 0.0, 0.5, 0.0, 1.5, 0.0, 0.0])
    _, figures = spe_dpo_loss(*logps, margin, 0.1)
    assert float(figures["score_margin"]) == pytest.approx(4 / 8)
    assert float(figures["score_clipped"]) == pytest.approx(5 / 8)
    _, plain = dpo_loss(*logps, 0.1)
    assert {name: figures[name] for name in plain} == plain, "the margin is no part of the rewards"


# MidPO's routers


def test_router_l1_is_the_mean_over_layers_and_tokens():
    generator = torch.Generator().manual_seed(0)
    safety, helpfulness = (torch.rand(3, 7, generator=generator).double() for _ in range(2))
    total = 0.0
    for layer in range(3):
        for token in range(7):
            total += abs(float(safety[layer, token])) + abs(float(helpfulness[layer, token]) - 1)
    assert float(router_l1(safety, helpfulness)) == pytest.approx(total / 21, rel=1e-12)
    assert float(router_l1(torch.zeros(3, 7), torch.ones(3, 7))) == 0.0, "helpfulness on, safety off"
    assert float(router_l1(torch.ones(3, 7), torch.zeros(3, 7))) == 2.0


def test_gradients_of_router_l1_are_signs_over_the_count():
    """Weights outside of 0 … 1, which no sigmoid gives, show that a sign is one."""
    safety = torch.tensor([[0.2, 0.9], [-0.3, 1.4], [0.5, 0.1]], requires_grad=True)
    helpfulness = torch.tensor([[0.2, 0.9], [-0.3, 1.4], [1.6, 0.1]], requires_grad=True)
    router_l1(safety, helpfulness).backward()
    assert torch.allclose(safety.grad * 6, torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]]))
    assert torch.allclose(helpfulness.grad * 6, torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]))


# Score models


def softplus(z):
    """−log σ(−z) in double precision."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z):
    return math.exp(-softplus(-z))


SCORES = ((0.3, -1.2), (-2.0, 2.5), (0.0, 0.0), (1e4, 0.0), (0.0, 1e4), (-1e4, 1e4), (1e4, -1e4), (7.0, 6.5))


@pytest.mark.parametrize("scores", [[pair] for pair in SCORES] + [SCORES], ids=str)
def test_reward_loss_equals_its_formula_with_gradients(scores):
    chosen, rejected = (torch.tensor(column, requires_grad=True) for column in zip(*scores))
    loss, figures = reward_loss(chosen, rejected)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(softplus(r - c) for c, r in scores) / len(scores), rel=1e-6)
    slopes = [-sigmoid(r - c) / len(scores) for c, r in scores]
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-5, abs=1e-9)
    assert float(figures["accuracy"]) == pytest.approx(sum(c > r for c, r in scores) / len(scores))
    assert float(figures["margin"]) == pytest.approx(sum(c - r for c, r in scores) / len(scores), rel=1e-6)
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize("flags", [*([row] for row in UNSAFE.tolist()), UNSAFE.tolist()], ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kind", (torch.float32, torch.bool))
def test_cost_loss_equals_its_formula_for_every_combination_of_unsafe_flags(flags, scores, kind):
    """A high cost is unsafe: the other response's is to be above the safer one's, and each on its side of zero."""
    costs = [scores] * len(flags)
    safer, other = (torch.tensor(column, requires_grad=True) for column in zip(*costs))
    loss, figures = cost_loss(safer, other, *torch.tensor(flags).to(kind).T)
    loss.backward()
    total, by_safer, by_other, ordered, signs = 0.0, [], [], 0, 0
    for (a, b), (a_unsafe, b_unsafe) in zip(costs, flags):
        a_sign, b_sign = (1 if unsafe else -1 for unsafe in (a_unsafe, b_unsafe))
        total += softplus(a - b) + softplus(-a_sign * a) + softplus(-b_sign * b)
        by_safer.append((sigmoid(a - b) - a_sign * sigmoid(-a_sign * a)) / len(flags))
        by_other.append((-sigmoid(a - b) - b_sign * sigmoid(-b_sign * b)) / len(flags))
        ordered, signs = ordered + (b > a), signs + (a_sign * a > 0) + (b_sign * b > 0)
    assert float(loss.detach()) == pytest.approx(total / len(flags), rel=1e-6)
    assert safer.grad.tolist() == pytest.approx(by_safer, rel=1e-5, abs=1e-7)
    assert other.grad.tolist() == pytest.approx(by_other, rel=1e-5, abs=1e-7)
    assert float(figures["accuracy"]) == pytest.approx(ordered / len(flags))
    assert float(figures["sign_accuracy"]) == pytest.approx(signs / (2 * len(flags)))
    assert not any(value.requires_grad for value in figures.values())


def test_score_losses_start_at_log_2_for_each_of_their_terms():
    """A fresh head scores everything 0: nothing is ordered, and no sign is right."""
    zero, unsafe = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    loss, figures = reward_loss(zero, zero)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6) and float(figures["accuracy"]) == 0.0
    loss, figures = cost_loss(zero, zero, zero, unsafe)
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert float(figures["accuracy"]) == float(figures["sign_accuracy"]) == 0.0


# Log-probabilities


def tiny(shape, seed=0):
    """A random model whose every weight, norms and biases included, is far from its starting value."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_hf({**SIZES, **SHAPES[shape]})).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def encoded_of(items, seed=0):
    """Random tokens for prompts and responses of these lengths: [(prompt, response, …), …] -> Encoded."""
    rng = np.random.default_rng(seed)
    bounds, position = [], 0
    for item in items:
        bounds.append([position + n for n in itertools.accumulate(item, initial=0)])
        position = bounds[-1][-1]
    return Encoded(rng.integers(0, SIZES["vocab_size"], position).astype(np.int32), np.array(bounds, dtype=np.int64))


def sequences(encoded, index):
    """[(prompt, response), …] of one prompt, as lists."""
    bounds = encoded.bounds[index].tolist()
    pieces = [encoded.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])]
    return [(pieces[0], response) for response in pieces[1:]]


def brute_force(model, encoded, indices):
    """(N, R): every prompt with one response alone, no padding, in float64, one token's log-softmax at a time."""
    rows = []
    for index in indices:
        for prompt, response in sequences(encoded, index):
            tokens = torch.tensor([prompt + response])
            logps = model.logits(model(tokens))[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            rows.append(sum((logps[place, tokens[0, place + 1]] for place in places), torch.zeros(()).double()))
    return torch.stack(rows).view(len(indices), -1)


PAIRS = [(3, 5, 2), (1, 4, 6), (1, 1, 1), (7, 0, 3), (2, 3, 0), (9, 8, 7), (1, 2, 0), (4, 1, 12)]
SINGLES = [(3, 5), (1, 4), (7, 0), (1, 1), (9, 12)]
WEIGHTS = torch.linspace(-1, 2, 2 * len(PAIRS))  # a different pull on every response


def packed_and_separate(shape, items):
    """((logps, gradients) packed in float32, the same from separate sequences in float64)."""
    encoded, indices = encoded_of(items), list(range(len(items)))[::-1]
    results = []
    for dtype, compute in ((torch.float32, packed_logps), (torch.float64, brute_force)):
        model = tiny(shape).to(dtype)
        logps = compute(model, encoded, indices)
        (logps.flatten() * WEIGHTS[:logps.numel()].to(dtype)).sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in model.named_parameters()}))
    return results


def packed_logps(model, encoded, indices):
    batch = pack(encoded, indices)
    return sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)


def assert_same(got, want, tolerance=1e-5):
    (logps, gradients), (expected_logps, expected_gradients) = got, want
    assert logps.dtype == torch.float32 and logps.shape == expected_logps.shape
    assert float((logps - expected_logps).abs().max() / expected_logps.abs().max()) < tolerance
    for name, expected in expected_gradients.items():
        size = expected.norm()
        if size < 1e-12:  # without RoPE a bias on every key adds the same to all scores of a query
            assert name.endswith("k_proj.bias") and gradients[name].norm() < 1e-4
        else:
            assert float((gradients[name] - expected).norm() / size) < tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("items", (PAIRS, SINGLES), ids=("pairs", "one response each"))
def test_packed_logps_and_gradients_equal_separate_sequences(shape, items):
    assert_same(*packed_and_separate(shape, items))


@pytest.mark.parametrize("rows", (1, 3))
def test_small_chunks_give_the_same_logps_and_gradients(monkeypatch, rows):
    monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 4 * SIZES["vocab_size"])
    assert_same(*packed_and_separate("llama", PAIRS))


def test_empty_responses_have_log_probability_zero():
    model = tiny("llama")
    for items in ([(3, 0, 0)], [(3, 0), (2, 0)]):
        logps = packed_logps(model, encoded_of(items), list(range(len(items))))
        assert torch.equal(logps, torch.zeros(len(items), len(items[0]) - 1))


def test_padding_and_neighbours_do_not_change_a_pair():
    model, encoded = tiny("llama"), encoded_of(PAIRS)
    together = packed_logps(model, encoded, list(range(len(PAIRS))))
    for index in range(len(PAIRS)):
        alone = packed_logps(model, encoded, [index])
        assert torch.allclose(alone[0], together[index], rtol=1e-5, atol=1e-5)
    batch = pack(encoded, list(range(len(PAIRS))))
    before = sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)
    assert (batch.pair < 0).any()
    batch.tokens[batch.pair < 0] = 17
    after = sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)
    assert torch.equal(before, after)


def test_one_pair_given_twice_counts_twice():
    model, encoded = tiny("llama"), encoded_of(PAIRS)
    logps = packed_logps(model, encoded, [5, 5])
    assert torch.allclose(logps[0], logps[1], rtol=1e-5)
    expected = brute_force(tiny("llama").double(), encoded, [5])[0]
    assert torch.allclose(logps[0].double(), expected, rtol=1e-5)


def test_no_vocabulary_sized_tensor_outlives_its_chunk(monkeypatch):
    rows = 2
    monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 4 * SIZES["vocab_size"])
    model, encoded = tiny("qwen2"), encoded_of(PAIRS)
    batch = pack(encoded, list(range(len(PAIRS))))
    hidden = model(batch.tokens, batch.positions, batch.mask()).detach().requires_grad_()
    head, saved, computed = model.lm_head.weight, [], []
    logits = model.logits

    def counting(states):
        computed.append(len(states))
        return logits(states)

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() != head.untyped_storage().data_ptr():
            saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(model, "logits", counting)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = sequence_logps(model, hidden, batch)
    M, V, D = len(batch.target), SIZES["vocab_size"], SIZES["hidden_size"]
    assert saved and max(saved) < min(M * V, rows * V), "logits were kept for the backward pass"
    assert sum(saved) < M * V
    logps.sum().backward()
    assert max(computed) <= rows, "a chunk is larger than it may be, forward or backward"
    assert hidden.grad.abs().sum() > 0
