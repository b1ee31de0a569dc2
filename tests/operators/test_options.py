"""The product of a rule's choices at a unit: counts, order, canonical form, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import UserError
from autocomp.core.unit import SiteFormat
from autocomp.operators import family, option_formats, rule_of, unit_options
from autocomp.operators.protocol import Rule
from autocomp.spec.space import RuleSection
from autocomp.testing.operator_examples import attention, embedding, ffn, head


def labels(options: list[Option]) -> list[str]:
    return [option.label() for option in options]


def rule(**section: Any) -> Rule:
    return rule_of(RuleSection.model_validate({"match": "*", **section}))


def test_product_of_structure_and_bits_dense_first_skip_alone() -> None:
    options = unit_options(
        ffn(),
        rule(
            structure={"width": [0.67, 1.0, 0.34], "skip": True},
            bits={"method": "gptq", "weights": [4, "dense"], "group": 16},
        ),
    )
    assert labels(options) == [
        "dense",
        "gptq activations=32 group=16 weights=4",
        "width keep=64",
        "width keep=64 + gptq activations=32 group=16 weights=4",
        "width keep=32",
        "width keep=32 + gptq activations=32 group=16 weights=4",
        "skip",
    ]
    assert options[0].dense
    assert len({option.key for option in options}) == len(options)


def test_dense_weights_ignore_activations() -> None:
    options = unit_options(
        head(), rule(bits={"method": "rtn", "weights": ["dense", 8], "activations": ["dense", 8]})
    )
    assert labels(options) == [
        "dense",
        "rtn activations=32 group=0 weights=8",
        "rtn activations=8 group=0 weights=8",
    ]


def test_a_rule_without_wishes_leaves_every_unit_dense() -> None:
    for unit in (attention(), ffn(), embedding(), head()):
        assert unit_options(unit, rule()) == [Option()]


def test_what_must_be_reduced_is_not_offered_whole() -> None:
    options = unit_options(attention(), rule(structure={"heads": [0.5], "skip": True}))
    assert labels(options) == ["heads keep=2", "skip"]


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ({"heads": [1.0, 0.5], "rank": [0.5]}, ["dense", "heads keep=2", "rank ratio=0.5"]),
        ({"heads": [0.5], "rank": [1.0, 0.5]}, ["dense", "heads keep=2", "rank ratio=0.5"]),
        ({"heads": [0.5], "rank": [0.5]}, ["heads keep=2", "rank ratio=0.5"]),
        ({"rank": [0.5], "skip": True}, ["rank ratio=0.5", "skip"]),
        ({"heads": [1.0], "rank": [0.5], "skip": True}, ["dense", "rank ratio=0.5", "skip"]),
        ({"skip": True}, ["dense", "skip"]),
    ],
)
def test_one_listed_whole_offers_the_unit_as_it_is(
    structure: dict[str, Any], expected: list[str]
) -> None:
    assert labels(unit_options(attention(), rule(structure=structure))) == expected


def test_fractions_of_another_kind_of_unit_have_no_say() -> None:
    """The rule's width of 1.0 is the feed-forward's: attention must still be pruned."""
    both = rule(structure={"heads": [0.5], "width": [1.0, 0.67]})
    assert labels(unit_options(attention(), both)) == ["heads keep=2"]
    assert labels(unit_options(ffn(), both)) == ["dense", "width keep=64"]


def test_names_are_switches() -> None:
    """A choice that lists names (`replace: [retention]`) adds alternatives and requires none."""
    named = Rule(structure={"skip": ["a", "name"]})
    assert labels(unit_options(attention(), named)) == ["dense", "skip"]


def test_two_methods_are_alternatives() -> None:
    options = unit_options(head(), rule(bits={"method": ["gptq", "rtn"], "weights": ["dense", 8]}))
    assert [len(option.steps) for option in options] == [0, 1, 1]


@pytest.mark.parametrize(
    ("kv_heads", "fractions", "expected"),
    [
        (4, [1.0, 0.75, 0.5, 0.25], [None, 3, 2, 1]),
        (4, [0.01, 0.1], [1]),
        (2, [1.0, 0.6, 0.3], [None, 2]),
        (1, [0.5], [None]),
    ],
)
def test_heads_are_kept_in_whole_groups(
    kv_heads: int, fractions: list[float], expected: list[int | None]
) -> None:
    options = unit_options(attention(kv_heads=kv_heads), rule(structure={"heads": fractions}))
    found = [None if option.dense else option.steps[0]["keep"] for option in options]
    assert found == expected


def test_widths_are_multiples_of_32() -> None:
    options = unit_options(ffn(), rule(structure={"width": [0.9, 0.6, 0.5, 0.1]}))
    assert [option.steps[0]["keep"] for option in options if not option.dense] == [64, 32]


def test_formats_of_a_pruned_and_quantised_unit() -> None:
    unit = attention(kv_heads=2)
    option = Option((Step.of("heads", keep=2), Step.of("gptq", weights=4, activations=8, group=16)))
    formats = list(option_formats(unit, option).values())
    fourbit = {"bias": True, "weight_bits": 4, "group": 16, "activation_bits": 8}
    assert formats == [
        SiteFormat(16, 24, **fourbit),
        SiteFormat(8, 24, **fourbit),
        SiteFormat(8, 24, **fourbit),
        SiteFormat(24, 16, **fourbit),
    ]


def test_a_skipped_unit_has_no_format() -> None:
    assert option_formats(ffn(), Option((Step.of("skip"),))) == {}


@pytest.mark.parametrize(
    ("unit", "section", "message"),
    [
        (ffn(), {"structure": {"heads": [0.5]}}, "no heads; write width"),
        (attention(), {"structure": {"width": [0.5]}}, "no inner width; write heads"),
        (embedding(), {"structure": {"skip": True}}, "cannot be skipped"),
        (embedding(), {"bits": {"weights": [8]}}, "Allowed there: rtn"),
        (head(), {"bits": {"weights": [5]}}, "Allowed: dense, 8, 4, 3, 2"),
        (head(), {"bits": {"weights": [8], "activations": [4]}}, "Allowed: dense, 8"),
        (head(), {"bits": {"weights": [4], "group": 33}}, "power of two"),
        (head(), {"bits": {"weights": [4], "group": [32, 33]}}, "group 33 is not .* list of these"),
        (head(), {"bits": {"weights": [4], "group": []}}, r"group \[\] is not supported"),
        (head(), {"bits": {"method": "gptqq", "weights": [8]}}, "Did you mean 'gptq'"),
        (
            head(),
            {"bits": {"method": "heads", "weights": [8]}},
            "Allowed in bits: awq, awq_gptq, gptq, hqq",
        ),
    ],
)
def test_choices_that_make_no_sense(unit: Any, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unit_options(unit, rule(**section))


def test_four_bits_with_a_scale_per_row() -> None:
    (option,) = unit_options(head(), rule(bits={"weights": [4], "group": 0}))
    assert option.label() == "gptq activations=32 group=0 weights=4"
    assert option_formats(head(), option)["classifier"].group is None


def test_each_group_of_a_list_below_8_bits() -> None:
    options = unit_options(head(), rule(bits={"weights": [8, 4, 3], "group": [32, 0, 32]}))
    assert labels(options) == [
        "gptq activations=32 group=0 weights=8",
        "gptq activations=32 group=32 weights=4",
        "gptq activations=32 group=0 weights=4",
        "gptq activations=32 group=32 weights=3",
        "gptq activations=32 group=0 weights=3",
    ]


def test_a_family_is_told_by_all_but_how_coarse_its_weights_are() -> None:
    plain = Option((Step.of("gptq", weights=4, activations=32, group=16),))
    sparse = Option((Step.of("wanda", level=0.5), *plain.steps))
    spared = Option(
        (Step.of("rtn", weights=4, activations=32, group=0, spare="up", spare_weights=8),)
    )
    assert {family(one) for one in (Option(), plain, sparse, spared)} == {Option()}
    rounded = Option((Step.of("gptq", weights=4, activations=8, group=16),))
    static = Option((Step.of("gptq", weights=8, activations=8, group=0, range="mse"),))
    shaped = Option((Step.of("width", keep=32), *sparse.steps))
    merged = Option((Step.of("tome", ratio=0.1), *rounded.steps))
    cached = Option((*plain.steps, Step.of("kv_cache", bits=8)))
    skipped = Option((Step.of("skip"),))
    found = [family(one) for one in (plain, rounded, static, shaped, merged, cached, skipped)]
    assert len(set(found)) == 7
    assert found[3] == Option((Step.of("width", keep=32),))
    assert found[5] == Option((Step.of("kv_cache", bits=8),))
    assert found[6] == skipped


def test_one_rule_for_both_kinds_of_sublayer() -> None:
    both = rule(structure={"heads": [0.5], "width": [0.67]})
    assert labels(unit_options(attention(), both)) == ["heads keep=2"]
    assert labels(unit_options(ffn(), both)) == ["width keep=64"]


def test_checking_a_spec_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from autocomp.core.unit import Site, Unit\n"
        "from autocomp.operators import option_formats, unit_options\n"
        "from autocomp.operators.protocol import Rule\n"
        "unit = Unit('f', 'ffn', (Site('u', 'up', 64, 8, True), Site('d', 'down', 8, 64, True)),"
        " width=64, skippable=True)\n"
        "rule = Rule({'width': [0.5], 'skip': True}, {'method': ['gptq', 'rtn'], 'weights': [4]})\n"
        "assert all(option_formats(unit, o) is not None for o in unit_options(unit, rule))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
