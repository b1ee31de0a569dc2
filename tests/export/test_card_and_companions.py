"""The model card and the files an exported model is shipped with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from small_trial import RECORD, SPEC, QuickTarget, companions, runnable, small_trial

from autocomp.core.errors import InternalError, UserError
from autocomp.export import EXPORTERS, own_format
from autocomp.export.artifact import ONNX, OPENVINO, reloaded_logits
from autocomp.export.card import model_card
from autocomp.export.companions import Companions
from autocomp.export.protocol import ExportRequest
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget
from autocomp.targets.protocol import Artifact, Target


@pytest.fixture
def request_(tmp_path: Path) -> ExportRequest:
    return small_trial(tmp_path)


def test_companions_are_what_was_given(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.float32).reshape(1, 3, 4)[:, ::-1]  # not contiguous
    kept = companions(tmp_path, ("été", "low"), {"pixel_values": pixels})
    again = Companions(kept.directory)
    assert again.label_names == ("été", "low")
    np.testing.assert_array_equal(again.inputs["pixel_values"], pixels)
    assert [file.name for file in again.files()] == ["tokenizer.json"]


def test_the_card_says_what_was_measured(request_: ExportRequest) -> None:
    card = model_card(request_, "model.onnx")
    assert card.startswith("# shop/model, compressed\n")
    assert "| latency | 1 ms | 25.0% | 1.1 ms |" in card
    assert "| peak memory | 75 MB | 75.0% | – |" in card
    assert "accuracy on the search split: 0.875" in card
    assert "report split, after selection: 0.8125 (teacher 0.84; quality 96.7% of" in card
    assert "the report split was opened for this candidate of the study" in card
    assert "Latency is processor time of one thread, normalised by an anchor model" in card
    assert "batch 1, 128 tokens, 1 thread(s)" in card


def test_the_card_says_how_many_were_looked_at(request_: ExportRequest) -> None:
    assert request_.report is not None
    asked = replace(request_, report={**request_.report, "candidates": 3})
    assert "was opened for 3 candidates of the study" in model_card(asked, "model.onnx")


def test_the_card_says_the_clock(request_: ExportRequest) -> None:
    workload = request_.spec.target.workload.model_copy(update={"threads": 4})
    target = request_.spec.target.model_copy(update={"workload": workload})
    assert request_.record.measured is not None
    measured = replace(request_.record.measured, latency_wall_ms=1.25)
    asked = replace(
        request_,
        spec=request_.spec.model_copy(update={"target": target}),
        record=replace(request_.record, measured=measured),
    )
    card = model_card(asked, "model.onnx")
    assert "Latency is wall-clock time on 4 threads, normalised by an anchor model" in card
    assert "the plain wall-clock median was 1.25 ms." in card


@pytest.mark.parametrize(
    ("labels", "inputs", "says"),
    [
        (
            ("a",),
            {name: np.zeros((1, 4), np.int64) for name in ("input_ids", "attention_mask")},
            'Path("labels.txt")',
        ),
        ((), {"input_ids": np.zeros((1, 4), np.int64)}, "most likely next token"),
        (("a",), {"pixel_values": np.zeros((1, 3, 28, 28), np.float32)}, "pixel_values"),
    ],
)
def test_how_to_load_suits_the_task_and_is_python(
    request_: ExportRequest, tmp_path: Path, labels: Any, inputs: Any, says: str
) -> None:
    other = companions(tmp_path / "source", labels, inputs)
    code = model_card(replace(request_, companions=other), "model.onnx").partition("```python\n")[2]
    code = code.partition("```")[0]
    compile(code, "card", "exec")
    assert says in code
    assert "torch" not in code


def test_missing_figures_are_dashes(request_: ExportRequest) -> None:
    bare = replace(RECORD, metric={}, teacher_kl=None, estimated=None)
    card = model_card(replace(request_, record=bare, dense=None, report=None), "model.onnx")
    assert "| latency | 1 ms | – | – |" in card
    assert "None" not in card.partition("## Load")[0]
    assert "report split" not in card


def test_the_card_loads_the_file_in_its_own_runtime(request_: ExportRequest) -> None:
    card = model_card(request_, "model.xml")
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})' in code
    assert "onnxruntime" not in code
    assert "bfloat16" not in card


def test_the_card_says_that_floats_are_computed_in_bfloat16(request_: ExportRequest) -> None:
    candidate = replace(request_.record.candidate, runtime="openvino_bf16")
    record = replace(request_.record, candidate=candidate)
    card = model_card(replace(request_, record=record), "model.xml")
    assert "Target: openvino_bf16 on cpu" in card
    assert "in integers is computed in bfloat16" in card
    assert 'compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})' in card


def test_another_runtimes_format_is_refused(request_: ExportRequest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"as openvino: .* made and measured as model\.onnx"):
        OPENVINO.write(request_, tmp_path / "out")
    assert own_format(request_.artifact) == "onnx"
    assert own_format(Artifact(Path("model.xml"), 1)) == "openvino"


@pytest.fixture
def real(request_: ExportRequest, tmp_path: Path) -> tuple[ExportRequest, Target]:
    """A request of a model that runs, and its target."""
    target = QuickTarget(SPEC.target.workload)
    return runnable(request_, target, tmp_path), target


def test_export_is_whole_and_verified(
    real: tuple[ExportRequest, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, target = real
    out = tmp_path / "deep" / "out"
    ONNX.write(request, out)
    assert {file.name for file in out.iterdir()} == {
        "README.md", "candidate.yaml", "labels.txt", "model.onnx", "tokenizer.json",
    }  # fmt: skip
    assert (out / "labels.txt").read_text() == "bad\ngood\n"
    opened: list[Path] = []

    def run(artifact: Artifact, inputs: Any) -> Any:
        opened.append(artifact.path)
        return OnnxRuntimeTarget.run(target, artifact, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(target, "run", run)
    verified = ONNX.verify(request, out, target)
    assert opened == [request.artifact.path], "the copy is opened elsewhere"
    assert verified.max_difference == 0
    assert verified.size_bytes == (out / "model.onnx").stat().st_size
    assert verified.measured is not None
    assert verified.measured.latency_ms == 1.02
    with pytest.raises(UserError, match="is not empty"):
        ONNX.write(request, out)


def test_a_damaged_export_is_found(real: tuple[ExportRequest, Target], tmp_path: Path) -> None:
    request, target = real
    out = tmp_path / "out"
    ONNX.write(request, out)
    whole = (out / "model.onnx").read_bytes()
    one = np.array([0, 1], np.float32).tobytes()
    assert whole.count(one) == 1
    other = np.array([0, 1.5], np.float32).tobytes()
    for damaged, says in (
        (whole.replace(one, other), "logits differ from the evaluated artifact's by 2"),
        (whole.replace(b"logits", b"lOgits"), "cannot be reloaded by its runtime"),
        (bytes(len(whole)), "cannot be reloaded by its runtime"),
        (whole[:-1], "bytes"),
    ):
        (out / "model.onnx").write_bytes(damaged)
        with pytest.raises(InternalError, match=says):
            ONNX.verify(request, out, target)
    (out / "model.onnx").write_bytes(whole)
    assert ONNX.verify(request, out, target).max_difference == 0


def test_the_process_that_reloads_has_the_runtime_and_numpy_alone(
    real: tuple[ExportRequest, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the runtime itself drags in torch, verification fails."""
    request, target = real
    out = tmp_path / "out"
    ONNX.write(request, out)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "onnxruntime.py").write_text("import torch\n")
    monkeypatch.setenv("PYTHONPATH", str(fake))
    with pytest.raises(InternalError, match="torch is not for users of the exported model"):
        ONNX.verify(request, out, target)


