"""LoRA experts over a frozen model, K low-rank pairs per linear layer in two matrix products, and their routers.

Every expert is a pair (A_k: R×D_in, B_k: D_out×R). Stacked, they are A: (K·R)×D_in and B: D_out×(K·R), so that

    W x + scale · Σ_k w_k B_k A_k x  =  W x + scale · B (w̃ ⊙ (A x)),   w̃ repeating each w_k R times.

One expert with w = 1 is plain LoRA (arXiv 2106.09685); w = 0 is the base model. The weights w come from a router in
every layer (MidPO, PMoL), or are one-hot for a whole expert policy (Mix- and MoE-DPO), which a gate chooses.

Read in this order: routers, the gate, ExpertLinear, attaching and freezing experts, log-probs of the experts as whole
policies, which of them answers, merging.
Letters in shape comments: B rows, T tokens per row, N pairs, K experts, R rank (in log-probs: responses), D width,
L wrapped layers.
"""
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from batch import batches, encode, sequence_logps
from common import UserError, gathered, one_line, shard_like


class Router(nn.Module):
    """Weights of the experts in one layer. A new kind is a subclass and its name in ROUTERS. forward(x) gives the
    probabilities of the experts for each token, (..., K), or (..., K + 1) with an empty expert; losses and reports read
    them. mix(probabilities) gives the weights by which the experts' outputs are summed: the same numbers, except in a
    router that chooses experts, such as the best two. spec: the settings from which `make_router` makes it again.
    """

    def __init__(self, **spec):
        super().__init__()
        self.spec = spec

    def mix(self, probabilities):
        return probabilities


