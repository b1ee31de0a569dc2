"""Statistics of one unit after another, while the units before it are being compressed.

What an operator sees of a unit in a whole compressed model is not what calibration saw: everything
upstream has changed. Here each unit's statistics are those of the model as the caller left the
units before it, as GPTQ takes layer after layer (Frantar et al., 2023, section 3).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch
from torch import nn

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
from autocomp.calibrate.stats import Need, UnitStats
from autocomp.core.unit import Unit
from autocomp.models.surgery import blocks as blocks_of


def unit_by_unit(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    directory: Path,
    needs: Mapping[str, Collection[Need]],
    working: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[tuple[Unit, UnitStats]]:
    """The statistics of each unit that `needs` names, in model order.

    Whatever the caller makes of a unit in `model` before it asks for the next is what the next
    ones read. A block runs once for each of its units that is named, and once more.

    Args:
        batches: keyword arguments of the model; see `stream.calibrate`.
        directory: for the hidden states, while this runs.
        needs: unit name → what of its statistics is gathered. Embeddings have none.
        working: entered around every piece of work.

    Raises:
        StorageError: if the disk is full or refuses.
        ModelError: if activations are not finite, or a unit takes no part in the forward pass.
    """
    named = [unit for unit in units if needs.get(unit.name)]
    together = [model_inputs(batch) for batch in batches]
    masks = [real_mask(batch) for batch in together]
    count = len(blocks_of(model))
    plan = by_block(named, count)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=".sequence."))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        calls = []
        for index, batch in enumerate(together):
            with working():
                calls.append(capture(model, blocks_of(model)[0], batch, scratch / f"{index}"))
        share_tensors(calls)

        def run(index: int, number: int) -> None:
            """One batch through a block, or through what is behind them."""
            chain = blocks_of(model)
            if number < count:
                calls[index].output(chain[number])
                return
            with replayed(chain, calls[index]):
                model(**together[index])

        for number in range(count + 1):
            for unit in plan.get(number, ()):
                accumulator = site_accumulator(model, [unit], needs)
                for index, mask in enumerate(masks):
                    with torch.no_grad(), working(), accumulator.watching(mask):
                        run(index, number)
                yield unit, accumulator.stats([site.name for site in unit.sites])
            for call in calls if number < count else ():
                with torch.no_grad(), working():
                    call.run(blocks_of(model)[number])
