"""LoRA experts over a frozen model, K low-rank pairs per linear layer in two matrix products, and their routers.

With every expert a pair (A_k: R×D_in, B_k: D_out×R), stacked to A: (K·R)×D_in and B: D_out×(K·R),

    W x + scale · Σ_k w_k B_k A_k x  =  W x + scale · B (w̃ ⊙ (A x)),   w̃ repeating each w_k R times.

One expert with w = 1 is plain LoRA (arXiv 2106.09685); w = 0 is the reference policy. Where w comes from is
the router's business. Letters in shape comments: K experts, R rank, D width, L wrapped layers.
"""
import json
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import ACTIVATIONS, UserError, first_line, read_json, replacing_folder, stored_name


def seeded_linear(d_in, d_out, bias, generator):
    """A linear layer whose parameters are drawn by this generator from ±1/sqrt(D_in), PyTorch's own range."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    return layer


class ConstantRouter(nn.Module):
    """The same weights for every token: (K,), or (B, K) for each row. Plain LoRA is one expert with weight 1."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, x):
        if self.weights.dim() == 1:
            return self.weights
        return self.weights.view(len(self.weights), *[1] * (x.dim() - 2), -1)           # (B, 1, K) for x (B, T, D)


class SigmoidRouter(nn.Module):
    """MidPO's router (arXiv 2506.02460, Section 3.2): for each expert σ of a network D_in → hidden → D_in → 1.

    Weights are dense and apart: they need not sum to 1. activation: a name in ACTIVATIONS that stands between the
    layers; the default "" is the paper's linear chain, which is multiplied from its last layer backwards: W3 W2 W1
    is one vector, so a token costs one dot product instead of 2 · hidden · D_in multiplications and no memory.
    """

    def __init__(self, d_in, num_experts, generator=None, hidden=512, activation=""):
        super().__init__()
        self.networks = nn.ModuleList(
            nn.ModuleList([seeded_linear(d_in, hidden, True, generator), seeded_linear(hidden, d_in, True, generator),
                           seeded_linear(d_in, 1, True, generator)]) for _ in range(num_experts))
        self.activation = ACTIVATIONS[activation] if activation else None
        self.kept = None                                 # (what the parameters were, vectors, biases), for generation

    def chain(self, network):
        """(vector, bias) with vector · x + bias = the three layers, one after the other: (1, D_in), (1,)."""
        vector, bias = network[2].weight, network[2].bias
        for layer in (network[1], network[0]):
            vector, bias = vector @ layer.weight, bias + vector @ layer.bias
        return vector, bias

    def chains(self):
        """The chain of every network: (K, D_in), (K,). Without gradients it is kept until a parameter changes."""
        state = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if torch.is_grad_enabled() or self.kept is None or self.kept[0] != state:
            device = self.networks[0][0].weight.device.type
            with torch.autocast(device, enabled=False):  # a product of weights, not of tokens: float32 costs nothing
                vectors, biases = (torch.cat(parts) for parts in zip(*map(self.chain, self.networks)))
            self.kept = None if torch.is_grad_enabled() else (state, vectors, biases)
            return vectors, biases
        return self.kept[1:]

    def forward(self, x):
        if self.activation is None:
            vectors, biases = self.chains()
            return F.linear(x, vectors.to(x.dtype), biases.to(x.dtype)).float().sigmoid()           # (..., K)
        scores = []
        for first, second, last in self.networks:
            inner = self.activation(F.linear(x, first.weight.to(x.dtype), first.bias.to(x.dtype)))
            inner = self.activation(F.linear(inner, second.weight.to(x.dtype), second.bias.to(x.dtype)))
            scores.append(F.linear(inner, last.weight.to(x.dtype), last.bias.to(x.dtype)))
        return torch.cat(scores, dim=-1).float().sigmoid()


