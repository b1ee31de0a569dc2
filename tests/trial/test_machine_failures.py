"""What a machine refuses is told apart from what a candidate does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from autocomp.core.errors import MachineError, StorageError
from autocomp.trial.runner import machine_failures


def test_memory_that_torch_does_not_get_is_the_machines_failure(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="memory ran out"), machine_failures(tmp_path):
        torch.empty(1 << 55)
    with pytest.raises(MachineError, match="memory ran out"), machine_failures(tmp_path):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    with pytest.raises(RuntimeError, match="shapes"), machine_failures(tmp_path):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOENT, "cannot read /data/rows.jsonl: No such file or directory"),
        (errno.ENOSPC, "cannot write /data/rows.jsonl: No space left on device"),
    ],
)
def test_a_file_is_named_with_what_was_to_be_done(
    tmp_path: Path, number: int, message: str
) -> None:
    with pytest.raises(StorageError, match=message), machine_failures(tmp_path):
        raise OSError(number, os.strerror(number), "/data/rows.jsonl")


def test_what_a_library_says_of_a_network_is_passed_on(tmp_path: Path) -> None:
    refused = pytest.raises(MachineError, match=r"^we could not connect")
    with refused as caught, machine_failures(tmp_path):
        raise OSError("we could not connect to the hub")
    assert not isinstance(caught.value, StorageError)
