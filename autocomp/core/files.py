"""Files that are whole or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from autocomp.core.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and move the result to `path`, durable, or leave `path` as it was.

    `write` creates the temporary file, which lies beside `path` and ends in `.tmp`: hand a file
    object to writers that append an ending of their own to a name (`numpy.savez`).

    Raises:
        StorageError: if the disk is full or refuses; the temporary file is removed.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise storage_error(path, number, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_atomic` for text (UTF-8)."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def storage_error(path: Path, number: int | None, error: Exception) -> StorageError:
    """The error for a `path` that could not be written, with what to do about it.

    One that is not there was to be read.
    """
    action = "read" if number == errno.ENOENT else "write"
    if number in _FULL:
        following = "free disk space and start the same command again"
    elif number in _REFUSED:
        following = "check the directory's permissions, or choose another directory"
    else:
        following = "check the file system and start the same command again"
    reason = os.strerror(number) if number else str(error)
    return StorageError(
        f"cannot {action} {path}: {reason}. What was stored before is intact; {following}"
    )


def _error_number(error: Exception) -> int | None:
    """The errno behind an exception, 0 if it has none; `None` if no file system was involved.

    Writers in Rust (safetensors) raise their own classes and leave the errno in the text.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    found = _RUST_ERRNO.search(str(error))
    return int(found.group(1)) if found else None


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_temporaries(directory: Path, older_than_s: float = 3600.0) -> int:
    """Remove what killed processes left half-written under `directory`; return how many files."""
    swept = 0
    for temporary in directory.rglob(".*.tmp"):
        try:
            if time.time() - temporary.stat().st_mtime > older_than_s:
                temporary.unlink()
                swept += 1
        except FileNotFoundError:
            continue
    return swept
