"""A trial's way from rung to rung: what is stored before it reports, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from autocomp.core.candidate import Candidate, Distillation, Option
from autocomp.distill.checkpoint import CheckpointError
from autocomp.distill.trainer import DistillationResult
from autocomp.study.activity import ActivityWriter
from autocomp.study.ledger import Ledger
from autocomp.study.records import RungRecord, TrialRecord
from autocomp.tasks.protocol import Evaluation, Quality
from autocomp.trial.rungs import Climb

TOKENS = 1000


class Trainer:
    """Counts what it is asked for; a step is 60 tokens, so that a rung is overshot."""

    def __init__(self) -> None:
        self.tokens = 0
        self.wanted: list[int] = []

    @property
    def result(self) -> DistillationResult:
        return DistillationResult(self.tokens, 0, 0.0, 0.0)

    def advance(self, tokens: int, progress: Any) -> None:
        self.wanted.append(tokens)
        while self.tokens < tokens:
            self.tokens += 60
            progress(self.tokens, tokens)

    def save(self, path: Path) -> None:
        path.write_text(str(self.tokens))

    def load(self, path: Path) -> None:
        text = path.read_text()
        if not text.isdigit():
            raise CheckpointError(f"{path} is damaged")
        self.tokens = int(text)


def evaluation(kl: float) -> Evaluation:
    return Evaluation(Quality(0.5, "accuracy", 0.5, np.zeros(1)), kl)


class Trial:
    """One process's attempt at a trial."""

    def __init__(self, root: Path, kind: str = "search", stitched: float = 1.0) -> None:
        candidate = Candidate.of({"layers.0.ffn": Option()}, Distillation(tokens=TOKENS))
        record = TrialRecord("3f2a", cast(Any, kind), "milp", "failed", candidate)
        self.trainer, self.ledger = Trainer(), Ledger(root / "ledger.jsonl")
        self.checkpoint = root / "3f2a.safetensors"
        self.phases: list[str] = []
        self.activity = ActivityWriter(root / "running", "3f2a")
        trainer = cast(Any, self.trainer)
        self.climb = Climb(
            record, trainer, self.look, evaluation(stitched), self.ledger, self.checkpoint
        )

    def look(self) -> Evaluation:
        return evaluation(1.0 / self.trainer.tokens)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def run(self, *shares: float) -> Any:
        return self.climb.run(shares, self.phase, {"distil": 1.5}, self.activity)


def finish(running: Any) -> tuple[list[dict[str, Any]], TrialRecord]:
    reports = []
    while True:
        try:
            reports.append(next(running))
        except StopIteration as end:
            return reports, end.value


def test_a_trial_is_looked_at_at_every_rung_and_trained_to_its_end(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    reports, record = finish(trial.run(0.25, 0.5))
    assert trial.trainer.wanted == [250, 500, 1000]
    assert trial.phases == ["distil", "rung", "distil", "rung", "distil"]
    assert [(r["rung"], r["tokens"]) for r in reports] == [(0, 250), (1, 500)]
    assert [r["teacher_kl"] for r in reports] == pytest.approx([1 / 300, 1 / 540])
    seen = [RungRecord.from_json(report) for report in reports]
    assert [its.candidate for its in seen] == [record.candidate] * 2
    assert record.rungs == tuple(its.seen for its in seen)
    assert TrialRecord.from_json(record.to_json()).rungs == record.rungs
    assert list(trial.ledger.read().of("rung")) == ["3f2a@0", "3f2a@1"]


def test_a_student_further_away_than_before_is_judged_as_what_would_be_exported(
    tmp_path: Path,
) -> None:
    reports, record = finish(Trial(tmp_path, stitched=1 / 500).run(0.25, 0.5))
    assert [r["teacher_kl"] for r in reports] == pytest.approx([1 / 500, 1 / 540])
    assert [seen["teacher_kl"] for seen in record.rungs] == pytest.approx([1 / 500, 1 / 540])


def test_what_a_rung_reports_is_stored_before(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    report = next(trial.run(0.25))
    assert trial.ledger.read().of("rung") == {"3f2a@0": report}
    assert trial.checkpoint.read_text() == "300"


def test_another_process_goes_on_behind_the_last_rung(tmp_path: Path) -> None:
    next(Trial(tmp_path).run(0.25, 0.5))
    again = Trial(tmp_path)
    reports, record = finish(again.run(0.25, 0.5))
    assert again.trainer.wanted == [500, 1000]
    assert [r["rung"] for r in reports] == [1]
    assert [its["rung"] for its in record.rungs] == [0, 1]


def test_killed_between_checkpoint_and_entry_it_is_looked_at_again(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.trainer.tokens = 300
    trial.trainer.save(trial.checkpoint)
    again = Trial(tmp_path)
    reports, _ = finish(again.run(0.25, 0.5))
    assert [(r["rung"], r["teacher_kl"]) for r in reports] == [(0, 1 / 300), (1, 1 / 540)]


def test_a_damaged_checkpoint_is_trained_again_from_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    next(Trial(tmp_path).run(0.25))
    Trial(tmp_path).checkpoint.write_text("torn")
    again = Trial(tmp_path)
    reports, record = finish(again.run(0.25))
    assert [r["rung"] for r in reports] == [0]
    assert len(record.rungs) == 1
    assert len(again.ledger.read().of("rung")) == 1
    assert "trial 3f2a trains again from its start" in caplog.text


def test_a_baseline_has_no_rungs(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "uniform")
    assert finish(trial.run(0.25, 0.5))[0] == []
    assert trial.trainer.wanted == [1000]
    assert not trial.checkpoint.exists()
