"""Building the library: what is missing, and the worker's task that makes it.

A task builds all missing options of one unit in one go, so that what they have in common (a
factorised Gram matrix, a pruned weight) is computed once, and stores each as soon as it is made: a
build that is interrupted continues where it was. What begins with a step that trains is a task of
its own, and what that step leaves is an item, asked for or not: nothing is trained twice. No ray
here: the caller brings the `map`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from autocomp.calibrate.stats import Need, RecordedStats, UnitStats, load_stats, recording_path
from autocomp.core.candidate import Option, Step
from autocomp.core.errors import InternalError, ModelError
from autocomp.core.unit import Unit, dense_format
from autocomp.library.errors import relative_errors
from autocomp.library.store import Library, item_key
from autocomp.library.training import without_stats
from autocomp.models.discover import Stored, stored_tensors
from autocomp.models.sources import read_config, weight_files
from autocomp.operators import (
    apply_step,
    option_formats,
    step_needs,
    training_step,
    weight_option,
)
from autocomp.operators.protocol import SiteState, UnitState, training_of
from autocomp.targets.peak_memory import peak_bytes, reset_peak

TRAINING_WEIGHT = 100
"""Options of another kind that take about as long as training a replacement does."""

logger = logging.getLogger(__name__)

Keys = dict[tuple[str, str], str]
"""(unit name, option key) → item key. Options that leave no weight, or every weight as it was, have
no item; those that differ in token steps alone share one."""


@dataclass(frozen=True)
class BuildTask:
    """All missing options of one unit, or those that begin with one step that trains. Picklable.

    Attributes:
        model_path: directory of the teacher, safetensors.
        options: option with the key its item is stored under.
        trained: the step that trains, which all of them begin with, with the key of its own item.
        trains: whether that item is missing.
        stats_path: the unit's statistics; `None` where no option reads any.
        library_root, capacity_bytes: see `Library`.
    """

    model_path: Path
    unit: Unit
    options: tuple[tuple[Option, str], ...]
    stats_path: Path | None
    library_root: Path
    capacity_bytes: int | None = None
    trained: tuple[Step, str] | None = None
    trains: bool = False

    @property
    def weight(self) -> int:
        """About how long it takes, in options that are not trained."""
        return len(self.options) + (TRAINING_WEIGHT if self.trains else 0)

    @property
    def needs(self) -> frozenset[Need]:
        """What of the unit's statistics building reads; a trained item that is there reads none."""
        done = {self.trained[0]} if self.trained is not None and not self.trains else set()
        steps = {step for option, _ in self.options for step in option.steps}
        if self.trained is not None:
            steps.add(self.trained[0])
        return step_needs(steps - done)


@dataclass(frozen=True)
class ItemInfo:
    """What is known about a built item.

    Attributes:
        seconds: time spent on this option beyond what it shares with those built before it.
        error: site → output error on the calibration tokens relative to the output's energy,
            ‖Wx − Ŵx‖² / ‖Wx‖²; for tables, and where no option of the task reads inputs, relative
            to the weights'.
        size_bytes: of the stored item.
        peak_bytes: the most memory that was resident in the worker meanwhile, all of it, torch and
            what other options left included; where the system cannot count anew (all but Linux),
            since the worker began.
        training: of the step that trains, if it begins with one: `LocalTraining.report`.
    """

    unit: str
    option: Option
    key: str
    seconds: float
    error: Mapping[str, float]
    size_bytes: int
    peak_bytes: int
    training: Mapping[str, Any] | None = None

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

    @property
    def needs(self) -> dict[str, frozenset[Need]]:
        """Unit name → what of its statistics building reads; none where it reads nothing."""
        found: dict[str, frozenset[Need]] = {}
        for task in self.tasks:
            if task.needs:
                found[task.unit.name] = found.get(task.unit.name, frozenset()) | task.needs
        return found

    @property
    def recorded(self) -> list[str]:
        """Units whose inputs have to be recorded: something is trained on them."""
        return [name for name, needs in self.needs.items() if "recording" in needs]

    @property
    def weight(self) -> int:
        """About how long it takes; see `BuildTask.weight`."""
        return self.weight_of(len(self.tasks))

    def weight_of(self, done: int) -> int:
        """The part of `weight` behind us once this many tasks have ended: they start in order."""
        return sum(task.weight for task in self.tasks[:done])


