"""The end of a search: the report split, opened after selection, and the front's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from autocomp.api.session import Session
from autocomp.study.directory import Study
from autocomp.study.per_example import save_scores
from autocomp.study.records import TrialRecord
from autocomp.trial.context import TrialContext

if TYPE_CHECKING:
    from autocomp.tasks.protocol import Quality


def open_report_split(
    session: Session, context: TrialContext, records: Sequence[TrialRecord]
) -> None:
    """Evaluate dense, first, and the chosen trial on the report split, after selection.

    Dense is the teacher, exported. Each is evaluated on its own runtime. Every candidate looked at
    is an entry of the ledger and stays one: a search that goes on and then chooses another adds to
    them, and reports say how many there are.
    """
    from autocomp.models.vocabulary import load_vocabulary
    from autocomp.targets import open_artifact
    from autocomp.tasks import make_task
    from autocomp.tasks.vocabulary import retokenised

    study = session.study
    known = study.ledger.read().of("report")
    if all(record.id in known for record in records):
        return
    task = make_task(session.plan.spec, session.plan.model_path)
    teacher: Quality | None = None
    for done, record in enumerate(records, start=1):
        assert record.artifact is not None
        target = context.target(record.candidate.runtime)
        artifact = open_artifact(study.paths.root / record.artifact)
        vocabulary = load_vocabulary(artifact.path.parent)
        asked = task
        if vocabulary is not None:
            asked = retokenised(session.plan.spec, session.plan.model_path, vocabulary)
        quality = asked.evaluate(partial(target.run, artifact), "report").quality
        teacher = quality if teacher is None else teacher
        labels = asked.splits["report"].labels
        save_scores(study.paths.per_example(record.id, "report"), quality.per_example, labels)
        study.ledger.append(
            "report",
            record.id,
            {
                "quality": quality.value,
                "metric": quality.metric_json(),
                "teacher_quality": teacher.value,
                "teacher_metric": teacher.metric_json(),
            },
        )
        session.progress.advance(done, len(records))


def write_front(study: Study) -> None:
    """`front.html` and `front.json` beside the ledger."""
    from autocomp.core.files import write_text_atomic
    from autocomp.front.view import study_front
    from autocomp.report.html import front_html

    view = study_front(study)
    write_text_atomic(study.paths.front_html, front_html(view))
    write_text_atomic(study.paths.root / "front.json", json.dumps(view, indent=2) + "\n")
