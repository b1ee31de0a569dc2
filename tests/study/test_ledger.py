"""The ledger under everything that kills: SIGKILL, torn lines, full disks, crowds."""

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from autocomp.core.errors import StorageError
from autocomp.study.ledger import Ledger

APPEND_FOREVER = """
import sys
from pathlib import Path
from autocomp.study.ledger import Ledger
ledger, first, count = Ledger(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
print("up", flush=True)
sys.stdin.readline()
for i in range(first, first + count):
    ledger.append("trial", f"k{i}", {"i": i, "text": "x" * (i % 3000)})
    sys.stdout.write(f"{i}\\n"); sys.stdout.flush()
"""


def writers(path, *jobs):
    """Processes that append (first, count) entries each, started at the same moment."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", APPEND_FOREVER, str(path), str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first, count in jobs
    ]
    for child in children:
        assert child.stdout.readline() == "up\n"
    for child in children:
        child.stdin.close()
    return children


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study" / "ledger.jsonl"


def numbers(path):
    return [entry.payload["i"] for entry in Ledger(path).read()]


def test_writes_and_reads(path):
    ledger = Ledger(path)
    assert ledger.read() == ()
    assert ledger.append("trial", "a", {"quality": 0.5})
    assert ledger.append("score", "a", {"kl": [1, None, "µ"]})
    entries = Ledger(path, read_only=True).read()
    assert [(e.kind, e.key, e.payload) for e in entries] == [
        ("trial", "a", {"quality": 0.5}),
        ("score", "a", {"kl": [1, None, "µ"]}),
    ]
    assert entries.of("score") == {"a": {"kl": [1, None, "µ"]}}
    assert entries.of("nothing") == {}
    assert entries[0].at.endswith("+00:00")


def test_the_first_of_a_key_wins_in_every_handle(path):
    one, other = Ledger(path), Ledger(path)
    assert one.append("trial", "a", {"n": 1})
    assert not other.append("trial", "a", {"n": 2})
    assert not one.append("trial", "a", {"n": 3})
    assert other.append("screen", "a", {"n": 4})
    assert [e.payload["n"] for e in one.read()] == [1, 4]


def test_many_at_once(path):
    ledger = Ledger(path)
    ledger.append("score", "b", {"n": 0})
    items = [("a", {"n": 1}), ("b", {"n": 2}), ("c", {"n": 3}), ("a", {"n": 4})]
    assert ledger.append_many("score", items) == 2
    assert ledger.append_many("score", items) == 0
    assert ledger.append_many("score", []) == 0
    assert ledger.read().of("score") == {"b": {"n": 0}, "a": {"n": 1}, "c": {"n": 3}}


def test_duplicates_put_there_by_hand_are_ignored(path):
    Ledger(path).append("trial", "a", {"n": 1})
    text = path.read_text()
    path.write_text(text + text.replace('"n": 1', '"n": 2'))
    assert [e.payload["n"] for e in Ledger(path).read()] == [1]


def test_follow_gives_each_entry_once(path):
    ledger, seen, cursor = Ledger(path), [], 0
    for i in range(6):
        entries, cursor = Ledger(path, read_only=True).follow(cursor)
        seen += [e.payload["i"] for e in entries]
        ledger.append_many("x", [(f"{i}-{j}", {"i": 10 * i + j}) for j in range(i)])
    entries, end = ledger.follow(cursor)
    seen += [e.payload["i"] for e in entries]
    assert seen == [10 * i + j for i in range(6) for j in range(i)]
    assert ledger.follow(end) == ((), end)
    assert end == path.stat().st_size


def test_figures_that_are_not_finite_become_null(path):
    payload = {
        "nan": float("nan"),
        "inf": [np.float64("inf")],
        "f": np.float32(0.5),
        "n": np.int64(3),
    }
    Ledger(path).append("trial", "a", {**payload, "ok": True})
    (entry,) = Ledger(path).read()
    assert entry.payload == {"nan": None, "inf": [None], "f": 0.5, "n": 3, "ok": True}


def test_reading_only(path):
    ledger = Ledger(path, read_only=True)
    assert ledger.read() == ()
    assert not path.exists()
    with pytest.raises(ValueError, match="reading only"):
        ledger.append("trial", "a", {})
    assert pickle.loads(pickle.dumps(ledger)).read_only


# Torn lines


def test_a_tail_torn_at_every_byte_is_repaired(path):
    ledger = Ledger(path)
    ledger.append("trial", "a", {"i": 1})
    whole = path.stat().st_size
    ledger.append("trial", "b", {"i": 2, "text": "µ\\n"})
    data = path.read_bytes()
    for length in range(whole, len(data)):
        path.write_bytes(data[:length])
        assert numbers_without_repair(path) == [1]
        assert path.stat().st_size == length, "reading does not write"
        torn = Ledger(path)
        assert path.stat().st_size == whole
        assert torn.append("trial", "b", {"i": 3})
        assert numbers(path) == [1, 3]


def numbers_without_repair(path):
    return [e.payload["i"] for e in Ledger(path, read_only=True).read()]


def test_a_tail_torn_after_opening_is_cut_by_the_next_append(path):
    ledger = Ledger(path)
    ledger.append("trial", "a", {"i": 1})
    with path.open("ab") as file:
        file.write(b'{"kind": "trial", "key": "b", "payl')
    assert ledger.append("trial", "b", {"i": 2})
    assert numbers(path) == [1, 2]


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"x" * 200_000, b"{}"])
def test_any_tail_without_a_newline_goes(path, tail, caplog):
    Ledger(path).append("trial", "a", {"i": 1})
    with path.open("ab") as file:
        file.write(tail)
    with caplog.at_level(logging.WARNING):
        assert numbers(path) == [1]
    assert f"a torn last line of {len(tail)} bytes is cut off" in caplog.text


def test_nothing_but_a_torn_line(path):
    path.parent.mkdir()
    path.write_bytes(b'{"kind"')
    assert numbers(path) == []
    assert path.stat().st_size == 0


def test_a_line_damaged_in_the_middle_costs_that_line_only(path, caplog):
    ledger = Ledger(path)
    for i in range(3):
        ledger.append("trial", f"k{i}", {"i": i})
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:20] + b"\xff\r" + second[22:] + third)
    with caplog.at_level(logging.WARNING):
        assert numbers(path) == [0, 2]
    assert f"unreadable entry at byte {len(first)}" in caplog.text
    assert Ledger(path).append("trial", "k1", {"i": 7})
    assert numbers(path) == [0, 2, 7]


# Killed, crowded, full


def test_what_was_acknowledged_survives_sigkill(path):
    acknowledged = []
    for round_ in range(6):
        (child,) = writers(path, (10_000 * round_, 10**9))
        for _ in range(3 + 4 * round_):
            acknowledged.append(int(child.stdout.readline()))
        time.sleep(0.003 * round_)
        child.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in child.stdout.read().split("\n") if line]
        child.wait()
        child.stdout.close()
        Ledger(path)
        for line in path.read_text().splitlines():
            assert json.loads(line)["kind"] == "trial"
        found = numbers(path)
        assert len(found) == len(set(found))
        assert set(acknowledged) <= set(found)
        assert len(set(found) - set(acknowledged)) <= round_ + 1, "one in flight for each kill"


def test_several_processes_append_at_once(path):
    children = writers(path, (0, 300), (0, 300), (150, 300), (1000, 300))
    reader, cursor, seen = Ledger(path, read_only=True), 0, []
    while any(child.poll() is None for child in children):
        entries, cursor = reader.follow(cursor)
        seen += [e.payload["i"] for e in entries]
    for child in children:
        assert child.wait() == 0
        child.stdout.close()
    seen += [e.payload["i"] for e in reader.follow(cursor)[0]]
    assert sorted(seen) == [*range(450), *range(1000, 1300)]
    assert numbers(path) == seen
    assert path.read_bytes().count(b"\n") == 750, "no entry is written twice"


def test_readers_see_only_what_is_durable(path, monkeypatch):
    ledger = Ledger(path)
    ledger.append("trial", "a", {"i": 1})
    syncing, go, seen = threading.Event(), threading.Event(), []

    def slow_sync(descriptor):
        syncing.set()
        assert go.wait(20)

    monkeypatch.setattr(os, "fsync", slow_sync)
    append = threading.Thread(target=ledger.append, args=("trial", "b", {"i": 2}))
    read = threading.Thread(target=lambda: seen.append(numbers_without_repair(path)))
    append.start()
    assert syncing.wait(20)
    read.start()
    read.join(0.2)
    assert seen == [], "it must wait: the entry may still be lost"
    go.set()
    append.join()
    read.join()
    assert seen == [[1, 2]]


def test_several_threads_append_at_once(path):
    ledger = Ledger(path)
    results = []

    def run(name):
        results.extend(ledger.append("x", f"{name}-{i % 10}", {"i": i}) for i in range(20))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 40
    assert len(ledger.read()) == 40


def test_a_copy_in_another_process_appends(path):
    ledger = Ledger(path)
    ledger.append("trial", "a", {"i": 1})
    code = (
        "import pickle, sys; l = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "print(l.append('trial', 'a', {}), l.append('trial', 'b', {'i': 2}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(ledger).hex()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False True\n"
    assert not ledger.append("trial", "b", {"i": 3})


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_ledger_as_it_was(path, monkeypatch, call):
    ledger = Ledger(path)
    ledger.append("trial", "a", {"i": 1})
    before, real = path.read_bytes(), os.write

    def full(descriptor, data=b""):
        if data[40:]:
            return real(descriptor, data[:40])  # some of it fits
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"No space left on device.*free disk space"):
        ledger.append("trial", "b", {"i": 2, "text": "x" * 30})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert ledger.append("trial", "b", {"i": 3})
    assert numbers(path) == [1, 3]


def test_a_directory_that_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append("trial", "a", {})


def test_appending_does_not_read_everything_again(path, monkeypatch):
    ledger = Ledger(path)
    ledger.append_many("x", [(f"{i}", {"text": "y" * 500}) for i in range(4000)])
    ledger.append("x", "warm", {})
    read, real = [], os.pread

    def count(descriptor, size, offset):
        data = real(descriptor, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", count)
    ledger.append("x", "next", {})
    assert sum(read) <= 65536
    assert path.stat().st_size > 2_000_000
