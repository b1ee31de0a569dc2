"""The copy a study keeps equals the spec; differences are named by path."""

import pytest

from autocomp.spec.difference import dump_spec, spec_diff
from autocomp.spec.loader import load_spec, load_stored_spec


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "model.revision": "1e5",
            "task.data.label": "no",
            "task.data.text": "12",
            "task.name": "~",
        },
        {"distill.lr": {"low": 1e-7, "high": 1e-5}, "task.data.subset": "2:4", "budget.quality": 1},
        {"task.data.split": "µ: [x]", "task.data.image": "", "model.source": "a#b: 'c'"},
    ],
)
def test_a_dump_loads_to_an_equal_spec(write, tmp_path, overrides):
    spec = load_spec(write(), overrides).spec
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_spec(spec), encoding="utf-8")
    again = load_stored_spec(copy)
    assert again == spec
    assert again.key == spec.key
    assert spec_diff(spec, again) == []


def test_differences(write):
    old = load_spec(write()).spec
    new = load_spec(
        write(),
        {
            "budget.latency": "25%",
            "budget.size": None,
            "search.trials": 7,
            "space[0].structure.heads": [1.0],
            "space[1].bits.weights": [8, 4],
        },
    ).spec
    assert spec_diff(old, new) == [
        "budget.latency: '20%' → '25%'",
        "budget.size: '12 MB' → none",
        "space[0].structure.heads: [1.0, 0.5] → [1.0]",
        "space[1].bits.weights: [8] → [8, 4]",
        "search.trials: 5 → 7",
    ]


def test_a_rule_added_or_removed(write):
    old = load_spec(write()).spec
    new = load_spec(write(("search:", "  - match: head\nsearch:"))).spec
    (added,) = spec_diff(old, new)
    assert added.startswith("space[2]: (absent) → {match: head, structure: {heads: null")
    (removed,) = spec_diff(new, old)
    assert removed.endswith(" → (absent)")
