"""The projection to MLflow: complete, idempotent, and never in the way of a search."""

from __future__ import annotations

import base64
import json
import logging
import math
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import BUDGET, baselines, failed, record, records

from autocomp.core.candidate import Candidate
from autocomp.core.gate import Gate
from autocomp.front.view import study_front
from autocomp.report import mlflow_client
from autocomp.report.dashboard import Dashboard
from autocomp.report.mlflow_log import project, projected_place
from autocomp.report.mlflow_projector import MlflowProjector
from autocomp.report.mlflow_view import TAG_PREFIX, saved_view, view_tag, view_url
from autocomp.report.summary import trial_metrics
from autocomp.spec.schema import Spec
from autocomp.study.directory import Study
from autocomp.study.per_example import save_scores
from autocomp.study.records import TrialRecord

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # of SQLAlchemy, about MLflow
)

SPEC = Spec.model_validate(
    {
        "version": 1,
        "model": {"source": "package:some_model/model"},
        "task": {"name": "text-classification", "data": {"source": "x.csv", "format": "csv"}},
        "target": {"workload": {"sequence": 32}},
        "budget": {"latency": "20%", "size": "10.1 MB"},
        "space": [{"match": "layers.*.ffn"}],
    }
)


def unpack_view(tag: str) -> dict[str, Any]:
    """The state a tag holds, as MLflow's page reads it."""
    packed = json.loads(tag)["state"].partition(";")[2]
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the whole module: the first opening migrates for seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study of two trials: writing is what takes time here."""
    made = Study.create_or_open(tmp_path / "runs" / tmp_path.name, SPEC)
    for trial in (baselines()[0], baselines()[1]):
        made.add_trial(trial)
    return made


@pytest.fixture(scope="module")
def whole(store: str, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with trials of every kind, projected once; tests only look at it."""
    made = Study.create_or_open(tmp_path_factory.mktemp("whole") / "whole", SPEC)
    for trial in records(6):
        made.add_trial(trial)
    right = np.repeat([1.0, 0.0], [902, 98])
    save_scores(made.paths.per_example("dense", "search"), right, np.arange(1000))
    project(made.paths.root, store)
    return made


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """MLflow keeps our records from the test's handlers otherwise."""
    yield
    logging.getLogger("mlflow").propagate = True


def client(store: str) -> Any:
    return mlflow_client.connect(store)


def children(store: str, study: Study) -> dict[str, Any]:
    place = projected_place(study.paths.root)
    assert place is not None
    query = f"tags.study_key = '{study.id}'"
    runs = client(store).search_runs([place["experiment_id"]], query)
    assert len({run.data.tags["trial_key"] for run in runs}) == len(runs)
    return {run.info.run_name: run for run in runs}


def parent(store: str, study: Study) -> Any:
    place = projected_place(study.paths.root)
    assert place is not None
    return client(store).get_run(place["run_id"])


def artifact(store: str, run: Any, path: str) -> str:
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return (root / path).read_text(encoding="utf-8")


def test_every_trial_is_a_child_run_with_its_figures(store: str, whole: Study) -> None:
    runs = children(store, whole)
    trials = {trial.id: trial for trial in whole.trials()}
    assert set(runs) == set(trials)
    place = projected_place(whole.paths.root)
    assert place is not None
    for name, trial in trials.items():
        run = runs[name]
        tags, metrics = run.data.tags, run.data.metrics
        assert tags["mlflow.parentRunId"] == place["run_id"]
        assert (tags["kind"], tags["proposed_by"]) == (trial.kind, trial.proposed_by)
        assert tags["runtime"] == "onnxruntime"
        assert run.info.status == {"complete": "FINISHED", "failed": "FAILED"}[trial.state]
        if trial.measured is not None:
            assert metrics["quality"] == pytest.approx(trial.quality, rel=1e-5)
            assert metrics["latency_ms"] == pytest.approx(trial.measured.latency_ms, rel=1e-5)
            assert metrics["size_bytes"] == trial.measured.size_bytes
            assert metrics["accuracy"] == metrics["quality"] or trial.kind != "search"
        if trial.estimated is not None and trial.state == "complete":
            expected = pytest.approx(trial.estimated.latency_ms, rel=1e-5)
            assert metrics["estimated_latency_ms"] == expected
        assert run.data.params["tokens"] == str(trial.candidate.distillation.tokens)
        assert len(run.data.params) < 12
        assert Candidate.from_yaml(artifact(store, run, "candidate.yaml")) == trial.candidate
    assert "step 99" in runs["bad0000099"].data.tags["error"]
    dense, other = runs["dense"].data.metrics, runs["uniform-int8"].data.metrics
    assert dense["quality_low"] == pytest.approx(0.902 - 1.96 * 0.0094, abs=0.002)
    assert dense["quality_high"] == pytest.approx(0.902 + 1.96 * 0.0094, abs=0.002)
    assert not {"quality_low", "quality_high"} & set(other), "it has no per-example scores"


