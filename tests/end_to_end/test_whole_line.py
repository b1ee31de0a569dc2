"""From a spec to a verified model with the command line alone, and what each verb prints."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tiny_study import TOPICS, Command, keys, ledger, stamps

from autocomp.front.choice import KL_TOLERANCE, LARGEST_DROP

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

NUMBER = {"type": ["number", "null"]}
COSTS = {"latency_ms": NUMBER, "size_bytes": NUMBER, "peak_memory_bytes": NUMBER}


PROPOSED_BY = ("milp", "evolution", "surrogate", "random", "regular", "gain", "front")


def shape(properties: dict[str, Any]) -> dict[str, Any]:
    """Exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TRIAL: dict[str, Any] = {
    "id": {"type": "string"},
    "kind": {"enum": ["dense", "uniform", "search"]},
    "runtime": {"type": "string"},
    "proposed_by": {"enum": ["baseline", *PROPOSED_BY]},
    "state": {"enum": ["complete", "failed", "pruned"]},
    "on_front": {"type": "boolean"},
    "feasible": {"type": "boolean"},
    "quality": NUMBER,
    "metric": {"type": "object"},
    "teacher_kl": NUMBER,
    **COSTS,
    "latency_clock": {"const": "processor"},
    "latency_wall_ms": {"type": "number"},
    "measured": {"type": "boolean"},
    "estimated": shape(COSTS),
    "candidate": shape({"units": {"type": "object"}, "distillation": {"type": "object"}}),
    "quality_low": {"type": "number"},
    "quality_high": {"type": "number"},
    "distinct_options": {"type": "integer"},
    "undone": {"type": "boolean"},
}
SELECTION = shape(
    {
        "chosen": {"type": "string"},
        "best": {"type": "string"},
        "closest": {"type": "string"},
        "least": {"enum": [None, "latency", "size", "peak_memory"]},
        "fitting": {"type": "integer", "minimum": 1},
        "examples": {"type": "integer"},
        "finalists": {"type": "array", "items": {"type": "object"}, "minItems": 1},
    }
)
BUDGET = shape({**COSTS, "quality": NUMBER})
PICKED = {
    **TRIAL,
    "budget": BUDGET,
    "selection": SELECTION,
    "report": {"type": ["object", "null"]},
}
FRONT = shape(
    {
        "study": {"type": "string"},
        "model": {"type": "string"},
        "task": {"const": "text-classification"},
        "spec_key": {"type": "string", "minLength": 8},
        "devices": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "target": {"type": "object"},
        "budget": BUDGET,
        "dense": {"type": "string"},
        "chosen": {"type": ["string", "null"]},
        "nearest": {"type": ["object", "null"]},
        "hypervolume": {"type": "number"},
        "report": {"type": ["object", "null"]},
        "trials": {"type": "array", "items": shape(TRIAL)},
        "selection": {"anyOf": [SELECTION, {"type": "null"}]},
    }
)
EXPORT = {
    "type": "object",
    "required": ["path", "format", "files", "max_difference", "size_bytes", "measured"],
}
ROWS = {
    "type": "array",
    "minItems": 1,
    "items": shape(
        {
            "name": {"type": "string", "minLength": 1},
            "summary": {"type": "string", "minLength": 1},
            "paper": {"type": "string"},
            "options": {"type": "string"},
            "speeds_up": {"type": "array", "items": {"type": "string"}},
            "shrinks": {"type": "array", "items": {"type": "string"}},
            "saves_memory": {"type": "array", "items": {"type": "string"}},
            "expresses": {"type": "string"},
        }
    ),
}


