"""The methods, one section each, and the settings of a run.

A method is a row of METHODS: a view of the comparisons × what is trained × a loss. Each algorithm is one section, with
its idea, builder, loss, prerequisite runs and row.
"""
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import losses
import toy
from batch import policy_logps
from chat import TEMPLATE_NAMES
from checkpoint import find_folder, load_adapter, read_adapter_config, read_config
from common import (Parser, UserError, check_device, check_read, check_values, numbers, setting, source_names,
                    weighted_names)
from data import SOURCES, VIEWS, carry_scores, check_source
from lora_moe import (GATES, add_experts, add_gate, add_head_copies, expert_layers, mixture_logps, pooled_states,
                      router_weights, set_routers)
from model import ScoreModel
from report import mixture_report


# A method: what it consists of, and the builder of most of them


def add_lora(config, model, num_experts=1, router=None):
    return add_experts(model, config.lora_targets, config.lora_rank, config.lora_alpha, num_experts, seed=config.seed,
                       router=router)


def build_policy(config, model, groups):
    """All weights, or one LoRA expert: a fresh one, or --init_adapter."""
    if config.init_adapter:
        return load_adapter(model, *config.init_adapter)
    return add_lora(config, model) if config.lora_rank else model


@dataclass(frozen=True)
class Method:
    """A view of the comparisons × what is trained × a loss.

    loss(model, batch, config) -> (mean loss over the batch's pairs, metrics), by one forward pass.
    """
    view: str
    loss: Callable
    build: Callable = build_policy
    reads: tuple = ()             # the flags that it reads, besides those that every method reads
    responses: int = 2            # 1: only the chosen response is trained on
    unit: str = "pairs"           # the word for what it trains on
    reference: str = "start"      # the policy that the loss compares with: the start, the base below it, or "" for none
    labels: tuple = ()            # fields of Pair that the loss needs
    preset: dict = field(default_factory=dict)  # settings that differ from the defaults in Config, as on a command line
    toy: dict = field(default_factory=dict)     # … and on a toy model from those in TOY
    needs_experts: bool = False   # it cannot train all weights
    adapters: int = 1             # how many adapters --init_adapter takes; 0: one for each expert
    check: Callable = lambda config: None                    # raises UserError for settings that do not fit together
    prerequisites: Callable = lambda config: ([], {})        # runs before this one; settings that name their results
    settle: Callable = lambda config, groups: config         # settings that depend on the data
    prepare: Callable = lambda model, encoded, config: None  # adds labels that need the model
    schedule: Callable = lambda config, done: config         # settings after this share of the steps
    report: Callable | None = None                           # diagnostics of the trained model, for experts.json


# TOY was chosen on the development split. For other models the defaults in Config are SafeDPO's, LoRA's rate MidPO's;
# a preset names its source. The papers' batches are 8 or 4 pairs on each of several GPUs (--grad_accum).
TOY = {"epochs": 2, "lora_rank": 16, "lr": lambda v: 1.6e-4 if v["lora_rank"] else 1.6e-5}
DEPENDENT = {  # defaults that depend on other settings, for every method
    "lr": lambda v: 1e-5 if v["lora_rank"] else 1e-6, "lora_alpha": lambda v: 2.0 * v["lora_rank"] or None,
    "grad_clip": lambda v: 0.0 if v["low_memory"] else 1.0, "out": lambda v: f"out/{v['method']}",
    "dtype": lambda v: "bfloat16" if v["low_memory"] else "float32"}
METHODS = {}
PREFERENCE = ("beta", "label_smoothing")


# SFT, DPO and SafeDPO. DPO raises the log-ratio of the chosen response to the reference over that of the rejected one
# (arXiv 2305.18290). SafeDPO is DPO on the pairs that T (data.py: safedpo_transform) keeps, swaps or drops, with an
# offset Δ on safe/unsafe pairs (arXiv 2505.20065).


def sft(model, batch, config):
    loss, metrics = losses.sft_loss(policy_logps(model, batch)[:, 0], batch.lengths[:, 0])
    return loss * batch.step_factor["responses"], {"logps/chosen": metrics["logps/chosen"]}