def test_the_front_is_tagged_and_on_the_parent(store: str, whole: Study) -> None:
    view = study_front(whole)
    runs = children(store, whole)
    for trial in view["trials"]:
        tags = runs[trial["id"]].data.tags
        assert tags["pareto"] == str(trial["on_front"]).lower()
        assert tags["feasible"] == str(trial["feasible"]).lower()
    run = parent(store, whole)
    assert run.info.status == "FINISHED"
    assert run.data.params["budget_latency"] == "20%"
    assert float(run.data.params["limit_latency_ms"]) == pytest.approx(0.2 * 6.5)
    assert run.data.metrics["hypervolume"] == pytest.approx(view["hypervolume"], rel=1e-5)
    assert run.data.tags["chosen"] == view["chosen"]
    assert json.loads(artifact(store, run, "front.json")) == view
    assert artifact(store, run, "pareto/front.html").startswith("<!DOCTYPE html>")


def test_projecting_twice_changes_nothing(store: str, study: Study) -> None:
    first = project(study.paths.root, store)
    before = {name: run.info.run_id for name, run in children(store, study).items()}
    assert project(study.paths.root, store) == first
    assert {name: run.info.run_id for name, run in children(store, study).items()} == before


def test_a_run_that_was_cut_off_is_completed_in_place(store: str, study: Study) -> None:
    project(study.paths.root, store)
    runs = children(store, study)
    victim = runs["uniform-int8"].info.run_id
    client(store).update_run(victim, status="RUNNING")
    with MlflowProjector(study.paths.root, store, interval_s=0.05):
        pass
    again = children(store, study)
    assert len(again) == len(runs)
    assert again["uniform-int8"].info.run_id == victim
    assert again["uniform-int8"].info.status == "FINISHED"


def test_it_follows_a_search(store: str, study: Study) -> None:
    better = record(500, id="better", quality=0.95)
    with MlflowProjector(study.paths.root, store, interval_s=0.05) as projector:
        wait_for(lambda: projected_place(study.paths.root) is not None)
        assert parent(store, study).info.status == "RUNNING"
        study.add_trial(better)
        wait_for(lambda: "better" in children(store, study))
    assert projector._complete
    runs = children(store, study)
    assert runs["better"].data.tags["pareto"] == "true"
    flags = {trial["id"]: trial["on_front"] for trial in study_front(study)["trials"]}
    assert {name for name, run in runs.items() if run.data.tags["pareto"] == "true"} == {
        name for name, on_front in flags.items() if on_front
    }


def test_a_resumed_search_adds_to_the_same_run(store: str, study: Study) -> None:
    with MlflowProjector(study.paths.root, store, interval_s=0.05):
        pass
    first = parent(store, study).info.run_id
    study.add_trial(record(501, id="later"))
    with MlflowProjector(study.paths.root, store, interval_s=0.05):
        pass
    assert parent(store, study).info.run_id == first
    assert set(children(store, study)) == {trial.id for trial in study.trials()}


def test_two_attempts_of_a_trial_are_two_runs(store: str, study: Study) -> None:
    study.add_trial(record(700, id="again", state="failed", error="lost", measured=None))
    study.add_trial(record(700, id="again", quality=0.99))
    place = project(study.paths.root, store)
    query = f"tags.study_key = '{study.id}'"
    runs = client(store).search_runs([place["experiment_id"]], query)
    mine = {run.info.status: run for run in runs if run.info.run_name == "again"}
    assert set(mine) == {"FAILED", "FINISHED"}
    assert mine["FINISHED"].data.tags["pareto"] == "true"
    assert mine["FAILED"].data.tags["pareto"] == "false"


