"""Token ids, packed batches of them, the order and the passes of training, and log-probabilities.

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
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import DTYPES, UserError


# Token ids


@dataclass
class Encoded:
    """N tokenised prompts, each with R responses, in one flat array.

    tokens: (total,) int32. bounds: (N, R + 2): prompt i is tokens[bounds[i, 0]:bounds[i, 1]], its response j
    is tokens[bounds[i, j + 1]:bounds[i, j + 2]]. labels: what losses read, float32 or whole numbers (N, …):
    - chosen_unsafe, rejected_unsafe, margin (N,): of the Pair, nan where absent; group (N,): its number in `groups`
      or -1 for none. All four are of `encode_pairs`.
    - annotator (N,): which pairs share a latent expert, of a mixture with --latent annotator.
    - pooled (N, D): the mean hidden state of the prompt, of a mixture with a gate on prompts.
    - reference (N, R): log π_ref of every response, in nats; (N, R, K) where each expert has a reference.
    """
    tokens: np.ndarray
    bounds: np.ndarray
    labels: dict = field(default_factory=dict)
    cut: Counter = field(default_factory=Counter)  # how many were cut, or tokenised apart
    groups: tuple = ()                             # what labels["group"] numbers

    def __len__(self):
        return len(self.bounds)

    def lengths(self):
        """(N,) tokens of prompt and responses together."""
        return self.bounds[:, -1] - self.bounds[:, 0]

    def totals(self, indices):
        """{unit: count}, for each unit that a loss averages over: pairs, their tokens, response tokens, and tokens of
        pairs with a group."""
        bounds, group = self.bounds[indices], self.labels.get("group")
        tokens = bounds[:, -1] - bounds[:, 0]
        return {"pairs": len(bounds), "tokens": tokens.sum(), "responses": (bounds[:, -1] - bounds[:, 1]).sum(),
                "grouped": 0 if group is None else tokens[group[indices] >= 0].sum()}


CHUNK = 2048  # prompts tokenised at a time: enough for all cores, little memory


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
    prompt's tokens are no prefix of these, the response is tokenised apart, and `cut` counts it. ended: whether each
    response is complete; one that is not gets no end of a turn. `shorten` cuts what is longer than max_len.
    """
    # Arrays of machine integers grow in place; lists, or pieces that are joined at the end, take twice the memory
    tokens, sizes, cut, (lead, end, end_ids) = array("i"), array("q"), Counter(), tokenizer.turn
    prompts, responses, ended = iter(prompts), iter(responses), iter(ended)
    while chunk := list(itertools.islice(prompts, CHUNK)):
        rows = [[((lead if text else "") + text, complete) for text, complete in zip(*row)]
                for row in zip(itertools.islice(responses, len(chunk)), ended)]
        joint = iter(tokenizer.encode([prompt + text + end * complete for prompt, row in zip(chunk, rows)
                                       for text, complete in row]))
        for prompt, row in zip(tokenizer.encode(chunk), rows):
            pieces = [prompt]
            for text, complete in row:
                ids = next(joint)
                if ids[:len(prompt)] == prompt:
                    ids = ids[len(prompt):] + ([] if end or not complete else end_ids)
                else:
                    cut["responses tokenised apart from their prompt"] += 1
                    ids = tokenizer.encode([text])[0] + (end_ids if complete else [])
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
    """What the model sees of one pair: its tokens, decoded one by one; those of responses are in [ ]."""
    bounds, lines = encoded.bounds[index], []
    for part, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        pieces = [tokenizer.backend.decode([token], skip_special_tokens=False) for token in encoded.tokens[start:end]]
        shown = "".join(f"[{piece!r}]" if part else f" {piece!r} " for piece in pieces)
        lines.append(f"{('prompt', 'chosen', 'rejected')[part]} ({end - start} tokens)\n{shown}\n")
    return "\n".join(lines)


