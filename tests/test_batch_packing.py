"""Packing is exact bookkeeping: every token, position, mask and target of a batch against brute force."""
import itertools
import random

import numpy as np
import pytest
import torch

from batch import encode, encode_pairs, first_fit, pack, row_length
from conftest import encoded_of, pieces
from data import Pair
from model import dense_mask
from toy import make_tokenizer

ITEMS = [(3, 5, 2), (1, 4, 6), (1, 1, 1), (7, 0, 3), (2, 3, 0), (9, 8, 7), (5, 0, 0), (4, 1, 12)]


CASES = {"pairs": (ITEMS, list(range(8))), "shuffled and repeated": (ITEMS, [5, 2, 2, 7, 0]),
         "one pair": (ITEMS, [3]), "one response each": ([(3, 5), (1, 4), (7, 0), (2, 2)], [3, 1, 0, 2]),
         "three responses each": ([(3, 1, 2, 3), (1, 4, 0, 2)], [1, 0])}


@pytest.fixture(params=CASES, name="packed")
def packed_case(request):
    items, indices = CASES[request.param]
    encoded = encoded_of(items, distinct=True)
    encoded.labels["chosen_unsafe"] = np.arange(len(items), dtype=np.float32)
    return encoded, indices, pack(encoded, indices)


# Rows


def test_every_token_of_every_pair_is_in_the_batch_once_and_in_order(packed):
    encoded, indices, batch = packed
    for n, index in enumerate(indices):
        for part, tokens in enumerate(pieces(encoded, index)):
            assert batch.tokens[(batch.pair == n) & (batch.part == part)].tolist() == tokens
    assert int((batch.pair >= 0).sum()) == sum(encoded.lengths()[indices])


def test_each_pair_lies_in_one_row_without_a_gap(packed):
    encoded, indices, batch = packed
    for n, index in enumerate(indices):
        rows, columns = torch.nonzero(batch.pair == n, as_tuple=True)
        assert len(set(rows.tolist())) == 1
        assert columns.tolist() == list(range(int(columns[0]), int(columns[0]) + encoded.lengths()[index]))
        assert batch.part[rows[0], columns].tolist() == sorted(batch.part[rows[0], columns].tolist())


def test_rows_are_as_long_as_the_longest_pair_or_up_to_a_quarter_longer_for_less_padding(packed):
    encoded, indices, batch = packed
    lengths, (B, T) = encoded.lengths()[indices].tolist(), batch.tokens.shape
    longest = max(lengths)
    assert longest <= T <= 1.25 * longest
    assert T == longest or B * T < first_fit(lengths, longest)[1] * longest


def test_longer_rows_are_taken_where_fewer_of_them_do():
    assert row_length([100, 60, 60, 60, 60]) == 120  # 3 × 120 in place of 5 × 100
    assert row_length([100, 76, 76]) == 100          # 152 would be more than a quarter longer
    assert row_length([100, 100, 30]) == 100         # nothing to gain


def test_positions_of_every_response_restart_at_the_prompts_end(packed):
    encoded, indices, batch = packed
    for n, index in enumerate(indices):
        prompt = len(pieces(encoded, index)[0])
        for part, tokens in enumerate(pieces(encoded, index)):
            start = prompt if part else 0
            got = batch.positions[(batch.pair == n) & (batch.part == part)].tolist()
            assert got == list(range(start, start + len(tokens)))


def test_mask_lets_a_token_see_its_own_sequence_up_to_itself_and_nothing_else(packed):
    """A sequence is a prompt with one response; every token knows where it stands there."""
    encoded, indices, batch = packed
    B, T = batch.tokens.shape
    place = {}  # (row, column) -> (pair, response or None for the prompt, place in its sequence)
    for row, column in itertools.product(range(B), range(T)):
        n = int(batch.pair[row, column])
        if n >= 0:
            parts = pieces(encoded, indices[n])
            part = next(i for i, tokens in enumerate(parts) if int(batch.tokens[row, column]) in tokens)
            offset = parts[part].index(int(batch.tokens[row, column]))
            place[row, column] = (n, part or None, offset + (len(parts[0]) if part else 0))
    mask = dense_mask(batch.mask(), B, T, T, "cpu")[:, 0]
    assert mask.shape == (B, T, T) and mask.dtype == torch.bool
    for row, query, key in itertools.product(range(B), range(T), range(T)):
        if (row, query) in place:
            (n, response, at), other = place[row, query], place.get((row, key))
            same = other is not None and other[0] == n and other[1] in (None, response)
            assert bool(mask[row, query, key]) == (same and other[2] <= at), (row, query, key)


def test_no_query_is_left_without_a_key(packed):
    """Also in padding, where softmax over nothing would be nan and reach the gradients."""
    B, T = packed[2].tokens.shape
    assert dense_mask(packed[2].mask(), B, T, T, "cpu").any(-1).all()


# What is predicted


