"""A cluster of two nodes on this host; addresses and numbers of workers that are refused."""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_samples as samples

from autocomp.core.errors import InternalError, UserError
from autocomp.workers import ActorPool, run_tasks, start
from autocomp.workers.cluster import quieten


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A head with one core, a node with one; no token (Ray's default depends on its version)."""
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    quieten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        store = {"object_store_memory": 100 * 2**20}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, **store},
        )
        try:
            node = cluster.add_node(num_cpus=1, **store)
            cluster.wait_for_nodes()
            yield cluster, node
        finally:
            cluster.shutdown()


def test_a_search_on_two_nodes_outlives_one(two_nodes: tuple[Any, Any]) -> None:
    cluster, node = two_nodes
    with (
        pytest.raises(UserError, match=r"--workers 9: .* has 2 cores.*Give 2 at most"),
        start(cluster.address, workers=9),
    ):
        pass
    with start(cluster.address) as running:
        assert running.workers == 2
        results = run_tasks(samples.square, range(8), running.workers)
        assert results == [value * value for value in range(8)]
        with ActorPool(samples.Counter, (0,), running.workers) as pool:
            assert len({pid for _, _, pid in pool.map("add", range(12))}) == 2
            killer = threading.Timer(0.3, cluster.remove_node, (node,), {"allow_graceful": False})
            killer.start()
            answers = pool.map("nap", [0.1] * 40)
            killer.join()
            assert answers == [0.1] * 40
            left = {pid for _, _, pid in pool.map("add", range(4))}
            assert len(left) == 1, "the head's core alone is left"
        assert run_tasks(samples.square, range(3), 1) == [0, 1, 4]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "not an address. Give HOST:PORT"),
        ("", "not an address"),
        ("http://127.0.0.1:8265", "not an address"),
        ("127.0.0.1:port", "not an address"),
        ("127.0.0.1:70000", "not an address"),
        ("ray://127.0.0.1:10001", "Ray Client .* not supported.*HOST:PORT"),
        ("no-such-host.invalid:6379", "nothing answers there"),
    ],
)
def test_addresses_that_are_none_are_refused(address: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--ray {address}.*{message}"), start(address):
        pass


def test_a_port_nobody_listens_at_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match="nothing answers there"), start(f"127.0.0.1:{port}"):
        pass
    assert time.monotonic() - began < 10


def test_a_busy_machine_is_given_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    quieten()
    import ray

    tries: list[int] = []

    def init(*, num_cpus: int, **settings: object) -> None:
        tries.append(num_cpus)
        if len(tries) == 1:
            raise Exception("The current node timed out during startup. This could happen …")

    monkeypatch.setattr(ray, "init", init)
    with start(workers=2) as cluster:
        assert cluster.workers == 2
    assert tries == [2, 2]


def test_one_that_is_always_too_busy_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    quieten()
    import ray

    def init(**settings: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(InternalError, match="did not start in time on this machine, 3 times"),
        start(workers=1),
    ):
        pass
