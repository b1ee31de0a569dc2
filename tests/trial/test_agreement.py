"""The check that an artifact is the trained model: rounding passes, a wrong export does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autocomp.core.unit import SiteFormat
from autocomp.models.modules import QuantLinear
from autocomp.models.surgery import replace_module
from autocomp.trial.agreement import TOLERANCE, disagreement, slightly_changed


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def quantise(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            weight = module.weight.detach()
            rows, columns = weight.shape
            spec = SiteFormat(rows, columns, False, False, 8, None, 8)
            scales = weight.abs().amax(1, keepdim=True) / 127
            replace_module(model, name, QuantLinear(weight, None, scales, spec).eval())


@torch.no_grad()
def logits(model: Any) -> list[np.ndarray[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 50, (1, 9), generator=generator) for _ in range(3)]
    return [model(input_ids=x, use_cache=False).logits.numpy() for x in ids]


def test_a_float_model_is_steady(model):
    expected = logits(model)
    with slightly_changed(model):
        nudged = logits(model)
    assert any((a != b).any() for a, b in zip(expected, nudged, strict=True))
    found, allowed = disagreement(expected, expected, nudged)
    assert found == 0
    assert allowed == pytest.approx(TOLERANCE, rel=1e-2)
    again = logits(model)  # the hook is gone
    assert all((a == b).all() for a, b in zip(expected, again, strict=True))


def test_rounding_is_allowed_and_a_wrong_model_is_not(model):
    quantise(model)
    expected = logits(model)
    with slightly_changed(model):
        nudged = logits(model)
    with slightly_changed(model), slightly_changed(model), slightly_changed(model):
        other = logits(model)  # rounds otherwise, as a runtime would
    found, allowed = disagreement(other, expected, nudged)
    assert 0 < found <= allowed
    assert allowed > TOLERANCE
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    found, allowed = disagreement(logits(model), expected, nudged)
    assert found > 2 * allowed
