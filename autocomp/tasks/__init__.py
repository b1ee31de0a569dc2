"""Tasks: what a model is for. Data, four disjoint splits, the metric, the teacher.

Importing this package imports no torch; a task imports it when it makes tensors.
"""

from __future__ import annotations

from pathlib import Path

from autocomp.core.registry import Registry
from autocomp.spec.schema import Spec
from autocomp.tasks.protocol import DRAWN, Encoded, Evaluation, Quality, Run, Split, Task

__all__ = [
    "DRAWN",
    "TASKS",
    "Encoded",
    "Evaluation",
    "Quality",
    "Run",
    "Split",
    "Task",
    "make_task",
]

TASKS: Registry[type[Task]] = Registry(
    "tasks",
    {
        "text-classification": "autocomp.tasks.text_classification:TextClassification",
        "image-classification": "autocomp.tasks.image_classification:ImageClassification",
        "language-modeling": "autocomp.tasks.language_modeling:LanguageModeling",
    },
)


def make_task(spec: Spec, model_path: Path) -> Task:
    """The spec's task, its data read, split and encoded for the model at `model_path`.

    Deterministic: the same spec, files and model give the same splits in every process.

    Raises:
        UserError: for an unknown task name.
        DataError: if the data is missing, malformed or too small.
    """
    kind = TASKS.get(spec.task.name)
    return kind.build(spec.task, spec.target.workload, model_path, spec.search.seed)
