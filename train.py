"""Train a policy by preference: `python train.py --method safedpo --delta 10` runs with nothing else given.

A method is a row of METHODS: a view of the comparisons and a loss. The rest of the file is what all methods share:
settings, the toy base model, reference log-probabilities, the training loop, and the steps of a run in `main`.
"""
import difflib
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import losses
from data import (COST_VIEWS, PREFERENCES, SOURCES, TEMPLATES, VIEWS, Tokenizer, apply_view, content_key,
                  encode, encode_pairs, flip_labels, load_comparisons, load_encoded, make_toy_tokenizer, pack,
                  read_rows, save_encoded, score_margin, source_files, toy_comparisons, toy_demonstrations,
                  toy_preferences)
from eval import (WEIGHT_FOLDERS, Parser, as_command, evaluate_run, load_judge, pooled_states, report_tables, score,
                  table)
from lora_moe import (Gate, OneExpert, add_experts, expert_layers, is_mixture, is_router, load_adapter, merge_experts,
                      router_weights, save_adapter, save_experts, set_routers, trainable_parameters, use_expert)
from lora_moe import reference as without_experts
from losses import sequence_logps
from model import (ACTIVATIONS, DTYPES, ModelConfig, ScoreModel, Transformer, UserError, files_key, find_folder,
                   read_config, read_json, replacing_file, replacing_folder, write_text)

# ---------------------------------------------------------------------------------------------------------
# Methods: the losses with their settings filled in, what they are functions of, what is trained, and the table


def sft(logps, reference, batch, config):
    return losses.sft_loss(logps[:, 0], batch.lengths[:, 0])


def dpo(logps, reference, batch, config):
    return losses.dpo_loss(*logps.T, *reference.T, config.beta, config.label_smoothing)


def safedpo(logps, reference, batch, config):
    return losses.safedpo_loss(*logps.T, *reference.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"],
                               config.beta, config.delta, config.label_smoothing)


def spe_dpo(logps, reference, batch, config):
    return losses.spe_dpo_loss(*logps.T, *reference.T, batch.labels["margin"], config.beta, config.label_smoothing)


def midpo(outputs, reference, batch, config):
    logps, weights = outputs                             # weights: (L, tokens, 2), of the safety and helpfulness expert
    loss, figures = dpo(logps, reference, batch, config)
    safety, helpfulness = weights.unbind(-1)
    l1 = losses.router_l1(safety, helpfulness)
    return loss + config.router_l1 * l1, {**figures, "router/l1": l1.detach(), "router/safety": safety.detach().mean(),
                                          "router/helpfulness": helpfulness.detach().mean()}


def pmol(outputs, reference, batch, config):
    logps, weights = outputs                             # weights: (L, tokens, K + 1), the empty expert's last
    loss, figures = dpo(logps, reference, batch, config)
    target = losses.group_targets(len(group_names(config)), config.experts, numbers_in(config.soft_constraint))
    pair = batch.pair.flatten()
    group = batch.labels["group"][pair[pair >= 0]]       # (tokens,), -1 where a pair has none
    soft = weights.new_zeros(()) if (group < 0).all() else losses.expert_group_soft_loss(
        weights[:, group >= 0], group[group >= 0], target.to(weights.device))
    figures = {**figures, "router/soft_loss": soft.detach(),
               "router/empty": 1 - weights[..., :config.experts].detach().sum(-1).mean(),
               "router/entropy": torch.special.entr(weights.detach()).sum(-1).mean()}
    return loss + config.egs_weight * soft, figures


def moe_dpo(outputs, reference, batch, config):
    logps, log_gate = outputs                            # (K, N, 2), (N, K)
    reference = reference.permute(2, 0, 1) if reference.dim() == 3 else reference.expand_as(logps)
    annotator = batch.labels["group"] if config.latent == "annotator" else None
    return losses.moe_dpo_loss(logps, reference, log_gate, config.beta, config.objective, annotator,
                               config.q_temperature)


def reward(scores, reference, batch, config):
    return losses.reward_loss(*scores.T)


def cost(scores, reference, batch, config):
    return losses.cost_loss(*scores.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"])


# What the losses are functions of


def policy_logps(model, batch):
    """(N, R) log-probabilities of a packed batch: one forward pass."""
    return sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)


def routed_logps(model, batch):
    """The same, and the router weights of that very pass at every token of the batch: (L, tokens, slots)."""
    return policy_logps(model, batch), router_weights(model, batch.pair.flatten() >= 0)


def expert_logps(model, batch):
    """Log-probabilities of every expert, (K, N, R), and the gate's log w, (N, K).

    One pass: each row stands there once for each expert; where experts are in the head alone, the trunk runs once.
    """
    layers = dict(expert_layers(model))
    K = next(iter(layers.values())).num_experts
    if list(layers) == ["lm_head"]:
        hidden = model(batch.tokens, batch.positions, batch.mask())
        logps = [sequence_logps(OneExpert(model, k), hidden, batch) for k in range(K)]
    else:
        use_expert(model, torch.arange(K).repeat_interleave(len(batch.tokens)))
        hidden = model(batch.tokens.repeat(K, 1), batch.positions.repeat(K, 1), batch.mask().repeat(K, 1, 1))
        logps = [sequence_logps(model, some, batch) for some in hidden.chunk(K)]
    log_gate = model.gate(batch.labels.get("pooled"), batch.labels["group"])
    return torch.stack(logps), log_gate.expand(batch.shape[0], K)


def response_scores(model, batch):
    """(N, R) scores of a packed batch, each read at its response's last token."""
    return model(batch.tokens, batch.last.flatten(), batch.positions, batch.mask()).view(batch.shape)


# What is trained: config and the base model -> the model with the trainable parameters marked


def policy(config, model, groups):
    """All weights, or one LoRA expert: a fresh one, or --init_adapter."""
    if config.init_adapter:
        return load_adapter(model, *config.init_adapter.split(","))
    return add_lora(config, model) if config.lora_rank else model


def add_lora(config, model, num_experts=1, router=None):
    targets = config.lora_targets if config.lora_targets in ("all-linear", "mlp") else config.lora_targets.split(",")
    return add_experts(model, targets, config.lora_rank, config.lora_alpha, num_experts, seed=config.seed,
                       router=router)


def score_model(config, model, groups):
    """The base model's trunk under a scalar head."""
    model = ScoreModel.from_policy(model)
    if config.lora_rank:
        add_lora(config, model).score.requires_grad_(True)
    return model


def routed_pair(config, model, groups):
    """The safety and the helpfulness expert, frozen, under routers to be trained. Raises UserError."""
    folders = config.init_adapter.split(",")
    if len(folders) != 2:
        raise UserError(f"--init_adapter {config.init_adapter}: midpo wants two, the safety and the helpfulness expert")
    for _, layer in expert_layers(load_adapter(model, *folders)):
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    return set_routers(model, {"type": "sigmoid", "hidden": config.router_hidden,
                               "activation": config.router_activation}, config.seed)


