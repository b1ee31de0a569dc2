"""Statistics of one unit after another, while the units before it are being compressed.

What an operator sees of a unit in a whole compressed model is not what calibration saw: everything
upstream has changed. Here each unit's statistics are those of the model as the caller left the
units before it, as GPTQ takes layer after layer (Frantar et al., 2023, section 3). Beside them
stands what the dense model gives the same layer, on the same tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.calibrate.accumulate import real_rows
from autocomp.calibrate.replay import (
    Batch,
    BlockCall,
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


@dataclass(frozen=True)
class Seen:
    """A unit's inputs, in the compressed model and in the dense one.

    Attributes:
        stats: of its inputs in the compressed model.
        crossed: site name → Σ x x̂ᵀ `(columns, columns)`, dense inputs x by compressed ones x̂.
    """

    unit: Unit
    stats: UnitStats
    crossed: Mapping[str, Tensor]


def unit_by_unit(
    model: nn.Module,
    dense: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    directory: Path,
    needs: Mapping[str, Collection[Need]],
    working: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Seen]:
    """What each unit that `needs` names reads, in model order.

    Whatever the caller makes of a unit in `model` before it asks for the next is what the next
    ones read. A block runs once for each of its units that is named, and once more.

    Args:
        dense: the model as it was, of the same blocks.
        batches: keyword arguments of the models; see `stream.calibrate`.
        directory: for the hidden states, while this runs.
        needs: unit name → what of its statistics is gathered. Embeddings have none.
        working: entered around every piece of work.

    Raises:
        StorageError: if the disk is full or refuses.
        ModelError: if activations are not finite, or a unit takes no part in the forward pass.
    """
    plan = by_block([unit for unit in units if needs.get(unit.name)], len(blocks_of(model)))
    masks = [real_mask(model_inputs(batch)) for batch in batches]
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=".sequence."))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        sides = [
            stack.enter_context(_side(its, batches, scratch / name, working))
            for name, its in (("compressed", model), ("dense", dense))
        ]
        for number in range(len(blocks_of(model)) + 1):
            for unit in plan.get(number, ()):
                accumulator = site_accumulator(model, [unit], needs)
                crossed = _Crossed(unit)
                for index, mask in enumerate(masks):
                    with torch.no_grad(), working(), accumulator.watching(mask):
                        with crossed.watching(model, 0):
                            sides[0].run(index, number)
                        with crossed.watching(dense, 1):
                            sides[1].run(index, number)
                        crossed.add(mask)
                names = [site.name for site in unit.sites]
                yield Seen(unit, accumulator.stats(names), crossed.sums)
            for side in sides:
                side.advance(number, working)


class _Side:
    """One of the two models, as far as its blocks were run."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self._model, self._batches = model, batches
        self.calls: list[BlockCall] = []

    def run(self, index: int, number: int) -> None:
        """One batch through a block, or through what is behind them; nothing is kept of it."""
        chain = blocks_of(self._model)
        if number < len(chain):
            self.calls[index].output(chain[number])
            return
        with replayed(chain, self.calls[index]):
            self._model(**self._batches[index])

    def advance(self, number: int, working: Callable[[], AbstractContextManager[None]]) -> None:
        """All batches through a block, for the next one."""
        chain = blocks_of(self._model)
        for call in self.calls if number < len(chain) else ():
            with torch.no_grad(), working():
                call.run(chain[number])


@contextmanager
def _side(
    model: nn.Module,
    batches: Sequence[Batch],
    scratch: Path,
    working: Callable[[], AbstractContextManager[None]],
) -> Iterator[_Side]:
    scratch.mkdir()
    together = [model_inputs(batch) for batch in batches]
    side = _Side(model, together)
    with frozen(model):
        for index, batch in enumerate(together):
            with torch.no_grad(), working():
                first = blocks_of(model)[0]
                side.calls.append(capture(model, first, batch, scratch / f"{index}"))
        share_tensors(side.calls)
        yield side


@dataclass
class _Crossed:
    """Sums Σ x x̂ᵀ over the sites of a unit; those with one input share theirs."""

    unit: Unit
    sums: dict[str, Tensor] = field(default_factory=dict)
    _inputs: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))

    @contextmanager
    def watching(self, model: nn.Module, side: int) -> Iterator[None]:
        """Keep what the sites of `model` are called with: of side 0, compressed, or 1, dense."""

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._inputs[side][name] = args[0] if args else kwargs["input"]

            return hook

        handles = [
            model.get_submodule(site.name).register_forward_pre_hook(
                keep(site.name), with_kwargs=True
            )
            for site in self.unit.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, mask: Tensor | None) -> None:
        """Take in what was kept of one batch."""
        products: dict[int, Tensor] = {}
        compressed, dense = self._inputs
        for name, x in compressed.items():
            if id(x) not in products:
                rows = real_rows(dense[name], mask).float()
                products[id(x)] = rows.t() @ real_rows(x, mask).float()
            product = products[id(x)]
            self.sums[name] = self.sums[name] + product if name in self.sums else product
