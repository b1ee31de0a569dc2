"""Calibration one block at a time: peak memory is a block and its statistics, not the activations.

The inputs of the first block are captured (see `calibrate.replay`); then block after block runs
over all batches.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from autocomp.calibrate.accumulate import Accumulator
from autocomp.calibrate.record import Recorder
from autocomp.calibrate.replay import (
    Batch,
    by_block,
    capture,
    frozen,
    model_inputs,
    real_mask,
    replayed,
    share_tensors,
    site_accumulator,
)
from autocomp.calibrate.stats import GATHERED, VERSION, Need, holds, recording_path, save_stats
from autocomp.core.unit import Unit
from autocomp.models.surgery import blocks as blocks_of

logger = logging.getLogger(__name__)

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
    plan = by_block([unit for unit in units if needs.get(unit.name) or unit.name in record], count)
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
        together = [
            model_inputs(batch) for batch in (*batches, *(record_batches if record else ()))
        ]
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
    masks = [real_mask(batch) for batch in batches]
    chain = blocks_of(model)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        _sweep(directory)
        spill = Path(tempfile.mkdtemp(dir=directory, prefix=".spill."))
        stack.callback(shutil.rmtree, spill, ignore_errors=True)
        calls = [
            capture(model, chain[0], batch, spill / f"{index}")
            for index, batch in enumerate(batches)
        ]
        share_tensors(calls)
        for index, block in enumerate(chain):
            group = plan.get(index, ())
            accumulator = site_accumulator(model, group, needs)
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
            accumulator = site_accumulator(model, behind, needs)
            first = zip(batches[:counted], calls[:counted], masks[:counted], strict=True)
            for batch, call, mask in first:
                with torch.no_grad(), replayed(chain, call), accumulator.watching(mask):
                    model(**batch)
            _save(accumulator, behind, files[len(chain)], needs)
        yield len(chain)


def _sweep(directory: Path) -> None:
    """Remove the activations a killed run left behind; a run that is alive writes all the time."""
    for spill in directory.glob(".spill.*"):
        if time.time() - spill.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(spill, ignore_errors=True)


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
