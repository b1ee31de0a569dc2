"""Two real runtimes in one study, to exports that their runtimes verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_study import Command

from autocomp.api.opened import Picked, open_study
from autocomp.core.budget import Budget
from autocomp.front.choice import Choice
from autocomp.front.noise import Noise

openvino = pytest.importorskip("openvino", reason="the runtime is an extra")
pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

RUNTIMES = ("onnxruntime", "openvino")


def test_a_search_over_both_runtimes_exports_either(command: Command, tmp_path: Path) -> None:
    study = tmp_path / "study"
    settings = ("target.runtime=[onnxruntime, openvino]", "search.trials=2", "search.screen=6")
    ended = command.run(
        "search", *command.spec_arguments(*settings), "--study", study, "--json", timeout_s=800
    )
    assert ended.status == 0, ended.err
    trials = ended.json["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert {t["runtime"] for t in trials if t["kind"] == "search"} <= set(RUNTIMES)
    assert {trial["runtime"] for trial in trials} == set(RUNTIMES)
    front = command.run("front", study, "--json").json
    assert {trial["id"] for trial in front["trials"] if trial["on_front"]}

    # Two budgets: the best of all, and of those as fast as the fastest.
    fastest = min(trials, key=lambda trial: trial["latency_ms"])
    limits = (("--size", "100%"), ("--latency", f"{1.001 * fastest['latency_ms']} ms"))
    picked = [command.run("pick", study, *limit, "--best", "--json").json for limit in limits]
    assert picked[0]["quality"] >= picked[1]["quality"]
    assert picked[1]["id"] == fastest["id"]

    opened = open_study(study)
    exported = set()
    for runtime in RUNTIMES:
        found = next(t for t in opened.trials() if t.candidate.runtime == runtime and t.artifact)
        out = tmp_path / runtime
        choice = Choice(found, found, found, (found,), Noise.of({}, {}), 1)
        report = Picked(opened, choice, Budget()).export(out)
        assert report["max_difference"] == 0
        exported |= {file.suffix for file in out.iterdir() if file.stem == "model"}
        assert f"Target: {runtime} on cpu" in (out / "README.md").read_text()
    assert {".onnx", ".xml", ".bin"} <= exported

    # Whoever has the directory and OpenVINO alone gets the trial's model.
    settings_of_the_card = {"INFERENCE_PRECISION_HINT": "f32"}
    path = tmp_path / "openvino" / "model.xml"
    compiled = openvino.Core().compile_model(path, "CPU", settings_of_the_card)
    ids = np.array([[2, 20, 21, 170, 3]])
    logits = compiled({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    assert logits.shape == (1, 3)
    assert np.isfinite(logits).all()
