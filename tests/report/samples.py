"""A made-up study for the tests of the report room: records, and their `front --json` view."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from autocomp.core.budget import Budget
from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.measurement import Measurement
from autocomp.front.view import front_json
from autocomp.study.records import TrialRecord

BUDGET = Budget(latency_ms=1.3, size_bytes=10.1e6)
LAYERS = 6


def candidate(seed: int = 0, *, dense: bool = False, tokens: int = 80_000) -> Candidate:
    """Six blocks and an embedding, options drawn by `seed`."""
    rng = random.Random(seed)
    options: dict[str, Option] = {
        "embeddings": Option((Step.of("rtn", weights=rng.choice([8, 4]), group=128),))
    }
    for layer in range(LAYERS):
        for part, operator, choices in (
            ("attention", "heads", (3, 6, 9)),
            ("ffn", "width", (384, 768, 1152)),
        ):
            steps = [Step.of(operator, keep=rng.choice(choices))]
            if rng.random() < 0.7:
                steps.append(Step.of("gptq", weights=8, activations=8, group=0))
            skipped = rng.random() < 0.25
            options[f"layers.{layer}.{part}"] = Option(
                (Step.of("skip"),) if skipped else tuple(steps)
            )
    if dense:
        return Candidate.of({unit: Option() for unit in options})
    return Candidate.of(options, Distillation(tokens=tokens, lr=3e-4, temperature=2.0))


def record(seed: int, **changes: Any) -> TrialRecord:
    """A finished trial near the budget, figures drawn by `seed`."""
    rng = random.Random(seed)
    chosen = candidate(seed)
    latency_ms = math.exp(rng.uniform(math.log(0.7), math.log(2.2)))
    size_bytes = int(rng.uniform(7.5e6, 14e6))
    quality = min(0.915, 0.86 + 0.035 * math.log(latency_ms / 0.7) + rng.uniform(-0.02, 0.02))
    made = TrialRecord(
        id=chosen.key[:10],
        kind="search",
        proposed_by=("milp", "evolution", "random")[seed % 3],
        state="complete",
        candidate=chosen,
        quality=quality,
        teacher_kl=rng.uniform(0.02, 0.2),
        metric={"name": "accuracy", "value": quality},
        measured=Measurement(
            "measured", latency_ms, size_bytes, int(90e6 + size_bytes), latency_ms * 1.1, 0.02, "d0"
        ),
        estimated=Measurement("estimated", latency_ms * rng.uniform(0.96, 1.04), size_bytes),
        seconds={"stitch": 0.5, "distil": 30.0, "export": 2.0, "evaluate": 3.0, "measure": 4.0},
        artifact=f"artifacts/{chosen.key[:10]}",
        finished_at="2025-01-01T00:00:00Z",
    )
    return replace(made, **changes)


def baselines() -> list[TrialRecord]:
    """Dense and four uniform baselines, as FACTS §11 measured them, roughly."""
    rows = [
        ("dense", "dense", 0.902, 6.5, 91.6e6),
        ("uniform-int8", "uniform", 0.906, 2.4, 23.6e6),
        ("uniform-int4", "uniform", 0.900, 4.1, 16.4e6),
        ("uniform-width-50%", "uniform", 0.884, 4.6, 70.0e6),
        ("uniform-width-25%", "uniform", 0.31, 3.7, 59.0e6),
    ]
    records = []
    for index, (name, kind, quality, latency_ms, size_bytes) in enumerate(rows):
        records.append(
            record(
                1000 + index,
                id=name,
                kind=kind,
                proposed_by="baseline",
                candidate=candidate(index, dense=kind == "dense", tokens=0),
                quality=quality,
                metric={"name": "accuracy", "value": quality},
                teacher_kl=0.0 if kind == "dense" else 0.02,
                measured=Measurement(
                    "measured", latency_ms, int(size_bytes), int(size_bytes + 90e6), device="d0"
                ),
                estimated=None,
            )
        )
    return records


def failed(seed: int) -> TrialRecord:
    """A failed trial."""
    return record(
        seed,
        id=f"bad{seed:07d}",
        state="failed",
        quality=None,
        teacher_kl=None,
        measured=None,
        artifact=None,
        error=f"the loss became NaN at step {seed}\nTraceback …",
    )


def records(count: int = 12) -> list[TrialRecord]:
    """Baselines, `count` trials, one failure."""
    return [*baselines(), *(record(seed) for seed in range(count)), failed(99)]


def view(trials: list[TrialRecord] | None = None, budget: Budget = BUDGET) -> dict[str, Any]:
    """The `front --json` shape of these records."""
    return front_json(
        "runs/quickstart",
        {"name": "onnxruntime-cpu", "workload": {"batch": 1, "sequence": 32, "threads": 1}},
        budget,
        records() if trials is None else trials,
    )


def on_two_runtimes(count: int = 6) -> list[TrialRecord]:
    """`records`, every other one on another runtime; dense on both."""
    made = [
        replace(each, candidate=replace(each.candidate, runtime=("onnxruntime", "openvino")[i % 2]))
        for i, each in enumerate(records(count))
    ]
    other = replace(
        made[0], id="dense-openvino", candidate=replace(made[0].candidate, runtime="openvino")
    )
    return [made[0], other, *made[1:]]
