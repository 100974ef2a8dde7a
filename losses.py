"""Every loss as a pure function of log-probabilities, scores or router weights.

Losses of pairs take float32 tensors of shape (N,), one entry per pair, log-probs in nats, and return (mean loss,
metrics): metrics is a dict of detached means under the names that TRL logs. With the implicit reward r(x, y) = beta ·
(log π(y|x) − log π_ref(y|x)), DPO, SafeDPO and SPE-DPO are −log σ(r(x, chosen) − r(x, rejected) − offset) and differ in
the offset alone.

Letters in shape comments: N pairs, K experts, L wrapped layers, G groups of preferences.
"""
import torch
import torch.nn.functional as F


def implicit_rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(r(x, chosen), r(x, rejected), their difference Δr), with r(x, y) = beta · (log π(y|x) − log π_ref(y|x))."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    return reward_chosen, reward_rejected, reward_chosen - reward_rejected


def preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, offset, label_smoothing=0.0):
    """−(1−ε) log σ(Δr − offset) − ε log σ(−(Δr − offset)), with Δr = r(x, chosen) − r(x, rejected).

    The common part of DPO, SafeDPO and SPE-DPO. offset: (N,) or a number, in units of reward.
    """
    reward_chosen, reward_rejected, reward_margin = implicit_rewards(policy_chosen, policy_rejected, ref_chosen,
                                                                     ref_rejected, beta)
    logit = reward_margin - offset
    loss = -(1 - label_smoothing) * F.logsigmoid(logit)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-logit)
    metrics = {"rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected, "rewards/margins": reward_margin,
               "rewards/accuracies": (reward_margin > 0).float(),
               "logps/chosen": policy_chosen, "logps/rejected": policy_rejected}
    return loss.mean(), {name: value.detach().mean() for name, value in metrics.items()}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """DPO: −log σ(Δr) (arXiv 2305.18290, Eq. 7); label_smoothing ε is the conservative variant.

    All log-probs (N,), in nats; beta > 0. Returns (loss, metrics).
    """
    return preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, 0.0, label_smoothing)


def safedpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_unsafe, rejected_unsafe, beta,
                 delta, label_smoothing=0.0):
    """SafeDPO: −log σ(Δr − (h_rejected − h_chosen)·Δ) (arXiv 2505.20065, Eq. 15).

    h is 1 for an unsafe response, 0 for a safe one: chosen_unsafe and rejected_unsafe, (N,), bool or float.
    Pairs come from `safedpo_transform`, so the chosen response is safe and the offset is Δ on safe/unsafe
    pairs and 0 on safe/safe ones. delta ≥ 0 leaves the optimum where it is (Prop. 4.4); 0 is DPO.
    """
    offset = (rejected_unsafe.float() - chosen_unsafe.float()) * delta
    return preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, offset, label_smoothing)


def spe_dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, margin, beta, label_smoothing=0.0):
    """SPE-DPO: −log σ(Δr − m) with m = max(0, s(chosen) − s(rejected)) (arXiv 2506.02460, Section 3.1).

    margin: (N,), m in units of the score model, clipped at 0 by `data.score_margin`. m = 0 is DPO.
    """
    loss, metrics = preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, margin,
                                    label_smoothing)
    return loss, {**metrics, "score_margin": margin.mean(), "score_clipped": (margin == 0).float().mean()}


def router_l1(safety, helpfulness):
    """MidPO's L1 term: mean over layers and tokens of |α| + |γ − 1| (arXiv 2506.02460, Section 3.2).

    safety α, helpfulness γ: (L, tokens), the experts' weights. It pulls towards "helpfulness on, safety off".
    """
    return (safety.abs() + (helpfulness - 1).abs()).mean()


def group_targets(num_groups, num_experts, soft_constraint):
    """PMoL's balanced targets D: (G, K), row i for data of preference i; rows sum to 1.

    D_i[k] ∝ 1 for the K/G experts of group i and ∝ 1 − s_c for the others: s_c = 0 balances the load over all
    experts, s_c = 1 keeps preference i to its own group. arXiv 2411.01245 gives no formula: this form is ours.
    soft_constraint: one number in [0, 1], or one per group.
    """
    own_group = torch.arange(num_experts) // (num_experts // num_groups) == torch.arange(num_groups)[:, None]  # (G, K)
    others = (1 - torch.as_tensor(soft_constraint, dtype=torch.float32)).expand(num_groups)[:, None]
    target = torch.where(own_group, 1.0, others)
    return target / target.sum(-1, keepdim=True)


