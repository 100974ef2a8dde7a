"""Train a policy by preference: `python train.py --method safedpo --delta 10` runs with nothing else given.

What all methods share: the toy base model, the pairs and their reference log-probs, the training loop, and the steps of
a run. Read from the end: `main`, `run`, `train`, `train_step`; methods.py has the methods.
"""
import ctypes
import json
import math
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

import toy
from batch import batch_indices, encode_pairs, epoch_order, pack, precision, show_pair, split_step
from chat import TEMPLATES, Tokenizer
from checkpoint import (adapter_warnings, cached_logps, find_folder, load_model, load_start, load_trained, read_config,
                        save_model, save_trained, shard)
from common import (DTYPES, UserError, as_command, atomic_folder, content_hash, files_hash, gathered, is_sharded,
                    progress, stop_signals, write_text)
from data import VIEWS, apply_view, flip_labels, load_sources, require
from eval import evaluate_run
from judges import add_margins
from lora_moe import disable_experts, is_mixture, is_router, perturb_experts, trainable_parameters, use_expert
from methods import FREE, METHODS, parse_flags, resolve
from model import ScoreModel
from runs import (ALONE, Processes, RunLog, add_up, close_run, earlier_run, load_checkpoint, one_line_if_lost, open_run,
                  read_settings, save_checkpoint)


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
                config = resolve({**TOY_BASE, "seed": seed, "device": device, "log_every": 200})
                model, demonstrations = toy.make_base(made, seed)
                train(model.to(device), demonstrations, None, config, made)
                save_model(model, made)  # in its place, with the tokenizer's files
                write_text(made / "recipe.txt", toy.recipe(made, seed, TOY_BASE))
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
    sets = []
    for name, pairs in (("train", train), ("held_out", test)):
        pairs = [pair for pair in pairs if not groups or pair.group in groups]
        numbered = groups or (sets[0].groups if sets else ())  # held-out pairs have the training pairs' numbers
        sets.append(encode_pairs(tokenizer, pairs, config.max_len, method.responses, numbered) if pairs else None)
        if pairs and sets[-1].cut:
            cut = ", ".join(f"{count} {what}" for what, count in sets[-1].cut.items())
            print(f"{name}, --max_len {config.max_len}: {cut}", flush=True)
    return sets


def reference_logps(model, encoded, config, processes=ALONE):
    """log π_ref of every response, (N, R), or (N, R, K) where each expert has a reference: what training starts from.

    They do not change during training, so one pass before it is enough, and one network in memory.
    """
    model.eval()
    settings, logps = (encoded, config.dtype, config.device, processes), []
    mesh = config.fsdp and processes.mesh(config.device)
    for folder in config.references:
        policy = load_model(folder, device=config.device, mesh=mesh)
        if mesh:
            shard([policy], mesh)
        logps.append(cached_logps(policy, *settings))
    for k in range(len(config.init_adapter)) if METHODS[config.method].reference == "start" and not logps else ():
        use_expert(model, k)
        logps.append(cached_logps(model, *settings))
    if logps:
        return torch.stack(logps, dim=-1).squeeze(-1)
    with disable_experts(model):  # new experts are zero: the base is the start
        return cached_logps(model, *settings)


# The training loop


@torch.no_grad()
def evaluate_held_out(model, encoded, config, processes=ALONE):
    """The method's loss and metrics on held-out pairs: {"eval/n", "eval/loss": …, …}, means over the n pairs."""
    model.eval()
    sums, totals = {}, encoded.totals(slice(None))
    passes = batch_indices(encoded, 4 * config.batch_size, together=encoded.labels.get("annotator"))
    for indices, counted in processes.split(passes):
        with precision(config.dtype, config.device):
            batch = pack(encoded, indices, totals).to(config.device)
            loss, metrics = METHODS[config.method].loss(model, batch, config)
        if counted:
            accumulate(sums, {"loss": loss, **metrics}, len(indices))
    model.train()
    means = {f"eval/{name}": total / len(encoded) for name, total in processes.sum(sums).items()}
    return {"eval/n": len(encoded), **means}


