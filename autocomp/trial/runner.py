"""A full trial: stitch → distil → export → evaluate the artifact → measure. Resident in a worker.

Distillation stops at rungs, where the model as it is then is looked at and reported; who drives the
trial takes it on, or leaves it there. A checkpoint is written before, from which a trial whose
process died goes on.

The record is appended to the ledger, durable, before `run` returns: whatever happens to the
controller afterwards, a finished trial is never run again.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from autocomp.core.candidate import Candidate, Runtime
from autocomp.core.errors import AutocompError, MachineError, StorageError
from autocomp.core.files import storage_error
from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.measurement import Measurement
from autocomp.distill.known import known_side
from autocomp.distill.trainer import DivergedError, Trainer
from autocomp.library.realise import realise, realised
from autocomp.library.stitch import stitch
from autocomp.library.store import Library
from autocomp.library.student import save_student, teacher_digest
from autocomp.models.load import load_model
from autocomp.models.pruned_table import model_vocabulary
from autocomp.models.vocabulary import Vocabulary
from autocomp.study.activity import ActivityWriter
from autocomp.study.directory import append_trial
from autocomp.study.ledger import Ledger
from autocomp.study.paths import StudyPaths
from autocomp.study.per_example import save_scores
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Target
from autocomp.tasks import make_task
from autocomp.tasks.protocol import Array, Evaluation, Run, Split, Task
from autocomp.tasks.teacher import Progress, teacher_logits
from autocomp.tasks.vocabulary import retokenised
from autocomp.trial.agreement import check_agreement
from autocomp.trial.context import TrialContext
from autocomp.trial.rungs import Climb, further

logger = logging.getLogger(__name__)

CALIBRATED = 8
"""Examples at a time that units are made on: each batch holds the gate."""

LOOKED_AT = 8
"""Examples at a time at a rung: each batch holds the gate."""

_NO_MEMORY = "can't allocate memory"
"""What torch's allocator says, in a RuntimeError."""

STORED_LOGITS_BYTES = 1_000_000_000
"""Teacher logits beyond this are computed beside each artifact instead of kept on disk."""


def teacher_side(
    model: nn.Module,
    task: Task,
    split: Split,
    cache: Path,
    *,
    gate: Gate = NO_GATE,
    progress: Progress | None = None,
) -> Array | Run:
    """What `Task.evaluate` compares with: the teacher's logits, stored in `cache` where they fit.

    A vocabulary at every position of a long split is more than a disk should hold; then the
    teacher runs on each batch again. Each batch holds `gate` shared.
    """
    encoded = task.splits[split]
    run = torch_run(model, task, gate)
    one = run({name: array[:1] for name, array in encoded.inputs.items()})
    if one.nbytes * len(encoded) > STORED_LOGITS_BYTES:
        return run
    return teacher_logits(model, task, split, cache, gate=gate, progress=progress)


def torch_run(model: nn.Module, task: Task, gate: Gate) -> Run:
    """A model in torch, to be evaluated as artifacts are; a batch holds `gate` shared."""

    @torch.inference_mode()
    def run(inputs: dict[str, Array]) -> Array:
        feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with gate.working():
            logits: Array = task.logits(model, feeds).float().numpy()
        return logits

    return run