def routed_experts(config, model, groups):
    """K experts and their softmax routers, trained together. Raises UserError where K is no multiple of the groups."""
    if not groups:
        raise UserError("--method pmol: these comparisons do not say which preference they belong to")
    config.groups = config.groups or ",".join(groups)
    config.experts = config.experts or len(groups)
    if config.experts % len(groups):
        raise UserError(f"--experts {config.experts}: must be a multiple of the number of preferences, {len(groups)}")
    if len(numbers_in(config.soft_constraint)) not in (1, len(groups)):
        raise UserError(f"--soft_constraint {config.soft_constraint}: one, or one for each of {len(groups)} groups")
    return add_lora(config, model, config.experts, {"type": "softmax", "empty": not config.no_empty_expert,
                                                    "temperature": config.router_temperature})


def whole_experts(config, model, groups):
    """K whole policies, fresh or --init_adapter, or with --share trunk K heads; and the gate. Raises UserError."""
    folders = config.init_adapter.split(",") if config.init_adapter else []
    config.experts = config.experts or len(folders) or 2
    for name in ("init_adapter", "references"):
        count = len(getattr(config, name).split(","))
        if getattr(config, name) and count != config.experts:
            raise UserError(f"--{name} {getattr(config, name)}: {count} folders for {config.experts} experts")
    for folder in config.references.split(",") if config.references else ():
        read_config(find_folder(folder))
    if "user" in config.gate or config.latent == "annotator":
        if not groups:
            raise UserError("--gate user and --latent annotator: these comparisons do not say who made them")
    if folders:
        load_adapter(model, *folders)
    elif config.share == "trunk" and config.lora_rank == 0:
        # Full copies: W + B_k A_k with a fixed rotation A_k of its own, so that any difference can be learnt, and that
        # copies, which start alike, part (with A_k = I they would get the same gradients for ever)
        width = model.config.hidden_size
        layer = add_experts(model, ["lm_head"], width, width, config.experts, seed=config.seed).lm_head
        rotations = torch.linalg.qr(layer.lora_A.data.view(-1, width, width)).Q
        layer.lora_A = nn.Parameter(rotations.reshape(-1, width), requires_grad=False)
    else:
        add_lora(replace(config, lora_targets="lm_head") if config.share == "trunk" else config, model, config.experts)
    names = [name for name, _ in expert_layers(model)]
    if "lm_head" in names and len(names) > 1:
        raise UserError("--lora_targets: a mixture has its experts in lm_head or below it, not in both")
    generator = torch.Generator().manual_seed(config.seed)
    for _, layer in expert_layers(model):
        drawn = torch.empty(layer.lora_B.shape).normal_(0, config.expert_noise, generator=generator)
        layer.lora_B.data += drawn.to(layer.lora_B.device)
    kind, weights = config.gate, ()
    if kind not in GATES:
        kind, weights = "fixed", [weight / sum(numbers_in(kind)) for weight in numbers_in(kind)]
        if len(weights) != config.experts:
            raise UserError(f"--gate {config.gate}: {len(weights)} weights for {config.experts} experts")
    model.gate = Gate(kind, config.experts, model.config.hidden_size, groups if kind == "user" else (), weights)
    model.gate.to(config.device)
    return model


def add_pooled(model, encoded, config):
    """What --gate prompt looks at: labels["pooled"], (N, D)."""
    if config.gate == "prompt":
        encoded.labels["pooled"] = pooled_states(model, encoded, 4 * config.batch_size)


# What has to be trained before: config -> the settings of one run after the other; each result becomes a setting


# What a run passes on to its stages; the rest, such as the learning rate, is the stage's own default
SHARED = ("model", "data", "template", "max_len", "held_out", "flip_safety", "flip_preference", "skip_bad_rows",
          "lora_targets", "max_steps", "batch_size", "grad_accum", "warmup", "grad_clip", "seed", "dtype", "device",
          "compile", "checkpointing", "resume", "save_every", "log_every", "eval_every", "eval_split", "temperature",
          "wandb", "score_template", "harmful_share")


def stage(config, method, name, *also, **changes):
    """The settings of a run in a folder under this run's. also: names of further settings that are passed on."""
    passed = {setting: getattr(config, setting) for setting in (*SHARED, *also)}
    passed["resume"] = config.resume and (Path(config.out) / name / "checkpoint").is_dir()
    return resolve(Config(method=method, out=f"{config.out}/{name}", **passed, **changes))


def carries_score(config, name):
    """Whether the rows of the data have this score already."""
    return config.data != "toy" and all(name in (next(read_rows(source_files(source)[0]))[0]["scores"] or ())
                                        for source in sources(config))


def score_stages(config, wanted):
    """A reward or cost model for each that is wanted and not given, unless the comparisons carry scores."""
    for name in wanted:
        if not getattr(config, f"{name}_model") and not carries_score(config, name):
            yield stage(config, name, name)
            setattr(config, f"{name}_model", f"{config.out}/{name}/model")


def margin_stages(config):
    """SPE-DPO's margins on toy come from a score model that is trained first; elsewhere the user says from what."""
    return score_stages(config, ["cost" if config.view in COST_VIEWS else "reward"] if config.data == "toy" else [])


def midpo_stages(config):
    """MidPO: reward and cost model, safety expert, helpfulness expert; the run itself is then the router's."""
    if config.init_adapter:
        return
    yield from score_stages(config, ["reward", "cost"])
    for view, judge in (("safety", "cost_model"), ("helpful", "reward_model")):
        yield stage(config, "spe-dpo", view, "lora_rank", "lora_alpha", "beta", "label_smoothing", judge, view=view)
    config.init_adapter = f"{config.out}/safety/adapter,{config.out}/helpful/adapter"


GATES = ("constant", "prompt", "user")
TWO_TASTES = {"groups": "warmth,curtness", "annotators": 100, "beta": 0.3, "lr": 4e-4, "router_lr": 100.0}


@dataclass(frozen=True)
class Method:
    """A view of the comparisons × what is trained × a loss, and the settings that differ from PAPER and TOY.

    loss(forward(model, batch), reference (N, R), batch, config) -> (mean loss, figures); R responses to a prompt.
    """
    view: str
    loss: Callable
    forward: Callable = policy_logps
    build: Callable = policy
    responses: int = 2            # 1: only the chosen response is trained on
    reference: bool = True        # whether the loss compares with the reference policy
    prepare: Callable = lambda model, encoded, config: None  # adds labels that need the model
    margins: bool = False         # whether pairs need margins of a score model
    stages: Callable = lambda config: ()
    paper: dict = field(default_factory=dict)
    toy: dict = field(default_factory=dict)