class ConstantRouter(Router):
    """The same weights for every token, (K,), or for every token of a block of rows: (P, K) for P blocks of equal size.
    Plain LoRA is one expert with weight 1."""

    def __init__(self, weights):
        weights = torch.as_tensor(weights, dtype=torch.float32)
        super().__init__(type="constant", weights=weights.tolist())
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, x):
        if self.weights.dim() == 1:
            return self.weights
        rows = self.weights.repeat_interleave(len(x) // len(self.weights), 0)           # (B, K) for x (B, T, D)
        return rows.view(len(x), *[1] * (x.dim() - 2), -1)                              # (B, 1, K)


class SigmoidRouter(Router):
    """MidPO's router (arXiv 2506.02460, Section 3.2): for each expert σ of a linear chain D_in → hidden → D_in → 1.
    Weights are independent (no softmax): they need not sum to 1. There is no activation between the layers, so
    W3 W2 W1 is one vector, and a token costs one dot product instead of 2 · hidden · D_in multiplications."""

    def __init__(self, d_in, num_experts, generator=None, hidden=512):
        super().__init__(type="sigmoid", hidden=hidden)
        self.networks = nn.ModuleList(
            nn.ModuleList([seeded_linear(d_in, hidden, True, generator), seeded_linear(hidden, d_in, True, generator),
                           seeded_linear(d_in, 1, True, generator)]) for _ in range(num_experts))
        self.cached = None                               # (parameter versions, vectors, biases), for generation

    def chains(self):
        """(vectors, biases), (K, D_in) and (K,): vector · x + bias is what a network's three layers compute. Without
        gradients they are cached until a parameter changes."""
        versions = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if not torch.is_grad_enabled() and self.cached and self.cached[0] == versions:
            return self.cached[1:]
        vectors, biases = [], []
        with torch.autocast(self.networks[0][0].weight.device.type, enabled=False):  # no tokens: float32 costs nothing
            for first, second, third in self.networks:
                inner = third.weight @ second.weight                                            # (1, hidden)
                vectors.append(inner @ first.weight)
                biases.append(third.bias + third.weight @ second.bias + inner @ first.bias)
        chains = torch.cat(vectors), torch.cat(biases)
        self.cached = None if torch.is_grad_enabled() else (versions, *chains)
        return chains

    def forward(self, x):
        vectors, biases = self.chains()
        return F.linear(x, vectors.to(x.dtype), biases.to(x.dtype)).float().sigmoid()               # (..., K)


class SoftmaxRouter(Router):
    """PMoL's router (arXiv 2411.01245): softmax(W x / temperature) over K experts and the empty expert, the last slot,
    which computes nothing, so that the real experts' weights sum to less than 1. empty=False leaves it out."""

    def __init__(self, d_in, num_experts, generator=None, empty=True, temperature=1.0):
        super().__init__(type="softmax", empty=empty, temperature=temperature)
        self.linear = seeded_linear(d_in, num_experts + empty, False, generator)
        self.temperature = temperature

    def forward(self, x):
        return (F.linear(x, self.linear.weight.to(x.dtype)).float() / self.temperature).softmax(-1)  # (..., K + 1)


ROUTERS = {"sigmoid": SigmoidRouter, "softmax": SoftmaxRouter}  # learned ones, made from (d_in, K, generator, settings)
GATES = ("constant", "prompt", "user")  # learned ones


def make_router(spec, d_in, num_experts, generator=None):
    """The router of a specification {"type": "constant" or a name in ROUTERS, …its settings}."""
    settings = {name: value for name, value in spec.items() if name != "type" and value is not None}
    if spec["type"] == "constant":
        weights = settings.get("weights", [1.0] * num_experts)
        if len(weights) != num_experts:
            raise UserError(f"{len(weights)} weights for {num_experts} experts")
        return ConstantRouter(weights)
    router = ROUTERS[spec["type"]](d_in, num_experts, generator, **settings)
    router.spec["type"] = spec["type"]  # a subclass is stored by its own name
    return router


def seeded_linear(d_in, d_out, bias, generator):
    """A linear layer whose parameters are drawn by this generator from ±1/sqrt(D_in), PyTorch's default range."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator)
    return layer


class Gate(nn.Module):
    """Mix- and MoE-DPO's gate, one for the whole model: log w of each prompt, (N, K) (arXiv 2510.08256, Section 3).

    kind: "fixed" (weights are given), "constant" (learned, the same for every prompt), "prompt" (a linear map of the
    prompt's mean hidden state under the frozen base) or "user" (a vector for each name in `groups`, an annotator or a
    preference; an unknown user, number -1, gets the mean of them all). Learned gates start uniform.
    """

    def __init__(self, kind, num_experts, width=0, groups=(), weights=()):
        super().__init__()
        self.kind = kind
        self.spec = {"kind": kind, "width": width, "groups": list(groups), "weights": list(weights)}
        rows = {"fixed": 0, "constant": 0, "prompt": width, "user": len(groups)}[kind]
        start = torch.tensor(weights, dtype=torch.float32).log() if kind == "fixed" else torch.zeros(num_experts)
        self.bias = nn.Parameter(start, requires_grad=kind != "fixed")
        self.weight = nn.Parameter(torch.zeros(rows, num_experts)) if rows else None

    def forward(self, pooled=None, group=None):
        """pooled: (N, D) of `pooled_states`; group: (N,) user numbers. Returns (N, K), or (1, K) for all prompts."""
        logits = self.bias
        if self.kind == "prompt":
            logits = logits + pooled.float() @ self.weight
        elif self.kind == "user":
            logits = logits + torch.cat([self.weight, self.weight.mean(0, keepdim=True)])[group]
        return logits.log_softmax(-1).view(-1, logits.shape[-1])


class ExpertLinear(nn.Module):
    """A frozen linear layer plus K stacked LoRA experts, weighted by a router.

    A is drawn uniformly from ±1/sqrt(D_in), PEFT's default, and B is zero, so that training starts at the base
    model. scale = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732); it applies under every router
    (MidPO's official router model leaves out the factor that its experts were trained with).
    `weights` holds the router's probabilities of the last forward pass: losses and reports need no second pass.
    """

    def __init__(self, base, rank, alpha, num_experts=1, router=None, rslora=False, generator=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.num_experts, self.rslora = rank, alpha, num_experts, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.router = router or ConstantRouter(torch.ones(num_experts))
        bound = 1 / math.sqrt(base.in_features)
        lora_A = torch.empty(num_experts * rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, num_experts * rank, device=base.weight.device))
        self.enabled, self.weights = True, None

    def forward(self, x, weights=None):
        """x (..., D_in) -> (..., D_out). weights: (..., K), to mix the experts without asking the router."""
        if not self.enabled:
            return self.base(x)
        if weights is None:
            self.weights = self.router(x)                                               # (..., K) or (..., K + 1)
            weights = self.router.mix(self.weights)
        scaled = weights[..., :self.num_experts, None] * self.scale                     # (..., K, 1)
        low = F.linear(x, self.lora_A.to(x.dtype)).unflatten(-1, (self.num_experts, self.rank))
        low = (low * scaled.to(x.dtype)).flatten(-2)                                    # (..., K·R)
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype))

    def merged_weight(self):
        """W + scale · Σ_k w_k B_k A_k in float32, for a router whose weights do not depend on the input."""
        constant = isinstance(self.router, ConstantRouter) and self.router.weights.dim() == 1  # for every token the same
        assert self.enabled and constant, "only constant weights can be merged"
        weights = self.router.weights.repeat_interleave(self.rank) * self.scale         # (K·R,)
        return gathered(self.base.weight).float() + (self.lora_B * weights) @ self.lora_A


def expert_layers(model):
    """{name: ExpertLinear} of the wrapped layers, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}


