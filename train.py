"""Train a policy by preference: `python train.py --method safedpo --delta 10` runs with nothing else given.

A method is a row of METHODS: a view of the comparisons × what is trained × a loss. Each algorithm is one section, with
its idea, builder, loss, prerequisite runs and row. Then comes what all methods share: settings, the toy base model,
reference log-probs, the training loop, and the steps of a run in `run` and `main`.
"""
import ctypes
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

import losses
import toy
from batch import batches, encode_pairs, epoch_order, pack, policy_logps, precision, show_pair, split_step
from chat import TEMPLATES, TEMPLATE_NAMES, Tokenizer
from common import (DTYPES, Parser, UserError, as_command, atomic_folder, check_device, check_values, content_hash,
                    files_hash, is_part, numbers, setting, source_names, stop_signals, weighted_names, whole, write_text)
from data import SOURCES, VIEWS, apply_view, carry_scores, check_source, flip_labels, load_sources, require
from eval import evaluate_run, gate_weights, load_start
from judges import add_margins
from lora_moe import (adapter_warnings, add_experts, add_gate, add_head_copies, cached_logps, count_experts,
                      disable_experts, expert_layers, freeze_experts, is_mixture, is_router, load_adapter, load_trained,
                      mixture_logps, perturb_experts, pooled_states, read_adapter_config, router_weights, save_trained,
                      set_routers, trainable_parameters, use_expert)
from model import ScoreModel, Transformer, compile_once, find_folder, read_config, shard
from report import annotator_type, mixture_report
from runs import (ALONE, Processes, RunLog, add_up, close_run, load_checkpoint, one_line_if_lost, open_run,
                  read_settings, save_checkpoint)


# A method: what it consists of, and the forward pass and builder of most of them


def add_lora(config, model, num_experts=1, router=None):
    return add_experts(model, config.lora_targets, config.lora_rank, config.lora_alpha, num_experts, seed=config.seed,
                       router=router)


def build_policy(config, model, groups):
    """All weights, or one LoRA expert: a fresh one, or --init_adapter."""
    if config.init_adapter:
        return load_adapter(model, *config.init_adapter)
    return add_lora(config, model) if config.lora_rank else model


def check_policy(config):
    if len(config.init_adapter) > 1:
        raise UserError(f"--init_adapter: {len(config.init_adapter)} adapters, but --method {config.method} trains one")


@dataclass(frozen=True)
class Method:
    """A view of the comparisons × what is trained × a loss.

    loss(forward(model, batch), reference (N, R), batch, config) -> (mean loss, metrics); R responses to a prompt.
    """
    view: str
    loss: Callable
    forward: Callable = policy_logps
    build: Callable = build_policy
    reads: tuple = ()             # the flags that it reads and not every method does
    responses: int = 2            # 1: only the chosen response is trained on
    reference: str = "start"      # the policy that the loss compares with: the start, the base below it, or "" for none
    labels: tuple = ()            # of Pair, without which the loss is not defined
    preset: dict = field(default_factory=dict)  # settings that differ from the defaults in Config, as on a command line
    toy: dict = field(default_factory=dict)     # … and on a toy model from those in TOY
    check: Callable = check_policy                           # raises UserError for settings that do not fit together
    prerequisites: Callable = lambda config: ([], {})        # runs before this one; settings that name their results
    settle: Callable = lambda config, groups: config         # settings that depend on the data
    prepare: Callable = lambda model, encoded, config: None  # adds labels that need the model
    schedule: Callable = lambda config, done: config         # settings after this share of the steps
    report: Callable | None = None                           # diagnostics of the trained model, for experts.json


# TOY was chosen on the development split. For other models the defaults in Config are those of SafeDPO's paper, LoRA's
# rate MidPO's; a preset says whose it is. The papers' batches are 8 or 4 pairs on each of several GPUs (--grad_accum).
TOY = {"epochs": 2, "lora_rank": 16, "lr": lambda v: 1.6e-4 if v["lora_rank"] else 1.6e-5}
METHODS = {}
PREFERENCE = ("beta", "label_smoothing")


# SFT, DPO and SafeDPO. DPO raises the log-ratio of the chosen response to the reference over that of the rejected one
# (arXiv 2305.18290). SafeDPO is DPO on the pairs that T (data.py: safedpo_transform) keeps, swaps or drops, with an
# offset Δ on safe/unsafe pairs (arXiv 2505.20065).


def sft(logps, reference, batch, config):
    loss, metrics = losses.sft_loss(logps[:, 0], batch.lengths[:, 0])
    return loss * batch.scale["responses"], {"logps/chosen": metrics["logps/chosen"]}


def dpo(logps, reference, batch, config):
    return losses.dpo_loss(*logps.T, *reference.T, config.beta, config.label_smoothing)


def safedpo(logps, reference, batch, config):
    return losses.safedpo_loss(*logps.T, *reference.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"],
                               config.beta, config.delta, config.label_smoothing)


METHODS["sft"] = Method("helpful", sft, responses=1, reference="", reads=("init_adapter", "turns"),
                        preset={"lr": lambda v: 1e-4 if v["lora_rank"] else 2e-5},  # safe-rlhf's; LoRA: ours
                        toy={"lr": TOY["lr"]})
METHODS["dpo"] = Method("helpful", dpo, reads=("init_adapter", *PREFERENCE))
METHODS["safedpo"] = Method("safedpo", safedpo, reads=("init_adapter", *PREFERENCE, "delta"),
                            labels=("chosen_unsafe", "rejected_unsafe"))


# Reward and cost models: the policy's trunk under a scalar head, read at the last token.
# Bradley-Terry on which response is better (arXiv 2203.02155); a cost model also learns the sign (arXiv 2310.12773).


def response_scores(model, batch):
    """(N, R) scores of a packed batch, each read at its response's last token."""
    return model(batch.tokens, batch.last.flatten(), batch.positions, batch.mask()).view(batch.shape)


def build_score_model(config, model, groups):
    """All weights, or the head and a LoRA expert."""
    model = ScoreModel.from_policy(model)
    if config.lora_rank:
        add_lora(config, model).score.requires_grad_(True)
    return model


def reward(scores, reference, batch, config):
    loss, metrics = losses.reward_loss(*scores.T)
    return loss + config.score_l2 * scores.square().mean(), metrics