def check_shape(value: Any, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.fixture(scope="module")
def view(command: Command, finished: Path) -> dict[str, Any]:
    ended = command.run("front", finished, "--json")
    assert ended.status == 0, ended.err
    front: dict[str, Any] = ended.json
    return front


def trials(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trial["id"]: trial for trial in view["trials"]}


def test_front_has_the_stable_shape_wherever_it_is_printed(
    command: Command, finished: Path, view: dict[str, Any]
) -> None:
    check_shape(view, FRONT)
    named = {"study": str(finished)}  # as the command names it
    assert {**json.loads((command.directory / "printed.json").read_text()), **named} == view
    assert {**json.loads((finished / "front.json").read_text()), **named} == view
    assert "uniform-int8" in (finished / "front.html").read_text()


def test_the_chosen_model_meets_the_budget_as_measured(view: dict[str, Any]) -> None:
    by_id = trials(view)
    dense, chosen = by_id[view["dense"]], by_id[view["chosen"]]
    assert view["budget"] == {
        "latency_ms": pytest.approx(2.0 * dense["latency_ms"]),
        "size_bytes": pytest.approx(0.6 * dense["size_bytes"]),
        "peak_memory_bytes": None,
        "quality": None,
    }
    assert chosen["measured"]
    assert chosen["feasible"]
    assert chosen["latency_ms"] <= view["budget"]["latency_ms"]
    assert chosen["size_bytes"] <= view["budget"]["size_bytes"]
    best = max(t["quality"] for t in view["trials"] if t["feasible"])
    finalists = {row["id"]: row for row in view["selection"]["finalists"]}
    closest = finalists[view["selection"]["closest"]]
    assert (1 - LARGEST_DROP) * closest["quality"] <= chosen["quality"] <= best
    assert chosen["teacher_kl"] <= (1 + KL_TOLERANCE) * closest["teacher_kl"]
    assert closest["teacher_kl"] == min(row["teacher_kl"] for row in finalists.values())
    assert by_id[view["selection"]["best"]]["quality"] == best
    assert chosen["quality"] > 0.6, "the teacher learnt nothing, so nothing was compared"


def test_every_figure_is_of_the_file_on_disk(finished: Path, view: dict[str, Any]) -> None:
    assert keys(finished, "trial") == [trial["id"] for trial in view["trials"]]
    for trial in view["trials"]:
        assert trial["state"] == "complete"
        files = list((finished / "artifacts" / trial["id"]).iterdir())
        assert sum(file.stat().st_size for file in files) == trial["size_bytes"]
    searched = [trial for trial in view["trials"] if trial["kind"] == "search"]
    assert len(searched) == 3
    for trial in searched:
        assert trial["estimated"]["size_bytes"] == pytest.approx(trial["size_bytes"], rel=0.02)


def test_baselines_are_trials(view: dict[str, Any]) -> None:
    by_id = trials(view)
    assert by_id["dense"]["candidate"]["distillation"] == {"tokens": 0}
    assert by_id["dense"]["teacher_kl"] == pytest.approx(0, abs=1e-6)
    uniform = {name for name, trial in by_id.items() if trial["kind"] == "uniform"}
    assert {"uniform-int8", "uniform-width-0.5"} <= uniform
    assert by_id["uniform-int8"]["size_bytes"] < 0.4 * by_id["dense"]["size_bytes"]


def test_the_front_is_what_nothing_dominates(view: dict[str, Any]) -> None:
    def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        pairs = [(-one["quality"], -other["quality"])] + [
            (one[name], other[name]) for name in ("latency_ms", "size_bytes")
        ]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    for trial in view["trials"]:
        assert trial["on_front"] == (not any(beats(other, trial) for other in view["trials"]))


def test_the_report_split_is_opened_for_dense_and_the_chosen_alone(
    finished: Path, view: dict[str, Any]
) -> None:
    assert set(keys(finished, "report")) == {"dense", view["chosen"]}
    report = view["report"]
    assert report["ratio_low"] <= report["ratio"] <= report["ratio_high"]


def test_pick_answers_from_what_was_measured(
    command: Command, finished: Path, view: dict[str, Any]
) -> None:
    before = stamps(finished)
    dense = trials(view)["dense"]
    limits = ("--latency", "200%", "--size", "35%")
    ended = command.run("pick", finished, *limits, "--best", "--json")
    assert ended.status == 0, ended.err
    picked = ended.json
    check_shape(picked, shape({**PICKED, "export": {"type": "null"}}))
    fitting = [
        trial
        for trial in view["trials"]
        if trial["size_bytes"] <= 0.35 * dense["size_bytes"]
        and trial["latency_ms"] <= 2 * dense["latency_ms"]
    ]
    assert picked["quality"] == max(trial["quality"] for trial in fitting)
    assert picked["size_bytes"] <= 0.35 * dense["size_bytes"]
    smallest = command.run("pick", finished, "--quality", "50%", "--least", "size", "--json").json
    check_shape(smallest, shape({**PICKED, "export": {"type": "null"}}))
    assert smallest["size_bytes"] == min(
        trial["size_bytes"]
        for trial in view["trials"]
        if trial["quality"] >= 0.5 * dense["quality"]
    )
    assert stamps(finished) == before


def test_pick_of_what_nothing_meets(command: Command, finished: Path) -> None:
    ended = command.run("pick", finished, "--size", "1%")
    assert "Nearest:" in ended.complaint(3)
    assert "raise the limit to" in ended.err
    failed = command.run("pick", finished, "--size", "1%", "--json")
    assert failed.status == 3
    error = json.loads(failed.err)["error"]
    assert error["exit_status"] == 3
    assert error["nearest"] in keys(finished, "trial")
    assert error["binding"] == "size_bytes"


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "autocomp"):
            raise ImportError(f"{name} is not for users of the exported model")
