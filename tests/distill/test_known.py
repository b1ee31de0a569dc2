"""The teacher's side kept on disk is what the teacher says when it runs beside the student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from model_examples import EXAMPLES
from replaced_examples import calm
from torch import nn
from word_examples import CountingGate

from autocomp.core.candidate import Distillation
from autocomp.distill import known as known_module
from autocomp.distill.known import Known, known_side
from autocomp.distill.objective import Objective
from autocomp.distill.outputs import observe
from autocomp.tasks.protocol import Encoded, Task

COUNT, LENGTH, CLASSES = 7, 9, 3
SETTINGS = Distillation(tokens=1, loss="logits+hidden", temperature=2.0)


class Rows:
    """Texts of 2 to 9 tokens with labels, and how often the teacher was asked."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 40, (COUNT, LENGTH), generator=draw).numpy()
        mask = (np.arange(LENGTH) < np.arange(2, 2 + COUNT)[:, None]).astype(np.int64)
        mask[-1] = 1
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        self.splits = {"transfer": Encoded(inputs, np.arange(COUNT) % CLASSES)}
        self.num_labels: int | None = CLASSES
        self.asked = 0

    def batches(
        self,
        split: Any,
        batch: int,
        *,
        seed: int | None = None,
        trim: bool = True,
        index: bool = False,
        limit: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        order = np.arange(COUNT) if seed is None else np.random.default_rng(seed).permutation(COUNT)
        for start in range(0, min(COUNT, limit or COUNT), batch):
            at = order[start : min(start + batch, limit or COUNT)]
            inputs = {name: array[at] for name, array in self.splits[split].inputs.items()}
            if trim:
                longest = inputs["attention_mask"].sum(1).max()
                inputs = {name: array[:, :longest] for name, array in inputs.items()}
            inputs["labels"] = self.splits[split].labels[at]
            if index:
                inputs["index"] = at
            yield {name: torch.from_numpy(array) for name, array in inputs.items()}

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        self.asked += 1
        names = ("input_ids", "attention_mask")
        out: torch.Tensor = model(**{name: inputs[name] for name in names}).logits
        return out


def side(
    task: Rows,
    teacher: nn.Module,
    path: Path,
    settings: Distillation = SETTINGS,
    *,
    same_tokens: bool = True,
) -> Any:
    told: list[int] = []
    found = known_side(
        teacher,
        cast(Task, task),
        settings,
        path,
        CountingGate(),
        lambda done, _: told.append(done),
        same_tokens=same_tokens,
    )
    assert not told or told[-1] == COUNT
    return found


@pytest.fixture
def teacher() -> nn.Module:
    return calm(EXAMPLES["bert"].model())


def test_a_batch_is_what_the_teacher_says_of_it(teacher: nn.Module, tmp_path: Path) -> None:
    task = Rows()
    known = side(task, teacher, tmp_path)
    for inputs in task.batches("transfer", 3, seed=5, index=True):
        found = known.outputs(inputs, ("logits", "hidden"))
        with torch.no_grad():
            expected = observe(teacher, cast(Task, task), inputs, ("hidden",))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert list(found.hidden) == list(expected.hidden) == [0, 1, 2]
        real = inputs["attention_mask"].bool()
        for layer, states in expected.hidden.items():
            torch.testing.assert_close(
                found.hidden[layer][real], states[real], rtol=1e-5, atol=1e-5
            )
            assert found.hidden[layer].shape == states.shape


def test_the_loss_is_the_same_and_the_teacher_is_not_asked(
    teacher: nn.Module, tmp_path: Path
) -> None:
    task = Rows()
    known = side(task, teacher, tmp_path)
    student = calm(EXAMPLES["bert"].model())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    inputs = next(task.batches("transfer", 4, seed=1, index=True))
    values = {}
    for name, its in {"beside": None, "kept": known, "logits": Known(known.logits)}.items():
        task.asked = 0
        with torch.no_grad():
            loss, _ = Objective(teacher, cast(Task, task), SETTINGS, its)(student, inputs)
        values[name] = (float(loss), task.asked)
    assert values["kept"][0] == pytest.approx(values["beside"][0], rel=1e-5)
    assert values["logits"][0] == pytest.approx(values["beside"][0], rel=1e-5)
    assert [asked for _, asked in values.values()] == [2, 1, 2]


def test_it_is_computed_once_and_again_where_the_file_is_damaged(
    teacher: nn.Module, tmp_path: Path
) -> None:
    task = Rows()
    first = side(task, teacher, tmp_path).hidden.copy()
    task.asked = 0
    np.testing.assert_array_equal(side(task, teacher, tmp_path).hidden, first)
    assert task.asked == 1  # one example, for the shape
    (tmp_path / "teacher-transfer-hidden.npy").write_bytes(b"torn")
    np.testing.assert_array_equal(side(task, teacher, tmp_path).hidden, first)
    assert task.asked == 3


def test_what_is_large_or_of_no_use_is_not_kept(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Rows()
    plain = side(task, teacher, tmp_path, Distillation(tokens=1, loss="logits+relations"))
    assert plain.hidden is None
    assert not plain.covers(("logits", "attention"))
    assert side(task, teacher, tmp_path, same_tokens=False).hidden is None
    wanted = COUNT * (3 * LENGTH * 24 + CLASSES) * 4
    monkeypatch.setattr(known_module, "KEPT_BYTES", wanted - 1)
    large = side(task, teacher, tmp_path)
    assert large.hidden is None
    assert not large.covers(("hidden",))
    assert large.covers(("logits",))
    assert not (tmp_path / "teacher-transfer-hidden.npy").exists()
    monkeypatch.setattr(known_module, "KEPT_BYTES", wanted)
    assert side(task, teacher, tmp_path).hidden.shape == (COUNT, 3, LENGTH, 24)
    assert side(task, teacher, tmp_path, Distillation(tokens=0)) is None
    task.num_labels = None
    assert side(task, teacher, tmp_path) is None
