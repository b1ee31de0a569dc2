"""Arrays of a row per example on disk, written once as they are computed, and memory-mapped."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from autocomp.core.errors import StorageError
from autocomp.core.files import write_atomic
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
        write_atomic(cache, lambda path: _write(path, compute(), count))
        stored = _opened(cache, count)
        if stored is None:
            raise StorageError(f"{cache}: what was just written cannot be read back")
    return stored


def _write(path: Path, parts: Iterator[Array], count: int) -> None:
    first = next(parts)
    shape = (count, *first.shape[1:])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for part in itertools.chain([first], parts):
        array[start : start + len(part)] = part
        start += len(part)
    array.flush()


def _opened(path: Path, count: int) -> Array | None:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("what is stored in %s is damaged (%s): computing it again", path, error)
        return None
    return array if len(array) == count else None
