"""The contract of a target, as tests. Needs pytest, torch and transformers.

    from autocomp.testing.target_contract import TargetContract

    class TestMyTarget(TargetContract):
        @pytest.fixture
        def make(self):
            return lambda section: MyTarget(section)

It is asked to run a small BERT of random weights, as it is and in every precision that it takes.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from autocomp.core.candidate import Option, Step
from autocomp.core.errors import AutocompError
from autocomp.core.unit import SiteFormat, Unit
from autocomp.library.student import unit_state
from autocomp.models.discover import find_units
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators import apply_option
from autocomp.spec.schema import WorkloadSection
from autocomp.targets import open_artifact
from autocomp.targets.protocol import Artifact, Target
from autocomp.targets.timing import Reference

SEQUENCE = 12
SHAPES = ((1, 12), (3, 9), (2, 1))
"""Examples and tokens."""
PRECISIONS = ((8, 0, 32), (8, 0, 8), (4, 32, 32), (4, 32, 8))
"""Bits of weights, columns that share a scale (0: all), bits of activations."""
HALF_SCALES = 5e-3
"""Of the logits' spread, where scales of groups are stored in 16 bits."""
ROUNDED = 0.15
"""The same where activations are rounded: one in the middle between two steps goes to either."""


_exported: dict[str, Any] = {}
"""Target → skeleton."""


@dataclass(frozen=True)
class Sentences:
    """An export task: token ids of several lengths, padded on the right."""

    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Both axes of both inputs vary."""
        return {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Inputs of this shape."""
        generator = torch.Generator().manual_seed(batch * 100 + sequence)
        ids = torch.randint(1, 50, (batch, sequence), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, max(1, sequence - row) :] = 0
        return {"input_ids": ids, "attention_mask": mask}


SENTENCES = Sentences()


@cache
def small_bert() -> tuple[nn.Module, list[Unit]]:
    """Two layers, 64 wide, three labels; the same weights every time."""
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=3,
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForSequenceClassification
    model: nn.Module = auto.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        matrix = parameter.ndim > 1
        nn.init.normal_(parameter, std=0.15 if matrix else 0.1, mean=0.0 if matrix else 0.5)
    return model, find_units(config.to_dict(), {}, "text-classification", 3)