# Packed batches


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
    labels: dict             # name -> (N, …), as in `Encoded`
    step_factor: dict        # unit of `Encoded.totals` -> factor for a batch's mean over it: the batches' means,
    #                          weighted by their pairs, then average to the mean over the step

    @property
    def reference(self):
        """log π_ref of every response: (N, R), or (K, N, R) where each expert has a reference; None without one."""
        reference = self.labels.get("reference")
        return reference.movedim(-1, 0) if reference is not None and reference.dim() == 3 else reference

    def mask(self):
        """Function (row, head, query, key): a token sees its own prompt and its own response, up to itself."""
        pair, part = self.pair, self.part

        def visible(row, head, query, key):
            same_part = (part[row, key] == 0) | (part[row, key] == part[row, query])
            return (query >= key) & (pair[row, query] == pair[row, key]) & same_part
        return visible

    def to(self, device):
        """The batch on a device; a GPU copies it from pinned memory while it computes."""
        def move(value):
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            return (value.pin_memory() if torch.device(device).type == "cuda" else value).to(device, non_blocking=True)
        return Batch(**move(vars(self)))


def first_fit(lengths, capacity):
    """Place items in rows by first-fit decreasing, which needs few rows. Returns [(row, offset)] and the row count."""
    free, places = [], [None] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, space in enumerate(free) if space >= lengths[i]), len(free))
        if row == len(free):
            free.append(capacity)
        places[i] = (row, capacity - free[row])
        free[row] -= lengths[i]
    return places, len(free)


