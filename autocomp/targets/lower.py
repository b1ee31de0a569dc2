"""Lowering: fill a skeleton's markers with a candidate's weights in the runtime's own operators.

Skipped sites become zeros that are folded away with all that fed them; what is left of the model
outside the sites (norms, position embeddings, convolutions) is refreshed from the candidate.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.core.errors import InternalError
from autocomp.core.factors import second_of
from autocomp.core.unit import SiteFormat
from autocomp.targets import recipes as onnxruntime_recipes
from autocomp.targets.cache import drop_dead_caches, settle_cache
from autocomp.targets.factors import split_factors
from autocomp.targets.fold_scales import fold_scales
from autocomp.targets.graph import Graph, attribute, fold_zeros
from autocomp.targets.mixer_nodes import Placed, Seats, check_reductions, lower_mixer, place_mixers
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.storage import Piece
from autocomp.targets.token_nodes import Reductions, resolve_tokens
from autocomp.targets.weights import Array, Provider, SiteWeights


class Inputs(Protocol):
    """What linear layers read: forms of tensors, each computed once."""

    def take(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and initializers that were asked for since the last call."""
        ...


class Recipes(Protocol):
    """How a runtime writes each kind of marker. The modules `recipes` and `openvino_recipes` do."""

    OPSETS: Mapping[str, int]

    def unsupported(self, format: SiteFormat, tokens: int) -> str | None:
        """Why a format cannot be lowered or would gain nothing, or `None`."""
        ...

    def size_bytes(self, format: SiteFormat, tokens: int) -> int:
        """Bytes on disk of a site in this format."""
        ...

    def recipe(self, format: SiteFormat, tokens: int) -> str:
        """Name of the recipe a format is written by."""
        ...

    def kernel(self, format: SiteFormat, tokens: int) -> Hashable:
        """Equal for formats of one shape that take the same time."""
        ...

    def kernel_class(self, format: SiteFormat, tokens: int) -> str:
        """The class of kernels a cost table fits one slope to."""
        ...

    def inputs(self, readers: Iterable[tuple[str, SiteWeights]], tokens: int) -> Inputs:
        """What keeps the scaled and quantised forms of tensors, given who reads which."""
        ...

    def lower_embedding(self, site: str, weights: SiteWeights, ids: str, output: str) -> Piece:
        """A table `(B, T)` → `(B, T, columns)`."""
        ...

    def lower_linear(
        self,
        site: str,
        weights: SiteWeights,
        x: str,
        output: str,
        tokens: int,
        inputs: Any,
    ) -> Piece:
        """A linear layer `(…, columns)` → `(…, rows)`; `inputs` as `inputs()` made them."""
        ...

    def lower_attention(
        self,
        node: onnx.NodeProto,
        heads: int,
        kv_heads: int,
        cache_scales: tuple[Array, Array] | None = None,
    ) -> Piece:
        """The attention product of a marker; see `skeleton`.

        With `cache_scales`, float32 `(kv_heads · D,)` of keys and of values, its cache is int8.
        """
        ...

    def lower_rotary(self, node: onnx.NodeProto, heads: int) -> Piece:
        """Rotary position embedding of `(B, T, heads·D)`."""
        ...