def arrays(batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Inputs as an artifact takes them."""
    tensors = SENTENCES.example_inputs(batch, sequence)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


class TargetContract:
    """What holds for every target."""

    tolerance: ClassVar[float] = 1e-4
    """Largest difference of a float model's logits from torch's, of their spread."""

    @pytest.fixture
    def make(self) -> Callable[[WorkloadSection], Target]:
        """Makes the target under test for a workload."""
        raise NotImplementedError("give the fixture `make`")

    @pytest.fixture
    def target(self, make: Callable[[WorkloadSection], Target]) -> Target:
        """For one example of `SEQUENCE` tokens."""
        return make(WorkloadSection(sequence=SEQUENCE))

    @pytest.fixture
    def model(self) -> tuple[nn.Module, list[Unit]]:
        """The model and its units; not to be changed."""
        return small_bert()

    @pytest.fixture
    def skeleton(self, target: Target, model: tuple[nn.Module, list[Unit]]) -> Any:
        """The skeleton of the model, exported once."""
        if target.name not in _exported:
            _exported[target.name] = target.export(*model, SENTENCES)
        return _exported[target.name]

    @pytest.fixture
    def artifact(
        self, target: Target, model: tuple[nn.Module, list[Unit]], skeleton: Any, tmp_path: Path
    ) -> Artifact:
        """The model as it is."""
        return target.write(target.lower(skeleton, *model), tmp_path / "artifact")

    def test_it_says_what_it_is(
        self, target: Target, make: Callable[[WorkloadSection], Target]
    ) -> None:
        described = target.describe()
        assert json.loads(json.dumps(described)) == described
        assert described["target"] == target.name
        assert described["runtime"]
        assert described["workload"] == {"batch": 1, "sequence": SEQUENCE, "threads": 1}
        assert target.fingerprint() == make(WorkloadSection(sequence=SEQUENCE)).fingerprint()
        for other in ({"sequence": 13}, {"batch": 2}, {"threads": 2}):
            workload = WorkloadSection(**{"sequence": SEQUENCE, **other})
            assert make(workload).fingerprint() != target.fingerprint(), other

    def test_size_is_that_of_the_files(self, artifact: Artifact) -> None:
        directory = artifact.path.parent
        assert artifact.size_bytes == sum(path.stat().st_size for path in directory.iterdir())
        assert open_artifact(directory) == artifact

    def test_it_computes_what_torch_does_at_every_shape(
        self, target: Target, model: tuple[nn.Module, list[Unit]], artifact: Artifact
    ) -> None:
        for shape in SHAPES:
            inputs = arrays(*shape)
            assert target.verify(artifact, model[0], inputs) < self.tolerance * _spread(model[0])
            assert target.run(artifact, inputs).shape == (shape[0], 3)

    @pytest.mark.parametrize(("weights", "group", "activations"), PRECISIONS)
    def test_what_it_takes_it_computes_and_what_it_does_not_it_says(
        self,
        target: Target,
        model: tuple[nn.Module, list[Unit]],
        skeleton: Any,
        tmp_path: Path,
        weights: int,
        group: int,
        activations: int,
    ) -> None:
        step = Step.of("rtn", weights=weights, group=group, activations=activations)
        student, units = copy_for_surgery(model[0]), model[1]
        before, after = 0, 0
        for unit in units:
            if unit.kind not in ("attention", "ffn"):
                continue
            dense = unit_state(student, unit)
            state = apply_option(unit, dense, Option((step,)), {})
            formats = [site.format for site in state.values()]
            reasons = {target.formats_supported(each) for each in formats}
            if reasons != {None}:
                assert all(reason is None or reason.strip() for reason in reasons)
                return
            before += sum(target.size_bytes(site.format) for site in dense.values())
            after += sum(target.size_bytes(each) for each in formats)
            install(student, unit, state)
        scales = HALF_SCALES if group else 0.0
        allowed = max(self.tolerance, scales, ROUNDED if activations == 8 else 0.0)
        written = target.write(target.lower(skeleton, student, units), tmp_path / "rounded")
        assert target.verify(written, student, arrays(3, 9)) < allowed * _spread(student)
        dense_bytes = target.write(target.lower(skeleton, *model), tmp_path / "dense").size_bytes
        saved = dense_bytes - written.size_bytes
        assert saved > 0
        assert before - after == pytest.approx(saved, rel=0.25), "predicted and on disk"

    def test_sizes_and_memory_are_told_without_a_model(self, target: Target) -> None:
        dense = SiteFormat(256, 512, True)
        assert target.formats_supported(dense) is None
        assert target.size_bytes(dense) == pytest.approx(4 * 256 * 513, rel=0.05)
        kind, loading_bytes = target.load_bytes(dense)
        assert kind
        assert loading_bytes >= 4 * 256 * 512
        assert target.idle_memory_bytes > 1e6

    def test_a_measurement_is_in_reference_milliseconds(
        self, target: Target, artifact: Artifact
    ) -> None:
        inputs = arrays(1, SEQUENCE)
        assert target.reference is None
        found = target.measure(artifact, inputs)
        assert found.provenance == "measured"
        assert found.size_bytes == artifact.size_bytes
        assert found.device == target.fingerprint()
        assert found.latency_ms is not None
        assert found.latency_ms > 0
        assert target.reference is not None, "the first measurement records it"
        assert target.reference.device == target.fingerprint()
        target.reference = replace(target.reference, anchor_ms=100 * target.reference.anchor_ms)
        again = target.measure(artifact, inputs)
        assert again.latency_ms == pytest.approx(100 * found.latency_ms, rel=0.5)

    def test_a_used_target_can_be_pickled(self, target: Target, artifact: Artifact) -> None:
        inputs = arrays(2, 7)
        target.reference = Reference(2.0, "x")
        found = target.run(artifact, inputs)
        again = pickle.loads(pickle.dumps(target))
        np.testing.assert_array_equal(again.run(artifact, inputs), found)
        assert again.reference == target.reference
        assert again.fingerprint() == target.fingerprint()

    def test_a_rewritten_artifact_is_opened_again(
        self, target: Target, model: tuple[nn.Module, list[Unit]], skeleton: Any, artifact: Artifact
    ) -> None:
        inputs = arrays(1, SEQUENCE)
        before = target.run(artifact, inputs)
        changed: Any = copy.deepcopy(model[0])
        changed.classifier.bias.data += 1.0
        target.write(target.lower(skeleton, changed, model[1]), artifact.path.parent)
        after = target.run(artifact, inputs)
        np.testing.assert_allclose(after, before + 1.0, atol=self.tolerance * _spread(model[0]))

    def test_peak_memory_is_that_of_a_process_of_its_own(
        self, target: Target, artifact: Artifact
    ) -> None:
        ballast = np.ones(100_000_000, np.uint8)  # of this process
        peak = target.peak_memory(artifact, arrays(1, SEQUENCE))
        assert artifact.size_bytes < peak < 10 * target.idle_memory_bytes
        assert len(ballast) > peak or peak < 400e6
        with pytest.raises(AutocompError):
            target.peak_memory(artifact, {"input_ids": arrays(1, SEQUENCE)["input_ids"]})


def _spread(model: nn.Module) -> float:
    with torch.no_grad():
        logits: torch.Tensor = model(**SENTENCES.example_inputs(4, SEQUENCE)).logits
    return float(logits.std())
