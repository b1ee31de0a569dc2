"""Peak memory from formats: against peaks that were measured, and learning from measurements."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from autocomp.core.unit import SiteFormat
from autocomp.spec.schema import WorkloadSection
from autocomp.targets.load_memory import ONNX_RUNTIME, OPENVINO, UNMEASURED_ERROR, PeakFit
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget

TARGET = OnnxRuntimeTarget(WorkloadSection(batch=1, sequence=32, threads=1))
TABLES = [
    SiteFormat(30522, 384, False, embedding=True),
    SiteFormat(512, 384, False, embedding=True),
]
LAYERS = [
    SiteFormat(rows, columns, True)
    for _ in range(6)
    for rows, columns in [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
]
MEASURED_MB = {
    # MiniLM's shapes with a float table, from docs/design.md: taken months before the constants.
    "dense": ({}, 210),
    "int8": ({"weight_bits": 8, "activation_bits": 8}, 178),
    "4-bit, 8-bit activations": ({"weight_bits": 4, "activation_bits": 8, "group": 32}, 186),
    "4-bit, float activations": ({"weight_bits": 4, "group": 32}, 263),
    "half of int8": ({"weight_bits": 8, "activation_bits": 8, "half": True}, 250),
    "half of 4-bit": ({"weight_bits": 4, "activation_bits": 8, "group": 32, "half": True}, 312),
    "half of float": ({"half": True}, 346),
}


def parts_of(change: dict) -> dict[str, float]:
    total: Counter[str] = Counter()
    half = change.get("half", False)
    change = {name: value for name, value in change.items() if name != "half"}
    for one in [*TABLES, *LAYERS]:
        left = one
        if not one.embedding:
            left = replace(one, **change)
            left = replace(left, nonzeros=one.rows * one.columns // 2) if half else left
        way, bytes_ = TARGET.load_bytes(left)
        total[way] += bytes_
    return dict(total)


def predicted(fit: PeakFit, change: dict) -> float:
    return (fit.idle_bytes + fit.of(parts_of(change))) / 1e6


def test_peaks_in_the_documentation_are_foretold_from_the_dense_one() -> None:
    start = PeakFit(TARGET.idle_memory_bytes).fitted([(parts_of({}), 210e6)])
    assert start.error == UNMEASURED_ERROR
    misses = {
        name: predicted(start, change) / peak - 1.0 for name, (change, peak) in MEASURED_MB.items()
    }
    assert abs(misses["dense"]) < 0.03
    assert max(map(abs, misses.values())) < 1.2 * UNMEASURED_ERROR, misses
    assert sum(map(abs, misses.values())) / len(misses) < 0.08
    # An affine function of the size on disk, as dense alone would give it, is off by half.
    assert predicted(start, MEASURED_MB["half of float"][0]) > 1.5 * predicted(start, {})


def test_baselines_sharpen_it() -> None:
    pairs = [(parts_of(change), peak * 1e6) for change, peak in MEASURED_MB.values()]
    fit = PeakFit(TARGET.idle_memory_bytes).fitted(pairs[:5])
    for parts, peak in pairs[5:]:
        assert (fit.idle_bytes + fit.of(parts)) / peak == pytest.approx(1.0, abs=0.12)
    for parts, peak in pairs[:5]:
        assert (fit.idle_bytes + fit.of(parts)) / peak == pytest.approx(1.0, abs=0.08)


def test_a_machine_that_differs_is_learnt_one_outlier_or_not() -> None:
    """Made-up machine: 150 MB idle, every way dearer by its own factor, 1% noise."""
    draw = random.Random(0)
    ways = list(ONNX_RUNTIME.per_weight)[:6]
    truth = {way: draw.uniform(0.8, 1.3) for way in ways}

    def model() -> tuple[dict[str, float], float]:
        parts = {way: draw.uniform(0, 60e6) for way in draw.sample(ways, 4)}
        peak = 150e6 + sum(truth[way] * parts[way] for way in parts)
        return parts, peak * draw.uniform(0.99, 1.01)

    def error(fit: PeakFit, models: list[tuple[dict[str, float], float]]) -> float:
        return sum(abs((fit.idle_bytes + fit.of(p)) / peak - 1) for p, peak in models) / len(models)

    start, held_out = PeakFit(78e6), [model() for _ in range(50)]
    seen = [model() for _ in range(12)]
    after = [error(start.fitted(seen[:count]), held_out) for count in (0, 1, 4, 12)]
    assert after[0] > 0.2
    assert after[1] < 0.15
    assert after[2] < 0.07
    assert after[3] < 0.02
    seen[5] = (seen[5][0], seen[5][1] * 1.5)
    spoilt = start.fitted(seen)
    assert error(spoilt, held_out) < 0.04
    assert start.fitted(seen).error > 0.03 == start.fitted([model() for _ in range(12)]).error


def test_order_of_measurements_and_repetition_of_the_fit_do_not_matter() -> None:
    pairs = [(parts_of(change), peak * 1e6) for change, peak in MEASURED_MB.values()]
    once, turned = PeakFit(78e6).fitted(pairs), PeakFit(78e6).fitted(pairs[::-1])
    assert once.idle_bytes == pytest.approx(turned.idle_bytes)
    assert once.slopes == pytest.approx(turned.slopes)


def test_what_is_not_listed_takes_its_bytes_on_disk_and_a_share() -> None:
    odd = SiteFormat(64, 64, True, weight_bits=4, group=32, activation_bits=8)
    assert ONNX_RUNTIME.part(odd, "nbits", 3000) == ("nbits 4", 1.3 * 3000)
    assert OPENVINO.part(SiteFormat(10, 10, True), "float", 400) == ("float 32", 750.0)
    sparse = SiteFormat(10, 10, True, nonzeros=50)
    assert ONNX_RUNTIME.part(sparse, "float", 1) == ("float 32 sparse", 1960.0)
