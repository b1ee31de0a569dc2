"""The anchor: a small fixed graph run between a model's runs, so that a busy machine cancels out.

Two feed-forward blocks with norms on 32 × 384, float32, about a millisecond and a half: the same
kernels and about the cache footprint of a small transformer.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, INNER, BLOCKS = 32, 384, 1536, 2


def anchor_model() -> onnx.ModelProto:
    """The anchor, identical on every call. Input `x` float32 `(32, 384)`, output `y` alike."""
    rng = np.random.default_rng(20240229)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        return numpy_helper.from_array(values, name)

    nodes, constants, x = [], [], "x"
    for block in range(BLOCKS):
        up, down, gain = f"up{block}", f"down{block}", f"gain{block}"
        constants += [
            constant(up, WIDTH, INNER),
            constant(down, INNER, WIDTH),
            constant(gain, WIDTH),
        ]
        out = "y" if block == BLOCKS - 1 else f"x{block}"
        nodes += [
            helper.make_node("MatMul", [x, up], [f"h{block}"]),
            helper.make_node("Relu", [f"h{block}"], [f"r{block}"]),
            helper.make_node("MatMul", [f"r{block}", down], [f"d{block}"]),
            helper.make_node("Add", [f"d{block}", x], [f"s{block}"]),
            helper.make_node("LayerNormalization", [f"s{block}", gain], [out], axis=-1),
        ]
        x = out
    shape = [ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "anchor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def anchor_inputs() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """The input the anchor is run on."""
    x = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    return {"x": x}
