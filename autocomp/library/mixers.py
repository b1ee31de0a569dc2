"""Mixers in library items and stored students: packed as tensors and plain values, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from autocomp.models.mixers.protocol import MixerShape
from autocomp.operators.protocol import MixerState, SiteStats, UnitState

_PARAMETER, _STATISTIC = "mixer.", "mixer-stats."
_STATISTICS = ("gram", "mean", "low", "high", "sample")


def pack_mixer(mixer: MixerState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name, and the rest as plain values; inverse of `unpack_mixer`."""
    tensors = {
        f"{_PARAMETER}{name}": tensor.detach().contiguous()
        for name, tensor in mixer.parameters.items()
    }
    about: dict[str, Any] = {
        "name": mixer.name,
        "shape": asdict(mixer.shape),
        "training": dict(mixer.training),
    }
    if mixer.stats is not None:
        about["count"] = mixer.stats.count
        for part in _STATISTICS:
            value = getattr(mixer.stats, part)
            if value is not None:
                tensors[f"{_STATISTIC}{part}"] = value.contiguous()
    return tensors, about


def unpack_mixer(
    about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], prefix: str
) -> MixerState:
    """The mixer whose tensors' names begin with `prefix`."""
    parameter, statistic = f"{prefix}{_PARAMETER}", f"{prefix}{_STATISTIC}"
    stats = None
    if "count" in about:
        parts = {part: tensors.get(f"{statistic}{part}") for part in _STATISTICS}
        stats = SiteStats(count=about["count"], **parts)  # type: ignore[arg-type]
    return MixerState(
        name=about["name"],
        shape=MixerShape(**about["shape"]),
        parameters={
            name.removeprefix(parameter): tensor
            for name, tensor in tensors.items()
            if name.startswith(parameter)
        },
        stats=stats,
        training=about["training"],
    )


def without_stats(state: UnitState) -> UnitState:
    """The state as it is stored where no later step is to be built on it."""
    return {
        name: site if site.mixer is None else replace(site, mixer=replace(site.mixer, stats=None))
        for name, site in state.items()
    }
