"""OpenVINO's recipes against the arithmetic written out in numpy, and their bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat
from autocomp.spec.schema import WorkloadSection
from autocomp.targets import openvino_recipes as recipes
from autocomp.targets.openvino_pieces import OpenVinoInputs
from autocomp.targets.storage import Piece
from autocomp.targets.weights import SiteWeights

pytest.importorskip("openvino", reason="the runtime is an extra")

ROWS, COLUMNS, TOKENS = 48, 160, 12


def weights_of(spec: SiteFormat, seed: int = 0, **more: Any) -> SiteWeights:
    """Random codes and scales, or a random matrix."""
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal(spec.rows).astype(np.float32) if spec.bias else None
    if spec.weight_bits == 32:
        matrix = rng.standard_normal((spec.rows, spec.columns)).astype(np.float32)
        return SiteWeights(spec, weight=matrix, bias=bias)
    half = 127 if spec.weight_bits == 8 else 7
    codes = rng.integers(-half, half + 1, (spec.rows, spec.columns)).astype(np.int8)
    groups = -(-spec.columns // (spec.group or spec.columns))
    scales = (rng.uniform(0.5, 1.5, (spec.rows, groups)) * 0.1 / half).astype(np.float32)
    return SiteWeights(spec, codes=codes, scales=scales, bias=bias, **more)


def run(piece: Piece, x: np.ndarray, width: int, tokens: int = TOKENS) -> np.ndarray:
    """The output `y` of a piece that reads `x`."""
    from autocomp.targets.openvino_cpu import OpenVinoTarget

    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        piece.nodes,
        "piece",
        [helper.make_tensor_value_info("x", kind, [None] * x.ndim)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * x.ndim)],
        piece.initializers,
    )
    opset = [helper.make_opsetid(*item) for item in recipes.OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    target = OpenVinoTarget(WorkloadSection(sequence=tokens))
    found = target.run_graph(model, {"x": x}, ["y"])["y"]
    assert found.shape[-1] == width
    return found


def linear(weights: SiteWeights, x: np.ndarray, tokens: int = TOKENS) -> np.ndarray:
    inputs = OpenVinoInputs()
    piece = recipes.lower_linear("site", weights, "x", "y", tokens, inputs)
    nodes, constants = inputs.take()
    piece.nodes[:0] = nodes
    piece.initializers += constants
    return run(piece, x, weights.format.rows, tokens)


def by_row(weights: SiteWeights) -> np.ndarray:
    """The matrix after widening to int8 with a scale per row, float64."""
    matrix = weights.dequantised()
    if weights.format.weight_bits == 8 and weights.scales.shape[1] == 1:
        return matrix.astype(np.float64)
    scale = (np.abs(matrix).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    if weights.format.weight_bits == 8:
        return np.rint(matrix / scale).astype(np.float64) * scale
    divisors = (scale / weights.scales).astype(np.float16).astype(np.float32)
    group = weights.format.group or weights.format.columns
    divisors = np.repeat(divisors, group, axis=1)[:, : weights.format.columns]
    return np.rint(weights.codes / divisors).astype(np.float64) * scale


def in_groups(x: np.ndarray, width: int) -> np.ndarray:
    """Each token's columns rounded to 8 bits in groups of `width`, symmetrically."""
    padded = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % width)))
    grouped = padded.reshape(*x.shape[:-1], -1, width)
    scale = np.abs(grouped).max(axis=-1, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1)
    rounded = np.rint(grouped / scale) * scale
    return rounded.reshape(padded.shape)[..., : x.shape[-1]]


X = np.random.default_rng(3).standard_normal((2, 6, COLUMNS)).astype(np.float32) + 0.3
FORMATS = [(8, None), (8, 32), (4, None), (4, 32), (4, 48)]


@pytest.mark.parametrize(("bits", "group"), [(32, None), *FORMATS])
@pytest.mark.parametrize("bias", [True, False])
def test_float_activations_meet_the_weights_themselves(bits, group, bias):
    weights = weights_of(SiteFormat(ROWS, COLUMNS, bias, weight_bits=bits, group=group))
    expected = X @ weights.dequantised().T + (weights.bias if bias else 0)
    # Grouped scales are stored in float16: 2⁻¹¹ relative.
    tolerance = 2e-5 if group is None else 2e-3
    np.testing.assert_allclose(linear(weights, X), expected, atol=tolerance)


