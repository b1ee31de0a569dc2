"""Calibration one block at a time: peak memory is a block and its statistics, not the activations.

The inputs of the first block are captured by a hook that stops the forward pass; then block after
block runs over all batches. Hidden states between blocks live on disk. What a block is called with
besides (masks, position embeddings) is kept in memory, equal tensors once.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocomp.calibrate.accumulate import Accumulator
from autocomp.calibrate.record import Recorder
from autocomp.calibrate.stats import GATHERED, VERSION, Need, holds, recording_path, save_stats
from autocomp.core.errors import InternalError, StorageError
from autocomp.core.unit import Unit
from autocomp.models.surgery import blocks as blocks_of

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]

STALE_SECONDS = 3600.0


def fingerprint(batches: Sequence[Batch], model_digest: str = "") -> str:
    """SHA-256 over the real tokens (or pixels) of all examples, in order, and the model's digest.

    Independent of how the examples are batched and padded. Other statistics, other fingerprint.
    """
    digest = hashlib.sha256(f"{VERSION} {model_digest}".encode())
    for batch in batches:
        mask = batch.get("attention_mask")
        names = sorted(name for name in batch if name not in ("attention_mask", "labels"))
        for row in range(len(batch[names[0]])):
            real = None if mask is None else mask[row].bool()
            for name in names:
                value = batch[name][row]
                if real is not None and value.shape == real.shape:
                    value = value[real]
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibrate(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    directory: Path,
    *,
    needs: Mapping[str, Collection[Need]] | None = None,
    record: Collection[str] = (),
    record_batches: Sequence[Batch] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, dict[str, Path]]]:
    """Write the statistics of every unit to `directory`, block by block.

    Yields `(block index, {unit name: file})` as each block is done, and last, under the index
    after the last block, the units behind the blocks (the head). Embeddings have no statistics.
    If `directory` already holds every file, the files are yielded and nothing runs: a directory is
    for one model and one calibration set, so name it by their `fingerprint`. Nothing runs either
    where nothing is needed.

    Args:
        batches: keyword arguments of the model, `input_ids (B, T)` or `pixel_values`; positions
            where `attention_mask (B, T)` is zero are left out. `labels` are not passed on.
        needs: unit name → what its operators read; a unit that is not named gets no file. `None` is
            everything of every unit.
        record: names of the attention units whose inputs are recorded too, beside their statistics
            (see `calibrate.record`). Without any, nothing of this is done.
        record_batches: examples that are recorded behind `batches` and count in no statistics.
        progress: called with (blocks done, blocks + 1).

    Raises:
        StorageError: if the disk is full or refuses.
        ModelError: if activations are not finite, or a unit takes no part in the forward pass.
    """
    count = len(blocks_of(model))
    if needs is None:
        needs = {unit.name: GATHERED for unit in units}
    plan = _by_block([unit for unit in units if needs.get(unit.name) or unit.name in record], count)
    files = {
        index: {unit.name: directory / f"{unit.name}.safetensors" for unit in group}
        for index, group in plan.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    there = [
        path.exists() and holds(path, needs.get(name, ()))
        for group in files.values()
        for name, path in group.items()
    ]
    there += [recording_path(directory / f"{name}.safetensors").exists() for name in record]
    if all(there):
        steps: Iterator[int] = iter(range(count + 1))
    else:
        together = [_inputs(batch) for batch in (*batches, *(record_batches if record else ()))]
        steps = _run(model, plan, files, together, len(batches), directory, needs, record)
    for index in steps:
        if progress is not None:
            progress(index + 1, count + 1)
        yield index, files.get(index, {})


def _run(
    model: nn.Module,
    plan: Mapping[int, Sequence[Unit]],
    files: Mapping[int, Mapping[str, Path]],
    batches: Sequence[dict[str, Tensor]],
    counted: int,
    directory: Path,
    needs: Mapping[str, Collection[Need]],
    record: Collection[str],
) -> Iterator[int]:
    """The first `counted` batches make the statistics."""
    masks = [_mask(batch) for batch in batches]
    chain = blocks_of(model)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        _sweep(directory)
        spill = Path(tempfile.mkdtemp(dir=directory, prefix=".spill."))
        stack.callback(shutil.rmtree, spill, ignore_errors=True)
        calls = [
            _capture(model, chain[0], batch, spill / f"{index}")
            for index, batch in enumerate(batches)
        ]
        _share(calls)
        for index, block in enumerate(chain):
            group = plan.get(index, ())
            accumulator = _accumulator(model, group, needs)
            recorder = Recorder(model, [unit for unit in group if unit.name in record])
            for number, (call, mask) in enumerate(zip(calls, masks, strict=True)):
                with torch.no_grad(), ExitStack() as watched:
                    watched.enter_context(recorder.watching(mask))
                    if number < counted:
                        watched.enter_context(accumulator.watching(mask))
                    call.run(block)
            _save(accumulator, group, files.get(index, {}), needs)
            for unit in group:
                if unit.name in record:
                    recorder.save(unit.name, recording_path(files[index][unit.name]))
            yield index
        behind = plan.get(len(chain), ())
        if behind:
            accumulator = _accumulator(model, behind, needs)
            first = zip(batches[:counted], calls[:counted], masks[:counted], strict=True)
            for batch, call, mask in first:
                with torch.no_grad(), _replayed(chain, call), accumulator.watching(mask):
                    model(**batch)
            _save(accumulator, behind, files[len(chain)], needs)
        yield len(chain)


def _sweep(directory: Path) -> None:
    """Remove the activations a killed run left behind; a run that is alive writes all the time."""
    for spill in directory.glob(".spill.*"):
        if time.time() - spill.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(spill, ignore_errors=True)


@dataclass
class _Call:
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

    def run(self, block: nn.Module) -> None:
        """Replace the stored hidden states by what `block` makes of them."""
        output = block(self.load(), *self.args, **self.kwargs)
        if isinstance(output, tuple):
            output, self.tail = output[0], output[1:]
        self.store(output)


class _StopError(Exception):
    """Raised by the hook on the first block: its inputs are all that is wanted."""


def _capture(model: nn.Module, first: nn.Module, batch: dict[str, Tensor], path: Path) -> _Call:
    found: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        extra = dict(kwargs)
        hidden = args[0] if args else extra.pop("hidden_states")
        for name in extra:
            if name.startswith("past_key_value"):
                extra[name] = None
        call = _Call(path, list(args[1:]), extra)
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


def _share(calls: Sequence[_Call]) -> None:
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
def _replayed(chain: Sequence[nn.Module], call: _Call) -> Iterator[None]:
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
def _frozen(model: nn.Module) -> Iterator[None]:
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


def _by_block(units: Sequence[Unit], count: int) -> dict[int, list[Unit]]:
    """Block index → its units; those behind the blocks under `count`."""
    plan: dict[int, list[Unit]] = {}
    for unit in units:
        if unit.kind != "embedding":
            plan.setdefault(count if unit.layer is None else unit.layer, []).append(unit)
    return plan


def _accumulator(
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


def _save(
    accumulator: Accumulator,
    units: Sequence[Unit],
    files: Mapping[str, Path],
    needs: Mapping[str, Collection[Need]],
) -> None:
    """A unit that is recorded alone has a file without sites."""
    for unit in units:
        gathered = GATHERED.intersection(needs.get(unit.name, ()))
        sites = [site.name for site in unit.sites] if gathered else []
        save_stats(files[unit.name], accumulator.stats(sites))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
