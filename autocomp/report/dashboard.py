"""MLflow's pages of a study, served on this machine by MLflow's own command."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from autocomp.core.errors import InternalError, UserError
from autocomp.report.mlflow_view import run_artifact_url, view_url
from autocomp.study.directory import Study

_HOST = "127.0.0.1"
_STARTUP_S = 120.0


@dataclass
class Dashboard:
    """A served dashboard; a context manager that ends the server.

    Attributes:
        url: the runs page with the study's saved view.
        front_url: the front page among the artifacts.
        tracking_uri: the MLflow store or server behind it.
        serving: whether a server of ours runs (not when the study is on an MLflow server already).
    """

    url: str
    front_url: str
    tracking_uri: str
    _process: subprocess.Popen[bytes] | None = None

    @property
    def serving(self) -> bool:
        """Whether a server of ours runs."""
        return self._process is not None

    @classmethod
    def open(cls, study_dir: Path, port: int = 0) -> Dashboard:
        """Serve the study's MLflow store on 127.0.0.1, projecting the study first if need be.

        Raises:
            StudyError: if there is no study.
            UserError: if the port is taken, or the study is tracked in a database of its own.
            InternalError: if the server does not start.
        """
        from autocomp.report.mlflow_log import project, projected_place

        Study.open(study_dir)
        place = projected_place(study_dir)
        if place is None or _lost(place["tracking_uri"]):
            place = project(study_dir)
        uri = place["tracking_uri"]
        if uri.startswith(("http://", "https://")):
            return cls(*_addresses(uri, place), uri)
        if not uri.startswith("sqlite:///"):
            raise UserError(
                f"{study_dir} is tracked in a database ({uri}), which needs its password: start "
                f"`mlflow ui --backend-store-uri …` yourself"
            )
        port = port or _free_port()
        if _answers(port):
            raise UserError(f"port {port} is taken. Choose another with --port, or 0 for any")
        process, log = _serve(uri, port)
        _wait_until_ready(process, port, log)
        return cls(*_addresses(f"http://{_HOST}:{port}", place), uri, process)

    def wait(self) -> None:
        """Until the server ends, or Ctrl-C, which is the way to stop it."""
        if self._process is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            _stop(self._process)


def _addresses(base: str, place: dict[str, str]) -> tuple[str, str]:
    experiment = place["experiment_id"]
    return (
        view_url(base, experiment, place["view_key"]),
        run_artifact_url(base, experiment, place["run_id"], "pareto/front.html"),
    )


def _lost(uri: str) -> bool:
    """Whether a local store is no longer there (the study was moved or cleaned)."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


def _serve(uri: str, port: int) -> tuple[subprocess.Popen[bytes], Path]:
    handle, name = tempfile.mkstemp(prefix="autocomp-mlflow-", suffix=".log")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", _HOST, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with os.fdopen(handle, "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return process, Path(name)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _STARTUP_S
    try:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=2).close()
                return
            time.sleep(0.3)
    except BaseException:
        _stop(process)
        raise
    _stop(process)
    raise InternalError(f"MLflow's server did not start; what it said is in {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers: they are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
