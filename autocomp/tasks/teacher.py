"""The teacher: the model everything is compared with, fitted to the task if need be.

`fit: none` uses the model as it is; `head` fits a linear head on frozen features; `full` fits head
and encoder. A fitted teacher is a Hugging Face directory, kept under the content that made it
(model, distil split, settings), written whole or not at all, and checked against the digests
recorded beside it whenever it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from autocomp.core.errors import ModelError, StorageError, UserError
from autocomp.core.files import sync_directory
from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.hashing import content_key, file_digest
from autocomp.models.conversion import save_model
from autocomp.models.load import load_model, quiet
from autocomp.models.sources import (
    code_files,
    has_classification_head,
    read_config,
    read_tensor_shapes,
    weight_files,
)
from autocomp.spec.schema import Spec
from autocomp.spec.task import TeacherSection
from autocomp.tasks.fitting import fit_full, fit_head
from autocomp.tasks.protocol import Array, Split, Task
from autocomp.tasks.stored import stored_rows

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

log = logging.getLogger(__name__)

_VERSION = 1
_RECORD = "teacher.json"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "generation_config.json",
)


def make_teacher(
    spec: Spec,
    task: Task,
    model_path: Path,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Path:
    """The directory of the teacher: model with the task's head, tokenizer or processor.

    With `fit: none` it is `model_path` itself; otherwise a directory under `cache_dir`, built once.
    `progress` counts training steps. The same spec, data and model give the same weights.

    Raises:
        ModelError: if the weights hold NaN or infinity; with `fit: none`, if the model lacks the
            task's head.
        UserError: if the settings make no sense for the task, or training diverges under them.
        StorageError: if the disk is full; nothing half-written stays.
    """
    settings = spec.task.teacher
    if settings.fit == "none":
        if task.num_labels is not None:
            _check_head(model_path)
        _check_finite_files(model_path)
        return model_path
    if settings.fit == "head" and task.num_labels is None:
        raise UserError(
            f"task.teacher.fit: head is for classification; {task.name} has no head of its own. "
            f"Allowed here: none, full"
        )
    seed = spec.search.seed
    directory = cache_dir / f"teacher-{_key(settings, task, model_path, seed)}"
    if directory.exists():
        fault = _fault(directory)
        if fault is None:
            return directory
        log.warning("the cached teacher %s is damaged (%s): fitting it again", directory, fault)
        shutil.rmtree(directory)
    model = _fitted(settings, task, model_path, spec.model.trust_remote_code, seed, progress)
    return _store(model, task, model_path, directory)


def teacher_logits(
    model: nn.Module,
    task: Task,
    split: Split,
    cache: Path | None = None,
    *,
    batch: int = 32,
    progress: Progress | None = None,
    gate: Gate = NO_GATE,
) -> Array:
    """Logits of a model for a whole split, in its order: float32 `(N, C)` or `(N, T, V)`.

    With `cache` (a `.npy` path the caller names by content) they are written there once, streamed,
    and memory-mapped read-only: language-model logits may exceed memory. A damaged file is made
    again. Each batch holds `gate` shared.

    Raises:
        StorageError: if the disk is full.
    """
    if cache is None:
        return np.concatenate(list(_logit_batches(model, task, split, batch, progress, gate)))
    return stored_rows(
        cache,
        len(task.splits[split]),
        lambda: _logit_batches(model, task, split, batch, progress, gate),
    )


def _logit_batches(
    model: nn.Module,
    task: Task,
    split: Split,
    batch: int,
    progress: Progress | None,
    gate: Gate,
) -> Iterator[Array]:
    done, count = 0, len(task.splits[split])
    for inputs in task.batches(split, batch):
        with torch.inference_mode(), gate.working():
            logits = task.logits(model, inputs).float().numpy()
        yield logits
        done += len(logits)
        if progress is not None:
            progress(done, count)


def _key(settings: TeacherSection, task: Task, model_path: Path, seed: int) -> str:
    """Everything the fitted weights depend on."""
    files = sorted(model_path.glob("*.safetensors"))
    code = {path.name: file_digest(path) for path in code_files(model_path)}
    return content_key(
        {
            **({"code": code} if code else {}),
            "version": _VERSION,
            "model": [file_digest(file) for file in [*files, model_path / "config.json"]],
            "companions": [file_digest(path) for path in _companions(model_path)],
            "data": task.fingerprint("distil"),
            "labels": list(task.label_names),
            "settings": settings.model_dump(mode="json"),
            "seed": seed,
        }
    )


def _fitted(
    settings: TeacherSection,
    task: Task,
    model_path: Path,
    trust_remote_code: bool,
    seed: int,
    progress: Progress | None,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a new head is initialised at random
        model = load_model(model_path, task.name, task.num_labels, trust_remote_code)
        _check_finite(model, model_path)
        fit = fit_head if settings.fit == "head" else fit_full
        fit(model, task, settings, seed=seed, progress=progress)
    return model.eval()


def _check_finite(model: nn.Module, model_path: Path) -> None:
    """Fitting would spread one NaN over every weight, and the message name the wrong tensor."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise _not_finite(model_path, name)


