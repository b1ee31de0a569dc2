"""Connections to MLflow: a quiet client, experiments and runs by name."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient


def connect(uri: str) -> MlflowClient:
    """A client, with MLflow's own printing and telemetry off and a local store in WAL mode."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    path = _sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    return MlflowClient(tracking_uri=uri)


def is_local(uri: str) -> bool:
    """Whether writing there is work of this machine, not waiting for another one."""
    return urlsplit(uri).scheme in ("", "file", "sqlite")


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def find_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment of this name; made, or brought back from deletion, if need be."""
    found = client.get_experiment_by_name(name)
    if found is None:
        path = _sqlite_path(uri)
        place = None if path is None else (path.resolve().parent / "mlartifacts").as_uri()
        tags = {"mlflow.experimentKind": "custom_model_development"}  # else: GenAI pages
        return str(client.create_experiment(name, artifact_location=place, tags=tags))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def find_runs(client: MlflowClient, experiment_id: str, query: str) -> list[Any]:
    """All runs that match, page by page."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def without_password(uri: str, text: str | None = None) -> str:
    """The address, or a text that speaks of it, without user and password: it is written down."""
    secret, at, _ = urlsplit(uri).netloc.rpartition("@")
    text = uri if text is None else text
    return text.replace(f"{secret}@", "") if at else text