def accumulate(sums, metrics, weight=1):
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0) + value * weight


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
    """AdamW inside backward(): as soon as a parameter's gradient is complete, summed over processes, the parameter is
    updated and the gradient is freed.

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
        self.processes.all_reduce([parameter.grad])
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
    """Write float32 values to a target. A bfloat16 one gets them rounded stochastically: to one of two neighbours, more
    often the nearer, so that the expectation is the value. Rounding to nearest would lose most small updates.

    A bfloat16 is the upper half of a float32. noise: random 16 bits, which carry from the lower half to the upper.
    """
    if target.dtype == torch.bfloat16:
        target, values = target.view(torch.int16), (values.view(torch.int32) + noise) >> 16
    target.copy_(values)


def training_order(encoded, config):
    """`epoch_order` with the shares of --groups, and with an annotator's pairs together where they share a latent."""
    group, annotator = encoded.labels.get("group"), encoded.labels.get("annotator")
    if config.annotators and config.shares:  # the shares are those of annotator types, the groups are annotators
        group = np.array([config.preferences.index(name) for name in toy.annotator_types(encoded.groups)])[group]
    return epoch_order(len(encoded), config.epochs, config.seed, group, config.shares, annotator)


def train_step(model, parameters, optimizer, encoded, passes, config, sums, processes=ALONE):
    """One optimiser step on the pairs of `passes`, an index array for each forward pass; each process runs its part of
    them. The step's metrics are added to sums. Where the loss or a gradient is not finite, weights and sums stay.

    Returns whether they are finite, as a tensor: reading it in every step would make the CPU wait for a GPU.
    """
    totals, step_metrics = encoded.totals(np.concatenate(passes)), {}
    for indices, counted in processes.split(passes):
        with precision(config.dtype, config.device):
            batch = pack(encoded, indices, totals).to(config.device)
            loss, metrics = METHODS[config.method].loss(model, batch, config)
        weight = counted * len(indices) / totals["pairs"]
        loss.backward(torch.where(loss.isfinite(), weight, math.nan))  # NaN makes every gradient NaN
        accumulate(step_metrics, {"loss": loss.detach(), **metrics}, weight)
    if config.low_memory:
        norm = optimizer.gradient_norm()  # the weights are updated already
    else:
        if processes.count > 1:
            copies = [parameter for _, parameter in parameters if not is_sharded(parameter)]  # FSDP sums the others
            for parameter in copies:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            processes.all_reduce(parameter.grad for parameter in copies)
        norm = gathered(torch.nn.utils.clip_grad_norm_([p for _, p in parameters], config.grad_clip or math.inf))
        optimizer.found_inf = 1 - norm.isfinite().float()  # the fused step does nothing where this is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    finite = norm.isfinite()
    accumulate(sums, {name: torch.where(finite, value, 0) for name, value in step_metrics.items()})
    if processes.rank == 0:  # these are the same in all processes
        accumulate(sums, {"grad_norm": torch.where(finite, norm, 0), "finite": finite.float(),
                          "skipped": 1 - finite.float()})
    return finite


def step_means(sums):
    """Sums over steps -> their means over those that were finite, and how many were skipped."""
    finite, skipped = sums.pop("finite"), sums.pop("skipped")
    means = {name: total / finite for name, total in sums.items()} if finite else {}
    return means | ({"skipped": round(skipped)} if skipped else {})


CHECKPOINT_SECONDS = 600  # a kill costs at most the last ten minutes
SKIPPED_IN_A_ROW = 10     # then the run ends