METHODS = {
    "sft": Method("helpful", sft, responses=1, reference=False),
    "dpo": Method("helpful", dpo),
    "safedpo": Method("safedpo", safedpo),
    "reward": Method("helpful", reward, response_scores, score_model, reference=False,
                     paper={"lr": 2e-5, "lora_rank": 0}, toy={"lr": 3e-4, "lora_rank": 0, "epochs": 1}),
    "cost": Method("cost", cost, response_scores, score_model, reference=False,
                   paper={"lr": 2e-5, "lora_rank": 0}, toy={"lr": 3e-4, "lora_rank": 0, "epochs": 1}),
    "spe-dpo": Method("safety", spe_dpo, margins=True, stages=margin_stages,
                      paper={"lora_rank": 16, "weight_decay": 0.01},
                      toy={"epochs": {"safety": 2, "helpful": 1}}),  # about as many steps for either expert
    "midpo": Method("dual", midpo, routed_logps, routed_pair, stages=midpo_stages,
                    paper={"lora_rank": 16, "weight_decay": 0.0, "lr": 1e-5},
                    toy={"lr": 3e-4, "epochs": 6, "router_hidden": 64, "harmful_share": 0.7}),
    "pmol": Method("helpful", pmol, routed_logps, routed_experts, paper={"lora_rank": 16, "lora_targets": "mlp"},
                   toy={"groups": "helpfulness,harmlessness,empathy", "lora_targets": "down_proj", "lr": 8e-5}),
    "mix-dpo": Method("helpful", moe_dpo, expert_logps, whole_experts, prepare=add_pooled,
                      paper={"lora_rank": 16, "gate": "constant"}, toy=TWO_TASTES),
    "moe-dpo": Method("helpful", moe_dpo, expert_logps, whole_experts, prepare=add_pooled,
                      paper={"lora_rank": 16, "gate": "prompt"}, toy={**TWO_TASTES, "gate": "user"}),
}


def numbers_in(text):
    """"0.5,1" -> [0.5, 1.0]. Raises ValueError."""
    return [float(part) for part in text.split(",")]