class CandidateRunner:
    """Holds teacher, library, task and targets; `run` takes one candidate to a measured artifact.

    Call sequence: `setup({"trial": TrialContext})` once, then `run(payload)` per trial.
    """

    def setup(self, context: Mapping[str, Any]) -> None:
        """Load what stays resident. Others may measure meanwhile: each piece passes the gate."""
        torch.set_num_threads(1)
        trial: TrialContext = context["trial"]
        self.context, self.gate = trial, trial.gate
        self.paths = StudyPaths(trial.study_path)
        self.ledger = Ledger(self.paths.ledger)
        with self.gate.working():
            self.task = make_task(trial.spec, trial.model_path)
        trusted = trial.spec.model.trust_remote_code
        with self.gate.working():
            self.teacher = load_model(
                trial.teacher_path, self.task.name, self.task.num_labels, trusted
            )
        self._retokenised: tuple[Vocabulary, Task] | None = None
        self._about = {
            "teacher": str(trial.teacher_path.resolve()),
            "digest": teacher_digest(trial.teacher_path),
            "task": self.task.name,
            "num_labels": self.task.num_labels,
            "trust_remote_code": trusted,
        }
        self.library = Library(trial.library_path)
        self._targets: dict[Runtime, Target] = {}
        with self.gate.working():
            self.skeleton = onnx.load(trial.skeleton_path)
        self._expected: Array | Run | None = None

    def expected(self, progress: Progress | None = None) -> Array | Run:
        """The teacher's side of evaluations, made at first use."""
        if self._expected is None:
            self._expected = teacher_side(
                self.teacher,
                self.task,
                "search",
                self.paths.work / "teacher-search.npy",
                gate=self.gate,
                progress=progress,
            )
        return self._expected

    def target(self, runtime: Runtime = None) -> Target:
        """The target of a runtime, made at first use."""
        if runtime not in self._targets:
            self._targets[runtime] = self.context.target(runtime)
        return self._targets[runtime]

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Run one trial to its end: what `start` returns."""
        running = self.start(payload)
        while True:
            try:
                next(running)
            except StopIteration as end:
                record: dict[str, Any] = end.value
                return record

    def start(self, payload: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Run one trial, from rung to rung.

        Args:
            payload: `id`, `kind`, `proposed_by`, `candidate` (JSON) and `estimated` (JSON or None).

        Yields:
            A `RungRecord` as JSON at each rung of the spec, if the search proposed the trial. Those
            before the checkpoint of an earlier start are not given again.

        Returns:
            The record as JSON, the earlier one if the trial is complete already. A candidate that
            cannot be carried out (training diverged, the artifact disagrees with the model) gives a
            record in state `failed` with its cause.

        Raises:
            StorageError: if the disk is full or refuses; no record is kept.
        """
        known = self.ledger.read().of("trial").get(payload["id"])
        if known is not None and known["state"] == "complete":
            return known
        candidate = Candidate.from_json(payload["candidate"])
        estimated = payload.get("estimated")
        record = TrialRecord(
            id=payload["id"],
            kind=payload["kind"],
            proposed_by=payload["proposed_by"],
            state="failed",
            candidate=candidate,
            estimated=Measurement.from_json(estimated) if estimated else None,
        )
        seconds: dict[str, float] = {}
        activity = ActivityWriter(self.paths.running, record.id)
        try:
            with machine_failures(self.paths.root):
                record = yield from self._carry_out(record, seconds, activity)
        except StorageError:
            raise
        except AutocompError as error:
            logger.exception("trial %s failed", record.id)
            record = replace(record, error=str(error), by_machine=isinstance(error, MachineError))
        finally:
            activity.close()
        self.paths.checkpoint(record.id).unlink(missing_ok=True)
        record = replace(
            record, seconds=seconds, finished_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        append_trial(self.ledger, record)
        return record.to_json()

    def _carry_out(
        self, record: TrialRecord, seconds: dict[str, float], activity: ActivityWriter
    ) -> Generator[dict[str, Any], None, TrialRecord]:
        context, candidate, gate = self.context, record.candidate, self.gate
        activity.enter("teacher")
        expected = self.expected(activity.advance)
        known = known_side(
            self.teacher,
            self.task,
            candidate.distillation,
            self.paths.work,
            gate,
            activity.advance,
            same_tokens=all(option.step("vocabulary") is None for _, option in candidate),
        )
        with gate.working():
            target = self.target(candidate.runtime)
        workload = context.spec.target.workload

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            activity.enter(name)
            start = time.perf_counter() - seconds.get(name, 0.0)
            try:
                yield
            finally:
                seconds[name] = round(time.perf_counter() - start, 3)

        with phase("stitch"):
            student = self._student(candidate)
            vocabulary = model_vocabulary(student)
            with gate.working():
                task = self._task_of(vocabulary)
        if candidate.distillation.tokens:
            trainer = Trainer(
                student,
                self.teacher,
                task,
                candidate.distillation,
                batch=context.spec.distill.batch,
                seed=context.spec.search.seed,
                gate=gate,
                known=known,
            )
            look = partial(self._look, student, task, expected)
            with phase("rung"):
                stitched = look()
            climb = Climb(
                record, trainer, look, stitched, self.ledger, self.paths.checkpoint(record.id)
            )
            record = yield from climb.run(context.spec.search.rungs, phase, seconds, activity)
            with phase("rung"):
                undone = further(look(), stitched)
            if undone:
                with phase("stitch"):
                    student = self._student(candidate)
                record = replace(record, undone=True)
        directory = self.paths.artifacts / record.id
        inputs = {
            name: tensor.numpy()
            for name, tensor in self.task.example_inputs(workload.batch, workload.sequence).items()
        }
        with phase("export"):
            shutil.rmtree(directory, ignore_errors=True)
            with gate.working():
                lowered = target.lower(self.skeleton, student, context.units)
            with gate.working():
                artifact = target.write(lowered, directory)
                if vocabulary is not None:
                    vocabulary.save(directory)
            check_agreement(target, artifact, student, self.task, workload.batch, gate)
            with gate.working():
                save_student(
                    self.paths.student(record.id), student, self.teacher, context.units, self._about
                )
        with phase("evaluate"):
            run = in_turns(
                partial(target.run, artifact), gate, len(task.splits["search"]), activity.advance
            )
            evaluation = task.evaluate(run, "search", teacher=expected)
        with phase("measure"):
            measured = replace(
                target.measure(artifact, inputs),
                peak_memory_bytes=target.peak_memory(artifact, inputs),
            )
        quality = evaluation.quality
        if not math.isfinite(quality.value):
            raise DivergedError(f"the exported model's {quality.metric} is not a finite number")
        labels = task.splits["search"].labels
        save_scores(self.paths.per_example(record.id, "search"), quality.per_example, labels)
        return replace(
            record,
            state="complete",
            quality=quality.value,
            teacher_kl=evaluation.teacher_kl,
            metric=quality.metric_json(),
            measured=measured,
            artifact=str(directory.relative_to(self.paths.root)),
        )

    def _student(self, candidate: Candidate) -> nn.Module:
        """The candidate as a model, its units made in sequence if the spec says so."""
        context, gate = self.context, self.gate
        if not context.spec.search.realise or not realised(candidate, context.units):
            with gate.working():
                return stitch(self.teacher, context.units, self.library, context.items, candidate)
        return realise(
            self.teacher,
            context.teacher_path,
            context.units,
            self.library,
            context.items,
            candidate,
            list(self.task.batches("calibrate", CALIBRATED, trim=True)),
            self.paths.work,
            gate,
        )

    def _look(self, student: nn.Module, task: Task, expected: Array | Run) -> Evaluation:
        """The student as it is, on the search split."""
        student.eval()
        run = torch_run(student, task, self.gate)
        return task.evaluate(run, "search", batch=LOOKED_AT, teacher=expected)

    def _task_of(self, vocabulary: Vocabulary | None) -> Task:
        """The task as the tokenizer shipped with such a vocabulary reads it."""
        if vocabulary is None:
            return self.task
        if self._retokenised is None or self._retokenised[0] != vocabulary:
            task = retokenised(self.context.spec, self.context.model_path, vocabulary)
            self._retokenised = (vocabulary, task)
        return self._retokenised[1]


def in_turns(run: Run, gate: Gate, examples: int, progress: Progress) -> Run:
    """`run`, each batch with the gate held shared; tells how many of the examples are done."""
    done = 0

    def batch(inputs: dict[str, Array]) -> Array:
        nonlocal done
        with gate.working():
            logits = run(inputs)
        done = min(examples, done + len(logits))
        progress(done, examples)
        return logits

    return batch


@contextmanager
def machine_failures(study: Path) -> Iterator[None]:
    """What the machine refuses within comes out as `StorageError`, or `MachineError` for memory."""
    try:
        yield
    except MemoryError as error:
        raise MachineError(f"memory ran out: {error}") from error
    except RuntimeError as error:
        if _NO_MEMORY not in str(error):
            raise
        raise MachineError(f"memory ran out: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MachineError(f"memory ran out: {error}") from error
        if not error.errno:  # what libraries raise of networks and files that they understand
            raise MachineError(str(error)) from error
        raise storage_error(Path(error.filename or study), error.errno, error) from error
