"""What replacing attention leaves of a model's quality, mixer by mixer and layer by layer.

Every mixer is trained in the place of single attention layers, as a search does it when it builds
its library (300 steps on the layer's recorded inputs). Then 1, 2, 3 and half of the layers are
replaced by it at once, and the model is compared with the one it came from: as stitched, and after
distilling the whole of it (logits, a few tokens). Nothing else is compressed. `no attention` skips
the same sublayers. Cells are kept as they are found, beside the library, so a run that was stopped
goes on.

One benchmark a model: `mixers_minilm`, `mixers_llama`, `mixers_dinov2`; the latter two read the
models and data that `search_spaces/llama_cpu.yaml` and `vit_cpu.yaml` name.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from autocomp.core.candidate import Candidate, Distillation, Option, Step
from benchmarks.setting import lines, prepared

SKIP = "skip"
TEXT = ("hedgehog", "elu", "retention", "mamba2", "rwkv6", "window", "convolution")
TWO_WAY = (*TEXT, "pooling")
IMAGES = (
    "hedgehog",
    "retention",
    "mamba2",
    "rwkv6",
    "window2d",
    "convolution",
    "pooling",
    "fourier",
)


@dataclass(frozen=True)
class Case:
    """A model and how much of it is replaced.

    Attributes:
        layers: whose attention is replaced, in this order.
        counts: how many of them at once.
        tokens, lr: of distilling the whole model.
    """

    spec: str
    mixers: tuple[str, ...]
    layers: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: int
    lr: float
    overrides: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "minilm": Case(
        "quickstart",
        TWO_WAY,
        layers=(3, 5, 1),
        counts=(1, 2, 3),
        tokens=40_960,
        lr=1e-4,
        overrides={
            "distill.batch": 4,
            "task.data.lines": None,  # whole articles
            "task.data.search": 200,
            "task.teacher": {"fit": "head"},
            "target.workload.sequence": 128,
        },
    ),
    "llama": Case(
        "llama_cpu",
        TEXT,
        layers=(3, 5, 1),
        counts=(1, 2, 3),
        tokens=65_536,
        lr=3e-4,
        overrides={
            "target.workload.sequence": 256,
            "task.data.search": 60,
            "task.data.distil": 512,
        },
    ),
    "dinov2": Case(
        "vit_cpu",
        IMAGES,
        layers=(7, 3, 11, 5, 1, 9),
        counts=(1, 2, 3, 6),
        tokens=20_480,
        lr=1e-5,
        overrides={
            "target.workload.image": 112,
            "task.data.search": 200,
            "task.data.distil": 2000,
            "distill.batch": 8,
        },
    ),
}


@dataclass(frozen=True)
class Cell:
    """One model to evaluate: the attention of `units` replaced by the mixer `name`, or skipped."""

    name: str
    units: tuple[str, ...]


def run_model(model: str) -> dict[str, float]:
    """`{mixer}_{k}_{local|kd}_{kl|quality|cosine}`, and per mixer what building its items took."""
    case = CASES[model]
    structure = {"replace": list(case.mixers), "skip": True}
    rules = [{"match": f"layers.{n}.attention", "structure": structure} for n in case.layers]
    overrides = {**case.overrides, "space": rules}
    with prepared(case.spec, overrides=overrides, progress=lines()) as setting:
        context = setting.context
        cells = [
            Cell(name, tuple(f"layers.{layer}.attention" for layer in case.layers[:count]))
            for count in case.counts
            for name in (*case.mixers, SKIP)
        ]
        figures: dict[str, float] = {}
        for cell, found in zip(cells, _evaluated(context, case, cells), strict=True):
            for figure, value in found.items():
                figures[f"{cell.name}_{len(cell.units)}_{figure}"] = value
        for name in case.mixers:
            figures |= {f"{name}_{k}": v for k, v in _building(context, case, name).items()}
    return figures


def _evaluated(context: Any, case: Case, cells: list[Cell]) -> list[dict[str, float]]:
    from autocomp.workers.actors import ActorPool
    from autocomp.workers.cluster import start

    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        print(f"  {done}/{total} models, {time.monotonic() - began:.0f} s", flush=True)

    with (
        start(None, None) as cluster,
        ActorPool(Evaluator, (context, case, _cache()), cluster.workers) as pool,
    ):
        return pool.map("evaluate", cells, progress)


class Evaluator:
    """Holds the original model, and what it makes of the search split. Resident in a worker."""

    BATCH = 16

    def __init__(self, context: Any, case: Case, cache: Path) -> None:
        import torch

        from autocomp.library.store import Library
        from autocomp.models.load import load_model
        from autocomp.tasks import make_task

        torch.set_num_threads(1)
        self._context, self._cache = context, cache
        self._settings = Distillation(case.tokens, case.lr, 2.0)
        self._library = Library(context.library_path)
        self._task = make_task(context.spec, context.model_path)
        self._teacher = load_model(context.teacher_path, self._task.name, self._task.num_labels)
        self._outputs = [self._run(self._teacher, batch) for batch in self._batches()]

    def evaluate(self, cell: Cell) -> dict[str, float]:
        """One cell's figures, computed unless they are known; those of the original beside them."""
        from autocomp.core.files import write_text_atomic
        from autocomp.core.hashing import content_key
        from autocomp.distill.trainer import DivergedError, distil
        from autocomp.library.stitch import stitch

        context = self._context
        candidate = _candidate(cell, context.units)
        items = [context.items.get((unit, candidate[unit].key), SKIP) for unit in cell.units]
        about = [context.teacher_path.name, self._task.fingerprint("search")]
        settings = [self._settings.to_json(), context.spec.distill.batch]
        key = content_key([items, list(cell.units), about, settings])
        path = self._cache / f"{key}.json"
        if path.exists():
            known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return known
        student = stitch(self._teacher, context.units, self._library, context.items, candidate)
        found = {f"local_{figure}": value for figure, value in self._compare(student).items()}
        student = copy.deepcopy(student)
        try:
            distil(
                student,
                self._teacher,
                self._task,
                self._settings,
                batch=context.spec.distill.batch,
                seed=0,
                gate=context.gate,
            )
        except DivergedError:
            found["kd_diverged"] = 1.0
        else:
            found |= {f"kd_{figure}": value for figure, value in self._compare(student).items()}
        found["dense_quality"] = self._compare(self._teacher)["quality"]
        write_text_atomic(path, json.dumps(found))
        return found

    def _compare(self, model: Any) -> dict[str, float]:
        """Teacher KL (nats), accuracy in % or perplexity, cosine of the mean final hidden state."""
        import torch

        from autocomp.tasks.divergence import teacher_kl

        kl = cosine = score = 0.0
        rows = scored = 0
        for batch, (logits, pooled) in zip(self._batches(), self._outputs, strict=True):
            found, its_mean = self._run(model, batch)
            kl += float(teacher_kl(logits, found)) * len(logits)
            cosine += float(torch.cosine_similarity(pooled, its_mean).sum())
            rows += len(logits)
            value, count = self._score(found, batch["labels"])
            score, scored = score + value, scored + count
        quality = score / scored
        return {
            "kl": kl / rows,
            "cosine": cosine / rows,
            "quality": math.exp(quality) if self._task.num_labels is None else 100 * quality,
        }

    def _batches(self) -> Any:
        return self._task.batches("search", self.BATCH)

    def _run(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """Logits, and the final hidden state's mean over real tokens `(B, C)`."""
        import torch

        seen: list[Any] = []
        base = getattr(model, model.base_model_prefix)
        handle = base.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        with torch.no_grad():
            logits = self._task.logits(model, batch)
        handle.remove()
        hidden, mask = seen[0], batch.get("attention_mask")
        if mask is None:
            return logits, hidden.mean(1)
        weight = mask[..., None].to(hidden.dtype)
        return logits, (hidden * weight).sum(1) / weight.sum(1)

    def _score(self, logits: Any, labels: Any) -> tuple[float, int]:
        """Right answers, or the negative log likelihood of tokens, and of how many."""
        if self._task.num_labels is not None:
            return float((logits.argmax(-1) == labels).sum()), len(labels)
        count = labels[:, 1:].numel()
        return float(self._task.loss(logits, labels)) * count, count


def _candidate(cell: Cell, units: Any) -> Candidate:
    step = Step.of("skip") if cell.name == SKIP else Step.of("replace", mixer=cell.name)
    return Candidate.of(
        {unit.name: Option((step,) if unit.name in cell.units else ()) for unit in units}
    )


def _building(context: Any, case: Case, name: str) -> dict[str, float]:
    """Of one mixer's items: seconds each, and the error left at the layer."""
    from autocomp.library.store import Library

    library = Library(context.library_path)
    option = Option((Step.of("replace", mixer=name),))
    built = [
        library.describe(context.items[f"layers.{layer}.attention", option.key]) or {}
        for layer in case.layers
    ]
    figures = {
        "build_s": mean(one["seconds"] for one in built),
        "error_percent": 100 * mean(one["training"]["error"] for one in built),
    }
    peaks = [one["peak_bytes"] for one in built if one.get("peak_bytes")]
    if peaks:
        figures["peak_mb"] = max(peaks) / 1e6
    return figures


def _cache() -> Path:
    from autocomp.api.prepare import cache_directory

    path = cache_directory() / "benchmarks" / "mixers"
    path.mkdir(parents=True, exist_ok=True)
    return path