def count_experts(model):
    """K, or 0 for a model without experts."""
    return max((layer.num_experts for layer in expert_layers(model).values()), default=0)


def is_routed(model):
    """True if learned routers mix the experts."""
    return any(not isinstance(layer.router, ConstantRouter) for layer in expert_layers(model).values())


def router_weights(model, tokens):
    """Router probabilities of the last forward pass: (L, tokens, slots). tokens: flat positions, or (B·T,) bool."""
    return torch.stack([layer.weights.flatten(0, -2)[tokens] for layer in expert_layers(model).values()])


def add_experts(model, targets, rank, alpha, num_experts=1, rslora=False, seed=0, router=None):
    """Freeze the model and wrap every linear layer that `targets` selects. Returns the model.

    targets: a list of layer names ("down_proj", "mlp.up_proj"), "all-linear" (every one but the head), "mlp" (those
    of the MLPs), or a regular expression that matches whole module names, as PEFT reads it. router: a specification
    for `make_router`; default: constant weights of 1. Raises UserError when a target selects nothing.
    """
    assert not expert_layers(model), "the model has experts already; merge_experts(model) first"
    chosen = select_modules(targets, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        base = model.get_submodule(name)
        model.set_submodule(name, ExpertLinear(base, rank, alpha, num_experts, rslora=rslora, generator=generator))
    return set_routers(model, router or {"type": "constant"}, seed)


def set_routers(model, spec, seed=0):
    """Give every wrapped layer a new router; the experts are unchanged. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        router = make_router(spec, layer.base.in_features, layer.num_experts, generator)
        layer.router = router.to(layer.base.weight.device)
    return model


@torch.no_grad()
def perturb_experts(model, deviation, seed=0):
    """Add normal noise of this standard deviation to every expert's B, so that experts do not start equal."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        layer.lora_B += torch.normal(0.0, deviation, layer.lora_B.shape, generator=generator).to(layer.lora_B.device)
    return model


@torch.no_grad()
def add_head_copies(model, num_experts, seed=0):
    """K full copies of the head as experts on one trunk (arXiv 2510.08256, Case 1). Returns the model. Copy k is
    W + B_k A_k with a fixed random rotation A_k, so B_k can learn any difference. Copies start equal; with A_k = I they
    would also get equal gradients and stay equal."""
    width = model.config.hidden_size
    layer = add_experts(model, ["lm_head"], width, width, num_experts, seed=seed).lm_head
    rotations = torch.linalg.qr(layer.lora_A.view(-1, width, width)).Q                  # (K, D, D)
    layer.lora_A = nn.Parameter(rotations.reshape(-1, width), requires_grad=False)
    return model


def add_gate(model, gate, groups=()):
    """Give a mixture its gate: a learned kind ("constant", "prompt", "user") or K positive numbers, its fixed weights.
    groups: the users of a gate on users. Returns the model."""
    width, kind = model.config.hidden_size, gate if isinstance(gate, str) else "fixed"
    weights = [weight / sum(gate) for weight in gate] if kind == "fixed" else ()
    model.gate = Gate(kind, count_experts(model), width, groups if kind == "user" else (), weights)
    model.gate.to(model.model.embed_tokens.weight.device)
    return model


def gate_of(model):
    """The gate of a mixture, None of another model."""
    return getattr(model, "gate", None)


def select_modules(targets, names, where="lora_targets"):
    """The names that `targets` selects: "mlp", or PEFT's rules. Raises UserError when a target selects nothing."""
    if isinstance(targets, str):
        pattern = {"all-linear": "(?!lm_head$|score$).*", "mlp": r".*\.mlp\..*"}.get(targets, targets)
        chosen = [name for name in names if matches(pattern, name, where)]
    else:
        chosen = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in chosen):
                layers = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise UserError(f"{where}: no layer is called {target!r}; there are {layers}")
    if not chosen:
        raise UserError(f"{where}: {targets!r} selects no layer")
    return chosen


