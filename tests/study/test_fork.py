"""A fork takes over exactly what the change of spec leaves valid."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from autocomp.core.errors import StudyError
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.fork import fork_study
from autocomp.study.per_example import save_scores


@pytest.fixture
def source(tmp_path, make_spec, make_record):
    """A study that has built and measured something; opened for reading."""
    study = Study.create_or_open(tmp_path / "old", make_spec())
    for name in ("artifacts/s/m", "artifacts/s/.m.1-2.tmp"):
        (study.paths.root / name).parent.mkdir(parents=True, exist_ok=True)
        (study.paths.root / name).write_text(name)
    for trial in ("s", "f"):
        scores = study.paths.per_example(trial, "search")
        save_scores(scores, np.array([1.0, 0.0]), np.array([3, 4]))
    study.paths.cost_table().write_text("{}")
    study.record_device("cpu-a")
    study.ledger.append("reference", "cpu-a", {"anchor_ms": 1.0})
    study.ledger.append("score", "layers.0.ffn/x", {"kl": 0.1})
    study.ledger.append("note", "x", {})
    study.ledger.append("report", "dense", {"quality": 0.9})
    study.ledger.append("report", "s", {"quality": 0.8})
    study.add_trial(make_record("dense", kind="dense"))
    study.add_trial(make_record("s", artifact="artifacts/s"))
    study.add_trial(make_record("f", "failed"))
    return Study.open(tmp_path / "old")


def changed(spec, **changes):
    """`spec` with other values at dotted paths written with `__`."""
    data = spec.model_dump(mode="json")
    for name, value in changes.items():
        *above, last = name.split("__")
        section = data
        for part in above:
            section = section[part]
        section[last] = value
    return Spec.model_validate(data)


def files(study):
    return {
        str(path.relative_to(study.paths.root))
        for path in study.paths.root.rglob("*")
        if path.is_file()
    }


OURS = {"study.json", "spec.yaml", "lease"}
MEASURED = {"cost_table.json", "ledger.jsonl"}


@pytest.mark.parametrize(
    ("changes", "kept", "kinds", "trials"),
    [
        (
            {"budget__latency": "30%"},
            MEASURED | {"artifacts/s/m", "per_example/search/s.safetensors"},
            {"reference", "score", "trial", "report"},
            ["dense", "s"],
        ),
        ({"distill__tokens": [5]}, MEASURED, {"reference", "score", "trial", "report"}, ["dense"]),
        (
            {"space": [{"match": "head"}]},
            MEASURED,
            {"reference", "score", "trial", "report"},
            ["dense"],
        ),
        ({"search__seed": 1}, MEASURED, {"reference"}, []),
        ({"search__realise": True}, MEASURED, {"reference", "score", "trial", "report"}, ["dense"]),
        (
            {"search__screen_examples": 64},
            MEASURED | {"artifacts/s/m", "per_example/search/s.safetensors"},
            {"reference", "trial", "report"},
            ["dense", "s"],
        ),
        ({"task__data__lines": 1}, MEASURED, {"reference"}, []),
        ({"target__workload__sequence": 8}, set(), set(), []),
        ({"model__source": "other"}, set(), set(), []),
    ],
)
def test_takes_over_what_stays_valid(tmp_path, source, changes, kept, kinds, trials):
    spec = changed(source.spec, **changes)
    fork = fork_study(source, tmp_path / "new", spec)
    assert fork.spec == spec
    assert files(fork) == OURS | kept
    assert {entry.kind for entry in fork.ledger.read()} == kinds
    assert [trial.id for trial in fork.trials()] == trials
    assert fork.devices == (["cpu-a"] if kinds else [])


def test_the_source_is_untouched_and_repeating_is_harmless(tmp_path, source, make_spec):
    before = {name: (source.paths.root / name).read_bytes() for name in files(source)}
    for _ in range(2):
        fork = fork_study(source, tmp_path / "new", make_spec("30%"))
    assert len(fork.ledger.read()) == 5
    assert {name: (source.paths.root / name).read_bytes() for name in files(source)} == before


def test_what_was_looked_at_stays_looked_at(tmp_path, source, make_spec):
    fork = fork_study(source, tmp_path / "new", make_spec("30%"))
    assert fork.ledger.read().of("report") == {f"s@{source.id}": {"quality": 0.8}}
    again = fork_study(Study.open(fork.paths.root), tmp_path / "newer", make_spec("40%"))
    assert list(again.ledger.read().of("report")) == [f"s@{source.id}"]


def test_copies_where_it_cannot_link(tmp_path, source, make_spec, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fork = fork_study(source, tmp_path / "new", make_spec("30%"))
    item = fork.paths.artifacts / "s" / "m"
    assert item.read_text() == "artifacts/s/m"
    assert item.stat().st_nlink == 1
    scores = "per_example/search/s.safetensors"
    assert files(fork) == OURS | MEASURED | {"artifacts/s/m", scores}


def test_not_onto_itself(tmp_path, source, make_spec):
    with pytest.raises(StudyError, match="the study to fork from"):
        fork_study(source, tmp_path / "new" / ".." / "old", make_spec("30%"))