def steps_of(count, per_step, config):
    """Optimiser steps for the pairs of all epochs; prints them, with what is left out or repeated."""
    steps = max(1, count // per_step)
    rest = count - steps * per_step
    unit = METHODS[config.method].unit
    print(f"{config.epochs} epoch{'s' * (config.epochs > 1)} of {count // config.epochs} {unit}, "
          f"in {steps} step{'s' * (steps > 1)} of {per_step}" + f", leaving out the last {rest}" * (rest > 0)
          + f", repeating {-rest}" * (rest < 0) + f"; --max_steps {config.max_steps}" * (0 < config.max_steps < steps))
    return min(steps, config.max_steps) if config.max_steps else steps


def train(model, encoded, held_out, config, out, processes=ALONE):
    """Minimise the method's loss over the encoded pairs. Writes metrics.jsonl and, when due, checkpoint/.

    held_out: pairs to measure every eval_every steps and at the end, or None. The labels of both hold reference
    log-probs. Raises KeyboardInterrupt after a signal, the checkpoint saved, and UserError when SKIPPED_IN_A_ROW steps
    had no finite loss and gradient.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # reference log-probs have left the outermost weights whole
    out, parameters = Path(out), trainable_parameters(model)
    optimizer = make_optimizer(parameters, config, processes)
    order, lengths = training_order(encoded, config), encoded.lengths()
    passes_per_step = config.grad_accum * processes.count
    per_step = config.batch_size * passes_per_step
    steps = steps_of(len(order), per_step, config)
    method, (first, sums) = METHODS[config.method], load_checkpoint(out, parameters, optimizer)
    sums = dict(sums[processes.rank] if len(sums) == processes.count else {} if processes.rank else add_up(sums))
    bar = progress(range(first, steps), desc=config.method, unit="step", initial=first, total=steps,
                   show=processes.rank == 0)
    log = RunLog(out, first, config, processes, bar, method.unit)
    model.train()
    steps_since, tokens, since, saved = [], 0, time.perf_counter(), time.monotonic()
    with stop_signals() as came, bar:
        for step in bar:
            lr, scheduled = learning_rate(step, steps, config), method.schedule(config, step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            indices = order.take(range(step * per_step, (step + 1) * per_step), mode="wrap")
            passes = split_step(indices, passes_per_step, lengths, config.batch_tokens, processes.count,
                                encoded.labels.get("annotator"))
            finite = train_step(model, parameters, optimizer, encoded, passes, scheduled, sums, processes)
            steps_since.append((indices, finite))
            tokens, done, last = tokens + int(lengths[indices].sum()), step + 1, step + 1 == steps
            due = held_out is not None and (last or bool(config.eval_every) and done % config.eval_every == 0)
            if done % config.log_every == 0 or last or due:
                row = {"step": done, "epoch": round(config.epochs * done * per_step / len(order), 4),
                       **step_means(processes.sum(sums)), "lr": lr, "tokens/s": tokens / (time.perf_counter() - since)}
                if due:
                    row |= evaluate_held_out(model, held_out, scheduled, processes)
                if log.write(row, steps_since) >= SKIPPED_IN_A_ROW:
                    raise UserError(f"{SKIPPED_IN_A_ROW} steps in a row had no finite loss and gradient, up to about "
                                    f"step {done}: try a lower --lr, or look at these {method.unit}; a checkpoint has "
                                    "the weights before them")
                sums, steps_since, tokens, since = {}, [], 0, time.perf_counter()
            late = time.monotonic() - saved > CHECKPOINT_SECONDS and processes.rank == 0
            wanted = processes.sum({"stop": bool(came), "save": late})
            if any(wanted.values()) or (config.save_every and done % config.save_every == 0):
                save_checkpoint(out, done, parameters, optimizer, processes.gather(sums), processes.rank == 0)
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


def build_model(config, base, groups=(), processes=ALONE):
    """The model that training starts from. Its trainable parameters are marked, and in float32 (with --low_memory in
    bfloat16). groups: those of the data."""
    trains_all = not (config.lora_rank or config.init_adapter or config.share)
    dtype = torch.float32 if trains_all and not config.low_memory else DTYPES[config.dtype]
    mesh = config.fsdp and processes.mesh(config.device)
    model = load_model(base, dtype, config.device, mesh)
    if config.max_len > model.config.max_positions:
        raise UserError(f"--max_len {config.max_len}: this model has {model.config.max_positions} positions")
    model = METHODS[config.method].build(config, model, groups)
    assert config.low_memory or all(p.dtype == torch.float32 for _, p in trainable_parameters(model))
    for warning in adapter_warnings(model, config.init_adapter, config.template):
        print(warning)
    model.model.checkpointing = config.checkpointing
    if mesh:  # experts, routers and gates are small: if the base is frozen, each process holds them whole
        shard([model], mesh, [parameter for name, parameter in model.named_parameters()
                              if not trains_all and (parameter.requires_grad or is_mixture(name))])
    return model


def run_settings(config, base, processes=ALONE):
    """What config.json holds: the flags, the pairs per step, the base model's folder, and hashes of the input files."""
    names = [str(base), *config.data, config.reward_model, config.cost_model, *config.init_adapter, *config.references]
    inputs = {name: files_hash(name) for name in names if name and Path(name).exists()}
    if config.on_toy:
        inputs["toy"] = content_hash(Path(toy.__file__))
    return json.loads(json.dumps({**asdict(config), "base": str(base), "inputs": inputs, "pairs_per_step":
                                  config.batch_size * config.grad_accum * processes.count}))


def run(config, processes=ALONE):
    """A run, the only one in its folder: data, model, reference log-probs, training, then what `finish` does."""
    method, started, out = METHODS[config.method], time.perf_counter(), Path(config.out)
    with ExitStack() as at_the_end, one_line_if_lost():
        lock = FileLock(out / ".lock")  # `open_run` takes it, once the data and the model are ready
        at_the_end.callback(lock.release)
        base = processes.run_once(lambda: base_folder(config))
        ready = time.perf_counter()
        tokenizer = Tokenizer(base, config.template)
        encoded, held_out = load_data(config, tokenizer)
        config = method.settle(config, encoded.groups)
        model = build_model(config, base, encoded.groups, processes)
        settings = run_settings(config, base, processes)
        work = processes.run_once(lambda: open_run(settings, FREE, lock))
        if work is None:
            return print(f"{out}: finished with these settings, kept")
        processes.run_once(lambda: write_text(work / "tokens.txt", show_pair(tokenizer, encoded)))
        for pairs in filter(None, (encoded, held_out)):
            method.prepare(model, pairs, config)
            if method.reference:
                pairs.labels["reference"] = reference_logps(model, pairs, config, processes).numpy()
        perturb_experts(model, config.expert_noise, config.seed)
        with model.model.compiled() if config.compile else nullcontext():
            train(model, encoded, held_out, config, work, processes)
        trained = time.perf_counter()
        finish(model, tokenizer, encoded, held_out, config, base, work, processes)
    print(f"\nbase model {ready - started:.0f} s, training {trained - ready:.0f} s, evaluation "
          f"{time.perf_counter() - trained:.0f} s; the run is in {out}/")


def finish(model, tokenizer, encoded, held_out, config, base, work, processes=ALONE):
    """After training: write the weights, the method's report and, on toy, the oracle's table; the run is finished."""
    method = METHODS[config.method]
    save_trained(model, work, config.template, tokenizer.chat_template if config.template in TEMPLATES else None,
                 processes.rank == 0)
    if method.report:
        types = toy.annotator_types(encoded.groups) if config.annotators else encoded.groups
        report, text = method.report(model, encoded, held_out, types, config.beta, 4 * config.batch_size, config.dtype)
        processes.run_once(lambda: write_text(work / "experts.json", json.dumps(report, indent=2) + "\n"))
        print(text)
    if config.model == "toy" and not isinstance(model, ScoreModel):
        processes.run_once(lambda: show_answers(model, tokenizer, config, base, work))
    processes.run_once(lambda: close_run(Path(config.out), work))


def show_answers(model, tokenizer, config, base, work):
    """The oracle's table of a toy run, printed and written. One process answers: it reads a sharded model again."""
    if hasattr(model, "reshard"):
        model = load_trained(work, base, next(model.parameters()).dtype, config.device)
    start = load_start({**asdict(config), "base": base}, device=config.device)
    report, samples = evaluate_run(model, start, tokenizer, work, config.eval_split, config.seed, config.temperature,
                                   preferences=config.preferences if config.on_toy else ())
    print("", samples, toy.closing_tables({config.method: report}, {config.method: asdict(config)}), sep="\n\n")


def is_finished(config, processes):
    """True if the run folder holds a finished run with these settings and input files, which is kept. Raises UserError,
    before anything long begins, where only --overwrite may replace the run there."""
    out = Path(config.out)
    if not out.is_dir():
        return False
    settings, before = run_settings(config, base_folder(config), processes), read_settings(out)
    unsettled = {name for name in ("groups", "experts") if before.get(name) and not settings[name]}  # by the data
    return earlier_run(settings, FREE | unsettled) == out and before["finished"] and not unsettled


def check_inputs_outside(config):
    """Raise UserError for an input that this run would replace: it lies in --out, but in no prerequisite run there."""
    out = Path(config.out).resolve()
    for flag in ("model", "data", "init_adapter", "references", "reward_model", "cost_model"):
        names = getattr(config, flag)
        for name in (names,) if isinstance(names, str) else names:
            path = Path(name).resolve()
            if name and path.exists() and path.is_relative_to(out) and (
                    path == out or "method" not in read_settings(out / path.relative_to(out).parts[0])):
                raise UserError(f"--{flag} {name}: lies in --out {config.out}, which this run replaces")


def keep_freed_memory():
    """Keep what a step frees for the next one: glibc would return it and fault in every page again."""
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


def main(argv=None):
    # Responsibilities and router weights run down to 1e-40, and a CPU takes such numbers a hundred times slower than 0
    torch.set_flush_denormal(True)
    keep_freed_memory()
    processes = Processes.join()
    config = parse_flags(argv)
    check_inputs_outside(config)
    before, results = METHODS[config.method].prerequisites(config)
    last = replace(config, **results)
    toy.one_thread(last.model)
    if processes.run_once(lambda: is_finished(last, processes)):
        before = []  # its prerequisites are not needed
    for each in (*before, last) if before else ():
        print(f"{each.out}: --method {each.method} --view {each.view}", flush=True)
    for each in (*before, last):
        if processes.run_once(lambda: is_finished(each, processes)):
            print(f"{each.out}: finished with these settings, kept", flush=True)
        else:
            run(each, processes)


if __name__ == "__main__":
    as_command(main, "train.py", "interrupted; if training had begun, --resume goes on from there")
