"""Forks: a study of a changed spec that starts from what another study has built and measured.

What may be taken over follows from what changed. Built options and teachers need no taking over:
they are kept by content, for every study. A cost table needs the same model and target; scores,
measured trials and what was looked at on the report split also the same task and seed (the
splits); scores as many examples besides, trials the same way of making their units. The search's
own trials need the same space and distillation too, since they must be points of the new space;
baselines do not.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from autocomp.core.errors import StudyError
from autocomp.core.files import storage_error
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study, append_trial
from autocomp.study.records import DENSE, TrialRecord


def fork_study(source: Study, path: Path | str, spec: Spec) -> Study:
    """The study of `spec` at `path`, made if need be, with what `source` can lend it.

    Files are linked where the file system allows. `source` is only read, and may be running.
    Repeating an interrupted fork completes it.

    Raises:
        StudyError: as `Study.create_or_open`, or if `path` is the source's own.
        StorageError: if the file system refuses.
    """
    if Path(path).resolve() == source.paths.root.resolve():
        raise StudyError(f"{path} is the study to fork from. Name another directory")
    study = Study.create_or_open(path, spec)
    old, new = source.paths, study.paths
    with study.lease():
        if not _agree(source.spec, spec, "model", "target"):
            return study
        for device in source.devices:
            study.record_device(device, source.runtime_of(device))
        study.ledger.append_many("reference", source.ledger.read().of("reference").items())
        for table in old.root.glob("cost_table*.json"):
            _link(table, new.root / table.name)
        if _agree(source.spec, spec, "task") and source.spec.search.seed == spec.search.seed:
            old_search, new_search = source.spec.search, spec.search
            if old_search.screen_examples == new_search.screen_examples:
                study.ledger.append_many("score", source.ledger.read().of("score").items())
            _take_over_reports(source, study)
            same_space = _agree(source.spec, spec, "space", "distill")
            for record in source.trials():
                fits = record.kind != "search" or same_space
                alike = record.kind == "dense" or old_search.realise == new_search.realise
                if record.state == "complete" and fits and alike:
                    _take_over(record, source, study)
    return study


def _agree(one: Spec, other: Spec, *sections: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in sections)


def _take_over(record: TrialRecord, source: Study, study: Study) -> None:
    if record.artifact is not None:
        _link_tree(source.paths.root / record.artifact, study.paths.root / record.artifact)
        _link(source.paths.student(record.id), study.paths.student(record.id))
    scores = source.paths.per_example(record.id, "search")
    _link(scores, study.paths.per_example(record.id, "search"))
    append_trial(study.ledger, record)


def _take_over_reports(source: Study, study: Study) -> None:
    """The report split is the same one: what was looked at there stays looked at.

    Under a name of its own, as a trial of the fork is another artifact and is looked at itself.
    """
    reports = source.ledger.read().of("report")
    study.ledger.append_many(
        "report",
        [
            (key if "@" in key else f"{key}@{source.id}", payload)
            for key, payload in reports.items()
            if key != DENSE
        ],
    )


def _link_tree(source: Path, destination: Path) -> None:
    """Link every whole file; what others are still writing (`.*.tmp`) is left out."""
    for directory, _, names in os.walk(source):
        for name in names:
            if not (name.startswith(".") and name.endswith(".tmp")):
                file = Path(directory, name)
                _link(file, destination / file.relative_to(source))


def _link(source: Path, destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists() or not source.exists():
            return
        try:
            destination.hardlink_to(source)
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError:
            temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
            shutil.copy2(source, temporary)
            temporary.replace(destination)
    except OSError as error:
        raise storage_error(destination, error.errno, error) from error
