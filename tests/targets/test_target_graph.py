"""Graph edits against running the graph: folding zeros, cutting, merging."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocomp.targets.graph import Graph, cut, fold_zeros
from autocomp.targets.onnxruntime_cpu import open_session


def _model() -> onnx.ModelProto:
    """y = relu(x + scale * branch(x)) + other(x), with a twin of the branch's first node."""
    node = helper.make_node
    nodes = [
        node("Exp", ["x"], ["e"]),
        node("Mul", ["e", "scale"], ["scaled"]),
        node("Identity", ["scaled"], ["same"]),
        node("Add", ["same", "x"], ["sum"]),
        node("Relu", ["sum"], ["r"]),
        node("Exp", ["x"], ["twin"]),
        node("Sum", ["r", "twin"], ["y"]),
        node("Neg", ["r"], ["unused"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [3])],
        [info("y", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.float32([2, 3, 4]), "scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


X = np.float32([-1, 0.5, 2])


def _run(model: onnx.ModelProto) -> np.ndarray:
    return open_session(model.SerializeToString(), 1).run(["y"], {"x": X})[0]


def test_folding_equals_a_zero_branch():
    graph = Graph(_model())
    graph.nodes = fold_zeros(graph.nodes, ["e"])
    graph.prune()
    assert [node.op_type for node in graph.nodes] == ["Relu", "Exp", "Sum"]
    assert list(graph.initializers) == []
    np.testing.assert_allclose(_run(graph.to_model()), np.maximum(X, 0) + np.exp(X), rtol=1e-6)


def test_folding_a_sum_of_zeros():
    graph = Graph(_model())
    nodes = fold_zeros(graph.nodes, ["e", "x"])
    assert "sum" not in {name for node in nodes for name in node.output}


def test_folding_leaves_its_input_alone():
    model = _model()
    before = model.SerializeToString()
    fold_zeros(Graph(model).nodes, ["e"])
    assert model.SerializeToString() == before


def test_merging_equal_nodes_keeps_the_output():
    model = _model()
    expected = _run(model)
    graph = Graph(model)
    graph.merge_equal()
    graph.prune()
    assert sum(node.op_type == "Exp" for node in graph.nodes) == 1
    np.testing.assert_array_equal(_run(graph.to_model()), expected)


def test_a_cut_holds_the_paths_and_names_what_it_reads():
    graph = Graph(_model())
    nodes, outside = cut(graph, {"e"}, "r")
    assert [node.output[0] for node in nodes] == ["scaled", "same", "sum", "r"]
    assert outside == ["e", "x"]
