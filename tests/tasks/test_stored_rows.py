"""Rows on disk: computed once among all who ask, and a full disk is an error, not a signal."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autocomp.tasks.protocol import Array
from autocomp.tasks.stored import stored_rows

ROWS = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def test_what_is_stored_is_what_was_given(tmp_path: Path) -> None:
    def parts() -> Iterator[Array]:
        yield ROWS[:3].astype(np.float64)
        yield np.asfortranarray(ROWS[3:])

    stored = stored_rows(tmp_path / "rows.npy", 4, parts)
    assert stored.dtype == np.float32
    assert not stored.flags.writeable
    np.testing.assert_array_equal(stored, ROWS)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), ROWS)


def test_those_who_ask_at_once_compute_it_once(tmp_path: Path) -> None:
    asked: list[int] = []
    found: list[Array] = []

    def parts() -> Iterator[Array]:
        asked.append(1)
        time.sleep(0.2)
        yield ROWS

    def ask() -> None:
        found.append(stored_rows(tmp_path / "rows.npy", 4, parts))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]
    assert len(found) == 3
    for stored in found:
        np.testing.assert_array_equal(stored, ROWS)


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from autocomp.core.errors import StorageError
from autocomp.tasks.stored import stored_rows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
try:
    stored_rows(path, 4, lambda: iter([np.zeros((2, 50_000), np.float32)] * 2))
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "work" / "rows.npy"
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert f"cannot write {path}: File too large" in child.stdout
    assert [file.name for file in path.parent.iterdir()] == [".rows.npy.lock"]