def cost(scores, reference, batch, config):
    loss, metrics = losses.cost_loss(*scores.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"])
    return loss + config.score_l2 * scores.square().mean(), metrics


SCORE_MODEL = dict(forward=response_scores, build=build_score_model, reference="", reads=("score_l2",),
                   preset={"lr": lambda v: 1e-4 if v["lora_rank"] else 2e-5, "lora_rank": 0, "epochs": 2,
                           "weight_decay": 0.1},  # safe-rlhf's; LoRA: ours
                   toy={"lr": 3e-4, "epochs": 1, "weight_decay": 0.05, "score_l2": 0.0})
METHODS["reward"] = Method("helpful", reward, **SCORE_MODEL)
METHODS["cost"] = Method("cost", cost, **SCORE_MODEL, labels=("chosen_unsafe", "rejected_unsafe"))


# SPE-DPO and MidPO (arXiv 2506.02460): an expert for safety and one for helpfulness, each by DPO with a margin m of a
# score model; then, both frozen, a router in every layer learns by DPO on D_dual how much of each a token gets.


def spe_dpo(logps, reference, batch, config):
    return losses.spe_dpo_loss(*logps.T, *reference.T, batch.labels["margin"], config.beta, config.label_smoothing)


def routed_logps(model, batch):
    """Log-probs of a packed batch, (N, R), and the router weights of that pass at its tokens: (L, tokens, slots)."""
    return policy_logps(model, batch), router_weights(model, batch.inside)


def build_midpo(config, model, groups):
    """The safety and the helpfulness expert, frozen, under new sigmoid routers."""
    freeze_experts(load_adapter(model, *config.init_adapter))
    return set_routers(model, {"type": "sigmoid", "hidden": config.router_hidden}, config.seed)


def midpo(outputs, reference, batch, config):
    logps, weights = outputs
    loss, metrics = dpo(logps, reference, batch, config)
    safety, helpfulness = weights.unbind(-1)                                            # (L, tokens) each
    scale = batch.scale["tokens"]
    l1 = losses.router_l1(safety, helpfulness) * scale
    return loss + config.router_l1 * l1, {**metrics, "router/l1": l1.detach(),
                                          "router/safety": safety.detach().mean() * scale,
                                          "router/helpfulness": helpfulness.detach().mean() * scale}


def score_model_runs(config, names):
    """Runs for the score models, "reward" or "cost", that are neither given nor replaced by scores in the data."""
    missing = [name for name in names if not getattr(config, f"{name}_model")
               and (config.on_toy or not carry_scores(config.data, name))]
    return ([prerequisite(config, name, name) for name in missing],
            {f"{name}_model": f"{config.out}/{name}/model" for name in missing})


def spe_dpo_prerequisites(config):
    """On toy, the score model of the view. On other data the user names one, or its rows have scores."""
    return score_model_runs(config, [VIEWS[config.view].score] if config.on_toy else [])


def midpo_prerequisites(config):
    """Reward and cost model, safety and helpfulness expert. The run itself is the router's."""
    if config.init_adapter:
        return [], {}
    runs, changes = score_model_runs(config, ("reward", "cost"))
    for view, name in (("safety", "cost_model"), ("helpful", "reward_model")):
        runs.append(prerequisite(config, "spe-dpo", view, view=view, lora_rank=config.lora_rank,
                                 lora_alpha=config.lora_alpha, **{name: changes.get(name) or getattr(config, name)}))
    return runs, {**changes, "init_adapter": tuple(f"{config.out}/{view}/adapter" for view in ("safety", "helpful"))}


def check_midpo(config):
    check_rank(config)
    if len(config.init_adapter) not in (0, 2):
        raise UserError(f"--init_adapter {','.join(config.init_adapter)}: midpo wants two, the safety and the "
                        "helpfulness expert")


def check_rank(config):
    if not config.lora_rank:
        raise UserError(f"--lora_rank 0: --method {config.method} trains LoRA experts; it needs a rank of at least 1")


SCORES = ("reward_model", "cost_model", "score_template")
METHODS["spe-dpo"] = Method(
    "safety", spe_dpo, labels=("margin",), prerequisites=spe_dpo_prerequisites,
    reads=("init_adapter", *PREFERENCE, *SCORES),
    preset={"lora_rank": 16, "weight_decay": 0.01},
    toy={"epochs": lambda v: 1 if v["view"] == "helpful" else 2})  # about as many steps for either expert
METHODS["midpo"] = Method(
    "dual", midpo, routed_logps, build_midpo, reference="base", check=check_midpo, prerequisites=midpo_prerequisites,
    reads=("init_adapter", *PREFERENCE, *SCORES, "router_l1", "router_hidden", "router_lr"),
    preset={"lora_rank": 16, "weight_decay": 0.0, "lr": 1e-5},
    toy={"lr": 3e-4, "epochs": 6, "router_hidden": 64, "harmful_share": 0.7})


# PMoL (arXiv 2411.01245): K experts and an empty one in every wrapped layer under a softmax router, trained together by
# DPO on mixed preferences. A soft loss sends each preference's tokens to its own group of experts.


def settle_pmol(config, groups):
    """--groups and --experts by the preferences of the data. Raises UserError where they do not fit them."""
    if not groups:
        raise UserError("--method pmol: these comparisons do not say which preference they belong to")
    config = replace(config, groups=config.groups or tuple((name, None) for name in groups),
                     experts=config.experts or len(groups))
    if config.experts % len(groups):
        raise UserError(f"--experts {config.experts}: must be a multiple of the number of preferences, {len(groups)}")
    if len(config.soft_constraint) not in (1, len(groups)):
        raise UserError(f"--soft_constraint: {len(config.soft_constraint)} numbers for {len(groups)} groups; give one, "
                        "or one for each")
    return config


def build_pmol(config, model, groups):
    return add_lora(config, model, config.experts, {"type": "softmax", "empty": not config.no_empty_expert,
                                                    "temperature": config.router_temperature})


@cache
def soft_targets(config, device):
    """`group_targets` on a device, with a last row of zeros: tokens of group -1 count 0 in the soft loss."""
    target = losses.group_targets(len(config.groups), config.experts, config.soft_constraint)
    return torch.cat([target, torch.zeros_like(target[:1])]).to(device)


def pmol(outputs, reference, batch, config):
    logps, weights = outputs
    loss, metrics = dpo(logps, reference, batch, config)
    group = batch.labels["group"][batch.pair.flatten()[batch.inside]]                   # (tokens,); -1: no preference
    target = soft_targets(config, weights.device)
    soft = losses.expert_group_soft_loss(weights, group, target) * batch.scale["grouped"]
    weights, scale = weights.detach(), batch.scale["tokens"]
    return loss + config.egs_weight * soft, {
        **metrics, "router/soft_loss": soft.detach(),
        "router/empty": (1 - weights[..., :config.experts].sum(-1).mean()) * scale,
        "router/entropy": torch.special.entr(weights).sum(-1).mean() * scale}


METHODS["pmol"] = Method(
    "helpful", pmol, routed_logps, build_pmol, check=check_rank, settle=settle_pmol,
    reads=(*PREFERENCE, "experts", "egs_weight", "soft_constraint", "no_empty_expert", "router_temperature",
           "router_lr"),
    preset={"lora_rank": 16, "lora_targets": "mlp"},
    toy={"groups": "helpfulness,harmlessness,empathy", "lora_targets": "down_proj", "lr": 8e-5})


# Mix-DPO and MoE-DPO (arXiv 2510.08256): K whole expert policies under one latent Bradley-Terry mixture, trained by its
# ELBO; the gate's weights are constant (Mix-DPO) or depend on the prompt or the user (MoE-DPO).


def build_mixture(config, model, groups):
    """K adapters, or with --share trunk K heads, and the gate."""
    for folder in config.references:
        read_config(find_folder(folder))
    if config.init_adapter:
        load_adapter(model, *config.init_adapter)
    elif config.share == "trunk" and config.lora_rank == 0:
        add_head_copies(model, config.experts, config.seed)
    else:
        add_lora(config, model, config.experts)
    layers = [name for name, _ in expert_layers(model)]
    if "lm_head" in layers and len(layers) > 1:
        raise UserError("--lora_targets: a mixture has its experts in lm_head or below it, not in both")
    return add_gate(model, config.gate, groups)


def moe_dpo(outputs, reference, batch, config):
    logps, log_gate = outputs
    reference = reference.permute(2, 0, 1) if reference.dim() == 3 else reference.expand_as(logps)  # (K, N, 2)
    return losses.moe_dpo_loss(logps, reference, log_gate, config.beta, config.objective,
                               batch.labels.get("annotator"), config.q_temperature[0])


def anneal(config, done):
    """--q_temperature FROM,TO: from one to the other over the run, by the same factor at every step."""
    start, end = config.q_temperature[0], config.q_temperature[-1]
    return config if start == end else replace(config, q_temperature=(start * (end / start) ** done,))


def check_mixture(config):
    if len(config.q_temperature) > 2:
        raise UserError(f"--q_temperature: {len(config.q_temperature)} numbers; give one, or the first and the last")
    for name in ("init_adapter", "references", "gate"):
        value = getattr(config, name)
        if value and not isinstance(value, str) and len(value) != config.experts:
            raise UserError(f"--{name}: {len(value)} {'weights' if name == 'gate' else 'folders'} for "
                            f"{config.experts} experts")
    if not config.share:
        check_rank(config)


def settle_mixture(config, groups):
    if not groups and (config.gate == "user" or config.latent == "annotator"):
        raise UserError("--gate user and --latent annotator: these comparisons do not say who made them")
    return config


def prepare_mixture(model, encoded, config):
    """labels["pooled"], (N, D), for a gate on prompts; labels["annotator"], (N,), where annotators have latents."""
    if config.gate == "prompt":
        encoded.labels["pooled"] = pooled_states(model, encoded, 4 * config.batch_size)
    if config.latent == "annotator":  # a pair without one is an annotator of its own
        group = encoded.labels["group"]
        encoded.labels["annotator"] = np.where(group < 0, group.max() + 1 + np.arange(len(group)), group)


MIXTURE = dict(forward=mixture_logps, build=build_mixture, check=check_mixture, settle=settle_mixture,
               prepare=prepare_mixture, schedule=anneal, report=mixture_report,
               reads=("init_adapter", "beta", "experts", "share", "gate", "expert_noise", "references", "objective",
                      "latent", "q_temperature", "router_lr"))
# The poster gives no rates. Ours: experts part, and a learned gate leaves 1/K, within a few hundred steps of 8 pairs
LORA_MIXTURE = {"lora_rank": 16, "lr": 1e-4, "router_lr": 100.0, "experts": lambda v: len(v["init_adapter"]) or 2,
                "lora_targets": lambda v: "lm_head" if v["share"] == "trunk" else "down_proj"}
TWO_TASTES = {"groups": "warmth,curtness", "annotators": 100, "beta": 0.3, "lr": 2e-4, "router_lr": 100.0}
METHODS["mix-dpo"] = Method("helpful", moe_dpo, **MIXTURE, preset=LORA_MIXTURE, toy=TWO_TASTES)
METHODS["moe-dpo"] = Method("helpful", moe_dpo, **MIXTURE, preset={**LORA_MIXTURE, "gate": "prompt"},
                            toy={**TWO_TASTES, "gate": "user"})


# Settings: each is declared once, with its help, default, bounds and how its text is read


def layer_names(text):
    """"q_proj,v_proj" -> ("q_proj", "v_proj"); "mlp" and "all-linear" stay."""
    return text if text in ("mlp", "all-linear") else tuple(text.split(","))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. `resolve` replaces a default by what the method or the toy model needs."""
    method: str = setting("safedpo", "what to train", "method", tuple(METHODS))
    view: str = setting(None, "how comparisons become pairs", choices=tuple(VIEWS))
    beta: float = setting(0.1, "KL strength: reward = beta · log-ratio to the reference", above=0)
    delta: float = setting(10.0, "SafeDPO's offset on safe/unsafe pairs, in units of reward", least=0)
    label_smoothing: float = setting(0.0, "share of labels taken to be wrong (conservative DPO)", least=0, below=0.5)
    score_l2: float = setting(0.001, "weight of the scores' squares in reward and cost models (safe-rlhf's)", least=0)
    router_l1: float = setting(0.001, "weight of MidPO's L1 term |safety| + |helpfulness - 1|; 0: off", least=0)
    egs_weight: float = setting(0.1, "weight of PMoL's expert group soft loss; 0: off", least=0)
    soft_constraint: tuple = setting("0.5", "PMoL's s_c from 0 (balance) to 1 (own group only), or one for each group",
                                     read=numbers, least=0, most=1)
    objective: str = setting("elbo", "of a mixture: its ELBO, or the poster's Σ w L", choices=("elbo", "weights"))
    latent: str = setting("comparison", "unit that shares one latent expert", choices=("comparison", "annotator"))
    q_temperature: tuple = setting("1", "tempers the E-step: more than 1 makes responsibilities softer; two numbers: "
                                        "from the first to the second over the run", read=numbers, above=0)
    model: str = setting("toy", "toy, a folder in Hugging Face layout, or a hub id", "model and experts")
    lora_rank: int = setting(0, "rank of the LoRA experts; 0: all weights (with --share trunk: whole heads)", least=0)
    lora_alpha: float = setting(lambda v: 2.0 * v["lora_rank"] or None, "LoRA scale is alpha / rank", above=0)
    lora_targets: tuple = setting("down_proj", "layers with experts: names, mlp or all-linear", read=layer_names)
    init_adapter: tuple = setting((), "adapter to start from, or one for each expert of midpo (safety, helpfulness) "
                                      "and mixtures", read=source_names)
    experts: int = setting(None, "number of experts; of pmol a multiple of the groups (default: as many)", least=1)
    share: str = setting("", "trunk: a mixture's experts are heads on one trunk", choices=("", "trunk"))
    gate: str = setting("constant", "a mixture's weights: numbers, or constant, prompt, user, which learn",
                        read=gate_weights)
    references: tuple = setting((), "folders of the references of a mixture's experts (default: their start)",
                                read=source_names)
    expert_noise: float = setting(0.0, "standard deviation of a mixture's B at the start; sets experts apart", least=0)
    no_empty_expert: bool = setting(False, "PMoL without its empty expert")
    router_temperature: float = setting(1.0, "of PMoL's softmax routers", above=0)
    router_hidden: int = setting(512, "d_r, the width inside MidPO's routers", least=1)
    data: tuple = setting(("toy",), f"toy, {', '.join(SOURCES)}, a file or a folder; several are a group each", "data",
                          read=source_names)
    groups: tuple = setting((), "preferences to mix, comma-separated, optionally weighted: help=2,harm=1 (default: the "
                                "data's)", read=weighted_names)
    template: str = setting(None, "prompt format (default: the tokenizer's chat template)", choices=TEMPLATE_NAMES)
    max_len: int = setting(512, "tokens of prompt and response together", least=8)
    held_out: float = setting(0.02, "share of prompts to hold out where the data has no test split", least=0, below=1)
    flip_safety: float = setting(0.0, "share of safety labels to flip", least=0, below=1)
    flip_preference: float = setting(0.0, "share of preferences to flip", least=0, below=1)
    skip_bad_rows: bool = setting(False, "leave out and count the rows that cannot be used, instead of stopping")
    turns: str = setting("all", "turns of the assistant that SFT trains on, in messages", choices=("all", "last"))
    reward_model: str = setting("", "score model of helpfulness, for SPE-DPO's margins: a folder or hub id")
    cost_model: str = setting("", "score model of harm, more than 0 being unsafe: a folder or hub id")
    score_template: str = setting(None, "prompt format of the score models (default: theirs)", choices=TEMPLATE_NAMES)
    epochs: int = setting(3, "passes over the pairs", "optimiser", least=1)
    max_steps: int = setting(0, "stop after this many optimiser steps; 0: at the end of the epochs", least=0)
    batch_size: int = setting(8, "pairs per forward pass of each process", free=True, least=1)
    grad_accum: int = setting(1, "forward passes of each process per optimiser step", free=True, least=1)
    batch_tokens: int = setting(0, "padded tokens that a forward pass may hold: the same step in more passes, for less "
                                   "memory; 0: no limit", free=True, least=0)
    lr: float = setting(lambda v: 1e-5 if v["lora_rank"] else 1e-6, "peak learning rate", above=0)
    router_lr: float = setting(1.0, "routers and gates learn at this many times the learning rate", above=0)
    warmup: float = setting(0.03, "share of the steps in which the rate rises; then it falls as a cosine", least=0)
    weight_decay: float = setting(0.05, "AdamW's, on matrices", least=0)
    grad_clip: float = setting(lambda v: 0.0 if v["low_memory"] else 1.0, "largest gradient norm; 0: no clipping",
                               least=0)
    seed: int = setting(0, "of everything random: data, order, weights, sampling", least=0)
    dtype: str = setting(lambda v: "bfloat16" if v["low_memory"] else "float32",
                         "of the forward pass and frozen weights", "machine", ("float32", "bfloat16"))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps, …", free=True)
    compile: bool = setting(False, "torch.compile the layers, twice at most whatever the batches", free=True)
    fsdp: bool = setting(False, "split the weights over the processes of torchrun (FSDP)", free=True)
    checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory, more time", free=True)
    low_memory: bool = setting(False, "train all weights in 6 bytes each instead of 16: they and AdamW's moments are "
                                      "bfloat16, rounded stochastically; gradients are used and freed as they come")
    out: str = setting(lambda v: f"out/{v['method']}", "run folder", "run", free=True)
    resume: bool = setting(False, "go on from the run folder's checkpoint, if any; leave a finished run", free=True)
    save_every: int = setting(0, "steps between checkpoints; 0: by time and when interrupted", free=True, least=0)
    log_every: int = setting(10, "steps between rows of metrics.jsonl", free=True, least=1)
    eval_every: int = setting(0, "steps between measurements on held-out pairs; 0: at the end", free=True, least=0)
    wandb: str = setting("", "log to this Weights & Biases project (needs the wandb package)", free=True)
    harmful_share: float = setting(0.45, "share of the comparisons that ask for harm", "toy", above=0, below=1)
    annotators: int = setting(0, "number of simulated annotators, each with one preference of --groups", least=0)
    eval_split: str = setting("test", "prompts of the closing table", choices=("dev", "test"), free=True)
    temperature: float = setting(0.7, "of the answers that are judged", free=True, least=0)

    @property
    def on_toy(self):
        """True if the comparisons are the toy world's."""
        return self.data == ("toy",)

    @property
    def preferences(self):
        """The names in --groups."""
        return [name for name, _ in self.groups]

    @property
    def shares(self):
        """The shares in --groups; None where none is given."""
        return [share for _, share in self.groups] if self.groups and self.groups[0][1] else None


# May change when a run is resumed; batch_size and grad_accum only as pairs_per_step stays what it is
FREE = {flag.name for flag in fields(Config) if flag.metadata["free"]}
# Flags that a method reads only in part: (flags, when they are not read, why)
UNREAD = (
    (("lora_targets",), lambda v: v["share"], "--share trunk has its experts in the head"),
    (("lora_alpha", "lora_targets"), lambda v: not v["lora_rank"] and not v["share"], "--lora_rank 0: no experts"),
    (("lora_rank", "lora_alpha", "lora_targets"), lambda v: v["init_adapter"], "--init_adapter has its own"),
    (("latent", "q_temperature"), lambda v: v["objective"] == "weights", "--objective weights has no latent expert"),
    (("router_lr",), lambda v: isinstance(v["gate"], tuple), "a fixed gate does not learn"),
    (("low_memory",), lambda v: v["lora_rank"] or v["init_adapter"] or v["share"],
     "it is for training all weights (--lora_rank 0); experts stay in float32"),
    (("dtype",), lambda v: v["low_memory"] and v["dtype"] == "float32", "--low_memory has bfloat16 weights"),
    (("grad_accum", "grad_clip", "batch_tokens"), lambda v: v["low_memory"],
     "--low_memory uses a gradient as it comes and keeps none"),
    (("fsdp",), lambda v: v["low_memory"], "--low_memory is for weights that one process holds"),
    (("annotators",), lambda v: v["data"] != ("toy",) or not v["groups"], "only toy preferences have annotators"),
    (("harmful_share",), lambda v: v["data"] != ("toy",) or v["groups"], "only toy data without --groups has it"),
    (("held_out", "skip_bad_rows"), lambda v: v["data"] == ("toy",), "toy comparisons come from no file"),
    (("compile",), lambda v: v["fsdp"], "--fsdp gathers and drops weights between the parts that it would compile"),
    (("eval_split", "temperature"), lambda v: v["model"] != "toy", "only a toy model has a closing table"),
)


def resolve(given, inherited=None):
    """{flag: value} -> Config: the one place where settings depend on the method, the model and each other.

    given: what the user typed, inherited: what a prerequisite run takes over. Raises UserError for a value out of
    bounds, and for a given flag that this run would not read.
    """
    typed = {name: tuple(value) if isinstance(value, list) else value
             for name, value in {**(inherited or {}), **given}.items()}
    values = {flag.name: typed.get(flag.name, flag.default) for flag in fields(Config)}
    check_values(Config, {"method": values["method"], **typed})
    method, toy_model, on_toy = METHODS[values["method"]], values["model"] == "toy", values["data"] == ("toy",)
    preset = {"view": method.view, **(TOY if toy_model else {}), **method.preset, **(method.toy if toy_model else {})}
    if not on_toy:
        preset = {name: value for name, value in preset.items() if name not in ("groups", "annotators")}
    values |= {name: value for name, value in preset.items() if name not in typed}
    if values["init_adapter"]:
        adapter = read_adapter_config(Path(values["init_adapter"][0]) / "adapter_config.json")
        values |= {"lora_rank": adapter["r"], "lora_alpha": adapter["lora_alpha"],
                   "lora_targets": adapter["target_modules"]}
    for flag in fields(Config):
        value = values[flag.name](values) if callable(values[flag.name]) else values[flag.name]
        values[flag.name] = flag.metadata["read"](value) if flag.metadata["read"] and isinstance(value, str) else value
    check_values(Config, values)
    check_read(values, given)
    check_inputs(values, given)
    config = Config(**values)
    method.check(config)
    check_device(config.device)
    return config


def readers(flag):
    """The methods that read this flag: those that name it in their row, or all where none does."""
    return [name for name, method in METHODS.items() if flag in method.reads] or list(METHODS)


def check_read(values, given):
    """Raise UserError for a given flag that this run would not read."""
    for flag in given:
        if values["method"] not in readers(flag):
            raise UserError(f"--{flag}: not read by --method {values['method']}, but by {', '.join(readers(flag))}")
        for flags, applies, why in UNREAD:
            if flag in flags and applies(values):
                raise UserError(f"--{flag}: not read in this run: {why}")


def check_inputs(values, given):
    """Raise UserError for an input that is not there, or that this run would replace: it lies in --out."""
    for source in values["data"] if values["data"] != ("toy",) else ():
        check_source(source)
    unknown = {name for name, _ in values["groups"]} - set(toy.PREFERENCES)
    if values["data"] == ("toy",) and unknown:
        raise UserError(f"--groups: toy has no preference {min(unknown)}; it has {', '.join(toy.PREFERENCES)}")
    out = Path(values["out"]).resolve()
    for flag in ("model", "data", "init_adapter", "references", "reward_model", "cost_model"):
        value = given.get(flag, ())
        for name in (value,) if isinstance(value, str) else value:
            path = Path(name).resolve()
            if flag in ("references", "reward_model", "cost_model"):
                find_folder(name)
            if not Path(name).exists() or not path.is_relative_to(out):
                continue
            if path == out or "method" not in read_settings(out / path.relative_to(out).parts[0]):  # no prerequisite's
                raise UserError(f"--{flag} {name}: lies in --out {values['out']}, which this run replaces")


# What a prerequisite run decides for itself; it inherits every other setting that both methods read
OWN = {"method", "view", "out", "epochs", "lr", "weight_decay", "lora_rank", "lora_alpha", "reward_model", "cost_model"}


def prerequisite(config, method, folder, **changes):
    """The Config of a run in a folder under this run's."""
    inherited = {flag.name: getattr(config, flag.name) for flag in fields(Config)
                 if flag.name not in OWN and {config.method, method} <= set(readers(flag.name))}
    return resolve({}, {**inherited, "method": method, "out": f"{config.out}/{folder}", **changes})


def parse_flags(argv):
    """argv -> Config, checked. Raises UserError."""
    about = __doc__.partition("\n")[0]
    given = vars(Parser(Config, "train.py", about, {}).parse_args(argv))
    if given.pop("help", False):  # --help --method midpo shows the flags and values of that method
        config = resolve(given)
        hidden = [flag.name for flag in fields(Config) if "method" in given and config.method not in readers(flag.name)]
        Parser(Config, "train.py", about, asdict(config), hidden).print_help()
        raise SystemExit(0)
    return resolve(given)


# The toy base model
TOY_BASE = dict(method="sft", lora_rank=0, lr=4e-3, weight_decay=0.05, batch_size=24, epochs=1, warmup=0.05)


def toy_base(seed, device):
    """The folder of the toy base model, which is made on first use (about two minutes on one CPU core) and kept."""
    folder = Path("out") / f"toy-base-seed{seed}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):  # a second command waits for the first, and finds what it made
        if not toy.is_base(folder, seed, TOY_BASE):
            print(f"making the toy base model, once: {folder}", flush=True)
            with atomic_folder(folder) as made:
                config = resolve({**TOY_BASE, "seed": seed, "device": device})
                model, demonstrations = toy.make_base(made, seed)
                train(model.to(device), demonstrations, None, config, made)
                toy.save_base(model, made, seed, TOY_BASE)
    return folder


# Pairs and their reference log-probs
HELD_OUT_PAIRS = 1000  # at most this many are measured: the standard error of an accuracy is then 1.6 % or less


def load_data(config, tokenizer):
    """(pairs to train on, held-out pairs or None), tokenised. Prints what was kept, dropped and cut."""
    if config.on_toy:
        train, test = toy.load_toy(toy.COMPARISONS, config.seed, config.preferences, config.annotators,
                                   config.harmful_share)
    else:
        train, test, lines = load_sources(config.data, config.seed, config.held_out, config.skip_bad_rows)
        print(*lines, sep="\n")
    if config.flip_safety or config.flip_preference:  # held-out labels stay as they are
        print(flip_labels(train, config.flip_safety, config.flip_preference, config.seed))
    np.random.default_rng(config.seed).shuffle(test)
    method = METHODS[config.method]
    if config.turns == "last":
        train, test = ([c for c in part if not c.later_turns] for part in (train, test))
    train, line = apply_view(config.view, train, method.responses)
    print(line, flush=True)
    try:
        test = apply_view(config.view, test, method.responses)[0][:HELD_OUT_PAIRS]
    except UserError:
        test = []  # this view keeps none of the held-out comparisons: there is nothing to measure
    if "margin" in method.labels:
        name = VIEWS[config.view].score
        folder = getattr(config, f"{name}_model")
        print(add_margins(train, test, name, folder, config.score_template, config.dtype, config.device))
    for label in method.labels:
        require(train + test, label, f"--method {config.method} --view {config.view}")
    groups = [] if config.annotators else config.preferences  # with annotators, they are the groups
    present = {pair.group for pair in train} - {""}
    if not present.issuperset(groups):
        raise UserError(f"--groups: no comparison belongs to {', '.join(sorted(set(groups) - present))}; there are "
                        f"{', '.join(sorted(present)) or 'no groups'}")
    parts = []
    for name, pairs in (("train", train), ("held_out", test)):
        pairs = [pair for pair in pairs if not groups or pair.group in groups]
        encoded = encode_pairs(tokenizer, pairs, config.max_len, method.responses,
                               groups or (parts[0].groups if parts else ())) if pairs else None
        if pairs and encoded.cut:
            cut = ", ".join(f"{count} {what}" for what, count in encoded.cut.items())
            print(f"{name}, --max_len {config.max_len}: {cut}", flush=True)
        parts.append(encoded)
    return parts


def reference_logps(model, encoded, config, processes=ALONE):
    """log π_ref of every response, (N, R), or (N, R, K) where each expert has a reference: what training starts from.

    They do not change during training, so one pass before it is enough, and one network in memory.
    """
    model.eval()
    settings = encoded, config.dtype, config.device, processes
    if config.references:
        mesh, logps = config.fsdp and processes.mesh(config.device), []
        for folder in config.references:
            one = Transformer.from_pretrained(folder, device=config.device, mesh=mesh)
            if mesh:
                shard([one], mesh)
            logps.append(cached_logps(one, *settings))
        return torch.stack(logps, dim=-1)
    if METHODS[config.method].reference == "start" and config.init_adapter:
        logps = []
        for k in range(count_experts(model)):
            use_expert(model, k)
            logps.append(cached_logps(model, *settings))
        return torch.stack(logps, dim=-1).squeeze(-1)
    with disable_experts(model):  # new experts are zero: the base is the start
        return cached_logps(model, *settings)


# The training loop


def batch_loss(model, batch, config):
    """The method's (loss, metrics) on a packed batch: one forward pass."""
    method = METHODS[config.method]
    with precision(config.dtype, config.device):
        outputs = method.forward(model, batch)
    return method.loss(outputs, batch.labels.get("reference"), batch, config)


@torch.no_grad()
def measure(model, encoded, config, processes=ALONE):
    """The method's loss and metrics on held-out pairs: {"eval/loss": …, …}, means over the pairs."""
    model.eval()
    sums = {}
    annotator = encoded.labels.get("annotator")
    for indices, batch in batches(encoded, 4 * config.batch_size, config.device, True, annotator, processes):
        loss, metrics = batch_loss(model, batch, config)
        accumulate(sums, {"loss": loss, **metrics}, len(indices))
    model.train()
    return {f"eval/{name}": total / len(encoded) for name, total in processes.total(sums).items()}


def accumulate(sums, metrics, times=1):
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0) + value * times


