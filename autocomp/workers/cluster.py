"""Start Ray embedded in this process, or join a cluster; shut it down whatever happens."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocomp.core.errors import InternalError, UserError
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
_ATTEMPTS = 3
"""How often Ray is started: it gives up after half a minute, which a busy machine may need."""

_ANSWER_S = 5.0
"""How long a cluster's head may take to accept a connection; Ray itself would try for minutes."""


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
        address: of a running cluster's head, `HOST:PORT`, or `auto` for the cluster this machine is
            a node of; `None` starts Ray in this process.
        workers: worker processes; by default one per core of this machine, or of the cluster.
        log: file that every worker process appends its log to; on a cluster, on shared storage.

    Raises:
        UserError: for `workers` below 1 or above the cores there are, or an address that is no
            address, does not answer or cannot be joined from here.
        InternalError: if Ray does not start on this machine.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    if address is not None and address != "auto":
        _check_address(address)
    quieten()
    import ray

    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": _worker_environment(log),
    }
    with warnings.catch_warnings(), _own_signals():
        warnings.simplefilter("ignore")
        if address is None:
            count = _granted("this machine", len(os.sched_getaffinity(0)), workers)
            _start_here(count, common)
        else:
            try:
                ray.init(address=address, **common)
            # Ray ends the process where what answers at the address is no head of a cluster.
            except (Exception, SystemExit) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"--ray {address}: this cluster cannot be joined: {reason}. The command runs "
                    f"on a node of the cluster, with its version of Ray and its RAY_AUTH_MODE and "
                    f"token; leave --ray out to run on this machine alone"
                ) from error
    try:
        if address is not None:
            count = _granted(f"the cluster at {address}", _cores(address), workers)
        _log_instead_of_print()
        yield Cluster(count, address or "local")
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """This process's handlers of SIGINT and SIGTERM stay: Ray's would end it at once, with a trace.

    Only the main thread can have any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # set by other than Python
                signal.signal(number, handler)


def _start_here(cores: int, settings: Mapping[str, Any]) -> None:
    """Start Ray in this process; once more where a busy machine was too slow for its time limit."""
    import ray

    for attempt in range(_ATTEMPTS):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=cores,
                object_store_memory=_OBJECT_STORE_BYTES,
                **settings,
            )
        except Exception as error:  # what Ray raises for it has no type of its own
            ray.shutdown()
            if "timed out" not in str(error):
                raise
            if attempt + 1 == _ATTEMPTS:
                raise InternalError(
                    f"Ray did not start in time on this machine, {_ATTEMPTS} times in a row: it is "
                    f"very busy. Start the same command again when it is less so"
                ) from error
            logger.warning("Ray did not start in time; trying again")
        else:
            return


def _worker_environment(log: Path | None) -> dict[str, Any]:
    if log is None:
        return {"env_vars": WORKER_ENVIRONMENT}
    return {
        "env_vars": {**WORKER_ENVIRONMENT, VARIABLE: str(log.resolve())},
        "worker_process_setup_hook": HOOK,
    }


def _check_address(address: str) -> None:
    """Refuse what is no `HOST:PORT` and what does not answer, in seconds.

    Raises:
        UserError: saying what is allowed.
    """
    allowed = "HOST:PORT of the head (ray start --head prints it, port 6379 unless told), or auto"
    if address.startswith("ray://"):
        raise UserError(
            f"--ray {address}: Ray Client (ray://) is not supported: workers would read and write "
            f"files that this machine does not see. Run the command on a node of the cluster and "
            f"give {allowed}"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--ray {address}: not an address. Give {allowed}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--ray {address}: nothing answers there: {error}. Start a cluster with "
            f"'ray start --head', or leave --ray out to run on this machine. Give {allowed}"
        ) from error


def _granted(where: str, cores: int, asked: int | None) -> int:
    """Workers: as asked, else one per core.

    Raises:
        UserError: for more than there are cores: they would never start, or spoil each other's
            measurements.
    """
    if asked is not None and asked > cores:
        count = f"{cores} cores" if cores > 1 else "one core"
        raise UserError(
            f"--workers {asked}: {where} has {count}, and each worker takes one. Give {cores} at "
            f"most, or more cores first"
        )
    return asked or cores


def _cores(address: str) -> int:
    """Cores of the cluster that was joined.

    Raises:
        UserError: if it has none.
    """
    import ray

    cluster_resources: Any = ray.cluster_resources
    resources: Mapping[str, float] = cluster_resources()
    cores = int(resources.get("CPU", 0))
    if cores < 1:
        raise UserError(f"--ray {address}: no node of this cluster offers a core (CPU); add a node")
    return cores


def _log_instead_of_print() -> None:
    """Ray prints "a worker died" to stdout, across any live view, and has no setting for it.

    Best effort on a private function: where it is gone, Ray prints.
    """
    import ray._private.worker as driver

    def log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        logger.info("ray: %s", " ".join(data.get("lines", [])))

    if hasattr(driver, "print_to_stdstream"):
        driver.print_to_stdstream = log
