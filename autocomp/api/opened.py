"""An existing study: its front, its picks, their export. Runs no trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.core.budget import Budget, RelativeBudget
from autocomp.core.candidate import Runtime
from autocomp.core.errors import StudyError, UserError
from autocomp.core.gate import Gate
from autocomp.core.metric import parse_floor
from autocomp.core.quantities import Dimension, parse_limit
from autocomp.front.choice import Choice, choose
from autocomp.front.comparison import compare
from autocomp.front.pick import absolute, front
from autocomp.front.view import (
    noise_on_report,
    noise_on_search,
    report_json,
    study_budget,
    study_front,
    study_target,
    trial_json,
)
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord


def open_study(path: Path | str) -> OpenStudy:
    """The study at `path`.

    Raises:
        StudyError: if there is none.
    """
    return OpenStudy(Study.open(path))


@dataclass(frozen=True)
class OpenStudy:
    """A study, for reading."""

    study: Study

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.study.paths.root

    def front(self, against: Path | str | None = None) -> dict[str, Any]:
        """Every trial and which are on the front, in the shape of `autocomp front --json`.

        With the directory of another study, also how the two fronts compare, as `against`.

        Raises:
            StudyError: if there is no such study.
            UserError: if it is of another model, task or objectives.
        """
        view = study_front(self.study)
        if against is not None:
            view["against"] = compare(self.study, Study.open(against))
        return view

    def trials(self) -> list[TrialRecord]:
        """Every finished trial."""
        return self.study.trials()

    def report(self, trial: str) -> dict[str, Any] | None:
        """What the report split said of a trial, as `report` of `autocomp front --json`.

        `None` if it was not opened for it.
        """
        reports = self.study.ledger.read().of("report")
        return report_json(trial, reports, noise_on_report(self.study, reports))

    def pick(
        self,
        latency: str | None = None,
        size: str | None = None,
        peak_memory: str | None = None,
        quality: float | str | None = None,
        *,
        best: bool = False,
        least: Dimension | None = None,
    ) -> Picked:
        """The measured trial to take within a budget; without limits, within the study's own.

        Of the best and those whose quality the examples do not tell apart from it, that is the one
        closest to the teacher, or a simpler one as close which costs no more (`front.choice`); with
        `best` the one of highest quality, with `least` the one that costs least of that ("latency",
        "size", "peak_memory"), as it is with a floor on quality and no other limit: in latency.

        Limits are absolute ("4 ms", "12 MB") or relative to the dense trial ("25%"). `quality` is a
        floor: in (0, 1] an accuracy, or of a language model 1 / perplexity; relative to the dense
        trial ("98%"); or "perplexity 50".

        Raises:
            UserError: for a limit that cannot be read, or `best` and `least` together.
            NothingFitsError: if no measured trial fits, with the nearest one.
        """
        if best and least is not None:
            raise UserError(
                "best takes the highest quality and least the lowest cost: give one of them"
            )
        free = all(limit is None for limit in (latency, size, peak_memory))
        if free and quality is not None and not best:
            least = least or "latency"
        if free and quality is None:
            budget = study_budget(self.study)
        else:
            dense = self.study.dense()
            if dense is None or dense.measured is None:
                raise StudyError(
                    f"{self.path}: the dense model is not measured yet, so nothing can be picked. "
                    f"Start its search again"
                )
            limits = RelativeBudget(
                latency=None if latency is None else parse_limit(latency, "latency"),
                size=None if size is None else parse_limit(size, "size"),
                peak_memory=None
                if peak_memory is None
                else parse_limit(peak_memory, "peak_memory"),
                quality=None if quality is None else parse_floor(quality),
            )
            budget = absolute(limits, dense)
        records = self.trials()
        noise = noise_on_search(self.study, records)
        return Picked(self, choose(records, budget, noise, plain=best, least=least), budget)


@dataclass(frozen=True)
class Picked:
    """A chosen trial."""

    opened: OpenStudy
    choice: Choice
    budget: Budget

    @property
    def record(self) -> TrialRecord:
        """The trial."""
        return self.choice.record

    def to_json(self) -> dict[str, Any]:
        """The trial in the shape of `autocomp front --json`, with `selection` and `report`, and the
        budget it was picked for, absolute.
        """
        study, record = self.opened.study, self.record
        objectives = list(study.spec.objectives)
        on_front = any(each.id == record.id for each in front(self.opened.trials(), objectives))
        interval = self.choice.noise.quality(record.id)
        return {
            **trial_json(record, self.budget, on_front, study_target(study), interval),
            "budget": self.budget.to_json(),
            "selection": self.choice.to_json(),
            "report": self.opened.report(record.id),
        }

    def export(self, directory: Path | str, format: str | None = None) -> dict[str, Any]:
        """Write the model, tokenizer or processor and card to `directory`; verify by reload.

        Args:
            format: a name of `EXPORTERS`; by default it is written as it was measured: `onnx`, or
                `openvino` on that runtime.

        Returns:
            `path`, `format`, `files` and what verification showed.

        Raises:
            UserError: if the directory is not empty, the format is unknown or cannot express the
                trial.
            StudyError: if files of the trial that the format needs are gone.
            InternalError: if the reloaded model is not the evaluated one.
        """
        from autocomp.export import EXPORTERS, own_format
        from autocomp.export.companions import Companions
        from autocomp.export.protocol import ExportRequest
        from autocomp.targets import make_target, open_artifact

        study, record = self.opened.study, self.record
        if record.artifact is None:
            raise StudyError(f"{record.id} has no exported model in {self.opened.path}")
        companions = Companions(study.paths.companions)
        request = ExportRequest(
            spec=study.spec,
            record=record,
            artifact=open_artifact(study.paths.root / record.artifact),
            companions=companions,
            dense=study.dense(),
            report=self.opened.report(record.id),
            student=study.paths.student(record.id),
            interval=self.choice.noise.quality(record.id),
        )
        chosen = format or own_format(request.artifact)
        exporter = EXPORTERS.get(chosen)
        if (reason := exporter.supports(record)) is not None:
            raise UserError(f"cannot export as {chosen}: {reason}")
        path = Path(directory)
        exporter.write(request, path)
        runtime = record.candidate.runtime
        target = make_target(
            study.spec.target.on(runtime), Gate(study.paths.gate), reference(study, runtime)
        )
        verification = exporter.verify(request, path, target)
        return {
            "path": str(path),
            "format": chosen,
            "files": sorted(file.name for file in path.iterdir()),
            **verification.to_json(),
        }


def reference(study: Study, runtime: Runtime = None) -> dict[str, Any] | None:
    """What was recorded of the device when the study first measured a runtime on it."""
    devices = [device for device in study.devices if study.runtime_of(device) == runtime]
    return study.reference(devices[0]) if devices else None