# ---------------------------------------------------------------------------------------------------------
# Settings


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting of a run. None means: the value for this model and method in `resolve`."""
    method: str = flag("safedpo", "what to train", tuple(METHODS))
    model: str = flag("toy", "'toy', a folder in Hugging Face layout, or a hub id")
    data: str = flag("toy", f"where comparisons come from: toy, {', '.join(SOURCES)}, a file or a folder; several "
                            "with commas are a group each")
    out: str = flag(None, "run folder (default: out/<method>)")
    view: str = flag(None, "how comparisons become pairs (default: the method's)", tuple(VIEWS))
    groups: str = flag("", "preferences that are mixed: names with commas, with =share in other than equal parts or "
                           "the data's own (default: those of the data; three on toy)")
    harmful_share: float = flag(None, "toy: share of the comparisons that ask for harm (default: 0.45; 0.7 for midpo)")
    annotators: int = flag(None, "toy: so many people label, each by one of --groups (default: 0; 100 for mixtures)")
    template: str = flag(None, "prompt format (default: the tokenizer's chat template)", ("chat", *TEMPLATES))
    max_len: int = flag(512, "tokens of prompt and response together")
    held_out: float = flag(0.02, "share of the prompts that are held out, where the data has no test split")
    flip_safety: float = flag(0.0, "share of safety labels that are made wrong")
    flip_preference: float = flag(0.0, "share of preferences that are made wrong")
    skip_bad_rows: bool = flag(False, "leave out and count the rows that cannot be used, instead of stopping")
    # the loss
    beta: float = flag(None, "KL strength: reward = beta · log-ratio to the reference (default: 0.1; 0.3 for mixtures "
                       "on toy)")
    delta: float = flag(10.0, "SafeDPO's offset on safe/unsafe pairs, in units of reward")
    label_smoothing: float = flag(0.0, "share of labels taken to be wrong (conservative DPO)")
    reward_model: str = flag("", "score model of helpfulness, for SPE-DPO's margins: a folder or hub id")
    cost_model: str = flag("", "score model of harm, more than 0 being unsafe: a folder or hub id")
    score_template: str = flag(None, "prompt format of the score models (default: their own)", ("chat", *TEMPLATES))
    router_l1: float = flag(0.001, "weight of MidPO's L1 term |safety| + |helpfulness - 1|; 0 switches it off")
    egs_weight: float = flag(0.1, "weight of PMoL's expert group soft loss; 0 switches it off")
    objective: str = flag("elbo", "of a mixture: elbo, or the poster's weights Σ w L", ("elbo", "weights"))
    latent: str = flag("comparison", "what has a latent expert: each comparison, or each annotator (a group) with all "
                       "of their comparisons", ("comparison", "annotator"))
    q_temperature: float = flag(1.0, "tempers the E-step: more than 1 makes responsibilities softer")
    references: str = flag("", "a mixture's references, one folder for each expert, with commas (default: the model)")
    soft_constraint: str = flag("0.5", "PMoL's s_c from 0 (balance) to 1 (own group only), or one for each group")
    # what is trained
    lora_rank: int = flag(None, "rank of the LoRA expert; 0 trains all weights (default: 0; 16 on toy)")
    lora_alpha: float = flag(None, "LoRA scale is alpha / rank (default: 2 · rank)")
    lora_targets: str = flag(None, "layers that carry experts: names with commas, mlp or all-linear (default: "
                             "down_proj; mlp for pmol on other than toy models)")
    init_adapter: str = flag("", "adapter to start from; for midpo the safety and the helpfulness expert, with a comma")
    experts: int = flag(None, "number of experts, a multiple of the groups (default: one for each group)")
    share: str = flag("", "trunk: a mixture's experts are heads on one trunk; --lora_rank 0 makes them full copies",
                      ("", "trunk"))
    gate: str = flag(None, "a mixture's weights: fixed numbers with commas, constant (learned), prompt or user "
                     "(default: constant for mix-dpo; prompt for moe-dpo, user on toy)")
    expert_noise: float = flag(0.0, "deviation of the experts' B at the start, which sets them apart")
    no_empty_expert: bool = flag(False, "PMoL without its empty expert")
    router_temperature: float = flag(1.0, "of PMoL's softmax routers")
    router_lr: float = flag(None, "routers and gates learn at this many times the learning rate (default: 1; 100 for "
                            "mixtures on toy)")
    router_hidden: int = flag(None, "d_r, the width inside MidPO's routers (default: 512; 64 on toy)")
    router_activation: str = flag("", "between the layers of MidPO's routers (default: none)", ("", *ACTIVATIONS))
    # the optimiser
    epochs: int = flag(None, "passes over the pairs (default: 3; 2 on toy)")
    max_steps: int = flag(0, "stop after this many optimiser steps; 0 means never early")
    batch_size: int = flag(8, "pairs per forward pass")
    grad_accum: int = flag(1, "forward passes per optimiser step")
    lr: float = flag(None, "peak learning rate (default: 1e-6 for all weights, 1e-5 for LoRA; larger on toy)")
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises; then it falls as a cosine")
    weight_decay: float = flag(None, "AdamW's, on matrices (default: 0.05; for spe-dpo 0.01, for midpo 0)")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 means no clipping")
    seed: int = flag(0, "of everything random: data, order, weights, sampling")
    # the machine
    dtype: str = flag("float32", "of the forward pass; trained weights stay float32", ("float32", "bfloat16"))
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps, …")
    compile: bool = flag(False, "torch.compile the model")
    checkpointing: bool = flag(False, "recompute each layer in the backward pass: less memory, a third more time")
    # the run
    resume: bool = flag(False, "continue from the checkpoint in the run folder")
    save_every: int = flag(0, "steps between checkpoints; 0 means only when interrupted")
    log_every: int = flag(10, "steps between rows of metrics.jsonl")
    eval_every: int = flag(0, "steps between measurements on held-out pairs; 0 means only at the end")
    eval_split: str = flag("test", "toy prompts that the closing table is about", ("dev", "test"))
    temperature: float = flag(0.7, "of the answers that are judged")
    wandb: str = flag("", "log to this Weights & Biases project (needs the wandb package)")


# The papers' settings (arXiv 2505.20065, 2506.02460), and those chosen on the toy world's development split.
PAPER = {"epochs": 3, "lora_rank": 0, "lr": {"all weights": 1e-6, "LoRA": 1e-5}, "weight_decay": 0.05,
         "router_hidden": 512, "beta": 0.1, "router_lr": 1.0, "gate": "constant", "annotators": 0,
         "lora_targets": "down_proj", "harmful_share": 0.45}
TOY = {**PAPER, "epochs": 2, "lora_rank": 16, "lr": {"all weights": 1.6e-5, "LoRA": 1.6e-4}}
TOY_COMPARISONS = 3000


def resolve(config):
    """Fill in what depends on other settings, and check every value. Raises UserError for one that cannot be."""
    for setting in fields(config):
        value, choices = getattr(config, setting.name), setting.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UserError(f"--{setting.name} {value}: choose from {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{setting.name} {value}: not a finite number")
    for source in sources(config):
        if source not in ("toy", *SOURCES) and not Path(source).exists() or source == "toy" != config.data:
            near = difflib.get_close_matches(source, SOURCES, 1)
            raise UserError(f"--data {source}: neither a file or folder here nor one of toy, {', '.join(SOURCES)}"
                            + (f"; did you mean {near[0]}?" if near else ""))
    method = METHODS[config.method]
    config.out = config.out or f"out/{config.method}"
    config.view = config.view or method.view
    preset = {**PAPER, **method.paper} if config.model != "toy" else {**TOY, **method.paper, **method.toy}
    if config.data != "toy":
        preset |= {"groups": "", "annotators": 0}  # the toy world's are not those of other data
    for name, value in preset.items():
        if getattr(config, name) in (None, ""):
            setattr(config, name, value)
    if isinstance(config.epochs, dict):
        config.epochs = config.epochs.get(config.view, 2)
    if isinstance(config.lr, dict):
        config.lr = config.lr["LoRA" if config.lora_rank else "all weights"]
    config.lora_alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    smallest = dict.fromkeys(
        ("delta", "label_smoothing", "lora_rank", "max_steps", "warmup", "weight_decay", "grad_clip", "save_every",
         "eval_every", "temperature", "seed", "router_l1", "egs_weight", "annotators", "expert_noise", "held_out",
         "flip_safety", "flip_preference"), 0)
    smallest |= dict.fromkeys(("epochs", "batch_size", "grad_accum", "log_every", "router_hidden"), 1) | {"max_len": 8}
    for name, least in smallest.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least {least}")
    for name in ("beta", "lr", "lora_alpha", "router_temperature", "router_lr", "harmful_share", "q_temperature"):
        if getattr(config, name) <= 0 and (name != "lora_alpha" or config.lora_rank):
            raise UserError(f"--{name} {getattr(config, name)}: must be more than 0")
    if method.build in (routed_pair, routed_experts, whole_experts) and not config.lora_rank and not config.share:
        raise UserError(f"--lora_rank 0: --method {config.method} trains LoRA experts; it needs a rank of at least 1")
    for name, limit in (("label_smoothing", 0.5), ("held_out", 1), ("flip_safety", 1), ("flip_preference", 1),
                        ("harmful_share", 1)):
        if getattr(config, name) >= limit:
            raise UserError(f"--{name} {getattr(config, name)}: must be less than {limit}")
    check_lists(config)
    try:
        torch.empty(1, device=config.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {config.device}: {str(error).splitlines()[0]}") from None
    return config


def check_lists(config):
    """Check the settings that are lists of numbers or names. Raises UserError."""
    def numbers(name, text, what, fits):
        try:
            values = numbers_in(text)
        except ValueError:
            values = []
        if not values or not all(map(fits, values)):
            raise UserError(f"--{name} {getattr(config, name)}: expected {what}")

    numbers("soft_constraint", config.soft_constraint, "numbers from 0 to 1", lambda value: 0 <= value <= 1)
    if config.gate not in GATES:
        numbers("gate", config.gate, f"{', '.join(GATES)} or positive numbers with commas",
                lambda value: 0 < value < math.inf)
    if len(set(group_names(config))) < len(group_names(config)):
        raise UserError(f"--groups {config.groups}: a name stands there twice")
    if config.references and METHODS[config.method].forward is not expert_logps:
        raise UserError("--references: only the experts of mix-dpo and moe-dpo have references of their own")
    if config.experts is not None and config.experts < 1:
        raise UserError(f"--experts {config.experts}: must be at least 1")
    if shares := group_shares(config):
        for share in shares:
            if not 0 < share < math.inf:
                raise UserError(f"--groups {config.groups}: a share must be a number more than 0")
    if config.data == "toy" and (unknown := set(group_names(config)) - set(PREFERENCES)):
        raise UserError(f"--groups: the toy world has no preference {min(unknown)}; it has {', '.join(PREFERENCES)}")


def parse_flags(argv):
    """argv -> Config, checked. Raises UserError."""
    parser = Parser(prog="train.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    for setting in fields(Config):
        default, help = setting.default, setting.metadata["help"]
        if setting.metadata["choices"]:
            help += f": {', '.join(setting.metadata['choices'])}"
        if setting.type is bool:
            parser.add_argument(f"--{setting.name}", action="store_true", help=help)
        else:
            shown = "" if default in (None, "") else f" (default: {default})"
            parser.add_argument(f"--{setting.name}", type=setting.type, default=default, metavar=setting.type.__name__,
                                help=(help + shown).replace("%", "%%"))
    return resolve(Config(**vars(parser.parse_args(argv))))


# ---------------------------------------------------------------------------------------------------------
# The toy base model


TOY_MODEL = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=128, intermediate_size=384,
                 num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5,
                 tie_word_embeddings=True, hidden_act="silu", bos_token_id=0, eos_token_id=1)
TOY_BASE = dict(method="sft", lora_rank=0, lr=4e-3, weight_decay=0.05, batch_size=24, epochs=1, warmup=0.05)
TOY_DEMONSTRATIONS = 30_000


def toy_recipe(tokenizer, seed):
    """A fingerprint of how the base model is made, so that a change of the toy world makes a new one."""
    some = toy_demonstrations(tokenizer, 200, seed)
    return hashlib.blake2b(repr((TOY_MODEL, TOY_BASE, TOY_DEMONSTRATIONS, some)).encode(), digest_size=16).hexdigest()


def toy_base(seed, device):
    """The folder of the toy base model, which is made on first use (about a minute on two CPU cores) and kept."""
    folder = Path("out") / f"toy-base-seed{seed}"
    if (folder / "recipe.txt").is_file():
        if (folder / "recipe.txt").read_text() == toy_recipe(Tokenizer(folder), seed):
            return folder
    print(f"making the toy base model, once: {folder}", flush=True)
    with replacing_folder(folder) as partial:
        tokenizer = make_toy_tokenizer(partial)
        rows = toy_demonstrations(tokenizer, TOY_DEMONSTRATIONS, seed)
        encoded = encode(tokenizer, [prompt for prompt, _ in rows], [(answer,) for _, answer in rows], max_len=256)
        shape = ModelConfig.from_hf({**TOY_MODEL, "vocab_size": tokenizer.backend.get_vocab_size()})
        model = Transformer(shape).init_weights(seed, deviation=0.05).to(device)  # 0.02 is for wider models
        train(model, encoded, None, resolve(Config(**TOY_BASE, seed=seed, device=device)), partial)
        model.folder = partial
        model.save_pretrained(partial / "weights")
        for file in (partial / "weights").iterdir():
            file.replace(partial / file.name)
        (partial / "weights").rmdir()
        write_text(partial / "recipe.txt", toy_recipe(tokenizer, seed))
    return folder


# ---------------------------------------------------------------------------------------------------------
# Reference log-probabilities


def fingerprint(model, encoded, config):
    """A name for everything that the reference log-probabilities depend on: weights, tokens and precision."""
    digest = hashlib.blake2b(config.dtype.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if is_mixture(name):
            continue  # the reference policy is the model without its experts
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(encoded.tokens)
    digest.update(encoded.bounds)
    return digest.hexdigest()


@torch.no_grad()
def reference_logps(model, encoded, config, out, name="reference"):
    """log π_ref of every response, (N, R) float32 on the CPU: one pass before training, kept in the run folder.

    They never change during training, so no second network stays in memory. A file made for another model, data
    or precision has another fingerprint in its name and is not read.
    """
    path = Path(out) / f"{name}-{fingerprint(model, encoded, config)}.safetensors"
    if path.is_file():
        return load_file(path)["logps"]
    model.eval()
    logps = torch.empty(len(encoded), encoded.bounds.shape[1] - 2)
    by_length = np.argsort(-encoded.lengths(), kind="stable")
    rows = 4 * config.batch_size
    for start in tqdm(range(0, len(encoded), rows), desc="reference", unit="batch", leave=False):
        indices = by_length[start:start + rows]
        with without_experts(model), precision(config):
            logps[indices] = policy_logps(model, pack(encoded, indices).to(config.device)).cpu()
    for old in Path(out).glob(f"{name}-*.safetensors"):
        old.unlink()
    with replacing_file(path) as temporary:
        save_file({"logps": logps}, temporary)
    return logps


def references_of(model, encoded, config, out, name):
    """Reference log-probabilities: (N, R) of the base model, or with --references (N, R, K), one model at a time."""
    if not config.references:
        return reference_logps(model, encoded, config, out, name)
    each = (Transformer.from_pretrained(folder, device=config.device) for folder in config.references.split(","))
    return torch.stack([reference_logps(one, encoded, config, out, f"{name}-{k}") for k, one in enumerate(each)], -1)


def precision(config):
    """The context of a forward pass: --dtype."""
    device = torch.device(config.device).type
    return torch.autocast(device, DTYPES[config.dtype]) if config.dtype != "float32" else nullcontext()


def batch_loss(model, encoded, indices, reference, config):
    """The method's (loss, figures) on the pairs with these indices: one forward pass."""
    method, batch = METHODS[config.method], pack(encoded, indices).to(config.device)
    with precision(config):
        outputs = method.forward(model, batch)
    known = None if reference is None else reference[indices].to(config.device)
    return method.loss(outputs, known, batch, config)