def learning_rate(step, steps, config):
    """Linear warm-up to the peak, then a cosine to zero."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimizer(parameters, config, processes=ALONE):
    """AdamW: weight decay on matrices, routers and gates at router_lr times the learning rate."""
    groups, betas = {}, (0.9, 0.95)
    for name, parameter in parameters:
        kind = config.weight_decay * (parameter.dim() >= 2), config.router_lr if is_router(name) else 1.0
        groups.setdefault(kind, []).append(parameter)
    groups = [{"params": members, "weight_decay": decay, "factor": factor}
              for (decay, factor), members in groups.items()]
    if config.low_memory:
        return BackwardAdamW(groups, config.lr, betas, config.seed, processes)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


class BackwardAdamW(torch.optim.Optimizer):
    """AdamW inside backward(): as soon as the gradient of a parameter is whole, also over processes, it updates the
    parameter and is freed.

    Moments have the parameter's dtype. Updates are computed in float32, a chunk at a time, and rounded stochastically
    where they are stored in bfloat16. A parameter whose gradient is not finite stays as it is.
    """
    CHUNK = 1 << 20

    def __init__(self, groups, lr, betas, seed, processes=ALONE):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8})
        self.seed, self.processes, self.norms = seed, processes, []
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                parameter.register_post_accumulate_grad_hook(partial(self.update, i, j))

    @torch.no_grad()
    def update(self, i, j, parameter):
        self.processes.add([parameter.grad])
        gradient, parameter.grad = parameter.grad.view(-1).split(self.CHUNK), None
        self.norms.append(torch.stack([chunk.float().norm() for chunk in gradient]).norm())
        if not self.norms[-1].isfinite():
            return
        group, state = self.param_groups[i], self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        rate, eps, scale1, scale2 = group["lr"], group["eps"], *(1 - beta ** state["step"] for beta in group["betas"])
        seed = np.random.SeedSequence([self.seed, i, j, state["step"]]).generate_state(1, np.uint64)
        generator = torch.Generator(parameter.device).manual_seed(int(seed[0]))  # a resumed run draws the same
        stored = (tensor.view(-1).split(self.CHUNK) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        for g, *chunks in zip(gradient, *stored):
            g, w, m, v = (chunk.to(torch.float32, copy=True) for chunk in (g, *chunks))
            m.lerp_(g, 1 - group["betas"][0])
            v.lerp_(g.square(), 1 - group["betas"][1])
            w.mul_(1 - rate * group["weight_decay"]).addcdiv_(m, (v / scale2).sqrt_().add_(eps), value=-rate / scale1)
            noise = torch.empty_like(w, dtype=torch.int32).random_(generator=generator).bitwise_and_(0xFFFF)
            for new, chunk in zip((w, m, v), chunks):  # each is unbiased, though they share a draw
                store(new, chunk, noise)

    def gradient_norm(self):
        """The norm of the gradients of the backward pass that has just ended."""
        norms, self.norms = self.norms, []
        return torch.stack(norms).norm()


def store(values, target, noise):
    """Write float32 values to a target, to a bfloat16 one rounded stochastically: to one of the two neighbours, to the
    nearer one more often, so that the mean over draws is the value. To the nearest, most small updates would be lost.

    A bfloat16 is the upper half of a float32. noise: random 16 bits, which carry from the lower half to the upper.
    """
    if target.dtype == torch.bfloat16:
        target, values = target.view(torch.int16), (values.view(torch.int32) + noise) >> 16
    target.copy_(values)


def training_order(encoded, config):
    """`epoch_order` with the shares of --groups, and with an annotator's pairs together where they share a latent."""
    group, annotator = encoded.labels.get("group"), encoded.labels.get("annotator")
    if config.annotators and config.shares:  # the shares are those of annotator types, the groups are annotators
        group = np.array([config.preferences.index(annotator_type(name)) for name in encoded.groups])[group]
    return epoch_order(len(encoded), config.epochs, config.seed, group, config.shares, annotator)