def row_length(lengths):
    """Tokens per row for these items: those of the longest, or up to a quarter more if rows then have less padding.
    A token costs about T + 1000, of which T, the length of its row, is attention's part."""
    longest = max(lengths)
    tried = range(longest, longest * 5 // 4 + 1, longest // 64 or 1)  # trying all takes as long as a step on a GPU
    return min(tried, key=lambda T: first_fit(lengths, T)[1] * T * (T + 1000))


def pack(encoded, indices, step_totals=None):
    """The Batch of the prompts with these indices.

    step_totals: `encoded.totals` of the optimiser step, or the set, that this batch belongs to (default: this batch).
    """
    bounds, totals = encoded.bounds[indices], encoded.totals(indices)               # (N, R + 2)
    sizes, lengths = np.diff(bounds), (bounds[:, -1] - bounds[:, 0]).tolist()       # (N, R + 1)
    T = row_length(lengths)
    places, B = first_fit(lengths, T)
    shift = np.array([row * T + offset for row, offset in places]) - bounds[:, 0]   # (N,) from encoded.tokens to here
    # Of every token: its pair and part, its place in encoded.tokens, in the batch and in its part
    n, j = np.repeat(np.indices(sizes.shape).reshape(2, -1), sizes.flatten(), axis=1)
    source = np.concatenate([np.arange(*ends) for ends in bounds[:, [0, -1]]])
    at, within, in_response = source + shift[n], source - bounds[n, j], j > 0
    tokens, positions, pair, part = np.full((4, B * T), [[0], [0], [-1], [0]])
    tokens[at], pair[at], part[at] = encoded.tokens[source], n, j
    positions[at] = within + in_response * sizes[n, 0]
    predictor = np.where(within > 0, at - 1, (shift + bounds[:, 1] - 1)[n])
    owner = n * (sizes.shape[1] - 1) + j - 1
    last = shift[:, None] + np.where(sizes[:, 1:] > 0, bounds[:, 2:], bounds[:, 1:2]) - 1
    step_totals = step_totals or totals
    # PMoL's soft loss is a mean over all tokens; those without a group count as 0
    divisors = {**totals, "grouped": totals["tokens"]}
    rows = (array.reshape(B, T) for array in (tokens, positions, pair, part))
    of_responses = (values[in_response] for values in (predictor, tokens[at], owner))
    arrays = *rows, *of_responses, last, sizes[:, 1:], np.flatnonzero(pair >= 0)
    return Batch(*map(torch.from_numpy, arrays),
                 {name: torch.from_numpy(values[indices]) for name, values in encoded.labels.items()},
                 {unit: divisors[unit] / max(1, step_totals[unit]) * (step_totals["pairs"] / totals["pairs"])
                  for unit in totals})


# Which pairs a batch has


def fill(indices, lengths, most_pairs, most_tokens, together=None, at_once=1):
    """Cut indices, in order, into batches, [index array], greedily: a batch takes the next pair while it has at most
    most_pairs and most_tokens, padding included. What exceeds these by itself is a batch of its own.

    lengths (count,): tokens of each pair. together (count,): numbers; pairs with the same number stay together, in the
    order of the numbers. at_once: how many batches are filled in turn, back and forth, so that they become alike.
    """
    def fits(batch):
        sizes = lengths[batch].tolist()
        return len(sizes) <= most_pairs and (len(sizes) * max(sizes) <= most_tokens  # even in a row of its own each
                                             or first_fit(sizes, max(sizes))[1] * max(sizes) <= most_tokens)

    cuts = np.arange(1, len(indices))
    if together is not None:
        indices = indices[np.argsort(together[indices], kind="stable")]
        cuts = cuts[np.diff(together[indices]) > 0]
    units = np.split(indices, cuts)
    full, filling = [], units[:at_once]
    for start in range(at_once, len(units), at_once):
        dealt, waiting = units[start:start + at_once], filling[::-1]
        joined = [np.concatenate(both) for both in zip(waiting, dealt)] + waiting[len(dealt):]
        if all(map(fits, joined)):
            filling = joined
        else:
            full, filling = full + filling, dealt
    return full + filling


def split_step(indices, passes, lengths, tokens=0, processes=1, annotator=None):
    """The pairs of an optimiser step, split into this number of forward passes of equal size: [index array].

    tokens: most padded tokens of a pass, which only a pair that is longer by itself exceeds. There are then more
    passes, and the processes run passes of similar length at the same time. annotator (count,): an
    annotator's pairs stay together, so passes differ in size, and there may be fewer.
    """
    if tokens:
        indices = indices[np.argsort(-lengths[indices], kind="stable")]
        return fill(indices, lengths, math.ceil(len(indices) / passes), tokens, annotator, processes)
    if annotator is not None:
        return fill(indices, lengths, math.inf, math.inf, annotator, passes)
    return np.array_split(indices, passes)


PASS_TOKENS = 1 << 14  # most padded tokens of a forward pass without gradients: a bound on its memory


def batch_indices(encoded, batch_size, longest_first=True, together=None):
    """The pairs of an encoded set in batches, [index array], those of like length together: batch_size pairs each, or
    fewer where these would take more than PASS_TOKENS. together: as in `fill`."""
    lengths = encoded.lengths()
    order = np.argsort(-lengths, kind="stable") if longest_first else np.arange(len(encoded))
    return fill(order, lengths, batch_size, PASS_TOKENS, together)


def batches(encoded, batch_size, device, longest_first=True):
    """Yield (indices, Batch) of `batch_indices`."""
    for indices in batch_indices(encoded, batch_size, longest_first):
        yield indices, pack(encoded, indices).to(device)


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


# Log-probabilities

CHUNK_BYTES = 64 << 20  # float32 logits held at a time; beyond this, larger chunks are not faster


class FrozenHeadLogps(torch.autograd.Function):
    """log π of each target under a frozen head. The forward pass also computes its gradient in the states, (rows, D),
    which is all that the backward pass needs: logits are neither kept nor computed twice."""

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
    sums = torch.zeros(batch.lengths.numel(), device=hidden.device)
    return sums.index_add(0, batch.owner, torch.cat(pieces)).view(batch.lengths.shape)


def policy_logps(model, batch):
    """log π(y|x) of every response in a packed batch, (N, responses per prompt), by one forward pass."""
    return sequence_logps(model, model(batch.tokens, batch.positions, batch.mask()), batch)


@torch.no_grad()
def score(model, tokenizer, texts, max_len=2048, batch_size=16, device="cpu"):
    """Scores of [(prompt, response)], a list of floats, read at the EOS that ends each response."""
    if not texts:
        return []
    prompts = tokenizer.render_all(prompt for prompt, _ in texts)
    encoded = encode(tokenizer, prompts, [(response,) for _, response in texts],
                     min(max_len, model.config.max_positions))
    scores = np.empty(len(texts))
    for indices, batch in batches(encoded, batch_size, device):
        scores[indices] = model(batch.tokens, batch.last[:, 0], batch.positions, batch.mask()).cpu()
    return scores.tolist()


def precision(dtype, device):
    """The context of a forward pass: autocast to the dtype of this name; nothing for float32."""
    return torch.autocast(torch.device(device).type, DTYPES[dtype]) if dtype != "float32" else nullcontext()
