"""Intervals and the reason of a choice, wherever a chosen model's quality stands."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from samples import record

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.core.metric import Scale
from autocomp.export.card import model_card
from autocomp.export.companions import Companions
from autocomp.export.protocol import ExportRequest
from autocomp.front.noise import Interval, Noise
from autocomp.front.view import front_json
from autocomp.report.finalists import gap_text, interval_text, selection_line
from autocomp.report.html import front_html
from autocomp.report.summary import trial_metrics
from autocomp.report.tables import print_picked
from autocomp.report.terminal import print_front, report_line
from autocomp.spec.schema import Spec
from autocomp.study.per_example import ExampleScores
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Artifact

COUNT = 1000
PERPLEXITY = Scale("perplexity", True)


def options(distinct: int) -> Candidate:
    units = {f"u{i}": Option((Step.of("width", keep=i % distinct),)) for i in range(12)}
    return Candidate.of(units)


def trials(count: int, kind: str) -> tuple[list[TrialRecord], dict[str, np.ndarray]]:
    """`count` trials of which each errs on two more examples than the one before, on others."""
    made, scores = [], {}
    for index in range(count):
        name = f"trial-of-{index:09d}"
        wrong = np.zeros(COUNT)
        wrong[20 * index : 20 * index + 100 + 2 * index] = 1
        its = 1 - wrong if kind == "accuracy" else -4.0 - 0.5 * wrong
        quality = float(its.mean() if kind == "accuracy" else np.exp(its.mean()))
        metric = {"name": kind, "value": quality if kind == "accuracy" else 1 / quality}
        made.append(
            record(
                index,
                id=name,
                quality=quality,
                teacher_kl=0.05,
                metric=metric,
                candidate=options(9 - index if index < 3 else 11),
                measured=Measurement("measured", 1.0, 9_000_000, 90_000_000),
            )
        )
        scores[name] = its
    return made, scores


def view(count: int = 3, kind: str = "accuracy") -> dict[str, Any]:
    made, scores = trials(count, kind)
    known = {trial.id: trial.quality or 0.0 for trial in made}
    noise = Noise.of(known, {name: ExampleScores(its, "s") for name, its in scores.items()})
    target = {"name": "onnxruntime-cpu", "workload": {"batch": 1, "threads": 1}}
    return front_json("runs/x", target, Budget(latency_ms=2.0), made, noise=noise)


def printed(data: dict[str, Any], width: int = 80) -> str:
    output = io.StringIO()
    print_front(Console(file=output, width=width), data)
    return output.getvalue()


def row_of(data: dict[str, Any], id: str) -> dict[str, Any]:
    return next(row for row in data["selection"]["finalists"] if row["id"] == id)


def test_the_reason_is_one_line() -> None:
    data = view()
    best, simplest = data["selection"]["finalists"][0]["id"], data["chosen"]
    assert simplest == "trial-of-000000002"
    row = row_of(data, simplest)
    low, high = 100 * row["difference_low"], 100 * row["difference_high"]
    line = selection_line(data["selection"], Scale())
    assert line == (
        f"{simplest} is within noise of {best} (−0.4 points, 95% interval −{-low:.1f} … "
        f"+{high:.1f}) and simpler: 7 distinct options instead of 9"
    )
    assert "\n" not in line


def test_the_closest_to_the_teacher_is_said_to_be() -> None:
    data = view()
    best, other, simplest = (row["id"] for row in data["selection"]["finalists"])
    row_of(data, other)["teacher_kl"] = 0.0312
    data["selection"] |= {"chosen": other, "closest": other}
    line = selection_line(data["selection"], Scale())
    assert line.startswith(f"{other} is within noise of {best} (−0.2 points, 95% interval ")
    assert line.endswith(") and diverges less from the teacher: 0.0312 nats instead of 0.05")
    data["selection"]["chosen"] = data["chosen"] = simplest
    line = selection_line(data["selection"], Scale())
    expected = f") and simpler than {other}, which diverges least: 7 distinct options instead of 8"
    assert line.endswith(expected)
    data["selection"]["chosen"] = data["chosen"] = other
    text = " ".join(printed(data).split())
    assert f"{other} is the closest to the teacher within noise of the best that meets" in text


def test_points_and_percent_of_a_perplexity() -> None:
    row = {"difference": -0.003, "difference_low": -0.011, "difference_high": 0.005}
    row |= {"ratio": 0.98, "ratio_low": 0.96, "ratio_high": 1.001}
    assert gap_text(Scale(), row) == "−0.3 points, 95% interval −1.1 … +0.5"
    expected = "perplexity +2.0%, 95% interval −0.1 … +4.2%"  # lower is better: signs turn
    assert gap_text(PERPLEXITY, row) == expected
    assert gap_text(Scale(), {**row, "difference": None}) == ""
    assert gap_text(PERPLEXITY, {**row, "ratio_low": None}) == ""
    assert interval_text(Scale(), 0.8631, 0.9) == "0.863 … 0.900"
    assert interval_text(PERPLEXITY, 0.0125, 0.02) == "50 … 80"
    assert interval_text(Scale(), None, None) == ""


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "trial-of-000000000 is better than all others that fit, beyond the noise"),
        (2, None),
    ],
)
def test_the_best_taken_says_how_many_are_near(count: int, said: str | None) -> None:
    data = view(count)
    data["selection"] |= {"chosen": data["selection"]["best"]}
    line = selection_line(data["selection"], Scale())
    if said is None:
        said = "trial-of-000000000 is the best that fits; 1 other within noise of it on 1,000 ex"
    assert line.startswith(said)


@pytest.mark.parametrize("kind", ["accuracy", "perplexity"])
def test_the_front_shows_the_finalists(kind: str) -> None:
    data = view(kind=kind)
    text = printed(data)
    assert "…" in text
    lines = text.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "finalists" in line) :]
    for row in data["selection"]["finalists"]:
        (line,) = [line for line in table[1:4] if row["id"] in line]
        assert line.startswith("▸") == (row["id"] == data["chosen"])
        ends = [row["quality_low"], row["quality_high"]]
        if kind == "perplexity":
            assert f" {1 / ends[1]:.4g} … {1 / ends[0]:.4g} " in line
        else:
            assert f" {ends[0]:.3f} … {ends[1]:.3f} " in line
        assert line.rstrip().endswith(f" {row['distinct_options']}")
    assert "intervals: 95%, paired bootstrap of 1,000 examples" in text
    assert " is within noise of " in " ".join(text.split())
    assert f"{data['chosen']} is the simplest within noise of the best that meets" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_table_is_cut_but_keeps_the_chosen(width: int) -> None:
    data = view(12)
    count = len(data["selection"]["finalists"])
    assert count > 7
    data["selection"]["chosen"] = data["selection"]["finalists"][-1]["id"]
    text = printed(data, width)
    after = text.partition("finalists")[2].partition("within noise of")[0]
    assert len(re.findall(r"trial-of-\d{9} +0\.\d", after)) == 6
    assert data["selection"]["chosen"] in after
    assert f"  and {count - 6} more" in after
    assert not re.search(r"[\w.]…", text), "nothing is cut short"


def test_a_front_without_scores_is_as_it_was() -> None:
    made, _ = trials(3, "accuracy")
    data = front_json("runs/x", {"name": "t"}, Budget(latency_ms=2.0), made)
    text = printed(data)
    assert "finalists" not in text
    assert "interval" not in text
    assert "trial-of-000000000 is the best that meets the budget" in text


def test_a_picked_trial_tells_its_interval_and_why() -> None:
    data = view()
    row = next(trial for trial in data["trials"] if trial["id"] == data["chosen"])
    report = {
        "id": row["id"], "quality": 0.88, "teacher_quality": 0.9, "ratio": 0.88 / 0.9,
        "metric": {}, "teacher_metric": {}, "ratio_low": 0.962, "ratio_high": 0.9981,
    }  # fmt: skip
    picked = {**row, "selection": data["selection"], "report": report}
    output = io.StringIO()
    print_picked(Console(file=output, width=100), picked, None, None, "next")
    text = output.getvalue()
    interval = f"{row['quality_low']:.3f} … {row['quality_high']:.3f}"
    assert f"quality: 95% interval {interval}\n" in text
    assert f"\n{selection_line(data['selection'], Scale())}\n" in text
    assert "97.8% of the teacher's (95% interval 96.2 … 99.8%)\n" in text
    output = io.StringIO()
    bare = {k: v for k, v in row.items() if not k.startswith("quality_")}
    print_picked(Console(file=output, width=100), bare, None, None, "next")
    assert "interval" not in output.getvalue()


def test_the_page_has_the_interval_and_the_reason() -> None:
    data = view()
    text = front_html(data)
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert block is not None
    page = json.loads(block[1])
    assert page["selection"] == selection_line(data["selection"], Scale())
    for shown, trial in zip(page["trials"], data["trials"], strict=True):
        ends = (trial["quality_low"], trial["quality_high"])
        assert shown["text"]["interval"] == f"{ends[0]:.3f} … {ends[1]:.3f}"
    assert "trial.text.interval" in text.replace(block[1], "")
    plain = {**data, "selection": None}
    for trial in plain["trials"]:
        trial["quality_low"] = trial["quality_high"] = None
    block = re.search(r'id="data">(.*?)</script>', front_html(plain), re.DOTALL)
    assert block is not None
    page = json.loads(block[1])
    assert page["selection"] is None
    assert {trial["text"]["interval"] for trial in page["trials"]} == {""}


def test_metrics_have_the_interval_in_the_metric_s_sense() -> None:
    interval = Interval(0.02, 0.0125, 0.025, 0.003)
    accuracy = trial_metrics(record(1), interval)
    assert (accuracy["quality_low"], accuracy["quality_high"]) == (0.0125, 0.025)
    trial = replace(record(1), quality=0.02, metric={"name": "perplexity", "value": 50.0})
    metrics = trial_metrics(trial, interval)
    assert metrics["perplexity_low"] == pytest.approx(40)
    assert metrics["perplexity_high"] == pytest.approx(80)
    assert "quality_low" not in metrics
    assert "quality_low" not in trial_metrics(record(1))


def test_the_card_has_both_intervals(tmp_path: Path) -> None:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "m"},
            "task": {"name": "text-classification", "data": {"source": "d"}},
            "budget": {},
            "space": [{"match": "*"}],
        }
    )
    companions = Companions(tmp_path)
    companions.write(tmp_path / "none", ("a", "b"), {"input_ids": np.zeros((1, 4), np.int64)})
    trial = replace(record(1), quality=0.9, metric={"name": "accuracy", "value": 0.9})
    report = {
        "quality": 0.88, "teacher_quality": 0.9, "metric": {}, "teacher_metric": {},
        "ratio_low": 0.962, "ratio_high": 0.998,
    }  # fmt: skip
    request = ExportRequest(
        spec, trial, Artifact(tmp_path / "model.onnx", 1), companions, None, report,
        interval=Interval(0.9, 0.867, 0.937, 0.02),
    )  # fmt: skip
    card = model_card(request, "model.onnx")
    assert "- accuracy on the search split: 0.9 (95% interval 0.867 to 0.937)\n" in card
    assert "(teacher 0.9; quality 97.8% of the teacher's, 95% interval 96.2% to 99.8%, " in card
    old = model_card(replace(request, interval=None, report=None), "model.onnx")
    assert "- accuracy on the search split: 0.9\n" in old
    assert "interval" not in old


def test_the_report_line_has_the_interval_of_the_ratio() -> None:
    report = {
        "id": "t", "quality": 0.9, "teacher_quality": 0.91, "ratio": 0.989, "metric": {},
        "teacher_metric": {}, "ratio_low": 0.975, "ratio_high": 1.004, "candidates": 2,
    }  # fmt: skip
    line = report_line(report)
    assert "98.9% of the teacher's (95% interval 97.5 … 100.4%); 2 candidates" in line
    assert "interval" not in report_line({**report, "ratio_low": None, "ratio_high": None})
