"""Skeletons kept by content: one export per architecture, workload kind and version of torch."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from autocomp.core.files import write_atomic
from autocomp.core.hashing import content_key
from autocomp.core.unit import Unit
from autocomp.targets.protocol import ExportTask
from autocomp.targets.skeleton import export_skeleton
from autocomp.targets.skeleton_format import VERSION


def skeleton_key(
    model: nn.Module, units: Sequence[Unit], task: ExportTask, *, decode: bool = False
) -> str:
    """Content key of a skeleton: architecture, sites, axes, versions and non-site parameters."""
    config: Any = model.config
    sites = {site.name for unit in units for site in unit.sites}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if name.rpartition(".")[0] not in sites:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    code = _own_code(model)
    return content_key(
        {
            **({"code": code} if code else {}),
            "version": VERSION,
            "config": json.loads(config.to_json_string(use_diff=False)),
            "sites": sorted(sites),
            "shapes": _fixed_shapes(task),
            "axes": {k: {str(a): n for a, n in v.items()} for k, v in task.dynamic_axes.items()},
            "tensors": digest.hexdigest(),
            "decode": decode,
            "torch": torch.__version__,
        }
    )


def _own_code(model: nn.Module) -> str | None:
    """Hash of the source a model of remote code is written in; `None` for transformers' own."""
    if not type(model).__module__.startswith("transformers_modules"):
        return None
    return hashlib.sha256(
        inspect.getsource(sys.modules[type(model).__module__]).encode()
    ).hexdigest()


def _fixed_shapes(task: ExportTask) -> dict[str, list[int]]:
    """The sizes an export fixes: those of the axes that are not dynamic (an image's side)."""
    axes = task.dynamic_axes
    return {
        name: [size for axis, size in enumerate(value.shape) if axis not in axes.get(name, {})]
        for name, value in task.example_inputs(2, 16).items()
    }


def cached_skeleton(
    model: nn.Module,
    units: Sequence[Unit],
    task: ExportTask,
    directory: Path,
    *,
    decode: bool = False,
) -> onnx.ModelProto:
    """`export_skeleton`, kept in `directory` by content."""
    path = skeleton_path(model, units, task, directory, decode=decode)
    if path.exists():
        try:
            return onnx.load(path)
        except Exception:
            logging.getLogger(__name__).warning("%s is damaged: exported again", path)
    skeleton = export_skeleton(model, units, task, decode=decode)
    write_atomic(path, lambda temporary: onnx.save(skeleton, temporary))
    return skeleton


def skeleton_path(
    model: nn.Module,
    units: Sequence[Unit],
    task: ExportTask,
    directory: Path,
    *,
    decode: bool = False,
) -> Path:
    """The file `cached_skeleton` keeps."""
    return directory / f"skeleton-{skeleton_key(model, units, task, decode=decode)}.onnx"
