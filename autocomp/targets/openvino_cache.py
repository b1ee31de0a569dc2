"""A key-value cache of int8 in OpenVINO: attention on steps, scales around it.

The plugin rounds caches itself only inside stateful models; here they are inputs and outputs, and
its QuantizeLinear takes one scale a tensor. So the product is taken of whole steps: queries are
multiplied by the scales of the keys, what comes out by those of the values, each a product of one
token, and what is cached is only cast.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from autocomp.core.errors import InternalError
from autocomp.targets.attention_recipes import lower_attention
from autocomp.targets.graph import attribute
from autocomp.targets.openvino_pieces import Writer
from autocomp.targets.storage import Piece
from autocomp.targets.weights import Array


def lower_rounded(
    node: onnx.NodeProto, heads: int, kv_heads: int, cache_scales: tuple[Array, Array]
) -> Piece:
    """The attention product of a marker whose cache is int8.

    Raises:
        InternalError: where heads are split before attention.
    """
    if not attribute(node, "flat"):
        raise InternalError(f"{node.output[0]}: heads are split before a cache of int8")
    head_dim, output = int(attribute(node, "head_dim")), node.output[0]
    writer = Writer(output)
    low, high = (writer.constant(n, np.float32(v)) for n, v in (("low", -128), ("high", 127)))
    split = writer.shape("split", 0, 0, kv_heads, head_dim)
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    for part, index, scale in zip(("keys", "values"), (1, 2), cache_scales, strict=True):
        inverse = writer.constant(f"{part}.inverse", (1 / scale).astype(np.float32))
        steps = writer.node("Round", [writer.node("Mul", [node.input[index], inverse])])
        steps = writer.node("Clip", [steps, low, high])
        codes = writer.node("Cast", [steps], to=TensorProto.INT8)
        codes = writer.node("Reshape", [codes, split])
        codes = writer.node("Transpose", [codes], perm=[0, 2, 1, 3])
        past = node.input[3 + index]
        writer.node("Concat", [past, codes], node.output[index], axis=2)
        inner.input[index] = steps
        inner.input[3 + index] = writer.node("Cast", [past], to=TensorProto.FLOAT)
    spread = [_for_queries(scale, heads, kv_heads) for scale in cache_scales]
    keys = writer.constant("keys.scale", spread[0])
    inner.input[0] = writer.node("Mul", [node.input[0], keys])
    product = f"{output}.steps"
    del inner.output[:]
    inner.output.extend([product, f"{output}.key", f"{output}.value"])
    piece = writer.piece
    piece.nodes += lower_attention(inner, heads, kv_heads).nodes
    values = writer.constant("values.scale", spread[1])
    piece.nodes.append(helper.make_node("Mul", [product, values], [output]))
    return piece


def _for_queries(scale: Array, heads: int, kv_heads: int) -> Array:
    """Scales of the channels of keys, for the channels of the queries that read them."""
    by_head = scale.reshape(kv_heads, -1)
    repeated: Array = np.repeat(by_head, heads // kv_heads, axis=0).reshape(-1)
    return repeated.astype(np.float32)
