"""What a recipe gives: a few ONNX nodes and constants that stand for one site.

Also packs 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from autocomp.targets.weights import Array


@dataclass
class Piece:
    """Nodes and initializers that stand for one site.

    Also packs 4-bit codes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)


def pack_nibbles(values: Array) -> Array:
    """Pairs along the last axis in one byte, the first in the low half; odd ends padded by 0."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Array = (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)
    return packed
