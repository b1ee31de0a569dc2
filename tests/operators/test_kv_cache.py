"""Scales of an 8-bit cache against rotations tried out; where it is offered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import UserError
from autocomp.core.unit import Unit
from autocomp.operators import apply_option, option_formats, rule_of, unit_options
from autocomp.operators.quantize.kv_cache import channel_scales
from autocomp.spec.space import RuleSection
from autocomp.testing.operator_examples import attention, example_state, example_stats, ffn, head

CACHE = Step.of("kv_cache", bits=8)


def labels(unit: Unit, **section: Any) -> list[str]:
    rule = rule_of(RuleSection.model_validate({"match": "*", **section}))
    return [option.label() for option in unit_options(unit, rule)]


def test_no_rotation_leaves_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 3 * 8, generator=generator)
    scale = channel_scales(keys, 8, rotated=True)
    largest = torch.zeros(24)
    for angle in torch.linspace(0, 6.3, 400):
        first, second = keys.reshape(200, 3, 2, 4).unbind(2)
        turned = torch.stack(
            [
                first * angle.cos() - second * angle.sin(),
                first * angle.sin() + second * angle.cos(),
            ],
            dim=2,
        )
        largest = torch.maximum(largest, turned.reshape(200, 24).abs().amax(0))
    assert (largest <= 127 * scale * 1.00001).all()
    assert (largest >= 126.9 * scale).all()  # and no scale is larger than it must be


def test_values_have_the_scale_of_their_largest() -> None:
    unit = attention(kv_heads=2)
    state, stats = example_state(unit), example_stats(unit)
    after = apply_option(unit, state, Option((CACHE,)), stats)
    value = next(site.name for site in unit.sites if site.role == "value")
    here, sample = state[value], stats[value].sample
    assert here.bias is not None
    assert sample is not None
    made = sample.double() @ here.weight.double().t() + here.bias.double()
    scale = after[value].output_scale
    assert scale is not None
    torch.testing.assert_close(scale, (made.abs().amax(0) / 127).float())
    assert all(torch.equal(after[name].weight, state[name].weight) for name in state)


def test_it_is_a_choice_of_its_own_behind_all_others() -> None:
    bits = {"weights": ["dense", 8], "cache": ["dense", 8]}
    found = labels(attention(), structure={"skip": True}, bits=bits)
    gptq = "gptq activations=32 group=0 weights=8"
    assert found == [
        "dense",
        "kv_cache bits=8",
        gptq,
        f"{gptq} + kv_cache bits=8",
        "skip",
    ]
    assert labels(attention(), bits={"cache": [8]}) == ["kv_cache bits=8"]
    assert labels(attention(), bits={"cache": ["dense"]}) == ["dense"]


def test_the_second_of_two_factors_makes_what_is_cached() -> None:
    unit = attention()
    option = Option((Step.of("rank", ratio=0.6), CACHE))
    formats = option_formats(unit, option)
    rounded = {name for name, form in formats.items() if form.cache_bits == 8}
    assert rounded == {f"{unit.name}.key.second", f"{unit.name}.value.second"}
    after = apply_option(unit, example_state(unit), option, example_stats(unit))
    assert {name for name, site in after.items() if site.output_scale is not None} == rounded


@pytest.mark.parametrize(
    ("unit", "choices", "message"),
    [
        (attention(), [4], "Allowed: dense, 8"),
        (ffn(), ["dense", 8], "caches nothing"),
        (head(), [8], "layers.\\*.attention only"),
        (replace(attention(), plain_keys=False), [8], "norms its keys"),
    ],
)
def test_what_makes_no_sense(unit: Unit, choices: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels(unit, bits={"cache": choices})