def lower(
    skeleton: onnx.ModelProto,
    weights: Provider,
    *,
    tokens: int,
    parameters: Mapping[str, Array] | None = None,
    reductions: Reductions | None = None,
    seats: Seats | None = None,
    recipes: Recipes = onnxruntime_recipes,
) -> onnx.ModelProto:
    """The runtime's graph of a candidate. `skeleton` is not modified.

    Args:
        skeleton: from `export_skeleton`.
        weights: site name → weights, `None` where skipped. A site X that is there as the factors
            `X.first` and `X.second` is not asked for.
        tokens: tokens per run of the workload (batch × sequence); decides the recipes.
        parameters: values of what is outside the sites, by name; `None` keeps the skeleton's.
        reductions: attention unit → what is done to the sequence behind it.
        seats: query site → the mixer in the place of its attention. Sites a mixer does not read are
            not asked for.
        recipes: how the runtime writes what markers stand for.

    Raises:
        InternalError: if shapes do not fit, or every way to the output is skipped.
    """
    graph = Graph(skeleton)
    graph.nodes, constants = resolve_tokens(graph.nodes, reductions or {})
    graph.initializers.update(constants)
    check_reductions(seats or {}, reductions or {})
    placed = place_mixers(graph, seats or {})
    split_factors(graph, weights)
    sites = {
        node.output[0]: str(attribute(node, "site"))
        for node in graph.nodes
        if node.domain == DOMAIN and node.op_type in ("Linear", "Embedding")
    }
    values = {site: weights(site) for site in sites.values()}
    zeros = [tensor for tensor, site in sites.items() if values[site] is None]
    graph.nodes = fold_zeros(graph.nodes, zeros)
    drop_dead_caches(graph)
    graph.nodes = _live(graph, graph.nodes, set(zeros))
    present: dict[str, SiteWeights] = {k: v for k, v in values.items() if v is not None}
    settle_cache(
        graph,
        lambda node: _heads(node, "key_site", int(attribute(node, "head_dim")), present),
        lambda node: _cache_scales(node, present) is not None,
    )
    _refresh(graph, parameters or {})
    _fill(graph, present, placed, tokens, recipes)
    fold_scales(graph)
    graph.prune()
    return graph.to_model(helper.make_opsetid(*item) for item in recipes.OPSETS.items())


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


def _fill(
    graph: Graph,
    present: Mapping[str, SiteWeights],
    placed: Placed,
    tokens: int,
    recipes: Recipes,
) -> None:
    """Replace every marker by nodes of the runtime."""
    linears = [node for node in graph.nodes if node.domain == DOMAIN and node.op_type == "Linear"]
    readers = [(node.input[0], present[str(attribute(node, "site"))]) for node in linears]
    inputs = recipes.inputs(readers, tokens)
    tables: dict[int, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        if node.op_type in ("Attention", "RotaryEmbedding"):
            piece = _heads_piece(node, present, recipes)
        elif node.op_type == "Mixer":
            piece = lower_mixer(node, placed[node.output[0]])
        else:
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


def _heads_piece(
    node: onnx.NodeProto, present: Mapping[str, SiteWeights], recipes: Recipes
) -> Piece:
    head_dim = int(attribute(node, "head_dim"))
    if node.op_type == "RotaryEmbedding":
        return recipes.lower_rotary(node, _heads(node, "heads_of", head_dim, present))
    heads = [_heads(node, site, head_dim, present) for site in ("query_site", "key_site")]
    return recipes.lower_attention(node, heads[0], heads[1], _cache_scales(node, present))


def _cache_scales(
    node: onnx.NodeProto, present: Mapping[str, SiteWeights]
) -> tuple[Array, Array] | None:
    """Scales of an int8 cache, of keys and of values; `None` for a float one, or none at all."""
    if len(node.output) == 1:
        return None
    key, value = (_made_by(node, which, present) for which in ("key_site", "value_site"))
    if key.output_scale is None or value.output_scale is None:
        return None
    return key.output_scale, value.output_scale


def _made_by(node: onnx.NodeProto, which: str, present: Mapping[str, SiteWeights]) -> SiteWeights:
    """The layer that makes a tensor of heads, the second of two factors."""
    site = str(attribute(node, which))
    return present[site if site in present else second_of(site)]


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _tied(site: str, weights: SiteWeights, x: str, output: str, table: str) -> Piece:
    """A dense head that shares the embedding table's memory shares its bytes on disk too."""
    transposed = f"{site}.weight"
    product = output if weights.bias is None else f"{site}.product"
    piece = Piece(
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
    rows = _made_by(node, which, present).format.rows
    if rows % head_dim:
        site = attribute(node, which)
        raise InternalError(f"{site}: {rows} rows are no whole number of {head_dim}-wide heads")
    return rows // head_dim
