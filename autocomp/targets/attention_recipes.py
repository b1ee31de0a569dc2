"""Attention and rotary embeddings as ONNX Runtime's own operators."""

from __future__ import annotations

import onnx
from onnx import helper

from autocomp.targets.graph import attribute
from autocomp.targets.storage import Piece


def lower_attention(node: onnx.NodeProto, heads: int, kv_heads: int) -> Piece:
    """ONNX Attention, `(B, T, H·D)` in and out; `(B, H, T, D)` where heads were split before it.

    A cache, where the marker has one, passes through: see `cache`.
    """
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
