"""A decoder-only transformer, its cache and generation, and a score model on the same trunk.

One class serves seven families (llama, mistral, qwen2, qwen3, gemma, gemma2, gpt2): they differ in a dozen switches,
all in ModelConfig. Module and parameter names are Hugging Face's; those of a GPT-2 are a llama's.

Read in this order: ModelConfig, the layers, Trunk, Transformer, ScoreModel, generate.
Letters in shape comments: B rows, T tokens per row, S keys, D width, V vocabulary, H heads, C head width.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from common import DTYPES, UserError, check_keys

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
            "gpt2": "GPT2LMHeadModel"}  # model_type: the class that transformers loads it with
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS["gelu_new"] = ACTIVATIONS["gelu_pytorch_tanh"] = partial(F.gelu, approximate="tanh")


# TF32, which NVIDIA's containers turn on, rounds products to three digits: log-probs add up hundreds of tokens
torch.set_float32_matmul_precision("highest")


CONFIG_KEYS = {  # of config.json; layers take memory as soon as they are made, the other sizes when weights fit them
    "a whole number from 1 to 512": "num_hidden_layers n_layer",
    "a whole number from 1 to a million": "vocab_size hidden_size intermediate_size num_attention_heads head_dim "
                                          "num_key_value_heads n_head n_embd n_inner query_pre_attn_scalar",
    "a whole number": "max_position_embeddings n_positions sliding_window max_window_layers",
    "a finite number": "attn_logit_softcapping final_logit_softcapping",
    "a number above 0": "rms_norm_eps layer_norm_epsilon rope_theta factor low_freq_factor high_freq_factor "
                        "original_max_position_embeddings",
    "true or false": "tie_word_embeddings attention_bias mlp_bias use_sliding_window scale_attn_weights "
                     "scale_attn_by_inverse_layer_idx score_bias bias do_normalize",
    "text": "model_type hidden_act hidden_activation activation_function dtype torch_dtype score_type type rope_type",
    "a list of texts": "architectures layer_types", "an object": "rope_parameters rope_scaling",
    "token ids": "eos_token_id"}
NULL_IS_OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # for other keys: the default


@dataclass
class ModelConfig:
    """The switches that tell one family from another, read from a Hugging Face config.json.

    `hf` keeps the dictionary it was read from; a saved model's config.json has it again.
    """
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: float             # rows of the table of learned positions; infinite for RoPE
    norm_eps: float
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or {"rope_type": "linear" | "llama3", ...}
    tied: bool = False               # the head is the embedding matrix
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    score_name: str = "score"        # ScoreModel: the scalar head's name in the checkpoint
    score_bias: bool = False
    normalizer: str = ""             # ScoreModel: "", "affine" or "scale"
    qk_norm: bool = False            # RMSNorm on every head's query and key (qwen3)
    gated_mlp: bool = True           # down(act(gate(x)) * up(x)); GPT-2 has down(act(up(x)))
    layer_norm: bool = False         # LayerNorm with bias instead of RMSNorm (gpt2)
    norm_offset: float = 0.0         # RMSNorm multiplies by (offset + weight); 1 in gemma
    post_norms: bool = False         # a norm after attention and after the MLP as well (gemma2)
    scale_embedding: bool = False    # embeddings times sqrt(D) (gemma)
    learned_positions: bool = False  # a table of positions instead of RoPE (gpt2)
    attention_scale: float = 0.0     # multiplies query·key; 0 means 1/sqrt(C)
    attention_softcap: float = 0.0   # 0 means none
    logit_softcap: float = 0.0
    windows: tuple = ()              # per layer: how many keys back a query sees; 0 means all
    eos_ids: tuple = ()
    hf: dict = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config, path="config.json"):
        """Read a config.json dictionary, older or newer spelling. Raises UserError for what we do not implement."""
        c = {key: value for key, value in config.items() if value is not None or key in NULL_IS_OFF}
        rope = check_keys(c.get("rope_parameters") or c.get("rope_scaling") or {}, CONFIG_KEYS, path)
        kind, rope_type = c.get("model_type"), rope.get("rope_type") or rope.get("type") or "default"
        activation = c.get({"gpt2": "activation_function", "gemma2": "hidden_activation"}.get(kind, "hidden_act"))
        if kind in ("gemma", "gemma2") and activation == "gelu":  # a slip in Gemma's first files, for the tanh form
            activation = None
        for what, value, supported in (("model_type", kind, FAMILIES), ("activation", activation, ACTIVATIONS),
                                       ("RoPE scaling", rope_type, ("default", "linear", "llama3")),
                                       ("torch_dtype", c.get("dtype") or c.get("torch_dtype"), DTYPES)):
            if value not in supported and (value is not None or what == "model_type"):
                raise UserError(f"{path}: {what} {value!r} is not supported; supported: {', '.join(supported)}")
        try:
            ours = cls._from_gpt2(c) if kind == "gpt2" else cls._from_llama_like(kind, c, rope)
            ours.activation = activation or ours.activation
            ours.rope_scaling = {} if rope_type == "default" else {**rope, "rope_type": rope_type}
            rope_frequencies(ours)  # here, so that a number missing in its scaling is a KeyError now
        except KeyError as missing:
            raise UserError(f"{path}: {missing} is missing") from None
        wrong = ("num_attention_heads is no multiple of num_key_value_heads" if ours.num_heads % ours.num_kv_heads else
                 "head_dim is odd" if ours.head_dim % 2 and not ours.learned_positions else
                 f"layer_types has not {ours.num_layers} entries" if len(ours.windows) != ours.num_layers else
                 "GPT-2 with unscaled or layer-scaled attention is not supported" if kind == "gpt2" and (
                     c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights", True)) else "")
        if wrong:
            raise UserError(f"{path}: {wrong}")
        if "score_type" in c:  # written by safe-rlhf; older versions call score_bias just bias
            ours.score_name, ours.score_bias = "score_head", c.get("score_bias", c.get("bias", False))
            if c.get("do_normalize"):
                ours.normalizer = {"reward": "affine", "cost": "scale"}.get(c["score_type"], "")
        ours.eos_ids, ours.hf = as_ids(c.get("eos_token_id")), config
        return ours

    @classmethod
    def _from_llama_like(cls, kind, c, rope):
        gemma, gemma2, heads = kind in ("gemma", "gemma2"), kind == "gemma2", c["num_attention_heads"]
        bias = c.get("attention_bias", False) and kind not in ("mistral", "qwen2")  # those two do not read the key
        return cls(
            model_type=kind, vocab_size=c["vocab_size"], hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"], num_layers=c["num_hidden_layers"], num_heads=heads,
            num_kv_heads=c.get("num_key_value_heads", heads),
            head_dim=c.get("head_dim", 256 if gemma else 128 if kind == "qwen3" else c["hidden_size"] // heads),
            max_positions=math.inf, norm_eps=c.get("rms_norm_eps", 1e-6),
            activation="gelu_pytorch_tanh" if gemma else "silu",
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta", 10000.0)),
            tied=c.get("tie_word_embeddings", gemma), qkv_bias=kind == "qwen2" or bias, o_bias=bias,
            mlp_bias=kind == "llama" and c.get("mlp_bias", False), qk_norm=kind == "qwen3",
            norm_offset=1.0 if gemma else 0.0, post_norms=gemma2, scale_embedding=gemma,
            attention_scale=c.get("query_pre_attn_scalar", 256) ** -0.5 if gemma2 else 0.0,
            attention_softcap=c.get("attn_logit_softcapping", 50.0) or 0.0 if gemma2 else 0.0,
            logit_softcap=c.get("final_logit_softcapping", 30.0) or 0.0 if gemma2 else 0.0,
            windows=cls._windows(kind, c, c["num_hidden_layers"]))

    @classmethod
    def _from_gpt2(cls, c):
        width, heads = c["n_embd"], c["n_head"]
        return cls(
            model_type="gpt2", vocab_size=c["vocab_size"], hidden_size=width,
            intermediate_size=c.get("n_inner", 4 * width), num_layers=c["n_layer"], num_heads=heads,
            num_kv_heads=heads, head_dim=width // heads, max_positions=c.get("n_positions", 1024),
            norm_eps=c.get("layer_norm_epsilon", 1e-5), activation="gelu_new",
            tied=c.get("tie_word_embeddings", True), qkv_bias=True, o_bias=True, mlp_bias=True, gated_mlp=False,
            layer_norm=True, learned_positions=True, windows=(0,) * c["n_layer"])

    @staticmethod
    def _windows(kind, c, layers):
        """Which layers slide: `layer_types` says so in newer configs, a rule per family in older ones."""
        if kind in ("llama", "gemma") or (kind in ("qwen2", "qwen3") and not c.get("use_sliding_window")):
            return (0,) * layers
        if kind == "mistral":
            slides = [True] * layers
        elif c.get("layer_types"):
            slides = [name == "sliding_attention" for name in c["layer_types"]]
        else:
            slides = [i % 2 == 0 if kind == "gemma2" else i >= c.get("max_window_layers", 28) for i in range(layers)]
        return tuple((c.get("sliding_window", 4096) or 0) * one for one in slides)


def as_ids(value):
    """Token ids as a tuple, from the three spellings in use: none, one number, a list."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