def test_a_store_that_is_away_stops_nothing(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with caplog.at_level(logging.WARNING, "autocomp"):
        projector = MlflowProjector(
            study.paths.root, f"sqlite:///{blocked}/mlflow.db", interval_s=0.01
        ).start()
        wait_for(lambda: "the search goes on" in caplog.text)
        study.add_trial(record(600))
        start_s = time.monotonic()
        assert projector.close(timeout_s=5.0) is False
        assert time.monotonic() - start_s < 5.0
    assert caplog.text.count("WARNING") == 1
    assert "autocomp dashboard" in caplog.text


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port of this machine that listens, and answers nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_server_that_is_away_is_told_of_once(
    study: Study, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port = server.getsockname()[1]
    server.close()  # from now on, connections are refused
    notes: list[str] = []
    uri = f"http://me:secret@127.0.0.1:{port}"
    with caplog.at_level(logging.INFO, "autocomp"):
        projector = MlflowProjector(study.paths.root, uri, note=notes.append, interval_s=0.01)
        with projector:
            wait_for(lambda: bool(notes))
            study.add_trial(record(600))
            time.sleep(0.2)  # it tries again
    assert projector._complete is False
    (note,) = notes
    assert f"MLflow at http://127.0.0.1:{port} is out of reach" in note
    assert "the search goes on" in note
    assert "autocomp dashboard" in note
    assert "WARNING" not in caplog.text
    assert "has not got the whole study" in caplog.text
    assert "secret" not in caplog.text


def test_a_search_that_ends_before_a_server_answers_says_so(
    study: Study, server: socket.socket
) -> None:
    notes: list[str] = []
    uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    projector = MlflowProjector(study.paths.root, uri, note=notes.append).start()
    connection, _ = server.accept()
    with connection:
        assert projector.close(timeout_s=0.1) is False
        (note,) = notes
        assert "has not got the whole study" in note
    projector._thread.join()
    assert len(notes) == 1


def test_nothing_waits_to_measure_while_a_server_is_waited_for(
    study: Study, server: socket.socket
) -> None:
    uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    projector = MlflowProjector(study.paths.root, uri, note=lambda text: None).start()
    connection, _ = server.accept()  # its request is under way
    with connection:
        start_s = time.monotonic()
        with Gate(study.paths.gate).measuring():
            assert time.monotonic() - start_s < 1.0
    projector.close()


def test_a_local_store_is_written_while_nothing_is_measured(store: str, study: Study) -> None:
    """That is work of this machine's processor."""
    with Gate(study.paths.gate).measuring():
        projector = MlflowProjector(study.paths.root, store, interval_s=0.01).start()
        time.sleep(0.5)
        assert projected_place(study.paths.root) is None
    assert projector.close()
    assert projected_place(study.paths.root) is not None


def test_the_parent_says_how_the_search_ended(store: str, study: Study) -> None:
    project(study.paths.root, store)

    def search() -> None:
        with MlflowProjector(study.paths.root, store, interval_s=0.05):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert parent(store, study).info.status == "KILLED"


def test_before_dense_is_measured(store: str, tmp_path: Path) -> None:
    fresh = Study.create_or_open(tmp_path / f"fresh-{tmp_path.name}", SPEC)
    fresh.add_trial(failed(1))
    project(fresh.paths.root, store)
    assert not [name for name in parent(store, fresh).data.params if name.startswith("limit_")]
    for trial in baselines()[:1]:
        fresh.add_trial(trial)
    project(fresh.paths.root, store)
    assert float(parent(store, fresh).data.params["limit_size_bytes"]) == BUDGET.size_bytes


def test_the_saved_view_is_the_experiment_s(store: str, whole: Study) -> None:
    place = projected_place(whole.paths.root)
    assert place is not None
    tags = client(store).get_experiment(place["experiment_id"]).tags
    state = unpack_view(tags[TAG_PREFIX + place["view_key"]])
    assert whole.id in state["searchFilter"]
    runs = client(store).search_runs([place["experiment_id"]], state["searchFilter"])
    assert {run.info.run_name for run in runs} == {
        trial["id"] for trial in study_front(whole)["trials"] if trial["on_front"]
    }
    logged = {f"metrics.`{m}`" for run in runs for m in run.data.metrics}
    logged |= {f"params.`{p}`" for run in runs for p in run.data.params}
    logged |= {f"tags.`{t}`" for run in runs for t in run.data.tags}
    assert set(state["selectedColumns"]) <= logged


def test_a_language_model_s_pages_speak_of_perplexity(store: str, tmp_path: Path) -> None:
    made = Study.create_or_open(tmp_path / f"lm-{tmp_path.name}", SPEC)
    with MlflowProjector(made.paths.root, store, interval_s=0.05):
        wait_for(lambda: projected_place(made.paths.root) is not None)
        better = record(500, id="better", quality=0.95)
        assert better.measured is not None
        better = replace(better, measured=replace(better.measured, latency_ms=1.0, size_bytes=9000))
        scores = math.log(0.95) + 0.3 * np.resize([1.0, -1.0], 400)
        save_scores(made.paths.per_example("better", "search"), scores, np.arange(400))
        for trial in (baselines()[0], better):
            assert trial.quality is not None
            metric = {"name": "perplexity", "value": 1 / trial.quality}
            made.add_trial(replace(trial, metric=metric))
    view = study_front(made)
    assert view["chosen"] == "better"
    for run in [*children(store, made).values(), parent(store, made)]:
        assert "quality" not in run.data.metrics
        assert "perplexity" in run.data.metrics
    chosen = parent(store, made).data.metrics
    assert chosen["perplexity"] == pytest.approx(1 / 0.95, rel=1e-5)
    assert chosen["perplexity_low"] == pytest.approx(math.exp(-1.96 * 0.015) / 0.95, abs=0.003)
    assert chosen["perplexity_high"] == pytest.approx(math.exp(1.96 * 0.015) / 0.95, abs=0.003)
    its = children(store, made)["better"].data.metrics
    assert its["perplexity_high"] == pytest.approx(chosen["perplexity_high"])
    place = projected_place(made.paths.root)
    assert place is not None
    tags = client(store).get_experiment(place["experiment_id"]).tags
    state = unpack_view(tags[TAG_PREFIX + place["view_key"]])
    assert "metrics.`perplexity`" in state["selectedColumns"]
    assert "quality" not in json.dumps(state)


def test_a_view_survives_packing() -> None:
    state = saved_view("Front of x", "x-1")
    tag = view_tag("Front of x", state)
    assert unpack_view(tag) == state
    assert set(json.loads(tag)) == {"name", "createdAt", "updatedAt", "state"}
    url = view_url("http://127.0.0.1:5000/", "1", "autocomp-x-1")
    assert url == (
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
        "&viewStateShareKey=autocomp-x-1&compareRunsMode=CHART"
    )


def test_a_password_is_not_written_down() -> None:
    for uri, written in (
        ("postgresql://me:secret@host:5432/db", "postgresql://host:5432/db"),
        ("https://me:secret@host/mlflow", "https://host/mlflow"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
    ):
        assert mlflow_client.without_password(uri) == written
        assert mlflow_client.without_password(uri, f"{uri}/x refused") == f"{written}/x refused"


def test_a_study_on_a_server_is_shown_there(study: Study) -> None:
    place = {"tracking_uri": "http://m:5000", "experiment_id": "7", "run_id": "r", "view_key": "k"}
    (study.paths.root / "mlflow.json").write_text(json.dumps(place))
    with Dashboard.open(study.paths.root) as dashboard:
        assert not dashboard.serving
        assert dashboard.url.startswith("http://m:5000/#/experiments/7/runs?")
        assert "/runs/r/artifacts/pareto/front.html?" in dashboard.front_url
        dashboard.wait()


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_carry_units() -> None:
    trial: TrialRecord = record(1)
    names = set(trial_metrics(trial))
    plain = {"quality", "teacher_kl", "accuracy", "latency_spread"}
    assert all(n.endswith(("_ms", "_bytes")) or n.startswith("seconds_") for n in names - plain)
