"""The contract of an export format, carried out on the four there are."""

from __future__ import annotations

from typing import Any

import pytest
from exported import finished, quantise_unit
from reduced import keep_width
from small_trial import SPEC, QuickTarget, runnable, small_trial

from autocomp.export import EXPORTERS
from autocomp.export.protocol import Exporter, ExportRequest
from autocomp.spec.schema import TargetSection
from autocomp.targets import make_target
from autocomp.targets.protocol import Target
from autocomp.testing.exporter_contract import ExporterContract


class TestOnnx(ExporterContract):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return EXPORTERS.get("onnx")

    @pytest.fixture
    def target(self) -> Target:
        return QuickTarget(SPEC.target.workload)

    @pytest.fixture
    def trial(self, tmp_path_factory: pytest.TempPathFactory, target: Target) -> ExportRequest:
        path = tmp_path_factory.mktemp("trial")
        return runnable(small_trial(path), target, path)


class TestOpenVino(TestOnnx):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return EXPORTERS.get("openvino")

    @pytest.fixture
    def target(self) -> Target:
        pytest.importorskip("openvino", reason="the runtime is an extra")
        return make_target(TargetSection(runtime="openvino"))


class TestHuggingFace(ExporterContract):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return EXPORTERS.get("huggingface")

    @pytest.fixture
    def target(self) -> Any:
        return None  # asked only where the vocabulary is pruned

    @pytest.fixture
    def trial(self, tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
        def edit(model: Any, units: Any) -> None:
            keep_width(model, units["layers.0.ffn"], range(20))

        return finished(tmp_path_factory.mktemp("trial"), "bert", edit).request


class TestCompressedTensors(TestHuggingFace):
    @pytest.fixture
    def exporter(self) -> Exporter:
        pytest.importorskip("compressed_tensors", reason="the format is an extra")
        return EXPORTERS.get("compressed-tensors")

    @pytest.fixture
    def trial(self, tmp_path_factory: pytest.TempPathFactory) -> ExportRequest:
        def edit(model: Any, units: Any) -> None:
            quantise_unit(model, units["layers.0.ffn"], 8)

        return finished(tmp_path_factory.mktemp("trial"), "llama", edit).request