def plan_build(
    model_path: Path,
    units: Sequence[Unit],
    options: Mapping[str, Sequence[Option]],
    stats_paths: Mapping[str, Path],
    stats_fingerprint: str,
    library: Library,
    own_fingerprints: Mapping[str, str] | None = None,
    recording_fingerprint: str = "",
) -> BuildPlan:
    """Tasks for the missing items, slowest first; items that are there are checked.

    One task a unit, and one for every replacement at it that is trained.

    Args:
        options: unit name → its options, as `unit_options` gives them.
        stats_paths: unit name → file of statistics, which has to be there when a task that needs
            some is run; an embedding may have none.
        own_fingerprints: unit name → fingerprint of its statistics, where they are not those of
            `stats_fingerprint` alone.
        recording_fingerprint: of the examples that attention's inputs are recorded on.

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
        plain = own.get(unit.name, stats_fingerprint)
        groups: dict[Step | None, dict[str, Option]] = {}
        for option in built:
            stored, trained = weight_option(option), training_step(option)
            data = plain if trained is None else f"{plain} {recording_fingerprint}"
            key = item_key(digest, stored, data)
            keys[unit.name, option.key] = key
            if not library.contains(key):
                groups.setdefault(trained, {})[key] = stored
        for trained, missing in groups.items():
            task = BuildTask(
                model_path=model_path,
                unit=unit,
                options=tuple((option, key) for key, option in missing.items()),
                stats_path=stats_paths.get(unit.name),
                library_root=library.root,
                capacity_bytes=library.capacity_bytes,
            )
            if trained is not None:
                key = item_key(digest, Option((trained,)), f"{plain} {recording_fingerprint}")
                task = replace(task, trained=(trained, key), trains=not library.contains(key))
            tasks.append(task if task.needs else replace(task, stats_path=None))
    tasks.sort(key=lambda task: (not task.trains, -task.unit.parameters * len(task.options)))
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
    """Build and store every option of a task. A worker's task: nothing is kept in memory.

    What a step that trains leaves is loaded if it is stored, and stored if it is not.

    Raises:
        ModelError: if a tensor holds NaN or infinity, by name.
        StorageError: if the disk is full; items stored before stay.
    """
    library = Library(task.library_root, task.capacity_bytes)
    original = load_unit(task.model_path, task.unit)
    stats = {} if task.stats_path is None else load_stats(task.stats_path)
    states: dict[tuple[Step, ...], UnitState] = {(): original}
    items: list[ItemInfo] = []
    begun = time.perf_counter()
    training: Mapping[str, Any] | None = None
    reset_peak()
    if task.trained is not None:
        states[task.trained[:1]] = made = _trained(task, library, original, stats)
        training = _report(made)
    # Options that begin alike are neighbours; of the rest only the common beginnings are kept.
    for option, key in sorted(task.options, key=_beginnings):
        started = begun
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
        seconds, peak = time.perf_counter() - started, peak_bytes()
        if task.trained is not None and key == task.trained[1]:
            size = library.path(key).stat().st_size
        else:
            info = _info(task.unit, option, seconds, errors, peak)
            size = library.put(key, without_stats(state), info)
        items.append(ItemInfo(task.unit.name, option, key, seconds, errors, size, peak, training))
        begun = time.perf_counter()
        reset_peak()
    return items


def _trained(task: BuildTask, library: Library, original: UnitState, stats: UnitStats) -> UnitState:
    """What the task's step that trains leaves: as it is stored, which is done first if need be."""
    assert task.trained is not None
    step, key = task.trained
    state = library.get(key)
    if state is None:
        assert task.stats_path is not None
        started = time.perf_counter()
        recorded = RecordedStats(stats, recording_path(task.stats_path))
        made = apply_step(task.unit, original, step, recorded)
        errors = relative_errors(original, original, made, stats)
        seconds = time.perf_counter() - started
        info = _info(task.unit, Option((step,)), seconds, errors, peak_bytes())
        library.put(key, made, info | {"training": dict(_report(made))})
        state = library.get(key)
    if state is None:  # removed the moment it was written
        raise InternalError(
            f"{library.path(key)} is gone: the library is too small for what is built, or "
            f"something else removes its items. Raise its capacity and start the same command again"
        )
    return state


def _report(state: UnitState) -> Mapping[str, Any]:
    training = training_of(state)
    assert training is not None
    return training.report


def _info(
    unit: Unit, option: Option, seconds: float, errors: Mapping[str, float], peak: int
) -> dict[str, Any]:
    return {
        "unit": unit.name,
        "option": option.to_json(),
        "seconds": seconds,
        "error": dict(errors),
        "peak_bytes": peak,
    }


def load_unit(model_path: Path, unit: Unit) -> UnitState:
    """The dense state of one unit: only its own tensors are read from the teacher's safetensors.

    Raises:
        ModelError: if a tensor is missing, has another shape, or holds NaN or infinity.
    """
    return _Reader(model_path).state(unit)


def unit_digest(model_path: Path, unit: Unit) -> str:
    """SHA-256 of the unit's weights and shape, in hex."""
    return _digest(unit, load_unit(model_path, unit))


def _beginnings(entry: tuple[Option, str]) -> list[str]:
    return [step.label() for step in entry[0].steps]


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