class RMSNorm(nn.Module):
    def __init__(self, width, eps, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x):
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight.to(x.dtype)  # llama rounds before it multiplies, gemma after


def make_norm(config):
    if config.layer_norm:
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


def rope_frequencies(config):
    """Radians per position for each of the C/2 planes, float32, shape (C/2,).

    Llama 3's scaling (its release notes; transformers' `llama3` rope type) slows the slow planes by
    `factor`, leaves the fast ones alone and blends linearly between the two.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling
    if scaling.get("rope_type") == "linear":
        return frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / scaling["factor"])
    return frequency


def rotate(x, cos, sin):
    """Apply RoPE to (B, H, T, C); cos and sin are (B, 1, T, C), each two equal halves of C, sin's first one negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed size: (rows, H_kv, S_max, C) a layer. A token's
    column is its position, so rows of different length stand side by side and a row can be used again."""

    def __init__(self, config, rows, max_len, dtype, device):
        shape = (rows, config.num_kv_heads, max_len, config.head_dim)
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
                       for _ in range(config.num_layers)]
        self.lengths = [0] * rows    # tokens that each row holds
        self.rows = [*range(rows)]   # those that the next forward passes extend

    def extend(self, T, device):
        """Make room for T more tokens in each of the rows in use; returns their positions, (B, T)."""
        before = torch.tensor([self.lengths[row] for row in self.rows])
        for row in self.rows:
            self.lengths[row] += T
        self.columns = (before[:, None] + torch.arange(T)).to(device)
        self.end = int(before.max()) + T
        self.index = torch.tensor(self.rows, device=device)[:, None]
        return self.columns

    def update(self, layer, key, value):
        """Put in keys and values of T tokens, (B, H_kv, T, C); returns those of all tokens so far, (B, H_kv, S, C)."""
        for buffer, new in zip(self.layers[layer], (key, value)):
            buffer[self.index, :, self.columns] = new.transpose(1, 2)
        in_order = self.rows == [*range(len(self.rows))]
        rows = slice(len(self.rows)) if in_order else self.rows              # a view, or a copy
        return [buffer[rows, :, :self.end] for buffer in self.layers[layer]]

    def keep(self, rows):
        """Drop all rows but these, in this order."""
        for buffers in self.layers:
            buffers[:] = [buffer[rows] for buffer in buffers]
        self.lengths, self.rows = [self.lengths[row] for row in rows], [*range(len(rows))]


def dense_mask(visible, B, T, S, device):
    """(B, 1, T, S) bool of visible(row, head, query, key): whether in a row a query token may look at a key token."""
    row, query, key = (torch.arange(size, device=device) for size in (B, T, S))
    return visible(row[:, None, None], None, query[:, None], key).expand(B, T, S)[:, None]


def within(window, visible, positions, keys):
    """`visible`, cut to keys that are less than `window` positions back. positions: (B, T); keys: theirs, (B, S)."""
    start = positions - window  # a kernel that captures only tensors serves every window
    return lambda row, head, query, key: visible(row, head, query, key) & (keys[row, key] > start[row, query])


def compile_once(function, **options):
    """torch.compile for all sizes of tensors, in two compilations: for batches of one row, and of several."""
    torch._dynamo.config.specialize_float = True             # numbers are constants of the kernels
    torch.fx.experimental._config.use_duck_shape = False     # sizes that are equal in one call may differ in the next
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True  # layers may keep what they computed
    return torch.compile(function, dynamic=True, **options)


def flex_is_fused(config, device):
    """True if FlexAttention has a kernel there; elsewhere a dense mask takes less time and memory."""
    return device.type == "cuda" and config.head_dim >= 16


@cache
def fused_flex_attention():
    return compile_once(flex_attention)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.scale, cap = config.attention_scale or config.head_dim ** -0.5, config.attention_softcap
        self.soft_cap = (lambda score, *_: cap * torch.tanh(score / cap)) if cap else None
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.norm_eps)
            self.k_norm = RMSNorm(head, config.norm_eps)

    def forward(self, x, rope, mask, cache):
        config = self.config
        B, T, _ = x.shape
        query, key, value = (project(x).view(B, T, -1, config.head_dim)
                             for project in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))         # (B, H, T, C)
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)                # (B, H_kv, S, C)
        out = self.attend(query, key, value, mask)                           # (B, H, T, C)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def attend(self, query, key, value, mask):
        """softmax(query·key) value; mask is (B, 1, T, S), True where a query may look, a BlockMask, or None: causal."""
        B, H, T, C = query.shape
        if isinstance(mask, BlockMask):  # autocast leaves RoPE's results in float32
            flex = fused_flex_attention() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
            return flex(query.to(value.dtype), key.to(value.dtype), value, self.soft_cap, mask, self.scale, True)
        group = H // key.shape[1]
        if group > 1 and T == 1:  # one query per head: the heads that share a key become the query rows
            query = query.view(B, H // group, group, C)
        elif group > 1 and (query.is_cuda or self.soft_cap):                 # only the CPU's kernels share heads
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        if self.soft_cap:
            scores = self.soft_cap(query @ key.transpose(2, 3) * self.scale)                 # (B, H, T, S)
            scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            out = scores.float().softmax(-1).to(query.dtype) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None and T > 1,
                                                 scale=self.scale, enable_gqa=key.shape[1] < query.shape[1])
        return out.view(B, H, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.gated_mlp:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.gated, self.activation = config.gated_mlp, ACTIVATIONS[config.activation]

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)  # before the MLP; in gemma2, after attention
        self.mlp = MLP(config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = make_norm(config)
            self.post_feedforward_layernorm = make_norm(config)

    def forward(self, x, rope, mask, cache):
        if self.post_norms:
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, mask, cache))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head. Called with tokens (B, T); returns the final hidden states (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config)
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its tensors
        self.frequencies = None     # of `rope_frequencies`, on the device of the tokens

    def forward(self, tokens, positions=None, mask=None, cache=None):
        B, T = tokens.shape
        if cache is not None:
            positions = cache.extend(T, tokens.device)
        elif positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        if self.frequencies is None or self.frequencies.device != tokens.device:
            self.frequencies = rope_frequencies(self.config).to(tokens.device)
        return self.run(tokens, positions, self.window_masks(positions, mask, cache), cache)

    def run(self, tokens, positions, masks, cache=None):
        """The layers: what --compile compiles. masks: of `window_masks`."""
        config, x = self.config, self.embed_tokens(tokens)                   # (B, T, D)
        rope = None
        if config.scale_embedding:
            x = x * torch.tensor(config.hidden_size ** 0.5, dtype=x.dtype)
        if config.learned_positions:
            x = x + self.embed_positions(positions)
        else:
            angle = positions[:, None, :, None] * self.frequencies
            rope = [torch.cat((sign * half, half), dim=-1).to(x.dtype)        # (B, 1, T, C)
                    for sign, half in ((1, angle.cos()), (-1, angle.sin()))]
        for block, window in zip(self.layers, config.windows):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, masks[window], cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, masks[window], cache)
        return self.norm(x)

    @contextmanager
    def compiled(self, **options):
        """Inside this block the layers run compiled, for any rows and lengths."""
        self.run = compile_once(self.run, **options)
        try:
            yield
        finally:
            del self.run  # the class's own again

    def window_masks(self, positions, mask, cache):
        """{window: BlockMask where FlexAttention is fused, elsewhere (B, 1, T, S) bool, or None for plain causal}: the
        caller's mask, cut to each window in use."""
        (B, T), device = positions.shape, positions.device
        S = T if cache is None else cache.end
        keys = positions if cache is None else torch.arange(S, device=device).expand(B, S)
        even = cache is None or len({cache.lengths[row] for row in cache.rows}) == 1
        causal = mask or (lambda row, head, query, key: keys[row, key] <= positions[row, query])
        masks = {}
        for window in {*self.config.windows}:
            cuts = 0 < window < S  # one of S or more cuts nothing
            visible = within(window, causal, positions, keys) if cuts else causal
            if mask and flex_is_fused(self.config, device):
                masks[window] = create_block_mask(visible, B, None, T, S, device)
            else:
                plain = mask is None and even and not cuts and (T == 1 or S == T and not self.config.attention_softcap)
                masks[window] = None if plain else dense_mask(visible, B, T, S, device)
        return masks


