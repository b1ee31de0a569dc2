"""Models by hand are what their recipes say, from options of the space."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from model_examples import EXAMPLES

from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.core.measurement import Measurement
from autocomp.operators import unit_options
from autocomp.operators.protocol import Rule
from autocomp.spec.schema import Spec
from autocomp.study.records import TrialRecord
from benchmarks.pipeline import _fixed, _volumes
from benchmarks.rivals import Recipe, _proposals, candidate_of
from benchmarks.rivals_tables import proposals

BITS = {"method": "gptq", "weights": ["dense", 8, 4], "activations": ["dense", 8], "group": 16}
RULES = {
    "attention": Rule({"heads": [1.0, 0.5], "skip": True}, BITS),
    "ffn": Rule({"width": [1.0, 0.5], "skip": True}, BITS),
    "embedding": Rule({}, {"method": "rtn", "weights": ["dense", 8, 4], "group": 16}),
    "head": Rule({}, {"method": "gptq", "weights": [8], "activations": [8]}),
}
SETTINGS = Distillation(tokens=100)


def made(recipe: Recipe) -> dict[str, dict[str, Any]]:
    units = EXAMPLES["bert"].units()
    options = {unit.name: unit_options(unit, RULES[unit.kind]) for unit in units}
    candidate = candidate_of(recipe, units, options, SETTINGS)
    assert candidate.distillation == SETTINGS
    return {name: option.to_json() for name, option in candidate}


def test_layers_are_dropped_and_the_others_narrowed() -> None:
    found = made(Recipe(layers=(0, 2), width=0.5, table=4))
    assert found["layers.1.attention"] == found["layers.1.ffn"] == {"skip": {}}
    assert list(found["layers.0.attention"]) == ["gptq"]
    assert list(found["layers.2.ffn"]) == ["width", "gptq"]
    assert found["layers.2.ffn"]["gptq"]["weights"] == 8
    assert found["layers.2.ffn"]["gptq"]["activations"] == 8
    assert found["embeddings"]["rtn"]["weights"] == 4


def test_every_layer_is_pruned_and_quantised_alike() -> None:
    found = made(Recipe(heads=0.5, width=0.5, bits=4))
    for name, option in found.items():
        if name.startswith("layers."):
            assert list(option) == ["heads" if "attention" in name else "width", "gptq"]
            assert option["gptq"]["weights"] == 4


def test_what_came_of_each_way_of_proposing() -> None:
    def trial(id: str, way: str, kl: float | None, latency_ms: float = 1.0) -> TrialRecord:
        state: Any = "pruned" if kl is None else "complete"
        cost = Measurement("measured", latency_ms, 10)
        candidate = Candidate.of({"a": Option()})
        return TrialRecord(
            id, "search", way, state, candidate, quality=0.9, teacher_kl=kl, measured=cost
        )

    found = [
        trial("a", "milp", None),
        trial("b", "milp", 0.2, 2.0),
        trial("c", "milp", 0.1),
        trial("d", "gain", None),
    ]
    rows = proposals(_proposals(found, "c"))
    assert rows[1:] == [["milp", "3", "2", "1", "0.100", "yes"], ["gain", "1", "0", "0", "–", ""]]


def test_what_the_space_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.attention has no option for"):
        made(Recipe(heads=0.25))


def test_the_bits_that_were_chosen_are_fixed_unit_by_unit() -> None:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "some/model"},
            "task": {"name": "text-classification", "data": {"source": "some-data"}},
            "budget": {"latency": "20%"},
            "space": [
                {
                    "match": "layers.*.ffn",
                    "structure": {"width": [1.0, 0.5]},
                    "bits": {"method": "gptq", "weights": ["dense", 8, 4], "activations": [8]},
                }
            ],
        }
    )
    chosen = Candidate.of(
        {
            "layers.0.attention": Option(),
            "layers.0.ffn": Option.from_json({"gptq": {"weights": 4, "activations": 8}}),
            "layers.1.ffn": Option(),
        }
    )
    first, second = _fixed(spec, chosen)
    assert first["match"] == "layers.0.ffn"
    assert first["structure"] == {"width": [1.0, 0.5]}
    assert first["bits"]["weights"] == [4]
    assert second == {"match": "layers.1.ffn", "structure": {"width": [1.0, 0.5]}}


def test_hypervolumes_are_of_shares_of_dense() -> None:
    """One model at 98% of the quality, half of the latency and a tenth of the size."""

    def trial(quality: float, latency_ms: float, size_bytes: int) -> TrialRecord:
        cost = Measurement("measured", latency_ms, size_bytes)
        candidate = Candidate.of({}, SETTINGS)
        return TrialRecord(
            "one", "search", "milp", "complete", candidate, quality=quality, measured=cost
        )

    pairs = [(trial(0.5 * 0.98, 4.0, 10), trial(0.5, 8.0, 100))]
    found = _volumes(pairs, (0.6, 0.2))
    assert found == {
        "all": pytest.approx(0.98 * 0.5 * 0.9),
        "worth": pytest.approx(0.03 * 0.5 * 0.9),
        "budget": pytest.approx(0.03 * 0.1 * 0.1),
    }
