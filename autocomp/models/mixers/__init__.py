"""Replacements of softmax attention: one file each. See `protocol` for how to add one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.registry import Registry

if TYPE_CHECKING:
    from autocomp.models.mixers.protocol import Mixer

MIXERS: Registry[type[Mixer]] = Registry(
    "mixers",
    {
        "elu": "autocomp.models.mixers.linear_attention:EluLinearAttention",
    },
)