def test_a_model_with_a_cache_is_reloaded_with_an_empty_one(tmp_path: Path) -> None:
    """float and int8 caches, a state of constant size and a length: the shape of each is logits."""
    make, value = helper.make_node, helper.make_tensor_value_info
    caches = [
        value("past_key_values.0.key", 1, ["batch", 2, "past", 4]),
        value("past_key_values.0.value", 3, ["batch", 2, "past", 4]),
        value("past_state.1.sum", 1, ["batch", 5]),
        value("past_length", 7, [1]),
    ]
    nodes = [make("Shape", [one.name], [f"shape{i}"]) for i, one in enumerate(caches)]
    nodes.append(make("Concat", [f"shape{i}" for i in range(4)], ["logits"], axis=0))
    given = [value("input_ids", 7, ["batch", "sequence"]), *caches]
    graph = helper.make_graph(nodes, "cache", given, [value("logits", 7, [None])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    inputs = {"input_ids": np.ones((3, 7), np.int64)}
    found = reloaded_logits(Artifact(path, path.stat().st_size), inputs, 1)
    assert found.tolist() == [3, 2, 0, 4, 3, 2, 0, 4, 3, 5, 1]


def test_a_failed_export_leaves_nothing(request_: ExportRequest, tmp_path: Path) -> None:
    (request_.artifact.path.parent / "folder").mkdir()  # cannot be copied as a file
    out = tmp_path / "elsewhere" / "out"
    with pytest.raises(InternalError):
        ONNX.write(request_, out)
    assert list(out.parent.iterdir()) == []


def test_openvino_is_exported_and_its_card_runs(request_: ExportRequest, tmp_path: Path) -> None:
    """The IR of a small BERT, reloaded; the card's code finds its files and prints a label."""
    pytest.importorskip("openvino", reason="the runtime is an extra")
    from autocomp.spec.schema import TargetSection
    from autocomp.targets import make_target

    exporter = EXPORTERS.get("openvino")
    target = make_target(TargetSection(runtime="openvino"))
    request = runnable(request_, target, tmp_path)
    artifact = request.artifact
    out = tmp_path / "out"
    exporter.write(request, out)
    assert {"model.xml", "model.bin", "README.md"} <= {file.name for file in out.iterdir()}
    verified = exporter.verify(request, out, target)
    assert verified.max_difference == 0
    assert verified.size_bytes == artifact.size_bytes
    whole = (out / "model.bin").read_bytes()
    (out / "model.bin").write_bytes(whole.replace(np.float32(1).tobytes(), np.float32(2).tobytes()))
    with pytest.raises(InternalError, match="logits differ"):
        exporter.verify(request, out, target)
    (out / "model.bin").write_bytes(whole)
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    stub = (
        "import sys, types; ids = types.SimpleNamespace(ids=[1, 2, 3], attention_mask=[1, 1, 1])\n"
        "load = types.SimpleNamespace(encode=lambda text: ids)\n"
        "made = types.SimpleNamespace(from_file=lambda file: load)\n"
        "sys.modules['tokenizers'] = types.SimpleNamespace(Tokenizer=made)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stub + code], cwd=out, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "good"
