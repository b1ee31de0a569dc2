"""The ledger: the append-only truth of a study, as JSON lines shared by many processes.

An entry is one line, written under a lock by a single append and fsynced before `append` returns:
what was acknowledged survives a SIGKILL, what was not leaves at most a torn last line, which the
next writer cuts off. Readers take the lock shared, so they never see what may still be lost.
An entry is identified by (kind, key); the first one wins, so repeating an append is harmless.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autocomp.core.files import storage_error, sync_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of a ledger; `at` is when it was written (ISO 8601, UTC)."""

    kind: str
    key: str
    payload: dict[str, Any]
    at: str


class Entries(tuple[Entry, ...]):
    """Entries in the order they were written."""

    __slots__ = ()

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """Key → payload of the entries of one kind."""
        return {entry.key: entry.payload for entry in self if entry.kind == kind}


class Ledger:
    """A ledger file; safe between processes and threads, picklable (workers append themselves).

    Call sequence: `append` or `append_many` to write; `read` for all entries; `follow(cursor)` for
    those since the last call, starting from cursor 0.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open, and cut off a torn last line unless `read_only`. The file need not exist.

        Raises:
            StorageError: if the file system refuses.
        """
        self.path = Path(path)
        self.read_only = read_only
        self._reset()
        if not read_only and self.path.exists():
            with self._locked(fcntl.LOCK_EX) as descriptor:
                self._repair(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.path, self.read_only))

    def _reset(self) -> None:
        self._thread_lock = threading.Lock()
        self._known: set[tuple[str, str]] = set()
        self._scanned = 0

    def append(self, kind: str, key: str, payload: Mapping[str, Any]) -> bool:
        """Write one entry; `True` once it is durable, `False` if (kind, key) was already there.

        NaN and infinities become null: a figure that is not finite was not measured.

        Raises:
            StorageError: if the disk is full or refuses; the ledger stays as it was.
        """
        return self.append_many(kind, [(key, payload)]) == 1

    def append_many(self, kind: str, items: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Write several entries of one kind for the price of one fsync; return how many were new.

        Killed half-way, it leaves a prefix of them.
        """
        if self.read_only:
            raise ValueError(f"{self.path} was opened for reading only")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [(key, _line(Entry(kind, key, dict(payload), at))) for key, payload in items]
        with self._thread_lock, self._locked(fcntl.LOCK_EX) as descriptor:
            end = self._repair(descriptor)
            for entry in self._since_last_scan(descriptor, end):
                self._known.add((entry.kind, entry.key))
            new: dict[str, bytes] = {}
            for key, line in lines:
                if (kind, key) not in self._known:
                    new.setdefault(key, line)
            if new:
                text = b"".join(new.values())
                self._write(descriptor, text, end)
                self._known.update((kind, key) for key in new)
                self._scanned = end + len(text)
        return len(new)

    def read(self) -> Entries:
        """All entries, the first of each (kind, key)."""
        entries, _ = self.follow(0)
        first: dict[tuple[str, str], Entry] = {}
        for entry in entries:
            first.setdefault((entry.kind, entry.key), entry)
        return Entries(first.values())

    def follow(self, cursor: int) -> tuple[Entries, int]:
        """The entries after `cursor`, and the cursor to give next time. Never waits for more."""
        if not self.path.exists():
            return Entries(), cursor
        with self._locked(fcntl.LOCK_SH) as descriptor:
            data = _read_from(descriptor, cursor)
        whole = data[: data.rfind(b"\n") + 1]
        return Entries(self._parse(whole, cursor)), cursor + len(whole)

    @contextmanager
    def _locked(self, mode: int) -> Iterator[int]:
        """A locked descriptor of the file, which a writer creates."""
        try:
            if mode == fcntl.LOCK_EX and not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666))
                sync_directory(self.path.parent)
            flags = os.O_RDONLY if mode == fcntl.LOCK_SH else os.O_RDWR | os.O_APPEND
            descriptor = os.open(self.path, flags)
        except OSError as error:
            raise storage_error(self.path, error.errno, error) from error
        try:
            fcntl.flock(descriptor, mode)
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for copies a forked child may hold
            os.close(descriptor)

    def _repair(self, descriptor: int) -> int:
        """Cut off what follows the last newline; return the length. Needs the exclusive lock."""
        end = os.fstat(descriptor).st_size
        whole = _end_of_last_line(descriptor, end)
        if whole < end:
            logger.warning("%s: a torn last line of %d bytes is cut off", self.path, end - whole)
            os.ftruncate(descriptor, whole)
            os.fsync(descriptor)
        return whole

    def _since_last_scan(self, descriptor: int, end: int) -> Iterator[Entry]:
        if end < self._scanned:  # someone replaced the file
            self._known.clear()
            self._scanned = 0
        if end > self._scanned:
            data = _read_from(descriptor, self._scanned)
            yield from self._parse(data, self._scanned)
            self._scanned += len(data)

    def _parse(self, data: bytes, offset: int) -> Iterator[Entry]:
        for line in data.split(b"\n")[:-1]:
            try:
                fields = json.loads(line)
                yield Entry(fields["kind"], fields["key"], fields["payload"], fields["at"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s: unreadable entry at byte %d is left out", self.path, offset)
            offset += len(line) + 1

    def _write(self, descriptor: int, text: bytes, end: int) -> None:
        """Append durably, or leave the file as long as it was (`end`)."""
        try:
            written = os.write(descriptor, text)
            while written < len(text):
                written += os.write(descriptor, text[written:])
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, end)
            raise storage_error(self.path, error.errno, error) from error


def _reopen(path: Path, read_only: bool) -> Ledger:
    return Ledger(path, read_only=read_only)


def _line(entry: Entry) -> bytes:
    fields = {"kind": entry.kind, "key": entry.key, "at": entry.at, "payload": entry.payload}
    return (json.dumps(_finite(fields), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Plain data with null for what is not finite; numpy scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_from(descriptor: int, offset: int) -> bytes:
    """Everything from `offset` on."""
    chunks = []
    while chunk := os.pread(descriptor, 1 << 20, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)


def _end_of_last_line(descriptor: int, end: int) -> int:
    """The offset after the last newline before `end`."""
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
