"""What a search stands on: teacher, library, skeleton, dense trial, cost table. Each made once.

Teachers, statistics, library items and skeletons are kept by content under one cache directory,
shared by every study on this machine (or of a cluster, when it is on shared storage); the dense
trial and the cost table belong to the study.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.api.plan import Plan
from autocomp.core.candidate import Candidate, Option, Runtime
from autocomp.core.errors import InternalError
from autocomp.core.gate import Gate
from autocomp.report.progress import SearchProgress
from autocomp.study.directory import Study
from autocomp.study.records import DENSE, TrialRecord
from autocomp.tasks.protocol import Task
from autocomp.trial.context import TrialContext

if TYPE_CHECKING:
    from torch import nn

    from autocomp.targets.cost_table import CostTable

logger = logging.getLogger(__name__)


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


def load_teacher(plan: Plan, teacher: Teacher) -> nn.Module:
    """The teacher in torch."""
    from autocomp.models.load import load_model

    trusted = plan.spec.model.trust_remote_code
    return load_model(teacher.path, teacher.task.name, teacher.task.num_labels, trusted)


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

    model = load_teacher(plan, teacher)
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
