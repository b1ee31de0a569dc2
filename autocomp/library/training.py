"""How units were trained, in library items: packed as tensors and plain values, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from autocomp.operators.protocol import LocalTraining, SiteStats, UnitState

_STATISTIC = "trained-stats."
_STATISTICS = ("gram", "mean", "low", "high", "sample")


def pack_training(training: LocalTraining) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name, and the rest as plain values; inverse of `unpack_training`."""
    about: dict[str, Any] = {"report": dict(training.report)}
    tensors: dict[str, torch.Tensor] = {}
    if training.stats is not None:
        about["count"] = training.stats.count
        for part in _STATISTICS:
            value = getattr(training.stats, part)
            if value is not None:
                tensors[f"{_STATISTIC}{part}"] = value.contiguous()
    return tensors, about


def unpack_training(
    about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], prefix: str
) -> LocalTraining:
    """What is said by `about` and by the tensors whose names begin with `prefix`."""
    stats = None
    if "count" in about:
        parts = {part: tensors.get(f"{prefix}{_STATISTIC}{part}") for part in _STATISTICS}
        stats = SiteStats(count=about["count"], **parts)  # type: ignore[arg-type]
    return LocalTraining(about["report"], stats)


def without_stats(state: UnitState) -> UnitState:
    """The state as it is stored where no later step is to be built on it."""
    return {
        name: site
        if site.training is None
        else replace(site, training=replace(site.training, stats=None))
        for name, site in state.items()
    }
