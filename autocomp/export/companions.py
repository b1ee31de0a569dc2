"""What every exported model is shipped with: tokenizer or processor files, labels, example inputs.

Kept once per study, beside the artifacts, so that a pick can be exported without loading the data
or the teacher again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from autocomp.core.files import write_atomic, write_text_atomic
from autocomp.models.tokenizer_files import write_pruned
from autocomp.models.vocabulary import Vocabulary

_PROCESSOR = "preprocessor_config.json"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    _PROCESSOR,
)


@dataclass(frozen=True)
class Companions:
    """A directory with the files below; `labels.json` and `inputs.safetensors` are written last."""

    directory: Path

    def write(
        self,
        source: Path,
        label_names: tuple[str, ...],
        inputs: dict[str, np.ndarray],
        processor: Mapping[str, Any] | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        """Copy tokenizer and processor files from `source`; keep labels, inputs, some `texts`.

        `processor` is how images became inputs in this study: it replaces the source's
        `preprocessor_config.json`, which may be missing or speak of another size.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            file = source / name
            if file.is_file():
                write_atomic(self.directory / name, partial(shutil.copyfile, file))
        if processor is not None:
            text = json.dumps(processor, indent=2) + "\n"
            write_text_atomic(self.directory / _PROCESSOR, text)
        contiguous = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        write_atomic(self._inputs, lambda to: save_file(contiguous, to))
        write_text_atomic(self._texts, json.dumps(list(texts), indent=1) + "\n")
        write_text_atomic(self._labels, json.dumps(list(label_names), indent=2) + "\n")

    @property
    def complete(self) -> bool:
        """Whether everything was written."""
        return self._labels.is_file()

    @property
    def label_names(self) -> tuple[str, ...]:
        """Classes in the order of the logits; empty for language models."""
        return tuple(json.loads(self._labels.read_text(encoding="utf-8")))

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Named example inputs in the workload's shape."""
        return load_file(self._inputs)

    @property
    def texts(self) -> list[str]:
        """Real texts of the task; empty where there are none."""
        if not self._texts.is_file():
            return []
        texts: list[str] = json.loads(self._texts.read_text(encoding="utf-8"))
        return texts

    def ship(self, directory: Path, vocabulary: Vocabulary | None) -> None:
        """Put tokenizer and processor files into `directory`, rewritten for a pruned vocabulary."""
        if vocabulary is not None:
            write_pruned(self.directory, vocabulary, directory)
            return
        for file in self.files():
            shutil.copyfile(file, directory / file.name)

    def files(self) -> list[Path]:
        """Tokenizer and processor files."""
        return [self.directory / name for name in _FILES if (self.directory / name).is_file()]

    @property
    def _labels(self) -> Path:
        return self.directory / "labels.json"

    @property
    def _texts(self) -> Path:
        return self.directory / "texts.json"

    @property
    def _inputs(self) -> Path:
        return self.directory / "inputs.safetensors"