def matches(pattern, name, where):
    """True if a regular expression matches the whole name. Raises UserError if it is not valid, or may never end."""
    with one_line(f"{where}: {pattern!r:.60} cannot be used as a regular expression",
                  (re.error, OverflowError, RecursionError)):
        if re.search(r"\)[*+{]", pattern):
            raise re.error("it repeats a group")
        return re.fullmatch(pattern, name) is not None


def use_expert(model, number):
    """Give this expert weight 1 and the others 0, until changed. number: () for all rows of a batch, or (P,), one for
    each of P blocks of rows of equal size."""
    number = torch.as_tensor(number, device=model.model.embed_tokens.weight.device)
    one_hot = (number[..., None] == torch.arange(count_experts(model), device=number.device)).float()  # (…, K)
    for layer in expert_layers(model).values():
        assert isinstance(layer.router, ConstantRouter), "only whole experts can be chosen"
        layer.router.weights = one_hot


def expert_logps(model, batch):
    """log π_k(y|x) of every expert policy on a packed batch: (K, N, R), float32, in nats. One forward pass, on K
    copies of the rows or, where the experts are heads, through the trunk once."""
    K, experts = count_experts(model), expert_layers(model)
    if list(experts) == ["lm_head"]:
        hidden = model(batch.tokens, batch.positions, batch.mask())                     # (B, T, D)
        return torch.stack([sequence_logps(model, hidden, batch, partial(model.lm_head, weights=one_hot))
                            for one_hot in torch.eye(K, device=hidden.device)])
    use_expert(model, torch.arange(K, device=batch.tokens.device))                      # of K copies of the rows
    fields = "tokens", "positions", "pair", "part"
    copies = replace(batch, **{name: getattr(batch, name).repeat(K, 1) for name in fields})
    hidden = model(copies.tokens, copies.positions, copies.mask())                      # (K·B, T, D)
    return torch.stack([sequence_logps(model, states, batch) for states in hidden.chunk(K)])


def mixture_logps(model, batch):
    """Log-probs of every expert, (K, N, R), and the gate's log w, (N, K)."""
    log_gate = model.gate(batch.labels.get("pooled"), batch.labels["group"])
    return expert_logps(model, batch), log_gate.expand(len(batch.lengths), -1)