def _steps(x: np.ndarray, weights: SiteWeights, scale: float) -> np.ndarray:
    """By how much each output may differ `(…, rows)`: float32's error, and one level for every
    input within float32's error of the edge between two."""
    edge = np.abs(np.abs(x / scale) % 1 - 0.5) < 1e-4
    return 2e-5 + scale * edge @ np.abs(by_row(weights)).T


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_fixed_range_is_rounded_to_256_levels(bits, group):
    spec = SiteFormat(ROWS, COLUMNS, True, False, bits, group, 8, static=True)
    weights = weights_of(spec, input_range=(-1.7, 2.9))
    scale, zero = 4.6 / 255, round(1.7 / (4.6 / 255))
    seen = (np.clip(np.rint(X / scale) + zero, 0, 255) - zero) * scale
    found = linear(weights, X)
    # Products of integers are exact: what is left is the float32 of scales and bias. A value on
    # the edge between two levels may fall to either: one step of it, times its weight.
    off = np.abs(found - (seen @ by_row(weights).T + weights.bias))
    assert (off <= _steps(X, weights, scale)).all(), off.max()
    plain = X @ weights.dequantised().T + weights.bias
    assert np.abs(found - plain).max() > 0.1  # the range was narrower than the inputs


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_without_a_range_columns_are_rounded_in_groups(bits, group):
    weights = weights_of(SiteFormat(ROWS, COLUMNS, True, False, bits, group, 8))
    found = linear(weights, X)
    _is_rounded_in_groups(found, X, 128, by_row(weights).T, weights.bias)


def _is_rounded_in_groups(found, x, width, matrix, bias) -> None:
    """`found` is of inputs rounded in groups, or of inputs that are not rounded at all, which is
    right where a processor lacks the instructions; never of groups of another width."""
    off = {
        columns: np.abs(found - (in_groups(x, columns) @ matrix + bias)).max()
        for columns in (32, 64, 128, x.shape[-1])
    }
    plain = np.abs(found - (x @ matrix + bias)).max()
    own = off.pop(width)
    assert min(own, plain) < 2e-5
    if own < 2e-5:
        assert min(plain, *off.values()) > 1e-3


@pytest.mark.parametrize("group", [None, 32])
def test_few_tokens_read_narrow_weights(group):
    spec = SiteFormat(ROWS, COLUMNS, True, False, 4, group, 8)
    assert recipes.recipe(spec, 1) == "nbits"
    weights, x = weights_of(spec), X[:1, :1]
    found = linear(weights, x, tokens=1)
    _is_rounded_in_groups(found, x, 32, weights.dequantised().T, weights.bias)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("group", [None, 32, 48])
def test_tables_are_gathered(bits, group):
    weights = weights_of(SiteFormat(70, COLUMNS, False, True, bits, group))
    ids = np.array([[0, 69, 5], [5, 1, 1]], np.int64)
    piece = recipes.lower_embedding("table", weights, "x", "y")
    np.testing.assert_allclose(run(piece, ids, COLUMNS), weights.dequantised()[ids], atol=1e-6)


@pytest.mark.parametrize(("activations", "static"), [(32, False), (8, False), (8, True)])
def test_scaled_inputs(activations, static):
    vector = np.random.default_rng(5).uniform(0.2, 3, COLUMNS).astype(np.float32)
    spec = SiteFormat(ROWS, COLUMNS, False, False, 8, None, activations, static, scaled=True)
    limits = (-12.0, 12.0) if static else None
    weights = weights_of(spec, input_scale=vector, input_range=limits)
    found, matrix, scaled = linear(weights, X), weights.dequantised().T, X * vector
    if static:
        scale, zero = 24 / 255, round(12 / (24 / 255))
        seen = (np.clip(np.rint(scaled / scale) + zero, 0, 255) - zero) * scale
        off = np.abs(found - seen @ matrix)
        assert (off <= _steps(scaled, weights, scale)).all(), off.max()
    elif activations == 8:
        _is_rounded_in_groups(found, scaled, 128, matrix, 0)
    else:
        np.testing.assert_allclose(found, scaled @ matrix, atol=2e-5)


