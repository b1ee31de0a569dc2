"""Masks hold in training: what is zero has no gradient and stays zero, float and quantised."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from autocomp.core.candidate import Option, Step
from autocomp.core.unit import SiteFormat
from autocomp.models.modules import QuantLinear
from autocomp.models.sparse import SparseLinear
from autocomp.models.surgery import install
from autocomp.operators import apply_option
from autocomp.testing.operator_examples import example_state, example_stats, head

FORMAT = SiteFormat(6, 16, True, nonzeros=48)


def sparse_layer(kind: str) -> SparseLinear | QuantLinear:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(6, 16, dtype=torch.bool)
    mask[:, ::2] = True
    weight = torch.randn(6, 16, generator=generator) * mask
    bias = torch.randn(6, generator=generator)
    if kind == "float":
        return SparseLinear(weight, bias, mask, FORMAT)
    bits, activations = (8, 8) if kind == "int8" else (4, 32)
    group = None if bits == 8 else 8
    scales = torch.full((6, 1 if group is None else 2), 2.5 / (1 << (bits - 1)))
    spec = replace(FORMAT, weight_bits=bits, group=group, activation_bits=activations)
    return QuantLinear(weight, bias, scales, spec, mask=mask)


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_zeros_stay_zero_and_the_rest_trains(kind: str) -> None:
    layer = sparse_layer(kind)
    before = layer.weight.detach().clone()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0, fused=True)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    target = x @ torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert not layer.weight.grad[~layer.mask].any()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert not layer.weight[~layer.mask].any()
    changed = layer.weight.detach() != before
    assert changed[layer.mask].float().mean() > 0.9
    if isinstance(layer, QuantLinear):
        assert not layer.codes()[~layer.mask].any()


@pytest.mark.parametrize("kind", ["float", "int4"])
def test_the_gradient_within_the_mask_is_that_of_a_dense_layer(kind: str) -> None:
    layer = sparse_layer(kind)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    outputs = layer(x).detach()
    full = (2 * outputs).t() @ x
    inside = layer.mask.clone()
    if isinstance(layer, QuantLinear):
        steps = layer.scales.repeat_interleave(8, dim=1)
        inside &= (layer.weight >= -8.5 * steps) & (layer.weight <= 7.5 * steps)
    torch.testing.assert_close(layer.weight.grad, full * inside)


def test_a_copy_and_its_file_keep_the_mask() -> None:
    layer = sparse_layer("float")
    other = copy.deepcopy(layer)
    assert torch.equal(other.mask, layer.mask)
    assert other.mask.data_ptr() != layer.mask.data_ptr()
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}
    x = torch.randn(2, 16)
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    np.testing.assert_allclose(layer(x).detach(), expected.detach(), atol=1e-5)


def test_install_makes_the_layer_the_state_describes() -> None:
    unit = head()
    state, stats = example_state(unit), example_stats(unit)
    bits = Step.of("gptq", weights=4, activations=32, group=16)
    for steps in ((), (bits,)):
        option = Option((Step.of("sparsegpt", level="2:4"), *steps))
        after = apply_option(unit, state, option, stats)
        site = after["classifier"]
        model = nn.Module()
        model.config, model.classifier = SimpleNamespace(), nn.Linear(24, 3)
        install(model, unit, after)
        layer = model.classifier
        assert isinstance(layer, QuantLinear if steps else SparseLinear)
        assert torch.equal(layer.mask, site.mask)
        assert layer.weight.data_ptr() == site.weight.data_ptr()


@pytest.mark.parametrize(
    ("mask", "spec", "message"),
    [
        (None, FORMAT, "needs a mask"),
        (torch.ones(6, 16, dtype=torch.bool), replace(FORMAT, nonzeros=None), "has none"),
        (torch.ones(6, 15, dtype=torch.bool), FORMAT, r"must be bool \(6, 16\)"),
        (torch.ones(6, 16), FORMAT, "mask torch.float32"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    mask: torch.Tensor | None, spec: SiteFormat, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(torch.zeros(6, 16), torch.zeros(6), mask, spec)  # type: ignore[arg-type]
    quantised = replace(spec, weight_bits=8)
    with pytest.raises(ValueError, match=message):
        QuantLinear(torch.zeros(6, 16), torch.zeros(6), torch.ones(6, 1), quantised, mask=mask)
