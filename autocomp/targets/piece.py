"""What a recipe gives: a few ONNX nodes and constants that stand for one site."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx


@dataclass
class Piece:
    """Nodes and initializers that stand for one site."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
