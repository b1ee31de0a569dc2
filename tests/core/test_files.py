"""Files that are whole or absent, also when the disk is full."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocomp.core.errors import StorageError
from autocomp.core.files import sweep_temporaries, write_atomic, write_text_atomic


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def refuse(number):
    def raise_it(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return raise_it


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert names(path.parent) == ["x.txt"]


def test_permissions_follow_the_umask(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("")
    write_text_atomic(ours, "")
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("where", ["write", "os.fsync", "Path.replace", "Path.mkdir"])
@pytest.mark.parametrize(
    ("number", "following"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EROFS, "permissions"),
        (errno.EIO, "check the file system"),
    ],
)
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, where, number, following):
    path = tmp_path / "x"
    write_text_atomic(path, "old")
    if where == "os.fsync":
        monkeypatch.setattr(os, "fsync", refuse(number))
    elif where.startswith("Path."):
        monkeypatch.setattr(Path, where.removeprefix("Path."), refuse(number))

    def write(temporary):
        temporary.write_text("new")
        if where == "write":
            refuse(number)()

    with pytest.raises(StorageError, match=following) as caught:
        write_atomic(path, write)
    assert os.strerror(number) in str(caught.value)
    assert str(path) in str(caught.value)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_writer_in_rust_that_finds_the_disk_full(tmp_path):
    def write(temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match="free disk space"):
        write_atomic(tmp_path / "x", write)
    assert names(tmp_path) == []


def test_other_errors_pass_through(tmp_path):
    write_text_atomic(tmp_path / "x", "old")

    def write(temporary):
        temporary.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_killed_writer_never_shows_half_a_file(tmp_path):
    path = tmp_path / "x"
    code = (
        "import sys; from pathlib import Path; from autocomp.core.files import write_text_atomic\n"
        "for i in range(10**9): write_text_atomic(Path(sys.argv[1]), f'{i % 10}' * 100_000)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(50):
            text = path.read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(path.read_text()) == 100_000


def test_sweeps_only_old_temporaries(tmp_path):
    for name in (".a.1-2.tmp", ".b.1-2.tmp", "c.tmp", ".keep"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / ".b.1-2.tmp")
    below = tmp_path / "students" / ".a.1-2.tmp"
    below.parent.mkdir()
    below.touch()
    os.utime(below, (1, 1))
    assert sweep_temporaries(tmp_path) == 2
    assert names(tmp_path) == [".b.1-2.tmp", ".keep", "c.tmp", "students"]
    assert names(below.parent) == []
