"""Tables in the terminal: nothing is cut, the marks are right, the next command works."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from samples import BUDGET, baselines, on_two_runtimes, record, records, view

from autocomp.core.budget import Budget, RelativeBudget
from autocomp.core.quantities import parse_limit
from autocomp.front.pick import pick
from autocomp.report.tables import print_check, print_kind, print_picked
from autocomp.report.terminal import describe_target, print_front
from autocomp.study.records import TrialRecord


def text_of(data: dict[str, Any], width: int = 80, **options: Any) -> str:
    output = io.StringIO()
    print_front(Console(file=output, width=width), data, **options)
    return output.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut(width: int) -> None:
    text = text_of(view(), width)
    assert "…" not in text
    assert all(trial.id in text for trial in records() if trial.state == "complete")


def test_rows_and_marks() -> None:
    data = view()
    lines = text_of(data).splitlines()
    for trial in data["trials"]:
        if trial["state"] == "failed":
            continue
        (row,) = [line for line in lines if re.search(rf"^.. ?{trial['id']} ", line)]
        mark = "▸" if trial["id"] == data["chosen"] else "●" if trial["on_front"] else " "
        assert row[0] == mark
        assert row.rstrip().endswith("met") == (trial["feasible"] and trial["kind"] != "dense")
    dense = next(line for line in lines if " dense " in line)
    assert re.search(r"0\.902 +6\.5 ms 100% +91\.6 MB 100%", dense)


def test_it_ends_with_the_next_command() -> None:
    assert text_of(view()).endswith("  autocomp pick runs/quickstart --export out/\n")


def test_images_have_no_sequence() -> None:
    workload = {"batch": 1, "sequence": 128, "image": 56, "threads": 1}
    described = describe_target({"name": "onnxruntime-cpu", "workload": workload})
    assert described == "onnxruntime-cpu, batch 1, image 56, threads 1"


def test_a_model_that_generates_has_a_prompt_instead() -> None:
    workload = {"batch": 1, "sequence": 128, "prompt": 64, "generate": 32, "threads": 1}
    described = describe_target({"name": "onnxruntime-cpu", "workload": workload})
    assert described == "onnxruntime-cpu, batch 1, prompt 64, generate 32, threads 1"


def perplexities(trials: list[TrialRecord]) -> list[TrialRecord]:
    """The same trials of a language model: the quality is the reciprocal of the metric."""
    return [
        trial
        if trial.quality is None
        else replace(trial, metric={"name": "perplexity", "value": 1 / trial.quality})
        for trial in trials
    ]


def test_a_metric_with_a_sense_of_its_own_is_shown_in_it() -> None:
    trials = perplexities(records())
    text = text_of(view(trials))
    assert "perplexity" in text.splitlines()[3]
    assert "quality" not in text
    for trial in trials:
        if trial.quality is not None:
            (row,) = [line for line in text.splitlines() if re.search(rf" {trial.id} ", line)]
            assert f" {1 / trial.quality:.4g} " in row
    assert "perplexity" not in text_of(view())
    mixed = [*trials[:5], *records()[5:]]  # no one name suits them
    assert "quality" in text_of(view(mixed)).splitlines()[3]


def test_a_picked_trial_has_its_metric_alone() -> None:
    data = view(perplexities(records()))
    dense = next(trial for trial in data["trials"] if trial["id"] == "dense")
    chosen = next(trial for trial in data["trials"] if trial["id"] == data["chosen"])
    output = io.StringIO()
    print_picked(Console(file=output, width=100), chosen, dense, None, "next")
    (row,) = [line for line in output.getvalue().splitlines() if line.startswith("perplexity")]
    gap = 1 / chosen["quality"] - 1 / dense["quality"]
    assert row.split() == ["perplexity", f"{1 / chosen['quality']:.4g}", f"{gap:+.3g}"]
    assert "quality" not in output.getvalue()


def test_a_floor_is_in_the_heading_and_says_who_misses_it() -> None:
    trials = [*baselines(), record(1, id="good", quality=0.91), record(2, id="poor", quality=0.8)]
    text = text_of(view(trials, Budget(size_bytes=1e9, quality=0.9)))
    assert "budget  size ≤ 1 GB, quality ≥ 0.9" in text
    verdicts = {
        trial.id: next(line for line in text.splitlines() if f" {trial.id} " in line).split()[-1]
        for trial in trials
        if trial.kind != "dense"
    }
    assert verdicts["good"] == "met"
    assert verdicts["poor"] == verdicts["uniform-width-50%"] == "below"
    assert "below the floor on quality" in text
    both = text_of(view(trials, Budget(size_bytes=1e6, quality=0.9)))
    assert not [line for line in both.splitlines() if line.endswith(" below")]
    assert "below the floor" not in text_of(view(trials))
    text = text_of(view(perplexities(trials), Budget(quality=0.9)))
    assert "budget  perplexity ≤ 1.111" in text


def test_what_the_latencies_are() -> None:
    assert "latency: processor time of its one thread, normalised by an anchor" in text_of(view())
    data = view()
    data["target"]["workload"]["threads"] = 4
    assert "latency: wall-clock time on 4 threads, normalised by an anchor" in text_of(data)


@pytest.mark.parametrize("budget", [Budget(quality=0.97), Budget(latency_ms=0.3, quality=0.95)])
def test_when_only_the_floor_is_in_the_way_the_suggested_command_works(budget: Budget) -> None:
    text = text_of(view(budget=budget))
    words = shlex.split(text.rstrip().splitlines()[-1])
    assert words[-2:] == ["--export", "out/"]
    limits = dict(zip(words[3:-2:2], words[4:-2:2], strict=True))
    assert set(limits) == {"--quality"} | ({"--latency"} if budget.latency_ms else set())
    relaxed = Budget(
        latency_ms=parse_limit(limits["--latency"], "latency").resolve(0)
        if "--latency" in limits
        else None,
        quality=float(limits["--quality"]),
    )
    nearest = re.search(r"Nearest: (\S+)\.", text)
    assert nearest is not None
    assert pick(records(), relaxed).id == nearest[1]


def test_the_report_split_stands_below_the_table() -> None:
    report = {
        "id": "t",
        "quality": 0.018,
        "metric": {"name": "perplexity", "value": 55.61},
        "teacher_quality": 0.02,
        "teacher_metric": {"name": "perplexity", "value": 50.0},
        "ratio": 0.9,
    }
    line = "t on the report split: perplexity 55.61, teacher 50; quality 90.0% of the teacher's"
    assert line in text_of({**view(), "report": report}, width=120)
    assert "looked at" not in text_of({**view(), "report": {**report, "candidates": 1}})
    several = text_of({**view(), "report": {**report, "candidates": 3}}, width=140)
    assert f"{line}; 3 candidates were looked at there" in several
    assert "report split" not in text_of(view())


def test_when_nothing_fits_the_suggested_command_picks_the_nearest() -> None:
    budget = Budget(latency_ms=0.5, size_bytes=5e6)
    text = text_of(view(budget=budget))
    assert "No measured model meets the budget." in text
    words = shlex.split(text.rstrip().splitlines()[-1])
    limits = {
        flag.removeprefix("--"): words[words.index(flag) + 1] for flag in ("--latency", "--size")
    }
    relaxed = RelativeBudget(
        latency=parse_limit(limits["latency"], "latency"), size=parse_limit(limits["size"], "size")
    ).resolve(baselines()[0].measured)  # type: ignore[arg-type]
    nearest = re.search(r"Nearest: (\w+)\.", text)
    assert nearest is not None
    chosen = pick(records(), relaxed)
    figures = next(r for r in records() if r.id == nearest.group(1)).measured
    assert figures is not None
    assert relaxed.feasible(figures)
    assert chosen.quality is not None


def test_estimates_come_apart_and_only_when_asked() -> None:
    trial = record(1, id="only")
    data = view([*baselines(), trial])
    assert "Predicted" not in text_of(data)
    text = text_of(data, estimated=True)
    after = text.partition("Predicted by the cost table")[2]
    assert trial.estimated is not None
    assert trial.measured is not None
    error = 100 * (trial.estimated.latency_ms / trial.measured.latency_ms - 1)  # type: ignore[operator]
    assert f"{error:+.1f}%" in after
    assert "dense" not in after


def test_a_study_without_trials() -> None:
    text = text_of(view([]))
    assert "No measured model meets the budget." in text


def test_an_unmeasured_trial_is_not_called_over() -> None:
    text = text_of(view([*baselines(), record(2, id="unmeasured", measured=None)]))
    (row,) = [line for line in text.splitlines() if " unmeasured " in line]
    assert row.rstrip().endswith("–")


def test_trials_that_were_stopped_are_counted_in_a_line() -> None:
    stopped = [record(n, id=f"pruned{n}", state="pruned", measured=None) for n in (2, 3)]
    text = text_of(view([*baselines(), *stopped]))
    assert "2 trials stopped at a rung" in text
    assert "pruned2" not in text


def test_a_picked_trial() -> None:
    data = view()
    chosen = next(t for t in data["trials"] if t["id"] == data["chosen"])
    output = io.StringIO()
    print_picked(
        Console(file=output, width=100), chosen, data["trials"][0], None, "autocomp pick x"
    )
    text = output.getvalue()
    assert f"{chosen['quality'] - 0.902:+.3f}" in text
    assert all(unit in text for unit in chosen["candidate"]["units"])
    assert text.endswith("  autocomp pick x\n")
    output = io.StringIO()
    exported = {"directory": "out"}
    print_picked(Console(file=output, width=100), chosen, None, exported, "")
    assert output.getvalue().endswith("Exported and verified: out\n")


def test_a_check() -> None:
    report = {
        "rules": [{"match": "layers.*.ffn", "units": ["layers.0.ffn", "layers.1.ffn"]}],
        "units": [{"name": "layers.0.ffn", "kind": "ffn", "parameters": 1_200_000, "options": 12}],
        "space_log10": 23.4,
        "smallest_size_bytes": 7_900_000,
        "budget": {"latency": "20%", "size": None},
        "problems": [],
    }
    output = io.StringIO()
    print_check(Console(file=output, width=100), report, "s.yaml")
    text = output.getvalue()
    assert re.search(r"space\[0\] +layers\.\*\.ffn +2", text)
    assert "10^23.4 candidates" in text
    assert "7.9 MB" in text
    assert "1,200,000" in text
    assert text.endswith("  autocomp search s.yaml\n")
    output = io.StringIO()
    print_check(Console(file=output, width=100), {**report, "problems": ["too small"]}, "s.yaml")
    assert "✗ too small" in output.getvalue()
    assert "autocomp search" not in output.getvalue()


def test_a_check_says_what_it_looked_at() -> None:
    report = {
        "model": "package:m/model",
        "task": "text-classification: 2,000 examples, 5 labels",
        "target": {
            "target": "onnxruntime-cpu",
            "runtime": "onnxruntime 1.23.2",
            "cpu": "Some Processor",
            "workload": {"batch": 1, "sequence": 32, "threads": 1},
        },
        "dense_size_bytes": 90_000_000,
        "smallest_size_bytes": 9_000_000,
        "budget": {"latency": "20%", "size": "12%", "peak_memory": "200 MB"},
        "size_limit_bytes": 10_800_000.0,
    }
    output = io.StringIO()
    print_check(Console(file=output, width=120), report, "s.yaml")
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert "model package:m/model" in lines
    assert "task text-classification: 2,000 examples, 5 labels" in lines
    assert (
        "target onnxruntime-cpu (onnxruntime 1.23.2), Some Processor, batch 1, sequence 32, "
        "threads 1"
    ) in lines
    assert "dense size 90 MB" in lines
    assert "smallest size 9 MB (10% of dense)" in lines
    assert "budget size 12% of dense, 10.8 MB" in lines
    assert "budget latency 20%" in lines
    assert "budget peak memory 200 MB" in lines


def test_extensions() -> None:
    output = io.StringIO()
    row = {
        "name": "gptq",
        "summary": "Rounds with compensation.",
        "paper": "Frantar et al., 2022",
        "options": "weights=8|4",
        "speeds_up": ["onnxruntime-cpu"],
        "shrinks": [],
        "saves_memory": ["openvino-cpu"],
    }
    print_kind(Console(file=output, width=100), [row])
    text = output.getvalue()
    assert "gptq  Rounds with compensation." in text
    assert "speeds up: onnxruntime-cpu" in text
    assert "saves memory: openvino-cpu" in text
    assert "shrinks" not in text


def test_the_budget_of_the_heading_is_the_study_s() -> None:
    assert f"budget  {BUDGET.describe()}" in text_of(view())


@pytest.mark.parametrize("width", [100, 120])
def test_rows_are_labelled_with_their_runtime_where_there_are_several(width: int) -> None:
    data = view(on_two_runtimes())
    lines = text_of(data, width).splitlines()
    for trial in data["trials"]:
        if trial["state"] != "failed":
            (row,) = [line for line in lines if re.search(rf"^.. ?{trial['id']} ", line)]
            assert f" {trial['runtime']} " in row
    assert {trial["runtime"] for trial in data["trials"]} == {"onnxruntime", "openvino"}
    assert not re.search(r"by +runtime", text_of(view()))