def expert_group_soft_loss(router_weights, group, target):
    """PMoL's expert group soft loss: mean over layers and tokens of KL(D_i ‖ w[:K]) (arXiv 2411.01245, Section 3).

    router_weights: (L, tokens, K + 1), the last slot being the empty expert, or (L, tokens, K) without one; group:
    (tokens,), the preference i of each token's pair; target: (G, K) of `group_targets`. w[:K] is not renormalised:
    KL(D‖w[:K]) = KL(D‖w[:K]/Σ) − log(1 − w_empty), so this also keeps the empty expert from taking everything.
    """
    target = target[group]                                                                    # (tokens, K)
    logs = router_weights[..., :target.shape[-1]].clamp(min=torch.finfo(torch.float32).tiny).log()
    return -(torch.special.entr(target).sum(-1) + (target * logs).sum(-1)).mean()             # 0 · log 0 = 0


def moe_dpo_loss(policy_logps, ref_logps, log_gate, beta, objective="elbo", annotator=None, q_temperature=1.0):
    """Mix-/MoE-DPO: a mixture of Bradley–Terry models, p = Σ_k w_k σ(Δr_k) (arXiv 2510.08256, Section 3).

    policy_logps: (K, N, 2), chosen and rejected; ref_logps: the same, each expert against its own reference, or (N, 2),
    one for all; log_gate: (N, K), log w(x). With Δr_k of `implicit_rewards`, the loss per pair is, by objective:
    - "elbo": −Σ_k q_k [log σ(Δr_k) + log w_k − log q_k], q_k ∝ w_k σ(Δr_k) without gradient (the E-step). Its value
      and its gradients are those of −log p. q_temperature T ≠ 1 tempers the E-step, q^(1/T): the bound is then loose.
    - "weights": −Σ_k w_k log σ(Δr_k), the form in the paper's poster; by Jensen's inequality an upper bound on −log p.
    annotator (N,): pairs of the same annotator share one latent expert, q ∝ w Π_i σ(Δr_k,i); their prior is the mean
    of the gate's log w over them, renormalised. None: each pair has a latent expert of its own.
    Returns (loss, metrics).
    """
    *_, reward_margin = implicit_rewards(*policy_logps.unbind(-1), *ref_logps.unbind(-1), beta)
    reward_margin = reward_margin.T                                           # (N, K)
    fit = F.logsigmoid(reward_margin)
    if objective == "weights":
        loss, q = -(log_gate.exp() * fit).sum(-1), (log_gate + fit).detach().softmax(-1)
    else:
        prior, evidence, count = log_gate, fit, 1
        if annotator is not None:
            same = (annotator[:, None] == annotator).to(fit.dtype)            # (N, N)
            count = same.sum(-1, keepdim=True)                                # (N, 1) pairs of this one's annotator
            prior, evidence = (same @ log_gate / count).log_softmax(-1), same @ fit
        log_q = ((prior + evidence).detach() / q_temperature).log_softmax(-1)
        q = log_q.exp()
        loss = (q * (log_q - prior - evidence) / count).sum(-1)               # an annotator's pairs add up to one loss
    gate, reward_margin = log_gate.detach().exp(), reward_margin.detach()
    likelihood = (log_gate + fit).detach().logsumexp(-1)
    metrics = {"log_likelihood": likelihood.mean(), "rewards/margins": (gate * reward_margin).sum(-1).mean(),
               "rewards/accuracies": ((gate * reward_margin.sigmoid()).sum(-1) > 0.5).float().mean(),
               **{f"responsibility/{k}": mean for k, mean in enumerate(q.mean(0))},
               **{f"gate/{k}": mean for k, mean in enumerate(gate.mean(0))}}
    return loss.mean(), metrics


def reward_loss(chosen, rejected):
    """Bradley–Terry: −log σ(s(chosen) − s(rejected)) (arXiv 2203.02155, Eq. 1). Scores (N,); (loss, metrics)."""
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), {"accuracy": (margin > 0).float().mean(), "margin": margin.detach().mean()}


def cost_loss(safer, other, safer_unsafe, other_unsafe):
    """Bradley–Terry on which response is the more unsafe, plus −log σ(sign · c) for each response, sign being +1 where
    it is unsafe and −1 where it is safe (arXiv 2310.12773, Eq. 6): c > 0 comes to mean unsafe.

    safer, other: costs (N,); safer_unsafe, other_unsafe: (N,) flags, 1 for unsafe. Returns (loss, metrics).
    """
    signed = torch.cat([safer * (2 * safer_unsafe - 1), other * (2 * other_unsafe - 1)])  # (2N,)
    loss, metrics = reward_loss(other, safer)
    return loss - 2 * F.logsigmoid(signed).mean(), {**metrics, "sign_accuracy": (signed > 0).float().mean()}


def sft_loss(logps, lengths):
    """Cross-entropy per response token: −Σ log π(y|x) / Σ |y|. logps, lengths: (N,). Returns (loss, metrics)."""
    loss = -logps.sum() / lengths.sum().clamp(min=1)
    return loss, {"perplexity": loss.detach().exp(), "logps/chosen": logps.detach().mean()}