def test_sites_share_what_they_read_alike():
    one = weights_of(SiteFormat(8, 16, False, False, 8, None, 8, True), input_range=(-1.0, 1.0))
    inputs = OpenVinoInputs()
    first = inputs.read("x", one)
    assert inputs.read("x", replace(one, codes=-one.codes)) == first
    assert inputs.read("x", replace(one, input_range=(-2.0, 1.0))) != first
    assert inputs.read("z", one) != first
    assert len(inputs.take()[0]) == 3
    assert inputs.take() == ([], [])
    with pytest.raises(InternalError, match="reads x is static but has no range"):
        inputs.read("x", replace(one, input_range=None))


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(
    "spec",
    [
        SiteFormat(384, 384, True),
        SiteFormat(1536, 384, True, weight_bits=8, activation_bits=8),
        SiteFormat(384, 384, True, weight_bits=8, activation_bits=8, static=True),
        SiteFormat(384, 1536, True, weight_bits=8),
        SiteFormat(384, 384, False, weight_bits=4, group=32),
        SiteFormat(768, 384, True, weight_bits=4, group=128, activation_bits=8),
        SiteFormat(768, 384, True, weight_bits=4, activation_bits=8, static=True),
        SiteFormat(384, 1536, False, weight_bits=8, group=128, activation_bits=8, static=True),
        SiteFormat(1536, 400, True, weight_bits=4, group=128),
        SiteFormat(2000, 384, False, True),
        SiteFormat(2000, 384, False, True, 8),
        SiteFormat(2000, 384, False, True, 4, 128),
        SiteFormat(2000, 384, False, True, 4, 100),
    ],
    ids=lambda item: (
        f"{item.weight_bits}-{item.group}-{item.activation_bits}-{item.embedding}"
        if isinstance(item, SiteFormat)
        else str(item)
    ),
)
def test_the_size_estimate_is_within_a_percent_of_the_file(spec, tokens, tmp_path):
    """As part of a model: what a second site of a format adds to the files."""
    from autocomp.targets.openvino_cpu import OpenVinoTarget

    target = OpenVinoTarget(WorkloadSection(sequence=tokens))
    sizes = []
    for count in (1, 3):
        sites = [f"encoder.layer.{index}.attention.output.dense" for index in range(count)]
        sizes.append(target.write(_side_by_side(sites, spec, tokens), tmp_path).size_bytes)
    actual = (sizes[1] - sizes[0]) / 2
    assert recipes.size_bytes(spec, tokens) == pytest.approx(actual, rel=0.01)


def _side_by_side(sites: list[str], spec: SiteFormat, tokens: int) -> onnx.ModelProto:
    nodes, constants, inputs = [], [], OpenVinoInputs()
    for index, site in enumerate(sites):
        weights = (
            weights_of(spec, seed=index, input_range=(-1.0, 1.0))
            if (spec.weight_bits < 32)
            else weights_of(spec, seed=index)
        )
        x = f"x{index}"
        if spec.embedding:
            piece = recipes.lower_embedding(site, weights, x, f"y{index}")
        else:
            piece = recipes.lower_linear(site, weights, x, f"y{index}", tokens, inputs)
        made, more = inputs.take()
        nodes += [*made, *piece.nodes]
        constants += [*more, *piece.initializers]
    kind, dims = (
        (TensorProto.INT64, [None, None])
        if spec.embedding
        else (TensorProto.FLOAT, [None, None, spec.columns])
    )
    graph = helper.make_graph(
        nodes,
        "sites",
        [helper.make_tensor_value_info(f"x{i}", kind, dims) for i in range(len(sites))],
        [helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(len(sites))],
        constants,
    )
    opset = [helper.make_opsetid(*item) for item in recipes.OPSETS.items()]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def test_what_gains_nothing_is_refused_with_the_reason():
    good = SiteFormat(64, 64, True, weight_bits=8, activation_bits=8)
    assert recipes.unsupported(good, 32) is None
    assert recipes.unsupported(replace(good, static=True), 32) is None
    assert recipes.unsupported(SiteFormat(64, 64, True), 32) is None
    refused = {
        "neither smaller nor faster": replace(good, weight_bits=3),
        "sparse weights in full": replace(good, nonzeros=100),
        "4-bit activations": replace(good, activation_bits=4),
        "8-bit activations need": replace(good, weight_bits=32),
        "static range needs": replace(good, activation_bits=32, static=True),
    }
    for reason, spec in refused.items():
        assert reason in str(recipes.unsupported(spec, 32))


ZEROS = {
    "a group": (slice(0, 48), slice(32, 64)),
    "all but a group": (slice(0, 48), slice(0, 128)),
    "a row": (slice(0, 3), slice(0, 160)),
    "everything": (slice(0, 48), slice(0, 160)),
}


@pytest.mark.parametrize("zeros", list(ZEROS))
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize(
    ("bits", "group", "activations"),
    [(8, None, 8), (8, 32, 8), (8, 32, 32), (4, 32, 32), (4, 32, 8), (4, None, 8), (4, None, 32)],
)
def test_zeros_leave_the_other_weights_alone(bits, group, activations, size, zeros):
    """The grid gives zeros scale 1, which is no measure for weights a millionth of that."""
    spec = SiteFormat(ROWS, COLUMNS, False, False, bits, group, activations)
    weights = on_the_grid(spec, size, ZEROS[zeros])
    expected = X.astype(np.float64) @ weights.dequantised().astype(np.float64).T
    bound = 0.03 if activations == 8 else 2e-3
    found = linear(weights, X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max() + 1e-37)


def on_the_grid(spec: SiteFormat, size: float, zeros: Any) -> SiteWeights:
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