def test_every_response_token_is_predicted_once_from_the_token_before_it(packed):
    """The one before a response's first token is the prompt's last, whichever response it is."""
    encoded, indices, batch = packed
    tokens = batch.tokens.flatten()
    expected = []
    for n, index in enumerate(indices):
        prompt, *responses = pieces(encoded, index)
        for j, response in enumerate(responses):
            for before, target in zip([prompt[-1], *response], response):
                expected.append((n, n * len(responses) + j, before, target))
    got = [(int(batch.pair.flatten()[place]), owner, int(tokens[place]), target) for place, owner, target in
           zip(batch.predictor.tolist(), batch.owner.tolist(), batch.target.tolist())]
    assert sorted(got) == sorted(expected)


def test_last_is_where_a_response_ends_or_where_it_is_empty_the_prompt(packed):
    encoded, indices, batch = packed
    for n, index in enumerate(indices):
        prompt, *responses = pieces(encoded, index)
        places = batch.last[n]
        assert batch.tokens.flatten()[places].tolist() == [(response or prompt)[-1] for response in responses]
        assert set(batch.pair.flatten()[places].tolist()) == {n}


def test_lengths_and_labels_belong_to_their_pair(packed):
    encoded, indices, batch = packed
    assert batch.lengths.tolist() == [[len(r) for r in pieces(encoded, i)[1:]] for i in indices]
    assert batch.lengths.shape == (len(indices), len(pieces(encoded, 0)) - 1)
    assert batch.labels["chosen_unsafe"].tolist() == [float(i) for i in indices]


def test_a_moved_batch_is_the_same_batch(packed):
    batch = packed[2]
    moved = batch.to("cpu")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(moved, name), value)
    assert moved.step_factor == batch.step_factor
    assert {k: v.tolist() for k, v in moved.labels.items()} == {k: v.tolist() for k, v in batch.labels.items()}


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_keeps_every_item_and_never_overfills_or_overlaps(seed):
    rng = random.Random(seed)
    capacity = rng.randint(5, 60)
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 40))]
    places, rows = first_fit(lengths, capacity)
    used = [[False] * capacity for _ in range(rows)]
    assert len(places) == len(lengths)
    for (row, offset), length in zip(places, lengths):
        assert 0 <= offset and offset + length <= capacity
        assert not any(used[row][offset:offset + length])
        used[row][offset:offset + length] = [True] * length
    assert all(map(any, used))
    # two rows that are both at most half full would have been one
    assert sum(sum(row) * 2 <= capacity for row in used) <= 1


def test_first_fit_fills_rows_that_fit_exactly():
    places, rows = first_fit([3, 7, 5, 5, 10], 10)
    assert rows == 3
    assert places[0][0] == places[1][0] and places[2][0] == places[3][0]


# Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_encode_keeps_texts_apart_and_ends_responses_with_eos(tokenizer):
    encoded = encode(tokenizer, ["user: How do I bake bread?", "user: a"], [("Sure.", ""), ("", "Enjoy.")], 100)
    for index, (prompt, responses) in enumerate([("user: How do I bake bread?", ("Sure.", "")),
                                                 ("user: a", ("", "Enjoy."))]):
        got = pieces(encoded, index)
        assert got[0] == tokenizer.encode([prompt])[0]
        assert got[1:] == [ids + [tokenizer.eos_id] for ids in tokenizer.encode(responses)]
    assert len(encoded) == 2 and not encoded.cut


def test_too_long_pairs_lose_the_front_of_the_prompt(tokenizer):
    prompt, answer = "user: How do I bake bread? It is for my class.", "First turn the zib."
    whole_prompt, whole_answer = tokenizer.encode([prompt, answer])
    limit = len(whole_answer) + 1 + 4
    encoded = encode(tokenizer, [prompt], [(answer, "No.")], limit)
    assert pieces(encoded, 0)[:2] == [whole_prompt[-4:], whole_answer + [tokenizer.eos_id]]
    assert encoded.cut == {"prompts shortened": 1}


def test_too_long_responses_keep_their_start(tokenizer):
    prompt, answer = "user: How do I bake bread?", "First turn the zib. Then lift the nof. Last press the rup."
    whole_prompt, whole_answer = tokenizer.encode([prompt, answer])
    encoded = encode(tokenizer, [prompt], [(answer,)], 8)
    got_prompt, got_answer = pieces(encoded, 0)
    assert len(got_prompt) + len(got_answer) == 8
    assert got_prompt == whole_prompt[-len(got_prompt):] and got_prompt
    assert got_answer == whole_answer[:len(got_answer)]
    assert encoded.cut["responses shortened"] == 1


def test_encode_pairs_puts_the_chosen_response_first_with_its_labels(tokenizer):
    pairs = [Pair("How do I bake bread?", "Sure.", "Enjoy.", False, True), Pair("Hm?", "Enjoy.", "Sure.", True, False)]
    encoded = encode_pairs(tokenizer, pairs, 100)
    texts = [[tokenizer.decode(tokens).strip() for tokens in pieces(encoded, i)] for i in range(2)]
    assert [row[1:] for row in texts] == [["Sure.", "Enjoy."], ["Enjoy.", "Sure."]]
    assert "How do I bake bread?" in texts[0][0]
    assert encoded.labels["chosen_unsafe"].tolist() == [0, 1]
    assert encoded.labels["rejected_unsafe"].tolist() == [1, 0]
    alone = encode_pairs(tokenizer, pairs, 100, responses=1)
    assert [pieces(alone, i) for i in range(2)] == [pieces(encoded, i)[:2] for i in range(2)]
