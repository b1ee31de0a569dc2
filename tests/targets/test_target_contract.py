"""The contract of a target, carried out on the three there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

from autocomp.core.errors import UserError
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.protocol import Target
from autocomp.testing.target_contract import TargetContract


class TestOnnxRuntime(TargetContract):
    runtime: ClassVar[str] = "onnxruntime"

    @pytest.fixture
    def make(self) -> Callable[[WorkloadSection], Target]:
        def made(workload: WorkloadSection) -> Target:
            try:
                return make_target(TargetSection(runtime=self.runtime, workload=workload))
            except UserError as error:
                pytest.skip(str(error))

        return made


class TestOpenVino(TestOnnxRuntime):
    runtime = "openvino"


class TestOpenVinoBf16(TestOnnxRuntime):
    runtime = "openvino_bf16"
    tolerance = 0.1
