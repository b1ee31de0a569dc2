"""A budget of peak memory: refused at once where clearly out of reach, else met as measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import Command, keys

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

SMALL = ("search.trials=1", "search.screen=8", "distill.tokens=[0]")


def test_out_of_reach_is_refused_before_anything_is_built(command: Command, tmp_path: Path) -> None:
    study = tmp_path / "study"
    refused = command.search(study, *SMALL, "budget.peak_memory=20 MB", options=("--quiet",))
    message = refused.complaint(3)
    assert "No candidate meets peak memory ≤ 20 MB" in message
    assert keys(study, "trial") == ["dense"]
    assert not keys(study, "score"), "nothing was scored for it"


@pytest.mark.slow
def test_within_reach_is_met_as_measured(command: Command, tmp_path: Path) -> None:
    within = "budget.peak_memory=110%"
    ended = command.search(tmp_path, *SMALL, within, options=("--json", "--quiet"))
    assert ended.status == 0, ended.err
    trials = {trial["id"]: trial for trial in ended.json["trials"]}
    limit = ended.json["budget"]["peak_memory_bytes"]
    assert limit == pytest.approx(1.1 * trials["dense"]["peak_memory_bytes"])
    assert trials[ended.json["chosen"]]["peak_memory_bytes"] <= limit
    for trial in trials.values():
        estimated = (trial["estimated"] or {}).get("peak_memory_bytes")
        if estimated is not None:
            assert estimated == pytest.approx(trial["peak_memory_bytes"], rel=0.1)
    assert any(trial["kind"] == "search" and trial["estimated"] for trial in trials.values())