class SoftmaxRouter(nn.Module):
    """PMoL's router (arXiv 2411.01245): softmax(W x / temperature) over K experts and the empty one, the last slot.

    The empty expert computes nothing, so the real experts' weights sum to less than 1. empty=False leaves it out.
    """

    def __init__(self, d_in, num_experts, generator=None, empty=True, temperature=1.0):
        super().__init__()
        self.linear = seeded_linear(d_in, num_experts + empty, False, generator)
        self.temperature = temperature

    def forward(self, x):
        return (F.linear(x, self.linear.weight.to(x.dtype)).float() / self.temperature).softmax(-1)


class Gate(nn.Module):
    """Mix- and MoE-DPO's gate, one for the whole model: log w of each prompt, (N, K) (arXiv 2510.08256, Section 3).

    kind: "fixed" (weights are given), "constant" (learned, the same for every prompt), "prompt" (a linear map of the
    prompt's pooled hidden state under the frozen base) or "user" (a vector for each annotator or group; one that is
    not in `groups`, number -1, gets the mean of them all). Learned gates start uniform.
    """

    def __init__(self, kind, num_experts, width=0, groups=(), weights=()):
        super().__init__()
        self.kind = kind
        self.spec = {"kind": kind, "width": width, "groups": list(groups), "weights": list(weights)}
        rows = {"prompt": width, "user": len(groups)}.get(kind, 0)
        start = torch.tensor(weights, dtype=torch.float32).log() if kind == "fixed" else torch.zeros(num_experts)
        self.bias = nn.Parameter(start, requires_grad=kind != "fixed")
        self.weight = nn.Parameter(torch.zeros(rows, num_experts)) if rows else None

    def forward(self, pooled=None, group=None):
        """pooled: (N, D) of `pooled_states`; group: (N,) numbers. Returns (N, K), or (1, K) where no prompt matters."""
        logits = self.bias
        if self.kind == "prompt":
            logits = logits + pooled.float() @ self.weight
        elif self.kind == "user":
            logits = logits + torch.cat([self.weight, self.weight.mean(0, keepdim=True)])[group]
        return logits.log_softmax(-1).view(-1, logits.shape[-1])


def make_router(spec, d_in, num_experts, generator=None):
    """The router that a specification names: {"type": "constant" | "sigmoid" | "softmax", …its settings}."""
    settings = {name: value for name, value in spec.items() if name != "type"}
    if spec["type"] == "constant":
        return ConstantRouter(settings.get("weights", [1.0] * num_experts))
    return {"sigmoid": SigmoidRouter, "softmax": SoftmaxRouter}[spec["type"]](d_in, num_experts, generator, **settings)


class ExpertLinear(nn.Module):
    """A frozen linear layer plus K stacked LoRA experts, weighted by a router.

    A is drawn uniformly from ±1/sqrt(D_in), PEFT's default, and B is zero, so that training starts at the base
    model. scale = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732); it applies under every router
    (MidPO's official router model leaves out the factor that its experts were trained with).
    `weights` holds what the router gave in the last forward pass, (..., K) or with an empty expert (..., K + 1), for
    losses and reports: no second pass is needed.
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

    def forward(self, x):
        if not self.enabled:
            return self.base(x)
        self.weights = self.router(x)                                                   # (..., K) or (..., K + 1)
        weights = self.weights[..., :self.num_experts, None] * self.scale               # (..., K, 1)
        low = F.linear(x, self.lora_A.to(x.dtype)).unflatten(-1, (self.num_experts, self.rank))
        low = (low * weights.to(x.dtype)).flatten(-2)                                   # (..., K·R)
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype))

    def merged_weight(self):
        """W + scale · Σ_k w_k B_k A_k in float32, for a router whose weights do not depend on the input."""
        assert isinstance(self.router, ConstantRouter), "only constant weights can be merged"
        weights = self.router.weights.repeat_interleave(self.rank) * self.scale         # (K·R,)
        return self.base.weight.float() + (self.lora_B * weights) @ self.lora_A


def expert_layers(model):
    """Yield (name, ExpertLinear) for every wrapped layer, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            yield name, module


def router_weights(model, kept):
    """What the routers gave in the last forward pass: (L, tokens, slots). kept: flat positions, or (B·T,) bool."""
    return torch.stack([layer.weights.flatten(0, -2)[kept] for _, layer in expert_layers(model)])


