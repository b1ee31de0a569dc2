"""Lowering: fill a skeleton's markers with a candidate's weights in the runtime's own operators.

Skipped sites become zeros that are folded away with all that fed them; what is left of the model
outside the sites (norms, position embeddings, convolutions) is refreshed from the candidate.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.core.factors import second_of
from autocomp.targets import recipes
from autocomp.targets.factors import split_factors
from autocomp.targets.fold_scales import fold_scales
from autocomp.targets.graph import Graph, attribute, fold_zeros
from autocomp.targets.inputs import Inputs
from autocomp.targets.skeleton_format import DOMAIN, OPSET
from autocomp.targets.weights import Array, Provider, SiteWeights


def lower(
    skeleton: onnx.ModelProto,
    weights: Provider,
    *,
    tokens: int,
    parameters: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """The runtime's graph of a candidate. `skeleton` is not modified.

    Args:
        skeleton: from `export_skeleton`.
        weights: site name → weights, `None` where skipped. A site X that is there as the factors
            `X.first` and `X.second` is not asked for.
        tokens: tokens per run of the workload (batch × sequence); decides the recipes.
        parameters: values of what is outside the sites, by name; `None` keeps the skeleton's.

    Raises:
        InternalError: if shapes do not fit, or every way to the output is skipped.
    """
    graph = Graph(skeleton)
    split_factors(graph, weights)
    sites = {
        node.output[0]: str(attribute(node, "site"))
        for node in graph.nodes
        if node.domain == DOMAIN and node.op_type in ("Linear", "Embedding")
    }
    values = {site: weights(site) for site in sites.values()}
    zeros = [tensor for tensor, site in sites.items() if values[site] is None]
    graph.nodes = _live(graph, fold_zeros(graph.nodes, zeros), set(zeros))
    present: dict[str, SiteWeights] = {k: v for k, v in values.items() if v is not None}

    _refresh(graph, parameters or {})
    _fill(graph, present, tokens)
    fold_scales(graph)
    graph.prune()
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(recipes.MICROSOFT, 1)]
    return graph.to_model(opset)


def _live(graph: Graph, nodes: list[onnx.NodeProto], zeros: set[str]) -> list[onnx.NodeProto]:
    """`nodes` without what no output needs; nothing left may read a zero."""
    graph.nodes = nodes
    graph.prune()
    for node in graph.nodes:
        if any(name in zeros for name in node.output):
            site = attribute(node, "site")
            raise InternalError(
                f"site {site!r} is skipped but {node.output[0]!r} is still used: only whole "
                "sublayers whose output is added to a residual can be skipped"
            )
    return graph.nodes


def _refresh(graph: Graph, parameters: Mapping[str, Array]) -> None:
    for name, tensor in graph.initializers.items():
        value = parameters.get(name)
        if value is None:
            continue
        if list(value.shape) != list(tensor.dims):
            raise InternalError(
                f"parameter {name!r} has shape {value.shape}, the skeleton {tuple(tensor.dims)}"
            )
        graph.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)


def _fill(graph: Graph, present: Mapping[str, SiteWeights], tokens: int) -> None:
    """Replace every marker by nodes of the runtime."""
    linears = [node for node in graph.nodes if node.domain == DOMAIN and node.op_type == "Linear"]
    readers = [(node.input[0], present[str(attribute(node, "site"))]) for node in linears]
    inputs = Inputs((x, w) for x, w in readers if recipes.recipe(w.format, tokens) == "int8")
    tables: dict[int, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        if node.op_type == "Attention":
            nodes += _attention(node, present)
            continue
        if node.op_type == "RotaryEmbedding":
            nodes.append(_rotary(node, present))
            continue
        site = str(attribute(node, "site"))
        weights, x, output = present[site], node.input[0], node.output[0]
        if node.op_type == "Embedding":
            piece = recipes.lower_embedding(site, weights, x, output)
            if weights.weight is not None:
                tables[_address(weights.weight)] = f"{site}.weight"
        elif weights.weight is not None and _address(weights.weight) in tables:
            piece = _tied(site, weights, x, output, tables[_address(weights.weight)])
        else:
            piece = recipes.lower_linear(site, weights, x, output, tokens, inputs)
            made, constants = inputs.take()
            nodes += made
            graph.initializers.update({tensor.name: tensor for tensor in constants})
        nodes += piece.nodes
        graph.values += piece.values
        graph.initializers.update({tensor.name: tensor for tensor in piece.initializers})
    graph.nodes = nodes


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _tied(site: str, weights: SiteWeights, x: str, output: str, table: str) -> recipes.Piece:
    """A dense head that shares the embedding table's memory shares its bytes on disk too."""
    transposed = f"{site}.weight"
    product = output if weights.bias is None else f"{site}.product"
    piece = recipes.Piece(
        [
            helper.make_node("Transpose", [table], [transposed], perm=[1, 0]),
            helper.make_node("MatMul", [x, transposed], [product]),
        ]
    )
    if weights.bias is not None:
        piece.initializers.append(numpy_helper.from_array(weights.bias, f"{site}.bias"))
        piece.nodes.append(helper.make_node("Add", [product, f"{site}.bias"], [output]))
    return piece


def _heads(
    node: onnx.NodeProto, which: str, head_dim: int, present: Mapping[str, SiteWeights]
) -> int:
    site = str(attribute(node, which))
    rows = present[site if site in present else second_of(site)].format.rows
    if rows % head_dim:
        raise InternalError(f"{site}: {rows} rows are no whole number of {head_dim}-wide heads")
    return rows // head_dim


def _attention(node: onnx.NodeProto, present: Mapping[str, SiteWeights]) -> list[onnx.NodeProto]:
    """ONNX Attention, `(B, T, H·D)` in and out; `(B, H, T, D)` where heads were split before it."""
    head_dim = int(attribute(node, "head_dim"))
    attributes = {"scale": attribute(node, "scale"), "is_causal": attribute(node, "causal")}
    if attribute(node, "flat"):
        attributes["q_num_heads"] = _heads(node, "query_site", head_dim, present)
        attributes["kv_num_heads"] = _heads(node, "key_site", head_dim, present)
        return [helper.make_node("Attention", list(node.input), list(node.output), **attributes)]
    output = node.output[0]
    split, turned, shape = f"{output}.heads", f"{output}.turned", f"{output}.shape"
    return [
        helper.make_node("Attention", list(node.input), [split], **attributes),
        helper.make_node("Transpose", [split], [turned], perm=[0, 2, 1, 3]),
        helper.make_node("Constant", [], [shape], value_ints=[0, 0, -1]),
        helper.make_node("Reshape", [turned, shape], [output]),
    ]


def _rotary(node: onnx.NodeProto, present: Mapping[str, SiteWeights]) -> onnx.NodeProto:
    """RotaryEmbedding on `(B, T, H·D)`."""
    heads = _heads(node, "heads_of", int(attribute(node, "head_dim")), present)
    return helper.make_node(
        "RotaryEmbedding",
        list(node.input),
        list(node.output),
        interleaved=attribute(node, "interleaved"),
        num_heads=heads,
    )
