"""The contract of a task, as tests. Needs pytest and torch.

    from autocomp.testing.task_contract import TaskContract

    class TestMyTask(TaskContract):
        @pytest.fixture
        def build(self):
            return lambda seed: MyTask.build(section, workload, model_path, seed)

        @pytest.fixture
        def model(self):
            return load_model(model_path, MyTask.name, 3)

A few dozen examples are enough, in splits whose sizes differ from each other.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocomp.core.errors import InternalError
from autocomp.tasks.protocol import DRAWN, NO_LABEL, SPLITS, Array, Split, Task

BATCH = 7
"""Examples at a time where a split is gone through."""


def rows(task: Task, split: Split) -> list[bytes]:
    """Each example's inputs, to be compared."""
    encoded = task.splits[split]
    arrays = [np.ascontiguousarray(encoded.inputs[name]) for name in task.input_names]
    return [b"".join(array[at].tobytes() for array in arrays) for at in range(len(encoded))]


def whole(task: Task, model: nn.Module, split: Split, *, trim: bool) -> Array:
    """Logits for a split, batch by batch: `(N, ...)`, those of trimmed batches filled up with 0."""
    with torch.no_grad():
        found = [task.logits(model, batch) for batch in task.batches(split, BATCH, trim=trim)]
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in found), strict=True)]
    filled = []
    for part in found:
        room = torch.zeros(len(part), *shape)
        room[tuple(slice(size) for size in part.shape)] = part
        filled.append(room)
    return np.asarray(torch.cat(filled).numpy())


