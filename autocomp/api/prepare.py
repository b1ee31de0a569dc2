"""What a search stands on: teacher, library, skeleton, dense trial, cost table. Each made once.

Teachers, statistics, library items and skeletons are kept by content under one cache directory,
shared by every study on this machine (or of a cluster, when it is on shared storage); the dense
trial and the cost table belong to the study.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.plan import Plan
from autocomp.core.candidate import Candidate, Option, Runtime
from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.core.hashing import content_key
from autocomp.report.progress import SearchProgress
from autocomp.study.directory import Study
from autocomp.study.records import DENSE, TrialRecord
from autocomp.tasks.protocol import Task
from autocomp.trial.context import TrialContext
from autocomp.workers.cluster import Cluster

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autocomp.study.ledger import Ledger
    from autocomp.targets.cost_table import CostTable

logger = logging.getLogger(__name__)

CALIBRATION_BATCH = 32


def cache_directory() -> Path:
    """`$AUTOCOMP_CACHE`, or `autocomp` in the user's cache directory."""
    named = os.environ.get("AUTOCOMP_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autocomp"


@dataclass(frozen=True)
class Teacher:
    """The task with its data, and the directory of the teacher."""

    task: Task
    path: Path


def prepare_teacher(plan: Plan, progress: SearchProgress) -> Teacher:
    """Read and encode the data; fit the teacher unless it is cached."""
    from autocomp.tasks import make_task
    from autocomp.tasks.teacher import make_teacher

    progress.phase("teacher")
    task = make_task(plan.spec, plan.model_path)
    path = make_teacher(
        plan.spec, task, plan.model_path, cache_directory() / "teachers", progress.advance
    )
    return Teacher(task, path)


def untrained_teacher(plan: Plan, directory: Path) -> Teacher:
    """The source model with the task's head, untrained: for costs, which depend on shapes alone."""
    from autocomp.models.conversion import save_model
    from autocomp.models.load import load_model, quiet
    from autocomp.tasks import make_task

    task = make_task(plan.spec, plan.model_path)
    trusted = plan.spec.model.trust_remote_code
    model = load_model(plan.model_path, task.name, task.num_labels, trusted)
    with quiet():
        save_model(model, directory / "teacher")
    return Teacher(task, directory / "teacher")


def _loaded(plan: Plan, teacher: Teacher) -> nn.Module:
    from autocomp.models.load import load_model

    trusted = plan.spec.model.trust_remote_code
    return load_model(teacher.path, teacher.task.name, teacher.task.num_labels, trusted)


def prepare_library(
    plan: Plan,
    teacher: Teacher,
    cluster: Callable[[], Cluster],
    progress: SearchProgress,
    ledger: Ledger | None = None,
) -> dict[tuple[str, str], str]:
    """Calibrate and build what the library lacks; the key of every item.

    Only what the operators of missing items read is gathered: nothing runs where they read nothing.

    `cluster` starts the workers; it is called only if there is something to build. What that took
    is told, and written to `ledger`.
    """
    from autocomp.api.built import built_note, record_built
    from autocomp.calibrate.stats import recording_path
    from autocomp.calibrate.stream import calibrate, fingerprint
    from autocomp.core.hashing import file_digest
    from autocomp.library.build import build_unit, plan_build
    from autocomp.library.store import Library
    from autocomp.models.sources import code_files, weight_files
    from autocomp.workers.tasks import run_tasks

    progress.phase("calibrate")
    library = Library(library_path())
    files = [*weight_files(teacher.path), *code_files(teacher.path)]
    digest = content_key([file_digest(file) for file in files])
    batches = list(teacher.task.batches("calibrate", CALIBRATION_BATCH, trim=True))
    statistics = fingerprint(batches, digest)
    more = _recorded_batches(plan, teacher.task)
    recording = fingerprint(more, digest) if more else ""
    directory = cache_directory() / "statistics" / f"{statistics[:16]}{recording[:16]}"
    paths = {
        u.name: directory / f"{u.name}.safetensors" for u in plan.units if u.kind != "embedding"
    }
    counted = _count_tokens(plan, teacher.task, directory)
    build = plan_build(
        teacher.path,
        plan.units,
        plan.options,
        paths | counted,
        statistics,
        library,
        {unit: content_key([statistics, path.name]) for unit, path in counted.items()},
        recording,
    )
    needs = {name: build.needs[name] for name in paths if name in build.needs}
    if needs:
        model = _loaded(plan, teacher)
        recorded = build.recorded
        for _ in calibrate(
            model,
            plan.units,
            batches,
            directory,
            needs=needs,
            record=recorded,
            record_batches=more if recorded else (),
            progress=progress.advance,
        ):
            pass
        del model
    progress.phase("library", build.weight)
    if build.tasks:

        def advance(done: int, total: int) -> None:
            progress.advance(build.weight_of(done))

        done = run_tasks(build_unit, build.tasks, cluster().workers, advance)
        items = [item for found in done for item in found]
        if ledger is not None:
            record_built(items, ledger)
        if (note := built_note(items)) is not None:
            progress.note(note)
    for path in (paths | counted).values():
        path.unlink(missing_ok=True)
        recording_path(path).unlink(missing_ok=True)
    return build.keys


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


def library_path() -> Path:
    """Root of the library."""
    return cache_directory() / "library"


def prepare_context(plan: Plan, study: Study, teacher: Teacher) -> TrialContext:
    """Export the skeleton unless it is cached; keep what exported models are shipped with.

    The context has no library items yet: enough for the dense trial and the cost table. Its paths
    are absolute: a worker's working directory is not this process's.
    """
    from autocomp.export.companions import Companions
    from autocomp.targets.skeleton_store import cached_skeleton, skeleton_path
    from autocomp.tasks.inspect import sample_texts

    model = _loaded(plan, teacher)
    skeletons = cache_directory() / "skeletons"
    decode = plan.spec.target.workload.decodes
    cached_skeleton(model, plan.units, teacher.task, skeletons, decode=decode)
    companions = Companions(study.paths.companions)
    if not companions.complete:
        workload = plan.spec.target.workload
        inputs = teacher.task.example_inputs(workload.batch, workload.sequence)
        companions.write(
            plan.model_path,
            tuple(teacher.task.label_names),
            {name: tensor.numpy() for name, tensor in inputs.items()},
            teacher.task.processor_json(),
            sample_texts(plan.spec),
        )
    return TrialContext(
        spec=plan.spec,
        model_path=plan.model_path.resolve(),
        teacher_path=teacher.path.resolve(),
        skeleton_path=skeleton_path(
            model, plan.units, teacher.task, skeletons, decode=decode
        ).resolve(),
        study_path=study.paths.root.resolve(),
        library_path=library_path().resolve(),
        items={},
        units=plan.units,
        gate=Gate(study.paths.gate.resolve()),
        references=_references(plan, study),
    )


def _references(plan: Plan, study: Study) -> dict[Runtime, Mapping[str, Any]]:
    """What the study recorded of each runtime on this device."""
    from autocomp.targets import make_target

    recorded = {
        runtime: study.reference(make_target(plan.spec.target.on(runtime)).fingerprint())
        for runtime in plan.runtimes
    }
    return {runtime: reference for runtime, reference in recorded.items() if reference is not None}


def measure_dense(
    plan: Plan, study: Study, context: TrialContext, progress: SearchProgress
) -> tuple[TrialRecord, TrialContext]:
    """The dense trial of each runtime, run here unless the ledger has it.

    Returns:
        The one on the first runtime, which relative limits refer to, and the context with what was
        recorded of each runtime; one that cannot carry out the dense model is left out, with a
        note.

    Raises:
        InternalError: if the dense model cannot be exported, evaluated or measured on the first.
    """
    from dataclasses import asdict, replace

    from autocomp.targets import make_target
    from autocomp.trial.runner import CandidateRunner

    for runtime in plan.runtimes:
        target = make_target(plan.spec.target.on(runtime), context.gate)
        device = target.fingerprint()
        study.record_device(device, runtime)
        if runtime not in context.references:  # before trials: a recorded one is never run again
            study.ledger.append("reference", device, asdict(target.record_reference()))
    context = replace(context, references=_references(plan, study))
    runner: CandidateRunner | None = None
    measured: dict[Runtime, TrialRecord] = {}
    for runtime in plan.runtimes:
        name = f"{DENSE}{plan.suffix(runtime)}"
        record = next((t for t in study.trials() if t.id == name and t.state == "complete"), None)
        if record is None:
            if runner is None:
                runner = CandidateRunner()
                runner.setup({"trial": context})
            options = {unit.name: Option() for unit in plan.units}
            payload: dict[str, Any] = {
                "id": name,
                "kind": "dense",
                "proposed_by": "baseline",
                "candidate": Candidate.of(options, runtime=runtime).to_json(),
            }
            progress.trial_started(name, "baseline")
            record = TrialRecord.from_json(runner.run(payload))
        progress.trial_finished(record)
        if record.state == "complete":
            measured[runtime] = record
        elif not measured:
            raise InternalError(f"the dense model could not be measured: {record.error}")
        else:
            progress.note(f"runtime {runtime} is left out: {record.error}")
    references = {its: context.references[its] for its in measured}
    return measured[plan.runtimes[0]], replace(context, references=references)


def prepare_cost_table(
    plan: Plan,
    study: Study,
    context: TrialContext,
    progress: SearchProgress,
    runtime: Runtime = None,
) -> CostTable:
    """Measure a runtime, unless the study has a table of this device and these options."""
    import onnx

    from autocomp.export.companions import Companions
    from autocomp.targets.cost_table import CostTable

    target = context.target(runtime)
    possible = plan.formats_on(runtime)
    path = study.paths.cost_table(runtime)
    if path.exists():
        try:
            table = CostTable.load(path)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: measured again", path)
        else:
            covered = all(
                set(options) <= set(table.entries.get(unit, {}))
                for unit, options in possible.items()
            )
            if table.device == target.fingerprint() and covered:
                return table
    table = target.profile(
        onnx.load(context.skeleton_path),
        plan.units,
        possible,
        Companions(study.paths.companions).inputs,
        reductions=plan.reductions_on(runtime),
        seed=plan.spec.search.seed,
        progress=progress.advance,
    )
    table.save(path)
    return table
