"""Each recipe run in the runtime against numpy, and its predicted bytes against the file's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from autocomp.core.unit import SiteFormat
from autocomp.targets import recipes
from autocomp.targets.onnxruntime_cpu import open_session
from autocomp.targets.skeleton_format import OPSET
from autocomp.targets.weights import SiteWeights, stand_in_weights

ROWS, COLUMNS, TOKENS = 48, 80, 12


def _weights(format: SiteFormat) -> SiteWeights:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((format.rows, format.columns)).astype(np.float32)
    bias = rng.standard_normal(format.rows).astype(np.float32) if format.bias else None
    if format.weight_bits == 32:
        return SiteWeights(format, weight=weight, bias=bias)
    width = format.group or format.columns
    groups = -(-format.columns // width)
    low, high = (-127, 127) if format.weight_bits == 8 else (-8, 7)
    scales = np.empty((format.rows, groups), np.float32)
    codes = np.empty(weight.shape, np.int8)
    for group in range(groups):
        part = weight[:, group * width : (group + 1) * width]
        scales[:, group] = np.abs(part).max(axis=1) / high
        codes[:, group * width : (group + 1) * width] = np.clip(
            np.rint(part / scales[:, group : group + 1]), low, high
        )
    return SiteWeights(format, codes=codes, scales=scales, bias=bias)


def _model(piece: recipes.Piece, x: np.ndarray) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        piece.nodes,
        "piece",
        [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        piece.initializers,
    )
    opset = [helper.make_opsetid("", OPSET), helper.make_opsetid(recipes.MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def _run(piece: recipes.Piece, x: np.ndarray) -> np.ndarray:
    session = open_session(_model(piece, x).SerializeToString(), 1)
    return session.run({"x": x})["y"]


def _dynamic_uint8(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and back, as the ONNX specification states it."""
    low, high = min(0.0, x.min()), max(0.0, x.max())
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def _blockwise_int8(x: np.ndarray, block: int) -> np.ndarray:
    result = np.empty_like(x)
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        scale = np.abs(part).max(axis=-1, keepdims=True) / 127
        result[..., start : start + block] = np.rint(part / scale) * scale
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "activations"),
    [
        (32, None, 32),
        (8, None, 32),
        (8, None, 8),
        (8, 32, 8),
        (4, 16, 32),
        (4, 16, 8),
        (4, 32, 32),
        (4, 32, 8),
        (4, None, 8),
    ],
)
def test_prefill_recipes_equal_numpy(bits, group, activations, shared, bias):
    spec = SiteFormat(ROWS, COLUMNS, bias, False, bits, group, activations)
    weights = _weights(spec)
    x = np.random.default_rng(0).standard_normal((2, 6, COLUMNS)).astype(np.float32) + 0.3
    inputs = recipes.inputs([("x", weights)] * (2 if shared else 1), TOKENS)
    piece = recipes.lower_linear("site", weights, "x", "y", TOKENS, inputs)
    made, _ = inputs.take()
    assert len(made) == int(shared and activations == 8)
    piece.nodes[:0] = made
    matrix = weights.dequantised().astype(np.float64)
    if activations == 8 and (bits == 4 or group is not None):
        scale = (np.abs(matrix).max(axis=1, keepdims=True) / 127).astype(np.float32)
        if bits == 8:
            matrix = np.rint(matrix / scale) * scale
        else:
            ratios = (weights.scales / scale).astype(np.float16).astype(np.float32)
            steps = np.repeat(ratios, group or COLUMNS, axis=1)[:, :COLUMNS]
            matrix = np.rint(weights.codes * steps).astype(np.float64) * scale
    seen = _dynamic_uint8(x) if activations == 8 else x
    expected = seen @ matrix.T + (0 if weights.bias is None else weights.bias)
    found = _run(piece, x)
    # Float activations meet 4-bit scales stored in float16: 2⁻¹¹ relative.
    tolerance = 2e-2 if activations == 32 and group is not None else 2e-4
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    if activations == 8:
        assert np.abs(found - x @ matrix.T - (weights.bias if bias else 0)).max() > 1e-3


@pytest.mark.parametrize(
    ("bits", "group", "activations"), [(4, 16, 32), (4, 32, 8), (8, 32, 32), (8, None, 8)]
)
def test_decoding_recipes_equal_numpy(bits, group, activations):
    spec = SiteFormat(ROWS, COLUMNS, True, False, bits, group, activations)
    weights = _weights(spec)
    assert recipes.recipe(spec, 1) == "nbits"
    x = np.random.default_rng(0).standard_normal((1, 1, COLUMNS)).astype(np.float32)
    found = _run(recipes.lower_linear("site", weights, "x", "y", 1, recipes.inputs([], 1)), x)
    seen = x if activations == 32 else _blockwise_int8(x, group or 128)
    expected = seen @ weights.dequantised().T + weights.bias
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("bits", "group"), [(32, None), (8, None), (8, 16), (4, 32), (4, None)])
@pytest.mark.parametrize("columns", [80, 24])
def test_embeddings_equal_numpy(bits, group, columns):
    weights = _weights(SiteFormat(60, columns, False, True, bits, group))
    ids = np.array([[0, 59, 7], [7, 1, 2]])
    found = _run(recipes.lower_embedding("site", weights, "x", "y"), ids)
    np.testing.assert_allclose(found, weights.dequantised()[ids], atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(32, None), (8, None), (4, 32), (4, 128)])
@pytest.mark.parametrize("activations", [32, 8])
def test_predicted_bytes_are_those_of_the_file(bits, group, activations, embedding, tokens):
    activations = 32 if bits == 32 or embedding else activations
    spec = SiteFormat(400, 384, not embedding, embedding, bits, group, activations)
    weights = stand_in_weights({"model.layers.3.attention.query": spec})
    site = weights("model.layers.3.attention.query")
    assert site is not None
    name = "model.layers.3.attention.query"
    if embedding:
        piece = recipes.lower_embedding(name, site, "x", "y")
    else:
        piece = recipes.lower_linear(name, site, "x", "y", tokens, recipes.inputs([], tokens))
    actual = sum(item.ByteSize() for item in [*piece.nodes, *piece.initializers])
    assert recipes.size_bytes(spec, tokens) == pytest.approx(actual, rel=0.01)


def test_unsupported_formats_say_why():
    good = SiteFormat(8, 64, True, False, 4, 32, 8)
    assert recipes.unsupported(good) is None
    assert "6-bit weights" in str(recipes.unsupported(replace(good, weight_bits=6)))
    assert "4-bit activations" in str(recipes.unsupported(replace(good, activation_bits=4)))
    dense = SiteFormat(8, 64, True, activation_bits=8)
    assert "8-bit activations need" in str(recipes.unsupported(dense))
    table = SiteFormat(8, 64, False, True, 4, 24)
    assert "power of two" in str(recipes.unsupported(table))
    assert recipes.unsupported(replace(table, group=96)) is None