def add_experts(model, targets, rank, alpha, num_experts=1, rslora=False, seed=0, router=None):
    """Freeze the model and wrap every linear layer that `targets` selects. Returns the model.

    targets: a list of layer names ("down_proj", "mlp.up_proj"), "all-linear" (every one but the head), "mlp" (those
    of the MLPs), or a regular expression that matches whole module names, as PEFT reads it. router: a specification
    for `make_router`; default: constant weights of 1. Raises UserError when a target selects nothing.
    """
    assert not any(True for _ in expert_layers(model)), "the model has experts already; merge_experts(model) first"
    chosen = select_modules(targets, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        wrap_linear(model, name, rank, alpha, num_experts, rslora=rslora, generator=generator)
    return set_routers(model, router or {"type": "constant"}, seed)


def set_routers(model, spec, seed=0):
    """Give every wrapped layer a fresh router; experts stay as they are. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in expert_layers(model):
        router = make_router(spec, layer.base.in_features, layer.num_experts, generator)
        layer.router = router.to(layer.base.weight.device)
    model.router_spec = spec
    return model


def select_modules(targets, names):
    """The names that `targets` selects: "mlp", or by PEFT's rules. Raises UserError when a target selects nothing."""
    if targets == "all-linear":
        return [name for name in names if name not in ("lm_head", "score")]
    if targets == "mlp":
        return [name for name in names if ".mlp." in name]
    if isinstance(targets, str):
        chosen = [name for name in names if re.fullmatch(targets, name)]
    else:
        chosen = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in chosen):
                known = sorted({name.rpartition(".")[2] for name in names})
                raise UserError(f"lora_targets: no layer is called {target!r}; there are {', '.join(known)}")
    if not chosen:
        raise UserError(f"lora_targets: {targets!r} selects no layer")
    return chosen


def wrap_linear(model, name, rank, alpha, num_experts=1, **settings):
    """Put an ExpertLinear in the place of the linear layer called `name`, and return it."""
    parent, _, key = name.rpartition(".")
    layer = ExpertLinear(model.get_submodule(name), rank, alpha, num_experts, **settings)
    setattr(model.get_submodule(parent), key, layer)
    return layer


def use_expert(model, number):
    """From now on the model is expert `number` alone: one for all rows, or (B,), one for each row of a batch."""
    for _, layer in expert_layers(model):
        assert isinstance(layer.router, ConstantRouter), "only whole experts can be chosen"
        chosen = F.one_hot(torch.as_tensor(number), layer.num_experts).float()          # (K,) or (B, K)
        layer.router.weights = chosen.to(layer.base.weight.device)


class OneExpert:
    """What `sequence_logps` needs of a model, its head, under expert k; also when the backward pass recomputes it."""

    def __init__(self, model, k):
        self.model, self.k, self.config = model, k, model.config

    def logits(self, hidden):
        use_expert(self.model, self.k)
        return self.model.logits(hidden)