# ---------------------------------------------------------------------------------------------------------
# The training loop


def learning_rate(step, steps, config):
    """Linear warm-up to the peak, then a cosine to zero."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def epoch_order(count, epochs, seed, group=None, shares=None, together=False):
    """The order in which pairs are seen: each epoch a permutation of its own, joined end to end.

    With shares, group (count,) being each pair's group, an epoch has pairs of group i in proportion to shares[i]: each
    group's own permutation, repeated or cut, spread evenly over the epoch, so that every batch mixes them. together
    keeps the pairs of a group next to each other, the groups in a new order in each epoch.
    """
    orders = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        if shares is not None:
            mine = [order[group[order] == i] for i in range(len(shares))]
            sizes = [round(count * share / sum(shares)) for share in shares]
            places = np.concatenate([(np.arange(size) + 0.5) / max(1, size) for size in sizes])
            pieces = np.concatenate([np.resize(some, size) for some, size in zip(mine, sizes)])
            order = pieces[np.argsort(places, kind="stable")]
        if together:
            turn = np.random.default_rng([seed, epoch, 1]).permutation(group.max() + 1)
            order = order[np.argsort(turn[group[order]], kind="stable")]
        orders.append(order)
    return np.concatenate(orders)


@contextmanager
def stop_signals():
    """Yield a list that is no longer empty once Ctrl-C or SIGTERM came; a second one ends the program at once."""
    came, before = [], {}

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def measure(model, encoded, reference, config):
    """The method's loss and figures on pairs that are not trained on: {"eval/loss": …, …}, means over the pairs."""
    model.eval()
    sums, by_length = {}, np.argsort(-encoded.lengths(), kind="stable")
    rows = 4 * config.batch_size  # without a backward pass there is room for more
    for start in range(0, len(encoded), rows):
        indices = by_length[start:start + rows]
        loss, figures = batch_loss(model, encoded, indices, reference, config)
        add(sums, {"loss": loss, **figures}, len(indices))
    model.train()
    return {f"eval/{name}": float(total) / len(encoded) for name, total in sums.items()}


