"""The store: bit-exact round trips, damage found, writers killed, disks full, capacity kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import StorageError
from autocomp.library.store import Library, item_key
from autocomp.operators import OPERATORS, apply_option
from autocomp.operators.protocol import UnitState
from autocomp.testing.operator_contract import assert_same
from autocomp.testing.operator_examples import example_state, example_stats, ffn

KEY = "ab" + "0" * 38
OTHER = "cd" + "0" * 38


def state(seed: int = 0) -> UnitState:
    """Pruned and quantised: every kind of tensor an item holds."""
    unit = ffn()
    steps = Step.of("width", keep=64), Step.of("gptq", weights=4, activations=32, group=16)
    return apply_option(unit, example_state(unit, seed), Option(steps), example_stats(unit))


def dense_state(seed: int = 0) -> UnitState:
    unit = ffn()
    option = Option((Step.of("width", keep=64),))
    return apply_option(unit, example_state(unit, seed), option, example_stats(unit))


def sparse_state(*more: Step) -> UnitState:
    unit = ffn()
    option = Option((Step.of("sparsegpt", level=0.5), *more))
    return apply_option(unit, example_state(unit), option, example_stats(unit))


def test_sparse_items_are_compact_and_come_back(tmp_path: Path) -> None:
    library = Library(tmp_path, memory_bytes=0)
    weights = 2 * 96 * 24
    bits = Step.of("gptq", weights=8, activations=32, group=0)
    for key, item, per_weight in (
        (KEY, sparse_state(), 4 / 2 + 1 / 8),
        (OTHER, sparse_state(bits), 1 + 1 / 8),
    ):
        size = library.put(key, item)
        assert size < weights * per_weight + 2500  # header, biases, scales
        loaded = library.get(key)
        assert loaded is not None
        assert_same(item, loaded, key)
        assert all(site.origin is None for site in loaded.values())


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
def test_gives_back_the_bits_it_was_given(tmp_path: Path, memory_bytes: int) -> None:
    library = Library(tmp_path, memory_bytes=memory_bytes)
    for key, item in ((KEY, state()), (OTHER, dense_state())):
        size = library.put(key, item, {"note": 1})
        assert library.path(key).stat().st_size == size
        for reader in (library, library, Library(tmp_path)):
            loaded = reader.get(key)
            assert loaded is not None
            assert_same(item, loaded, key)
            assert reader.describe(key) == {"note": 1}
    assert library.keys() == [KEY, OTHER]
    assert library.size_bytes() == sum(path.stat().st_size for path in tmp_path.rglob("*.saf*"))


def test_what_is_absent_is_none(tmp_path: Path) -> None:
    library = Library(tmp_path)
    assert library.get(KEY) is None
    assert not library.contains(KEY)
    assert library.describe(KEY) is None
    library.drop(KEY)


def test_a_flipped_byte_anywhere_is_found_and_the_item_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = state()
    Library(tmp_path).put(KEY, item)
    path = Library(tmp_path).path(KEY)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    digest = data.index(b'"sha256":"') + 10
    step = len(data) // 40
    places = {0, 7, 8, 9, digest, digest + 63, header - 1, header, len(data) - 1}
    for place in sorted(places | set(range(0, len(data), step))):
        for bit in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            caplog.clear()
            library = Library(tmp_path)
            assert library.get(KEY) is None, place
            assert "damaged" in caplog.text
            assert not path.exists()
            library.put(KEY, item)  # built again
            loaded = library.get(KEY)
            assert loaded is not None
            assert_same(item, loaded, "rebuilt")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_cut_file_is_found(tmp_path: Path, size: int) -> None:
    Library(tmp_path).put(KEY, state())
    path = Library(tmp_path).path(KEY)
    path.write_bytes(path.read_bytes()[:size])
    assert not Library(tmp_path).contains(KEY)
    assert not path.exists()


def test_damage_after_a_first_reading_is_found(tmp_path: Path) -> None:
    library = Library(tmp_path)
    library.put(KEY, state())
    assert library.get(KEY) is not None
    path = library.path(KEY)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert library.get(KEY) is None


def test_training_on_what_was_read_reaches_no_one_else(tmp_path: Path) -> None:
    for memory_bytes in (0, 2**20):
        library = Library(tmp_path, memory_bytes=memory_bytes)
        for item in (state(), dense_state()):
            library.put(KEY, item)
            loaded = library.get(KEY)
            assert loaded is not None
            weights = [torch.nn.Parameter(site.weight) for site in loaded.values()]
            optimiser = torch.optim.AdamW(weights, lr=0.1)
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimiser.step()
            again = library.get(KEY)
            assert again is not None
            assert_same(item, again, "after training")


def test_memory_is_bounded_and_used(tmp_path: Path) -> None:
    library = Library(tmp_path, memory_bytes=2 * sum(s.weight.nbytes for s in state().values()))
    library.put(KEY, state())
    first, second = library.get(KEY), library.get(KEY)
    assert first is not None
    assert second is not None
    name = next(iter(first))
    assert first[name].weight is second[name].weight
    assert first[name] is not second[name]
    library.put(OTHER, state(1))
    library.get(OTHER)  # pushes the first one out
    third = library.get(KEY)
    assert third is not None
    assert third[name].weight is not first[name].weight


def test_reading_is_quick(tmp_path: Path) -> None:
    library = Library(tmp_path, memory_bytes=0)
    library.put(KEY, state())
    library.get(KEY)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        library.get(KEY)
        seconds.append(time.process_time() - start)
    assert sorted(seconds)[10] < 0.005


def test_beyond_capacity_the_longest_unread_go(tmp_path: Path) -> None:
    size = Library(tmp_path / "probe").put(KEY, state())
    library = Library(tmp_path / "library", capacity_bytes=int(3.5 * size))
    keys = [f"{number:02d}" + "0" * 38 for number in range(5)]
    for number, key in enumerate(keys[:3]):
        library.put(key, state(number))
        os.utime(library.path(key), ns=(number * 10**9, library.path(key).stat().st_mtime_ns))
    mapped = library.get(keys[1])
    library.get(keys[0])  # read last: stays
    library.put(keys[3], state(3))
    assert library.keys() == sorted([keys[0], keys[1], keys[3]])
    os.utime(library.path(keys[1]), ns=(0, library.path(keys[1]).stat().st_mtime_ns))
    library.put(keys[4], state(4))
    assert library.keys() == sorted([keys[0], keys[3], keys[4]])
    assert library.size_bytes() <= library.capacity_bytes
    assert mapped is not None
    assert_same(mapped, state(1), "an evicted item that is still mapped")
    assert library.get(keys[1]) is None


def test_an_item_above_capacity_is_kept_alone(tmp_path: Path) -> None:
    library = Library(tmp_path, capacity_bytes=10)
    library.put(KEY, state())
    library.put(OTHER, state(1))
    assert library.keys() == [OTHER]


_PUT_FOREVER = """
import sys
from pathlib import Path
import torch
from autocomp.core.unit import SiteFormat
from autocomp.library.store import Library
from autocomp.operators.protocol import SiteState

