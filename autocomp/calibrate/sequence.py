"""Statistics of one unit after another, while the units before it are being compressed.

What an operator sees of a unit in a whole compressed model is not what calibration saw: everything
upstream has changed. Here each unit's statistics are those of the model as the caller left the
units before it, as GPTQ takes layer after layer (Frantar et al., 2023, section 3). Beside them
stands what the dense model gives the same layer, on the same tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from autocomp.core.gate import NO_GATE, Gate
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
    gate: Gate = NO_GATE,
) -> Iterator[Seen]:
    """What each unit that `needs` names reads, in model order.

    Whatever the caller makes of a unit in `model` before it asks for the next is what the next
    ones read. A block runs once for each of its units that is named, and once more.

    Args:
        dense: the model as it was, of the same blocks.
        batches: keyword arguments of the models; see `stream.calibrate`.
        directory: for the hidden states, while this runs.
        needs: unit name → what of its statistics is gathered. Embeddings have none.
        gate: held shared by every piece of work.

    Raises:
        StorageError: if the disk is full or refuses.
        ModelError: if activations are not finite, or a unit takes no part in the forward pass.
    """
    plan = by_block([unit for unit in units if needs.get(unit.name)], len(blocks_of(model)))
    masks = [real_mask(batch) for batch in batches]
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=".sequence."))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        compressed_side, dense_side = (
            stack.enter_context(_side(its, batches, scratch / name, gate))
            for name, its in (("compressed", model), ("dense", dense))
        )
        for number in range(len(blocks_of(model)) + 1):
            for unit in plan.get(number, ()):
                accumulator = site_accumulator(model, [unit], needs)
                crossed: dict[str, Tensor] = {}
                for index, mask in enumerate(masks):
                    with torch.no_grad(), gate.working():
                        with accumulator.watching(mask), _site_inputs(model, unit) as inputs:
                            compressed_side.run(index, number)
                        with _site_inputs(dense, unit) as wanted:
                            dense_side.run(index, number)
                        _add_products(crossed, wanted, inputs, mask)
                names = [site.name for site in unit.sites]
                yield Seen(unit, accumulator.stats(names), crossed)
            for side in (compressed_side, dense_side):
                side.advance(number, gate)


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

    def advance(self, number: int, gate: Gate) -> None:
        """All batches through a block, for the next one."""
        chain = blocks_of(self._model)
        for call in self.calls if number < len(chain) else ():
            with torch.no_grad(), gate.working():
                call.run(chain[number])


@contextmanager
def _side(
    model: nn.Module,
    batches: Sequence[Batch],
    scratch: Path,
    gate: Gate,
) -> Iterator[_Side]:
    scratch.mkdir()
    together = [model_inputs(batch) for batch in batches]
    side = _Side(model, together)
    with frozen(model):
        for index, batch in enumerate(together):
            with torch.no_grad(), gate.working():
                first = blocks_of(model)[0]
                side.calls.append(capture(model, first, batch, scratch / f"{index}"))
        share_tensors(side.calls)
        yield side


@contextmanager
def _site_inputs(model: nn.Module, unit: Unit) -> Iterator[dict[str, Tensor]]:
    """Within it, what each site of a unit is called with is kept under its name."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[name] = args[0] if args else kwargs["input"]

        return hook

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(keep(site.name), with_kwargs=True)
        for site in unit.sites
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _add_products(
    sums: dict[str, Tensor],
    dense: Mapping[str, Tensor],
    compressed: Mapping[str, Tensor],
    mask: Tensor | None,
) -> None:
    """Add one batch's x x̂ᵀ to the sum of each site; sites with one input share the product."""
    products: dict[int, Tensor] = {}
    for name, x in compressed.items():
        if id(x) not in products:
            rows = real_rows(dense[name], mask).float()
            products[id(x)] = rows.t() @ real_rows(x, mask).float()
        product = products[id(x)]
        sums[name] = sums[name] + product if name in sums else product
