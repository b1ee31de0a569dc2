"""Fold the scaling of a norm's output into the norm: in a pre-norm model, scaled inputs are free.

    norm(x; γ, β) · t  =  norm(x; γ t, β t)

holds where everything that reads the norm's output (not its shape alone) multiplies it by the same
vector t. After a post-norm the residual reads it too, and so may a mixer: there the multiplication
stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from autocomp.targets.graph import Graph, attribute
from autocomp.targets.weights import Array

_NORMS = ("LayerNormalization", "RMSNormalization")


def fold_scales(graph: Graph) -> int:
    """Fold what can be folded; returns the number of norms that took over a vector.

    Nodes that change are replaced by copies: the model `graph` was made from stays as it is.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    folded: dict[str, Array] = {}  # output of a norm → what it takes over
    alias: dict[str, str] = {}  # output of a multiplication → output of the norm
    for norm in graph.nodes:
        output = norm.output[0]
        if norm.op_type not in _NORMS or output in graph.outputs or not _plain(norm, graph):
            continue
        users = [user for user in readers.get(output, []) if user.op_type != "Shape"]
        vectors = [_vector(user, output, graph) for user in users]
        first = vectors[0] if vectors else None
        if first is None or not all(v is not None and np.array_equal(v, first) for v in vectors):
            continue
        folded[output] = first
        alias.update((user.output[0], output) for user in users)
    graph.nodes = [
        _changed(node, graph, folded, alias) for node in graph.nodes if node.output[0] not in alias
    ]
    return len(folded)


def _changed(
    node: onnx.NodeProto, graph: Graph, folded: Mapping[str, Array], alias: Mapping[str, str]
) -> onnx.NodeProto:
    """The node as it is afterwards: a copy if anything changes."""
    vector = folded.get(node.output[0])
    if vector is None and not any(name in alias for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(node.input):
        copy.input[index] = alias.get(name, name)
        if vector is not None and index and name:
            weights = numpy_helper.to_array(graph.initializers[name]) * vector
            copy.input[index] = f"{node.output[0]}.folded{index}"
            graph.initializers[copy.input[index]] = numpy_helper.from_array(
                weights, copy.input[index]
            )
    return copy


def _plain(norm: onnx.NodeProto, graph: Graph) -> bool:
    """Whether the norm is over the last axis, alone in its output, with constant weights."""
    weights = [name for name in norm.input[1:] if name]
    return (
        int(attribute(norm, "axis", -1)) == -1
        and len([name for name in norm.output if name]) == 1
        and bool(weights)
        and all(name in graph.initializers for name in weights)
        and all(len(graph.initializers[name].dims) == 1 for name in weights)
    )


def _vector(user: onnx.NodeProto, tensor: str, graph: Graph) -> Array | None:
    """What `user` multiplies `tensor` by, if it is a constant vector."""
    if user.op_type != "Mul" or user.domain:
        return None
    others = [name for name in user.input if name != tensor]
    if len(others) != 1 or others[0] not in graph.initializers:
        return None
    if user.output[0] in graph.outputs or len(graph.initializers[others[0]].dims) != 1:
        return None
    return numpy_helper.to_array(graph.initializers[others[0]])
