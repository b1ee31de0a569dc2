"""Export of the very files that were evaluated and measured, with what is needed to use them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml

from autocomp.core.errors import InternalError, StorageError, UserError
from autocomp.core.files import sync_directory
from autocomp.export.card import model_card
from autocomp.export.protocol import ExportRequest, Verification
from autocomp.export.tokenizer import verify_tokenizer
from autocomp.models.vocabulary import load_vocabulary
from autocomp.study.records import TrialRecord
from autocomp.targets import open_artifact
from autocomp.targets.protocol import Target


class ArtifactExporter:
    """Copies the artifact; nothing is converted, so what was measured is what is shipped.

    `suffix` tells the files of the runtime this format is for.
    """

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
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} is not empty: name a new or empty directory to export to")
        parent = directory.resolve().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{directory.name}."))
        except OSError as error:
            raise StorageError(f"cannot write to {parent}: {error.strerror or error}") from error
        try:
            self._fill(request, temporary)
            temporary.chmod(0o755)
            if directory.exists():
                directory.rmdir()
            temporary.rename(directory)
            sync_directory(parent)
        except OSError as error:
            raise StorageError(f"cannot write {directory}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fill(self, request: ExportRequest, directory: Path) -> None:
        for file in sorted(request.artifact.path.parent.iterdir()):
            shutil.copyfile(file, directory / file.name)
        request.companions.ship(directory, load_vocabulary(request.artifact.path.parent))
        candidate = request.record.candidate.to_json()
        text = yaml.safe_dump(candidate, sort_keys=False, default_flow_style=None, width=100)
        (directory / "candidate.yaml").write_text(text, encoding="utf-8")
        labels = request.companions.label_names
        if labels:
            lines = "".join(f"{label}\n" for label in labels)
            (directory / "labels.txt").write_text(lines, encoding="utf-8")
        card = model_card(request, request.artifact.path.name)
        (directory / "README.md").write_text(card, encoding="utf-8")
        for file in directory.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

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
        found = target.run(written, inputs)
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
