"""Verification of what stock transformers loads: a clean process's logits against torch's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from autocomp.core.errors import InternalError
from autocomp.export import reload
from autocomp.export.protocol import ExportRequest, Verification
from autocomp.export.tokenizer import verify_tokenizer
from autocomp.library.student import load_student
from autocomp.models.load import task_class
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.models.surgery import (
    copy_for_surgery,
    dense_embedding,
    dense_linear,
    replace_module,
)
from autocomp.models.vocabulary import load_vocabulary
from autocomp.targets.protocol import Target

TOLERANCE = 1e-4
"""Of the largest logit: sums over zeros and other shapes are rounded otherwise, no more."""


def float_copy(student: nn.Module) -> nn.Module:
    """The student with every quantised layer as a float one of the same weights; inputs float."""
    model = copy_for_surgery(student)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            weight = module.dequantised()
            if module.input_scale is not None:
                weight = weight * module.input_scale
            replace_module(model, name, dense_linear(weight, module.bias))
        elif isinstance(module, QuantEmbedding):
            table = dense_embedding(module.dequantised(), module.padding_idx)
            replace_module(model, name, table)
    return model.eval()


def verify_reload(request: ExportRequest, directory: Path, target: Target) -> Verification:
    """Reload `directory` elsewhere and compare with the trial's weights as floats.

    Raises:
        InternalError: if it does not load, or computes something else.
    """
    assert request.student is not None
    student, _ = load_student(request.student)
    inputs = request.companions.inputs
    with torch.no_grad():
        feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = float_copy(student)(**feeds).logits.numpy()
    vocabulary = load_vocabulary(request.artifact.path.parent)
    if vocabulary is not None:
        inputs = {**inputs, "input_ids": vocabulary.row_of[inputs["input_ids"]]}
    found = reloaded_logits(directory, request.spec.task.name, inputs)["logits"]
    if found.shape != expected.shape:
        raise InternalError(
            f"{directory}: the reloaded model's logits are {found.shape}, not {expected.shape}"
        )
    difference = float(np.abs(expected - found).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise InternalError(
            f"{directory}: the reloaded model's logits differ from the trial's weights as floats "
            f"by {difference:.3g}"
        )
    if vocabulary is not None:
        verify_tokenizer(request.companions, vocabulary, directory, request.artifact, target)
    size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Verification(difference, size_bytes, None)


def reloaded_logits(
    directory: Path, task: str, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What `reload` says of a directory, run in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        feeds, output = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in inputs.items()}, feeds)
        command = [sys.executable, "-P", str(reload.__file__), str(directory)]
        ended = subprocess.run(
            [*command, task_class(task).__name__, str(feeds), str(output)],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise InternalError(f"{directory} cannot be reloaded by transformers: {last}")
        return load_file(output)
