"""Hidden states behind the first blocks, kept for models that begin alike.

A replace-one candidate is the teacher up to the changed unit; candidates sorted by their options
often share their first blocks. What those blocks make of the screening examples is computed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from autocomp.core.candidate import Candidate, Option
from autocomp.core.unit import Unit
from autocomp.models.surgery import blocks
from autocomp.models.tokens import TokenSizes, token_sizes

CAPACITY_BYTES = 256 * 2**20

Batch = Mapping[str, torch.Tensor]
Key = tuple[str, ...]


class Prefixes:
    """Runs models over fixed batches, leaving out first blocks whose output is known.

    Args:
        units: of the model, in model order.
        batches: the examples, always the same.
        capacity_bytes: of hidden states kept; those used longest ago go first.
    """

    def __init__(
        self, units: Sequence[Unit], batches: Sequence[Batch], capacity_bytes: int = CAPACITY_BYTES
    ) -> None:
        self.batches = batches
        self.capacity_bytes = capacity_bytes
        last = max((unit.layer for unit in units if unit.layer is not None), default=-1)
        self._before: list[list[str]] = [
            [
                unit.name
                for unit in units
                if unit.kind == "embedding" or (unit.layer is not None and unit.layer < depth)
            ]
            for depth in range(last + 2)
        ]
        self._known: OrderedDict[Key, list[Any]] = OrderedDict()

    def key(self, candidate: Candidate, depth: int) -> Key:
        """What the output of the first `depth` blocks depends on: the options up to there."""
        dense = Option()
        return tuple(candidate.by_unit.get(name, dense).key for name in self._before[depth])

    def common(self, left: Candidate, right: Candidate) -> int:
        """How many first blocks give the same in both; 0 if their embeddings differ."""
        for depth in range(len(self._before) - 1, 0, -1):
            if self.key(left, depth) == self.key(right, depth):
                return depth
        return 0

    def outputs(
        self,
        model: nn.Module,
        candidate: Candidate,
        run: Callable[[nn.Module, Batch], torch.Tensor],
        keep: int = 0,
    ) -> Iterator[torch.Tensor]:
        """`run(model, batch)` for every batch, in order.

        Args:
            model: stitched for `candidate`; its blocks are bypassed for the time of a call.
            candidate: says which blocks are known.
            run: one forward pass.
            keep: remember what the first `keep` blocks give; 0 for nothing.
        """
        chain = blocks(model)
        sizes = token_sizes(model)
        start, stored = self._longest(candidate)
        kept: list[Any] = []
        for index, batch in enumerate(self.batches):
            with ExitStack() as stack:
                if start:
                    stack.enter_context(_replayed(chain[:start], stored[index], sizes))
                if keep > start:
                    stack.enter_context(_recorded(chain[keep - 1], kept, sizes))
                output = run(model, batch)
            yield output
        if keep > start:
            self._remember(self.key(candidate, keep), kept)

    def _longest(self, candidate: Candidate) -> tuple[int, list[Any]]:
        for depth in range(len(self._before) - 1, 0, -1):
            key = self.key(candidate, depth)
            if key in self._known:
                self._known.move_to_end(key)
                return depth, self._known[key]
        return 0, []

    def _remember(self, key: Key, outputs: list[Any]) -> None:
        self._known[key] = outputs
        total = sum(_size(entry) for known in self._known.values() for entry in known)
        while total > self.capacity_bytes:
            _, dropped = self._known.popitem(last=False)
            total -= sum(_size(entry) for entry in dropped)


def _size(entry: Any) -> int:
    output, sizes = entry
    parts = (*(output if isinstance(output, tuple) else (output,)), sizes)
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


@contextmanager
def _recorded(block: nn.Module, entries: list[Any], sizes: TokenSizes | None) -> Iterator[None]:
    """What `block` gives, and the sizes of its tokens, are appended to `entries`."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        entries.append((output, None if sizes is None else sizes.now))

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replayed(chain: Sequence[nn.Module], entry: Any, sizes: TokenSizes | None) -> Iterator[None]:
    """The blocks of `chain` do nothing; the last gives what was recorded."""
    output, known = entry
    if sizes is not None:
        sizes.now = known

    def give(*args: Any, **kwargs: Any) -> Any:
        return output

    for block in chain:
        block.forward = give
    try:
        yield
    finally:
        for block in chain:
            del block.forward
