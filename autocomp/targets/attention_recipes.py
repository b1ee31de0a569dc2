"""Attention and rotary embeddings as ONNX Runtime's own operators."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.targets.graph import attribute
from autocomp.targets.storage import Piece
from autocomp.targets.weights import Array

MICROSOFT = "com.microsoft"
"""Operator domain of ONNX Runtime's own operators."""


def lower_attention(
    node: onnx.NodeProto,
    heads: int,
    kv_heads: int,
    cache_scales: tuple[Array, Array] | None = None,
) -> Piece:
    """ONNX Attention, `(B, T, H·D)` in and out; `(B, H, T, D)` where heads were split before it.

    A cache, where the marker has one, passes through: see `cache`.
    """
    if cache_scales is not None:
        return _rounded_cache(node, heads, kv_heads, cache_scales)
    attributes = {"scale": attribute(node, "scale"), "is_causal": attribute(node, "causal")}
    if attribute(node, "flat"):
        attributes["q_num_heads"] = heads
        attributes["kv_num_heads"] = kv_heads
        inputs, outputs = list(node.input), list(node.output)
        return Piece([helper.make_node("Attention", inputs, outputs, **attributes)])
    output, present = node.output[0], node.output[1:]
    split, turned, shape = f"{output}.heads", f"{output}.turned", f"{output}.shape"
    return Piece(
        [
            helper.make_node("Attention", list(node.input), [split, *present], **attributes),
            helper.make_node("Transpose", [split], [turned], perm=[0, 2, 1, 3]),
            helper.make_node("Constant", [], [shape], value_ints=[0, 0, -1]),
            helper.make_node("Reshape", [turned, shape], [output]),
        ]
    )


def _rounded_cache(
    node: onnx.NodeProto, heads: int, kv_heads: int, scales: tuple[Array, Array]
) -> Piece:
    """GroupQueryAttention: it alone reads and writes a cache of int8, in a scale per channel.

    It wants to know how many tokens there will be, in total and, less one, for each example.

    Raises:
        InternalError: where heads are split before attention.
    """
    if not attribute(node, "flat"):
        raise InternalError(f"{node.output[0]}: heads are split before a cache of int8")
    query, key, value, _, past_key, past_value = node.input
    name = node.output[0]
    one, parts = f"{name}.one", [f"{name}.{part}" for part in ("keys", "values")]
    nodes = [
        helper.make_node("Shape", [past_key], [f"{name}.past"], start=2, end=3),
        helper.make_node("Shape", [key], [f"{name}.new"], start=1, end=2),
        helper.make_node("Shape", [key], [f"{name}.batch"], start=0, end=1),
        helper.make_node("Add", [f"{name}.past", f"{name}.new"], [f"{name}.both"]),
        helper.make_node("Cast", [f"{name}.both"], [f"{name}.sum"], to=TensorProto.INT32),
        helper.make_node("Squeeze", [f"{name}.sum"], [f"{name}.total"]),
        helper.make_node("Sub", [f"{name}.sum", one], [f"{name}.last"]),
        helper.make_node("Expand", [f"{name}.last", f"{name}.batch"], [f"{name}.lasts"]),
        helper.make_node(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, f"{name}.lasts", f"{name}.total"]
            + [""] * 5
            + parts,
            list(node.output),
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=attribute(node, "scale"),
            kv_cache_bit_width=8,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
        ),
    ]
    constants = [numpy_helper.from_array(np.ones(1, np.int32), one)]
    for part, scale in zip(parts, scales, strict=True):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(scale), part))
    return Piece(nodes, constants)


def lower_rotary(node: onnx.NodeProto, heads: int) -> Piece:
    """RotaryEmbedding on `(B, T, H·D)`."""
    interleaved = attribute(node, "interleaved")
    return Piece(
        [
            helper.make_node(
                "RotaryEmbedding",
                list(node.input),
                list(node.output),
                interleaved=interleaved,
                num_heads=heads,
            )
        ]
    )
