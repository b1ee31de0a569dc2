"""Each recipe run in the runtime against numpy, and its predicted bytes against the file's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from autocomp.core.unit import SiteFormat
from autocomp.targets import recipes
from autocomp.targets.inputs import Inputs
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
    scale = rng.uniform(0.2, 5.0, format.columns).astype(np.float32) if format.scaled else None
    if scale is not None:
        weight = weight / scale
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
    return SiteWeights(
        format,
        codes=codes,
        scales=scales,
        bias=bias,
        input_scale=scale,
        input_range=(-1.7, 2.9) if format.static else None,
    )


def _lowered(name, weights, tokens, readers=()) -> recipes.Piece:
    """A linear layer with the nodes that make what it reads."""
    inputs = Inputs(readers)
    piece = recipes.lower_linear(name, weights, "x", "y", tokens, inputs)
    nodes, constants = inputs.take()
    return recipes.Piece(nodes + piece.nodes, constants + piece.initializers)


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
    return session.run(["y"], {"x": x})[0]


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
    readers = [("x", weights)] * (2 if shared else 1) if activations == 8 else []
    piece = _lowered("site", weights, TOKENS, readers)
    matrix = weights.dequantised().astype(np.float64)
    if activations == 8 and group is not None:
        scale = (np.abs(matrix).max(axis=1, keepdims=True) / 127).astype(np.float32)
        if bits == 8:
            matrix = np.rint(matrix / scale) * scale
        else:
            divisors = (scale / weights.scales).astype(np.float16).astype(np.float32)
            steps = np.repeat(divisors, group, axis=1)[:, :COLUMNS]
            matrix = np.rint(weights.codes / steps).astype(np.float64) * scale
    seen = _dynamic_uint8(x) if activations == 8 else x
    expected = seen @ matrix.T + (0 if weights.bias is None else weights.bias)
    found = _run(piece, x)
    # Float activations meet 4-bit scales stored in float16: 2⁻¹¹ relative.
    tolerance = 2e-2 if activations == 32 and group is not None else 2e-4
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    if activations == 8:
        assert np.abs(found - x @ matrix.T - (weights.bias if bias else 0)).max() > 1e-3


def _static_uint8(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """QuantizeLinear to uint8 and back, as the ONNX specification states it."""
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize(
    ("bits", "group", "activations", "static", "scaled"),
    [
        (8, None, 8, True, False),
        (8, None, 8, True, True),
        (8, None, 8, False, True),
        (8, None, 32, False, True),
        (4, 16, 32, False, True),
        (4, 16, 8, True, True),
    ],
)
def test_scaled_and_static_inputs_equal_numpy(bits, group, activations, static, scaled, tokens):
    spec = SiteFormat(ROWS, COLUMNS, True, False, bits, group, activations, static, scaled)
    weights = _weights(spec)
    x = np.random.default_rng(0).standard_normal((1, tokens, COLUMNS)).astype(np.float32) + 0.3
    found = _run(_lowered("site", weights, tokens), x)
    seen = x * weights.input_scale if scaled else x
    plain = seen @ weights.dequantised().T + weights.bias
    kind = recipes.recipe(spec, tokens)
    packed = tokens == 1 and not (bits == 8 and activations == 32)
    assert kind == ("int8" if static else "nbits" if packed else kind)
    if static:
        clipped = (seen < -1.7) | (seen > 2.9)
        assert clipped.any()
        assert not clipped.all()
        seen = _static_uint8(seen, -1.7, 2.9)
    elif activations == 8:
        seen = _dynamic_uint8(seen) if kind == "int8" else _blockwise_int8(seen, group or 128)
    matrix = weights.dequantised().astype(np.float64)
    if kind == "int8" and bits == 4:
        scale = (np.abs(matrix).max(axis=1, keepdims=True) / 127).astype(np.float32)
        divisors = (scale / weights.scales).astype(np.float16).astype(np.float32)
        matrix = np.rint(weights.codes / np.repeat(divisors, group, axis=1)) * scale
        matrix = matrix.astype(np.float64)
    expected = seen.astype(np.float64) @ matrix.T + weights.bias
    # Float activations meet 4-bit scales stored in float16.
    tolerance = 2e-2 if kind == "unpacked" and group else 2e-3
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
    if activations == 8:
        assert np.abs(found - plain).max() > 1e-2


def test_inputs_are_shared_where_they_are_equal():
    spec = SiteFormat(ROWS, COLUMNS, True, False, 8, None, 8, static=True, scaled=True)
    one, other = _weights(spec), _weights(spec)
    narrower = replace(one, input_range=(-1.0, 1.0))
    unscaled = replace(one, format=replace(spec, scaled=False), input_scale=None)
    dynamic = replace(one, format=replace(spec, static=False), input_range=None)
    inputs = Inputs([("x", one)] * 2 + [("x", dynamic)])
    first = inputs.codes("x", one)
    assert inputs.codes("x", other) == first
    distinct = {first, inputs.codes("x", narrower), inputs.codes("x", unscaled)}
    assert len(distinct) == 3
    assert inputs.codes("x", dynamic) is None
    nodes, constants = inputs.take()
    assert [n.op_type for n in nodes].count("Mul") == 1
    assert [n.op_type for n in nodes].count("QuantizeLinear") == 3
    assert len({tensor.name for tensor in constants}) == len(constants) == 7
    assert inputs.take() == ([], [])


@pytest.mark.parametrize(
    ("bits", "group", "activations"), [(4, 16, 32), (4, 32, 8), (8, 32, 8), (8, None, 8)]
)
def test_decoding_recipes_equal_numpy(bits, group, activations):
    spec = SiteFormat(ROWS, COLUMNS, True, False, bits, group, activations)
    weights = _weights(spec)
    assert recipes.recipe(spec, 1) == "nbits"
    x = np.random.default_rng(0).standard_normal((1, 1, COLUMNS)).astype(np.float32)
    found = _run(_lowered("site", weights, 1), x)
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
@pytest.mark.parametrize("activations", [32, 8, "static", "scaled"])
def test_predicted_bytes_are_those_of_the_file(bits, group, activations, embedding, tokens):
    plain = bits == 32 or embedding
    spec = SiteFormat(
        400,
        384,
        not embedding,
        embedding,
        bits,
        group,
        32 if plain or activations == 32 else 8,
        static=activations == "static" and not plain,
        scaled=activations == "scaled" and not plain,
    )
    weights = stand_in_weights({"model.layers.3.attention.query": spec})
    site = weights("model.layers.3.attention.query")
    assert site is not None
    name = "model.layers.3.attention.query"
    if embedding:
        piece = recipes.lower_embedding(name, site, "x", "y")
    else:
        piece = _lowered(name, site, tokens)
    actual = sum(item.ByteSize() for item in [*piece.nodes, *piece.initializers])
    assert recipes.size_bytes(spec, tokens) == pytest.approx(actual, rel=0.01)


def test_unsupported_formats_say_why():
    good = SiteFormat(8, 64, True, False, 4, 32, 8)
    assert recipes.unsupported(good) is None
    assert recipes.unsupported(replace(good, weight_bits=3)) is None
    assert "3-bit" in str(recipes.unsupported(replace(good, weight_bits=3), tokens=1))
    assert "6-bit weights" in str(recipes.unsupported(replace(good, weight_bits=6)))
    assert "4-bit activations" in str(recipes.unsupported(replace(good, activation_bits=4)))
    dense = SiteFormat(8, 64, True, activation_bits=8)
    assert "8-bit activations need" in str(recipes.unsupported(dense))
    assert "static range" in str(
        recipes.unsupported(replace(good, activation_bits=32, static=True))
    )
    assert "scaled inputs" in str(recipes.unsupported(SiteFormat(8, 64, True, scaled=True)))
    table = SiteFormat(8, 64, False, True, 4, 24)
    assert "power of two" in str(recipes.unsupported(table))
    assert recipes.unsupported(replace(table, group=96)) is None


def test_eight_bits_with_float_activations_are_never_slower_than_float():
    """Their MatMulNBits is by an order of magnitude; from two tokens on every one is slower."""
    assert recipes.recipe(SiteFormat(8, 64, False, weight_bits=8), 1) == "unpacked"
    assert recipes.recipe(SiteFormat(8, 64, False, weight_bits=4, group=32), 2) == "unpacked"


ZEROS = {
    "a group": (slice(0, 48), slice(16, 32)),
    "all but a group": (slice(0, 48), slice(0, 64)),
    "a row": (slice(0, 3), slice(0, 80)),
    "everything": (slice(0, 48), slice(0, 80)),
}


@pytest.mark.parametrize("zeros", list(ZEROS))
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize(
    ("bits", "group", "activations"),
    [(8, None, 8), (8, 16, 8), (8, 16, 32), (4, 16, 32), (4, 16, 8), (4, None, 8), (3, 16, 8),
     (2, 16, 8), (2, 16, 32), (3, None, 32)],
)  # fmt: skip
def test_zeros_leave_the_other_weights_alone(bits, group, activations, size, zeros):
    """The grid gives zeros scale 1, which is no measure for weights a millionth of that."""
    spec = SiteFormat(ROWS, COLUMNS, False, False, bits, group, activations)
    weights = on_the_grid(spec, size, ZEROS[zeros])
    matrix = weights.dequantised().astype(np.float64)
    x = np.random.default_rng(0).standard_normal((2, 6, COLUMNS)).astype(np.float32) + 0.3
    expected = x.astype(np.float64) @ matrix.T
    readers = [("x", weights)] if activations == 8 else []
    found = _run(_lowered("site", weights, TOKENS, readers), x)
    # Rounded activations are 1/255 of their spread off, weights widened to int8 1/254 of the row's.
    bound = 0.03 if activations == 8 else 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max() + 1e-37)


def on_the_grid(spec, size, zeros):
    """Random weights of this size, some of them zero, as rounding to nearest leaves them."""
    import torch

    from autocomp.operators.quantize.grid import round_to_grid, search_scales

    rng = np.random.default_rng(2)
    weight = rng.standard_normal((spec.rows, spec.columns)).astype(np.float32) * np.float32(size)
    weight[zeros] = 0
    scales = search_scales(torch.from_numpy(weight), spec)
    codes = round_to_grid(torch.from_numpy(weight), scales, spec)
    assert not codes.numpy()[zeros].any()
    return SiteWeights(spec, codes=codes.numpy(), scales=scales.numpy())
