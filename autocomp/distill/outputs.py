"""Runs a model and keeps what losses read: logits, and of its layers what they ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autocomp.distill.losses.protocol import Outputs, Reading
from autocomp.models.modules import Skip
from autocomp.models.surgery import blocks, model_layout
from autocomp.tasks.protocol import Task


def observe(
    model: nn.Module, task: Task, inputs: Mapping[str, torch.Tensor], reads: Collection[Reading]
) -> Outputs:
    """Run the model on a batch; `hidden` and `attention` are kept if they are among `reads`."""
    watched: dict[Reading, dict[int, nn.Module]] = {"hidden": {}, "attention": {}}
    if "hidden" in reads:
        watched["hidden"] = dict(enumerate(blocks(model)))
    if "attention" in reads:
        watched["attention"] = attention_outputs(model)
    with _kept(watched["hidden"]) as hidden, _kept(watched["attention"]) as attention:
        logits = task.logits(model, inputs)
    return Outputs(logits, hidden, attention)


def attention_outputs(model: nn.Module) -> dict[int, nn.Module]:
    """Layer → the output projection of its attention; no entry where attention was skipped."""
    layout = model_layout(model)
    path = next(site.path for site in layout.attention.sites if site.role == "output")
    found = {}
    for layer in range(len(blocks(model))):
        try:
            module = model.get_submodule(f"{layout.block_path(layer)}.{path}")
        except AttributeError:  # the whole sublayer is a Skip
            continue
        if not isinstance(module, Skip):
            found[layer] = module
    return found


@contextmanager
def _kept(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Within it, what each module returns is kept under its number."""
    kept: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