class Transformer(nn.Module):
    """A language model: `model(tokens)` gives hidden states, `model.logits(hidden)` the vocabulary scores.

    The head is apart so that only the positions that need logits pay for them.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.folder, self.origin = config, None, ""  # folder of the checkpoint, and its path or hub id
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """tokens (B, T) -> hidden (B, T, D).

        positions (B, T): the place of each token in its own sequence; default 0 … T-1, with a cache those after it.
        mask: function (row, head, query, key): whether a query token may look at a key token; default causal.
        """
        return self.model(tokens, positions, mask, cache)

    def logits(self, hidden, head=None):
        """hidden (..., D) -> logits (..., V). head: a function to use in place of `lm_head`."""
        logits = (head or self.lm_head)(hidden)
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits


class ScoreModel(nn.Module):
    """A reward or cost model: the trunk with a scalar head, read at the last token of a sequence.

    Reads and writes Hugging Face's `*ForSequenceClassification` (`score.weight`) and safe-rlhf's layout
    (`score_head.weight`, `score_head.bias`). If config.json says `do_normalize`, scores are normalised as there:
    'affine' (reward) gives (s - mean) / std, 'scale' (cost) gives s / std.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.folder, self.origin = config, None, ""
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=config.score_bias)
        if config.normalizer:
            self.normalizer = nn.Module()
            self.normalizer.register_buffer("mean", torch.zeros(1))
            self.normalizer.register_buffer("var", torch.ones(1))

    def forward(self, tokens, last, positions=None, mask=None):
        """tokens (B, T), last (N,) flat indices of the last real token of each sequence -> scores (N,) float32."""
        hidden = self.model(tokens, positions, mask).flatten(0, 1)[last]     # (N, D)
        with torch.autocast(hidden.device.type, enabled=False):              # the head is small: float32 costs nothing
            bias = None if self.score.bias is None else self.score.bias.float()
            score = F.linear(hidden.float(), self.score.weight.float(), bias).squeeze(-1)
        if self.config.normalizer == "affine":
            score = score - self.normalizer.mean
        if self.config.normalizer:
            score = score / (self.normalizer.var.sqrt() + 1e-8)
        return score

    @classmethod
    def from_policy(cls, policy):
        """A score model on the trunk of a Transformer. The head is zero-initialised, so all scores start at 0."""
        with torch.device("meta"):
            model = cls(policy.config)
        model.model, model.folder, model.origin = policy.model, policy.folder, policy.origin
        device = policy.model.embed_tokens.weight.device
        model.score.weight = nn.Parameter(torch.zeros(1, policy.config.hidden_size, device=device))
        return model


