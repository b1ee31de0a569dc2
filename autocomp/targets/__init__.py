"""Targets: lower a model to a runtime, measure latency, size and peak memory, predict them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autocomp.core.registry import Registry

if TYPE_CHECKING:
    from autocomp.targets.protocol import Target

TARGETS: Registry[Callable[..., Target]] = Registry(
    "targets", {"onnxruntime-cpu": "autocomp.targets.onnxruntime_cpu:OnnxRuntimeTarget"}
)
"""Runtime-device name → a callable `(workload, device=..., gate=...) -> Target`."""
