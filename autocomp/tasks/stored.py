"""Arrays of a row per example on disk, written once as they are computed, and memory-mapped.

Workers that want the same one wait for the first of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from autocomp.core.errors import StorageError
from autocomp.core.files import write_atomic
from autocomp.core.lock import locked
from autocomp.tasks.protocol import Array

log = logging.getLogger(__name__)


def stored_rows(cache: Path, count: int, compute: Callable[[], Iterator[Array]]) -> Array:
    """The rows in `cache`, a `.npy` file, float32 `(count, ...)`, mapped read-only.

    Args:
        compute: yields them, batch after batch; asked where there is no sound file.

    Raises:
        StorageError: if the disk is full or refuses.
    """
    stored = _opened(cache, count)
    if stored is None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with locked(cache.with_name(f".{cache.name}.lock")):
            stored = _opened(cache, count)  # another may have made it meanwhile
            if stored is None:
                write_atomic(cache, lambda path: _write(path, compute(), count))
                stored = _opened(cache, count)
    if stored is None:
        raise StorageError(f"{cache}: what was just written cannot be read back")
    return stored


def _write(path: Path, parts: Iterator[Array], count: int) -> None:
    """By ordinary writes: on a full disk, storing through a mapping would end the process."""
    first = next(parts)
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *first.shape[1:])}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in itertools.chain([first], parts):
            file.write(np.ascontiguousarray(part, "<f4").data)


def _opened(path: Path, count: int) -> Array | None:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("what is stored in %s is damaged (%s): computing it again", path, error)
        return None
    return array if len(array) == count else None
