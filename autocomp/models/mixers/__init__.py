"""Replacements of softmax attention: one file each. See `protocol` for how to add one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.registry import Registry

if TYPE_CHECKING:
    from autocomp.models.mixers.protocol import Mixer

MIXERS: Registry[type[Mixer]] = Registry(
    "mixers",
    {
        "convolution": "autocomp.models.mixers.convolution:Convolution",
        "elu": "autocomp.models.mixers.linear_attention:EluLinearAttention",
        "fourier": "autocomp.models.mixers.fourier:Fourier",
        "hedgehog": "autocomp.models.mixers.linear_attention:HedgehogAttention",
        "mamba2": "autocomp.models.mixers.mamba2:Mamba2",
        "pooling": "autocomp.models.mixers.pooling:Pooling",
        "retention": "autocomp.models.mixers.retention:Retention",
        "rwkv6": "autocomp.models.mixers.rwkv6:RWKV6",
        "window": "autocomp.models.mixers.window:SlidingWindow",
        "window2d": "autocomp.models.mixers.window2d:Window2d",
    },
)
