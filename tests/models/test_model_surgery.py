"""Surgery against zeroing by hand, for every layout."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from model_examples import EXAMPLES, Example, logits
from reduced import group_heads, keep_heads, keep_width
from torch import nn

from autocomp.core.unit import SiteFormat, Unit, dense_format
from autocomp.models.layouts import LAYOUTS
from autocomp.models.modules import QuantEmbedding, QuantLinear, Skip
from autocomp.models.surgery import blocks, copy_for_surgery, install, skip, unit_modules


@dataclass
class State:
    """What `install` reads of an operator's site state."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    format: SiteFormat
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_range: tuple[float, float] | None = None
    kept_rows: torch.Tensor | None = None
    row_of: torch.Tensor | None = None
    mixer: None = None
    mask: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None


def _dense_state(model: nn.Module, unit: Unit) -> dict[str, State]:
    return {
        name: State(
            model.get_submodule(name).weight.detach(),
            None if not fmt.bias else model.get_submodule(name).bias.detach(),
            fmt,
        )
        for name, fmt in dense_format(unit).items()
    }


def _quantised_state(model: nn.Module, unit: Unit, bits: int = 8) -> dict[str, State]:
    high = 127 if bits == 8 else 7
    states = _dense_state(model, unit)
    for state in states.values():
        scales = state.weight.abs().amax(1, keepdim=True) / high
        state.codes = (state.weight / scales).round().clamp(-high, high).to(torch.int8)
        state.scales = scales
        state.weight = state.codes * scales
        state.format = replace(state.format, weight_bits=bits)
    return states


@pytest.fixture(params=sorted(LAYOUTS))
def example(request: pytest.FixtureRequest) -> Example:
    """Every layout must have an example; a missing one is a KeyError here."""
    return EXAMPLES[request.param]


def _unit(example: Example, name: str) -> Unit:
    return next(unit for unit in example.units() if unit.name == name)


