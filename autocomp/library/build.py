"""Building the library: what is missing, and the worker's task that makes it.

A task builds all missing options of one unit in one go, so that what they have in common (a
factorised Gram matrix, a pruned weight) is computed once, and stores each as soon as it is made: a
build that is interrupted continues where it was. No ray here: the caller brings the `map`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from autocomp.calibrate.stats import UnitStats, load_stats
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import ModelError
from autocomp.core.unit import Unit, dense_format
from autocomp.library.store import Library, item_key
from autocomp.models.discover import Stored, stored_tensors
from autocomp.models.sources import read_config, weight_files
from autocomp.operators import apply_step, option_formats, weight_option
from autocomp.operators.factorize.factors import multiplied
from autocomp.operators.gram import derived, output_error
from autocomp.operators.protocol import SiteState, SiteStats, UnitState

logger = logging.getLogger(__name__)

Keys = dict[tuple[str, str], str]
"""(unit name, option key) → item key. Options that leave no weight, or every weight as it was, have
no item; those that differ in token steps alone share one."""


@dataclass(frozen=True)
class BuildTask:
    """All missing options of one unit. Picklable; small.

    Attributes:
        model_path: directory of the teacher, safetensors.
        options: option with the key its item is stored under.
        stats_path: the unit's statistics; `None` for an embedding.
        library_root, capacity_bytes: see `Library`.
    """

    model_path: Path
    unit: Unit
    options: tuple[tuple[Option, str], ...]
    stats_path: Path | None
    library_root: Path
    capacity_bytes: int | None = None


@dataclass(frozen=True)
class ItemInfo:
    """What is known about a built item.

    Attributes:
        seconds: time spent on this option beyond what it shares with those built before it.
        error: site → output error on the calibration tokens relative to the output's energy,
            ‖Wx − Ŵx‖² / ‖Wx‖²; for tables, relative to the weights'.
        size_bytes: of the stored item.
    """

    unit: str
    option: Option
    key: str
    seconds: float
    error: Mapping[str, float]
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {**asdict(self), "option": self.option.to_json(), "error": dict(self.error)}


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and where every item is once that is done."""

    tasks: list[BuildTask]
    keys: Keys

    @property
    def missing(self) -> int:
        """Items to build."""
        return sum(len(task.options) for task in self.tasks)


def plan_build(
    model_path: Path,
    units: Sequence[Unit],
    options: Mapping[str, Sequence[Option]],
    stats_paths: Mapping[str, Path],
    stats_fingerprint: str,
    library: Library,
    own_fingerprints: Mapping[str, str] | None = None,
) -> BuildPlan:
    """One task per unit with missing items, largest first; items that are there are checked.

    Args:
        options: unit name → its options, as `unit_options` gives them.
        stats_paths: unit name → file of statistics; an embedding may have none.
        own_fingerprints: unit name → fingerprint of its statistics, where they are not those of
            `stats_fingerprint` alone.

    Raises:
        ModelError: if the teacher lacks a tensor, or one holds NaN or infinity.
    """
    keys: Keys = {}
    own = own_fingerprints or {}
    tasks: list[BuildTask] = []
    reader = _Reader(model_path)
    for unit in units:
        built = [option for option in options.get(unit.name, ()) if _has_item(unit, option)]
        if not built:
            continue
        digest = _digest(unit, reader.state(unit))
        missing: dict[str, Option] = {}
        for option in built:
            stored = weight_option(option)
            key = item_key(digest, stored, own.get(unit.name, stats_fingerprint))
            keys[unit.name, option.key] = key
            if not library.contains(key):
                missing[key] = stored
        if missing:
            tasks.append(
                BuildTask(
                    model_path=model_path,
                    unit=unit,
                    options=tuple((option, key) for key, option in missing.items()),
                    stats_path=stats_paths.get(unit.name),
                    library_root=library.root,
                    capacity_bytes=library.capacity_bytes,
                )
            )
    tasks.sort(key=lambda task: -task.unit.parameters * len(task.options))
    return BuildPlan(tasks, keys)


def build(
    plan: BuildPlan,
    map_tasks: Callable[
        [Callable[[BuildTask], list[ItemInfo]], Sequence[BuildTask]], Iterable[list[ItemInfo]]
    ] = map,
    progress: Callable[[int, int], None] | None = None,
) -> list[ItemInfo]:
    """Run the tasks of a plan through `map_tasks(function, tasks)`, which may be parallel.

    Args:
        progress: called with (items built, items to build) as tasks end.
    """
    done: list[ItemInfo] = []
    for items in map_tasks(build_unit, plan.tasks):
        done.extend(items)
        if progress is not None:
            progress(len(done), plan.missing)
    return done


def build_unit(task: BuildTask) -> list[ItemInfo]:
    """Build and store every option of one unit. A worker's task: nothing is kept in memory.

    Raises:
        ModelError: if a tensor holds NaN or infinity, by name.
        StorageError: if the disk is full; items stored before stay.
    """
    library = Library(task.library_root, task.capacity_bytes)
    original = load_unit(task.model_path, task.unit)
    stats = {} if task.stats_path is None else load_stats(task.stats_path)
    states: dict[tuple[Step, ...], UnitState] = {(): original}
    items: list[ItemInfo] = []
    # Options that begin alike are neighbours; of the rest only the common beginnings are kept.
    for option, key in sorted(task.options, key=_beginnings):
        started = time.perf_counter()
        for known in [steps for steps in states if option.steps[: len(steps)] != steps]:
            del states[known]
        for count in range(1, len(option.steps) + 1):
            if option.steps[:count] not in states:
                states[option.steps[:count]] = apply_step(
                    task.unit,
                    states[option.steps[: count - 1]],
                    option.steps[count - 1],
                    stats,
                )
        state = states[option.steps]
        errors = relative_errors(original, states.get(option.steps[:-1], original), state, stats)
        seconds = time.perf_counter() - started
        size = library.put(
            key,
            state,
            {
                "unit": task.unit.name,
                "option": option.to_json(),
                "seconds": seconds,
                "error": errors,
            },
        )
        items.append(ItemInfo(task.unit.name, option, key, seconds, errors, size))
    return items