def _check_finite_files(model_path: Path) -> None:
    """The same of weights as they lie on disk, one tensor at a time."""
    for file in weight_files(model_path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise _not_finite(model_path, name)


def _not_finite(model_path: Path, name: str) -> ModelError:
    return ModelError(
        f"{model_path}: {name} holds NaN or infinity, so it can be no teacher, nor be fitted to "
        f"one. Fetch the model again, or take another"
    )


def _store(model: nn.Module, task: Task, model_path: Path, directory: Path) -> Path:
    """Write everything beside `directory`, then rename."""
    config = cast(Any, model).config
    ids = task.splits["distil"].inputs.get("input_ids")
    limit = getattr(config, "max_position_embeddings", None)
    if ids is not None and limit is not None:
        config.max_position_embeddings = max(limit, ids.shape[1])
    if task.num_labels is not None:
        config.id2label = dict(enumerate(task.label_names))
        config.label2id = {name: i for i, name in enumerate(task.label_names)}
    temporary: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        with quiet():
            save_model(model, temporary)
        for source in _companions(model_path):
            if not (temporary / source.name).exists():
                shutil.copyfile(source, temporary / source.name)
        processor = task.processor_json()
        if processor is not None:
            text = json.dumps(processor, indent=2) + "\n"
            (temporary / "preprocessor_config.json").write_text(text, encoding="utf-8")
        digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        (temporary / _RECORD).write_text(json.dumps({"sha256": digests}, indent=2) + "\n")
        for path in temporary.iterdir():
            path.chmod(0o644)
            _sync(path)
        temporary.chmod(0o755)
        _move(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write the teacher to {directory}: {error}. Nothing was left half-written; "
            f"free disk space and start the same command again"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _move(temporary: Path, directory: Path) -> None:
    """Rename; if another process was first, its directory (the same content) stays."""
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.exists() or _fault(directory) is not None:
            raise
    sync_directory(directory.parent)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fault(directory: Path) -> str | None:
    """What is wrong with a stored teacher, or `None`."""
    try:
        digests = json.loads((directory / _RECORD).read_text(encoding="utf-8"))["sha256"]
        for name, digest in digests.items():
            if file_digest(directory / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if "model.safetensors" in digests or len(digests) > 1 else "no weights recorded"


def _companions(model_path: Path) -> list[Path]:
    return [model_path / name for name in _COMPANIONS if (model_path / name).exists()]


def _check_head(model_path: Path) -> None:
    if not has_classification_head(read_tensor_shapes(model_path)):
        architecture = ", ".join(read_config(model_path).get("architectures") or ["unknown"])
        raise ModelError(
            f"{model_path} ({architecture}) has no classification head, so it cannot be the "
            f"teacher as it is. Set task.teacher.fit: full (head and encoder) or head"
        )
