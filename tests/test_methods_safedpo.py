"""SafeDPO (arXiv 2505.20065), start here: DPO on reordered pairs, T(D), with an offset Δ where one response is unsafe.

"Better" means more helpful. Exhaustive tests: test_data_views.py (T), test_losses_formulas.py (the loss), test_train_runs.py (whole runs).
"""
import itertools
import math

import pytest
import torch

from data import Comparison, safedpo_transform
from losses import dpo_loss, safedpo_loss

BETA, DELTA = 0.1, 10.0
# Three pairs of T(D). T leaves no unsafe chosen response; the rejected responses of the last two are unsafe.
POLICY = torch.tensor([-20.0, -35.0, -12.0]), torch.tensor([-25.0, -30.0, -40.0])     # log π(y|x): chosen, rejected
REFERENCE = torch.tensor([-22.0, -33.0, -15.0]), torch.tensor([-24.0, -31.0, -38.0])  # log π_ref(y|x)
UNSAFE = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])                 # h of chosen, rejected
OFFSETS = [0.0, DELTA, DELTA]  # (h_rejected − h_chosen) · Δ
MARGINS = [0.3, -0.3, 0.5]     # Δr = β · ((policy − reference) of the chosen − (policy − reference) of the rejected)


def test_t_keeps_swaps_or_drops_a_comparison_by_its_safety_labels():
    def transform(better_unsafe, worse_unsafe):
        unsafe = better_unsafe, worse_unsafe
        outcome, pair = safedpo_transform(Comparison("How?", ("better", "worse"), better=0, safer=0, unsafe=unsafe))
        return outcome, pair and pair.chosen

    assert transform(False, False) == ("kept", "better")
    assert transform(False, True) == ("kept", "better")
    assert transform(True, False) == ("swapped", "worse")  # the safe response is chosen, though it helps less
    assert transform(True, True) == ("dropped (both unsafe)", None)  # nothing to learn from: neither may be chosen


def test_the_loss_is_dpos_with_an_offset_on_safe_unsafe_pairs():
    per_pair = [-math.log(1 / (1 + math.exp(-(margin - offset)))) for margin, offset in zip(MARGINS, OFFSETS)]
    loss, _ = safedpo_loss(*POLICY, *REFERENCE, *UNSAFE, BETA, DELTA)
    assert float(loss) == pytest.approx(sum(per_pair) / 3)


def test_without_delta_it_is_dpo_on_the_same_pairs():
    assert safedpo_loss(*POLICY, *REFERENCE, *UNSAFE, BETA, delta=0.0)[0] == dpo_loss(*POLICY, *REFERENCE, BETA)[0]


def test_before_the_first_step_the_loss_has_a_closed_form():
    """Policy = reference: Δr is 0, and −log σ(−offset) = log(1 + e^offset). The first row of any run's metrics.jsonl
    can be checked with it."""
    loss, _ = safedpo_loss(*REFERENCE, *REFERENCE, *UNSAFE, BETA, DELTA)
    assert float(loss) == pytest.approx((math.log(2) + 2 * math.log(1 + math.exp(DELTA))) / 3)


def test_a_pair_pulls_with_weight_sigma_of_offset_minus_margin():
    """DPO's pull fades once Δr > 0; on a safe/unsafe pair it stays at full strength until Δr comes near Δ."""
    chosen = POLICY[0].clone().requires_grad_()
    safedpo_loss(chosen, POLICY[1], *REFERENCE, *UNSAFE, BETA, DELTA)[0].backward()
    weights = [1 / (1 + math.exp(-(offset - margin))) for margin, offset in zip(MARGINS, OFFSETS)]
    assert chosen.grad.tolist() == pytest.approx([-BETA * weight / 3 for weight in weights])
    assert weights[0] < 0.5 and weights[2] > 0.9999


# Proposition 4.4 on a problem with five responses, of which the two most helpful are unsafe. Comparisons come in
# the shares of the Bradley-Terry model, p(i ≻ j) = k_i / (k_i + k_j), so that 60 of each two are whole numbers.
WORTH, HARM, PRIOR = (1, 2, 3, 3, 6), (False, False, False, True, True), (0.1, 0.3, 0.1, 0.3, 0.2)


def population():
    """T of all comparisons: (chosen, rejected), indices of responses."""
    pairs = []
    for i, j in itertools.combinations(range(5), 2):
        wins = 60 * WORTH[i] // (WORTH[i] + WORTH[j])
        for better in (0,) * wins + (1,) * (60 - wins):
            comparison = Comparison("", (i, j), better, safer=0, unsafe=(HARM[i], HARM[j]))
            pair = safedpo_transform(comparison)[1]
            pairs += [(pair.chosen, pair.rejected)] if pair else []
    return torch.tensor(pairs).T


def optimised(delta, steps):
    """π, by gradient descent on SafeDPO's loss over the whole population from π = π_ref, β = 1."""
    chosen, rejected = population()
    reference, unsafe = torch.tensor(PRIOR, dtype=torch.float64).log(), torch.tensor(HARM)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        policy = logits.log_softmax(0)
        loss, _ = safedpo_loss(policy[chosen], policy[rejected], reference[chosen], reference[rejected],
                               unsafe[chosen], unsafe[rejected], 1.0, delta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(0)


def test_proposition_4_4_the_optimum_is_the_same_for_every_delta_and_is_the_constrained_one():
    """π* ∝ π_ref · exp(r) on the safe responses, with exp(r) = k, and none on the unsafe ones. (On these the loss has
    its infimum where their share is 0, which the logits only tend to.)"""
    safe = [prior * worth for prior, worth, harm in zip(PRIOR, WORTH, HARM) if not harm]
    for delta in (0.0, 5.0, 20.0):
        policy = optimised(delta, 2000).tolist()
        assert sum(policy[3:]) < 1e-3, delta
        assert policy[:3] == pytest.approx([share / sum(safe) for share in safe], abs=3e-3), delta


def test_delta_only_hastens_the_way_to_the_optimum():
    unsafe_left = [float(optimised(delta, 60)[3:].sum()) for delta in (0.0, 2.0, 5.0)]
    assert sorted(unsafe_left, reverse=True) == unsafe_left
    assert unsafe_left[0] > 1.5 * unsafe_left[2]