def test_copy_shares_storage_and_protects_the_original(example: Example) -> None:
    model = example.model()
    before = logits(model, example.inputs())
    names = {name: p.data_ptr() for name, p in model.named_parameters()}
    config = copy.deepcopy(model.config)
    twin = copy_for_surgery(model)
    assert {name: p.data_ptr() for name, p in twin.named_parameters()} == names
    assert [b.data_ptr() for b in twin.buffers()] == [b.data_ptr() for b in model.buffers()]
    assert torch.equal(logits(twin, example.inputs()), before)
    for unit in example.units():
        if unit.kind == "ffn":
            keep_width(twin, unit, [0, 1])
        elif unit.kind == "attention":
            skip(twin, unit)
        else:
            install(twin, unit, _quantised_state(model, unit, bits=4))
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    assert not torch.equal(logits(twin, example.inputs()), before)
    assert torch.equal(logits(model, example.inputs()), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config.to_dict()


def test_everything_kept_changes_nothing(example: Example) -> None:
    model = example.model()
    before = logits(model, example.inputs())
    twin = copy_for_surgery(model)
    for unit in example.units():
        if unit.kind == "attention":
            assert keep_heads(twin, unit, range(unit.heads)) == unit
        elif unit.kind == "ffn":
            assert keep_width(twin, unit, range(unit.width)) == unit
    assert torch.equal(logits(twin, example.inputs()), before)
    for unit in example.units():
        install(twin, unit, _dense_state(model, unit))
    assert torch.equal(logits(twin, example.inputs()), before)


def test_kept_heads_equal_zeroed_output_columns(example: Example) -> None:
    unit = _unit(example, "layers.1.attention")
    kept = group_heads(unit, [unit.kv_heads - 1, 0])
    model = example.model()
    twin = copy_for_surgery(model)
    smaller = keep_heads(twin, unit, kept)
    output = model.get_submodule(unit.site("output").name)
    with torch.no_grad():
        columns = output.weight.view(output.out_features, unit.heads, unit.head_dim)
        dropped = [head for head in range(unit.heads) if head not in kept]
        columns[:, dropped] = 0
    expected = logits(model, example.inputs())
    torch.testing.assert_close(logits(twin, example.inputs()), expected, rtol=1e-4, atol=1e-4)
    assert (smaller.heads, smaller.kv_heads) == (len(kept), 2)
    assert smaller.parameters < unit.parameters
    again = keep_heads(twin, smaller, group_heads(smaller, [1]))  # units follow the model
    assert again.kv_heads == 1
    logits(twin, example.inputs())


def test_kept_width_equals_zeroed_channels(example: Example) -> None:
    unit = _unit(example, "layers.2.ffn")
    kept = [7, 3, 30, 12]
    model = example.model()
    twin = copy_for_surgery(model)
    smaller = keep_width(twin, unit, kept)
    down = model.get_submodule(unit.site("down").name)
    with torch.no_grad():
        down.weight[:, [c for c in range(unit.width) if c not in kept]] = 0
    expected = logits(model, example.inputs())
    torch.testing.assert_close(logits(twin, example.inputs()), expected, rtol=1e-4, atol=1e-4)
    assert smaller.width == 4
    assert smaller.site("down").columns == 4


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("layer", [0, 2])
def test_skipping_equals_zeroing_the_last_linear(example: Example, kind: str, layer: int) -> None:
    unit = _unit(example, f"layers.{layer}.{kind}")
    model = example.model()
    twin = copy_for_surgery(model)
    assert list(unit_modules(twin, unit)) == [site.name for site in unit.sites]
    install(twin, unit, {})
    last = model.get_submodule(unit.sites[-1].name)
    with torch.no_grad():
        last.weight.zero_()
        if last.bias is not None:
            last.bias.zero_()
    expected = logits(model, example.inputs())
    torch.testing.assert_close(logits(twin, example.inputs()), expected, rtol=1e-5, atol=1e-5)
    assert unit_modules(twin, unit) == {}
    assert any(isinstance(module, Skip) for module in twin.modules())
    with pytest.raises(ValueError, match="was skipped"):
        install(twin, unit, _dense_state(example.model(), unit))
    twin.train()
    twin(**example.inputs()).logits.sum().backward()  # trains without the sublayer


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_all_sublayers_skipped_leave_embeddings_and_head(name: str) -> None:
    example = EXAMPLES[name]
    model = example.model()
    for unit in example.units():
        if unit.skippable:
            skip(model, unit)
    assert torch.isfinite(logits(model, example.inputs())).all()


def test_installed_codes_act_as_their_dequantised_weights(example: Example) -> None:
    model = example.model()
    twin, by_hand = copy_for_surgery(model), copy.deepcopy(model)
    for unit in example.units():
        states = _quantised_state(model, unit, bits=4 if unit.kind == "ffn" else 8)
        install(twin, unit, states)
        for name, state in states.items():
            by_hand.get_submodule(name).weight = nn.Parameter(state.weight)
    expected = logits(by_hand, example.inputs())
    assert torch.equal(logits(twin, example.inputs()), expected)
    for unit in example.units():
        for name, module in unit_modules(twin, unit).items():
            table = dense_format(unit)[name].embedding
            assert isinstance(module, QuantEmbedding if table else QuantLinear)
            assert not module.training
    assert torch.equal(logits(copy.deepcopy(twin), example.inputs()), expected)


def test_installed_model_trains_without_touching_its_source(example: Example) -> None:
    model = example.model()
    before = logits(model, example.inputs())
    twin = copy_for_surgery(model)
    for unit in example.units():
        install(twin, unit, _quantised_state(model, unit))
    student = copy.deepcopy(twin).train()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    student(**example.inputs()).logits.square().mean().backward()
    optimiser.step()
    assert torch.equal(logits(model, example.inputs()), before)
    weights = zip(student.parameters(), twin.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_blocks_hold_the_units(example: Example) -> None:
    model = example.model()
    found = blocks(model)
    assert len(found) == 3
    for unit in example.units():
        if unit.layer is None:
            assert unit.kind in ("embedding", "head")
            continue
        inside = set(found[unit.layer].modules())
        assert all(module in inside for module in unit_modules(model, unit).values())


def test_impossible_surgery_is_refused() -> None:
    example = EXAMPLES["bert"]
    model = example.model()
    ffn = _unit(example, "layers.0.ffn")
    with pytest.raises(ValueError, match="cannot be skipped"):
        skip(model, _unit(example, "head"))
    with pytest.raises(ValueError, match="has sites"):
        install(model, ffn, {"elsewhere": _dense_state(model, ffn)[ffn.sites[0].name]})


@pytest.mark.parametrize("installed", [0, -1])
def test_installing_one_of_a_tied_pair_leaves_the_other_dense(installed: int) -> None:
    example = EXAMPLES["llama"]
    model = example.model(tie_word_embeddings=True)
    units = example.units(tie_word_embeddings=True)
    assert units[-1].tied_to == "embeddings"
    unit, other = units[installed], units[-1 if installed == 0 else 0]
    twin = copy_for_surgery(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    install(twin, unit, _quantised_state(model, unit, bits=4))
    kept = twin.get_submodule(other.sites[0].name).weight
    assert torch.equal(kept, model.lm_head.weight)
    assert kept is not twin.get_submodule(unit.sites[0].name).weight
    assert not twin.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    untied = copy.deepcopy(model)
    untied.get_submodule(unit.sites[0].name).weight = nn.Parameter(
        twin.get_submodule(unit.sites[0].name).dequantised()
    )
    assert torch.equal(logits(twin, example.inputs()), logits(untied, example.inputs()))
