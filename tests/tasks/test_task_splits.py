"""Splits: disjoint, seeded, stratified, and clear when they cannot be made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.errors import DataError
from autocomp.tasks.protocol import DRAWN
from autocomp.tasks.splits import JUDGED, LEARNT, apportion, split_indices


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_apportion_is_within_one_of_the_quota(weights, data):
    total = sum(weights)
    seats = data.draw(st.integers(0, total))
    shares = apportion(seats, weights)
    assert sum(shares) == seats
    for share, weight in zip(shares, weights, strict=True):
        assert 0 <= share <= weight
        if total:
            assert abs(share - seats * weight / total) < 1


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6),
    st.integers(0, 2**31),
    st.data(),
)
def test_splits_are_disjoint_of_the_asked_size_and_cover_every_label(counts, seed, data):
    labels = np.repeat(np.arange(len(counts)), counts)
    total = len(labels)
    distil = data.draw(st.integers(min(len(counts), total), total))
    cuts = sorted(data.draw(st.lists(st.integers(0, total - distil), min_size=3, max_size=3)))
    sizes = {
        "distil": distil,
        "report": cuts[0],
        "search": cuts[1] - cuts[0],
        "calibrate": cuts[2] - cuts[1],
    }
    splits = split_indices(total, sizes, seed=seed, labels=labels)
    everything = np.concatenate([splits[name] for name in DRAWN])
    assert len(np.unique(everything)) == len(everything) == sum(sizes.values())
    assert all(len(splits[name]) == sizes[name] for name in DRAWN)
    assert set(labels[splits["distil"]]) == set(range(len(counts)))
    again = split_indices(total, sizes, seed=seed, labels=labels)
    assert all(np.array_equal(splits[name], again[name]) for name in DRAWN)


def test_labels_are_in_proportion_and_order_is_mixed():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    sizes = {"calibrate": 50, "distil": 400, "search": 200, "report": 350}
    splits = split_indices(1000, sizes, seed=1, labels=labels)
    for name in DRAWN:
        counts = np.bincount(labels[splits[name]], minlength=3)
        assert np.abs(counts - sizes[name] * np.array([0.6, 0.3, 0.1])).max() <= 2
        assert (np.diff(labels[splits[name]]) < 0).any()


def test_another_seed_gives_other_splits_and_more_distillation_data_does_not():
    sizes = {"calibrate": 10, "distil": 30, "search": 20, "report": 20}
    labels = np.arange(200) % 4
    first = split_indices(200, sizes, seed=0, labels=labels)
    other = split_indices(200, sizes, seed=1, labels=labels)
    more = split_indices(200, sizes | {"distil": 90}, seed=0, labels=labels)
    assert set(first["report"]) != set(other["report"])
    for name in ("calibrate", "search", "report"):
        assert np.array_equal(first[name], more[name])


def test_too_few_examples_says_how_many_there_are():
    sizes = {"calibrate": 10, "distil": 30, "search": 20, "report": 20}
    with pytest.raises(DataError, match=r"news\.csv has 79 examples.*report 20 = 80"):
        split_indices(79, sizes, seed=0, origin="news.csv")


def test_label_only_in_evaluation_is_named():
    sizes = {"calibrate": 2, "distil": 2, "search": 20, "report": 20}
    labels = np.repeat([0, 1, 2], [50, 40, 10])
    with pytest.raises(DataError, match=r"label 'zebra' occurs in the search split but never in d"):
        split_indices(
            100, sizes, seed=0, labels=labels, label_names=("ant", "bee", "zebra"), origin="x"
        )


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=4, max_size=40),
    st.integers(0, 2**31),
    st.data(),
)
def test_a_group_is_in_one_split_or_there_are_too_few(members, seed, data):
    """Groups of any size and mixture of labels; sizes are met exactly, or the split is named."""
    labels = np.concatenate([np.array(its) for its in members])
    groups = [f"g{i}" for i, its in enumerate(members) for _ in its]
    order = np.random.default_rng(seed).permutation(len(labels))  # groups are not contiguous
    labels, groups = labels[order], [groups[at] for at in order]
    sizes = {name: data.draw(st.integers(1, max(1, len(labels) // 4))) for name in DRAWN}
    try:
        splits = split_indices(len(labels), sizes, seed=seed, labels=labels, groups=groups)
    except DataError:
        assert max(map(len, members)) > 1 or sizes["distil"] < 3
        return
    assert {name: len(splits[name]) for name in DRAWN} == sizes
    seen = [{groups[at] for at in splits[name]} for name in DRAWN]
    assert len(set().union(*seen)) == sum(len(its) for its in seen)
    everything = np.concatenate([splits[name] for name in DRAWN])
    assert len(np.unique(everything)) == len(everything)


def test_groups_of_one_are_no_groups():
    sizes = {"calibrate": 10, "distil": 30, "search": 20, "report": 20}
    labels = np.arange(200) % 4
    alone = split_indices(200, sizes, seed=0, labels=labels, groups=list(range(200)))
    for name, found in split_indices(200, sizes, seed=0, labels=labels).items():
        assert sorted(labels[found]) == sorted(labels[alone[name]])


def test_labels_of_groups_are_in_proportion():
    """60 documents of one label and 40 of another, ten passages each."""
    groups = np.repeat(np.arange(100), 10)
    labels = np.repeat(np.repeat([0, 1], [60, 40]), 10)
    sizes = {"calibrate": 50, "distil": 400, "search": 100, "report": 200}
    splits = split_indices(1000, sizes, seed=1, labels=labels, groups=groups.tolist())
    for name in DRAWN:
        assert labels[splits[name]].mean() == pytest.approx(0.4, abs=0.05)


def test_a_large_group_is_learnt_from_or_the_split_that_goes_short_is_named():
    sizes = {"calibrate": 5, "distil": 30, "search": 5, "report": 5}
    groups = ["one"] * 40 + [f"g{i}" for i in range(20)]
    for seed in range(10):
        splits = split_indices(60, sizes, seed=seed, groups=groups)
        assert (splits["distil"] < 40).any()
    halves = ["one"] * 30 + ["other"] * 30
    with pytest.raises(DataError, match=r"group kept together, 0 are left for the search split"):
        split_indices(60, sizes, seed=0, groups=halves)


def test_held_out_examples_are_judged_on_and_the_others_learnt_from():
    sizes = {"calibrate": 10, "distil": 60, "search": 12, "report": 18}
    labels = np.arange(110) % 3
    splits = split_indices(110, sizes, seed=0, labels=labels, held_out=40)
    assert {name: len(splits[name]) for name in DRAWN} == sizes
    for name in DRAWN:
        assert (splits[name] >= 70).all() == (name in JUDGED)
        assert (splits[name] < 70).all() == (name in LEARNT)
    kept = split_indices(110, sizes | {"distil": 20}, seed=0, labels=labels, held_out=40)
    assert np.array_equal(kept["report"], splits["report"])
    with pytest.raises(DataError, match=r"has 40 held-out examples, .*search 30 \+ report 18 = 48"):
        split_indices(110, sizes | {"search": 30}, seed=0, labels=labels, held_out=40)
    with pytest.raises(DataError, match=r"has 70 examples, .*calibrate 10 \+ distil 61 = 71"):
        split_indices(110, sizes | {"distil": 61}, seed=0, labels=labels, held_out=40)