def sample(logits, temperature, top_p, uniform):
    """One token per row, (B, V) -> (B,): greedy at temperature 0, else the token at which the running sum of
    probabilities passes that row's uniform draw, most probable first (so that top_p just shortens the list)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probability, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = probability.cumsum(-1)                                           # (B, V)
    kept = (total - probability < top_p).sum(-1, keepdim=True)               # (B, 1) at least one
    mass = total.gather(1, kept - 1)
    place = torch.searchsorted(total, uniform[:, None] * mass, right=True).minimum(kept - 1)
    return order.gather(1, place).squeeze(1)


def few_rows(weight, x, size=64):
    """x Wᵀ of a few rows x (B, D), `size` columns at a time: where W (V, D) is large, a CPU takes a third less time."""
    count = len(weight) // size
    blocks = torch.bmm(weight[:count * size].view(count, size, x.shape[1]), x.t().expand(count, -1, -1))
    return torch.cat([blocks.flatten(0, 1), weight[count * size:] @ x.t()]).t()          # (B, V)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, eos_ids=(), seed=0):
    """Continue every prompt; returns the new tokens of each, the eos that ended it included.

    prompts: list of N non-empty lists of token ids, of any lengths. Greedy output equals that of each prompt alone.
    Sampled output depends on the seed, the prompt and its number of earlier occurrences, not on the rest of the batch.
    """
    answers = dict(stream(model, prompts, max_new_tokens, len(prompts), temperature, top_p, eos_ids, seed))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def stream(model, prompts, max_new_tokens, batch_size, temperature=0.0, top_p=1.0, eos_ids=(), seed=0, prepare=None):
    """`generate`, batch_size rows at a time: yield (number of the prompt, its new tokens) as each one ends; the next
    prompt, from the longest to the shortest, takes its row. prepare(numbers): called
    whenever other rows are about to run, with the numbers of their prompts."""
    N, longest, config = len(prompts), max(map(len, prompts), default=0), model.config
    assert all(map(len, prompts)), "a prompt has at least one token"
    if longest + max_new_tokens > config.max_positions:
        raise UserError(f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
                        f"{config.max_positions} positions that the model has")
    if not max_new_tokens:
        yield from ((i, []) for i in range(N))
        return
    weight = model.model.embed_tokens.weight
    draws, new = torch.from_numpy(_uniform_draws(prompts, max_new_tokens, seed)), [[] for _ in prompts]
    waiting = sorted(range(N), key=lambda i: len(prompts[i]))                # the next one is the last
    B = min(batch_size, N)
    cache = KVCache(config, B, longest + max_new_tokens, weight.dtype, weight.device)
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    head = partial(few_rows, model.lm_head.weight) if on_cpu and type(model.lm_head) is nn.Linear else None
    hidden = weight.new_zeros(B, config.hidden_size)                         # of the last token of each row
    numbers, free = [0] * B, [*range(B)]                                     # prompts in the rows, rows without one

    def use(rows):
        cache.rows = rows
        if prepare:
            prepare([numbers[row] for row in rows])

    while numbers:
        if free:
            for row in free:
                numbers[row] = waiting.pop()
            use(free)
            hidden[free] = prefill(model, cache, [prompts[numbers[row]] for row in free])
            use([*range(len(numbers))])
        uniform = draws[numbers, [len(new[i]) for i in numbers]].to(weight.device)
        tokens = sample(model.logits(hidden, head), temperature, top_p, uniform)
        free = []
        for row, (i, token) in enumerate(zip(numbers, tokens.tolist())):
            new[i].append(token)
            if token in eos_ids or len(new[i]) == max_new_tokens:
                free.append(row)
                yield i, new[i]
        if spare := free[len(waiting):]:                                 # no prompt is left for these rows
            left = [row for row in range(len(numbers)) if row not in spare]
            numbers, free = [numbers[row] for row in left], [left.index(row) for row in free[:len(waiting)]]
            tokens, hidden = tokens[left], hidden[left]
            cache.keep(left)
            use(cache.rows)
        if len(free) < len(numbers):
            hidden = model(tokens[:, None], cache=cache)[:, -1]


def prefill(model, cache, prompts):
    """Read prompts into the rows in use of the cache; returns the hidden state of each one's last token, (B, D)."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    for row in cache.rows:
        cache.lengths[row] = 0
    hidden = model(tokens.to(model.model.embed_tokens.weight.device), cache=cache)
    for row, ids in zip(cache.rows, prompts):
        cache.lengths[row] = len(ids)                                        # without the padding, on the right
    return hidden[range(len(prompts)), [len(ids) - 1 for ids in prompts]]


def _uniform_draws(prompts, count, seed):
    """(N, count) float32 in [0, 1): a stream of its own for each prompt (and each repetition of it)."""
    seen, draws = {}, np.empty((len(prompts), count), dtype=np.float32)
    for i, prompt in enumerate(map(tuple, prompts)):
        seen[prompt] = seen.get(prompt, -1) + 1
        draws[i] = np.random.default_rng([seed, seen[prompt], *prompt]).random(count, dtype=np.float32)
    return draws