def train_step(model, parameters, optimizer, encoded, parts, config, sums, processes=ALONE):
    """One optimiser step on the pairs of `parts`, an index array for each forward pass, which the processes share;
    metrics go into sums. Where the loss or a gradient is not finite, weights and sums stay as they are.

    Returns whether they are finite, as a tensor: to look at it on every step would make a GPU wait.
    """
    step, now = encoded.counts(np.concatenate(parts)), {}
    for indices, counts in processes.share(parts):
        loss, metrics = batch_loss(model, pack(encoded, indices, step).to(config.device), config)
        share = counts * len(indices) / step["pairs"]
        loss.backward(torch.where(loss.isfinite(), share, math.nan))  # NaN makes every gradient NaN
        accumulate(now, {"loss": loss.detach(), **metrics}, share)
    if config.low_memory:
        norm = optimizer.gradient_norm()  # the weights are updated already
    else:
        if processes.count > 1:
            copies = [parameter for _, parameter in parameters if not is_part(parameter)]  # FSDP sums those of parts
            for parameter in copies:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            processes.add(parameter.grad for parameter in copies)
        norm = whole(torch.nn.utils.clip_grad_norm_([p for _, p in parameters], config.grad_clip or math.inf))
        optimizer.found_inf = 1 - norm.isfinite().float()  # the fused step does nothing where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    finite = norm.isfinite()
    accumulate(sums, {name: torch.where(finite, value, 0) for name, value in now.items()})
    if processes.rank == 0:  # these are the same in all processes
        accumulate(sums, {"grad_norm": torch.where(finite, norm, 0), "finite": finite.float(),
                          "skipped": 1 - finite.float()})
    return finite


