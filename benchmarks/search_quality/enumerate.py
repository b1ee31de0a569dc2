"""The KL of every candidate of a small space, hidden states shared by all that begin alike.

Depth first over the blocks: what the first blocks make of the examples under one choice of options
is computed once for all that follow; the last step is the head and the divergence from the teacher.
A part is what shares the first half of the free blocks. Parts are kept as they are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocomp.core.candidate import Candidate, Option
from autocomp.search.space import Space, Vector
from benchmarks.search_quality.problem import AdditiveCosts, Problem

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """A space of which everything is known.

    Attributes:
        kl: KL(teacher ‖ stitched) in nats, an axis for each unit that has a choice.
    """

    space: Space
    costs: AdditiveCosts
    kl: Floats

    def lookup(self, vector: Vector) -> float:
        """The KL of one candidate."""
        return float(self.kl[tuple(vector[unit] for unit in self.space.free)])

    @cached_property
    def problem(self) -> Problem:
        """The space without limits."""
        return Problem(self.space, self.costs)

    def cost(self, metric: str) -> Floats:
        """What every candidate costs, in the shape of `kl`."""
        costs, free = self.problem.costs, self.space.free
        terms = costs.terms[metric]
        total = np.array(costs.base[metric])
        for unit, row in enumerate(terms):
            total = np.add.outer(total, row) if unit in free else total + row[0]
        return np.asarray(total, np.float64)


class Walk:
    """The model's blocks under every combination of their options, gone through depth first.

    Args:
        teacher: the dense model.
        space: free units lie in blocks; all blocks from the first of these on are walked.
        stitch: makes the model of a candidate.
        logits: runs a model on the examples.
    """

    def __init__(
        self,
        teacher: Any,
        space: Space,
        stitch: Callable[[Candidate], Any],
        logits: Callable[[Any], Any],
    ) -> None:
        from autocomp.models.surgery import blocks, copy_for_surgery

        self._teacher, self._space = teacher, space
        self._stitch, self._logits = stitch, logits
        chain = blocks(teacher)
        free = [space.units[unit].layer for unit in space.free]
        self._layers = range(min(layer for layer in free if layer is not None), len(chain))
        self._inputs: dict[int, tuple[Any, Any]] = {}
        self._reference = self._read_inputs(chain)
        self._choices = [self._blocks(layer) for layer in self._layers]
        self._split = max(1, len(self._choices) // 2)
        self._tail = copy_for_surgery(teacher)
        self._output: Any = None
        for block in blocks(self._tail):
            block.forward = self._give

    @property
    def parts(self) -> int:
        """How many combinations the first half of the walked blocks has."""
        return math.prod(len(choices) for choices in self._choices[: self._split])

    def part(self, index: int) -> list[float]:
        """KL of the candidates that begin with one of these, in the order of their vectors."""
        beginnings = list(product(*self._choices[: self._split]))
        output = self._inputs[self._layers[0]][0][0]
        for depth, block in enumerate(beginnings[index]):
            output = self._through(depth, block, output)
        found: list[float] = []
        self._below(self._split, output, found)
        return found

    def whole(self, vector: Vector) -> float:
        """KL of one candidate, stitched and run from end to end: what parts are checked against."""
        from autocomp.tasks.divergence import teacher_kl

        student = self._stitch(self._space.decode(vector))
        return float(teacher_kl(self._reference, self._logits(student)))

    def _below(self, depth: int, output: Any, found: list[float]) -> None:
        if depth == len(self._choices):
            found.append(self._divergence(output))
            return
        for block in self._choices[depth]:
            self._below(depth + 1, self._through(depth, block, output), found)

    def _through(self, depth: int, block: Any, output: Any) -> Any:
        args, kwargs = self._inputs[self._layers[depth]]
        hidden = output[0] if isinstance(output, tuple) else output
        return block(hidden, *args[1:], **kwargs)

    def _divergence(self, output: Any) -> float:
        """Of a model whose last block gives `output`."""
        from autocomp.tasks.divergence import teacher_kl

        self._output = output
        return float(teacher_kl(self._reference, self._logits(self._tail)))

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def _read_inputs(self, chain: Sequence[Any]) -> Any:
        """The teacher's logits; what each block is called with goes to `_inputs`."""
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: self._inputs.update({layer: (args, kwargs)}),
                with_kwargs=True,
            )
            for layer, block in enumerate(chain)
        ]
        logits = self._logits(self._teacher)
        for handle in handles:
            handle.remove()
        return logits

    def _blocks(self, layer: int) -> list[Any]:
        """The block under every combination of its units' options, in the order of vectors."""
        from autocomp.models.surgery import blocks

        space = self._space
        here = [unit for unit in space.free if space.units[unit].layer == layer]
        found = []
        for levels in product(*(range(space.levels[unit]) for unit in here)):
            options = dict.fromkeys(space.names, Option())
            for unit, level in zip(here, levels, strict=True):
                options[space.names[unit]] = space.options[space.names[unit]][level]
            found.append(blocks(self._stitch(Candidate.of(options)))[layer])
        return found


class Enumerator:
    """Walks parts of a space and keeps what it finds. Resident in a worker.

    Args:
        context: the library and what it was built from.
        space: see `Walk`.
        examples: the first so many of the distil split, in one batch.
        directory: of the parts found.
    """

    def __init__(self, context: Any, space: Space, examples: int, directory: Path) -> None:
        import torch

        from autocomp.library.stitch import stitch
        from autocomp.library.store import Library
        from autocomp.models.load import load_model
        from autocomp.tasks import make_task

        torch.set_num_threads(1)
        self._directory = directory
        library, units = Library(context.library_path), context.units
        task = make_task(context.spec, context.model_path)
        teacher = load_model(context.teacher_path, task.name, task.num_labels)
        batch = next(iter(task.batches("distil", examples, seed=0)))
        with torch.no_grad():
            self.walk = Walk(
                teacher,
                space,
                lambda candidate: stitch(teacher, units, library, context.items, candidate),
                lambda model: task.logits(model, batch),
            )

    def count(self, _: None = None) -> int:
        """Number of parts."""
        return self.walk.parts

    def part(self, index: int) -> list[float]:
        """See `Walk.part`; from its file if it is known."""
        import torch

        from autocomp.core.files import write_atomic

        path = self._directory / f"part-{index:04}.npy"
        if path.exists():
            known: list[float] = np.load(path).tolist()
            return known
        with torch.no_grad():
            found = self.walk.part(index)
        write_atomic(path, lambda temporary: _save(temporary, found))
        return found


def enumerated(context: Any, space: Space, examples: int, directory: Path) -> Floats:
    """The KL of every candidate, an axis for each unit that has a choice; on all cores."""
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import start
    from benchmarks.search_quality.lines import progress

    directory.mkdir(parents=True, exist_ok=True)
    shape = [space.levels[unit] for unit in space.free]
    args = (context, space, examples, directory)
    with start(None, None) as cluster, ActorPool(Enumerator, args, cluster.workers) as pool:
        [count] = pool.map("count", [None])
        parts: Sequence[list[float]] = pool.map("part", range(count), progress("parts enumerated"))
    return np.array([kl for part in parts for kl in part]).reshape(shape)


def _save(path: Path, values: list[float]) -> None:
    with path.open("wb") as file:  # np.save to a path would add a suffix
        np.save(file, np.array(values))