def dpo(model, batch, config):
    logps, reference = policy_logps(model, batch), batch.reference                      # (N, 2) each
    return losses.dpo_loss(*logps.T, *reference.T, config.beta, config.label_smoothing)


def safedpo(model, batch, config):
    logps, reference = policy_logps(model, batch), batch.reference                      # (N, 2) each
    return losses.safedpo_loss(*logps.T, *reference.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"],
                               config.beta, config.delta, config.label_smoothing)


METHODS["sft"] = Method("helpful", sft, responses=1, unit="examples", reference="", reads=("init_adapter", "turns"),
                        preset={"lr": lambda v: 1e-4 if v["lora_rank"] else 2e-5},  # safe-rlhf's; LoRA: ours
                        toy={"lr": TOY["lr"]})
METHODS["dpo"] = Method("helpful", dpo, reads=("init_adapter", *PREFERENCE))
METHODS["safedpo"] = Method("safedpo", safedpo, reads=("init_adapter", *PREFERENCE, "delta"),
                            labels=("chosen_unsafe", "rejected_unsafe"))


# Reward and cost models: the policy's trunk under a scalar head, read at the last token.
# Bradley-Terry on which response is better (arXiv 2203.02155); a cost model also learns the sign (arXiv 2310.12773).


def response_scores(model, batch):
    """(N, R) scores of a packed batch, each read at its response's last token."""
    return model(batch.tokens, batch.last.flatten(), batch.positions, batch.mask()).view(batch.lengths.shape)


def build_score_model(config, model, groups):
    """All weights, or the head and a LoRA expert."""
    model = ScoreModel.from_policy(model)
    if config.lora_rank:
        add_lora(config, model).score.requires_grad_(True)
    return model


def reward(model, batch, config):
    scores = response_scores(model, batch)
    loss, metrics = losses.reward_loss(*scores.T)
    return loss + config.score_l2 * scores.square().mean(), metrics


def cost(model, batch, config):
    scores = response_scores(model, batch)
    loss, metrics = losses.cost_loss(*scores.T, batch.labels["chosen_unsafe"], batch.labels["rejected_unsafe"])
    return loss + config.score_l2 * scores.square().mean(), metrics


SCORE_MODEL = dict(build=build_score_model, reference="", reads=("score_l2",),
                   preset={"lr": lambda v: 1e-4 if v["lora_rank"] else 2e-5, "lora_rank": 0, "epochs": 2,
                           "weight_decay": 0.1},  # safe-rlhf's; LoRA: ours
                   toy={"lr": 3e-4, "epochs": 1, "weight_decay": 0.05, "score_l2": 0.0})
METHODS["reward"] = Method("helpful", reward, **SCORE_MODEL)
METHODS["cost"] = Method("cost", cost, **SCORE_MODEL, labels=("chosen_unsafe", "rejected_unsafe"))


# SPE-DPO and MidPO (arXiv 2506.02460): an expert for safety, another for helpfulness, each trained by DPO with a margin
# m of a score model. Then both are frozen; a router in every layer learns their weights per token, by DPO on D_dual.


def spe_dpo(model, batch, config):
    logps, reference = policy_logps(model, batch), batch.reference                      # (N, 2) each
    return losses.spe_dpo_loss(*logps.T, *reference.T, batch.labels["margin"], config.beta, config.label_smoothing)


def build_midpo(config, model, groups):
    """The safety and the helpfulness expert, frozen, under new sigmoid routers."""
    load_adapter(model, *config.init_adapter).requires_grad_(False)
    return set_routers(model, {"type": "sigmoid", "hidden": config.router_hidden}, config.seed)


def midpo(model, batch, config):
    loss, metrics = dpo(model, batch, config)
    safety, helpfulness = router_weights(model, batch.inside).unbind(-1)       # of that pass, (L, tokens) each
    scale = batch.step_factor["tokens"]
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


def midpo_prerequisites(config):
    """Reward and cost model, safety and helpfulness expert. The run itself is the router's."""
    if config.init_adapter:
        return [], {}
    runs, changes = score_model_runs(config, ("reward", "cost"))
    for view, name in (("safety", "cost_model"), ("helpful", "reward_model")):
        runs.append(prerequisite(config, "spe-dpo", view, view=view, lora_rank=config.lora_rank,
                                 lora_alpha=config.lora_alpha, **{name: changes.get(name) or getattr(config, name)}))
    return runs, {**changes, "init_adapter": tuple(f"{config.out}/{view}/adapter" for view in ("safety", "helpful"))}


