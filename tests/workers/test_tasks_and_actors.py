"""Tasks and actor pools: order, errors with their cause, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
import worker_samples as samples

from autocomp.core.errors import InternalError, StorageError, UserError
from autocomp.workers import ActorPool, Cluster, run_tasks, start


def test_results_come_in_the_order_of_items_with_progress(cluster: Cluster) -> None:
    seen: list[tuple[int, int]] = []
    results = run_tasks(samples.square, range(6), cluster.workers, lambda *at: seen.append(at))
    assert results == [0, 1, 4, 9, 16, 25]
    assert seen == [(done, 6) for done in range(7)]
    assert run_tasks(samples.square, [], cluster.workers) == []


def test_workers_are_single_threaded(cluster: Cluster) -> None:
    assert run_tasks(samples.threads, [0], cluster.workers) == ["1"]


def test_our_own_errors_come_back_as_they_were(cluster: Cluster) -> None:
    with pytest.raises(StorageError, match="disk full"):
        run_tasks(samples.disk_full, range(4), cluster.workers)


def test_other_errors_name_function_item_and_cause(cluster: Cluster) -> None:
    with pytest.raises(
        InternalError, match=r"odd failed on item 4 of 5: ValueError: three is odd"
    ) as caught:
        run_tasks(samples.odd, range(5), cluster.workers)
    assert caught.value.__cause__ is not None


def test_what_is_in_flight_when_another_fails_comes_to_its_end(
    cluster: Cluster, tmp_path: Path
) -> None:
    paths = ["", *(str(tmp_path / str(at)) for at in range(1, 8))]
    with pytest.raises(StorageError, match="disk full"):
        run_tasks(samples.slow_writer, paths, cluster.workers)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}, "two a worker, no more"


def test_a_task_whose_process_dies_is_repeated(cluster: Cluster, tmp_path: Path) -> None:
    marker = str(tmp_path / "died")
    assert run_tasks(samples.die_once, [marker], cluster.workers) == ["alive"]


def test_a_pool_keeps_its_actors_and_answers_every_item(cluster: Cluster) -> None:
    with ActorPool(samples.Counter, (10,), cluster.workers) as pool:
        first = pool.map("add", range(20))
        assert [value for value, _, _ in first] == list(range(1, 21))
        processes = {pid for _, _, pid in first}
        assert len(processes) == 2
        assert {pid for _, _, pid in pool.map("add", range(8))} <= processes
        indices = {index for index, _ in pool.map_unordered("add", range(7))}
        assert indices == set(range(7))
        with pytest.raises(InternalError, match=r"Counter\.fails failed on item 1 of 1: .*bad 5"):
            pool.map("fails", [5])


def test_an_actor_that_dies_is_replaced_and_its_work_repeated(
    cluster: Cluster, tmp_path: Path
) -> None:
    items = ["", str(tmp_path / "died"), "", "", ""]
    with ActorPool(samples.Counter, (0,), cluster.workers) as pool:
        assert pool.map("die_once", items) == ["alive"] * 5
        assert (tmp_path / "died").exists()


def test_an_item_that_kills_every_actor_fails_the_pool(cluster: Cluster) -> None:
    with (
        ActorPool(samples.Counter, (0,), 1, retries=1) as pool,
        pytest.raises(InternalError, match=r"worker died on item 1"),
    ):
        pool.map("always_dies", [0])


def test_no_workers_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"), start(workers=0):
        pass