def load_unit(model_path: Path, unit: Unit) -> UnitState:
    """The dense state of one unit: only its own tensors are read from the teacher's safetensors.

    Raises:
        ModelError: if a tensor is missing, has another shape, or holds NaN or infinity.
    """
    return _Reader(model_path).state(unit)


def unit_digest(model_path: Path, unit: Unit) -> str:
    """SHA-256 of the unit's weights and shape, in hex."""
    return _digest(unit, load_unit(model_path, unit))


def relative_errors(
    original: UnitState, before: UnitState, after: UnitState, stats: UnitStats
) -> dict[str, float]:
    """Site → ‖Wx − Ŵx‖² / ‖Wx‖² over the calibration tokens, biases included in the difference.

    Where outputs were removed there is no original to compare with: `before`, the state before the
    last step, stands in, and where the last step removed them, the kept ones are unchanged. Factors
    are multiplied: the error is that of the site they stand for.
    """
    errors: dict[str, float] = {}
    before, after = multiplied(before), multiplied(after)
    for name, site in after.items():
        reference = original[name]
        if reference.weight.shape[0] != site.weight.shape[0]:
            reference = before[name]
            if reference.weight.shape[0] != site.weight.shape[0]:
                errors[name] = 0.0
                continue
        errors[name] = _relative_error(reference, site, stats.get(name))
    return errors


def _relative_error(reference: SiteState, site: SiteState, stats: SiteStats | None) -> float:
    weight, after = reference.weight, site.on_plain_inputs()
    if weight.shape != after.shape:
        assert site.kept_columns is not None
        after = torch.zeros_like(weight)
        after[:, site.kept_columns] = site.on_plain_inputs()
    if stats is None or stats.rows is not None:
        return _relative_distance(weight, after)
    difference = weight - after
    gram, mean = stats.gram, stats.mean
    if reference.kept_columns is not None and weight.shape[1] != gram.shape[0]:
        kept = reference.kept_columns
        gram, mean = gram[kept][:, kept], mean[kept]
    error = output_error(difference, gram)
    if reference.bias is not None and site.bias is not None:
        shift = (reference.bias - site.bias).double()
        drift = difference.double() @ mean.double()
        error += float(stats.count * (shift @ shift + 2 * (shift @ drift)))
    key = ("energy", id(weight), weight._version)
    energy = derived(stats.gram, key, lambda: (weight, output_error(weight, gram)))[1]
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _beginnings(entry: tuple[Option, str]) -> list[str]:
    return [step.label() for step in entry[0].steps]


def _relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖² / ‖one‖², a thousand rows at a time: tables are large."""
    error = energy = 0.0
    for left, right in zip(torch.split(one, 1024), torch.split(other, 1024), strict=True):
        error += float((left - right).square().sum())
        energy += float(left.square().sum())
    return error / energy if energy > 0 else 0.0


def _has_item(unit: Unit, option: Option) -> bool:
    return not weight_option(option).dense and bool(option_formats(unit, option))


def _digest(unit: Unit, state: UnitState) -> str:
    shape = [unit.kind, unit.heads, unit.kv_heads, unit.head_dim, unit.width]
    digest = hashlib.sha256(repr(shape).encode())
    for site in unit.sites:
        for part in (state[site.name].weight, state[site.name].bias):
            if part is not None:
                digest.update(f"{site.name} {site.role} {tuple(part.shape)}".encode())
                digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


class _Reader:
    """Reads units from a model directory by tensor name; headers once."""

    def __init__(self, model_path: Path) -> None:
        self._path = Path(model_path)
        self._config = read_config(self._path)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(self._path):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self._file_of[name] = file
                    self._shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def state(self, unit: Unit) -> UnitState:
        places = stored_tensors(self._config, unit, self._shapes)
        formats = dense_format(unit)
        return {
            site.name: SiteState(
                weight=self._tensor(f"{site.name}.weight", places, (site.rows, site.columns)),
                bias=self._tensor(f"{site.name}.bias", places, (site.rows,)) if site.bias else None,
                format=formats[site.name],
            )
            for site in unit.sites
        }

    def _tensor(
        self, name: str, places: Mapping[str, Stored], shape: tuple[int, ...]
    ) -> torch.Tensor:
        stored = places.get(name)
        if stored is None:
            raise ModelError(f"{self._path}: no tensor {name}; the teacher's files are incomplete")
        with safe_open(self._file_of[stored.key], framework="pt") as file:
            tensor: torch.Tensor = stored.read(file.get_slice(stored.key)).float().contiguous()
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self._path}: {stored.key} is {tuple(tensor.shape)}, not {shape}")
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
            raise ModelError(
                f"{self._path}: {stored.key} holds NaN or infinity. Nothing can be built from it; "
                f"fetch the model again, or fit the teacher at a lower learning rate"
            )
        return tensor