class TaskContract:
    """What holds for every task."""

    @pytest.fixture
    def build(self) -> Callable[[int], Task]:
        """The task under test, by the seed of the search."""
        raise NotImplementedError("give the fixture `build`")

    @pytest.fixture
    def model(self) -> nn.Module:
        """A model that the task can be asked of; random weights are enough."""
        raise NotImplementedError("give the fixture `model`")

    @pytest.fixture
    def task(self, build: Callable[[int], Task]) -> Task:
        """The task of seed 0."""
        return build(0)

    @pytest.fixture
    def run(self, task: Task, model: nn.Module) -> Callable[[dict[str, Array]], Array]:
        """The model as an artifact: inputs of fixed shape to logits."""

        def logits(inputs: dict[str, Array]) -> Array:
            assert set(inputs) == set(task.input_names)
            feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
            with torch.no_grad():
                return np.asarray(task.logits(model, feeds).float().numpy())

        return logits

    def test_it_says_what_it_is(self, task: Task) -> None:
        assert task.name
        assert task.summary
        assert task.metric_name
        assert task.num_labels is None or task.num_labels == len(task.label_names)
        assert set(task.dynamic_axes) <= set(task.input_names)
        assert all(axes[0] == "batch" for axes in task.dynamic_axes.values())
        json.dumps(task.processor_json())
        for split in SPLITS:
            encoded = task.splits[split]
            assert set(encoded.inputs) == set(task.input_names)
            assert {len(array) for array in encoded.inputs.values()} == {len(encoded)}
            assert encoded.labels.dtype == np.int64

    def test_a_seed_draws_the_same_examples_everywhere(
        self, task: Task, build: Callable[[int], Task]
    ) -> None:
        for other in (build(0), pickle.loads(pickle.dumps(task))):
            for split in SPLITS:
                assert other.fingerprint(split) == task.fingerprint(split)
                assert rows(other, split) == rows(task, split)
        assert build(1).fingerprint("search") != task.fingerprint("search")
        assert len({task.fingerprint(split) for split in DRAWN}) == len(DRAWN)

    def test_splits_share_no_example(self, task: Task) -> None:
        drawn = [row for split in DRAWN for row in set(rows(task, split))]
        assert len(drawn) == len(set(drawn))

    def test_the_transfer_set_begins_with_what_is_distilled_on(self, task: Task) -> None:
        distilled = rows(task, "distil")
        assert rows(task, "transfer")[: len(distilled)] == distilled

    @pytest.mark.parametrize("trim", [True, False])
    @pytest.mark.parametrize("seed", [None, 3])
    def test_batches_cover_a_split_once(self, task: Task, seed: int | None, trim: bool) -> None:
        encoded = task.splits["distil"]
        batches = list(task.batches("distil", BATCH, seed=seed, trim=trim, index=True))
        order = [int(at) for batch in batches for at in batch["index"]]
        assert sorted(order) == list(range(len(encoded)))
        assert (order == sorted(order)) == (seed is None)
        assert len(batches) == -(-len(encoded) // BATCH)
        for batch in batches:
            at = batch["index"].numpy()
            assert np.array_equal(batch["labels"], encoded.labels[at])
            for name in task.input_names:
                given, stored = batch[name].numpy(), encoded.inputs[name][at]
                if trim:  # what is cut is at the end
                    stored = stored[tuple(slice(size) for size in given.shape)]
                assert np.array_equal(given, stored)
        assert set(next(task.batches("distil", BATCH))) == {*task.input_names, "labels"}

    def test_a_seed_decides_on_the_order(self, task: Task) -> None:
        def order(seed: int | None, **settings: Any) -> list[int]:
            batches = task.batches("distil", BATCH, seed=seed, index=True, **settings)
            return [int(at) for batch in batches for at in batch["index"]]

        assert order(3) == order(3) != order(4)
        assert sorted(order(3, limit=10)) == order(None, limit=10) == list(range(10))
        assert order(None, limit=10**6) == order(None)

    def test_trimming_changes_nothing_but_the_width(self, task: Task, model: nn.Module) -> None:
        cut, full = (list(task.batches("search", BATCH, trim=trim)) for trim in (True, False))
        assert [task.tokens(batch) for batch in cut] == [task.tokens(batch) for batch in full]
        assert all(task.tokens(batch) > 0 for batch in full)
        np.testing.assert_allclose(
            whole(task, model, "search", trim=True),
            whole(task, model, "search", trim=False),
            atol=1e-4,
        )

    def test_the_loss_is_a_cross_entropy_in_nats(self, task: Task, model: nn.Module) -> None:
        batch = next(task.batches("distil", BATCH))
        with torch.no_grad():
            logits = task.logits(model, batch)
        loss = task.loss(logits, batch["labels"])
        assert loss.shape == ()
        # what all classes have in common says nothing, and knowing nothing costs log(classes)
        torch.testing.assert_close(task.loss(logits + 3, batch["labels"]), loss)
        guess = float(task.loss(torch.zeros_like(logits), batch["labels"]))
        assert guess == pytest.approx(np.log(logits.shape[-1]), rel=1e-5)
        unlabelled = torch.full_like(batch["labels"], NO_LABEL)
        assert float(task.loss(logits, unlabelled)) == 0

    def test_the_loss_is_that_of_what_has_a_label(self, task: Task, model: nn.Module) -> None:
        batch = next(task.batches("distil", BATCH))
        with torch.no_grad():
            logits = task.logits(model, batch)
        labels = batch["labels"].clone()
        labels[2:] = NO_LABEL
        torch.testing.assert_close(
            task.loss(logits, labels), task.loss(logits[:2], batch["labels"][:2])
        )

    def test_what_lowers_the_loss_raises_the_quality(self, task: Task, model: nn.Module) -> None:
        logits = torch.from_numpy(whole(task, model, "search", trim=False)).double()
        labels = torch.from_numpy(task.splits["search"].labels)

        def quality(step: float) -> float:
            given = logits.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(task.loss(given, labels), given)
            moved: Tensor = logits - step * len(labels) * gradient
            return task.score(moved.numpy(), "search").value

        assert quality(-100) < quality(100) <= 1

    def test_a_score_is_the_aggregate_of_its_examples(self, task: Task, model: nn.Module) -> None:
        found = task.score(whole(task, model, "report", trim=False), "report")
        assert found.per_example.dtype == np.float64
        assert found.per_example.shape == (len(task.splits["report"]),)
        assert found.metric == task.metric_name
        assert 0 <= found.value <= 1
        assert task.aggregate(found.per_example) == found.value
        middle = task.aggregate(np.sort(found.per_example)[len(found.per_example) // 2 :])
        assert middle >= found.value, "a higher value of an example means that it is better"

    def test_an_evaluation_is_that_of_the_whole_in_batches_of_one_shape(
        self, task: Task, model: nn.Module, run: Callable[[dict[str, Array]], Array]
    ) -> None:
        shapes = set()

        def watched(inputs: dict[str, Array]) -> Array:
            shapes.add(tuple(inputs[name].shape for name in task.input_names))
            return run(inputs)

        logits = whole(task, model, "search", trim=False)
        teacher = logits + np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
        found = task.evaluate(watched, "search", batch=BATCH, teacher=teacher)
        assert len(shapes) == 1
        assert {shape[0] for shape in shapes.pop()} == {BATCH}
        assert found.quality.value == pytest.approx(task.score(logits, "search").value, rel=1e-4)
        if found.logits is not None:
            np.testing.assert_allclose(found.logits, logits, atol=1e-4)
        sides = (torch.from_numpy(side).double() for side in (logits, teacher))
        ours, theirs = (side.log_softmax(-1) for side in sides)
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        divergence = divergence.flatten(1).mean(1) if divergence.ndim > 1 else divergence
        assert found.kl_per_example is not None
        np.testing.assert_allclose(found.kl_per_example, divergence, rtol=1e-3)
        assert found.teacher_kl == pytest.approx(float(divergence.mean()), rel=1e-3)

    def test_a_teacher_may_be_a_run(
        self, task: Task, run: Callable[[dict[str, Array]], Array]
    ) -> None:
        assert task.evaluate(run, "search", teacher=run).teacher_kl == 0
        alone = task.evaluate(run, "search")
        assert alone.teacher_kl is None
        assert alone.kl_per_example is None

    def test_broken_logits_are_refused(
        self, task: Task, model: nn.Module, run: Callable[[dict[str, Array]], Array]
    ) -> None:
        logits = whole(task, model, "search", trim=False)
        with pytest.raises(InternalError):
            task.score(logits[1:], "search")
        broken = logits.copy()
        broken[3] = np.nan
        with pytest.raises(InternalError):
            task.score(broken, "search")
        with pytest.raises(InternalError):
            task.evaluate(lambda inputs: run(inputs) * np.inf, "search")
        with pytest.raises(InternalError):
            task.evaluate(run, "search", teacher=logits[1:])

    def test_example_inputs_have_the_asked_shape(self, task: Task, model: nn.Module) -> None:
        more = len(task.splits["calibrate"]) + 2
        for batch, sequence in ((1, 4), (3, 17), (more, 4)):
            inputs = task.example_inputs(batch, sequence)
            assert tuple(inputs) == task.input_names
            assert {len(tensor) for tensor in inputs.values()} == {batch}
            for name, tensor in inputs.items():
                if task.dynamic_axes.get(name, {}).get(1) == "sequence":
                    assert tensor.shape[1] == sequence
            with torch.no_grad():
                assert len(task.logits(model, inputs)) == batch
