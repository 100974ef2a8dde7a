"""The order of training: a permutation for each epoch, groups in their shares, an annotator's pairs together."""
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import methods
import train
from batch import encode_pairs, epoch_order
from conftest import encoded_of, load_run, run, small_pairs

# The order


@pytest.mark.parametrize("count, epochs", ((1, 3), (7, 1), (50, 4)))
def test_every_epoch_visits_every_pair_once_in_an_order_of_its_own(count, epochs):
    order = epoch_order(count, epochs, seed=3).reshape(epochs, count)
    for epoch in order:
        assert sorted(epoch) == list(range(count))
    if count > 7:
        assert len({tuple(epoch) for epoch in order}) == epochs
        assert not np.array_equal(order, epoch_order(count, epochs, seed=4).reshape(epochs, count))


def test_without_shares_or_annotators_the_order_is_a_plain_permutation():
    group = np.random.default_rng(2).integers(0, 3, 50)
    expected = np.concatenate([np.random.default_rng([7, epoch]).permutation(50) for epoch in range(3)])
    assert np.array_equal(epoch_order(50, 3, 7), expected)
    assert np.array_equal(epoch_order(50, 3, 7, group), expected)


def test_an_annotators_pairs_stand_together_and_every_epoch_has_an_order_of_its_own():
    group = np.random.default_rng(0).integers(0, 9, 70)
    orders = epoch_order(70, 3, seed=5, annotator=group).reshape(3, 70)
    for order in orders:
        assert sorted(order) == list(range(70))
        turns = [number for number, _ in itertools.groupby(group[order])]
        assert len(turns) == len(set(turns)) == 9
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(dict.fromkeys(group[order])) for order in orders}) == 3, "the annotators take other turns"
    within = [tuple(order[group[order] == 4]) for order in orders]
    assert len(set(within)) > 1, "and so do an annotator's pairs"


@pytest.mark.parametrize("shares", ([1, 1, 1], [3, 1, 2], [0.5, 8, 1]))
def test_every_stretch_of_the_order_has_the_groups_in_their_shares(shares):
    group = np.random.default_rng(1).integers(0, 3, 300)
    orders = np.split(epoch_order(300, 2, seed=0, group=group, shares=shares), 2)
    for order in orders:
        assert set(order) <= set(range(300)) and abs(len(order) - 300) <= 1
        for start, length in itertools.product(range(0, 280), (8, 20)):
            counts = np.bincount(group[order[start:start + length]], minlength=3)
            for i, share in enumerate(shares):
                assert abs(counts[i] - length * share / sum(shares)) <= 1.5
        for i, share in enumerate(shares):  # a group is gone through as evenly as its share lets it be
            times = np.bincount(order[group[order] == i], minlength=300)[group == i]
            assert times.max() - times.min() <= 1
    assert not np.array_equal(*orders)


# Runs


def test_steps_visit_the_pairs_in_epoch_order(place, passes):
    config, model, tokenizer = load_run()
    config = replace(config, batch_size=3, grad_accum=2, epochs=2)
    encoded = encode_pairs(tokenizer, small_pairs(), config.max_len)
    encoded.labels["reference"] = train.reference_logps(model, encoded, config).numpy()
    passes.clear()
    train.train(model, encoded, None, config, place)
    flat = [i for _, indices in passes for i in indices]
    assert flat == epoch_order(len(encoded), 2, 0)[:len(flat)].tolist()
    assert len(flat) == 2 * len(encoded) // 6 * 6 and {len(indices) for _, indices in passes} == {3}


@pytest.mark.parametrize("latent", ("comparison", "annotator"))
def test_annotators_with_a_latent_expert_each_have_their_pairs_together(latent):
    """Else a batch would hold one or two pairs of an annotator, too few to infer their expert from."""
    encoded = encoded_of([(2, 1, 1)] * 60)
    encoded.groups = tuple(f"{taste} {number:03}" for number in range(3) for taste in ("warmth", "curtness"))
    encoded.labels["group"] = np.arange(60) % 6
    config = methods.resolve({"method": "mix-dpo", "latent": latent, "annotators": 6, "epochs": 1, "device": "cpu"})
    methods.prepare_mixture(None, encoded, config)
    order = train.training_order(encoded, config)
    turns = [number for number, _ in itertools.groupby(encoded.labels["group"][order])]
    assert sorted(order) == list(range(60)) and (len(turns) == 6) == (latent == "annotator")


def test_no_annotator_with_a_latent_expert_is_split_over_the_passes_of_a_step(quick, passes):
    run("run", "--method", "mix-dpo", "--lora_rank", 4, "--latent", "annotator", "--annotators", 12, "--batch_size", 4,
        "--grad_accum", 2, "--max_steps", 6)
    passes = [(encoded, indices) for encoded, indices in passes if encoded is passes[0][0]]  # without the held-out pairs
    sizes = np.cumsum([len(indices) for _, indices in passes])
    assert sizes[-1] == 6 * 8 and len(passes) > 6
    for step in range(6):
        seen = [set(encoded.labels["annotator"][indices]) for (encoded, indices), end in zip(passes, sizes)
                if 8 * step < end <= 8 * step + 8]
        assert sum(map(len, seen)) == len(set().union(*seen)), "each in one pass"


PMOL = ("--method", "pmol", "--lora_rank", 4, "--log_every", 1, "--max_steps", 7)


def steps_of(passes, size):
    """The group names of the pairs in every training batch of this size."""
    return [Counter(encoded.groups[encoded.labels["group"][i]] for i in indices)
            for encoded, indices in passes if len(indices) == size]


def test_a_batch_mixes_the_preferences_in_the_shares_given(quick, passes):
    def batches(groups):
        passes.clear()
        run("run", *PMOL, "--groups", groups, "--overwrite")
        return steps_of(passes, 8)

    steps = batches("helpfulness=3,empathy=1")
    assert len(steps) == 7
    for counts in steps:
        assert abs(counts["empathy"] - 2) <= 1 and sum(counts.values()) == 8
    assert sum(counts["empathy"] for counts in batches("empathy,helpfulness=3")) == pytest.approx(14, abs=1)
    equal = sum(counts["empathy"] for counts in batches("helpfulness,empathy"))
    assert 20 <= equal <= 36, "equal parts, as the data has them"


def test_shares_of_annotator_types_are_those_of_the_pairs_that_are_trained_on(quick, passes):
    """The groups of the data are annotators; the shares are of their tastes, not of the first annotators."""
    run("run", "--method", "moe-dpo", "--lora_rank", 4, "--annotators", 6, "--batch_size", 6, "--groups",
        "warmth=3,curtness=1", "--max_steps", 8)
    annotators = sum(steps_of(passes, 6), Counter())
    warm = sum(count for name, count in annotators.items() if name.startswith("warmth"))
    assert warm / annotators.total() == pytest.approx(0.75, abs=0.08)
    assert len(annotators) == 6, annotators
