"""From a spec that prunes the vocabulary to an exported model with a tokenizer of its own."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from autocomp.api import prepare
from autocomp.api.check import report
from autocomp.api.library import prepare_library
from autocomp.api.plan import Plan, make_plan
from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InternalError, SpecError
from autocomp.export.artifact import ONNX
from autocomp.export.companions import Companions
from autocomp.export.huggingface import EXPORTER as HUGGINGFACE
from autocomp.export.protocol import ExportRequest
from autocomp.library.stitch import stitch
from autocomp.models.vocabulary import load_vocabulary
from autocomp.report.progress import Silent
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord
from autocomp.targets import open_artifact
from autocomp.tasks.splits import uncounted
from autocomp.trial.runner import CandidateRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
from tiny_study import SPEC, sentences, write_model, write_rows


def write_spec(root: Path, task: str = "text-classification") -> Path:
    """The tiny spec, its embeddings offering tokens and rank as well as bits."""
    spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    spec["model"]["source"] = str(write_model(root / "model"))
    spec["task"]["name"] = task
    spec["task"]["teacher"] = {"fit": "full", "epochs": 1, "lr": 1e-3, "batch": 16}
    spec["task"]["data"]["source"] = str(write_rows(root / "data.jsonl", sentences()))
    spec["space"] = [
        {
            "match": "embeddings",
            "structure": {"vocabulary": True, "rank": [1.0, 0.5]},
            "bits": {"method": "rtn", "weights": ["dense", 8]},
        }
    ]
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def embeddings_option(plan: Plan, *operators: str) -> Option:
    return next(
        option
        for option in plan.options["embeddings"]
        if tuple(step.operator for step in option.steps) == operators
    )


class Built:
    """A plan with its library, and a worker's runner."""

    def __init__(self, root: Path) -> None:
        self.plan = make_plan(write_spec(root))
        self.teacher = prepare.prepare_teacher(self.plan, Silent())
        cluster: Any = lambda: type("Cluster", (), {"workers": 1})()  # noqa: E731
        items = prepare_library(self.plan, self.teacher, cluster, Silent())
        self.study = Study.create_or_open(root / "study", self.plan.spec)
        context = prepare.prepare_context(self.plan, self.study, self.teacher)
        self.runner = CandidateRunner()
        self.runner.setup({"trial": replace(context, items=items)})

    def candidate(self, *operators: str) -> Candidate:
        options = {unit.name: Option() for unit in self.plan.units}
        options["embeddings"] = embeddings_option(self.plan, *operators)
        return Candidate.of(options)

    def trial(self, *operators: str) -> TrialRecord:
        payload = {
            "id": "-".join(operators),
            "kind": "search",
            "proposed_by": "milp",
            "candidate": self.candidate(*operators).to_json(),
        }
        record = TrialRecord.from_json(self.runner.run(payload))
        assert record.state == "complete", record.error
        return record


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("vocabulary")
        patch.setenv("AUTOCOMP_CACHE", str(root / "cache"))

        def here(function: Any, tasks: Any, workers: int, advance: Any) -> list[Any]:
            return [function(task) for task in tasks]

        patch.setattr("autocomp.workers.tasks.run_tasks", here)
        return Built(root)


def test_the_plan_counts_the_tokens_of_calibrate_and_most_of_distil(built: Built) -> None:
    plan, task = built.plan, built.teacher.task
    counted = [
        *task.splits["calibrate"].inputs["input_ids"],
        *task.splits["distil"].inputs["input_ids"][uncounted(len(task.splits["distil"])) :],
    ]
    examples = Counter(int(index) for row in counted for index in set(row.tolist()))
    assert plan.vocabulary is not None
    assert set(plan.vocabulary.kept) == {i for i, n in examples.items() if n > 1} | {0, 1, 2, 3}
    assert 1 in examples.values()
    step = embeddings_option(plan, "vocabulary").steps[0]
    assert step == Step.of("vocabulary", keep=len(plan.vocabulary.kept), unknown=1)
    assert any(f"{step['keep']} of 200 tokens" in note for note in report(plan).notes)


