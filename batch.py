"""Token ids, packed batches of them, the order and the splits of steps, and log-probabilities.

`encode` tokenises prompts with their responses; both responses to a prompt share one copy of it in a packed row
(`Encoded`, `pack`, `Batch`); `sequence_logps` gives log π(y|x) of every response.

Letters in shape comments: N pairs, R responses per prompt, B rows, T tokens per row, M response tokens in the batch,
D width, V vocabulary.
"""
import itertools
import math
from array import array
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import commonprefix

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import DTYPES, UserError, progress
from model import dense_mask
from runs import ALONE


# Token ids, and packed batches of them


@dataclass
class Encoded:
    """N tokenised prompts, each with R responses, in one flat array.

    tokens: (total,) int32. bounds: (N, R + 2): prompt i is tokens[bounds[i, 0]:bounds[i, 1]], its response j
    is tokens[bounds[i, j + 1]:bounds[i, j + 2]]. labels: name -> (N, …) numbers, such as chosen_unsafe; training adds
    the reference's log-probs.
    """
    tokens: np.ndarray
    bounds: np.ndarray
    labels: dict = field(default_factory=dict)
    cut: Counter = field(default_factory=Counter)  # what had to be cut, or tokenised otherwise
    groups: tuple = ()                             # what labels["group"] numbers

    def __len__(self):
        return len(self.bounds)

    def lengths(self):
        """(N,) tokens of prompt and responses together."""
        return self.bounds[:, -1] - self.bounds[:, 0]

    def counts(self, indices):
        """Units that losses are means over: pairs, their tokens, response tokens, and tokens of pairs with a group."""
        bounds, group = self.bounds[indices], self.labels.get("group")
        tokens = bounds[:, -1] - bounds[:, 0]
        return {"pairs": len(bounds), "tokens": tokens.sum(), "responses": (bounds[:, -1] - bounds[:, 1]).sum(),
                "grouped": 0 if group is None else tokens[group[indices] >= 0].sum()}


CHUNK = 2048  # prompts that are tokenised at a time: enough for all cores, little memory


def shorten(pieces, max_len, frame, cut):
    """Cut token ids, [prompt, response, …], so that the prompt with each response fits into max_len; counts in `cut`.

    First goes the front of the prompt, but not the template's tokens; then the end of a response.
    """
    prompt, *responses = pieces
    head = len(commonprefix([prompt, frame[0]]))
    keep = max(head + len(frame[1]), max_len - max(map(len, responses)))
    if keep >= max_len:
        raise UserError(f"--max_len {max_len}: the template's {keep} tokens leave no room for a response")
    if keep < len(prompt):
        cut["prompts shortened"] += 1
        prompt = prompt[:head] + prompt[len(prompt) - (keep - head):]
    if long := sum(len(prompt) + len(ids) > max_len for ids in responses):
        cut["responses shortened"] += long
    return [prompt, *(ids[:max_len - len(prompt)] for ids in responses)]


def encode(tokenizer, prompts, responses, max_len, labels=None, ended=itertools.repeat((True, True))):
    """Tokenise prompts, rendered to text, with their responses: a tuple of R texts each; all may be generators.

    A response's tokens are those of the joint text: prompt, response and the template's end of a turn. Where the
    prompt's tokens are no prefix of it, they are tokenised apart, and `cut` counts that. ended: whether each response
    came to its end; one that did not gets none. `shorten` cuts what is longer than max_len.
    """
    # Arrays of machine integers grow in place; lists, or pieces that are joined at the end, take twice the memory
    tokens, sizes, cut, (lead, end, end_ids) = array("i"), array("q"), Counter(), tokenizer.turn
    prompts, responses, ended = iter(prompts), iter(responses), iter(ended)
    while chunk := list(itertools.islice(prompts, CHUNK)):
        rows = [[((lead if text else "") + text, whole) for text, whole in zip(*row)]
                for row in zip(itertools.islice(responses, len(chunk)), ended)]
        joint = iter(tokenizer.encode([prompt + text + end * whole for prompt, row in zip(chunk, rows)
                                       for text, whole in row]))
        for prompt, row in zip(tokenizer.encode(chunk), rows):
            pieces = [prompt]
            for text, whole in row:
                ids = next(joint)
                if ids[:len(prompt)] == prompt:
                    ids = ids[len(prompt):] + ([] if end or not whole else end_ids)
                else:
                    cut["responses tokenised apart from their prompt"] += 1
                    ids = tokenizer.encode([text])[0] + (end_ids if whole else [])
                pieces.append(ids)
            if len(prompt) + max(map(len, pieces[1:])) > max_len:
                pieces = shorten(pieces, max_len, tokenizer.frame, cut)
            for ids in pieces:
                tokens.extend(ids)
                sizes.append(len(ids))
    ends = np.cumsum(sizes).reshape(-1, len(pieces))
    bounds = np.concatenate([ends[:, :1] - np.reshape(sizes, ends.shape)[:, :1], ends], axis=1)
    return Encoded(np.frombuffer(tokens, dtype=np.int32), bounds, labels or {}, cut)


