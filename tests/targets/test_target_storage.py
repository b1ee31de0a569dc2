"""Stored weights: folded at load, bit for bit what was stored, in the bytes that were predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from autocomp.core.unit import SiteFormat
from autocomp.targets import recipes
from autocomp.targets.inputs import Inputs
from autocomp.targets.onnxruntime_cpu import open_session
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.storage import Builder, Piece, payload_bits, storage_bytes
from autocomp.targets.weights import SiteWeights, stand_in_weights

KINDS = {TensorProto.INT8: np.int8, TensorProto.FLOAT: np.float32}


def _model(piece: Piece, output: str, kind: int) -> bytes:
    """A graph that gives the tensor `output`; without an input, all of it is constant."""
    graph = helper.make_graph(
        [*piece.nodes, helper.make_node("Identity", [output], ["y"])],
        "stored",
        [],
        [helper.make_tensor_value_info("y", kind, ["a", "b"])],
        piece.initializers,
        value_info=piece.values,
    )
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(recipes.MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _loaded(piece: Piece, output: str, kind: int) -> np.ndarray:
    (value,) = open_session(_model(piece, output, kind), 1).run(None, {})
    return np.asarray(value)


def _optimised(piece: Piece, path: Path) -> tuple[Counter[str], dict[str, np.ndarray]]:
    """Operators and initializers that are left once a session was made of `y = piece(x)`."""
    graph = helper.make_graph(
        piece.nodes,
        "piece",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        piece.initializers,
        value_info=piece.values,
    )
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(recipes.MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = onnx.load(path).graph
    tensors = {item.name: numpy_helper.to_array(item) for item in left.initializer}
    return Counter(node.op_type for node in left.node), tensors


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 13)),
    density=st.sampled_from([None, 0.0, 0.3, 1.0]),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 100),
)
def test_codes_come_back_bit_for_bit(bits, shape, density, kind, seed):
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, shape).astype(np.int8)
    mask = None
    if density is not None:
        mask = rng.random(shape) < density
        mask.flat[0] = True  # at least one weight is stored
        codes *= mask
    piece = Piece()
    output = Builder(piece, "site").matrix(codes, mask, bits, kind)
    if not piece.nodes:
        assert (bits, kind, density) == (8, TensorProto.INT8, None)
    found = _loaded(piece, output, kind)
    assert found.dtype == KINDS[kind]
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_sparse_floats_come_back_bit_for_bit(density):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((33, 19)).astype(np.float32)
    mask = rng.random(weight.shape) < density
    weight *= mask
    weight[mask.nonzero()[0][0], mask.nonzero()[1][0]] = 0.0  # stored, and zero all the same
    piece = Piece()
    output = Builder(piece, "site").weight(weight, mask)
    np.testing.assert_array_equal(_loaded(piece, output, TensorProto.FLOAT), weight)


def _formats() -> list[SiteFormat]:
    dense = [SiteFormat(400, 384, True, nonzeros=400 * 96)]
    for bits in (8, 4, 3, 2):
        for group in (None,) if bits == 8 else (None, 32, 128):
            for activations in (32, 8):
                whole = SiteFormat(400, 384, True, False, bits, group, activations)
                dense += [whole, replace(whole, nonzeros=400 * 96)]
    return dense


@pytest.mark.parametrize("spec", _formats(), ids=str)
def test_predicted_bytes_are_those_of_the_file(spec, tmp_path):
    name = "model.layers.3.attention.query"
    site = stand_in_weights({name: spec})(name)
    assert site is not None
    assert spec.nonzeros is None or np.count_nonzero(site.mask) == spec.nonzeros
    piece = recipes.lower_linear(name, site, "x", "y", 32, Inputs([]))
    graph = onnx.GraphProto()
    graph.node.extend(piece.nodes)
    graph.initializer.extend(piece.initializers)
    graph.value_info.extend(piece.values)
    path = tmp_path / "graph"
    path.write_bytes(graph.SerializeToString())
    assert recipes.size_bytes(spec, 32) == pytest.approx(path.stat().st_size, rel=0.01)
    if spec.nonzeros is not None:
        assert recipes.size_bytes(spec, 32) < recipes.size_bytes(replace(spec, nonzeros=None), 32)


@pytest.mark.parametrize("spec", _formats()[::3], ids=str)
def test_nothing_but_the_product_is_left_after_loading(spec, tmp_path):
    spec = replace(spec, rows=40, columns=64, nonzeros=spec.nonzeros and 40 * 20)
    spec = replace(spec, group=spec.group and 16)
    site = stand_in_weights({"s": spec})("s")
    assert site is not None
    left, tensors = _optimised(
        recipes.lower_linear("s", site, "x", "y", 32, Inputs([])), tmp_path / "optimised.onnx"
    )
    integers = spec.activation_bits == 8
    assert left == Counter(["DynamicQuantizeMatMul"] if integers else ["FusedMatMulAdd"]) or (
        not integers and left in (Counter(["Gemm"]), Counter(["MatMul", "Add"]))
    ), left
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    assert [matrix.shape for matrix in matrices] == [(64, 40)]
    assert matrices[0].dtype == (np.int8 if integers else np.float32)


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("activations", [32, 8])
@pytest.mark.parametrize("bits", [32, 8, 4, 3, 2])
def test_a_sparse_layer_computes_what_the_dense_codes_do(bits, group, activations, columns):
    if bits == 32 and activations == 8:
        pytest.skip("not a format")
    rng = np.random.default_rng(5)
    mask = rng.random((24, columns)) < 0.3
    group = None if bits in (32, 8) else group
    spec = SiteFormat(24, columns, True, False, bits, group, activations)
    bias = rng.standard_normal(24).astype(np.float32)
    if bits == 32:
        weight = rng.standard_normal(mask.shape).astype(np.float32) * mask
        dense = SiteWeights(spec, weight=weight, bias=bias)
    else:
        half = 1 << (bits - 1)
        codes = (rng.integers(1 - half, half, mask.shape) * mask).astype(np.int8)
        groups = 1 if group is None else -(-columns // group)
        scales = (rng.random((24, groups)) + 0.01).astype(np.float32)
        scales[3] *= 1e-6  # rows and groups of very different size
        scales[5, -1] *= 1e-7
        dense = SiteWeights(spec, codes=codes, scales=scales, bias=bias)
    sparse = replace(dense, format=replace(spec, nonzeros=int(mask.sum())), mask=mask)
    x = rng.standard_normal((7, columns)).astype(np.float32)
    results = []
    for site in (dense, sparse):
        piece = recipes.lower_linear("s", site, "x", "y", 32, Inputs([]))
        graph = helper.make_graph(
            piece.nodes,
            "piece",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            piece.initializers,
            value_info=piece.values,
        )
        opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(recipes.MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        (y,) = open_session(model.SerializeToString(), 1).run(None, {"x": x})
        results.append(y)
    np.testing.assert_array_equal(results[0], results[1])
    if activations == 32:
        expected = x.astype(np.float64) @ dense.dequantised().T.astype(np.float64) + bias
        size = np.abs(expected).max()
        np.testing.assert_allclose(results[1], expected, atol=1e-3 * size, rtol=0)


def test_sizes_count_the_map_and_the_stored_weights():
    spec = SiteFormat(1000, 1024, False, weight_bits=4, nonzeros=512_000)
    assert payload_bits(spec) == 1_024_000 + 4 * 512_000
    assert storage_bytes(spec) == pytest.approx((1_024_000 + 4 * 512_000) / 8, rel=0.01)
    assert payload_bits(replace(spec, nonzeros=None, weight_bits=3)) == 3 * 1_024_000


def test_formats_that_gain_nothing_or_have_no_kernel_are_refused():
    good = SiteFormat(8, 64, True, False, 4, 32, 8, nonzeros=256)
    for bits in (4, 3):
        assert recipes.unsupported(replace(good, weight_bits=bits)) is None
    assert recipes.unsupported(replace(good, weight_bits=32, activation_bits=32)) is None
    assert recipes.unsupported(replace(good, weight_bits=2, nonzeros=None)) is None
    assert "no fewer bytes" in str(recipes.unsupported(replace(good, weight_bits=2)))
    assert recipes.unsupported(replace(good, weight_bits=2, nonzeros=255)) is None
    assert "no kernel for sparse ones" in str(recipes.unsupported(good, 1))
    narrow = replace(good, weight_bits=3, nonzeros=None)
    assert "no kernel for 3-bit ones" in str(recipes.unsupported(narrow, 1))
    floats = replace(good, weight_bits=32, activation_bits=32)
    assert recipes.unsupported(floats, 1) is None
    table = replace(good, embedding=True, bias=False, activation_bits=32)
    assert "sparse tables" in str(recipes.unsupported(table))
    assert "3-bit ones have no kernel" in str(
        recipes.unsupported(replace(table, nonzeros=None, weight_bits=3))
    )