sys.meta_path.insert(0, Refuse())
"""


def test_the_exported_directory_loads_as_its_card_says(
    command: Command, finished: Path, view: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "some" / "out"
    before = stamps(finished)
    ended = command.run("pick", finished, "--export", out, "--json")
    assert ended.status == 0, ended.err
    picked = ended.json
    assert picked["id"] == view["chosen"]
    check_shape(picked, shape({**PICKED, "export": EXPORT}))
    export = picked["export"]
    assert export["files"] == sorted(file.name for file in out.iterdir())
    assert export["max_difference"] <= 1e-5
    assert export["size_bytes"] == picked["size_bytes"] == (out / "model.onnx").stat().st_size
    assert 0.3 < export["measured"]["latency_ms"] / picked["latency_ms"] < 3  # a noisy host
    assert stamps(finished) == before

    card = (out / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load((out / "candidate.yaml").read_text()) == picked["candidate"]
    report = {e["key"]: e["payload"] for e in ledger(finished) if e["kind"] == "report"}
    assert f"report split, after selection: {report[picked['id']]['quality']:.4g}" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 0 < len(code.splitlines()) <= 12
    code = code.replace("Shares rise as bank beats forecasts", "sport0 sport1 common3 sport4")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE + code],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in TOPICS
    if picked["quality"] > 0.9:
        assert ran.stdout.strip() == "sport"

    again = command.run("pick", finished, "--export", out)
    assert "is not empty" in again.complaint()


def without_phases(path: Path) -> list[str]:
    """The lines of a ledger except how long each call's phases took."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith('{"kind": "phase"')]


def test_searching_again_runs_and_builds_nothing(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    """Also from a ledger whose last line was torn by a crash."""

    def durable(files: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        changing = ("mlflow", "mlartifacts", "lease", "log.txt", "front.", "gate")
        return {name: stamp for name, stamp in files.items() if not name.startswith(changing)}

    copy = tmp_path / "study"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("mlflow*", "mlartifacts"))
    study, cache = durable(stamps(copy)), stamps(command.cache)
    whole = without_phases(copy / "ledger.jsonl")
    with (copy / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "trial", "key": "cut off in the mid')
    ended = command.search(copy, options=("--json", "--quiet"))
    assert ended.status == 0, ended.err
    assert ended.json["trials"] == json.loads((finished / "front.json").read_text())["trials"]
    assert "Traceback" not in ended.err
    assert without_phases(copy / "ledger.jsonl") == whole
    assert "cut off in the mid" not in (copy / "ledger.jsonl").read_text(encoding="utf-8")
    after = durable(stamps(copy))
    del study["ledger.jsonl"], after["ledger.jsonl"]
    assert after == study
    assert stamps(command.cache) == cache


@pytest.mark.parametrize("kind", ["operators", "targets", "tasks", "exporters"])
def test_ls(command: Command, kind: str) -> None:
    ended = command.run("ls", kind, "--json")
    assert ended.status == 0, ended.err
    rows = ended.json
    check_shape(rows, ROWS)
    if kind == "operators":
        assert {"rtn", "gptq", "heads", "width", "skip"} <= {row["name"] for row in rows}
        assert all(row["options"] for row in rows), "how a spec asks for it"
        gains = {
            row["name"]: {*row["speeds_up"], *row["shrinks"], *row["saves_memory"]} for row in rows
        }
        idle = [name for name, targets in gains.items() if "onnxruntime-cpu" not in targets]
        assert not idle, "every operator pays for something"
    if kind == "targets":
        names = ["onnxruntime-cpu", "openvino-cpu", "openvino_bf16-cpu"]
        assert [row["name"] for row in rows] == names


def test_check(command: Command, view: dict[str, Any]) -> None:
    ended = command.run("check", *command.spec_arguments(), "--json")
    assert ended.status == 0, ended.err
    report = ended.json
    assert report["problems"] == []
    assert report["reachable"]
    options = {unit["name"]: unit["options"] for unit in report["units"]}
    assert list(options) == list(view["trials"][0]["candidate"]["units"])
    product = math.prod(options.values())
    assert report["space_log10"] == pytest.approx(math.log10(product), abs=0.01)
    dense = trials(view)["dense"]["size_bytes"]
    assert report["dense_size_bytes"] == pytest.approx(dense, rel=0.03)
    smallest = min(trial["size_bytes"] for trial in view["trials"])
    assert report["smallest_size_bytes"] <= 1.02 * smallest


def test_profile(command: Command, view: dict[str, Any]) -> None:
    ended = command.run("profile", *command.spec_arguments(), "--json", "--quiet")
    assert ended.status == 0, ended.err
    table = ended.json
    assert set(table) == {"target", "estimated", "units"}
    dense = trials(view)["dense"]
    assert table["estimated"]["dense"]["size_bytes"] == pytest.approx(dense["size_bytes"], rel=0.02)
    assert table["estimated"]["smallest"]["size_bytes"] < 0.5 * dense["size_bytes"]
    shown = " ".join(command.run("profile", *command.spec_arguments(), "--quiet").out.split())
    assert "layers.0–1.ffn dense" in shown
    assert "of that for whole candidates" in shown
    for options in table["units"].values():
        assert "dense" in options
        assert all(cost["size_bytes"] >= 0 for cost in options.values())
    ffn = table["units"]["layers.0.ffn"]
    assert min(cost["size_bytes"] for cost in ffn.values()) == 0  # skipped
    assert sorted(ended.json["units"]) == sorted(dense["candidate"]["units"])


def test_a_search_writes_its_study_and_the_cache_alone(
    finished: Path, footprint: dict[str, set[str]]
) -> None:
    assert {name.partition("/")[0] for name in footprint["working directory"]} == {
        finished.name,
        "cache",
    }
    assert footprint["checkout"] == set()


def test_where_nothing_measured_fits_the_front_is_shown_and_kept(
    command: Command, finished: Path, view: dict[str, Any], tmp_path: Path
) -> None:
    """Smaller ones than any measured are predicted, but no trial is asked for."""
    checked = command.run("check", *command.spec_arguments(), "--json").json
    measured = min(trial["size_bytes"] for trial in view["trials"])
    limit = (checked["smallest_size_bytes"] + measured) // 2
    assert limit < measured
    other = tmp_path / "other"
    options = ("--fork", str(other), "--trials", "0", "--screen", "0", "--quiet")
    ended = command.search(finished, f"budget.size={limit} B", options=options)
    assert ended.status == 3, ended.err
    assert "Nearest:" in ended.err
    assert "raise the limit to size" in ended.err
    assert "No measured model meets the budget." in ended.out
    assert all(trial["id"] in ended.out for trial in view["trials"])
    front = json.loads((other / "front.json").read_text(encoding="utf-8"))
    check_shape(front, FRONT)
    assert front["chosen"] is None
    assert front["nearest"]["binding"] == "size_bytes"
    assert [trial["id"] for trial in front["trials"]] == [trial["id"] for trial in view["trials"]]
    assert "uniform-int8" in (other / "front.html").read_text(encoding="utf-8")