def encode_pairs(tokenizer, pairs, max_len, responses=2, groups=()):
    """Encoded pairs, response 0 being the chosen one, with the labels that the losses read.

    responses=1 leaves the rejected ones out, for training on the chosen responses alone. groups: the names that
    labels["group"] numbers, -1 being none of them; default: those of the pairs, sorted. An absent label is nan.
    """
    labels = {name: np.array([getattr(pair, name) for pair in pairs], dtype=np.float32)  # None becomes nan
              for name in ("chosen_unsafe", "rejected_unsafe", "margin")}
    groups = tuple(groups) or tuple(sorted({pair.group for pair in pairs} - {""}))
    numbers = {name: i for i, name in enumerate(groups)}
    labels["group"] = np.array([numbers.get(pair.group, -1) for pair in pairs])
    prompts = tokenizer.render_all((pair.prompt for pair in pairs), [pair.row for pair in pairs])
    texts = ((pair.chosen, pair.rejected)[:responses] for pair in pairs)
    encoded = encode(tokenizer, prompts, texts, max_len, labels, (pair.ended for pair in pairs))
    encoded.groups = groups
    return encoded


def show_pair(tokenizer, encoded, index=0):
    """What the model sees of one pair: its tokens, decoded one by one; those that are trained on stand in [ ]."""
    bounds, lines = encoded.bounds[index], []
    for part, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        pieces = [tokenizer.backend.decode([token], skip_special_tokens=False) for token in encoded.tokens[start:end]]
        shown = "".join(f"[{piece!r}]" if part else f" {piece!r} " for piece in pieces)
        lines.append(f"{('prompt', 'chosen', 'rejected')[part]} ({end - start} tokens)\n{shown}\n")
    return "\n".join(lines)


