"""torch modules to ONNX, quietly: one call for whole models and for the pieces put into them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import nn

from autocomp.core.errors import InternalError
from autocomp.targets.skeleton_format import OPSET


def to_onnx(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    what: str,
) -> onnx.ModelProto:
    """Export `module`, a function of its positional inputs. Takes seconds.

    Args:
        inputs: name in the graph → example.
        dynamic: torch's `dynamic_shapes`.
        outputs: names in the graph.
        what: what is exported, for errors.

    Raises:
        InternalError: if torch cannot, with the first line of the first cause.
    """
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        _quiet("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir"),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=dict(dynamic),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = [*str(cause).strip().splitlines(), type(cause).__name__][0]
            raise InternalError(f"torch cannot export {what} to ONNX: {reason}") from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
