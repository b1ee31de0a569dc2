"""Two studies compared: figures by hand, each relative to its own dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autocomp.api import open_study
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import StudyError, UserError
from autocomp.core.measurement import Measurement
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord

SPEC: dict[str, Any] = {
    "version": 1,
    "model": {"source": "package:some_model/model"},
    "task": {"name": "text-classification", "data": {"source": "x.csv", "format": "csv"}},
    "target": {"workload": {"sequence": 32}},
    "budget": {"latency": "20%"},
    "space": [{"match": "layers.*.ffn"}],
}


def make(
    path: Path, dense_ms: float, points: list[tuple[float, float, float]], **changes: Any
) -> Path:
    """A study of a dense model of quality 1 and 1000 bytes, and trials relative to it."""
    study = Study.create_or_open(path, Spec.model_validate({**SPEC, **changes}))
    figures = [("dense", 1.0, 1.0, 1.0), *((f"t{i}", *point) for i, point in enumerate(points))]
    for name, quality, latency, size in figures:
        study.add_trial(
            TrialRecord(
                id=name,
                kind="dense" if name == "dense" else "search",
                proposed_by="milp",
                state="complete",
                candidate=Candidate.of({"head": Option((Step.of("rtn", weights=8, name=name),))}),
                quality=quality,
                measured=Measurement("measured", latency * dense_ms, int(size * 1000)),
            )
        )
    return path


def test_volumes_ratio_and_coverage_by_hand(tmp_path: Path) -> None:
    one = make(tmp_path / "one", 10.0, [(0.9, 0.5, 0.5), (0.8, 0.25, 0.5)])
    two = make(tmp_path / "two", 40.0, [(0.9, 0.5, 0.5), (0.7, 0.1, 0.9)])
    view = open_study(one).front(two)
    # 0.9 · 0.5 · 0.5, and 0.8 · 0.25 · 0.5 beside it; 0.7 · 0.4 · 0.1 beside it.
    assert view["hypervolume"] == pytest.approx(0.225 + 0.1)
    assert view["against"]["hypervolume"] == pytest.approx(0.225 + 0.028)
    assert view["against"]["ratio"] == pytest.approx(0.325 / 0.253)
    # Fronts: dense, t0, t1 each; dense and t0 are equalled on both sides.
    assert view["against"]["covers"] == pytest.approx(2 / 3)
    assert view["against"]["covered"] == pytest.approx(2 / 3)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = make(tmp_path / "one", 10.0, [(0.9, 0.5, 0.5)])
    other = {"name": "text-classification", "data": {"source": "y.csv", "format": "csv"}}
    two = make(tmp_path / "two", 10.0, [(0.9, 0.5, 0.5)], task=other)
    with pytest.raises(UserError, match="another model or task"):
        open_study(one).front(two)
    three = make(tmp_path / "three", 10.0, [(0.9, 0.5, 0.5)], objectives=["quality", "size"])
    with pytest.raises(UserError, match="same objectives"):
        open_study(one).front(three)
    with pytest.raises(StudyError):
        open_study(one).front(tmp_path / "none")


def test_before_dense_is_measured_there_is_no_ratio(tmp_path: Path) -> None:
    one = make(tmp_path / "one", 10.0, [(0.9, 0.5, 0.5)])
    Study.create_or_open(tmp_path / "two", Spec.model_validate(SPEC))
    against = open_study(one).front(tmp_path / "two")["against"]
    assert against["ratio"] is None
    assert against["covers"] is None
