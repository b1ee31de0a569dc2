"""The store: content-addressed items on disk, whole or absent, checked when read.

An item is the state of one unit under one option: one safetensors file named by its key, which
hashes everything it was made from. Its metadata carry the SHA-256 of the whole file (with the
digest's own digits zeroed). A file that does not match is dropped with a warning and counts as
absent, so that the next build makes it again. Tensors are memory-mapped copy-on-write: writing to
one never changes the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from autocomp.core.candidate import Option
from autocomp.core.errors import StorageError
from autocomp.core.files import write_atomic
from autocomp.core.hashing import content_key
from autocomp.library.packing import pack_state, unpack_state
from autocomp.operators import step_versions
from autocomp.operators.protocol import UnitState

FORMAT_VERSION = 2
"""Raised when the layout of an item changes: older items are then built again."""

STALE_SECONDS = 3600.0
_ZEROS = b"0" * 64
_MARK = b'"sha256":"'

logger = logging.getLogger(__name__)


def item_key(unit_digest: str, option: Option, stats_fingerprint: str) -> str:
    """An item's key: the unit's weights, the option, the calibration data, versions."""
    return content_key(
        {
            "weights": unit_digest,
            "option": [[step.operator, dict(step.args)] for step in option.steps],
            "stats": stats_fingerprint,
            "operators": step_versions(option),
            "format": FORMAT_VERSION,
        },
        length=40,
    )


class _Recent:
    """An item in memory, with what tells whether file or tensors were written to since."""

    def __init__(self, state: UnitState, mark: tuple[int, int, int]) -> None:
        self._state = {name: replace(site) for name, site in state.items()}
        self._mark = mark
        self._tensors = [
            tensor
            for site in state.values()
            for tensor in (
                site.weight,
                site.bias,
                site.codes,
                site.scales,
                site.row_of,
                site.input_scale,
                site.mask,
                *(() if site.mixer is None else site.mixer.parameters.values()),
                site.output_scale,
            )
            if tensor is not None
        ]
        self._versions = [tensor._version for tensor in self._tensors]
        self.size_bytes = sum(tensor.nbytes for tensor in self._tensors)

    def current(self, mark: tuple[int, int, int]) -> bool:
        """Whether neither the file nor the tensors have changed."""
        return mark == self._mark and all(
            tensor._version == version
            for tensor, version in zip(self._tensors, self._versions, strict=True)
        )

    def copy(self) -> UnitState:
        """The state; tensors shared."""
        return {name: replace(site) for name, site in self._state.items()}


class Library:
    """Items under `root`, shared by any number of processes.

    Recently read items are kept in memory and handed out again: their tensors are shared, so copy
    before training. One that was written to all the same is noticed and read anew from its file.

    Args:
        root: a directory; made when missing.
        capacity_bytes: beyond it, the items that were read longest ago are removed. A file that is
            mapped somewhere stays readable there.
        memory_bytes: of items kept in memory by this process.
    """

    def __init__(
        self, root: Path, capacity_bytes: int | None = None, memory_bytes: int = 256 * 2**20
    ) -> None:
        self.root = Path(root)
        self.capacity_bytes = capacity_bytes
        self.memory_bytes = memory_bytes
        self._recent: OrderedDict[str, _Recent] = OrderedDict()
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._touched: dict[str, float] = {}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the library {self.root}: {error.strerror or error}. "
                f"Choose a directory that can be written to"
            ) from error
        self._sweep()

    def path(self, key: str) -> Path:
        """Where the item is, or would be."""
        return self.root / key[:2] / f"{key}.safetensors"

    def contains(self, key: str) -> bool:
        """Whether a sound item is there. Reads it once per process to check its digest."""
        return self._sound(key)

    def get(self, key: str) -> UnitState | None:
        """The item, memory-mapped; `None` when it is absent or was damaged (and is now dropped)."""
        if not self._sound(key):
            return None
        path = self.path(key)
        recent = self._recent.get(key)
        if recent is not None and recent.current(self._verified[key]):
            self._recent.move_to_end(key)
            self._touch(key, path)
            return recent.copy()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["item"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        self._touch(key, path)
        state = unpack_state(metadata["sites"], tensors)
        self._remember(key, state)
        return state

    def describe(self, key: str) -> dict[str, Any] | None:
        """What was stored with the item (`info` of `put`), or `None` when it is absent."""
        if not self._sound(key):
            return None
        with safe_open(self.path(key), framework="pt") as file:
            info: dict[str, Any] = json.loads(file.metadata()["item"])["info"]
        return info

    def put(self, key: str, state: UnitState, info: Mapping[str, Any] | None = None) -> int:
        """Store an item, atomically and durably; returns its size in bytes.

        Two processes may put the same key at once: the last one stays, both are whole.

        Raises:
            StorageError: if the disk is full or refuses; what was stored before stays valid.
        """
        tensors, sites = pack_state(state)
        metadata = {
            "item": json.dumps({"sites": sites, "info": dict(info or {})}),
            "sha256": _ZEROS.decode(),
        }
        data = bytearray(save(tensors, metadata=metadata))
        place = _digest_at(data)
        assert place is not None
        data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
        path = self.path(key)

        def write(temporary: Path) -> None:
            temporary.write_bytes(data)

        try:
            write_atomic(path, write)
        except OSError as error:  # making the directory or the temporary file
            raise StorageError(
                f"cannot write to the library {self.root}: {error.strerror or error}. What was "
                f"stored before is intact; free disk space and start the same command again"
            ) from error
        if self.capacity_bytes is not None:
            self._evict(keep=path)
        return len(data)

    def drop(self, key: str) -> None:
        """Remove an item, if it is there."""
        self._verified.pop(key, None)
        self._recent.pop(key, None)
        self.path(key).unlink(missing_ok=True)

    def keys(self) -> list[str]:
        """The keys of all items, sound or not."""
        return sorted(path.stem for path in self.root.glob("??/*.safetensors"))

    def size_bytes(self) -> int:
        """Bytes of all items."""
        return sum(status.st_size for _, status in self._files())

    def _sound(self, key: str) -> bool:
        path = self.path(key)
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        mark = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._verified.get(key) == mark:
            return True
        if not _matches(path):
            logger.warning("library item %s is damaged: dropped, to be built again", path)
            self.drop(key)
            return False
        self._verified[key] = mark
        return True

    def _remember(self, key: str, state: UnitState) -> None:
        self._recent.pop(key, None)
        recent = _Recent(state, self._verified[key])
        if recent.size_bytes > self.memory_bytes:
            return
        self._recent[key] = recent
        total = sum(entry.size_bytes for entry in self._recent.values())
        while total > self.memory_bytes:
            total -= self._recent.popitem(last=False)[1].size_bytes

    def _touch(self, key: str, path: Path) -> None:
        """Note the reading, at most once a minute; the time of writing stays."""
        now = time.time()
        if self.capacity_bytes is None or now - self._touched.get(key, 0.0) < 60:
            return
        self._touched[key] = now
        try:
            os.utime(path, ns=(int(now * 1e9), path.stat().st_mtime_ns))
        except OSError:
            logger.debug("cannot note the reading of %s", path)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.root.glob("??/*.safetensors"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue
        return found

    def _evict(self, keep: Path) -> None:
        assert self.capacity_bytes is not None
        files = self._files()
        total = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda entry: entry[1].st_atime_ns):
            if total <= self.capacity_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                self._verified.pop(path.stem, None)
                total -= status.st_size
                logger.info("library: %s removed, over its capacity", path.stem)

    def _sweep(self) -> None:
        """Remove what writers that were killed left behind."""
        for path in self.root.glob("??/.*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
            except OSError:
                continue


def _digest_at(data: bytes | bytearray | mmap.mmap) -> int | None:
    """Position of the digest's 64 digits in a safetensors file."""
    if len(data) < 8:
        return None
    header = 8 + int.from_bytes(data[:8], "little")
    place = data.find(_MARK, 8, min(header, len(data)))
    return None if place < 0 or place + len(_MARK) + 64 > len(data) else place + len(_MARK)


def _matches(path: Path) -> bool:
    """Whether the file is what its digest says, and safetensors can read it."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            place = _digest_at(data)
            if place is None:
                return False
            digest = hashlib.sha256(view[:place])
            digest.update(_ZEROS)
            digest.update(view[place + 64 :])
            if digest.hexdigest().encode() != data[place : place + 64]:
                return False
        with safe_open(path, framework="pt") as tensors:
            return "item" in (tensors.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False
