"""The key-value cache of a graph that decodes: an input and an output per attention. No torch.

    past_key_values.N.key, .value   (B, kv heads of layer N, P, D): what earlier runs left
    present.N.key, .value           (B, kv heads of layer N, P + T, D)

One graph serves prompt (P = 0) and generation (T = 1); N is the layer's number in the dense model,
and a layer without attention has none of the four. Positions are counted by any of the caches;
where none is left, by `past_length` and `present_length`, int64 `(1,)`.

The attention is the standard operator `Attention` with a past: it concatenates, masks causally from
position P on and shares keys among queries. Measured in ONNX Runtime 1.31 on one core, both rotary
embeddings included, T = 1 after 144 tokens, µs (6 heads of 32 on 2 groups / 12 of 64 on 4):
Attention 21.6 / 61, the same decomposed 23.3 / 61, com.microsoft GroupQueryAttention 28.0 / 74,
with its own rotary 26.4 / 79; 128 tokens at once: 281 / 751 against 392 / 893. GroupQueryAttention
also refuses more than one token after a past when the batch is more than one, and
MultiHeadAttention knows no groups. A cache of int8 is read by GroupQueryAttention alone; its
restriction then holds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import onnx
from onnx import TensorProto, helper

from autocomp.core.errors import InternalError
from autocomp.targets.generation import (
    PAST,
    PAST_LENGTH,
    PAST_STATE,
    PRESENT,
    PRESENT_LENGTH,
)
from autocomp.targets.graph import Graph, attribute
from autocomp.targets.skeleton_format import DOMAIN

PARTS = ("key", "value")
STAND_IN = "past"
"""The input whose second axis stands for the tokens in the cache while torch exports."""


def add_cache(graph: Graph) -> None:
    """Give every attention marker of a fresh skeleton its cache; the stand-in is removed.

    Raises:
        InternalError: if an attention is not causal, or the stand-in serves for more than a length.
    """
    markers = _markers(graph)
    for node in markers:
        layer, head_dim = int(attribute(node, "layer", -1)), int(attribute(node, "head_dim"))
        if layer < 0 or not attribute(node, "causal"):
            raise InternalError(f"{node.name}: only causal attention with a layer number decodes")
        node.input.extend([""] * (4 - len(node.input)))
        for part in PARTS:
            past, present = f"{PAST}{layer}.{part}", f"{PRESENT}{layer}.{part}"
            node.input.append(past)
            node.output.append(present)
            shapes = ["batch", None, "past", head_dim], ["batch", None, "total", head_dim]
            graph.input_infos.append(
                helper.make_tensor_value_info(past, TensorProto.FLOAT, shapes[0])
            )
            graph.output_infos.append(
                helper.make_tensor_value_info(present, TensorProto.FLOAT, shapes[1])
            )
    graph.input_infos = [value for value in graph.input_infos if value.name != STAND_IN]
    for node in graph.users(STAND_IN):
        if node.op_type != "Shape" or attribute(node, "start") != 1:
            raise InternalError(f"{node.op_type} reads the past itself instead of its length")
        _read_length(node, f"{PAST}{attribute(markers[0], 'layer')}.key")


def drop_dead_caches(graph: Graph) -> None:
    """Forget outputs of attentions that the first output, the logits, does not depend on."""
    logits = graph.output_infos[0].name
    needed = {logits}
    for node in reversed(graph.nodes):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            needed.update(node.output)
    graph.output_infos = [value for value in graph.output_infos if value.name in needed]


def settle_cache(
    graph: Graph,
    kv_heads: Callable[[onnx.NodeProto], int],
    rounded: Callable[[onnx.NodeProto], bool] = lambda node: False,
) -> None:
    """Fix shapes and types of the caches that are left after pruning; drop the inputs of others.

    Args:
        kv_heads: of an attention marker.
        rounded: whether its cache is int8.

    Caches, then states, in the order of the outputs that go on with them.
    Where no attention is left and positions are needed, a counter of its own gives them.
    """
    heads: dict[str, int] = {}
    integers: set[str] = set()
    for node in _markers(graph):
        names = (*node.input[4:], *node.output[1:])
        heads.update(dict.fromkeys(names, kv_heads(node)))
        integers.update(names if rounded(node) else ())
    kept = [v for v in graph.input_infos if not v.name.startswith((PAST, PAST_STATE))]
    states = [v for v in graph.input_infos if v.name.startswith(PAST_STATE)]
    left = [value for value in graph.input_infos if value.name in heads]
    for index, node in enumerate(graph.nodes):
        if node.op_type == "Shape" and node.input[0].startswith(PAST):
            if not left:
                graph.nodes[index] = helper.make_node("Identity", [PAST_LENGTH], node.output)
            elif node.input[0] not in heads:
                graph.nodes[index] = onnx.NodeProto()
                graph.nodes[index].CopyFrom(node)
                _read_length(graph.nodes[index], left[0].name)
    graph.input_infos = [*kept, *(_settled(value, heads, integers) for value in left), *states]
    graph.output_infos = [_settled(value, heads, integers) for value in graph.output_infos]
    if graph.users(PAST_LENGTH):
        _count_tokens(graph)


def _count_tokens(graph: Graph) -> None:
    """Keep the number of tokens so far, `(1,)`, as an input and an output of the graph."""
    read = f"{PAST_LENGTH}.read"
    graph.nodes += [
        helper.make_node("Shape", [graph.inputs[0]], [read], start=1, end=2),
        helper.make_node("Add", [PAST_LENGTH, read], [PRESENT_LENGTH]),
    ]
    for infos, name in (
        (graph.input_infos, PAST_LENGTH),
        (graph.output_infos, PRESENT_LENGTH),
    ):
        infos.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))


def _markers(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes if node.domain == DOMAIN and node.op_type == "Attention"]


def _read_length(node: onnx.NodeProto, cache: str) -> None:
    """Make a Shape node give the number of tokens in a cache."""
    node.input[0] = cache
    del node.attribute[:]
    node.attribute.extend([helper.make_attribute("start", 2), helper.make_attribute("end", 3)])


def _settled(
    value: onnx.ValueInfoProto, heads: Mapping[str, int], integers: Container[str]
) -> onnx.ValueInfoProto:
    if value.name not in heads:
        return value
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.type.tensor_type.shape.dim[1].dim_value = heads[value.name]
    if value.name in integers:
        copy.type.tensor_type.elem_type = TensorProto.INT8
    return copy
