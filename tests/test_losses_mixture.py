"""The loss of Mix- and MoE-DPO against the mixture's likelihood, one pair and one expert at a time in float64."""
import itertools
import math
from collections import Counter

import pytest
import torch

from losses import dpo_loss, moe_dpo_loss


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
    values = {}
    for k, n in itertools.product(range(policy.shape[0]), range(policy.shape[1])):
        chosen, rejected = (beta * (policy[k, n, j] - reference[k, n, j]) for j in (0, 1))
        values[k, n] = 1 / (1 + torch.exp(-(chosen - rejected)))
    return values


def weights_of(logits, n):
    exponentials = [torch.exp(logit) for logit in logits[n]]
    return [exponential / sum(exponentials) for exponential in exponentials]


def minus_log_likelihood(policy, reference, logits, beta, annotator=None):
    """−(1/N) Σ_u log Σ_k w_k Π_i σ(Δr_k,i), every pair being an annotator of its own where none are given."""
    K, N = policy.shape[:2]
    fit, total = sigmoids(policy, reference, beta), 0.0
    annotator = list(range(N)) if annotator is None else annotator
    for u in set(annotator):
        pairs = [n for n in range(N) if annotator[n] == u]
        w = weights_of(logits, pairs[0])
        total = total - torch.log(sum(w[k] * math.prod(fit[k, n] for n in pairs) for k in range(K)))
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
    loss, metrics = moe_dpo_loss(one, reference, torch.zeros(9, 1), 0.1, objective)
    expected, wanted = dpo_loss(*plain.T, *reference[0].T, 0.1)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(one.grad[0], plain.grad)
    for name in ("rewards/margins", "rewards/accuracies"):
        assert metrics[name] == wanted[name]


@pytest.mark.parametrize("objective", ("elbo", "weights"))
@pytest.mark.parametrize("annotator", (None, [0, 0, 1, 1]), ids=("comparison", "annotator"))
@pytest.mark.parametrize("temperature", (0.3, 1.0, 4.0))
def test_everything_is_finite_at_differences_of_ten_thousand(objective, annotator, temperature):
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)))                    # (4, K)
    policy = torch.zeros(2, 4, 2)
    policy[..., 0] = 1e4 * signs.T
    logits = torch.tensor([[0.0, 0.0], [3.0, -3.0], [-200.0, 0.0], [0.0, 200.0]])
    inputs = policy.requires_grad_(), torch.zeros(2, 4, 2), logits.requires_grad_()
    loss, metrics = moe_dpo_loss(*inputs[:2], logits.log_softmax(-1), 1.0, objective,
                                 annotator and torch.tensor(annotator), temperature)
    loss.backward()
    assert torch.isfinite(loss) and all(math.isfinite(value) for value in metrics.values())
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
            pairs = [n for n in range(6) if annotator[n] == u]
            assert torch.allclose(inputs[2].grad[pairs].sum(0), other[2].grad[pairs].sum(0), rtol=1e-9, atol=1e-12)


def test_an_annotators_prior_is_the_mean_of_the_gates_log_weights_renormalised():
    """Where the gate says something else of each of their comparisons: ∏ w^(1/n), divided by its sum over experts."""
    policy, reference, logits = (value.detach() for value in draw(3, 6, scale=2.0))
    annotator, fit, expected = [0, 1, 0, 1, 1, 0], sigmoids(policy, reference, 0.4), 0.0
    for u in (0, 1):
        pairs = [n for n in range(6) if annotator[n] == u]
        means = [math.prod(float(weights_of(logits, n)[k]) for n in pairs) ** (1 / 3) for k in range(3)]
        assert sum(means) < 0.95
        likelihood = sum(means[k] / sum(means) * math.prod(float(fit[k, n]) for n in pairs) for k in range(3))
        expected -= math.log(likelihood) / 6
    loss, _ = moe_dpo_loss(policy, reference, logits.log_softmax(-1), 0.4, annotator=torch.tensor(annotator))
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_a_tempered_e_step_gives_the_bound_of_its_own_responsibilities():
    for temperature in (0.5, 2.0, 5.0):
        inputs = draw(3, 5)
        other = copies(*inputs)
        loss, metrics = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), 0.5, q_temperature=temperature)
        fit, expected, shares = sigmoids(other[0], other[1], 0.5), 0.0, [0.0] * 3
        for n in range(5):
            joint = [weights_of(other[2], n)[k] * fit[k, n] for k in range(3)]
            q = [float(j.detach()) ** (1 / temperature) for j in joint]
            q = [weight / sum(q) for weight in q]
            expected = expected + sum(q[k] * (math.log(q[k]) - torch.log(joint[k])) for k in range(3)) / 5
            shares = [share + weight / 5 for share, weight in zip(shares, q)]
        same_value_and_gradients(loss, inputs, expected, other)
        assert float(loss.detach()) > float(minus_log_likelihood(*copies(*inputs), 0.5).detach()) + 1e-4
        assert [float(metrics[f"responsibility/{k}"]) for k in range(3)] == pytest.approx(shares, rel=1e-9)


@pytest.mark.parametrize("objective", ("elbo", "weights"))
def test_metrics_are_means_over_the_pairs(objective):
    inputs = draw(2, 8)
    _, metrics = moe_dpo_loss(inputs[0], inputs[1], inputs[2].log_softmax(-1), 0.5, objective)
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
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(dict(expected), rel=1e-6)
    assert 0 < expected["rewards/accuracies"] < 1 and not any(value.requires_grad for value in metrics.values())


def test_a_pair_is_right_where_the_mixture_says_more_than_one_half_not_where_the_mean_margin_is_positive():
    """Of expert 0 with weight 0.8, 0.8 · σ(1) = 0.58 is enough, whatever expert 1 says; the mean margin is −1.2."""
    for sign, right in ((1, 1.0), (-1, 0.0)):
        policy = torch.tensor([[[1.0, 0.0]], [[-10.0, 0.0]]]) * sign                            # (K, N, 2)
        metrics = moe_dpo_loss(policy, torch.zeros(2, 1, 2), torch.tensor([[0.8, 0.2]]).log(), 1.0)[1]
        assert float(metrics["rewards/margins"]) == pytest.approx(-1.2 * sign)
        assert float(metrics["rewards/accuracies"]) == right


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
        losses = [loss_at(c, n, annotators=True) for c in scales]
        for c, (loss, slope) in zip(scales, losses):
            right = 1 / (1 + math.exp(-c))
            assert loss == pytest.approx(-math.log(0.5 * right ** n + 0.5 * (1 - right) ** n) / n, rel=1e-9)
            assert slope < 0
        assert all(after < before for (before, _), (after, _) in zip(losses, losses[1:]))