library = Library(Path(sys.argv[1]))
weight = torch.arange(1_000_000, dtype=torch.float32).reshape(1000, 1000)
form = SiteFormat(1000, 1000, False)
print("ready", flush=True)
number = 0
while True:
    for key in ("aa" + "0" * 38, f"{number % 100:02d}" + "1" * 38):
        library.put(key, {"site": SiteState(weight + number, None, form)})
    number += 1
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_writer_leaves_no_broken_item(tmp_path: Path) -> None:
    for delay in (0.02, 0.05, 0.08):
        with _start(_PUT_FOREVER, str(tmp_path)) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        library = Library(tmp_path)
        for key in library.keys():  # noqa: SIM118
            assert library.get(key) is not None, key
    # What a killed writer left behind is swept once it is old.
    left = tmp_path / "aa" / ".old.tmp"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    Library(tmp_path)
    assert left.exists()
    os.utime(left, (0, 0))
    Library(tmp_path)
    assert not left.exists()


_FULL = """
import resource, sys
from pathlib import Path
import torch
from autocomp.core.errors import StorageError
from autocomp.core.unit import SiteFormat
from autocomp.library.store import Library
from autocomp.operators.protocol import SiteState

def item(rows):
    weight = torch.ones(rows, 1000)
    return {"site": SiteState(weight, None, SiteFormat(rows, 1000, False))}

library = Library(Path(sys.argv[1]))
library.put("aa" + "0" * 38, item(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    library.put("bb" + "0" * 38, item(1000))
except StorageError as error:
    print(error)
    library.put("cc" + "0" * 38, item(20))
    sys.exit(7)
"""


def test_a_full_disk_is_said_so_and_the_rest_stays(tmp_path: Path) -> None:
    """The file system itself refuses to let a file grow beyond 100 kB."""
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "What was stored before is intact" in done.stdout
    library = Library(tmp_path)
    assert library.keys() == ["aa" + "0" * 38, "cc" + "0" * 38]
    assert all(library.get(key) is not None for key in library.keys())  # noqa: SIM118
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the library"):
        Library(tmp_path / "file" / "library")
    library = Library(tmp_path / "library")
    (tmp_path / "library" / KEY[:2]).write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        library.put(KEY, state())


def _put_many(root: Path, seed: int) -> None:
    torch.set_num_threads(1)
    library, item = Library(root), state(seed)
    for _ in range(12):
        library.put(KEY, item)


def test_two_processes_put_the_same_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(tmp_path, seed)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    library, seen = Library(tmp_path, memory_bytes=0), 0
    while any(writer.is_alive() for writer in writers):
        if library.path(KEY).exists():
            assert library.get(KEY) is not None
            seen += 1
        time.sleep(0.005)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen > 0
    final = library.get(KEY)
    assert final is not None
    options = [_tensor_bytes(state(seed)) for seed in (0, 1)]
    assert _tensor_bytes(final) in options
    assert not list(tmp_path.rglob("*.tmp"))


def _tensor_bytes(item: UnitState) -> list[bytes]:
    return [site.weight.numpy().tobytes() for site in item.values()]


def test_the_key_follows_everything_an_item_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    option = Option((Step.of("rtn", weights=8, activations=32, group=0),))
    base = item_key("weights", option, "stats")
    assert base == item_key("weights", option, "stats")
    assert len(base) == 40
    others = {
        item_key("other", option, "stats"),
        item_key(
            "weights", Option((Step.of("gptq", weights=8, activations=32, group=0),)), "stats"
        ),
        item_key("weights", option, "other"),
    }
    monkeypatch.setattr(type(OPERATORS.get("rtn")), "version", 99)
    others.add(item_key("weights", option, "stats"))
    monkeypatch.setattr("autocomp.library.store.FORMAT_VERSION", 99)
    others.add(item_key("weights", option, "stats"))
    assert len(others | {base}) == 6
