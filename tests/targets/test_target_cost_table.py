"""The cost table: fit, prediction, file, and that it needs neither torch nor a runtime."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from target_examples import target

from autocomp.core.errors import InternalError
from autocomp.core.unit import dense_format
from autocomp.targets.cost_table import CostTable, Entry
from autocomp.targets.profile import check_table, lower_formats, profile, random_choice
from autocomp.targets.timing import ROUNDS

ENTRIES = {
    f"layers.{index}": {
        "dense": Entry(0.8, 4000, "float"),
        "int8": Entry(0.3, 1000, "int8"),
        "skip": Entry(0.0, 0, ""),
    }
    for index in range(6)
}


def _table() -> CostTable:
    return CostTable("device", {"batch": 1}, ENTRIES, base_ms=0.2, rest_bytes=500)


def _truth(choice: dict[str, str]) -> float:
    keys = list(choice.values())
    return 0.25 + 0.96 * keys.count("dense") + 0.33 * keys.count("int8")


def _choices(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{unit: rng.choice(list(o)) for unit, o in ENTRIES.items()} for _ in range(count)]


def test_unfitted_it_adds_up():
    choice = dict(zip(ENTRIES, itertools.cycle(["dense", "int8", "skip"]), strict=False))
    found = _table().predict(choice)
    assert found.latency_ms == pytest.approx(0.2 + 2 * 0.8 + 2 * 0.3)
    assert found.size_bytes == 500 + 2 * 4000 + 2 * 1000
    assert found.provenance == "estimated"
    assert found.device == "device"


def test_a_measured_candidate_counts_once():
    pairs = [(choice, _truth(choice)) for choice in _choices(4, 3)]
    once = _table().with_pairs(pairs)
    twice = once.with_pairs(pairs)
    assert twice.pairs == once.pairs == pairs
    assert twice.fitted == once.fitted
    slower = (pairs[0][0], 2 * pairs[0][1])  # the same candidate measured again
    assert once.with_pairs([slower]).pairs == [*pairs, slower]


def test_its_error_is_of_candidates_left_out():
    table = _table()
    assert table.error() is None
    table.fit([(choice, _truth(choice)) for choice in _choices(12, 0)])
    assert table.error() == pytest.approx(0, abs=0.02)
    wrong = _table()
    rng = random.Random(0)
    wrong.fit([(c, _truth(c) * rng.choice([0.8, 1.25])) for c in _choices(40, 0)])
    fitted = [abs(wrong.predict(c).latency_ms / latency - 1) for c, latency in wrong.pairs]
    assert np.mean(fitted) < wrong.error() < 0.35
    assert wrong.error() > 0.15


def test_a_dozen_candidates_correct_it_even_with_outliers():
    table = _table()
    pairs = [(choice, _truth(choice)) for choice in _choices(12, 0)]
    pairs[3] = (pairs[3][0], 2.0 * pairs[3][1])
    table.fit(pairs)
    errors = [
        abs(table.predict(choice).latency_ms / _truth(choice) - 1) for choice in _choices(50, 1)
    ]
    assert np.mean(errors) < 0.02
    assert np.mean([abs(_table().predict(c).latency_ms / _truth(c) - 1) for c, _ in pairs]) > 0.1


def test_later_measurements_sharpen_it():
    table = _table()
    table.fit([(choice, _truth(choice)) for choice in _choices(3, 0)])
    before = abs(table.fitted.slopes["int8"] * 0.3 + table.fitted.step_ms - 0.33)
    table.fit([(choice, _truth(choice)) for choice in _choices(40, 2)])
    after = abs(table.fitted.slopes["int8"] * 0.3 + table.fitted.step_ms - 0.33)
    assert after < max(before, 0.004)
    assert len(table.pairs) == 43


def test_latency_is_base_plus_what_the_units_add():
    table = _table()
    table.fit([(choice, _truth(choice)) for choice in _choices(12, 0)])
    (choice,) = _choices(1, 5)
    parts = sum(table.latency_ms(unit, key) for unit, key in choice.items())
    assert table.predict(choice).latency_ms == pytest.approx(table.fitted.base_ms + parts)


def test_it_survives_the_disk(tmp_path: Path):
    table = _table()
    table.ties = {"layers.1": ("layers.0", "dense", "dense")}
    table.fit([(choice, _truth(choice)) for choice in _choices(12, 0)])
    table.save(tmp_path / "cost_table.json")
    assert CostTable.load(tmp_path / "cost_table.json") == table


def test_tied_units_share_bytes_while_both_are_dense():
    table = _table()
    table.ties = {"layers.1": ("layers.0", "dense", "dense")}
    choice = dict.fromkeys(ENTRIES, "skip") | {"layers.0": "dense", "layers.1": "dense"}
    assert table.predict(choice).size_bytes == 500 + 4000
    choice["layers.0"] = "int8"
    assert table.predict(choice).size_bytes == 500 + 1000 + 4000


def test_what_it_does_not_hold_is_refused():
    with pytest.raises(InternalError, match="holds no option 'int3' of unit"):
        _table().predict(dict.fromkeys(ENTRIES, "int3"))
    with pytest.raises(InternalError, match=r"no option given for unit .layers\.0."):
        _table().predict({})


def test_predicting_needs_neither_torch_nor_a_runtime(tmp_path: Path):
    _table().save(tmp_path / "t.json")
    code = (
        "import sys; from pathlib import Path; from autocomp.targets.cost_table import CostTable;"
        f"CostTable.load(Path({str(tmp_path / 't.json')!r}));"
        "print([m for m in ('torch', 'onnxruntime', 'onnx', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_profiling_a_small_model(exported, layout):
    _, units, task, skeleton = exported(layout)
    formats = {}
    for unit in units:
        formats[unit.name] = {"dense": dense_format(unit)}
        if unit.skippable:
            formats[unit.name]["skip"] = {}
    runtime = target()
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 12).items()}
    steps: list[tuple[int, int]] = []
    table = profile(
        runtime,
        skeleton,
        units,
        formats,
        inputs,
        candidates=2,
        progress=lambda *step: steps.append(step),
    )
    total = ROUNDS + 4 * 3  # of the pieces, the smallest candidate and two random ones
    assert steps[0] == (0, total)
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)
    assert {done for done, _ in steps} >= set(range(ROUNDS + 1)), (
        "the pieces are told round by round"
    )
    assert len(table.pairs) == 3
    rng = random.Random(0)
    for _ in range(3):
        choice = random_choice(rng, formats)
        chosen = {unit: formats[unit][key] for unit, key in choice.items()}
        size = lower_formats(runtime, skeleton, units, chosen).ByteSize()
        tied = [u for u in table.ties if choice[u] == "dense"]
        predicted = table.predict(choice)
        shared = sum(table.entry(unit, "dense").size_bytes for unit in tied)
        assert predicted.size_bytes + shared == pytest.approx(size, rel=0.12)
        assert predicted.latency_ms > 0
    accuracy = check_table(table, runtime, skeleton, units, formats, inputs, candidates=3, seed=2)
    assert len(accuracy.pairs) == 3
    assert accuracy.mean_error <= accuracy.worst_error < 1.0
    entries = table.entries
    assert entries["layers.0.ffn"] == entries["layers.1.ffn"]
    assert entries["layers.0.ffn"]["skip"] == Entry(0.0, 0, "")
