"""Four disjoint, seeded splits, stratified by label. No torch.

Evaluation splits are drawn first, so that asking for more distillation data does not change what
a model is judged on. One example of every label is kept for the distil split, where it is learnt.
Examples that belong together (passages of a document, pictures of a patient) can be kept in one
split, and evaluation splits can be drawn from examples of their own.
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
LEARNT: tuple[Split, ...] = ("calibrate", "distil")
JUDGED: tuple[Split, ...] = ("search", "report")
"""What models are judged on, which may be held out."""
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
    groups: Sequence[Any] | None = None,
    held_out: int | None = None,
    label_names: Sequence[str] = (),
    origin: str = "the data",
    unit: str = "examples",
) -> dict[Split, Indices]:
    """Disjoint positions of `count` examples for each split, each split shuffled.

    Args:
        labels: int64 `(count,)`; every split has them in proportion.
        groups: `(count,)`; examples of one group are in one split, or in none.
        held_out: the search and the report split are drawn from so many examples at the end, the
            others from those before; `None` where all are drawn from all.

    Raises:
        DataError: if there are too few examples, or a label would occur only in evaluation splits.
    """
    generator = np.random.default_rng(seed)
    if labels is None:
        labels = np.zeros(count, dtype=np.int64)
    learnt_from = count - (held_out or 0)
    if held_out is not None:
        _check_count(learnt_from, sizes, LEARNT, origin, unit)
        _check_count(held_out, sizes, JUDGED, origin, f"held-out {unit}")
    else:
        _check_count(count, sizes, DRAWN, origin, unit)
    large = min(sizes[name] for name in _DRAWN_IN_ORDER)
    learnt = _Pools(np.arange(learnt_from), labels, groups, large, generator)
    judged = learnt
    if held_out is not None:
        judged = _Pools(np.arange(learnt_from, count), labels, groups, large, generator)
    splits: dict[Split, Indices] = {}
    reserve = sizes["distil"] >= len(learnt)
    for name in _DRAWN_IN_ORDER:
        pools = judged if name in JUDGED else learnt
        splits[name] = pools.draw(name, sizes[name], origin, reserve=reserve and pools is learnt)
    splits["distil"] = learnt.draw("distil", sizes["distil"], origin, each=reserve)
    _check_labels(splits, labels, label_names, origin)
    return {name: splits[name] for name in DRAWN}


class _Pools:
    """Positions that are not drawn yet, by label; drawn without replacement.

    With groups a pool holds whole ones, by the label most of their examples have, and what is left
    of a group that was drawn from leaves the pool. Groups of more than `large` examples come last,
    which is in the distil split if it can be: they would fill another and lose the rest.
    """

    def __init__(
        self,
        positions: Indices,
        labels: npt.NDArray[Any],
        groups: Sequence[Any] | None,
        large: int,
        generator: np.random.Generator,
    ) -> None:
        self._generator = generator
        self._groups = groups
        if groups is None:
            self._pools = [
                generator.permutation(positions[labels[positions] == value])
                for value in np.unique(labels[positions])
            ]
            return
        members: dict[Any, list[int]] = {}
        for position in positions.tolist():
            members.setdefault(groups[position], []).append(position)
        by_label: dict[int, list[list[int]]] = {}
        for its in members.values():
            by_label.setdefault(int(np.bincount(labels[its]).argmax()), []).append(its)
        self._pools = []
        for value in sorted(by_label):
            order = generator.permutation(len(by_label[value]))
            whole = sorted((by_label[value][at] for at in order), key=lambda its: len(its) > large)
            self._pools.append(np.concatenate(whole))

    def __len__(self) -> int:
        return len(self._pools)

    def draw(
        self, split: Split, size: int, origin: str, *, reserve: bool = False, each: bool = False
    ) -> Indices:
        """So many positions, the labels in proportion.

        Args:
            reserve: leave an example of every label, or its group.
            each: at least one of every label.

        Raises:
            DataError: if groups that were drawn from before leave too few.
        """
        rooms = [len(pool) - (self._last(pool) if reserve else 0) for pool in self._pools]
        if size > sum(rooms):
            raise DataError(
                f"{origin}: with the examples of a group kept together, {sum(rooms)} are left for "
                f"the {split} split, but task.data.{split} asks for {size}. Lower it or another of "
                f"these sizes, or give more data"
            )
        shares = apportion(size, rooms)
        if each:
            _leave_none_empty(shares)
        drawn = [pool[:share] for pool, share in zip(self._pools, shares, strict=True)]
        self._pools = [self._rest(*both) for both in zip(self._pools, shares, strict=True)]
        return self._generator.permutation(np.concatenate(drawn))

    def _last(self, pool: Indices) -> int:
        """Examples in the last group."""
        if self._groups is None or not len(pool):
            return min(1, len(pool))
        last, groups = self._groups[pool[-1]], self._groups
        return sum(groups[position] == last for position in pool)

    def _rest(self, pool: Indices, share: int) -> Indices:
        if self._groups is not None and share:
            last = self._groups[pool[share - 1]]
            while share < len(pool) and self._groups[pool[share]] == last:
                share += 1
        return pool[share:]


def _check_count(
    count: int, sizes: Mapping[Split, int], names: Sequence[Split], origin: str, unit: str
) -> None:
    asked = sum(sizes[name] for name in names)
    if asked > count:
        parts = " + ".join(f"{name} {sizes[name]}" for name in names)
        raise DataError(
            f"{origin} has {count} {unit}, but task.data asks for {parts} = {asked}. "
            f"Lower these sizes or give more data"
        )


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
    for name in JUDGED:
        unseen = sorted(set(labels[splits[name]].tolist()) - learnt)
        if unseen:
            shown = ", ".join(repr(label_names[i]) if label_names else str(i) for i in unseen[:5])
            more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
            raise DataError(
                f"{origin}: label {shown}{more} occurs in the {name} split but never in distil, "
                f"where it would be learnt. Raise task.data.distil (at least one example a label) "
                f"or remove the label"
            )
