"""Writing an export: a whole directory or nothing, with what every format is shipped with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from autocomp.core.errors import StorageError, UserError
from autocomp.core.files import sync_directory
from autocomp.export.protocol import ExportRequest
from autocomp.models.vocabulary import load_vocabulary


def write_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a temporary directory and move it to `directory`, durable.

    Raises:
        UserError: if `directory` is there and not empty.
        StorageError: if the disk refuses; nothing is left.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: name a new or empty directory to export to")
    parent = directory.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise StorageError(f"cannot write to {parent}: {error.strerror or error}") from error
    try:
        fill(temporary)
        _sync(temporary)
        temporary.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
        sync_directory(parent)
    except OSError as error:
        raise StorageError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fill_companions(request: ExportRequest, directory: Path) -> None:
    """Tokenizer or processor, `candidate.yaml` and labels."""
    request.companions.ship(directory, load_vocabulary(request.artifact.path.parent))
    candidate = request.record.candidate.to_json()
    text = yaml.safe_dump(candidate, sort_keys=False, default_flow_style=None, width=100)
    (directory / "candidate.yaml").write_text(text, encoding="utf-8")
    labels = request.companions.label_names
    if labels:
        lines = "".join(f"{label}\n" for label in labels)
        (directory / "labels.txt").write_text(lines, encoding="utf-8")


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
