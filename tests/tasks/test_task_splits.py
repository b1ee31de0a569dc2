"""Splits: disjoint, seeded, stratified, and clear when they cannot be made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.errors import DataError
from autocomp.tasks.protocol import DRAWN
from autocomp.tasks.splits import apportion, split_indices


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
