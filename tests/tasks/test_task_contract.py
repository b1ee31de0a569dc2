"""The contract of a task, carried out on the three there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from autocomp.models.load import load_model
from autocomp.tasks import DRAWN, Task, make_task
from autocomp.tasks.splits import JUDGED
from autocomp.testing.task_contract import TaskContract

SIZES = {"calibrate": 9, "distil": 30, "search": 20, "report": 15}


class TestTextClassification(TaskContract):
    @pytest.fixture
    def build(self, bert_path: Path, text_csv: Path, spec_of: Any) -> Callable[[int], Task]:
        return lambda seed: make_task(
            spec_of("text-classification", text_csv, seed=seed, **SIZES), bert_path
        )

    @pytest.fixture
    def model(self, bert_path: Path) -> nn.Module:
        return load_model(bert_path, "text-classification", 3)


class TestWithUnlabelledTexts(TestTextClassification):
    """The transfer set holds more than the distil split."""

    @pytest.fixture
    def build(
        self, bert_path: Path, text_csv: Path, tmp_path: Path, spec_of: Any
    ) -> Callable[[int], Task]:
        more = tmp_path / "more.jsonl"
        more.write_text("".join(f'{{"text": "w{at} w{at + 1} w{at}"}}\n' for at in range(30)))
        transfer = {"source": str(more), "examples": 12}
        return lambda seed: make_task(
            spec_of("text-classification", text_csv, seed=seed, transfer=transfer, **SIZES),
            bert_path,
        )


class TestWithHeldOutTexts(TestTextClassification):
    """Search and report come from a file of their own, and groups of texts are kept together."""

    @pytest.fixture
    def build(self, bert_path: Path, tmp_path: Path, spec_of: Any) -> Callable[[int], Task]:
        for name, first in (("train", 0), ("test", 100)):
            rows = [
                {"text": f"w{at % 35} w{at // 35} w{at % 7}", "label": at % 3, "doc": at // 2}
                for at in range(first, first + 100)
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"group": "doc", "held_out": {"source": str(tmp_path / "test.jsonl")}, **SIZES}
        return lambda seed: make_task(
            spec_of("text-classification", tmp_path / "train.jsonl", seed=seed, **data), bert_path
        )


class TestImageClassification(TaskContract):
    @pytest.fixture
    def build(self, vit_path: Path, image_npz: Path, spec_of: Any) -> Callable[[int], Task]:
        data = {"image": "x_train", "label": "y_train", "workload": {"image": 16}, **SIZES}
        return lambda seed: make_task(
            spec_of("image-classification", image_npz, seed=seed, **data), vit_path
        )

    @pytest.fixture
    def model(self, vit_path: Path) -> nn.Module:
        return load_model(vit_path, "image-classification", 2)


class TestLanguageModeling(TaskContract):
    @pytest.fixture
    def build(self, llama_path: Path, corpus_txt: Path, spec_of: Any) -> Callable[[int], Task]:
        return lambda seed: make_task(
            spec_of("language-modeling", corpus_txt, seed=seed, **SIZES), llama_path
        )

    @pytest.fixture
    def model(self, llama_path: Path) -> nn.Module:
        return load_model(llama_path, "language-modeling")


class TestOnHeldOutText(TestLanguageModeling):
    """Search and report are chunks of another text; what both have in common is that one's."""

    @pytest.fixture
    def build(
        self, llama_path: Path, corpus_txt: Path, tmp_path: Path, spec_of: Any
    ) -> Callable[[int], Task]:
        lines = corpus_txt.read_text().splitlines()
        (tmp_path / "train.txt").write_text("\n".join(lines[:200]))
        (tmp_path / "test.txt").write_text("\n".join(lines[190:]))
        data = {"held_out": {"source": str(tmp_path / "test.txt")}, **SIZES}
        return lambda seed: make_task(
            spec_of("language-modeling", tmp_path / "train.txt", seed=seed, **data), llama_path
        )

    def test_the_splits_are_of_their_own_text(
        self, build: Callable[[int], Task], tmp_path: Path
    ) -> None:
        task = build(0)
        chunks = {}
        for name in ("train", "test"):
            words = (tmp_path / f"{name}.txt").read_text().split()
            ids = np.array([int(word[1:]) + 4 for word in words])
            rows = ids[: len(ids) // 10 * 10].reshape(-1, 10)
            chunks[name] = {row.tobytes() for row in rows}
        for split in DRAWN:
            own = {row.tobytes() for row in task.splits[split].inputs["input_ids"]}
            assert own <= chunks["test" if split in JUDGED else "train"]
