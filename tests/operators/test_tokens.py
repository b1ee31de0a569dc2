"""Token steps: choices, refusals, and the arithmetic of how many tokens are left."""

from __future__ import annotations

import pytest

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import UserError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit, dense_format
from autocomp.operators import (
    option_formats,
    rule_of,
    sequence_lengths,
    token_reduction,
    tokens_kept,
    unit_options,
    weight_option,
)
from autocomp.operators.protocol import Rule
from autocomp.spec.space import RuleSection
from autocomp.testing.operator_examples import attention, embedding, ffn, head

BOTH = {"method": ["tome", "token_prune"], "ratios": [0.0, 0.25]}


def vision(layer: int = 0) -> Unit:
    return attention(f"layers.{layer}.attention", protected_tokens=1)


def test_steps_stand_between_structure_and_bits() -> None:
    section = RuleSection.model_validate(
        {
            "match": "*",
            "structure": {"heads": [0.5], "skip": True},
            "tokens": BOTH,
            "bits": {"method": "rtn", "weights": [8]},
        }
    )
    labels = [option.label() for option in unit_options(vision(), rule_of(section))]
    assert labels == [
        "heads keep=2 + rtn activations=32 group=0 weights=8",
        "heads keep=2 + tome ratio=0.25 + rtn activations=32 group=0 weights=8",
        "heads keep=2 + token_prune ratio=0.25 + rtn activations=32 group=0 weights=8",
        "skip",
    ]


def test_a_rule_without_tokens_offers_none() -> None:
    rule = rule_of(RuleSection.model_validate({"match": "*"}))
    assert unit_options(vision(), rule) == [Option()]


def test_weights_and_formats_stay_as_they_are() -> None:
    option = Option((Step.of("tome", ratio=0.25), Step.of("rtn", weights=8, group=0)))
    alone = Option(option.steps[:1])
    assert option_formats(vision(), alone) == dense_format(vision())
    assert weight_option(option) == Option(option.steps[1:])
    assert weight_option(alone).dense
    assert token_reduction(vision(), option) == TokenReduction("tome", 0.25, 1)
    assert token_reduction(vision(), weight_option(option)) is None


@pytest.mark.parametrize(
    ("unit", "tokens", "message"),
    [
        (ffn(), {"ratios": [0.1]}, r"tome at layers\.0\.ffn: .* behind attention sublayers only"),
        (embedding(), {"ratios": [0.1]}, "of kind embedding"),
        (head(), {"ratios": [0.0]}, "match layers"),
        (attention(), {"ratios": [0.1]}, "only models of images"),
        (vision(), {"ratios": [0.6]}, "from 0 to 0.5, not 0.6"),
        (vision(), {"method": "token_prune", "ratios": [0.97]}, "from 0 to 0.95, not 0.97"),
        (vision(), {"ratios": [0.1], "method": "rtn"}, "Allowed in tokens: "),
    ],
)
def test_what_makes_no_sense_is_refused(unit: Unit, tokens: dict, message: str) -> None:
    rule = rule_of(RuleSection.model_validate({"match": "*", "tokens": tokens}))
    with pytest.raises(UserError, match=message):
        unit_options(unit, rule)


def test_ratios_that_are_no_list_are_refused() -> None:
    with pytest.raises(UserError, match="no list of ratios"):
        unit_options(vision(), Rule(tokens={"method": "tome", "ratios": 0.1}))


@pytest.mark.parametrize(
    ("method", "ratio", "protected", "tokens", "kept"),
    [
        ("tome", 0.1, 1, 17, 16),  # 1.6 of 16 patches
        ("tome", 0.25, 1, 17, 13),
        ("tome", 0.5, 1, 18, 10),  # 17 patches: 8
        ("tome", 0.05, 1, 17, 17),
        ("tome", 0.1, 2, 198, 179),
        ("tome", 0.3, 1, 11, 8),  # 3, though 0.3 · 10 is less in floats of other orders
        ("token_prune", 0.9, 1, 17, 3),
        ("token_prune", 0.95, 1, 2, 2),  # never the last patch
        ("token_fuse", 0.25, 1, 17, 14),  # four become one
        ("token_fuse", 0.1, 1, 17, 17),  # one would become one
        ("token_fuse", 0.95, 1, 2, 2),
        ("tome", 0.5, 1, 1, 1),
    ],
)
def test_how_many_tokens_are_left(
    method: str, ratio: float, protected: int, tokens: int, kept: int
) -> None:
    unit = attention(protected_tokens=protected)
    assert tokens_kept(unit, Step.of(method, ratio=ratio), tokens) == kept


def test_each_unit_sees_what_those_before_it_left() -> None:
    units = [vision(0), ffn("layers.0.ffn"), vision(1), ffn("layers.1.ffn"), head()]
    options = {
        "layers.0.attention": Option((Step.of("heads", keep=2), Step.of("tome", ratio=0.25))),
        "layers.0.ffn": Option((Step.of("skip"),)),
        "layers.1.attention": Option((Step.of("token_prune", ratio=0.5),)),
    }
    seen = sequence_lengths(units, options, 17)
    assert list(seen.values()) == [17, 13, 13, 7, 7]
    assert set(sequence_lengths(units, {}, 17).values()) == {17}
