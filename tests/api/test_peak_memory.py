"""Peak memory of candidates: linear terms, refits by trials, and what is refused early."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from autocomp.api.peak_memory import PeakMemory
from autocomp.api.predictor import TablePredictor
from autocomp.api.search import within_reach
from autocomp.core.budget import Budget
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InfeasibleError
from autocomp.core.measurement import Measurement
from autocomp.core.unit import Site, Unit
from autocomp.operators import option_formats
from autocomp.search.space import Space
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.cost_table import CostTable, Entry
from autocomp.targets.load_memory import UNMEASURED_ERROR, PeakFit
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget

TARGET = OnnxRuntimeTarget(WorkloadSection(batch=1, sequence=32, threads=1))
INT8 = Option((Step.of("rtn", weights=8, activations=8, group=0),))
INT4F = Option((Step.of("rtn", weights=4, activations=32, group=32),))
SKIP = Option((Step.of("skip"),))
OPTIONS = (Option(), INT8, INT4F, SKIP)
UNITS = tuple(
    Unit(
        f"layers.{i}.ffn",
        "ffn",
        (
            Site(f"blocks.{i}.up", "up", 2048, 512, True),
            Site(f"blocks.{i}.down", "down", 512, 2048, True),
        ),
        layer=i,
        width=2048,
        skippable=True,
    )
    for i in range(4)
)
SPACE = Space(UNITS, {unit.name: OPTIONS for unit in UNITS}, None)


def predictor() -> TablePredictor:
    entries = {
        unit.name: {
            option.key: Entry(
                1.0, sum(map(TARGET.size_bytes, option_formats(unit, option).values())), "float"
            )
            for option in OPTIONS
        }
        for unit in UNITS
    }
    table = CostTable("d", {}, entries, base_ms=0.5, rest_bytes=700)
    memory = PeakMemory(UNITS, TARGET, PeakFit(TARGET.idle_memory_bytes))
    return TablePredictor(table, memory=memory)


def drawn(draw: random.Random) -> dict[str, Option]:
    return {unit.name: draw.choice(OPTIONS) for unit in UNITS}


def measured(options: dict[str, Option]) -> tuple[dict[str, Option], Measurement]:
    """On a machine whose process takes 110 MB, and where 4-bit weights cost a fifth more."""
    peak = 110e6
    for unit in UNITS:
        for left in option_formats(unit, options[unit.name]).values():
            way, bytes_ = TARGET.load_bytes(left)
            peak += bytes_ * (1.2 if way == "unpacked 4" else 1.0)
    return options, Measurement("measured", 1.0, 1, round(peak))


def misses(model: TablePredictor) -> list[float]:
    draw = random.Random(9)
    found = []
    for _ in range(20):
        options, cost = measured(drawn(draw))
        predicted = model.predict(options).peak_memory_bytes
        assert predicted is not None
        assert cost.peak_memory_bytes is not None
        found.append(abs(predicted / cost.peak_memory_bytes - 1.0))
    return found


def test_terms_add_up_and_size_is_no_guide() -> None:
    model = predictor()
    for options in (drawn(random.Random(seed)) for seed in range(5)):
        terms = sum(model.peak_memory_bytes(unit, option) for unit, option in options.items())
        assert model.base_peak_memory_bytes is not None
        whole = model.predict(options).peak_memory_bytes
        assert whole == pytest.approx(model.base_peak_memory_bytes + terms, abs=1)
    name = UNITS[0].name
    assert model.size_bytes(name, INT4F) < model.size_bytes(name, INT8)
    assert model.peak_memory_bytes(name, INT4F) > 5 * model.peak_memory_bytes(name, INT8)
    assert model.peak_memory_bytes(name, SKIP) == 0


def test_every_trial_corrects_it() -> None:
    dense, uniform = ({unit.name: option for unit in UNITS} for option in (Option(), INT4F))
    draw = random.Random(1)
    trials = [measured(dense), measured(uniform), *(measured(drawn(draw)) for _ in range(4))]
    errors = [max(misses(predictor().refitted(trials[:count]))) for count in (0, 1, 2, 6)]
    assert errors[0] > 0.2
    assert errors[1] < 0.15
    assert errors[2] < 0.05
    assert errors[3] < 0.03
    again = predictor().refitted(trials).refitted(trials)
    assert max(misses(again)) == pytest.approx(errors[3], abs=1e-6), "a refit forgets the last one"
    assert predictor().refitted(trials[:1]).peak_memory_error == UNMEASURED_ERROR
    assert predictor().refitted(trials).peak_memory_error < 0.05


def reach(limit_bytes: float) -> tuple[TablePredictor, list[str]]:
    notes: list[str] = []
    session: Any = SimpleNamespace(
        plan=SimpleNamespace(space=SPACE), progress=SimpleNamespace(note=notes.append)
    )
    dense = measured({unit.name: Option() for unit in UNITS})
    table = predictor().refitted([dense])
    found = within_reach(session, {None: table}, Budget(peak_memory_bytes=limit_bytes))
    return found[None], notes


def test_only_what_is_clearly_out_of_reach_is_refused() -> None:
    base = predictor().refitted([measured({u.name: Option() for u in UNITS})])
    smallest = base.base_peak_memory_bytes  # every unit skipped
    assert smallest is not None
    sure, notes = reach(1.02 * smallest)
    assert not notes
    assert sure.base_peak_memory_bytes == pytest.approx(smallest)
    hopeful, notes = reach(0.85 * smallest)
    assert "Predicted peaks may be wrong by 15%" in notes[0]
    assert hopeful.base_peak_memory_bytes == pytest.approx(smallest / 1.3)
    candidate = drawn(random.Random(2))
    expected, hoped = (p.predict(candidate).peak_memory_bytes for p in (base, hopeful))
    assert expected is not None
    assert hoped == pytest.approx(expected / 1.3), "what trials are judged by is what they are for"
    # Measured trials end the hope: what is expected to be wrong shrinks.
    draw = random.Random(2)
    taught = hopeful.refitted([measured(drawn(draw)) for _ in range(8)])
    assert taught.base_peak_memory_bytes is not None
    assert taught.base_peak_memory_bytes > 0.9 * 110e6
    with pytest.raises(InfeasibleError, match="No candidate meets peak memory"):
        reach(0.7 * smallest)
