"""The ONNX Runtime target as a whole: files, measurements, memory, fingerprint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from target_examples import target

from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.core.unit import SiteFormat
from autocomp.spec.schema import WorkloadSection
from autocomp.targets import onnxruntime_cpu
from autocomp.targets.anchor import anchor_model
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget
from autocomp.targets.timing import Reference


@pytest.fixture
def small(exported, tmp_path):
    """(artifact, inputs, model, lowered) of the small BERT."""
    model, units, task, skeleton = exported("bert")
    runtime = target()
    lowered = runtime.lower(skeleton, model, units)
    inputs = {name: value.numpy() for name, value in task.example_inputs(1, 12).items()}
    return runtime.write(lowered, tmp_path), inputs, model, lowered


def test_big_models_have_their_weights_beside_them(small, tmp_path, monkeypatch):
    _, inputs, model, lowered = small
    monkeypatch.setattr(onnxruntime_cpu, "_PROTOBUF_LIMIT", 1000)
    artifact = target().write(lowered, tmp_path / "big")
    files = sorted(path.name for path in artifact.path.parent.iterdir())
    assert files == ["model.onnx", "model.onnx.data"]
    assert artifact.size_bytes == sum(p.stat().st_size for p in artifact.path.parent.iterdir())
    assert target().verify(artifact, model, inputs) < 1e-4


def test_a_measurement_is_whole_and_in_reference_milliseconds(small, tmp_path: Path, monkeypatch):
    artifact, inputs, *_ = small
    runtime = OnnxRuntimeTarget(
        WorkloadSection(batch=1, sequence=12),
        gate=Gate(tmp_path / "gate"),
        reference=Reference(10.0, "x"),
    )
    timings = []
    time_session = runtime.time_session

    def keep(*args, **settings):
        timings.append(time_session(*args, **settings))
        return timings[-1]

    monkeypatch.setattr(runtime, "time_session", keep)
    once = runtime.measure(artifact, inputs)
    assert once.provenance == "measured"
    assert once.size_bytes == artifact.size_bytes
    assert once.device == runtime.fingerprint()
    (timing,) = timings
    assert timing.anchor_ms > 0
    assert timing.runs >= 40
    assert once.latency_ms == pytest.approx(10 * timing.ratio), "the anchor stands for 10 ms"


def test_peak_memory_grows_with_the_model(small, tmp_path):
    artifact, inputs, _, lowered = small
    small_peak = target().peak_memory(artifact, inputs)
    bigger = onnx.ModelProto()
    bigger.CopyFrom(lowered)
    ballast = np.ones((5_000_000,), np.float32)
    bigger.graph.initializer.append(onnx.numpy_helper.from_array(ballast, "ballast"))
    bigger.graph.output.append(onnx.helper.make_tensor_value_info("used", 1, None))
    bigger.graph.node.append(onnx.helper.make_node("Neg", ["ballast"], ["used"]))
    large = target().write(bigger, tmp_path / "large")
    assert 20e6 < small_peak < 300e6
    assert target().peak_memory(large, inputs) > small_peak + 15e6


def test_the_anchor_is_always_the_same():
    assert anchor_model().SerializeToString() == anchor_model().SerializeToString()


def test_other_devices_are_refused():
    with pytest.raises(InternalError, match="not 'cuda'"):
        OnnxRuntimeTarget(WorkloadSection(), device="cuda")


def test_formats_and_bytes_go_by_the_workload():
    spec = SiteFormat(64, 512, True, weight_bits=4, group=32, activation_bits=8)
    assert target().formats_supported(spec) is None
    assert target(sequence=1).size_bytes(spec) > target(sequence=64).size_bytes(spec)