def train(model, encoded, reference, config, out, held_out=None, held_out_reference=None):
    """Minimise the method's loss over the encoded pairs. Writes metrics.jsonl and, when told to, checkpoint/.

    reference: (N, R) log-probabilities or None. held_out: pairs to measure every eval_every steps and at the end.
    Raises KeyboardInterrupt after a signal, the checkpoint saved.
    """
    out, parameters = Path(out), trainable_parameters(model)
    kinds = {}  # (is it a matrix, does it belong to a router or gate) -> parameters
    for name, parameter in parameters:
        kinds.setdefault((parameter.dim() >= 2, is_router(name)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": some, "weight_decay": config.weight_decay * matrix, "factor": config.router_lr if routes else 1.0}
         for (matrix, routes), some in kinds.items()], lr=config.lr, betas=(0.9, 0.95), fused=True)
    shares, group = group_shares(config), encoded.labels.get("group")
    if shares and config.annotators:  # the shares are those of tastes, the groups are people
        kinds = [population(name) for name in encoded.groups]
        group = np.array([group_names(config).index(kind) for kind in kinds])[group]
    order = epoch_order(len(encoded), config.epochs, config.seed, group, shares, config.latent == "annotator")
    lengths = encoded.lengths()
    per_step = config.batch_size * config.grad_accum
    steps = max(1, len(order) // per_step)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    first = load_checkpoint(out, parameters, optimizer) if config.resume else 0
    run = start_wandb(config)
    metrics = open_metrics(out / "metrics.jsonl", first)
    bar = tqdm(range(first, steps), desc=config.method, unit="step", initial=first, total=steps)
    model.train()
    sums, tokens, since, seen = {}, 0, time.perf_counter(), 0
    with stop_signals() as came, metrics, bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config) * group["factor"]
            for part in range(config.grad_accum):
                start = step * per_step + part * config.batch_size
                indices = order.take(range(start, start + config.batch_size), mode="wrap")
                loss, figures = batch_loss(model, encoded, indices, reference, config)
                (loss / config.grad_accum).backward()
                tokens += int(lengths[indices].sum())
                add(sums, {"loss": loss.detach(), **figures})
            grad_norm = torch.nn.utils.clip_grad_norm_([p for _, p in parameters], config.grad_clip or math.inf)
            add(sums, {"grad_norm": grad_norm}, config.grad_accum)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += config.grad_accum
            last = step + 1 == steps
            due = held_out is not None and (last or (config.eval_every and (step + 1) % config.eval_every == 0))
            if (step + 1) % config.log_every == 0 or last or due:
                now = time.perf_counter()
                row = {"step": step + 1, **{name: float(total) / seen for name, total in sums.items()},
                       "lr": learning_rate(step, steps, config), "tokens/s": tokens / (now - since)}
                if due:
                    row.update(measure(model, held_out, held_out_reference, config))
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                if run:
                    run.log(row)
                shown = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins", "tok/s": "tokens/s"}
                bar.set_postfix({short: f"{row[name]:.4g}" for short, name in shown.items() if name in row})
                sums, tokens, since, seen = {}, 0, time.perf_counter(), 0
            if came or (config.save_every and (step + 1) % config.save_every == 0):
                save_checkpoint(out, step + 1, parameters, optimizer)
            if came:
                raise KeyboardInterrupt
    model.eval()


def open_metrics(path, first):
    """metrics.jsonl, opened to append; rows of steps that a resumed run does again are taken out."""
    rows = path.read_text(encoding="utf-8").splitlines() if first and path.is_file() else []
    write_text(path, "".join(row + "\n" for row in rows if json.loads(row)["step"] <= first))
    return open(path, "a", encoding="utf-8")


def add(sums, figures, times=1):
    for name, value in figures.items():
        sums[name] = sums.get(name, 0) + value * times


def start_wandb(config):
    """A Weights & Biases run, or None without --wandb."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    return wandb.init(project=config.wandb, config=asdict(config))


def save_checkpoint(out, step, parameters, optimizer):
    with replacing_folder(out / "checkpoint") as partial:
        state = {"step": step, "parameters": dict(parameters), "optimizer": optimizer.state_dict()}
        torch.save(state, partial / "state.pt")


@torch.no_grad()
def load_checkpoint(out, parameters, optimizer):
    """Restore what `save_checkpoint` wrote; returns the number of steps done. Raises UserError if it does not fit."""
    path = out / "checkpoint" / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    stored = state["parameters"]
    for name, parameter in parameters:
        if name not in stored or stored[name].shape != parameter.shape:
            raise UserError(f"--resume: {path} was saved by a run with other settings ({name} does not fit)")
        parameter.copy_(stored[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---------------------------------------------------------------------------------------------------------
# A run


def base_folder(config):
    """The folder of the model that training starts from; the toy world's is made, a hub's is downloaded."""
    folder = toy_base(config.seed, config.device) if config.model == "toy" else find_folder(config.model)
    read_config(folder)  # a family that we do not have is named before anything long begins
    return folder


def load_model(config, groups=()):
    """(model, tokenizer) that training starts from. Weights that will be trained are float32. groups: the data's."""
    folder = base_folder(config)
    dtype = DTYPES[config.dtype] if config.lora_rank or config.init_adapter else torch.float32
    model = Transformer.from_pretrained(folder, dtype, config.device)
    if model.config.learned_positions and config.max_len > model.config.max_positions:
        raise UserError(f"--max_len {config.max_len}: this model has {model.config.max_positions} positions")
    model = METHODS[config.method].build(config, model, groups)
    model.model.checkpointing = config.checkpointing
    return model, Tokenizer(folder, config.template)


def save_model(model, out):
    """Write what was trained: out/model (a whole model), out/adapter (one expert, for PEFT) or out/experts."""
    experts = [layer for _, layer in expert_layers(model)]
    if isinstance(model, ScoreModel) or not experts:
        merge_experts(model).save_pretrained(out / "model")
    elif experts[0].num_experts == 1 and model.router_spec == {"type": "constant"} and not hasattr(model, "gate"):
        save_adapter(model, out / "adapter")
    else:
        save_experts(model, out / "experts")


# What may differ between an interrupted run and its continuation: where and how it runs, not what it computes.
FREE_ON_RESUME = {"resume", "out", "device", "compile", "checkpointing", "save_every", "log_every", "eval_every",
                  "eval_split", "temperature", "wandb"}


def run_settings(config, base):
    """What config.json says: the flags, the base model's folder, and a name for what is in the files that go in."""
    names = [str(base), *sources(config), config.reward_model, config.cost_model, *config.init_adapter.split(","),
             *config.references.split(",")]
    inputs = {name: files_key(name) for name in names if name and Path(name).exists()}
    if config.data == "toy":
        inputs["toy"] = content_key([Path(__file__).with_name("data.py")])
    return {**asdict(config), "base": str(base), "inputs": inputs}


