"""Per-example scores on disk: whole or absent, and of which examples."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from autocomp.core.errors import StorageError
from autocomp.study.paths import StudyPaths
from autocomp.study.per_example import load_scores, save_scores, scores_of


def test_scores_come_back_exactly(tmp_path):
    paths = StudyPaths(tmp_path)
    values = np.random.default_rng(0).normal(size=300)
    save_scores(paths.per_example("t", "search"), values, np.arange(300))
    kept = load_scores(paths.per_example("t", "search"))
    assert kept is not None
    assert kept.values.dtype == np.float64
    np.testing.assert_array_equal(kept.values, values)
    assert paths.per_example("t", "search").stat().st_size < 3000
    assert list(scores_of(paths, ["t", "u"], "search")) == ["t"]
    assert scores_of(paths, ["t"], "report") == {}


def test_examples_are_told_apart_by_their_labels(tmp_path):
    def key(labels):
        save_scores(tmp_path / "x", np.zeros(len(labels)), np.array(labels))
        kept = load_scores(tmp_path / "x")
        assert kept is not None
        return kept.examples

    assert key([1, 2, 3]) == key(np.array([1, 2, 3], np.int32))
    keys = [key([1, 2, 3]), key([1, 3, 2]), key([[1, 2], [3, 4]]), key([[1, 2, 3, 4]])]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other"])
def test_a_damaged_file_is_none_with_a_warning(tmp_path, damage, caplog):
    path = tmp_path / "x.safetensors"
    save_scores(path, np.ones(50), np.ones(50))
    if damage == "other":
        from safetensors.numpy import save_file

        save_file({"weights": np.ones(3)}, path)
    else:
        data = {"cut": path.read_bytes()[:-9], "garbage": b"x" * 400, "empty": b""}
        path.write_bytes(data[damage])
    with caplog.at_level(logging.WARNING):
        assert load_scores(path) is None
    assert "no interval is given for this trial" in caplog.text


def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", refuse)
    with pytest.raises(StorageError, match="No space left"):
        save_scores(tmp_path / "deep" / "x", np.ones(5), np.ones(5))
    assert list((tmp_path / "deep").iterdir()) == []


def test_reading_scores_needs_no_torch(tmp_path):
    save_scores(tmp_path / "x", np.ones(5), np.ones(5))
    code = (
        "import sys; from pathlib import Path; from autocomp.study.per_example import load_scores; "
        f"assert load_scores(Path({str(tmp_path / 'x')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
