"""A spec and trial records to make studies of."""

from __future__ import annotations

import pytest

from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.spec.schema import Spec
from autocomp.study.records import TrialRecord


@pytest.fixture
def make_spec():
    def run(latency="20%", trials=5, heads=(1.0, 0.5)):
        return Spec.model_validate(
            {
                "version": 1,
                "model": {"source": "some/model"},
                "task": {"name": "text-classification", "data": {"source": "some-data"}},
                "budget": {"latency": latency},
                "space": [{"match": "layers.*", "structure": {"heads": list(heads)}}],
                "search": {"trials": trials},
            }
        )

    return run


@pytest.fixture
def make_record():
    def run(id="0123456789", state="complete", kind="search", **fields):
        candidate = Candidate.of(
            {"layers.0.ffn": Option((Step.of("width", keep=32), Step.of("gptq", weights=8)))},
            Distillation(tokens=1000, lr=3e-4),
        )
        fields.setdefault("measured", Measurement("measured", 1.5, 1000, device="cpu-a"))
        return TrialRecord(id, kind, "milp", state, candidate, **fields)

    return run