def test_stitched_it_answers_original_ids_as_before(built: Built) -> None:
    """Where every token is kept nothing changes, and training is possible."""
    runner = built.runner
    args = (runner.teacher, runner.context.units, runner.library, runner.context.items)
    student = stitch(*args, built.candidate("vocabulary"))
    inputs = next(iter(runner.task.batches("distil", 64)))
    assert built.plan.vocabulary is not None
    kept = np.isin(inputs["input_ids"], built.plan.vocabulary.kept).all(axis=1)
    assert 4 < kept.sum() < len(kept)
    inputs = {name: tensor[torch.from_numpy(kept)] for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = runner.task.logits(runner.teacher, inputs)
    found = runner.task.logits(student, inputs)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(runner.task.loss(found, inputs["labels"]))
    table = student.get_submodule(built.plan.units[0].sites[0].name).table
    assert bool(table.weight.grad.any())


def test_the_artifact_is_evaluated_with_the_tokenizer_it_ships_with(
    built: Built, tmp_path: Path
) -> None:
    """By hand: the exported directory alone, texts of the search split, ONNX Runtime."""
    record, runner = built.trial("vocabulary", "rtn"), built.runner
    artifact = open_artifact(runner.paths.root / record.artifact)
    vocabulary = load_vocabulary(artifact.path.parent)
    assert vocabulary == built.plan.vocabulary
    assert artifact.size_bytes == artifact.path.stat().st_size
    request = ExportRequest(
        built.plan.spec,
        record,
        artifact,
        Companions(built.study.paths.companions),
        None,
        None,
    )
    shipped = tmp_path / "shipped"
    exporter = ONNX
    exporter.write(request, shipped)
    assert exporter.verify(request, shipped, runner.context.target(None)).max_difference == 0.0
    assert "use the tokenizer in this directory" in (shipped / "README.md").read_text()

    tokenizer = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    session = onnxruntime.InferenceSession(shipped / "model.onnx")
    labels = (shipped / "labels.txt").read_text().split()
    rows = {row["text"]: row["label"] for row in sentences()}
    task = runner._task_of(vocabulary)
    ids = task.splits["search"].inputs["input_ids"]
    assert not np.array_equal(ids, runner.task.splits["search"].inputs["input_ids"])
    for split in ("search", "report"):  # so that it pairs with trials of the whole vocabulary
        known = runner.task.splits[split].labels
        np.testing.assert_array_equal(task.splits[split].labels, known)
    right = 0
    originals = {
        tuple(row[row > 0]): text
        for text in rows
        for row in [np.array(_original(built, text)[:16])]
    }
    for row in runner.task.splits["search"].inputs["input_ids"]:
        text = originals[tuple(row[row > 0])]
        encoded = np.array([tokenizer.encode(text).ids[:16]])
        assert encoded.max() < len(vocabulary.kept)
        feeds = {"input_ids": encoded, "attention_mask": np.ones_like(encoded)}
        right += labels[session.run(None, feeds)[0][0].argmax()] == rows[text]
    assert record.quality == pytest.approx(right / len(task.splits["search"]))

    floats = tmp_path / "floats"
    stored = replace(request, student=built.study.paths.student(record.id))
    HUGGINGFACE.write(stored, floats)
    verified = HUGGINGFACE.verify(stored, floats, runner.context.target(None))
    assert verified.max_difference < 1e-4
    assert (floats / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()

    (shipped / "tokenizer.json").write_text(
        (built.plan.model_path / "tokenizer.json").read_text(), encoding="utf-8"
    )
    with pytest.raises(InternalError, match="tokenizer"):
        exporter.verify(request, shipped, runner.context.target(None))


def _original(built: Built, text: str) -> list[int]:
    path = built.plan.model_path / "tokenizer.json"
    ids: list[int] = Tokenizer.from_file(str(path)).encode(text).ids
    return ids


def test_low_rank_embeddings_go_all_the_way(built: Built) -> None:
    record = built.trial("rank", "rtn")
    artifact = open_artifact(built.runner.paths.root / record.artifact)
    assert load_vocabulary(artifact.path.parent) is None


def test_tied_tables_and_other_tasks_are_refused(tmp_path: Path) -> None:
    """At the spec's line, with the reason."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_spec(tmp_path, "language-modeling")
    spec = yaml.safe_load(path.read_text())
    for tied, asked, reason in (
        (True, {"vocabulary": True}, "its weight is also that of head"),
        (True, {"rank": [0.5]}, "its weight is also that of head"),
        (False, {"vocabulary": True}, "only text-classification models can lose tokens"),
    ):
        config = LlamaConfig(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        spec["task"]["teacher"] = {"fit": "none"}
        spec["task"]["data"] |= {"calibrate": 4, "distil": 4, "search": 4, "report": 4}
        spec["space"] = [{"match": "embeddings", "structure": asked}]
        path.write_text(yaml.safe_dump(spec))
        with pytest.raises(SpecError, match=reason):
            make_plan(path)
