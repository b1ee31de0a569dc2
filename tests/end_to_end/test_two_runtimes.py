"""Two runtimes in one study: the second one comes from a package of its own, as anyone's would.

It is ONNX Runtime again, said to take half the time, and without 8-bit embeddings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_study import Command, Ended, keys, ledger

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

TARGET = '''
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget


class HastyTarget(OnnxRuntimeTarget):
    """ONNX Runtime, in half the time."""

    name = "hasty-cpu"

    def formats_supported(self, format):
        if format.embedding and format.weight_bits == 8:
            return "stores no 8-bit embeddings"
        return super().formats_supported(format)

    def to_ms(self, timing):
        return 0.5 * super().to_ms(timing)
'''
SETTINGS = ("target.runtime=[onnxruntime, hasty]", "budget.latency=80%", "budget.size=90%")
BOTH = {"onnxruntime", "hasty"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Put on the path, it registers a target through an entry point."""
    root = tmp_path_factory.mktemp("package")
    (root / "hasty_target.py").write_text(TARGET, encoding="utf-8")
    about = root / "hasty-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hasty\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[autocomp.targets]\nhasty-cpu = hasty_target:HastyTarget\n"
        "absent-cpu = a_package_nobody_has:Target\n"
    )
    return root


@pytest.fixture
def search(
    command: Command, package: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Command, Path]:
    """The command line with that package, and where its study is."""
    monkeypatch.setenv("PYTHONPATH", str(package))
    return command, command.directory / "both"


def searched(command: Command, study: Path, *settings: str) -> Ended:
    arguments = command.spec_arguments(*SETTINGS, *settings)
    ended = command.run("search", *arguments, "--study", study, "--json", timeout_s=800)
    assert ended.status == 0, ended.err
    return ended


@pytest.mark.slow  # test_openvino_study has two real ones
def test_one_front_of_two_runtimes(search: tuple[Command, Path]) -> None:
    command, study = search
    view = searched(command, study).json
    trials: dict[str, dict[str, Any]] = {trial["id"]: trial for trial in view["trials"]}
    for trial in trials.values():
        assert trial["state"] == "complete"
        assert trial["candidate"]["runtime"] == trial["runtime"]
    assert {trial["runtime"] for trial in trials.values()} == BOTH
    assert {t["runtime"] for t in trials.values() if t["kind"] == "search"} == BOTH
    assert {"dense", "dense-hasty", "uniform-int8", "uniform-int8-hasty"} <= set(trials)
    assert trials["dense"]["runtime"] == "onnxruntime"

    # Limits relative to dense mean one number: those of the first runtime.
    assert view["dense"] == "dense"
    assert view["budget"]["latency_ms"] == pytest.approx(0.8 * trials["dense"]["latency_ms"])
    assert trials["dense-hasty"]["latency_ms"] < 0.8 * trials["dense"]["latency_ms"]
    assert trials["dense-hasty"]["size_bytes"] == trials["dense"]["size_bytes"]
    chosen = trials[view["chosen"]]
    assert chosen["feasible"]
    best = trials[view["selection"]["best"]]
    assert best["quality"] == max(t["quality"] for t in trials.values() if t["feasible"])

    # What one runtime lacks is excluded there alone.
    embeddings = {True: set[str](), False: set[str]()}
    for trial in trials.values():
        if trial["kind"] == "uniform":
            dense = not trial["candidate"]["units"]["embeddings"]
            embeddings[dense].add(trial["id"])
    assert "uniform-int8" in embeddings[False]
    assert "uniform-int8-hasty" in embeddings[True]
    for trial in trials.values():
        if trial["runtime"] == "hasty":
            assert not trial["candidate"]["units"]["embeddings"]

    tables = {
        runtime: json.loads((study / f"cost_table.{runtime}.json").read_text()) for runtime in BOTH
    }
    assert not (study / "cost_table.json").exists()
    offered = {name: len(table["entries"]["embeddings"]) for name, table in tables.items()}
    assert offered == {"onnxruntime": 2, "hasty": 1}
    assert len(keys(study, "reference")) == 2
    proposed = [
        e["payload"]["candidate"]["runtime"] for e in ledger(study) if e["kind"] == "screen"
    ]
    assert set(proposed) == BOTH
    assert "hasty" in command.run("front", study).out


@pytest.mark.slow
def test_it_resumes_and_picks_across_runtimes(search: tuple[Command, Path], tmp_path: Path) -> None:
    command, study = search
    before = [entry for entry in ledger(study) if entry["kind"] != "phase"]
    assert before, "the study of the test before"
    searched(command, study)
    assert [entry for entry in ledger(study) if entry["kind"] != "phase"] == before

    trials = {e["key"]: e["payload"] for e in before if e["kind"] == "trial"}
    fastest = min(trials.values(), key=lambda trial: trial["measured"]["latency_ms"])
    assert fastest["candidate"]["runtime"] == "hasty"
    limit = f"{1.001 * fastest['measured']['latency_ms']} ms"
    out = tmp_path / "out"
    ended = command.run("pick", study, "--latency", limit, "--export", out, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["runtime"] == "hasty"
    assert ended.json["export"]["max_difference"] == 0
    assert "Target: hasty on cpu" in (out / "README.md").read_text()
    assert "runtime: hasty" in (out / "candidate.yaml").read_text()
    shutil.rmtree(study)


def test_check_tells_what_was_left_out_and_why(search: tuple[Command, Path]) -> None:
    command, _ = search
    every = command.spec_arguments(*SETTINGS, "target.runtime=auto")
    report = command.run("check", *every, "--json").json
    options = {each["runtime"]: each["options"] for each in report["runtimes"]}
    assert next(iter(options)) == "onnxruntime"
    assert options.keys() - {"openvino", "openvino_bf16"} == BOTH
    assert options["onnxruntime"] > options["hasty"]
    left_out = next(note for note in report["notes"] if note.startswith("runtime absent"))
    assert left_out.startswith("runtime absent is left out: ")
    assert "a_package_nobody_has" in left_out
    not_there = next(note for note in report["notes"] if note.startswith("not on hasty"))
    assert not_there.startswith("not on hasty: embeddings, rtn")
    assert not_there.endswith("it stores no 8-bit embeddings")

    named = command.run("check", *command.spec_arguments("target.runtime=[onnxruntime, absent]"))
    assert "absent-cpu cannot be used here" in named.complaint()