SCORES = ("reward_model", "cost_model", "score_template")
METHODS["spe-dpo"] = Method(
    "safety", spe_dpo, labels=("margin",),  # on other data the user names a score model
    prerequisites=lambda config: score_model_runs(config, [VIEWS[config.view].score] if config.on_toy else []),
    reads=("init_adapter", *PREFERENCE, *SCORES),
    preset={"lora_rank": 16, "weight_decay": 0.01},
    toy={"epochs": lambda v: 1 if v["view"] == "helpful" else 2})  # about as many steps for either expert
METHODS["midpo"] = Method(
    "dual", midpo, build_midpo, reference="base", needs_experts=True, adapters=2, prerequisites=midpo_prerequisites,
    reads=("init_adapter", *PREFERENCE, *SCORES, "router_l1", "router_hidden", "router_lr"),
    preset={"lora_rank": 16, "weight_decay": 0.0, "lr": 1e-5},
    toy={"lr": 3e-4, "epochs": 6, "router_hidden": 64, "harmful_share": 0.7})


# PMoL (arXiv 2411.01245): every wrapped layer has K experts, an empty one and a softmax router, all trained together by
# DPO on mixed preferences. A soft loss sends each preference's tokens to its own group of experts.


def settle_pmol(config, groups):
    """Fill in --groups and --experts from the data's preferences. Raises UserError where they do not fit."""
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


def pmol(model, batch, config):
    loss, metrics = dpo(model, batch, config)
    weights = router_weights(model, batch.inside)                                   # of that pass, (L, tokens, K + 1)
    group = batch.labels["group"][batch.pair.flatten()[batch.inside]]                   # (tokens,); -1: no preference
    target = soft_targets(config, weights.device)
    soft = losses.expert_group_soft_loss(weights, group, target) * batch.step_factor["grouped"]
    weights, scale = weights.detach(), batch.step_factor["tokens"]
    return loss + config.egs_weight * soft, {
        **metrics, "router/soft_loss": soft.detach(),
        "router/empty": (1 - weights[..., :config.experts].sum(-1).mean()) * scale,
        "router/entropy": torch.special.entr(weights).sum(-1).mean() * scale}


