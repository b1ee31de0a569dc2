"""A space with options for every single linear layer, and candidates of it stitched.

The spec chooses for whole sublayers. But SparseGPT and GPTQ solve each layer of a sublayer on its
own, so that what the library holds of a sublayer at 4 bits is, layer by layer, what any mixture
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autocomp.core.candidate import Candidate, Option
from autocomp.core.unit import Unit
from autocomp.search.scores import EACH, LocalError, replace_one
from autocomp.search.space import Space, Vector
from benchmarks.search_quality.dimensions import Axes
from benchmarks.search_quality.problem import AdditiveCosts, Problem


def _argument(operator: str, name: str, absent: float) -> Callable[[Option], float]:
    def read(option: Option) -> float:
        step = option.step(operator)
        return absent if step is None else float(step[name])

    return read


def _group(option: Option) -> float | None:
    """Columns that share a scale: no choice of dense and 8-bit weights."""
    return _argument("gptq", "group", 0.0)(option) or None


AXES: Axes = {
    "zeros": _argument("sparsegpt", "level", 0.0),
    "bits": _argument("gptq", "weights", 32.0),
    "group": _group,
}
"""The dimensions of a linear layer."""


def linear_problem(setting: Any) -> Problem:
    """A unit for each linear layer that the spec has options for, these from large to small.

    Costs are the bytes of these layers alone, as the target stores them.
    """
    from autocomp.library.store import Library
    from autocomp.operators import family, option_formats

    context = setting.context
    target, library = context.target(None), Library(context.library_path)
    units: list[Unit] = []
    options: dict[str, list[Option]] = {}
    sizes: dict[str, dict[str, float]] = {}
    local: dict[str, dict[str, LocalError]] = {}
    for unit in setting.plan.units:
        offered = setting.plan.options[unit.name]
        if len(offered) == 1:
            continue
        formats = {option: option_formats(unit, option) for option in offered}
        errors = {
            option: {} if option.dense else _errors(library, context.items[unit.name, option.key])
            for option in offered
        }
        for site in unit.sites:
            units.append(Unit(site.name, unit.kind, (site,), layer=unit.layer))
            row = {o.key: float(target.size_bytes(formats[o][site.name])) for o in offered}
            sizes[site.name] = row
            options[site.name] = sorted(offered, key=lambda option, row=row: -row[option.key])
            local[site.name] = {
                o.key: LocalError(family(o).key, errors[o].get(site.name, 0.0)) for o in offered
            }
    space = Space(units, options)
    many = len(replace_one(space)) > EACH
    costs = AdditiveCosts({}, {"size_bytes": sizes})
    return Problem(space, costs, axes=AXES, local=local if many else None)


def _errors(library: Any, key: str) -> dict[str, float]:
    """Layer → local error, of an item that was built just now."""
    errors: dict[str, float] = library.describe(key)["error"]
    return errors


class LinearScreener:
    """The divergence of candidates of a `linear_problem` from the teacher.

    Args:
        context: the library and what it was built from.
        space: of the problem; every unit has the options of the sublayer it is part of.
        examples: the first so many of the distil split, in one batch.
    """

    def __init__(self, context: Any, space: Space, examples: int) -> None:
        import torch

        from autocomp.library.store import Library
        from autocomp.models.load import load_model
        from autocomp.models.surgery import copy_for_surgery
        from autocomp.tasks import make_task

        torch.set_num_threads(1)
        self._space = space
        self._task = make_task(context.spec, context.model_path)
        teacher = load_model(context.teacher_path, self._task.name, self._task.num_labels)
        self._batch = next(iter(self._task.batches("distil", examples, seed=0, trim=True)))
        with torch.no_grad():
            self._reference = self._task.logits(teacher, self._batch)
        self._layers = _layers(context, Library(context.library_path), teacher, space)
        self._student = copy_for_surgery(teacher)
        self._now = [-1] * len(space)

    def divergence(self, vector: Vector) -> float:
        """Mean KL(teacher ‖ candidate) over the examples, in nats."""
        import torch

        from autocomp.models.surgery import replace_module
        from autocomp.tasks.divergence import teacher_kl

        for at, (name, level) in enumerate(zip(self._space.names, vector, strict=True)):
            if self._now[at] != level:
                replace_module(self._student, name, self._layers[at][level])
                self._now[at] = level
        with torch.no_grad():
            logits = self._task.logits(self._student, self._batch)
            return float(teacher_kl(self._reference, logits))


def _layers(context: Any, library: Any, teacher: Any, space: Space) -> list[Sequence[Any]]:
    """Per unit of the space, its layer under each option: out of sublayers that have it whole."""
    from autocomp.library.stitch import stitch

    whole: dict[Option, Any] = {}
    for option in {option for offered in space.options.values() for option in offered}:
        chosen = {
            unit.name: option if (unit.name, option.key) in context.items else Option()
            for unit in context.units
        }
        candidate = Candidate.of(chosen)
        whole[option] = stitch(teacher, context.units, library, context.items, candidate)
    return [
        [whole[option].get_submodule(name) for option in space.options[name]]
        for name in space.names
    ]
