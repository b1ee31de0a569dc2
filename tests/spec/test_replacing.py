"""`structure: {replace: [...], at_most: N}` in a spec, and what operators and search get of it."""

import pytest

from autocomp.core.errors import SpecError
from autocomp.operators import rule_of
from autocomp.spec.loader import load_spec

OLD = "structure: {heads: [1.0, 0.5], skip: true}"


def structure(write, text):
    return load_spec(write((OLD, f"structure: {text}"))).spec.space[0]


def test_names_reach_the_operator_and_the_cap_does_not(write):
    rule = structure(write, "{replace: [elu, retention], at_most: 3}")
    assert rule.structure.at_most == 3
    assert rule_of(rule).structure == {"replace": ["elu", "retention"]}
    assert structure(write, "{skip: true}").structure.replace is None


def test_at_most_none_of_them_is_none(write):
    assert rule_of(structure(write, "{replace: [elu], at_most: 0}")).structure == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{at_most: 2}", "at_most caps how many units are replaced, and nothing replaces any"),
        ("{replace: [elu], at_most: -1}", "at_most"),
        ("{replace: [elu], at_most: 1.5}", "at_most"),
        ("{replace: []}", "replace"),
    ],
)
def test_says_what_is_wrong(write, text, message):
    with pytest.raises(SpecError, match=message):
        structure(write, text)