@contextmanager
def disable_experts(model):
    """Inside this block the experts are switched off (w = 0): the model is its base."""
    layers = [layer for layer in expert_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def pooled_states(model, encoded, batch_size=64):
    """The mean of each prompt's hidden states under the frozen base, for the gate: (N, D) float32."""
    pooled = np.empty((len(encoded), model.config.hidden_size), dtype=np.float32)
    for indices, batch in batches(encoded, batch_size, next(model.parameters()).device, longest_first=False):
        with disable_experts(model):
            hidden = model(batch.tokens, batch.positions, batch.mask()).float()
        in_prompt = (batch.part == 0) & (batch.pair >= 0)                               # (B, T)
        sums = hidden.new_zeros(len(indices), hidden.shape[-1]).index_add(0, batch.pair[in_prompt], hidden[in_prompt])
        pooled[indices] = (sums / batch.pair[in_prompt].bincount()[:, None]).cpu()
    return pooled


def choose_experts(model, tokenizer, prompts, use="mixture", users="", seed=0):
    """The expert that answers each rendered prompt, (N,). use: "mixture" draws it from the gate's w(x), "sparse" takes
    the one with the largest w, a number names it; UserError for any other. users: for a user gate, cycle through those
    with this name prefix; if empty, the average."""
    K = len(model.gate.bias)
    if use not in ("mixture", "sparse", *map(str, range(K))):
        raise UserError(f"--use {use}: expected mixture, sparse or an expert's number from 0 to {K - 1}")
    if use.isdecimal():
        return torch.full((len(prompts),), int(use))
    numbers = [i for i, name in enumerate(model.gate.spec["groups"]) if users and name.startswith(users)] or [-1]
    device, pooled = model.gate.bias.device, None
    if model.gate.kind == "prompt":
        encoded = encode(tokenizer, prompts, [("",)] * len(prompts), model.config.max_positions)
        pooled = torch.from_numpy(pooled_states(model, encoded)).to(device)
    user = torch.tensor([numbers[i % len(numbers)] for i in range(len(prompts))], device=device)
    weights = model.gate(pooled, user).detach().exp().cpu().expand(len(prompts), -1)    # (N, K)
    if use == "sparse":
        return weights.argmax(-1)
    return torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def trainable_parameters(model):
    """[(name, parameter)] of what the optimiser updates: the experts, or all weights where there are none."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_experts(model):
    """Add the experts, at constant weights, to the base weights. Returns the model, now a plain one, without a gate."""
    if gate_of(model):
        del model.gate
    for name, layer in expert_layers(model).items():
        if name == "lm_head" and model.config.tied:  # the embedding does not change, so they are tied no longer
            layer.base.weight = nn.Parameter(layer.base.weight.clone())
            model.config = replace(model.config, tied=False, hf={**model.config.hf, "tie_word_embeddings": False})
        layer.base.weight.copy_(shard_like(layer.merged_weight(), layer.base.weight))
        model.set_submodule(name, layer.base)
    return model


def is_router(name):
    """True if the parameter of this name belongs to a router or the gate."""
    return ".router." in name or name.startswith("gate.")


def is_mixture(name):
    """True if the tensor of this name belongs to the experts, routers or gate, and not to the base."""
    return "lora_" in name or is_router(name)


@torch.no_grad()
def gate_report(model):
    """{"kind", "experts": names, "weights": the experts' weights, for a user gate those of an unknown user, "users":
    {user: weights}}. A prompt gate has "weight" (D, K) and "bias" in their place: the experts' weights are softmax(mean
    hidden state of the prompt under the base · weight + bias)."""
    gate, users = model.gate, model.gate.spec["groups"]
    report = {"kind": gate.kind, "experts": [f"expert-{k}" for k in range(len(gate.bias))]}
    if gate.kind == "prompt":
        return report | {"weight": gate.weight.tolist(), "bias": gate.bias.tolist()}
    unknown, *weights = gate(group=torch.arange(-1, len(users), device=gate.bias.device)).exp().tolist()
    return report | {"weights": unknown} | ({"users": dict(zip(users, weights))} if gate.kind == "user" else {})
