"""Mixers in library items and stored students: packed as tensors and plain values, and unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from autocomp.models.mixers.protocol import MixerShape
from autocomp.operators.protocol import MixerState

_PARAMETER = "mixer."


def pack_mixer(mixer: MixerState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name, and the rest as plain values; inverse of `unpack_mixer`."""
    tensors = {
        f"{_PARAMETER}{name}": tensor.detach().contiguous()
        for name, tensor in mixer.parameters.items()
    }
    return tensors, {"name": mixer.name, "shape": asdict(mixer.shape)}


def unpack_mixer(
    about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], prefix: str
) -> MixerState:
    """The mixer whose tensors' names begin with `prefix`."""
    parameter = f"{prefix}{_PARAMETER}"
    return MixerState(
        name=about["name"],
        shape=MixerShape(**about["shape"]),
        parameters={
            name.removeprefix(parameter): tensor
            for name, tensor in tensors.items()
            if name.startswith(parameter)
        },
    )
