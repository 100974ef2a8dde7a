"""Views turn comparisons into pairs as the papers say, count what they drop, and refuse comparisons without labels."""
import pytest

import data
from conftest import line_of
from data import Comparison, Pair, apply_view, ordered, view

# (better, safer, response 0 unsafe, response 1 unsafe) -> what is chosen in each view, by hand; - is dropped
TRUTH = """
b s u0 u1  helpful harmless safe-better safedpo safety dual cost
0 0  0  0  0       0        0           0       -      0    0
0 1  0  0  0       1        0           0       -      -    1
1 0  0  0  1       0        1           1       -      -    0
1 1  0  0  1       1        1           1       -      1    1
0 0  0  1  0       0        0           0       0      -    0
0 1  0  1  0       1        0           0       1      -    1
1 0  0  1  1       0        -           0       0      -    0
1 1  0  1  1       1        -           0       1      -    1
0 0  1  0  0       0        -           1       0      -    0
0 1  1  0  0       1        -           1       1      -    1
1 0  1  0  1       0        1           1       0      -    0
1 1  1  0  1       1        1           1       1      -    1
0 0  1  1  0       0        -           -       -      -    0
0 1  1  1  0       1        -           -       -      -    1
1 0  1  1  1       0        -           -       -      -    0
1 1  1  1  1       1        -           -       -      -    1
"""
HEADER, *ROWS = (line.split() for line in TRUTH.strip().splitlines())
LABELS = [(int(better), int(safer), (first == "1", second == "1")) for better, safer, first, second, *_ in ROWS]
NAMES = HEADER[4:]


def compare(better=0, safer=0, unsafe=(False, False), responses=("response 0", "response 1"), **settings):
    return Comparison("Ask.", responses, better, safer, unsafe, "group", **settings)


