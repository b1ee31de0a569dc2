"""Targets: lower a model to a runtime, measure latency, size and peak memory, predict them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.registry import Registry
from autocomp.spec.schema import TargetSection

if TYPE_CHECKING:
    from autocomp.targets.protocol import Artifact, Target

TARGETS: Registry[Callable[..., Target]] = Registry(
    "targets",
    {
        "onnxruntime-cpu": "autocomp.targets.onnxruntime_cpu:OnnxRuntimeTarget",
        "openvino-cpu": "autocomp.targets.openvino_cpu:OpenVinoTarget",
        "openvino_bf16-cpu": "autocomp.targets.openvino_bf16:OpenVinoBf16Target",
    },
)
"""Runtime-device name → a callable `(workload, device=..., gate=..., reference=...) -> Target`."""


def make_target(
    section: TargetSection, gate: Gate = NO_GATE, reference: Mapping[str, Any] | None = None
) -> Target:
    """The target of a spec.

    Args:
        section: device, runtime, workload; where the spec leaves a choice of runtimes, `on` one.
        gate: held alone while measuring.
        reference: the anchor's latency a study recorded first, as JSON; makes figures comparable.

    Raises:
        UserError: for an unknown target, or one whose runtime is not installed.
    """
    from autocomp.targets.timing import Reference

    return TARGETS.get(section.label)(
        section.workload,
        device=section.device,
        gate=gate,
        reference=None if reference is None else Reference(**reference),
    )


def open_artifact(directory: Path) -> Artifact:
    """A model that was written before.

    Raises:
        StudyError: if it is not there.
    """
    from autocomp.core.errors import StudyError
    from autocomp.targets.protocol import Artifact

    for name, files in (("model.onnx", "model.onnx*"), ("model.xml", "model.*")):
        path = directory / name
        if path.is_file():
            return Artifact(path, sum(file.stat().st_size for file in directory.glob(files)))
    raise StudyError(f"{directory} holds no model: this trial's exported model was removed")
