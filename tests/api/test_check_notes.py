"""What `check` says of specs that a search would refuse, or of which a part does nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autocomp.api.check import CheckReport, check

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "search_spaces" / "quickstart.yaml"


def checked(**overrides: Any) -> CheckReport:
    return check(SPEC, {name.replace("__", "."): value for name, value in overrides.items()})


def test_the_quickstart_has_nothing_to_complain_of() -> None:
    report = checked()
    assert report.problems == []
    assert not [note for note in report.notes if "no effect" in note or "meets it" in note]


def test_what_a_search_would_refuse_of_the_model_is_a_problem() -> None:
    (problem,) = checked(target__workload__sequence=4096).problems
    assert problem.startswith(
        "--set target.workload.sequence: 4096 tokens, but the model has 512 positions"
    )
    report = checked(task__teacher={"fit": "none"})
    (problem,) = report.problems
    assert problem.startswith("--set task.teacher: fit: none takes the model as the teacher")
    assert "Set task.teacher.fit: full (head and encoder) or head" in problem
    assert report.reachable, "the budget is"


def test_a_rule_that_others_replace_is_noted() -> None:
    space = [
        {"match": "layers.*.ffn", "bits": {"weights": [8], "activations": [8]}},
        {"match": "layers.*", "structure": {"skip": True}},
    ]
    notes = checked(space=space).notes
    (note,) = [note for note in notes if "no effect" in note]
    assert note.startswith("space[0] (layers.*.ffn) has no effect")
    assert "space[1] hold for all 6 of its units" in note


@pytest.mark.parametrize(
    ("budget", "note"),
    [
        ({"latency": "150%"}, "budget.latency: the dense model meets it"),
        ({"size": "2 GB"}, "budget.size: the dense model meets it"),
        ({}, "budget: no cost is limited"),
        ({"quality": "98%"}, "budget: no cost is limited"),
    ],
)
def test_limits_that_limit_nothing_are_noted(budget: dict[str, str], note: str) -> None:
    assert [each for each in checked(budget=budget).notes if each.startswith(note)]


def test_more_threads_than_cores_are_noted() -> None:
    threads = len(os.sched_getaffinity(0)) + 1
    notes = checked(target__workload__threads=threads).notes
    assert [note for note in notes if note.startswith(f"target.workload.threads: {threads}")]
