"""The contract of a task, carried out on the three there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from autocomp.models.load import load_model
from autocomp.tasks import Task, make_task
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
