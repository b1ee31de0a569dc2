"""Start Ray embedded in this process, or join a cluster; shut it down whatever happens."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.core.errors import UserError
from autocomp.workers.log import HOOK, VARIABLE

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
"""Each worker process is single-threaded (torch and BLAS read this at import) and quiet."""

_OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Cluster:
    """A running Ray: how many worker processes fit, and where it runs."""

    workers: int
    address: str


def quieten() -> None:
    """Settings Ray reads from the environment, to be made before it is imported."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_AUTO_INIT": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def start(
    address: str | None = None, workers: int | None = None, log: Path | None = None
) -> Iterator[Cluster]:
    """Run Ray for the length of a `with` block.

    Args:
        address: of a running cluster (`ray://…`, `host:port`); `None` starts Ray in this process.
        workers: worker processes; by default one per core of this machine, or of the cluster.
        log: file that every worker process appends its log to; on a cluster, on shared storage.

    Raises:
        UserError: for `workers < 1`, or an address that does not answer.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    quieten()
    import ray

    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": _worker_environment(log),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if address is None:
                count = workers or len(os.sched_getaffinity(0))
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=count,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **common,
                )
            else:
                ray.init(address=address, **common)
                resources: Callable[[], dict[str, float]] = ray.cluster_resources
                count = workers or max(1, int(resources().get("CPU", 1)))
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at {address!r}: {error}. Start one with "
                f"'ray start --head', or leave --ray out to run on this machine"
            ) from error
    _log_instead_of_print()
    try:
        yield Cluster(count, address or "local")
    finally:
        ray.shutdown()


def _worker_environment(log: Path | None) -> dict[str, Any]:
    if log is None:
        return {"env_vars": WORKER_ENVIRONMENT}
    return {
        "env_vars": {**WORKER_ENVIRONMENT, VARIABLE: str(log.resolve())},
        "worker_process_setup_hook": HOOK,
    }


def _log_instead_of_print() -> None:
    """Ray prints "a worker died" to stdout, across any live view, and has no setting for it.

    Best effort on a private function: where it is gone, Ray prints.
    """
    import ray._private.worker as driver

    def log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        logger.info("ray: %s", " ".join(data.get("lines", [])))

    if hasattr(driver, "print_to_stdstream"):
        driver.print_to_stdstream = log