@contextmanager
def reference(model):
    """Inside this block the experts are switched off (w = 0): the model is its own reference policy."""
    layers = [layer for _, layer in expert_layers(model)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def trainable_parameters(model):
    """[(name, parameter)] of what the optimiser moves: the experts, or all weights where there are none."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_experts(model):
    """Fold the experts into the base weights, for good, leaving a plain model that `save_pretrained` accepts."""
    for name, layer in list(expert_layers(model)):
        if name == "lm_head" and model.config.tied:  # the embedding stays what it is, so the two part
            layer.base.weight = nn.Parameter(layer.base.weight.clone())
            model.config = replace(model.config, tied=False, hf={**model.config.hf, "tie_word_embeddings": False})
        layer.base.weight.copy_(layer.merged_weight())
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer.base)
    return model


# What load_adapter reads of adapter_config.json, and keys that do not change what the adapter computes.
READ_KEYS = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"}
HARMLESS_KEYS = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
                 "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"}
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others, such as PiSSA, change the base weights too


def peft_modules(model):
    """{PEFT's name of a linear layer: our names of it}: the same but for GPT-2, whose c_attn is our q, k and v."""
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            name = name.removesuffix(".base")
            modules.setdefault(stored_name(model.config, name), []).append(name)
    return modules


def fuse(layers, names):
    """A (R, D_in) and B (D_out, R) of one PEFT layer, whose parts are ours: GPT-2's q, k and v share one A.

    Loaded adapters share it still. Trained apart they do not, and then A stacks theirs and B is block-diagonal;
    a part without experts has a block of zeros.
    """
    parts = [layers.get(name) for name in names]
    there = [part for part in parts if part is not None]
    width = there[0].base.out_features
    if all(torch.equal(part.lora_A, there[0].lora_A) for part in there):
        zeros = torch.zeros_like(there[0].lora_B)
        return there[0].lora_A, torch.cat([zeros if part is None else part.lora_B for part in parts])
    rank = there[0].rank
    B = there[0].lora_B.new_zeros(len(parts) * width, len(there) * rank)
    for i, part in enumerate(parts):
        if part is not None:
            j = there.index(part)
            B[i * width:(i + 1) * width, j * rank:(j + 1) * rank] = part.lora_B
    return torch.cat([part.lora_A for part in there]), B


def save_adapter(model, folder, base_name=None):
    """Write a model's single expert in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_name: what the adapter belongs to, for PEFT's own loader (default: the folder the model came from).
    """
    layers = dict(expert_layers(model))
    first = next(iter(layers.values()))
    assert all(isinstance(layer.router, ConstantRouter) and layer.router.weights.tolist() == [1.0]
               for layer in layers.values()), "PEFT's format holds one expert of weight 1"
    modules = peft_modules(model)
    wrapped = {theirs: names for theirs, names in modules.items() if any(name in layers for name in names)}
    tensors, ranks, alphas = {}, {}, {}
    for theirs, names in wrapped.items():
        A, B = fuse(layers, names)
        layer = next(layers[name] for name in names if name in layers)
        tensors[f"base_model.model.{theirs}.lora_A.weight"] = A.detach().contiguous()
        tensors[f"base_model.model.{theirs}.lora_B.weight"] = B.detach().contiguous()
        growth = len(A) / layer.rank  # PEFT divides by the rank that it sees
        alpha = layer.alpha * (math.sqrt(growth) if layer.rslora else growth)
        if len(A) != first.rank:
            ranks[theirs] = len(A)
        if alpha != first.alpha:
            alphas[theirs] = alpha
    targets = sorted({theirs.rpartition(".")[2] for theirs in wrapped})
    if select_modules(targets, modules) != list(wrapped):  # short names only where they mean these layers and no other
        targets = sorted(wrapped)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name or model.folder),
        "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": model.config.model_type == "gpt2", "inference_mode": True,
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas,
    }
    with replacing_folder(folder) as partial:
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def read_adapter_config(path):
    """The dictionary in an adapter_config.json. Raises UserError naming the first setting that we do not implement."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type = {config.get('peft_type')!r} is not supported")
    for key, value in config.items():
        plain = PLAIN_INITS if key == "init_lora_weights" else (None, False, "none", [], {})
        if key not in READ_KEYS | HARMLESS_KEYS and value not in plain:
            raise UserError(f"{path}: {key} = {value!r} is not supported")
    for key in ("r", "lora_alpha", "target_modules"):
        if not config.get(key):
            raise UserError(f"{path}: {key} is missing")
    return config


def read_tensors(path):
    """{name: tensor} of a safetensors file. Raises UserError when it is not there or not whole."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: broken or cut short ({first_line(error)})") from None


