"""Losses against formulas written out in float64: values, gradients and metrics."""
import itertools
import math

import pytest
import torch

from conftest import softplus
from losses import cost_loss, dpo_loss, preference_loss, reward_loss, router_l1, safedpo_loss, sft_loss, spe_dpo_loss

UNSAFE = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))  # (4, 2): chosen, rejected


def sigmoid(z):
    return math.exp(-softplus(-z))


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
        total += (1 - smoothing) * softplus(-z) + smoothing * softplus(z)
        slope = beta * (sigmoid(z) - (1 - smoothing)) / len(pairs)
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
        loss, metrics = safedpo_loss(*logps, *torch.tensor([flags]).T, beta, delta, smoothing)
        assert torch.isfinite(loss)
        check(loss, logps, expected_loss(logps, beta, [delta * flags[1]], smoothing))
        assert float(metrics["rewards/margins"]) == pytest.approx(beta * gap)
    logps = [zero.clone().requires_grad_(), zero.clone().requires_grad_(), far, -far]
    loss, _ = dpo_loss(*logps, beta, smoothing)
    check(loss, logps, expected_loss(logps, beta, [0.0], smoothing))


@pytest.mark.parametrize("smoothing", (0.0, 0.3))
def test_dpo_starts_at_log_2(smoothing):
    policy = torch.tensor([-3.0, -40.0, -7.5])
    loss, metrics = dpo_loss(policy, 2 * policy, policy, 2 * policy, 0.1, smoothing)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    assert float(metrics["rewards/margins"]) == 0.0


@pytest.mark.parametrize("delta", (0.0, 0.5, 2.0, 10.0, 50.0, 1000.0))
def test_safedpo_starts_at_its_closed_form(delta):
    """log(1 + e^Δ) on safe/unsafe pairs, log 2 on safe/safe ones."""
    policy = torch.tensor([-3.0, -40.0, -7.5, -1.0])
    rejected_unsafe = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss, _ = safedpo_loss(policy, policy / 2, policy, policy / 2, torch.zeros(4), rejected_unsafe, 0.1, delta)
    per_pair = [math.log(2), delta + math.log1p(math.exp(-delta))]
    assert float(loss) == pytest.approx(sum(per_pair) / 2, rel=1e-6)


def test_metrics_have_the_fields_names_and_values():
    chosen, rejected = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True), torch.tensor([-2.0, -1.0, -5.0])
    ref_chosen, ref_rejected = torch.tensor([-3.0, -2.0, -2.0]), torch.tensor([-2.0, -3.0, -3.0])
    _, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)
    # rewards: chosen 1, 0, -1; rejected 0, 1, -1; margins 1, -1, 0: a tie is not a win
    expected = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 1 / 3,
                "logps/chosen": -7 / 3, "logps/rejected": -8 / 3}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_leave_the_offset_out_of_the_margin():
    logps = [value.detach() for value in draw(4)]
    _, plain = dpo_loss(*logps, 0.1)
    _, shifted = safedpo_loss(*logps, *UNSAFE.T, 0.1, 10.0)
    assert plain == shifted


def test_sft_loss_is_the_mean_over_tokens_not_over_responses():
    logps = torch.tensor([-6.0, -1.0, 0.0], requires_grad=True)
    loss, metrics = sft_loss(logps, torch.tensor([10, 4, 0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5)
    assert logps.grad.tolist() == pytest.approx([-1 / 14] * 3)
    assert float(metrics["perplexity"]) == pytest.approx(math.exp(0.5))
    assert float(metrics["logps/chosen"]) == pytest.approx(-7 / 3)


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
    _, metrics = spe_dpo_loss(*logps, margin, 0.1)
    assert float(metrics["score_margin"]) == pytest.approx(4 / 8)
    assert float(metrics["score_clipped"]) == pytest.approx(5 / 8)
    _, plain = dpo_loss(*logps, 0.1)
    assert {name: metrics[name] for name in plain} == plain, "the margin is no part of the rewards"


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


SCORES = ((0.3, -1.2), (-2.0, 2.5), (0.0, 0.0), (1e4, 0.0), (0.0, 1e4), (-1e4, 1e4), (1e4, -1e4), (7.0, 6.5))


@pytest.mark.parametrize("scores", [[pair] for pair in SCORES] + [SCORES], ids=str)
def test_reward_loss_equals_its_formula_with_gradients(scores):
    chosen, rejected = (torch.tensor(column, requires_grad=True) for column in zip(*scores))
    loss, metrics = reward_loss(chosen, rejected)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(softplus(r - c) for c, r in scores) / len(scores), rel=1e-6)
    slopes = [-sigmoid(r - c) / len(scores) for c, r in scores]
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-5, abs=1e-9)
    assert float(metrics["accuracy"]) == pytest.approx(sum(c > r for c, r in scores) / len(scores))
    assert float(metrics["margin"]) == pytest.approx(sum(c - r for c, r in scores) / len(scores), rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("flags", [*([row] for row in UNSAFE.tolist()), UNSAFE.tolist()], ids=str)
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kind", (torch.float32, torch.bool))
def test_cost_loss_equals_its_formula_for_every_combination_of_unsafe_flags(flags, scores, kind):
    """A high cost is unsafe: the other response's is to be above the safer one's, and each on its side of zero."""
    costs = [scores] * len(flags)
    safer, other = (torch.tensor(column, requires_grad=True) for column in zip(*costs))
    loss, metrics = cost_loss(safer, other, *torch.tensor(flags).to(kind).T)
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
    assert float(metrics["accuracy"]) == pytest.approx(ordered / len(flags))
    assert float(metrics["sign_accuracy"]) == pytest.approx(signs / (2 * len(flags)))
    assert not any(value.requires_grad for value in metrics.values())


def test_score_losses_start_at_log_2_for_each_of_their_terms():
    """A fresh head scores everything 0: nothing is ordered, and no sign is right."""
    zero, unsafe = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    loss, metrics = reward_loss(zero, zero)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6) and float(metrics["accuracy"]) == 0.0
    loss, metrics = cost_loss(zero, zero, zero, unsafe)
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert float(metrics["accuracy"]) == float(metrics["sign_accuracy"]) == 0.0