def is_complete(config):
    """Whether the run folder holds the finished run of these very settings, on the same files."""
    out = Path(config.out)
    written = any(any(out.glob(f"{name}/*.safetensors")) for name in WEIGHT_FOLDERS)
    if not written or not (out / "config.json").is_file():
        return False
    before, settings = read_json(out / "config.json"), run_settings(config, base_folder(config))
    return all(before.get(name) == value for name, value in settings.items() if name not in FREE_ON_RESUME)


def open_run(config, base):
    """Make the run folder, write config.json, and remove what an earlier run left there unless this one resumes it.

    Raises UserError when the folder cannot be written, or --resume comes with other settings than the run's.
    """
    out, settings = Path(config.out), run_settings(config, base)
    if config.resume:
        if not (out / "checkpoint").is_dir():
            raise UserError(f"--resume: there is no checkpoint in {out}")
        for name, before in read_json(out / "config.json").items():
            if name not in FREE_ON_RESUME and settings.get(name) != before:
                raise UserError(f"--resume: the run in {out} has {name} = {before}, not {settings.get(name)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    if not config.resume:
        for folder in (*WEIGHT_FOLDERS, "checkpoint"):
            shutil.rmtree(out / folder, ignore_errors=True)
        for file in (*out.glob("eval*.json"), *out.glob("samples*.txt"), out / "metrics.jsonl", out / "experts.json"):
            file.unlink(missing_ok=True)
    return out


def add_margins(config, parts):
    """Give pairs their margins m = max(0, ±(s(chosen) − s(rejected))) by --cost_model or --reward_model, whichever
    judges this view; without one they keep those of the scores in the data. Returns a line that says how they are.

    Raises UserError when there is neither a model nor a score.
    """
    name = "cost" if config.view in COST_VIEWS else "reward"
    folder = getattr(config, f"{name}_model")
    if folder:
        judge = load_judge(folder, config.score_template, config.dtype, config.device)
        for pairs in parts.values():
            texts = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
            scores = np.reshape(score(*judge, texts, device=config.device, batch_size=64), (-1, 2))
            for pair, (chosen, rejected) in zip(pairs, scores.tolist()):
                pair.margin = score_margin(name, chosen, rejected)
    margins = [pair.margin for pair in parts["train"]]
    if not folder and not any(margins):
        raise UserError(f"--method {config.method}: no margins; name a score model with --{name}_model, or use data "
                        f"whose rows have scores.{name} (eval.py --score writes them)")
    return (f"margins by {folder or f'the scores in {config.data}'}: mean {np.mean(margins):.3g}, clipped to 0 in "
            f"{margins.count(0.0) / len(margins):.1%} of the pairs")


def sources(config):
    """What --data names; a path with a comma in its name is one source."""
    return [config.data] if Path(config.data).exists() else config.data.split(",")


def group_names(config):
    """The names in --groups, without their shares."""
    return [part.partition("=")[0] for part in config.groups.split(",") if part]


def group_shares(config):
    """The shares in --groups, 1 for one that is not given; None where none is."""
    shares = [part.partition("=")[2] for part in config.groups.split(",") if part]
    try:
        return [float(share or 1) for share in shares] if any(shares) else None
    except ValueError:
        raise UserError(f"--groups {config.groups}: a share must be a number more than 0") from None


HELD_OUT_PAIRS = 1000  # at most so many are measured: the standard error of an accuracy is then 1.6 % or less


def toy_data(config):
    """(comparisons to train on, held-out comparisons, no lines) of the toy world; no prompt is in both."""
    names = group_names(config)
    make = partial(toy_preferences, names=names, annotators=config.annotators) if names else \
        partial(toy_comparisons, harmful_share=config.harmful_share)
    comparisons = make(TOY_COMPARISONS, config.seed)
    seen = {comparison.prompt for comparison in comparisons}
    test = [c for c in make(TOY_COMPARISONS // 4, config.seed + 1_000_000) if c.prompt not in seen]
    return comparisons, test, []


def source_data(config, files):
    """The same of files, {source: (training files, test files)}, with lines that say what was counted. Of several
    sources, each is a group."""
    every = [], [], []
    for source, found in files.items():
        for whole, part in zip(every, load_comparisons(*found, config.seed, config.held_out, config.skip_bad_rows)):
            if len(files) > 1 and whole is not every[2]:
                for comparison in part:
                    comparison.group = source
            whole += part
    return every


def load_data(config, tokenizer):
    """(pairs to train on, held-out pairs or None), tokenised. Prints what was kept, dropped and cut.

    Kept under out/cache by content: the same files, tokenizer and settings are not read and tokenised twice. That
    folder may be deleted at any time.
    """
    each, path = {}, None
    if config.data != "toy":
        each = {source: source_files(source) for source in sources(config)}
        files = [sum((list(found[part]) for found in each.values()), []) for part in (0, 1)]  # to train on, to test
        settings = [getattr(config, name) for name in ("view", "max_len", "seed", "held_out", "flip_safety",
                                                       "flip_preference", "skip_bad_rows", "score_template",
                                                       "groups")]
        code = Path(__file__).with_name("data.py")  # decides what becomes of a row, so it is a part of the content
        folders = [[file.parent.name for file in part] for part in files]  # in hh-rlhf they name the group
        judges = [files_key(find_folder(name)) for name in (config.reward_model, config.cost_model) if name]
        key = content_key([code, *files[0], *files[1]], folders, list(each), config.method, judges, tokenizer.key(),
                          settings, HELD_OUT_PAIRS)
        path = Path("out") / "cache" / f"{key}.safetensors"
        if path.is_file():
            parts, lines = load_encoded(path, ("train", "held_out"))
            print(*lines, f"tokens: from {path}", sep="\n", flush=True)
            return parts
    comparisons, test, lines = toy_data(config) if config.data == "toy" else source_data(config, each)
    if config.flip_safety or config.flip_preference:  # held-out labels stay as they are
        lines.append(flip_labels(comparisons, config.flip_safety, config.flip_preference, config.seed))
    np.random.default_rng(config.seed).shuffle(test)
    pairs, parts = {}, {"held_out": None}
    for name, some in (("train", comparisons), ("held_out", test)):
        try:
            pairs[name], line = apply_view(config.view, some)
        except UserError:
            if name == "train":
                print(*lines, sep="\n")
                raise
            continue  # nothing is held out in this view: there is just nothing to measure
        pairs[name] = pairs[name] if name == "train" else pairs[name][:HELD_OUT_PAIRS]
        lines += [line] * (name == "train")
    if METHODS[config.method].margins:
        lines.append(add_margins(config, pairs))
    names = [] if config.annotators else group_names(config)  # with annotators on toy, they are the groups
    for name, some in pairs.items():
        if names and name == "train" and (absent := set(names) - {pair.group for pair in some}):
            raise UserError(f"--groups: no comparison belongs to {', '.join(sorted(absent))}; there are "
                            f"{', '.join(sorted({pair.group for pair in some if pair.group})) or 'no groups'}")
        some = [pair for pair in some if not names or pair.group in names]
        if not some:
            continue
        parts[name] = encode_pairs(tokenizer, some, config.max_len, METHODS[config.method].responses,
                                   names or (parts["train"].groups if name != "train" else ()))
        if parts[name].cut:
            said = ", ".join(f"{count} {what}" for what, count in parts[name].cut.items())
            lines.append(f"{name}: longer than --max_len {config.max_len}: {said}")
    print(*lines, sep="\n", flush=True)
    if path:
        save_encoded(path, parts, lines)
    return parts["train"], parts["held_out"]


def population(group):
    """A group's name without a number at its end."""
    return re.sub(r" \d+$", "", group)


@torch.no_grad()
def expert_margins(model, encoded, reference, config):
    """Of every pair: Δr under each expert, (N, K), and the gate's log w, (N, K), float32 on the CPU."""
    margins, log_gates = np.empty((2, len(encoded), config.experts), dtype=np.float32)
    for start in range(0, len(encoded), 4 * config.batch_size):
        indices = np.arange(start, min(start + 4 * config.batch_size, len(encoded)))
        with precision(config):
            logps, log_gate = expert_logps(model, pack(encoded, indices).to(config.device))
        known = reference[indices].to(config.device)
        ratios = logps - (known.permute(2, 0, 1) if known.dim() == 3 else known)        # (K, N, 2)
        margins[indices] = config.beta * (ratios[..., 0] - ratios[..., 1]).T.cpu()
        log_gates[indices] = log_gate.cpu()
    return torch.from_numpy(margins), torch.from_numpy(log_gates)


def expert_report(model, encoded, held_out, references, config):
    """What the experts of a mixture have become, and a sentence for each way in which they have not parted.

    Returns a dict: "responsibility" of each expert; "accuracy" {population: [share of its held-out pairs that each
    expert orders rightly]}; "recovered": the share of the groups whose responsible expert, by their training pairs,
    is that of their population, under the best one-to-one naming of experts. A population is a group's name without
    a number at its end: the toy world's annotators carry their planted type there, which training does not read.
    """
    margins, log_gate = expert_margins(model, encoded, references[0], config)
    joint = F.logsigmoid(margins) + log_gate
    group = torch.from_numpy(encoded.labels["group"])
    known, count = group >= 0, len(encoded.groups)
    evidence = torch.zeros(count, config.experts).index_add(0, group[known], F.logsigmoid(margins[known]))
    pairs = group[known].bincount(minlength=count)[:, None].clamp(min=1)
    prior = torch.zeros(count, config.experts).index_add(0, group[known], log_gate[known]) / pairs
    responsible = (evidence + prior).argmax(-1)                                          # (groups,)
    kinds = [population(name) for name in encoded.groups]
    populations = sorted(set(kinds))
    share = joint.softmax(-1).mean(0).tolist()
    report, said = {"responsibility": share}, []
    if max(share) > 0.95:
        said.append(f"the mixture has collapsed: expert {share.index(max(share))} takes {max(share):.0%} of all "
                    "responsibility")
    agree = float((margins > 0).eq(margins[:, :1] > 0).all(-1).float().mean())
    if agree > 0.95 and config.experts > 1:
        said.append(f"the experts agree: they order {agree:.0%} of the pairs in the same way")
    table = torch.tensor([[sum(r == k and kind == name for r, kind in zip(responsible.tolist(), kinds))
                           for k in range(config.experts)] for name in populations])     # (populations, K)
    if 0 < len(populations) <= config.experts <= 6:
        report["recovered"] = max(sum(int(table[p, k]) for p, k in enumerate(naming)) for naming in
                                  itertools.permutations(range(config.experts), len(populations))) / count
    if held_out is not None:
        right = (expert_margins(model, held_out, references[1], config)[0] > 0).float()  # (N, K)
        of = np.array([*kinds, "unknown"])[held_out.labels["group"]]
        report["accuracy"] = {name: right[torch.from_numpy(of == name)].mean(0).tolist()
                              for name in populations or ["unknown"]}
    return report, said


def run(config):
    """One run: data, model, reference, training, weights, and on toy the oracle's table. It needs no other stage."""
    method = METHODS[config.method]
    started = time.perf_counter()
    base = base_folder(config)
    ready = time.perf_counter()
    encoded, held_out = load_data(config, Tokenizer(base, config.template))
    model, tokenizer = load_model(config, encoded.groups)
    out = open_run(config, base)
    references = []
    for pairs, name in ((encoded, "reference"), (held_out, "held-out-reference")):
        known = None
        if pairs is not None:
            method.prepare(model, pairs, config)
            known = references_of(model, pairs, config, out, name) if method.reference else None
        references.append(known)
    if config.compile:
        model.model.compile()
    train(model, encoded, references[0], config, out, held_out, references[1])
    save_model(model, out)
    if hasattr(model, "gate"):
        found, said = expert_report(model, encoded, held_out, references, config)
        write_text(out / "experts.json", json.dumps(found, indent=2) + "\n")
        print(*said, *(f"{name}: {value}" for name, value in found.items()), sep="\n")
    shutil.rmtree(out / "checkpoint", ignore_errors=True)  # the run is done: there is nothing to resume
    trained = time.perf_counter()
    if config.model == "toy" and not isinstance(model, ScoreModel):
        plain = Transformer.from_pretrained(base, device=config.device)
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():  # shapes grow by the token
            preferences = group_names(config) if config.data == "toy" else ()
            report, shown = evaluate_run(model, plain, tokenizer, out, config.eval_split, config.seed,
                                         config.temperature, "eval", preferences)
        rows = {"base": report["base"], config.method: report["policy"]}
        print("", *filter(None, (shown, table(rows), report_tables(report, config.method))), sep="\n\n")
    done = time.perf_counter()
    print(f"\nbase model {ready - started:.0f} s, training {trained - ready:.0f} s, evaluation {done - trained:.0f} s; "
          f"the run is in {out}/")


def main(argv=None):
    # Responsibilities and router weights run down to 1e-40, and a CPU takes such numbers a hundred times slower than 0
    torch.set_flush_denormal(True)
    config = parse_flags(argv)
    stages = METHODS[config.method].stages(config)
    for before in stages:
        if is_complete(before):
            print(f"{before.out}: complete for these settings, kept", flush=True)
        else:
            print(f"{before.out}: --method {before.method} --view {before.view}", flush=True)
            run(before)
    config.resume = config.resume and (not stages or (Path(config.out) / "checkpoint").is_dir())
    run(config)


if __name__ == "__main__":
    as_command(main, "train.py", "interrupted; if training had begun, --resume goes on from there")