def test_the_table_has_every_combination_of_labels_once():
    assert len(ROWS) == len({str(labels) for labels in LABELS}) == 16
    assert set(NAMES) <= set(data.VIEWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_chooses_what_the_truth_table_says(name):
    for labels, choices in zip(LABELS, ROWS):
        comparison, choice = compare(*labels), choices[HEADER.index(name)]
        outcome, pair = data.VIEWS[name](comparison)
        if choice == "-":
            assert pair is None and outcome.startswith("dropped ("), labels
            assert "no pairs are left" in line_of(apply_view, name, [comparison])
            continue
        chosen, (better, _, unsafe) = int(choice), labels
        wanted = Pair("Ask.", f"response {chosen}", f"response {1 - chosen}", unsafe[chosen], unsafe[1 - chosen],
                      "group")
        assert pair == wanted and apply_view(name, [comparison])[0] == [wanted], labels
        assert outcome == ("swapped" if name == "safedpo" and chosen != better else "kept"), labels


def test_safedpo_never_chooses_an_unsafe_response():
    pairs, _ = apply_view("safedpo", [compare(*labels) for labels in LABELS])
    assert len(pairs) == 12 and not any(pair.chosen_unsafe for pair in pairs)


# What becomes of the comparisons


def test_a_view_keeps_the_order_of_comparisons_and_counts_what_became_of_them():
    comparisons = [compare(0, 0, (False, True)), compare(0, 1, (True, True)), compare(1, 0, (False, True)),
                   compare(1, 1)]
    for i, comparison in enumerate(comparisons):
        comparison.prompt = f"prompt {i}"
    pairs, line = apply_view("safedpo", comparisons)
    assert [pair.prompt for pair in pairs] == ["prompt 0", "prompt 2", "prompt 3"]
    assert "safedpo" in line and "4 comparisons" in line
    assert "2 kept" in line and "1 swapped" in line and "1 dropped (both unsafe)" in line and "\n" not in line


def test_identical_and_empty_responses_are_dropped_and_counted():
    responses = ("a", "b"), ("a", "a"), ("a", " a\n"), ("a", " "), ("", "b")
    pairs, line = apply_view("helpful", [compare(responses=texts) for texts in responses])
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b")]
    assert "1 kept, 2 dropped (identical responses), 2 dropped (an empty response)" in line
    assert "no pairs are left" in line_of(apply_view, "helpful", [compare(responses=("same", "same"))])


def test_a_view_that_leaves_nothing_says_so():
    assert "1 dropped (both unsafe): no pairs are left to train on" in line_of(
        apply_view, "safedpo", [compare(unsafe=(True, True))])
    for name in ("helpful", "safedpo"):
        assert "no pairs are left" in line_of(apply_view, name, [])


# Labels that are absent


@pytest.mark.parametrize("name", [name for name in NAMES if name != "helpful"])
def test_views_that_need_safety_labels_say_so(name):
    unlabelled = Comparison("Ask.", ("response 0", "response 1"), 0)
    message = line_of(apply_view, name, [compare(), unlabelled])
    assert name in message and "no safety labels" in message
    assert "no safety labels" in line_of(apply_view, name, [compare(), compare(safer=None, unsafe=(True, False))])


def test_the_helpful_view_needs_no_safety_labels():
    pairs, _ = apply_view("helpful", [Comparison("Ask.", ("response 0", "response 1"), 1)])
    assert pairs == [Pair("Ask.", "response 1", "response 0")]


def test_harmless_needs_no_flags_and_the_other_safety_views_do():
    comparisons = [compare(safer=1, unsafe=None)]
    assert apply_view("harmless", comparisons)[0][0].chosen == "response 1"
    for name in ("safe-better", "safedpo", "safety", "dual"):
        assert "1 of 1 comparisons have no safety flags" in line_of(apply_view, name, comparisons)


# Margins of SPE-DPO


def test_margin_is_the_reward_difference_or_minus_the_cost_difference_and_never_negative():
    def margin(name, better, safer):
        scores = {"reward": (1.0, 3.5), "cost": (-2.0, 4.0)}
        return apply_view(name, [compare(better, safer, (False, True), scores=scores)])[0][0].margin

    assert margin("helpful", 1, 0) == 2.5 and margin("helpful", 0, 0) == 0.0
    assert margin("safety", 0, 0) == 6.0 and margin("safety", 0, 1) == 0.0


# A view of one's own


@pytest.fixture
def brave(monkeypatch):
    """A view registered as a user would, for this test alone."""
    monkeypatch.setattr(data, "VIEWS", dict(data.VIEWS))

    @view("brave", needs=("safer", "unsafe"), score="cost")
    def brave(comparison):
        """Chosen is the less safe of two unsafe responses."""
        if not all(comparison.unsafe):
            return "dropped (a response is safe)", None
        return "kept", ordered(comparison, 1 - comparison.safer, "cost")
    return brave


def test_a_new_view_makes_pairs_with_the_margins_of_its_score(brave):
    both = dict(unsafe=(True, True), scores={"reward": (9.0, 0.0), "cost": (1.0, 4.0)})
    pairs, line = apply_view("brave", [compare(safer=1, **both), compare(safer=0, **both), compare()])
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [
        ("response 0", "response 1", 3.0), ("response 1", "response 0", 0.0)]
    assert line == "view brave: 3 comparisons, 2 kept, 1 dropped (a response is safe)"
    assert (data.VIEWS["brave"], brave.needs, brave.score) == (brave, ("safer", "unsafe"), "cost")


@pytest.mark.parametrize("absent", ("safer", "unsafe"))
def test_a_new_view_is_refused_where_labels_that_it_needs_are_absent(brave, absent):
    message = line_of(apply_view, "brave", [compare(unsafe=(True, True)), compare(**{absent: None})])
    what = {"safer": "safety labels", "unsafe": "safety flags"}[absent]
    assert f"view brave: 1 of 2 comparisons have no {what} (" in message
