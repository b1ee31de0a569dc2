"""The anchor of `anchor` in OpenVINO's terms: the same blocks, activations in a fixed range."""

from __future__ import annotations

import numpy as np
import onnx

from autocomp.core.unit import SiteFormat
from autocomp.targets import openvino_recipes as recipes
from autocomp.targets.anchor import ROWS, Linear, anchor_graph
from autocomp.targets.openvino_pieces import OpenVinoInputs
from autocomp.targets.weights import SiteWeights


def anchor_model() -> onnx.ModelProto:
    """The anchor, identical on every call. Input `x` float32 `(32, 384)`, output `y` alike."""
    rng = np.random.default_rng(20240229)

    def linear(kind: str, x: str, rows: int, columns: int, output: str) -> Linear:
        if kind == "float":
            weight = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
            weights = SiteWeights(SiteFormat(rows, columns, False), weight=weight)
        else:
            spec = SiteFormat(rows, columns, False, weight_bits=8, activation_bits=8)
            codes = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
            scales = np.full((rows, 1), 0.05 / 64, np.float32)
            weights = SiteWeights(spec, codes=codes, scales=scales)
        piece = recipes.lower_linear(output, weights, x, output, ROWS, OpenVinoInputs())
        return piece.nodes, piece.initializers

    return anchor_graph(linear, recipes.OPSETS)
