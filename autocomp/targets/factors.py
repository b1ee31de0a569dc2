"""Low rank in a skeleton: the marker of a site becomes two, one for each of its factors."""

from __future__ import annotations

import onnx
from onnx import helper

from autocomp.core.factors import first_of, second_of
from autocomp.targets.graph import Graph, attribute
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.weights import Provider


def split_factors(graph: Graph, weights: Provider) -> None:
    """Replace every marker whose site has factors by the markers of these.

    A table becomes a narrow table and a linear layer. Nodes are replaced, not modified.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        nodes += _pair(node, weights) or [node]
    graph.nodes = nodes


def _pair(node: onnx.NodeProto, weights: Provider) -> list[onnx.NodeProto] | None:
    if node.domain != DOMAIN or node.op_type not in ("Linear", "Embedding"):
        return None
    site = str(attribute(node, "site"))
    first, second = first_of(site), second_of(site)
    if weights(first) is None:
        return None
    between = f"{first}.output"
    kind = node.op_type
    return [
        helper.make_node(kind, list(node.input), [between], site=first, domain=DOMAIN),
        helper.make_node("Linear", [between], list(node.output), site=second, domain=DOMAIN),
    ]