@dataclass
class Batch:
    """Rows of [prompt response_0 response_1 …], several prompts to a row; built by `pack`.

    A response's first token is predicted by the prompt's last position, which its sister responses share.
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T) restart at the prompt's end for each response
    pair: torch.Tensor       # (B, T) which prompt of the batch a token belongs to; -1 is padding
    part: torch.Tensor       # (B, T) 0 in a prompt, j + 1 in response j
    predictor: torch.Tensor  # (M,) flat position whose hidden state predicts a response token
    target: torch.Tensor     # (M,) that token
    owner: torch.Tensor      # (M,) flat index into (N, R): the response that the token belongs to
    last: torch.Tensor       # (N, R) flat position of each response's last token
    lengths: torch.Tensor    # (N, R) response tokens
    inside: torch.Tensor     # (tokens,) flat positions of what is not padding
    labels: dict             # name -> (N,)
    scale: dict              # unit of `Encoded.counts` -> factor of means over it, with which the mean of a step's
    #                          batches, weighted by their pairs, is the mean over the step

    @property
    def shape(self):
        return tuple(self.lengths.shape)

    def visible(self):
        """Function (row, head, query, key): a token sees its own prompt and its own response, up to itself."""
        pair, part = self.pair, self.part

        def visible(row, head, query, key):
            same_part = (part[row, key] == 0) | (part[row, key] == part[row, query])
            return (query >= key) & (pair[row, query] == pair[row, key]) & same_part
        return visible

    def mask(self):
        """`visible`: on a GPU, where FlexAttention is fused, the function itself, elsewhere its (B, T, T) bool."""
        visible, tokens = self.visible(), self.tokens
        return visible if tokens.is_cuda else dense_mask(visible, *tokens.shape, tokens.device)

    def to(self, device):
        """The batch on a device; a GPU gets it from pinned memory, while it goes on computing."""
        def moved(values):
            tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
            if torch.device(device).type == "cuda":
                tensors = {name: value.pin_memory() for name, value in tensors.items()}
            return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved(vars(self)), labels=moved(self.labels))


def first_fit(lengths, capacity):
    """Place items into as few rows as first-fit-decreasing finds. Returns [(row, offset)] and the row count."""
    free, places = [], [None] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(free) if space >= lengths[i]), None)
        if row is None:
            row = len(free)
            free.append(capacity)
        places[i] = (row, capacity - free[row])
        free[row] -= lengths[i]
    return places, len(free)


def row_length(lengths):
    """Tokens per row for these items: those of the longest, or up to a quarter more where rows then hold less padding.
    Attention's share of a token's cost, which grows with the row, is about T / (T + 1000)."""
    longest = max(lengths)
    tried = range(longest, longest * 5 // 4 + 1, longest // 64 or 1)  # to try all takes as long as a step on a GPU
    return min(tried, key=lambda T: first_fit(lengths, T)[1] * T * (T + 1000))


def pack(encoded, indices, step=None):
    """The Batch of the prompts with these indices.

    step: `encoded.counts` of the optimiser step, or the set, that this batch is a part of (default: it is all).
    """
    lengths = (encoded.bounds[indices, -1] - encoded.bounds[indices, 0]).tolist()
    T = row_length(lengths)
    places, B = first_fit(lengths, T)
    R = encoded.bounds.shape[1] - 2
    tokens, positions, part = (np.zeros((B, T), dtype=np.int64) for _ in range(3))
    pair = np.full((B, T), -1, dtype=np.int64)
    last = np.empty((len(indices), R), dtype=np.int64)
    predictor, target, owner = [], [], []
    for n, (index, (row, offset)) in enumerate(zip(indices, places)):
        bounds = encoded.bounds[index] - encoded.bounds[index, 0] + offset
        start, stop = bounds[0], bounds[-1]
        prompt_length = bounds[1] - start
        tokens[row, start:stop] = encoded.tokens[encoded.bounds[index, 0]:encoded.bounds[index, -1]]
        pair[row, start:stop] = n
        positions[row, start:bounds[1]] = np.arange(prompt_length)
        for j in range(R):
            first, end = bounds[j + 1], bounds[j + 2]
            part[row, first:end] = j + 1
            positions[row, first:end] = prompt_length + np.arange(end - first)
            before = np.arange(first - 1, end - 1)
            before[:1] = bounds[1] - 1
            predictor.append(row * T + before)
            target.append(tokens[row, first:end])
            owner.append(np.full(end - first, n * R + j))
            last[n, j] = row * T + (end if end > first else bounds[1]) - 1
    flat = (torch.from_numpy(np.concatenate(pieces)) for pieces in (predictor, target, owner))
    here = encoded.counts(indices)
    step = step or here
    # PMoL's soft loss is a mean over all tokens in which those without a group count 0
    scaled = {unit: here["tokens" if unit == "grouped" else unit] for unit in here}
    return Batch(*map(torch.from_numpy, (tokens, positions, pair, part)), *flat, last=torch.from_numpy(last),
                 inside=torch.from_numpy(np.flatnonzero(pair >= 0)),
                 lengths=torch.from_numpy(np.diff(encoded.bounds[indices], axis=1)[:, 1:]),
                 labels={name: torch.from_numpy(values[indices]) for name, values in encoded.labels.items()},
                 scale={unit: scaled[unit] / max(1, step[unit]) * (step["pairs"] / here["pairs"]) for unit in here})


PASS_TOKENS = 1 << 14  # padded tokens of a forward pass without gradients: it bounds their memory


def batches(encoded, batch_size, device, longest_first=True, together=None, processes=ALONE):
    """Yield (indices, Batch) over a whole encoded set, pairs of like length together; of several processes, each gets
    its share of the batches, equally many: a batch without indices repeats that of another process, and must not count.
    A batch has batch_size pairs, or fewer where these would take more than PASS_TOKENS.

    together (N,): numbers; pairs with the same number stay in one batch, which may then be larger.
    """
    order, lengths, step = np.arange(len(encoded)), encoded.lengths(), encoded.counts(slice(None))
    if longest_first:
        order = np.argsort(-lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    if together is not None:
        order = np.argsort(together, kind="stable")
        first = np.flatnonzero(np.diff(together[order], prepend=-1))  # where another number begins
        starts = first[np.unique(np.searchsorted(first, np.arange(0, len(order), batch_size)).clip(max=len(first) - 1))]
    parts = [indices for chunk in np.split(order, list(starts)[1:]) for indices in np.split(chunk, cuts(
        lengths[chunk], 1, PASS_TOKENS, units=None if together is None else together[chunk]))]
    for indices, counts in processes.share(parts):
        yield indices[:len(indices) * counts], pack(encoded, indices, step).to(device)


def epoch_order(count, epochs, seed, group=None, shares=None, annotator=None):
    """The order in which pairs are trained on: a permutation for each epoch, joined end to end.

    group (count,): each pair's group. shares: an epoch has pairs of group i in proportion to shares[i], each group's
    permutation repeated or cut and spread evenly over the epoch, so that every batch mixes them. annotator (count,):
    the pairs of an annotator stand next to each other, the annotators in a new order in each epoch.
    """
    orders = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        if shares is not None:
            members = [order[group[order] == i] for i in range(len(shares))]
            sizes = [round(count * share / sum(shares)) for share in shares]
            places = np.concatenate([(np.arange(size) + 0.5) / max(1, size) for size in sizes])
            pieces = np.concatenate([np.resize(indices, size) for indices, size in zip(members, sizes)])
            order = pieces[np.argsort(places, kind="stable")]
        if annotator is not None:
            turn = np.random.default_rng([seed, epoch, 1]).permutation(annotator.max() + 1)
            order = order[np.argsort(turn[annotator[order]], kind="stable")]
        orders.append(order)
    return np.concatenate(orders)


def split_step(indices, parts, annotator=None, lengths=None, tokens=0, multiple=1):
    """The pairs of an optimiser step in so many forward passes of equal size. With a budget of tokens, there are
    `multiple` more at a time until each holds at most that, or what the longest pair has. lengths (count,): of the
    pairs; annotator (count,): one with a latent expert has all pairs of the step in one pass, so there may be fewer
    passes, of unequal size."""
    if annotator is not None or tokens:
        indices = indices[np.argsort((-lengths if annotator is None else annotator)[indices], kind="stable")]
    sizes = lengths[indices] if tokens else np.ones(len(indices))
    return np.split(indices, cuts(sizes, parts, tokens, multiple, None if annotator is None else annotator[indices]))


def cuts(sizes, parts, tokens=0, multiple=1, units=None):
    """Where to cut items, in order, into so many parts of about equal size; with a budget of tokens, `multiple` more at
    a time until no part takes more padded tokens than that, or than the largest unit. units: numbers of the items;
    neighbours with the same number stay together."""
    def padded(part):
        return int(part.max()) * first_fit(part.tolist(), int(part.max()))[1]

    ends = np.flatnonzero(np.append(np.diff(np.arange(len(sizes)) if units is None else units), 1)) + 1  # of the units
    total = np.cumsum(sizes)[ends - 1]
    middle = total - np.diff(total, prepend=0) / 2
    tokens = tokens and max(tokens, *map(padded, np.split(sizes, ends[:-1])))
    if tokens:  # fewer parts than this can not be enough
        parts += math.ceil(max(0, total[-1] / tokens - parts) / multiple) * multiple
    for count in range(min(parts, len(ends)), len(ends) + 1, multiple):
        cut = np.arange(1, count)
        before = np.searchsorted(middle, total[-1] * cut / count)  # units before each cut, for equal shares
        before = cut + np.maximum.accumulate((before - cut).clip(0)).clip(max=len(ends) - count)  # one in each part
        at = ends[before - 1]
        if not tokens or all(padded(part) <= tokens for part in np.split(sizes, at)):
            break
    return at


# Log-probabilities

CHUNK_BYTES = 64 << 20  # float32 logits held at a time; beyond this, larger chunks are not faster


class FrozenHeadLogps(torch.autograd.Function):
    """log π of each target under a frozen head, with its gradient in the state computed beside it: (rows, D), all that
    the backward pass needs, so logits are neither kept nor computed twice."""

    @staticmethod
    def forward(ctx, head, states, target):
        with torch.enable_grad():
            logits = head(states := states.detach().requires_grad_())
        logps = logits.detach().float().log_softmax(-1)                                  # (rows, V)
        chosen = logps.gather(1, target[:, None])
        slope = logps.exp_().scatter_add_(1, target[:, None], -torch.ones_like(chosen))  # of −log π in the logits
        ctx.save_for_backward(*torch.autograd.grad(logits, states, slope.to(logits.dtype)))
        return chosen.squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient[:, None] * -ctx.saved_tensors[0], None


def sequence_logps(model, hidden, batch, head=None):
    """log π(y|x) of every response in a packed batch: (N, responses per prompt), float32, in nats.

    hidden: (B, T, D) from `model(batch.tokens, batch.positions, batch.mask())`; head: in place of the model's.
    Sums the log-probs of the response's tokens, its end-of-sequence token included, and of nothing else
    (arXiv 2305.18290, Eq. 7). Logits are computed in chunks and freed with them, forward and backward.
    """
    def token_logps(chunk, target):
        return -F.cross_entropy(model.logits(chunk, head).float(), target, reduction="none")

    states = hidden.flatten(0, 1).index_select(0, batch.predictor)                       # (M, D)
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    if states.requires_grad and not any(p.requires_grad for p in model.lm_head.parameters()):
        compute = partial(FrozenHeadLogps.apply, partial(model.logits, head=head))
    else:
        compute = partial(checkpoint, token_logps, use_reentrant=False, preserve_rng_state=False)
    pieces = [compute(chunk, target) for chunk, target in zip(states.split(rows), batch.target.split(rows))]
    sums = torch.zeros(batch.shape, dtype=torch.float32, device=hidden.device)
    if not pieces:
        return sums
    return sums.flatten().index_add(0, batch.owner, torch.cat(pieces)).view(batch.shape)


def policy_logps(model, batch):
    """log π(y|x) of every response in a packed batch, (N, responses per prompt), by one forward pass."""
    return sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)


def longest(model, tokens=1 << 20):
    """The smaller of this many tokens and the positions that a model with learned ones has."""
    return min(tokens, model.config.max_positions) if model.config.learned_positions else tokens


@torch.no_grad()
def response_logps(model, encoded, batch_size, dtype="float32", device="cpu", processes=ALONE):
    """log π(y|x) of every response of an encoded set: (N, R) float32 on the CPU, in nats."""
    logps = torch.zeros(len(encoded), encoded.bounds.shape[1] - 2)
    with progress(desc="log-probs", unit="pair", leave=False, total=len(encoded) // processes.count,
                  show=processes.rank == 0) as bar:
        for indices, batch in batches(encoded, batch_size, device, processes=processes):
            with precision(dtype, device):
                logps[indices] = policy_logps(model, batch)[:len(indices)].cpu()
            bar.update(len(indices))
    processes.add([logps])
    return logps


@torch.no_grad()
def score(model, tokenizer, texts, max_len=2048, batch_size=16, device="cpu"):
    """Scores of [(prompt, response)], a list of floats, read at the EOS that ends each response."""
    if not texts:
        return []
    prompts = tokenizer.render_all(prompt for prompt, _ in texts)
    encoded = encode(tokenizer, prompts, [(response,) for _, response in texts], longest(model, max_len))
    scores = np.empty(len(texts))
    for indices, batch in batches(encoded, batch_size, device):
        scores[indices] = model(batch.tokens, batch.last[:, 0], batch.positions, batch.mask()).cpu()
    return scores.tolist()


def precision(dtype, device):
    """The context of a forward pass: autocast to the dtype of this name; nothing for float32."""
    return torch.autocast(torch.device(device).type, DTYPES[dtype]) if dtype != "float32" else nullcontext()
