"""How a model's blocks are called, so that one can be run again alone: what calibration stands on.

The inputs of the first block are captured by a hook that stops the forward pass. Hidden states
between blocks live on disk; what a block is called with besides (masks, position embeddings) is
kept in memory, equal tensors once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocomp.calibrate.accumulate import Accumulator
from autocomp.calibrate.stats import GATHERED, Need
from autocomp.core.errors import InternalError, StorageError
from autocomp.core.unit import Unit

Batch = Mapping[str, Tensor]


@dataclass
class BlockCall:
    """How one batch calls a block. The hidden states are on disk, at `path`."""

    path: Path
    args: list[Any]
    kwargs: dict[str, Any]
    tail: tuple[Any, ...] | None = field(default=None)

    def store(self, hidden: Tensor) -> None:
        """Scratch, so not synced; `load` memory-maps, so the old file is replaced, not written to.

        Raises:
            StorageError: if the disk is full or refuses.
        """
        following = self.path.with_suffix(".next")
        try:
            following.write_bytes(save({"hidden": hidden.contiguous()}))
            following.replace(self.path)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror or error}. Calibration keeps the "
                f"activations of its examples on disk: free some space, or lower data.calibrate"
            ) from error

    def load(self) -> Tensor:
        return load_file(self.path)["hidden"]

    def output(self, block: nn.Module) -> Any:
        """What `block` makes of the stored hidden states."""
        return block(self.load(), *self.args, **self.kwargs)

    def run(self, block: nn.Module) -> None:
        """Replace the stored hidden states by what `block` makes of them."""
        output = self.output(block)
        if isinstance(output, tuple):
            output, self.tail = output[0], output[1:]
        self.store(output)


class _StopError(Exception):
    """Raised by the hook on the first block: its inputs are all that is wanted."""


def capture(model: nn.Module, first: nn.Module, batch: dict[str, Tensor], path: Path) -> BlockCall:
    """What `batch` calls the first block with; nothing behind it runs.

    Raises:
        InternalError: if the model never calls it.
    """
    found: list[BlockCall] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        extra = dict(kwargs)
        hidden = args[0] if args else extra.pop("hidden_states")
        for name in extra:
            if name.startswith("past_key_value"):
                extra[name] = None
        call = BlockCall(path, list(args[1:]), extra)
        call.store(hidden)
        found.append(call)
        raise _StopError

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    except _StopError:
        return found[0]
    finally:
        handle.remove()
    raise InternalError("the model's forward pass never reached its first block")


def share_tensors(calls: Sequence[BlockCall]) -> None:
    """Keep equal tensors among the calls' arguments (position embeddings) once."""
    known: dict[tuple[Any, ...], list[Tensor]] = {}

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(entry) for entry in value)
        if not isinstance(value, Tensor):
            return value
        alike = known.setdefault((tuple(value.shape), value.dtype), [])
        for other in alike:
            if torch.equal(other, value):
                return other
        alike.append(value)
        return value

    for call in calls:
        call.args = [one(value) for value in call.args]
        call.kwargs = {name: one(value) for name, value in call.kwargs.items()}


@contextmanager
def replayed(chain: Sequence[nn.Module], call: BlockCall) -> Iterator[None]:
    """Blocks do nothing but hand on; the last one gives the stored hidden states."""

    def wrap(hidden: Tensor) -> Any:
        return hidden if call.tail is None else (hidden, *call.tail)

    def hand_on(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return wrap(kwargs["hidden_states"] if hidden is None else hidden)

    def finish(*args: Any, **kwargs: Any) -> Any:
        return wrap(call.load())

    for index, block in enumerate(chain):
        block.forward = finish if index == len(chain) - 1 else hand_on
    try:
        yield
    finally:
        for block in chain:
            del block.forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache; as before afterwards."""
    training, config = model.training, getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if config is not None and use_cache:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if config is not None and use_cache:
            config.use_cache = use_cache


def by_block(units: Sequence[Unit], count: int) -> dict[int, list[Unit]]:
    """Block index → its units; those behind the blocks under `count`."""
    plan: dict[int, list[Unit]] = {}
    for unit in units:
        if unit.kind != "embedding":
            plan.setdefault(count if unit.layer is None else unit.layer, []).append(unit)
    return plan


def site_accumulator(
    model: nn.Module, units: Sequence[Unit], needs: Mapping[str, Collection[Need]]
) -> Accumulator:
    """Of the sites at which anything is gathered."""
    gathered = {
        site.name: GATHERED.intersection(needs.get(unit.name, ()))
        for unit in units
        for site in unit.sites
    }
    modules = {name: model.get_submodule(name) for name, parts in gathered.items() if parts}
    return Accumulator(modules, gathered)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def real_mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
