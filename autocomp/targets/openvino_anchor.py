"""The anchor of `anchor` in OpenVINO's terms: the same blocks, activations in a fixed range."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets import openvino_recipes as recipes
from autocomp.targets.anchor import BLOCKS, INNER, ROWS, WIDTH
from autocomp.targets.openvino_pieces import OpenVinoInputs
from autocomp.targets.weights import SiteWeights


def anchor_model() -> onnx.ModelProto:
    """The anchor, identical on every call. Input `x` float32 `(32, 384)`, output `y` alike."""
    rng = np.random.default_rng(20240229)
    nodes: list[onnx.NodeProto] = []
    constants = [numpy_helper.from_array(np.ones(WIDTH, np.float32), "gain")]

    def linear(kind: str, x: str, rows: int, columns: int, output: str) -> str:
        if kind == "float":
            weight = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
            weights = SiteWeights(SiteFormat(rows, columns, False), weight=weight)
        else:
            spec = SiteFormat(rows, columns, False, weight_bits=8, activation_bits=8)
            codes = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
            scales = np.full((rows, 1), 0.05 / 64, np.float32)
            weights = SiteWeights(spec, codes=codes, scales=scales)
        piece = recipes.lower_linear(output, weights, x, output, ROWS, OpenVinoInputs())
        nodes.extend(piece.nodes)
        constants.extend(piece.initializers)
        return output

    x = "x"
    for index, kind in enumerate(BLOCKS):
        hidden = linear(kind, x, INNER, WIDTH, f"up{index}")
        nodes.append(helper.make_node("Relu", [hidden], [f"relu{index}"]))
        down = linear(kind, f"relu{index}", WIDTH, INNER, f"down{index}")
        nodes.append(helper.make_node("Add", [down, x], [f"sum{index}"]))
        x = "y" if index == len(BLOCKS) - 1 else f"norm{index}"
        norm = helper.make_node("LayerNormalization", [f"sum{index}", "gain"], [x], axis=-1)
        nodes.append(norm)
    shape = [ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "anchor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    opset = [helper.make_opsetid(*item) for item in recipes.OPSETS.items()]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)