def read_adapter(model, folder):
    """{name of our layer: (A, B, alpha, rslora)} of an adapter in PEFT's format.

    Raises UserError naming the setting or the tensor when the adapter does not fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    tensors, modules, layers = read_tensors(path), peft_modules(model), {}
    for theirs in select_modules(config["target_modules"], modules):
        rank = pattern_value(config.get("rank_pattern"), theirs, config["r"])
        alpha = pattern_value(config.get("alpha_pattern"), theirs, config["lora_alpha"])
        bases = [model.get_submodule(name) for name in modules[theirs]]
        wanted = {"lora_A": (rank, bases[0].in_features), "lora_B": (sum(b.out_features for b in bases), rank)}
        found = {}
        for key, shape in wanted.items():
            name = f"base_model.model.{theirs}.{key}.weight"
            if name not in tensors:
                raise UserError(f"{path}: tensor {name} is missing")
            if tensors[name].shape != shape:
                raise UserError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model wants {shape}")
            found[key] = tensors.pop(name)
        for name, part in zip(modules[theirs], found["lora_B"].chunk(len(modules[theirs]))):
            layers[name] = found["lora_A"], part, alpha, config.get("use_rslora", False)
    if tensors:
        raise UserError(f"{path}: unexpected tensor {min(tensors)}")
    return layers


@torch.no_grad()
def load_adapter(model, *folders):
    """Wrap the model with the adapters in these folders (PEFT's format), one expert each. Returns the model.

    Raises UserError when one does not fit the model, or they differ in layers, rank or alpha.
    """
    assert not any(True for _ in expert_layers(model)), "the model has experts already; merge_experts(model) first"
    adapters = [read_adapter(model, folder) for folder in folders]
    shapes = [{name: (len(A), *scaling) for name, (A, _, *scaling) in layers.items()} for layers in adapters]
    for folder, shape in zip(folders, shapes):
        if shape != shapes[0]:
            raise UserError(f"{folder}: its layers, rank or alpha differ from those of {folders[0]}")
    model.requires_grad_(False)
    for name, (rank, alpha, rslora) in shapes[0].items():
        layer = wrap_linear(model, name, rank, alpha, len(folders), rslora=rslora)
        layer.lora_A.copy_(torch.cat([layers[name][0] for layers in adapters]))
        layer.lora_B.copy_(torch.cat([layers[name][1] for layers in adapters], dim=1))
    model.router_spec = {"type": "constant"}
    return model


def pattern_value(patterns, module, default):
    """PEFT's per-layer exceptions: the value of the first key that matches the end of the module's name."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def is_router(name):
    """Whether a tensor of the model belongs to a router or gate."""
    return ".router." in name or name.startswith("gate.")


def is_mixture(name):
    """Whether a tensor of the model belongs to its experts, routers or gate, and not to the base."""
    return "lora_" in name or is_router(name)


def save_experts(model, folder):
    """Write a mixture: experts.json says what it is, experts.safetensors holds its experts, routers and gate."""
    layers = dict(expert_layers(model))
    first = next(iter(layers.values()))
    config = {"base": str(model.folder), "layers": list(layers), "num_experts": first.num_experts, "rank": first.rank,
              "alpha": first.alpha, "rslora": first.rslora, "router": model.router_spec,
              "gate": model.gate.spec if hasattr(model, "gate") else None}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if is_mixture(name)}
    with replacing_folder(folder) as partial:
        (partial / "experts.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, partial / "experts.safetensors")


@torch.no_grad()
def load_experts(model, folder):
    """Wrap the model with the mixture that `save_experts` wrote. Returns the model.

    Raises UserError naming the setting or the tensor when the mixture does not fit the model.
    """
    folder = Path(folder)
    path, config = folder / "experts.safetensors", read_json(folder / "experts.json")
    tensors = read_tensors(path)
    try:
        if config["rank"] < 1:
            raise UserError(f"rank {config['rank']}")
        add_experts(model, config["layers"], config["rank"], config["alpha"], config["num_experts"], config["rslora"],
                    router=config["router"])
        if config["gate"]:
            model.gate = Gate(num_experts=config["num_experts"], **config["gate"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / 'experts.json'}: does not describe experts of this model ({first_line(error)})"
                        ) from None
    for name, tensor in model.state_dict().items():
        if is_mixture(name):
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise UserError(f"{path}: {name} is missing or not of shape {tuple(tensor.shape)}")
            tensor.copy_(tensors.pop(name))
    if tensors:
        raise UserError(f"{path}: unexpected tensor {min(tensors)}")
    return model