METHODS["pmol"] = Method(
    "helpful", pmol, build_pmol, needs_experts=True, settle=settle_pmol,
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
    layers = list(expert_layers(model))
    if "lm_head" in layers and len(layers) > 1:
        raise UserError("--lora_targets: a mixture has its experts in lm_head or below it, not in both")
    return add_gate(model, config.gate, groups)


def moe_dpo(model, batch, config):
    logps, log_gate = mixture_logps(model, batch)
    with torch.autocast(logps.device.type, enabled=False):  # sums over an annotator's pairs are a matrix product
        return losses.moe_dpo_loss(logps, batch.reference, log_gate, config.beta, config.objective,
                                   batch.labels.get("annotator"), config.q_temperature[0])


def anneal(config, done):
    """--q_temperature FROM,TO: from one to the other over the run, by the same factor at every step."""
    start, end = config.q_temperature[0], config.q_temperature[-1]
    return config if start == end else replace(config, q_temperature=(start * (end / start) ** done,))


def check_mixture(config):
    if len(config.q_temperature) > 2:
        raise UserError(f"--q_temperature: {len(config.q_temperature)} numbers; give one, or the first and the last")
    for name in ("references", "gate"):
        value = getattr(config, name)
        if value and not isinstance(value, str) and len(value) != config.experts:
            raise UserError(f"--{name}: {len(value)} {'weights' if name == 'gate' else 'folders'} for "
                            f"{config.experts} experts")


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


MIXTURE = dict(build=build_mixture, needs_experts=True, adapters=0, check=check_mixture, settle=settle_mixture,
               prepare=prepare_mixture, schedule=anneal, report=mixture_report,
               reads=("init_adapter", "beta", "experts", "share", "gate", "expert_noise", "references", "objective",
                      "latent", "q_temperature", "router_lr"))
# The poster gives no rates. With ours, experts differ and a learned gate leaves 1/K in a few hundred steps of 8 pairs
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


def gate_weights(text):
    """The name of a learned gate, or the fixed weights of one: "0.3,0.7"."""
    return text if text in GATES else numbers(text, f"{', '.join(GATES)} or numbers")


@dataclass(frozen=True)
class SharedFlags:
    """Flags of train.py and eval.py alike."""
    template: str = setting(None, "prompt format (default: that of the model)", "data", TEMPLATE_NAMES)
    skip_bad_rows: bool = setting(False, "leave out and count the rows that cannot be used, instead of stopping")
    reward_model: str = setting("", "score model of helpfulness: a folder or hub id", "score models")
    cost_model: str = setting("", "score model of harm, more than 0 being unsafe: a folder or hub id")
    score_template: str = setting(None, "prompt format of the score models (default: theirs)", choices=TEMPLATE_NAMES)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 …", "machine", free=True)


@dataclass(frozen=True)
class Config(SharedFlags):
    """Every setting of a run. `resolve` replaces a default by what the method or the toy model needs."""
    method: str = setting("safedpo", "what to train", "method", tuple(METHODS))
    view: str = setting("safedpo", "how comparisons become pairs", choices=tuple(VIEWS))
    beta: float = setting(0.1, "KL strength: reward = beta · log-ratio to the reference", above=0)
    delta: float = setting(10.0, "SafeDPO's offset on safe/unsafe pairs, in units of reward", least=0)
    label_smoothing: float = setting(0.0, "share of labels taken to be wrong (conservative DPO)", least=0, below=0.5)
    score_l2: float = setting(0.001, "weight of the scores' squares in reward and cost models (safe-rlhf's)", least=0)
    router_l1: float = setting(0.001, "weight of MidPO's L1 term |safety| + |helpfulness - 1|; 0: off", least=0)
    egs_weight: float = setting(0.1, "weight of PMoL's expert group soft loss; 0: off", least=0)
    soft_constraint: tuple = setting((0.5,), "PMoL's s_c: 0 balances, 1: own group only; or one a group",
                                     read=numbers, least=0, most=1)
    objective: str = setting("elbo", "of a mixture: its ELBO, or the poster's Σ w L", choices=("elbo", "weights"))
    latent: str = setting("comparison", "unit that shares one latent expert", choices=("comparison", "annotator"))
    q_temperature: tuple = setting((1.0,), "above 1 softens the E-step; two: first to last", read=numbers, above=0)
    model: str = setting("toy", "toy, a folder in Hugging Face layout, or a hub id", "model")
    lora_rank: int = setting(0, "rank of the LoRA experts; 0: all weights (with --share trunk: whole heads)", least=0)
    lora_alpha: float = setting(None, "LoRA scale is alpha / rank", above=0)
    lora_targets: tuple = setting(("down_proj",), "layers with experts: names, mlp or all-linear", read=layer_names)
    init_adapter: tuple = setting((), "adapter to start from; midpo, mixtures: one for each expert", read=source_names)
    experts: int = setting(None, "number of experts; of pmol a multiple of the groups (default: as many)", least=1)
    share: str = setting("", "trunk: a mixture's experts are heads on one trunk", choices=("", "trunk"))
    gate: str = setting("constant", "experts' weights, or learned: constant, prompt, user", read=gate_weights, above=0)
    references: tuple = setting((), "references of a mixture's experts (default: their start)", read=source_names)
    expert_noise: float = setting(0.0, "standard deviation of a mixture's B at the start; sets experts apart", least=0)
    no_empty_expert: bool = setting(False, "PMoL without its empty expert")
    router_temperature: float = setting(1.0, "of PMoL's softmax routers", above=0)
    router_hidden: int = setting(512, "d_r, the width inside MidPO's routers", least=1)
    data: tuple = setting(("toy",), f"toy, {', '.join(SOURCES)}, a file or a folder; several: a group each", "data",
                          read=source_names)
    groups: tuple = setting((), "preferences to mix, also weighted: help=2,harm=1 (default: all)", read=weighted_names)
    max_len: int = setting(512, "tokens of prompt and response together", least=8)
    held_out: float = setting(0.02, "share of prompts to hold out where the data has no test split", least=0, below=1)
    flip_safety: float = setting(0.0, "share of safety labels to flip", least=0, below=1)
    flip_preference: float = setting(0.0, "share of preferences to flip", least=0, below=1)
    turns: str = setting("all", "turns of the assistant that SFT trains on, in messages", choices=("all", "last"))
    epochs: int = setting(3, "passes over the pairs", "optimiser", least=1)
    max_steps: int = setting(0, "stop after this many optimiser steps; 0: at the end of the epochs", least=0)
    batch_size: int = setting(8, "pairs per forward pass of each process", free=True, least=1)
    grad_accum: int = setting(1, "forward passes of each process per optimiser step", free=True, least=1)
    batch_tokens: int = setting(0, "most padded tokens in a forward pass; 0: no limit", free=True, least=0)
    lr: float = setting(1e-6, "peak learning rate", above=0)
    router_lr: float = setting(1.0, "routers and gates learn at this many times the learning rate", above=0)
    warmup: float = setting(0.03, "share of the steps in which the rate rises; then it falls as a cosine", least=0)
    weight_decay: float = setting(0.05, "AdamW's, on matrices", least=0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", least=0)
    seed: int = setting(0, "of everything random: data, order, weights, sampling", least=0)
    dtype: str = setting("float32", "of the forward pass and frozen weights", "machine", ("float32", "bfloat16"))
    compile: bool = setting(False, "torch.compile the layers, twice at most whatever the batches", free=True)
    fsdp: bool = setting(False, "split the weights over the processes of torchrun (FSDP)", free=True)
    checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory, more time", free=True)
    low_memory: bool = setting(False, "train all weights in 6 bytes each, not 16: bfloat16, rounded stochastically")
    out: str = setting("out/safedpo", "run folder", "run", free=True)
    resume: bool = setting(False, "continue from the run folder's checkpoint, if any; keep a finished run", free=True)
    overwrite: bool = setting(False, "train anew though the run folder has a finished run or a checkpoint, which stays "
                                     "until the new run is finished", free=True)
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
# Flags that not every run reads: (flags, when they are not read, why)
NOT_READ = (
    (("lora_targets",), lambda v: v["share"], "--share trunk has its experts in the head"),
    (("lora_alpha", "lora_targets"), lambda v: not v["lora_rank"] and not v["share"], "--lora_rank 0: no experts"),
    (("lora_rank", "lora_alpha", "lora_targets"), lambda v: v["init_adapter"], "--init_adapter has its own"),
    (("latent", "q_temperature"), lambda v: v["objective"] == "weights", "--objective weights has no latent expert"),
    (("router_lr",), lambda v: isinstance(v["gate"], tuple), "a fixed gate does not learn"),
    (("low_memory",), lambda v: v["lora_rank"] or v["init_adapter"] or v["share"],
     "it is for training all weights (--lora_rank 0); experts stay in float32"),
    (("dtype",), lambda v: v["low_memory"] and v["dtype"] == "float32", "--low_memory has bfloat16 weights"),
    (("grad_accum", "grad_clip", "batch_tokens"), lambda v: v["low_memory"],
     "--low_memory uses each gradient at once and keeps none"),
    (("fsdp",), lambda v: v["low_memory"], "--low_memory is for weights that one process holds"),
    (("annotators",), lambda v: v["data"] != ("toy",) or not v["groups"], "only toy preferences have annotators"),
    (("harmful_share",), lambda v: v["data"] != ("toy",) or v["groups"], "only toy data without --groups has it"),
    (("held_out", "skip_bad_rows"), lambda v: v["data"] == ("toy",), "toy comparisons come from no file"),
    (("compile",), lambda v: v["fsdp"], "--fsdp gathers and drops weights between the parts that it would compile"),
    (("eval_split", "temperature"), lambda v: v["model"] != "toy", "only a toy model has a closing table"),
)


def readers(flag):
    """The methods that read this flag: those that name it in their row, or all where none does."""
    return [name for name, method in METHODS.items() if flag in method.reads] or list(METHODS)


def not_read(values):
    """{flag: why this run does not read it}."""
    methods = {flag.name: readers(flag.name) for flag in fields(Config)}
    return {**{flag: f"in this run: {why}" for flags, applies, why in reversed(NOT_READ) if applies(values)
               for flag in flags},
            **{flag: f"by --method {values['method']}, but by {', '.join(names)}" for flag, names in methods.items()
               if values["method"] not in names}}


def resolve(given, inherited=None):
    """{flag: value} -> Config: the one place where settings depend on the method, the model and each other.

    given: what the user typed, inherited: what a prerequisite run takes over. Raises UserError for a value out of
    bounds, and for a given flag that this run would not read.
    """
    typed = {name: tuple(value) if isinstance(value, list) else value
             for name, value in {**(inherited or {}), **given}.items()}
    values = {**vars(Config()), **typed}
    check_values(Config, typed)
    method, toy_model, toy_data = METHODS[values["method"]], values["model"] == "toy", values["data"] == ("toy",)
    defaults = {**DEPENDENT, "view": method.view, **(TOY if toy_model else {}), **method.preset,
                **(method.toy if toy_model else {})}
    values |= {name: value for name, value in defaults.items()
               if name not in typed and (toy_data or name not in ("groups", "annotators"))}
    if values["init_adapter"]:
        adapter = read_adapter_config(Path(values["init_adapter"][0]) / "adapter_config.json")
        values |= {"lora_rank": adapter["r"], "lora_alpha": adapter["lora_alpha"],
                   "lora_targets": adapter["target_modules"]}
    for flag in fields(Config):  # in order: a default may read earlier fields, and what was typed
        value = values[flag.name](values) if callable(values[flag.name]) else values[flag.name]
        values[flag.name] = flag.metadata["read"](value) if flag.metadata["read"] and isinstance(value, str) else value
    check_values(Config, values)
    check_read(given, not_read(values))
    for source in () if toy_data else values["data"]:
        check_source(source)
    unknown = {name for name, _ in values["groups"]} - set(toy.PREFERENCES)
    if toy_data and unknown:
        raise UserError(f"--groups: toy has no preference {min(unknown)}; it has {', '.join(toy.PREFERENCES)}")
    for name in filter(None, (*given.get("references", ()), given.get("reward_model"), given.get("cost_model"))):
        find_folder(name)
    config = Config(**values)
    started, adapters = len(config.init_adapter), method.adapters or config.experts
    if started not in (0, adapters):
        raise UserError(f"--init_adapter: {started} adapters, but --method {config.method} starts from {adapters}")
    if method.needs_experts and not config.lora_rank and not config.share:
        raise UserError(f"--lora_rank 0: --method {config.method} trains experts; it needs a rank of at least 1")
    method.check(config)
    check_device(config.device)
    if config.wandb and not getattr(find_spec("wandb"), "origin", None):  # a folder of that name has none
        raise UserError("--wandb needs the wandb package: pip install wandb")
    return config


# What a prerequisite run decides for itself; it inherits every other setting that both methods read
OWN = {"method", "view", "out", "epochs", "lr", "weight_decay", "lora_rank", "lora_alpha", "reward_model", "cost_model"}


def prerequisite(config, method, folder, **changes):
    """The Config of a prerequisite run, in a folder under this run's; with the same settings it is kept or resumed."""
    inherited = {flag.name: getattr(config, flag.name) for flag in fields(Config)
                 if flag.name not in OWN and {config.method, method} <= set(readers(flag.name))}
    return resolve({}, {**inherited, "method": method, "out": f"{config.out}/{folder}", "resume": True,
                        "overwrite": config.overwrite or not config.resume, **changes})


def parse_flags(argv):
    """argv -> Config, checked. Raises UserError."""
    about = "Train a policy by preference. --help --method NAME shows the flags and values of a method."
    given = vars(Parser(Config, "train.py", about, {}).parse_args(argv))
    if given.pop("help", False):  # --help --method midpo shows the flags and values of that method
        config = resolve(given)
        hidden = [flag.name for flag in fields(Config) if "method" in given and config.method not in readers(flag.name)]
        Parser(Config, "train.py", about, asdict(config), hidden).print_help()
        raise SystemExit(0)
    return resolve(given)
