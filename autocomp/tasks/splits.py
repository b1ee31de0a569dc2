"""Four disjoint, seeded splits, stratified by label. No torch.

Evaluation splits are drawn first, so that asking for more distillation data does not change what
a model is judged on. One example of every label is kept for the distil split, where it is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autocomp.core.errors import DataError
from autocomp.tasks.protocol import DRAWN, Split

Indices = npt.NDArray[np.int64]
_UNCOUNTED = 8
"""One in so many of the distil split."""
_DRAWN_IN_ORDER: tuple[Split, ...] = ("report", "search", "calibrate")


def uncounted(distil: int) -> int:
    """How many of a distil split's examples, its first, a pruned vocabulary is not counted in.

    Candidates are screened on those. Were their words counted, or the further lines of their texts,
    which name the same people and places, then a pruned vocabulary would look better than it is.
    """
    return distil // _UNCOUNTED


def apportion(seats: int, weights: Sequence[int]) -> list[int]:
    """Divide `seats` in proportion to `weights` by largest remainder; no share exceeds its weight.

    `seats` must not exceed the sum of the weights. Ties go to the earlier entry.
    """
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    shares = [seats * weight // total for weight in weights]
    remainders = [seats * weight % total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: seats - sum(shares)]:
        shares[i] += 1
    return shares


def split_indices(
    count: int,
    sizes: Mapping[Split, int],
    *,
    seed: int,
    labels: npt.NDArray[Any] | None = None,
    label_names: Sequence[str] = (),
    origin: str = "the data",
    unit: str = "examples",
) -> dict[Split, Indices]:
    """Disjoint positions of `count` examples for each split, each split shuffled.

    With `labels` (int64 `(count,)`) every split has the labels in proportion.

    Raises:
        DataError: if there are too few examples, or a label would occur only in evaluation splits.
    """
    asked = sum(sizes[name] for name in DRAWN)
    if asked > count:
        parts = " + ".join(f"{name} {sizes[name]}" for name in DRAWN)
        raise DataError(
            f"{origin} has {count} {unit}, but task.data asks for {parts} = {asked}. "
            f"Lower these sizes or give more data"
        )
    generator = np.random.default_rng(seed)
    if labels is None:
        labels = np.zeros(count, dtype=np.int64)
    present = [int(value) for value in np.unique(labels)]
    pools = [generator.permutation(np.flatnonzero(labels == value)) for value in present]
    reserve = 1 if sizes["distil"] >= len(present) else 0
    splits: dict[Split, Indices] = {}
    for name in _DRAWN_IN_ORDER:
        shares = apportion(sizes[name], [len(pool) - reserve for pool in pools])
        splits[name] = _draw(pools, shares, generator)
    shares = apportion(sizes["distil"], [len(pool) for pool in pools])
    if reserve:
        _leave_none_empty(shares)
    splits["distil"] = _draw(pools, shares, generator)
    _check_labels(splits, labels, label_names, origin)
    return {name: splits[name] for name in DRAWN}


def _draw(pools: list[Indices], shares: Sequence[int], generator: np.random.Generator) -> Indices:
    """Take `shares[i]` from the front of each pool; the pools shrink."""
    drawn = [pool[:share] for pool, share in zip(pools, shares, strict=True)]
    pools[:] = [pool[share:] for pool, share in zip(pools, shares, strict=True)]
    return generator.permutation(np.concatenate(drawn))


def _leave_none_empty(shares: list[int]) -> None:
    """Move a seat from the largest share to each empty one."""
    for i, share in enumerate(shares):
        if share == 0:
            shares[shares.index(max(shares))] -= 1
            shares[i] = 1


def _check_labels(
    splits: Mapping[Split, Indices],
    labels: npt.NDArray[Any],
    label_names: Sequence[str],
    origin: str,
) -> None:
    learnt = set(labels[splits["distil"]].tolist())
    for name in ("search", "report"):
        unseen = sorted(set(labels[splits[name]].tolist()) - learnt)
        if unseen:
            shown = ", ".join(repr(label_names[i]) if label_names else str(i) for i in unseen[:5])
            more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
            raise DataError(
                f"{origin}: label {shown}{more} occurs in the {name} split but never in distil, "
                f"where it would be learnt. Raise task.data.distil (at least one example a label) "
                f"or remove the label"
            )
