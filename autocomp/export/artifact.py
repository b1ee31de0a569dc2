"""Export of the very files that were evaluated and measured, with what is needed to use them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.core.errors import InternalError, UserError
from autocomp.export.card import model_card
from autocomp.export.directory import fill_companions, write_directory
from autocomp.export.protocol import ExportRequest, Verification
from autocomp.export.tokenizer import verify_tokenizer
from autocomp.models.vocabulary import load_vocabulary
from autocomp.study.records import TrialRecord
from autocomp.targets import open_artifact, rerun
from autocomp.targets.protocol import Artifact, Target


class ArtifactExporter:
    """Copies the artifact; nothing is converted, so what was measured is what is shipped.

    `suffix` tells the files of the runtime this format is for.
    """

    expresses = "every candidate measured on its runtime: the files that were measured"

    def __init__(self, name: str, summary: str, suffix: str) -> None:
        self.name = name
        self.summary = summary
        self.suffix = suffix

    def supports(self, record: TrialRecord) -> str | None:
        """See `Exporter.supports`."""
        return None if record.artifact is not None else f"{record.id} has no exported model"

    def write(self, request: ExportRequest, directory: Path) -> None:
        """See `Exporter.write`."""
        reason = self.supports(request.record)
        if reason is not None:
            raise UserError(f"cannot export: {reason}")
        if request.artifact.path.suffix != self.suffix:
            raise UserError(
                f"cannot export as {self.name}: the models of this study were made and measured as "
                f"{request.artifact.path.name}, which nothing is converted to or from. Leave out "
                f"the format, or search with another target.runtime"
            )
        write_directory(directory, lambda temporary: self._fill(request, temporary))

    def _fill(self, request: ExportRequest, directory: Path) -> None:
        for file in sorted(request.artifact.path.parent.iterdir()):
            shutil.copyfile(file, directory / file.name)
        fill_companions(request, directory)
        card = model_card(request, request.artifact.path.name)
        (directory / "README.md").write_text(card, encoding="utf-8")

    def verify(self, request: ExportRequest, directory: Path, target: Target) -> Verification:
        """See `Exporter.verify`."""
        written = open_artifact(directory)
        if written.size_bytes != request.artifact.size_bytes:
            raise InternalError(
                f"{directory}: the model has {written.size_bytes} bytes, but the trial's has "
                f"{request.artifact.size_bytes}"
            )
        inputs = request.companions.inputs
        expected = target.run(request.artifact, inputs)
        found = reloaded_logits(written, inputs, request.spec.target.workload.threads)
        if found.shape != expected.shape:
            raise InternalError(
                f"{directory}: the reloaded model's logits are {found.shape}, not {expected.shape}"
            )
        difference = float(np.abs(expected - found).max())
        if not difference <= 1e-5:
            raise InternalError(
                f"{directory}: the reloaded model's logits differ from the evaluated artifact's by "
                f"{difference:.3g}"
            )
        vocabulary = load_vocabulary(request.artifact.path.parent)
        if vocabulary is not None:
            verify_tokenizer(request.companions, vocabulary, directory, written, target)
        return Verification(difference, written.size_bytes, target.measure(written, inputs))


def reloaded_logits(
    artifact: Artifact, inputs: Mapping[str, np.ndarray], threads: int
) -> np.ndarray:
    """What an artifact computes in a process that has its runtime and numpy and nothing else.

    Raises:
        InternalError: if it cannot be loaded or run there, with the last it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        feeds, output = Path(scratch) / "inputs.npz", Path(scratch) / "logits.npy"
        arrays: dict[str, Any] = {**artifact.feeds(inputs)}
        np.savez(feeds, **arrays)
        ended = subprocess.run(
            [sys.executable, "-P", rerun.__file__, artifact.path, feeds, output, str(threads)],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
            raise InternalError(f"{artifact.path} cannot be reloaded by its runtime: {last}")
        logits: np.ndarray = np.load(output, allow_pickle=False)
        return logits


ONNX = ArtifactExporter(
    "onnx",
    "ONNX file for ONNX Runtime, with tokenizer or processor, labels, candidate and card.",
    ".onnx",
)
OPENVINO = ArtifactExporter(
    "openvino",
    "OpenVINO IR (model.xml, model.bin), with tokenizer or processor, labels, candidate and card.",
    ".xml",
)
