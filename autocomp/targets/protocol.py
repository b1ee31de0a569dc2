"""What a target is: a device, a runtime and a workload that models are lowered to and measured on.

Call sequence: `export` once per dense model (seconds), `lower` per candidate (a tenth of a second),
`write` to a directory, then `verify`, `run`, `measure`, `peak_memory` on the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autocomp.core.measurement import Measurement
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, Unit, UnitFormat
from autocomp.models.vocabulary import load_vocabulary
from autocomp.targets.cost_table import CostTable
from autocomp.targets.timing import Reference

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from torch import nn


class Workload(Protocol):
    """The shape latency is measured at; a spec's `target.workload` is one."""

    @property
    def batch(self) -> int:
        """Examples per run."""
        ...

    @property
    def sequence(self) -> int:
        """Tokens per example."""
        ...

    @property
    def prompt(self) -> int | None:
        """Tokens in the cache before the first is generated; `None` without generation."""
        ...

    @property
    def generate(self) -> int | None:
        """Tokens generated after the prompt; `None` where one run is the workload."""
        ...

    @property
    def threads(self) -> int:
        """Intra-op threads of the runtime."""
        ...


class ExportTask(Protocol):
    """The part of a task that exporting needs."""

    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Input name → axis → name of the dimension, for every axis that may vary."""
        ...

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Model inputs of this shape, in the order of the exported graph's inputs."""
        ...


@dataclass(frozen=True)
class Artifact:
    """A model as shipped: `path` is the file a runtime opens, `size_bytes` what it takes on disk
    (external weight files included). `own_ids`: token ids given to it are its tokenizer's, not the
    original's, as they are within a study."""

    path: Path
    size_bytes: int
    own_ids: bool = False

    def feeds(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`inputs` as this model takes them: of a pruned vocabulary, ids are renumbered."""
        vocabulary = None if self.own_ids else load_vocabulary(self.path.parent)
        if vocabulary is None or "input_ids" not in inputs:
            return dict(inputs)
        return {**inputs, "input_ids": vocabulary.row_of[inputs["input_ids"]]}


class Target(Protocol):
    """A device with a runtime and a workload."""

    name: str
    reference: Reference | None

    def describe(self) -> dict[str, Any]:
        """Device, runtime, versions, workload: plain data for reports."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything a latency depends on apart from the model; stable across processes."""
        ...

    def formats_supported(self, format: SiteFormat) -> str | None:
        """Why this format cannot be lowered, or `None` if it can."""
        ...

    def tokens_supported(self, reduction: TokenReduction, tokens: int) -> str | None:
        """Why this token reduction cannot be lowered, or gains nothing; `None` if it can and does.

        `tokens` are those of the dense model, class token and registers included.
        """
        ...

    def size_bytes(self, format: SiteFormat) -> int:
        """Bytes on disk of one site in this format. Needs no torch."""
        ...

    def load_bytes(self, format: SiteFormat) -> tuple[str, float]:
        """How one site in this format is loaded, by a name of the target's own, and the bytes that
        takes at the peak. A first guess: searches correct it by what they measure."""
        ...

    @property
    def idle_memory_bytes(self) -> float:
        """Resident bytes of a process that has loaded the runtime and next to no model."""
        ...

    def export(self, model: nn.Module, units: Sequence[Unit], task: ExportTask) -> onnx.ModelProto:
        """The skeleton of a dense model, which every candidate is lowered from."""
        ...

    def lower(
        self, skeleton: onnx.ModelProto, model: nn.Module, units: Sequence[Unit]
    ) -> onnx.ModelProto:
        """The runtime's graph of a stitched model."""
        ...

    def write(self, lowered: onnx.ModelProto, directory: Path) -> Artifact:
        """Write a lowered model into `directory`. Raises StorageError if the disk refuses."""
        ...

    def record_reference(self) -> Reference:
        """Time the anchor model on this device; later measurements are normalised by it."""
        ...

    def run(self, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of the artifact for a batch."""
        ...

    def verify(
        self, artifact: Artifact, model: nn.Module, inputs: Mapping[str, np.ndarray]
    ) -> float:
        """Largest absolute difference between the artifact's logits and torch's."""
        ...

    def measure(self, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> Measurement:
        """Latency of the artifact at the workload, with its size."""
        ...

    def profile(
        self,
        skeleton: onnx.ModelProto,
        units: Sequence[Unit],
        unit_formats: Mapping[str, Mapping[str, UnitFormat]],
        inputs: Mapping[str, np.ndarray],
        *,
        reductions: Mapping[str, Mapping[str, TokenReduction]] | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> CostTable:
        """The cost table of a model: unit → option key → format, and → token reduction if any."""
        ...

    def peak_memory(self, artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> int:
        """Peak resident bytes of a process that only loads and runs the artifact."""
        ...
