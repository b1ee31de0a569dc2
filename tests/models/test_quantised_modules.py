"""Quantised modules against numpy emulations of the runtime, and their life as torch modules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn

from autocomp.core.unit import SiteFormat
from autocomp.models.codes import dequantise
from autocomp.models.modules import QuantEmbedding, QuantLinear, Skip
from autocomp.models.rounding import fake_quantise_per_tensor, integer_products

RANGES = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}
FORMATS = [
    SiteFormat(5, 22, True, weight_bits=bits, group=group, activation_bits=activation)
    for bits in (8, 4, 3, 2)
    for group in (None, 8, 22)
    for activation in (32, 8)
]


def _linear(
    codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, fmt: SiteFormat
) -> QuantLinear:
    return QuantLinear(dequantise(codes, scales, fmt), bias, scales, fmt, codes)


def _numpy_dynamic_quantize_linear(x: np.ndarray) -> np.ndarray:
    """ONNX DynamicQuantizeLinear, then DequantizeLinear, from the operator's specification."""
    low, high = np.float32(min(0, x.min())), np.float32(max(0, x.max()))
    scale = np.float32((high - low) / np.float32(255))
    if scale == 0:
        return x
    zero = np.clip(np.rint(np.float32(0) - low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)
    return (codes.astype(np.float32) - np.float32(zero)) * scale


def _numpy_weight(weight: np.ndarray, scales: np.ndarray, fmt: SiteFormat) -> np.ndarray:
    low, high = RANGES[fmt.weight_bits]
    group = fmt.group or fmt.columns
    result = np.zeros(weight.shape, dtype=np.int64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scale = scales[row, column // group]
            result[row, column] = np.clip(np.rint(weight[row, column] / scale), low, high)
    return result


def _random(fmt: SiteFormat, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-fmt.columns // (fmt.group or fmt.columns))
    weight = torch.randn(fmt.rows, fmt.columns, generator=generator)
    scales = torch.rand(fmt.rows, groups, generator=generator) * 0.2 + 0.01
    return weight, torch.randn(fmt.rows, generator=generator), scales


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear_equals_numpy(fmt: SiteFormat) -> None:
    weight, bias, scales = _random(fmt)
    layer = QuantLinear(weight, bias, scales, fmt).eval()
    x = torch.randn(2, 3, fmt.columns, generator=torch.Generator().manual_seed(1))
    codes = _numpy_weight(weight.numpy(), scales.numpy(), fmt)
    assert layer.codes().dtype == torch.int8
    np.testing.assert_array_equal(layer.codes().numpy(), codes)
    steps = np.repeat(scales.numpy(), fmt.group or fmt.columns, axis=1)[:, : fmt.columns]
    inputs = x.numpy()
    if fmt.activation_bits == 8:
        inputs = _numpy_dynamic_quantize_linear(inputs)
    expected = inputs.astype(np.float64) @ (codes * steps).T.astype(np.float64) + bias.numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    if fmt.activation_bits == 8 and scales.shape[1] > 1 and integer_products():
        grouped = codes.astype(np.float32) * steps  # in float32: halves are frequent
        row = np.abs(grouped).max(axis=1, keepdims=True) / np.float32(127)
        rounded = np.rint(grouped / row).astype(np.float64) * row
        expected = inputs.astype(np.float64) @ rounded.T + bias.numpy()
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_activations_equal_numpy(values: list[float]) -> None:
    x = np.array([values], dtype=np.float32)
    tensor = torch.from_numpy(x)
    per_tensor = fake_quantise_per_tensor(tensor).numpy()
    np.testing.assert_allclose(per_tensor, _numpy_dynamic_quantize_linear(x), rtol=1e-6)


def test_activation_rounds_half_to_even_and_keeps_zero() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 255.0])
    assert fake_quantise_per_tensor(x).tolist() == [0.0, 0.0, 2.0, 2.0, 255.0]
    shifted = torch.tensor([3.0, 4.0, 255.0])  # zero belongs to the range
    assert fake_quantise_per_tensor(shifted).tolist() == [3.0, 4.0, 255.0]
    assert fake_quantise_per_tensor(torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [1e-45, 1.2e-38, 1e-37, 1e-36, 1e-30])
def test_vanishing_activations_stay_finite(size: float) -> None:
    x = torch.tensor([[size, 0.0, -size, size / 3]])
    rounded = fake_quantise_per_tensor(x)
    assert torch.isfinite(rounded).all()
    assert (rounded - x).abs().max() <= max(size * 2 / 255, 1e-36)


def test_codes_saturate_at_the_range() -> None:
    for bits, expected in ((8, [-127, 127, 0]), (4, [-8, 7, 0]), (3, [-4, 3, 0]), (2, [-2, 1, 0])):
        fmt = SiteFormat(1, 3, False, weight_bits=bits)
        layer = QuantLinear(torch.tensor([[-1e6, 1e6, 0.4]]), None, torch.tensor([[1.0]]), fmt)
        assert layer.codes().tolist() == [expected]


def test_zero_scale_means_zero() -> None:
    fmt = SiteFormat(2, 4, False, weight_bits=4, group=2)
    scales = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layer = QuantLinear(torch.ones(2, 4), None, scales, fmt)
    assert layer.codes().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert torch.isfinite(layer(torch.ones(1, 4))).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_given_codes_come_back(fmt: SiteFormat) -> None:
    low, high = RANGES[fmt.weight_bits]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(low, high + 1, (5, 22), generator=generator).to(torch.int8)
    _, bias, scales = _random(fmt)
    linear = _linear(codes, scales, bias, fmt)
    assert torch.equal(linear.codes(), codes)
    assert linear.dequantised().data_ptr() == linear.weight.data_ptr()  # one copy, not two
    table = QuantEmbedding(dequantise(codes, scales, fmt), scales, None, fmt, codes)
    assert torch.equal(table.codes(), codes)


def test_gradient_goes_straight_through_inside_the_range_only() -> None:
    fmt = SiteFormat(1, 4, True, weight_bits=4, group=2)
    weight = torch.tensor([[0.3, 9.0, -0.2, -9.0]])  # range −8…7 steps of 1: two lie outside
    layer = QuantLinear(weight, torch.zeros(1), torch.ones(1, 2), fmt)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert layer.bias.grad.tolist() == [1.0]
    assert x.grad.tolist() == [[0.0, 7.0, 0.0, -8.0]]


@pytest.mark.parametrize("group", [None, 2])
def test_gradient_reaches_the_input_through_quantised_activations(group: int | None) -> None:
    fmt = SiteFormat(2, 4, False, weight_bits=8, group=group, activation_bits=8)
    layer = QuantLinear(torch.randn(2, 4), None, torch.full((2, 2 if group else 1), 0.02), fmt)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantised().sum(0).expand(3, 4)
    torch.testing.assert_close(x.grad, expected)


def test_training_moves_the_codes_and_the_cache_follows() -> None:
    fmt = SiteFormat(3, 8, True, weight_bits=8)
    weight, bias, _ = _random(fmt)
    layer = QuantLinear(weight.clone(), bias, torch.full((3, 1), 0.02), fmt).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        before = layer(x)
        codes = layer.codes()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(x).square().mean().backward()
    optimiser.step()
    with torch.no_grad():  # still in evaluation mode: the weight changed under the cache
        after = layer(x)
    assert not torch.equal(layer.codes(), codes)
    expected = x @ (layer.codes() * 0.02).T + layer.bias
    torch.testing.assert_close(after, expected.detach())
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("fmt", FORMATS[:8], ids=str)
def test_embedding_equals_its_dequantised_table(fmt: SiteFormat) -> None:
    weight, _, scales = _random(fmt)
    table = QuantEmbedding(weight, scales, None, fmt)
    ids = torch.tensor([[0, 4, 4], [2, 1, 0]])
    codes = _numpy_weight(weight.numpy(), scales.numpy(), fmt)
    steps = np.repeat(scales.numpy(), fmt.group or fmt.columns, axis=1)[:, : fmt.columns]
    expected = (codes.astype(np.float32) * steps)[ids.numpy()]
    np.testing.assert_array_equal(table(ids).detach().numpy(), expected)


def test_embedding_trains_only_the_rows_it_gathered() -> None:
    fmt = SiteFormat(5, 4, False, embedding=True, weight_bits=8)
    table = QuantEmbedding(torch.rand(5, 4), torch.ones(5, 1), 3, fmt)
    table(torch.tensor([1, 1, 3])).sum().backward()
    assert table.weight.grad.sum(1).tolist() == [0.0, 8.0, 0.0, 0.0, 0.0]  # 3 is padding


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_copies_and_files_keep_everything(kind: str, tmp_path: Path) -> None:
    fmt = FORMATS[5]
    weight, bias, scales = _random(fmt)
    other_weight, other_bias, other_scales = _random(fmt, seed=9)

    def build(w: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> nn.Module:
        if kind == "linear":
            return QuantLinear(w, b, s, fmt).eval()
        return QuantEmbedding(w, s, None, fmt).eval()

    layer = build(weight, bias, scales)
    x = torch.randn(2, 22) if kind == "linear" else torch.tensor([1, 2])
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        other = build(other_weight, other_bias, other_scales)
        other(x)  # fills its cache
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), expected)
        save_model(layer, str(tmp_path / "layer.safetensors"))
        other = build(other_weight.clone(), other_bias.clone(), other_scales.clone())
        load_model(other, str(tmp_path / "layer.safetensors"))
        assert torch.equal(other(x), expected)
    assert copy.deepcopy(layer).weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_fused_optimiser_leaves_no_stale_rounding(kind: str) -> None:
    """It writes to a weight whose version stays; the module is never told that it trains."""
    fmt = SiteFormat(4, 8, False, weight_bits=8, embedding=kind == "embedding")
    weight, scales = torch.linspace(-1, 1, 32).reshape(4, 8), torch.full((4, 1), 1 / 127)
    if kind == "linear":
        layer: nn.Module = QuantLinear(weight, None, scales, fmt)
        x = torch.ones(2, 8)
    else:
        layer, x = QuantEmbedding(weight, scales, None, fmt), torch.tensor([0, 3])
    layer.eval()
    assert isinstance(layer, QuantLinear | QuantEmbedding)
    before = layer.dequantised().clone()
    optimiser = torch.optim.AdamW([layer.weight], lr=0.1, fused=True)
    layer(x).sum().backward()
    optimiser.step()
    expected = layer.codes().float() * scales
    assert not torch.equal(before, expected)
    assert torch.equal(layer.dequantised(), expected)


def test_cached_rounding_is_not_copied() -> None:
    fmt = SiteFormat(64, 64, False, weight_bits=8)
    layer = QuantLinear(torch.randn(64, 64), None, torch.full((64, 1), 0.1), fmt).eval()
    before = len(pickle.dumps(layer))
    layer.dequantised()
    assert len(pickle.dumps(layer)) == before


def test_cache_made_in_inference_mode_does_not_break_training() -> None:
    fmt = SiteFormat(2, 4, False, weight_bits=8)
    layer = QuantLinear(torch.randn(2, 4), None, torch.full((2, 1), 0.1), fmt).eval()
    with torch.inference_mode():
        layer(torch.randn(1, 4))
    layer.weight.requires_grad_(False)
    x = torch.randn(1, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantised().sum(0, keepdim=True))


def test_skip_broadcasts_a_zero() -> None:
    assert (torch.ones(2, 3) + Skip()(torch.ones(9))).tolist() == torch.ones(2, 3).tolist()
    output, weights = Skip(2)(hidden_states=torch.ones(1), mask=None)
    assert output.item() == 0
    assert weights is None
    assert not Skip().state_dict()


@pytest.mark.parametrize(
    ("fmt", "shape", "message"),
    [
        (SiteFormat(2, 4, False, weight_bits=32), (2, 4), "takes 8, 4, 3, 2"),
        (SiteFormat(2, 4, False, weight_bits=8), (2, 5), "do not fit"),
        (SiteFormat(2, 4, False, weight_bits=8, group=2), (2, 4), r"scales \(2, 2\)"),
        (SiteFormat(2, 4, True, weight_bits=8), (2, 4), "bias None"),
    ],
)
def test_what_does_not_fit_is_refused(
    fmt: SiteFormat, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantLinear(torch.zeros(shape), None, torch.ones(2, 1), fmt)


@pytest.mark.skipif(not integer_products(), reason="no fast int8 products on this CPU")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_integer_products_equal_float_emulation(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    fmt = SiteFormat(17, 300, True, weight_bits=8, activation_bits=8)
    codes = torch.randint(-127, 128, (17, 300), generator=generator).to(torch.int8)
    scales = torch.rand(17, 1, generator=generator) * 0.01 + 1e-4
    bias = torch.randn(17, generator=generator)
    layer = _linear(codes, scales, bias, fmt).eval()
    x = torch.randn(rows, 300, generator=generator) + 3.0  # far from centred: the zero point counts
    emulated = _numpy_dynamic_quantize_linear(x.numpy()).astype(np.float64)
    expected = emulated @ (codes.double() * scales.double()).T.numpy() + bias.numpy()
    with torch.no_grad():
        found = layer(x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(layer(x).detach(), found, rtol=1e-4, atol=1e-4)  # with gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_not_hidden(bad: float) -> None:
    fmt = SiteFormat(2, 4, False, weight_bits=8, activation_bits=8)
    layer = QuantLinear(torch.ones(2, 4), None, torch.full((2, 1), 0.1), fmt).eval()
    x = torch.tensor([[1.0, bad, 0.0, 2.0]])
    with torch.no_grad():
        assert not torch.isfinite(layer(x)).any()


def test_given_codes_are_used_until_the_weight_changes() -> None:
    fmt = SiteFormat(3, 8, False, weight_bits=8, activation_bits=8)
    codes = torch.arange(24, dtype=torch.int8).view(3, 8)
    layer = _linear(codes, torch.full((3, 1), 0.02), None, fmt).eval()
    assert layer.integers().codes.data_ptr() == codes.data_ptr()
    assert layer.integers().sums.tolist() == codes.sum(1).tolist()
    with torch.no_grad():
        layer.weight[0, 0] = 0.1
    assert layer.integers().codes[0, 0] == 5
    layer.weight = nn.Parameter(torch.zeros(3, 8))
    assert not layer.integers().codes.any()
    with pytest.raises(ValueError, match="must be int8"):
        QuantLinear(torch.zeros(3, 8), None, torch.ones(3, 1), fmt, torch.zeros(3, 8))


def _static(scaled: bool = False, group: int | None = None) -> QuantLinear:
    fmt = SiteFormat(5, 22, True, False, 8, group, 8, static=True, scaled=scaled)
    weight, bias, scales = _random(fmt)
    scale = torch.linspace(0.5, 2.0, 22) if scaled else None
    ends = (float(np.float32(-1.1)), 1.5)
    return QuantLinear(weight, bias, scales, fmt, input_scale=scale, input_range=ends).eval()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("group", [None, 8])
def test_static_activations_equal_numpy(scaled: bool, group: int | None) -> None:
    layer = _static(scaled, group)
    x = torch.randn(2, 3, 22, generator=torch.Generator().manual_seed(1))
    seen = x.numpy() * (layer.input_scale.numpy() if scaled else np.float32(1))
    low, high = layer.input_range
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(seen / scale) + zero, 0, 255)
    assert codes.min() == 0
    assert codes.max() == 255
    weight = layer.integers().codes.double() * layer.integers().scales.double()[:, None]
    emulated = (codes - zero) * np.float64(scale)
    if group is None:
        expected = emulated @ weight.numpy().T + layer.bias.detach().numpy()
        with torch.no_grad():
            np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    expected = emulated @ layer.dequantised().double().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-4, atol=1e-4)


def test_static_gradient_stops_where_inputs_are_clipped() -> None:
    fmt = SiteFormat(1, 3, False, False, 8, None, 8, static=True)
    layer = QuantLinear(
        torch.ones(1, 3), None, torch.full((1, 1), 0.01), fmt, input_range=(0.0, 2.0)
    )
    x = torch.tensor([[1.0, 5.0, -1.0]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 0.0]]
    with torch.no_grad():
        assert not torch.isfinite(layer(torch.tensor([[1.0, float("nan"), 0.0]]))).any()


def test_what_is_known_of_inputs_is_kept(tmp_path: Path) -> None:
    layer = _static(scaled=True)
    x = torch.randn(4, 22)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
        other = _static(scaled=True)
        other.input_scale.mul_(3.0)
        other.range_ends.mul_(2.0)
        assert not torch.equal(other(x), expected)
        save_model(layer, str(tmp_path / "layer.safetensors"))
        load_model(other, str(tmp_path / "layer.safetensors"))
        assert torch.equal(other(x), expected)
        assert other.input_range == layer.input_range


@pytest.mark.parametrize(
    ("format", "given", "message"),
    [
        ({"static": True}, {}, "do not fit"),
        ({}, {"input_range": (0.0, 1.0)}, "do not fit"),
        ({"scaled": True}, {}, "do not fit"),
        ({"scaled": True}, {"input_scale": torch.ones(3)}, "must be float32"),
        ({"static": True}, {"input_range": (0.1, 1.0)}, "float32 values"),
        ({"static": True, "activation_bits": 32}, {}, "needs 8-bit activations"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(format: dict, given: dict, message: str) -> None:
    fmt = SiteFormat(2, 4, False, weight_bits=8, **{"activation_bits": 8, **format})
    with pytest.raises(ValueError, match=message):
        QuantLinear(torch.zeros(2, 4), None, torch.ones(2, 1), fmt, **given)
