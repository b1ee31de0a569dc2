"""Study directories: made whole, resumed, refused with reasons, held by one controller."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys

import pytest

from autocomp.core.errors import StorageError, StudyError
from autocomp.study.directory import Study, append_trial
from autocomp.study.records import TrialRecord

HOLD = """
import sys
from pathlib import Path
from autocomp.study import lease
with lease.hold(Path(sys.argv[1]), "the study"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Hold a lease in another process; ends with the test."""
    children = []

    def run(path):
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_makes_a_study(tmp_path, make_spec):
    spec = make_spec()
    study = Study.create_or_open(tmp_path / "runs" / "first", spec)
    assert study.name == "first"
    assert study.id == f"first-{spec.key[:8]}"
    assert {"python", "numpy"} <= study.versions.keys()
    assert study.devices == []
    assert study.trials() == []
    assert study.dense() is None
    about = json.loads((tmp_path / "runs" / "first" / "study.json").read_text())
    assert (about["format"], about["key"]) == (1, spec.key)
    assert Study.open(study.paths.root).spec == spec


def test_a_name_of_its_own_stays(tmp_path, make_spec):
    Study.create_or_open(tmp_path / "x", make_spec(), name="mine")
    assert Study.create_or_open(tmp_path / "x", make_spec(), name="other").name == "mine"


def test_every_path_lies_in_the_directory(tmp_path, make_spec):
    paths = Study.create_or_open(tmp_path / "x", make_spec()).paths
    names = [name for name, value in vars(type(paths)).items() if isinstance(value, property)]
    values = {getattr(paths, name) for name in names}
    assert len(values) == len(names) > 10
    assert all(paths.root in value.parents for value in values)
    assert paths.running.parent == paths.work, "scratch"


def test_resumes_and_keeps_the_new_amount(tmp_path, make_spec, make_record):
    first = Study.create_or_open(tmp_path / "x", make_spec(trials=5))
    first.add_trial(make_record())
    again = Study.create_or_open(tmp_path / "x", make_spec(trials=9))
    assert [trial.id for trial in again.trials()] == ["0123456789"]
    assert Study.open(tmp_path / "x").spec.search.trials == 9


def test_another_spec_is_refused_with_the_difference(tmp_path, make_spec):
    Study.create_or_open(tmp_path / "x", make_spec())
    before = (tmp_path / "x" / "spec.yaml").read_text()
    with pytest.raises(StudyError) as caught:
        Study.create_or_open(tmp_path / "x", make_spec("25%", trials=9, heads=[1.0]))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/x holds the study 'x' of another spec (study → this spec):",
        "  budget.latency: '20%' → '25%'",
        "  space[0].structure.heads: [1.0, 0.5] → [1.0]",
        "Restore these values to resume it, keep the changed spec's study in a directory of its "
        "own with --fork DIR, reusing what this one has built, or name a new directory",
    ]
    assert (tmp_path / "x" / "spec.yaml").read_text() == before


def test_a_directory_that_is_no_study_is_left_alone(tmp_path, make_spec):
    for name in ("b", "a", "spec.yaml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(StudyError, match=r"not empty and not a study \(it holds a, b, spec.yaml\)"):
        Study.create_or_open(tmp_path, make_spec())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "spec.yaml"]
    with pytest.raises(StudyError, match="is a file"):
        Study.create_or_open(tmp_path / "a", make_spec())


@pytest.mark.parametrize("left", [[], ["lease"], ["lease", ".study.json.1-ab.tmp"], ["log.txt"]])
def test_a_study_interrupted_at_birth_is_made_again(tmp_path, make_spec, left):
    for name in left:
        (tmp_path / name).write_text("")
    assert Study.create_or_open(tmp_path, make_spec()).trials() == []
    Study.open(tmp_path)


def test_a_study_interrupted_before_its_spec_was_written(tmp_path, make_spec):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    study.paths.spec.unlink()
    with pytest.raises(StudyError, match="interrupted while it was made"):
        Study.open(tmp_path / "x")
    with pytest.raises(StudyError, match="another spec"):
        Study.create_or_open(tmp_path / "x", make_spec("25%"))
    Study.create_or_open(tmp_path / "x", make_spec())
    assert Study.open(tmp_path / "x").spec == make_spec()


def test_opening_what_is_not_there(tmp_path, make_spec):
    Study.create_or_open(tmp_path / "quickstart", make_spec())
    with pytest.raises(StudyError, match=r"no such study. Did you mean 'quickstart'\?"):
        Study.open(tmp_path / "quikstart")
    with pytest.raises(StudyError, match=f"holds studies: {tmp_path}/quickstart"):
        Study.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"no study.json"):
        Study.open(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "unreadable"),
        ("[]", "unreadable"),
        ('{"name": "x"}', "unreadable"),
        ('{"format": 2}', "format 2; this autocomp reads format 1"),
        ('{"format": 1, "name": "x"}', "lacks created, devices, key, versions"),
    ],
)
def test_a_study_json_that_is_not_ours(tmp_path, make_spec, text, message):
    (tmp_path / "study.json").write_text(text)
    for attempt in (Study.open, lambda path: Study.create_or_open(path, make_spec())):
        with pytest.raises(StudyError, match=message):
            attempt(tmp_path)
    assert (tmp_path / "study.json").read_text() == text


def test_reading_changes_nothing(tmp_path, make_spec, make_record):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    study.add_trial(make_record())
    with study.paths.ledger.open("ab") as file:
        file.write(b'{"torn')
    before = {p.name: p.read_bytes() for p in study.paths.root.iterdir()}
    reading = Study.open(tmp_path / "x")
    assert len(reading.trials()) == 1
    for write in (lambda: reading.add_trial(make_record("b")), lambda: reading.record_device("d")):
        with pytest.raises(ValueError, match="reading only"):
            write()
    assert {p.name: p.read_bytes() for p in study.paths.root.iterdir()} == before


def test_a_full_disk(tmp_path, make_spec):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Study.create_or_open(tmp_path / "file" / "x", make_spec())


def test_devices_are_noted_once(tmp_path, make_spec, caplog):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    study.record_device("cpu-a")
    study.record_device("cpu-a")
    assert Study.open(tmp_path / "x").devices == ["cpu-a"]
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        Study.create_or_open(tmp_path / "x", make_spec()).record_device("cpu-b")
    assert "measured on cpu-a, now on cpu-b" in caplog.text
    assert Study.open(tmp_path / "x").devices == ["cpu-a", "cpu-b"]


def test_a_runtime_is_no_second_device(tmp_path, make_spec, caplog):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    with caplog.at_level(logging.WARNING):
        for runtime in ("onnxruntime", "openvino"):
            study.record_device(f"cpu-{runtime}", runtime)
    assert caplog.text == ""
    again = Study.create_or_open(tmp_path / "x", make_spec())
    assert [again.runtime_of(device) for device in again.devices] == ["onnxruntime", "openvino"]
    with caplog.at_level(logging.WARNING):
        again.record_device("gpu-openvino", "openvino")
    assert "measured on cpu-openvino, now on gpu-openvino" in caplog.text
    names = [study.paths.cost_table(runtime).name for runtime in (None, "openvino")]
    assert names == ["cost_table.json", "cost_table.openvino.json"]


# Trials


def test_a_record_comes_back_equal(tmp_path, make_spec, make_record):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    record = make_record(
        quality=0.9, metric={"name": "accuracy", "value": 0.9}, seconds={"distil": 2.0},
        artifact="artifacts/0123456789", teacher_kl=float("nan"),
    )  # fmt: skip
    assert study.add_trial(record)
    (found,) = Study.open(tmp_path / "x").trials()
    assert found.teacher_kl is None, "not finite: not measured"
    assert found.candidate == record.candidate
    assert found.measured == record.measured
    assert found.to_json() == {**record.to_json(), "teacher_kl": None}


def test_a_complete_trial_stands_and_a_failed_one_may_be_repeated(tmp_path, make_spec, make_record):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    for error in ("first", "second"):
        assert study.add_trial(make_record("a", "failed", error=error))
    assert [(t.id, t.state, t.error) for t in study.trials()] == [("a", "failed", "second")]
    assert study.add_trial(make_record("a", quality=0.5))
    assert not study.add_trial(make_record("a", quality=0.6))
    assert study.add_trial(make_record("a", "failed", error="late"))
    assert [(t.id, t.state, t.quality) for t in study.trials()] == [("a", "complete", 0.5)]


def test_dense_is_the_complete_dense_trial(tmp_path, make_spec, make_record):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    study.add_trial(make_record("uniform-int8", kind="uniform"))
    study.add_trial(make_record("dense", "failed", kind="dense"))
    assert study.dense() is None
    append_trial(pickle.loads(pickle.dumps(study.ledger)), make_record("dense", kind="dense"))
    assert study.dense().id == "dense"
    assert [t.id for t in study.trials()] == ["uniform-int8", "dense"]


def test_the_reference_of_a_device_is_kept(tmp_path, make_spec):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    assert study.reference("cpu-a") is None
    assert study.ledger.append("reference", "cpu-a", {"anchor_ms": 1.5})
    assert not study.ledger.append("reference", "cpu-a", {"anchor_ms": 2.5})
    assert study.reference("cpu-a") == {"anchor_ms": 1.5}


# The lease


def test_a_live_holder_is_named(tmp_path, make_spec, holder):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    child = holder(study.paths.lease)
    with pytest.raises(StudyError, match=f"in use by process {child.pid} on "), study.lease():
        pass
    with pytest.raises(StudyError, match=f"in use by process {child.pid} on "):
        Study.create_or_open(tmp_path / "x", make_spec(trials=9))
    assert Study.open(tmp_path / "x").spec.search.trials == 5


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_holders_lease_is_taken_over(tmp_path, make_spec, holder, how):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    child = holder(study.paths.lease)
    child.send_signal(how)
    child.wait()
    with study.lease():
        assert json.loads(study.paths.lease.read_text())["pid"] == os.getpid()


def test_the_lease_is_given_back(tmp_path, make_spec):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    with pytest.raises(ZeroDivisionError), study.lease():
        raise ZeroDivisionError
    with study.lease(), pytest.raises(StudyError, match=f"process {os.getpid()}"), study.lease():
        pass
    with study.lease():
        pass


def test_a_worker_started_by_the_holder_does_not_keep_the_lease(tmp_path, make_spec):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    with study.lease():
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with study.lease():
            pass
    finally:
        orphan.kill()
        orphan.wait()


def test_what_the_machine_failed_is_worth_one_more_attempt(tmp_path, make_spec, make_record):
    study = Study.create_or_open(tmp_path / "x", make_spec())
    for name, by_machine in (("killed", True), ("diverged", False), ("recovered", True)):
        record = make_record(id=name, state="failed", error="it failed", by_machine=by_machine)
        study.add_trial(record)
    study.add_trial(make_record(id="recovered"))
    assert [record.id for record in study.failed_by_machine()] == ["killed"]
    study.add_trial(make_record(id="killed", state="failed", error="again", by_machine=True))
    assert study.failed_by_machine() == []


def test_a_record_written_before_opens(make_record):
    data = make_record().to_json()
    del data["by_machine"]
    assert TrialRecord.from_json(data) == make_record()
