"""The anchor: a small fixed graph run between a model's runs, so that a busy machine cancels out.

Four feed-forward blocks with norms on 32 × 384, the first in float32, three in dynamic int8, in
all about a millisecond and a half: the kernels and the cache footprint of a small compressed
transformer. (Float and integer kernels suffer differently from a neighbour.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, INNER = 32, 384, 1536
BLOCKS = ("float", "int8", "int8", "int8")


def anchor_model() -> onnx.ModelProto:
    """The anchor, identical on every call. Input `x` float32 `(32, 384)`, output `y` alike."""
    rng = np.random.default_rng(20240229)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray[Any, np.dtype[Any]]) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    def linear(kind: str, x: str, rows: int, columns: int, output: str) -> str:
        if kind == "float":
            weight = (rng.standard_normal((columns, rows)) * 0.05).astype(np.float32)
            inputs = [x, constant(f"{output}.weight", weight)]
            nodes.append(helper.make_node("MatMul", inputs, [output]))
        else:
            codes = rng.integers(-127, 128, (columns, rows), dtype=np.int8)
            scales = np.full(rows, 0.05 / 64, np.float32)
            inputs = [x, constant(f"{output}.codes", codes), constant(f"{output}.scales", scales)]
            domain = "com.microsoft"
            nodes.append(helper.make_node("DynamicQuantizeMatMul", inputs, [output], domain=domain))
        return output

    x = "x"
    gain = constant("gain", np.ones(WIDTH, np.float32))
    for index, kind in enumerate(BLOCKS):
        hidden = linear(kind, x, INNER, WIDTH, f"up{index}")
        nodes.append(helper.make_node("Relu", [hidden], [f"relu{index}"]))
        down = linear(kind, f"relu{index}", WIDTH, INNER, f"down{index}")
        nodes.append(helper.make_node("Add", [down, x], [f"sum{index}"]))
        x = "y" if index == len(BLOCKS) - 1 else f"norm{index}"
        norm = helper.make_node("LayerNormalization", [f"sum{index}", gain], [x], axis=-1)
        nodes.append(norm)
    shape = [ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "anchor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def anchor_inputs() -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The input the anchor is run on."""
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return {"x": x}
