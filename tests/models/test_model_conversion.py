"""Turned and fused layers: the model is the same taken apart, and the same put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_examples import EXAMPLES, logits
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from autocomp.models.conversion import Projections, as_transformers, save_model, to_linear
from autocomp.models.load import load_model
from autocomp.models.surgery import replace_module, skip


def _native() -> nn.Module:
    """transformers' own GPT-2, never converted."""
    torch.manual_seed(3)
    config = EXAMPLES["gpt2"].full_config()
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    for parameter in dict.fromkeys(model.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return model


def _kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def test_taken_apart_it_computes_the_same() -> None:
    model, inputs = _native(), EXAMPLES["gpt2"].inputs()
    expected = logits(model, inputs)
    to_linear(model)
    assert "Conv1D" not in _kinds(model)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    again = [id(module) for module in model.modules()]
    to_linear(model)
    assert [id(module) for module in model.modules()] == again


def test_saved_it_is_what_transformers_saves(tmp_path: Path) -> None:
    model = _native()
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", "language-modeling")
    assert "Projections" in _kinds(loaded)
    save_model(loaded, tmp_path / "ours")
    assert "Projections" in _kinds(loaded)  # saving leaves the model as it was
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    inputs = EXAMPLES["gpt2"].inputs()
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs))


def test_trained_parts_are_what_is_saved(tmp_path: Path) -> None:
    model = EXAMPLES["gpt2"].model()
    part: Any = model.get_submodule("transformer.h.1.attn.c_attn.value")
    with torch.no_grad():
        part.weight[2, 5] = 7.0
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    assert stored[5, 2 * 24 + 2] == 7.0


def test_only_dense_models_are_saved() -> None:
    bert = EXAMPLES["bert"].model()
    assert as_transformers(bert) is bert
    model = EXAMPLES["gpt2"].model()
    skip(model, EXAMPLES["gpt2"].units()[1])
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn was skipped"):
        as_transformers(model)
    model = EXAMPLES["gpt2"].model()
    replace_module(model, "transformer.h.1.mlp.c_fc", nn.Identity())
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc is Identity"):
        as_transformers(model)


def test_parts_run_one_after_another() -> None:
    torch.manual_seed(0)
    fused = Conv1D(6, 4)
    weight, bias = fused.weight.t(), fused.bias
    parts: dict[str, nn.Module] = {}
    for name, rows in (("a", slice(0, 2)), ("b", slice(2, 6))):
        parts[name] = nn.Linear(4, rows.stop - rows.start)
        parts[name].weight, parts[name].bias = (
            nn.Parameter(weight[rows].detach()),
            nn.Parameter(bias[rows].detach()),
        )
    x = torch.randn(2, 3, 4)
    first, second = Projections(parts)(x).split(3, dim=2)
    torch.testing.assert_close(torch.cat([first, second], dim=2), fused(x))
