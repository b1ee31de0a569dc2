"""A small classifier of one ONNX node or two as a finished trial, and its target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocomp.core.candidate import Candidate
from autocomp.core.measurement import Measurement
from autocomp.export.companions import Companions
from autocomp.export.protocol import ExportRequest
from autocomp.spec.schema import Spec
from autocomp.study.records import TrialRecord
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget
from autocomp.targets.protocol import Artifact, Target


def spec_of(task: str) -> Spec:
    """A spec of the model that is exported."""
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "package:shop/model"},
            "task": {"name": task, "data": {"source": "data.jsonl"}},
            "budget": {"latency": "50%"},
            "space": [{"match": "*"}],
        }
    )


SPEC = spec_of("text-classification")
DENSE = Measurement("measured", 4.0, 10_000_000, 100_000_000)
RECORD = TrialRecord(
    id="6fc4fb7607",
    kind="search",
    proposed_by="milp",
    state="complete",
    candidate=Candidate.of({}),
    quality=0.875,
    teacher_kl=0.0123,
    metric={"name": "accuracy", "value": 0.875},
    measured=Measurement("measured", 1.0, 5, 75_000_000),
    estimated=Measurement("estimated", 1.1, 2_400_000),
    artifact="artifacts/6fc4fb7607",
)


def companions(path: Path, labels: tuple[str, ...], inputs: dict[str, Any]) -> Companions:
    source = path / "source"
    source.mkdir(exist_ok=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "secrets.txt").write_text("not for shipping")
    kept = Companions(path / "companions")
    assert not kept.complete
    kept.write(source, labels, inputs)
    assert kept.complete
    return kept


def small_trial(path: Path) -> ExportRequest:
    """A trial whose files are there, though its model does not run."""
    artifact = path / "artifact" / "model.onnx"
    artifact.parent.mkdir()
    artifact.write_bytes(b"graph")
    return ExportRequest(
        SPEC,
        RECORD,
        Artifact(artifact, 5),
        companions(path, ("bad", "good"), {"input_ids": np.arange(4)[None]}),
        replace(RECORD, id="dense", kind="dense", measured=DENSE),
        {"quality": 0.8125, "teacher_quality": 0.84},
    )


def tiny_classifier() -> onnx.ModelProto:
    """Logits 0 and the sum of the ids that are not masked."""
    make = helper.make_node
    nodes = [
        make("Mul", ["input_ids", "attention_mask"], ["kept"]),
        make("Cast", ["kept"], ["real"], to=1),
        make("ReduceSum", ["real", "axes"], ["sum"], keepdims=1),
        make("Mul", ["sum", "weights"], ["logits"]),
    ]
    ints = [
        helper.make_tensor_value_info(name, 7, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
        numpy_helper.from_array(np.array([0, 1], np.float32), "weights"),
    ]
    logits = helper.make_tensor_value_info("logits", 1, ["batch", 2])
    graph = helper.make_graph(nodes, "tiny", ints, [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


class QuickTarget(OnnxRuntimeTarget):
    """ONNX Runtime, where nobody waits for the latency."""

    def measure(self, artifact: Artifact, inputs: Any) -> Measurement:
        return Measurement("measured", 1.02, artifact.size_bytes)


def runnable(trial: ExportRequest, target: Target, path: Path) -> ExportRequest:
    """The trial with a model that runs on the target."""
    artifact = target.write(tiny_classifier(), path / "runnable")
    inputs = {name: np.ones((2, 4), np.int64) for name in ("input_ids", "attention_mask")}
    (path / "own").mkdir()
    kept = companions(path / "own", ("bad", "good"), inputs)
    return replace(trial, artifact=artifact, companions=kept)
