"""The library of a search: what is missing of it is calibrated for and built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.api.built import built_note, record_built
from autocomp.api.plan import Plan
from autocomp.api.prepare import Teacher, cache_directory, library_path, load_teacher
from autocomp.core.hashing import content_key
from autocomp.core.lock import locked
from autocomp.report.progress import SearchProgress
from autocomp.tasks.protocol import Task
from autocomp.workers.cluster import Cluster

if TYPE_CHECKING:
    from torch import Tensor

    from autocomp.library.build import BuildPlan
    from autocomp.study.ledger import Ledger

CALIBRATION_BATCH = 32

_WAITING = "another search is building options of this model from the same examples: waiting for it"


def prepare_library(
    plan: Plan,
    teacher: Teacher,
    cluster: Callable[[], Cluster],
    progress: SearchProgress,
    ledger: Ledger | None = None,
) -> dict[tuple[str, str], str]:
    """Calibrate and build what the library lacks; the key of every item.

    Only what the operators of missing items read is gathered: nothing runs where they read nothing.
    One search at a time gathers and builds from the same examples, and removes what it gathered.

    `cluster` starts the workers; it is called only if there is something to build. What that took
    is told, and written to `ledger`.
    """
    from autocomp.calibrate.stats import recording_path
    from autocomp.calibrate.stream import fingerprint
    from autocomp.core.hashing import file_digest
    from autocomp.library.build import plan_build
    from autocomp.library.store import Library
    from autocomp.models.sources import code_files, weight_files

    progress.phase("calibrate")
    files = [*weight_files(teacher.path), *code_files(teacher.path)]
    digest = content_key([file_digest(file) for file in files])
    batches = list(teacher.task.batches("calibrate", CALIBRATION_BATCH, trim=True))
    statistics = fingerprint(batches, digest)
    more = _recorded_batches(plan, teacher.task)
    recording = fingerprint(more, digest) if more else ""
    directory = cache_directory() / "statistics" / f"{statistics[:16]}{recording[:16]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_suffix(".lock"), waiting=lambda: progress.note(_WAITING)):
        gathered = {
            u.name: directory / f"{u.name}.safetensors" for u in plan.units if u.kind != "embedding"
        }
        counted = _count_tokens(plan, teacher.task, directory)
        build = plan_build(
            teacher.path,
            plan.units,
            plan.options,
            gathered | counted,
            statistics,
            Library(library_path()),
            {unit: content_key([statistics, path.name]) for unit, path in counted.items()},
            recording,
        )
        if any(name in build.needs for name in gathered):
            _gather(plan, teacher, build, batches, more, directory, progress)
        progress.phase("library", build.weight)
        if build.tasks:
            _build(build, cluster, progress, ledger)
        for path in (gathered | counted).values():
            path.unlink(missing_ok=True)
            recording_path(path).unlink(missing_ok=True)
    return build.keys


def _gather(
    plan: Plan,
    teacher: Teacher,
    build: BuildPlan,
    batches: Sequence[dict[str, Tensor]],
    more: Sequence[dict[str, Tensor]],
    directory: Path,
    progress: SearchProgress,
) -> None:
    """Run the teacher once, and keep what building reads."""
    from autocomp.calibrate.stream import calibrate

    counted = {unit.name for unit in plan.units if unit.kind == "embedding"}
    recorded = build.recorded
    steps = calibrate(
        load_teacher(plan, teacher),
        plan.units,
        batches,
        directory,
        needs={name: needs for name, needs in build.needs.items() if name not in counted},
        record=recorded,
        record_batches=more if recorded else (),
        progress=progress.advance,
    )
    for _ in steps:
        pass


def _build(
    build: BuildPlan,
    cluster: Callable[[], Cluster],
    progress: SearchProgress,
    ledger: Ledger | None,
) -> None:
    """Build what is missing; what that took is told, and written to `ledger`."""
    from autocomp.library.build import build_unit
    from autocomp.workers.tasks import run_tasks

    def advance(done: int, total: int) -> None:
        progress.advance(build.weight_of(done))

    done = run_tasks(build_unit, build.tasks, cluster().workers, advance)
    items = [item for found in done for item in found]
    if ledger is not None:
        record_built(items, ledger)
    if (note := built_note(items)) is not None:
        progress.note(note)


def _recorded_batches(plan: Plan, task: Task) -> list[dict[str, Tensor]]:
    """Examples of the distil split that replacements are trained on, behind the calibration's.

    As many as can be recorded; none where no option is trained.
    """
    from autocomp.calibrate.record import TOKENS
    from autocomp.operators import training_step

    options = (option for offered in plan.options.values() for option in offered)
    if all(training_step(option) is None for option in options):
        return []
    found: list[dict[str, Tensor]] = []
    tokens = 0
    for batch in task.batches("distil", CALIBRATION_BATCH, trim=True):
        found.append(batch)
        tokens += task.tokens(batch)
        if tokens >= TOKENS:
            break
    return found


def _count_tokens(plan: Plan, task: Task, directory: Path) -> dict[str, Path]:
    """Statistics of the word embedding, where an option looks at them; unit name → file.

    Where the vocabulary is pruned, the tokens it keeps count at least once, and the others not. The
    file's name holds the digest of the counts: unlike other statistics they are of the distil split
    too.
    """
    import numpy as np
    import torch

    from autocomp.calibrate.stats import SiteStats, save_stats
    from autocomp.operators import step_needs
    from autocomp.tasks.vocabulary import token_counts

    files: dict[str, Path] = {}
    for unit in plan.units:
        site = unit.site("embedding")
        steps = {step for option in plan.options[unit.name] for step in option.steps}
        if site is None or "rows" not in step_needs(steps):
            continue
        counts = token_counts(task, site.rows)
        if plan.vocabulary is not None:
            kept = np.zeros(site.rows, np.bool_)
            kept[list(plan.vocabulary.kept)] = True
            counts = np.where(kept, np.maximum(counts, 1), 0)
        files[unit.name] = (
            directory / f"{unit.name}-{content_key(counts.tolist())[:16]}.safetensors"
        )
        nothing = torch.empty(0)
        rows = SiteStats(
            nothing.reshape(0, 0), nothing, int(counts.sum()), torch.from_numpy(counts)
        )
        save_stats(files[unit.name], {site.name: rows})
    return files
