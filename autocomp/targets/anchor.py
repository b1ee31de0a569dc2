"""The anchor: a small fixed graph run between a model's runs, so that a busy machine cancels out.

Four feed-forward blocks with norms on 32 × 384, the first in float32, three in dynamic int8, in
all about a millisecond and a half: the kernels and the cache footprint of a small compressed
transformer. (Float and integer kernels suffer differently from a neighbour.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, INNER = 32, 384, 1536
BLOCKS = ("float", "int8", "int8", "int8")

Linear = tuple[list[onnx.NodeProto], list[TensorProto]]
"""Nodes and constants of one linear."""


def anchor_model() -> onnx.ModelProto:
    """The anchor, identical on every call. Input `x` float32 `(32, 384)`, output `y` alike."""
    rng = np.random.default_rng(20240229)

    def linear(kind: str, x: str, rows: int, columns: int, output: str) -> Linear:
        if kind == "float":
            weight = (rng.standard_normal((columns, rows)) * 0.05).astype(np.float32)
            constants = [numpy_helper.from_array(weight, f"{output}.weight")]
            return [helper.make_node("MatMul", [x, f"{output}.weight"], [output])], constants
        codes = rng.integers(-127, 128, (columns, rows), dtype=np.int8)
        scales = np.full(rows, 0.05 / 64, np.float32)
        constants = [
            numpy_helper.from_array(codes, f"{output}.codes"),
            numpy_helper.from_array(scales, f"{output}.scales"),
        ]
        inputs = [x, *(constant.name for constant in constants)]
        domain = "com.microsoft"
        node = helper.make_node("DynamicQuantizeMatMul", inputs, [output], domain=domain)
        return [node], constants

    return anchor_graph(linear, {"": 20, "com.microsoft": 1})


def anchor_graph(
    linear: Callable[[str, str, int, int, str], Linear], opsets: Mapping[str, int]
) -> onnx.ModelProto:
    """The blocks around a runtime's own linears.

    Args:
        linear: called with a kind of `BLOCKS`, the name of the input, rows, columns and the name
            of the output; gives nodes and constants.
        opsets: domain → version.
    """
    nodes: list[onnx.NodeProto] = []
    constants = [numpy_helper.from_array(np.ones(WIDTH, np.float32), "gain")]

    def add(kind: str, x: str, rows: int, columns: int, output: str) -> None:
        made, values = linear(kind, x, rows, columns, output)
        nodes.extend(made)
        constants.extend(values)

    x = "x"
    for index, kind in enumerate(BLOCKS):
        add(kind, x, INNER, WIDTH, f"up{index}")
        nodes.append(helper.make_node("Relu", [f"up{index}"], [f"relu{index}"]))
        add(kind, f"relu{index}", WIDTH, INNER, f"down{index}")
        nodes.append(helper.make_node("Add", [f"down{index}", x], [f"sum{index}"]))
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
    opset = [helper.make_opsetid(*item) for item in opsets.items()]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def anchor_inputs() -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The input the anchor is run on."""
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return {"x": x}