def means(totals):
    """Sums over steps -> their means over those that were finite, and how many were skipped."""
    finite, skipped = totals.pop("finite"), totals.pop("skipped")
    return {**({name: total / finite for name, total in totals.items()} if finite else {}),
            **({"skipped": round(skipped)} if skipped else {})}


CHECKPOINT_SECONDS = 600  # a kill costs at most the last ten minutes


def steps_of(count, per_step, config):
    """Optimiser steps for so many pairs; prints what is left out or repeated."""
    steps = max(1, count // per_step)
    if rest := count - steps * per_step:
        print(f"{count} pairs in steps of {per_step}, " + (f"leaving out the last {rest}" if rest > 0 else
                                                          f"repeating {-rest}"), flush=True)
    return min(steps, config.max_steps) if config.max_steps else steps


def train(model, encoded, held_out, config, out, processes=ALONE):
    """Minimise the method's loss over the encoded pairs. Writes metrics.jsonl and, when told to, checkpoint/.

    held_out: pairs to measure every eval_every steps and at the end, or None. The labels of both hold reference
    log-probs. Raises KeyboardInterrupt after a signal, the checkpoint saved, and UserError when SKIPPED_IN_A_ROW steps
    had no finite loss and gradient.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # reference log-probs have left the outermost weights whole
    out, parameters = Path(out), trainable_parameters(model)
    optimizer = make_optimizer(parameters, config, processes)
    order, lengths = training_order(encoded, config), encoded.lengths()
    passes = config.grad_accum * processes.count
    per_step = config.batch_size * passes
    steps = steps_of(len(order), per_step, config)
    method, (first, sums) = METHODS[config.method], load_checkpoint(out, parameters, optimizer)
    sums = dict(sums[processes.rank] if len(sums) == processes.count else {} if processes.rank else add_up(sums))
    log = RunLog(out, first, config, processes)
    bar = tqdm(range(first, steps), desc=config.method, unit="step", initial=first, total=steps,
               disable=processes.rank > 0)
    model.train()
    steps_since, tokens, since, saved = [], 0, time.perf_counter(), time.monotonic()
    with stop_signals() as came, log, bar:
        for step in bar:
            lr, now = learning_rate(step, steps, config), method.schedule(config, step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            indices = order.take(range(step * per_step, (step + 1) * per_step), mode="wrap")
            parts = split_step(indices, passes, encoded.labels.get("annotator"), lengths, config.batch_tokens,
                               processes.count)
            finite = train_step(model, parameters, optimizer, encoded, parts, now, sums, processes)
            steps_since.append((indices, finite))
            tokens, done, last = tokens + int(lengths[indices].sum()), step + 1, step + 1 == steps
            due = held_out is not None and (last or bool(config.eval_every) and done % config.eval_every == 0)
            if done % config.log_every == 0 or last or due:
                row = {"step": done, **means(processes.total(sums)), "lr": lr,
                       "tokens/s": tokens / (time.perf_counter() - since)}
                if due:
                    row.update(measure(model, held_out, now, processes))
                log.write(row, steps_since, bar)
                sums, steps_since, tokens, since = {}, [], 0, time.perf_counter()
            late = time.monotonic() - saved > CHECKPOINT_SECONDS and processes.rank == 0
            wanted = processes.total({"stop": bool(came), "save": late})
            if any(wanted.values()) or (config.save_every and done % config.save_every == 0):
                parts = processes.gather(sums)
                save_checkpoint(out, done, parameters, optimizer, parts, processes.rank == 0)
                saved = time.monotonic()
            if wanted["stop"]:
                raise KeyboardInterrupt(*came)
    model.eval()


# A run


def base_folder(config):
    """The folder of the model that training starts from; the toy world's is made, a hub's is downloaded."""
    folder = toy_base(config.seed, config.device) if config.model == "toy" else find_folder(config.model)
    read_config(folder)  # raises UserError for a family that we do not have, before anything long begins
    return folder


def load_model(config, base, groups=(), processes=ALONE):
    """The model that training starts from, what is trained marked and in float32, or in bfloat16 with --low_memory.
    groups: those of the data."""
    trains_all = not (config.lora_rank or config.init_adapter or config.share)
    dtype = torch.float32 if trains_all and not config.low_memory else DTYPES[config.dtype]
    mesh = config.fsdp and processes.mesh(config.device)
    model = Transformer.from_pretrained(base, dtype, config.device, mesh)
    if model.config.learned_positions and config.max_len > model.config.max_positions:
        raise UserError(f"--max_len {config.max_len}: this model has {model.config.max_positions} positions")
    model = METHODS[config.method].build(config, model, groups)
    assert config.low_memory or all(p.dtype == torch.float32 for _, p in trainable_parameters(model))
    for warning in adapter_warnings(model, config.init_adapter, config.template):
        print(warning)
    model.model.checkpointing = config.checkpointing
    if mesh:  # experts, routers and gates are small: beside a frozen base, each process has all that is trained
        shard([model], mesh, [parameter for name, parameter in model.named_parameters()
                              if not trains_all and (parameter.requires_grad or is_mixture(name))])
    return model


def run_settings(config, base, processes=ALONE):
    """What config.json holds: the flags, the pairs per step, the base model's folder, and hashes of the input files."""
    names = [str(base), *config.data, config.reward_model, config.cost_model, *config.init_adapter, *config.references]
    inputs = {name: files_hash(name) for name in names if name and Path(name).exists()}
    if config.on_toy:
        inputs["toy"] = content_hash([Path(toy.__file__)])
    return json.loads(json.dumps({**asdict(config), "base": str(base), "inputs": inputs, "pairs_per_step":
                                  config.batch_size * config.grad_accum * processes.count}))


def run(config, processes=ALONE):
    """One run, the only one in its folder."""
    lock = FileLock(Path(config.out) / ".lock")  # `open_run` takes it, once the data and the model are in order
    try:
        with one_line_if_lost():
            run_locked(config, processes, lock)
    finally:
        lock.release()


def run_locked(config, processes, lock):
    """The steps of a run: data, model, reference, training; then what `finish` does."""
    method, started, out = METHODS[config.method], time.perf_counter(), Path(config.out)
    base = processes.once(lambda: base_folder(config))
    ready = time.perf_counter()
    tokenizer = Tokenizer(base, config.template)
    encoded, held_out = load_data(config, tokenizer)
    config = method.settle(config, encoded.groups)
    model = load_model(config, base, encoded.groups, processes)
    settings = run_settings(config, base, processes)
    work = processes.once(lambda: open_run(out, settings, FREE, config.resume, lock))
    if work is None:
        return print(f"{out}: finished with these settings, left as it is")
    processes.once(lambda: write_text(work / "tokens.txt", show_pair(tokenizer, encoded)))
    for pairs in filter(None, (encoded, held_out)):
        method.prepare(model, pairs, config)
        if method.reference:
            pairs.labels["reference"] = reference_logps(model, pairs, config, processes).numpy()
    perturb_experts(model, config.expert_noise, config.seed)
    if config.compile:
        model.model.run = compile_once(model.model.run)
    train(model, encoded, held_out, config, work, processes)
    vars(model.model).pop("run", None)  # the class's own again: answers grow by the token
    trained = time.perf_counter()
    finish(model, tokenizer, encoded, held_out, config, base, work, processes)
    done = time.perf_counter()
    print(f"\nbase model {ready - started:.0f} s, training {trained - ready:.0f} s, evaluation {done - trained:.0f} s; "
          f"the run is in {out}/")


def finish(model, tokenizer, encoded, held_out, config, base, work, processes=ALONE):
    """After training: write the weights, the method's report and, on toy, the oracle's table; the run is finished."""
    method = METHODS[config.method]
    save_trained(model, work, config.template, tokenizer.chat_template if config.template in TEMPLATES else None,
                 processes.rank == 0)
    if method.report:
        report, warnings = method.report(model, encoded, held_out, config.beta, 4 * config.batch_size, config.dtype)
        processes.once(lambda: write_text(work / "experts.json", json.dumps(report, indent=2) + "\n"))
        print(*warnings, *(f"{name}: {value}" for name, value in report.items()), sep="\n")
    if config.model == "toy" and not isinstance(model, ScoreModel):
        processes.once(lambda: show_answers(model, tokenizer, config, base, work))
    processes.once(lambda: close_run(Path(config.out), work))


def show_answers(model, tokenizer, config, base, work):
    """The oracle's table of a toy run, printed and written. One process answers: it reads a sharded model again."""
    if hasattr(model, "reshard"):
        model = load_trained(work, base, next(model.parameters()).dtype, config.device)
    start = load_start({**asdict(config), "base": base}, device=config.device)
    report, samples = evaluate_run(model, start, tokenizer, work, config.eval_split, config.seed, config.temperature,
                                   preferences=config.preferences if config.on_toy else ())
    print("", samples, toy.closing_tables({config.method: report}), sep="\n\n")


def is_finished(config, processes):
    """True if the run folder holds the finished run of these settings, on the same files."""
    before, settings = read_settings(Path(config.out)), run_settings(config, base_folder(config), processes)
    return before.get("finished", False) and all(before.get(name) == settings[name] for name in settings.keys() - FREE)


def plan(config):
    """The runs that a command stands for, in order: prerequisites first, then the run itself."""
    before, changes = METHODS[config.method].prerequisites(config)
    return [*before, replace(config, **changes)]


def keep_freed_memory():
    """Keep what a step frees for the next one: glibc would give it back and fault in every page again."""
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


def main(argv=None):
    # Responsibilities and router weights run down to 1e-40, and a CPU takes such numbers a hundred times slower than 0
    torch.set_flush_denormal(True)
    keep_freed_memory()
    processes = Processes.join()
    *before, last = plan(parse_flags(argv))
    toy.one_thread(last.model)
    for one in (*before, last) if before else ():
        print(f"{one.out}: --method {one.method} --view {one.view}", flush=True)
    for one in (*before, last):
        if processes.once(lambda: (one is not last or one.resume) and is_finished(one, processes)):
            print(f"{one.out}: finished with these settings, kept", flush=True)
        else:
            run(one, processes)


if __name__ == "__main__":
    as_command(main, "train.py", "interrupted; if training had begun, --resume goes on from there")
