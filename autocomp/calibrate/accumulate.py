"""Gram matrices and values: hooks on the sites of a unit, real tokens only, shared inputs once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.calibrate.stats import GATHERED, Need, SiteStats
from autocomp.calibrate.values import Values
from autocomp.core.errors import ModelError


class _Sum:
    """Running Σ x xᵀ, Σ x, the number of rows, and what values they held: what of it is needed."""

    def __init__(self, columns: int, needs: Collection[Need]) -> None:
        summed = columns if "gram" in needs else 0
        self.gram = torch.zeros(summed, summed)
        self.total = torch.zeros(summed, dtype=torch.float64)
        self.count = 0
        self.values = Values(columns) if "range" in needs else None

    def add(self, rows: Tensor) -> None:
        """`rows (N, columns)`."""
        rows = rows.float()
        self.count += rows.shape[0]
        if len(self.total):
            self.gram.addmm_(rows.t(), rows)
            self.total += rows.sum(dim=0, dtype=torch.float64)
        if self.values is not None:
            self.values.add(rows)

    def stats(self) -> SiteStats:
        mean = (self.total / max(self.count, 1)).float()
        if self.values is None:
            return SiteStats(gram=self.gram, mean=mean, count=self.count)
        return SiteStats(
            gram=self.gram,
            mean=mean,
            count=self.count,
            low=self.values.low,
            high=self.values.high,
            sample=self.values.sample,
        )

    @property
    def finite(self) -> bool:
        """Whether everything that was seen is; NaN and infinity show in either part."""
        seen = [self.gram.diagonal()]
        if self.values is not None:
            seen += [self.values.low, self.values.high]
        return all(bool(torch.isfinite(part).all()) for part in seen)


class Accumulator:
    """Collects the statistics of some sites of a model while it runs.

    Sites that are called with the very same tensor, and need the same of it, share one sum. Use as

        with accumulator.watching(mask):
            block(hidden)
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        needs: Mapping[str, Collection[Need]] | None = None,
    ) -> None:
        """`modules`: site name → linear layer; `needs`: site name → parts, all where not named."""
        self._modules = modules
        self._needs = {name: frozenset((needs or {}).get(name, GATHERED)) for name in modules}
        self._sums: dict[str, _Sum] = {}
        self._leaders: dict[str, str] = {}

    @contextmanager
    def watching(self, mask: Tensor | None) -> Iterator[None]:
        """Add what the sites see meanwhile; `mask (B, T)` is True at real tokens."""
        seen: list[tuple[str, Tensor]] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs["input"]
                leader = self._leaders.get(name)
                if leader is None:
                    alike = [other for other, tensor in seen if _same(tensor, x)]
                    needed = self._needs[name]
                    leader = next((o for o in alike if self._needs[o] == needed), name)
                    self._leaders[name] = leader
                seen.append((name, x))
                if leader == name:
                    rows = real_rows(x, mask)
                    if name not in self._sums:
                        self._sums[name] = _Sum(x.shape[-1], self._needs[name])
                    self._sums[name].add(rows)

            return hook

        handles = [
            module.register_forward_pre_hook(watch(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def stats(self, sites: Sequence[str]) -> dict[str, SiteStats]:
        """Statistics of these sites; those with a shared input share the object.

        Raises:
            ModelError: if a site was never called, or saw values that are not finite.
        """
        result: dict[str, SiteStats] = {}
        made: dict[str, SiteStats] = {}
        for name in sites:
            leader = self._leaders.get(name)
            if leader is None or self._sums[leader].count == 0:
                raise ModelError(
                    f"{name} saw no input during calibration: the calibration examples are empty, "
                    f"or this layer takes no part in the model's forward pass"
                )
            if leader not in made:
                made[leader] = self._sums[leader].stats()
                if not self._sums[leader].finite:
                    raise ModelError(
                        f"the input of {name} is not finite on the calibration examples: the model "
                        f"overflows or its weights hold NaN"
                    )
            result[name] = made[leader]
        return result


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two live tensors are the same memory, read the same way, not written in between."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one._version == other._version
    )


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`(..., columns)` → `(N, columns)`; padding dropped where `x` has one row per token."""
    x = x.detach()
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
