"""Which tokens a pruned vocabulary keeps, and how ids are renumbered. No torch.

Inside a study every token id is the original tokenizer's: data, teacher and stitched models use it,
and a pruned table maps it to its row. A shipped model takes its own ids, 0 to N − 1, which the
tokenizer shipped with it gives; `vocabulary.json` beside the model tells the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.core.errors import InternalError
from autocomp.core.files import write_text_atomic

Array = np.ndarray[Any, np.dtype[Any]]
FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """A pruned vocabulary.

    Attributes:
        kept: original ids, ascending; the position of one is its id in the pruned model.
        unknown: the original id, kept, that stands for those that are not.
        size: rows of the original table.
    """

    kept: tuple[int, ...]
    unknown: int
    size: int

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not self.kept or not ascending or self.kept[0] < 0 or self.kept[-1] >= self.size:
            raise InternalError(f"kept ids must ascend between 0 and {self.size - 1}")
        if self.unknown not in set(self.kept):
            raise InternalError(f"the unknown token {self.unknown} must be kept")

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Original id → new id, of kept tokens."""
        return {old: new for new, old in enumerate(self.kept)}

    @cached_property
    def row_of(self) -> Array:
        """int64 `(size,)`: original id → new id, the unknown token's where it was not kept."""
        rows = np.full(self.size, self.new_ids[self.unknown], np.int64)
        rows[list(self.kept)] = np.arange(len(self.kept))
        return rows

    def original(self, ids: Array) -> Array:
        """New ids → original ids, any shape."""
        result: Array = np.asarray(self.kept, np.int64)[ids]
        return result

    def save(self, directory: Path) -> None:
        """Write `vocabulary.json`, atomically."""
        data = {"size": self.size, "unknown": self.unknown, "kept": list(self.kept)}
        write_text_atomic(directory / FILE, json.dumps(data) + "\n")


def load_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary of the model in `directory`; `None` where it takes original ids."""
    try:
        status = (directory / FILE).stat()
    except FileNotFoundError:
        return None
    return _read(directory / FILE, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, _: int) -> Vocabulary:
    data = json.loads(path.read_text(encoding="utf-8"))
    return Vocabulary(tuple(data["kept"]), data["unknown"], data["size"])


def chosen_vocabulary(
    used: Sequence[int], required: Sequence[int], unknown: int | None, size: int
) -> Vocabulary:
    """The vocabulary that keeps `used` and `required` ids; without an unknown token, id 0 or the
    first that is kept stands for the rest."""
    kept = sorted({*used, *required, *([] if unknown is None else [unknown])})
    return Vocabulary(tuple(kept), kept[0] if unknown is None else unknown, size)
