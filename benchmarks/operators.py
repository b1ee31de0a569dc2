"""What each operator buys on each runtime: latency and bytes of a whole model, of dense.

One operator at a time on every unit it is for, the rest dense; latency of the lowered graph with
made-up weights (it does not depend on their values) and bytes of the files written. The text
operators on the quickstart's MiniLM at 32 tokens, those that shorten a sequence on a vision
transformer of DINOv2-small's shape at 224 pixels. `token`: a generated token of the small Llama of
`cost_table_decode` after a prompt of 128. What a runtime does not offer has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from benchmarks.setting import quickstart

RUNTIMES = ("onnxruntime", "openvino", "openvino_bf16")
GENERATING = ("onnxruntime", "openvino")
"""Runtimes whose generated token is timed too."""
REPEATS = 5
"""Of each figure: dense and the case one after the other, the median of their ratios."""
TIMING = {"runs": 12, "rounds": 3, "seconds": 0.1}
THRESHOLD_PERCENT = 5.0
"""What must be gained for a verdict to call it a gain."""


def _bits(method: str, weights: Any, activations: Any = "dense", group: int = 32) -> dict[str, Any]:
    return {
        "method": method,
        "weights": [weights],
        "activations": [activations],
        "group": group,
        "range": "mse",
        "migration": [0.5],
        "per_site": False,
    }


NO_TOKEN = ("tome", "prune", "fuse", "vocabulary", "tablerank")
"""Cases that a model that generates, or one with a tied table, does not offer."""
LINEAR = ("attention", "ffn")
TABLE = ("embedding",)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "heads": ("heads: half", ("attention",), {"structure": {"heads": [0.5]}}),
    "width": ("width: half", ("ffn",), {"structure": {"width": [0.5]}}),
    "skip": ("skip: every second layer", LINEAR, {"structure": {"skip": True}}),
    "rank": ("rank: half", LINEAR, {"structure": {"rank": [0.5]}}),
    "w8": ("gptq, rtn, hqq: 8-bit weights", LINEAR, {"bits": _bits("gptq", 8)}),
    "w8a8": ("the same, activations dynamic", LINEAR, {"bits": _bits("gptq", 8, 8)}),
    "w8a8s": ("the same, activations static", LINEAR, {"bits": _bits("gptq", 8, "static")}),
    "w4": ("4-bit weights", LINEAR, {"bits": _bits("gptq", 4)}),
    "w4a8": ("4-bit weights, activations dynamic", LINEAR, {"bits": _bits("gptq", 4, 8)}),
    "w3a8": ("3-bit weights, activations dynamic", LINEAR, {"bits": _bits("gptq", 3, 8)}),
    "w2a8": ("2-bit weights, activations dynamic", LINEAR, {"bits": _bits("gptq", 2, 8)}),
    "w3": ("3-bit weights", LINEAR, {"bits": _bits("gptq", 3)}),
    "w2": ("2-bit weights", LINEAR, {"bits": _bits("gptq", 2)}),
    "awq": ("awq: 4-bit weights", LINEAR, {"bits": _bits("awq", 4)}),
    "awq8": ("awq: 4-bit weights, activations dynamic", LINEAR, {"bits": _bits("awq", 4, 8)}),
    "awqgptq": ("awq_gptq: 4-bit weights, dynamic", LINEAR, {"bits": _bits("awq_gptq", 4, 8)}),
    "smooth": ("smoothquant: 8 bits, dynamic", LINEAR, {"bits": _bits("smoothquant", 8, 8)}),
    "smooths": ("smoothquant: 8 bits, static", LINEAR, {"bits": _bits("smoothquant", 8, "static")}),
    "sparse": (
        "sparsegpt, wanda, magnitude: half",
        LINEAR,
        {"sparsity": {"method": "sparsegpt", "levels": [0.5]}},
    ),
    "sparse8": (
        "sparsegpt 2:4 + gptq, 8 bits, dynamic",
        LINEAR,
        {"sparsity": {"method": "sparsegpt", "levels": ["2:4"]}, "bits": _bits("gptq", 8, 8)},
    ),
    "sparse48": (
        "sparsegpt 4:8 + gptq, 8 bits, dynamic",
        LINEAR,
        {"sparsity": {"method": "sparsegpt", "levels": ["4:8"]}, "bits": _bits("gptq", 8, 8)},
    ),
    "cache8": ("kv_cache: 8 bits", ("attention",), {"bits": {"cache": [8]}}),
    "table8": ("embeddings, rtn or hqq: 8 bits", TABLE, {"bits": _bits("rtn", 8)}),
    "table4": ("embeddings, rtn or hqq: 4 bits", TABLE, {"bits": _bits("rtn", 4)}),
    "tablerank": ("embeddings: rank, half", TABLE, {"structure": {"rank": [0.5]}}),
    "vocabulary": (
        "vocabulary: 5,000 tokens",
        TABLE,
        {"structure": {"vocabulary": {"keep": 5000, "unknown": 100}}},
    ),
    "tome": ("tome: a tenth per layer", ("attention",), {"tokens": ("tome", 0.1)}),
    "prune": ("token_prune: a tenth per layer", ("attention",), {"tokens": ("token_prune", 0.1)}),
    "fuse": ("token_fuse: a tenth per layer", ("attention",), {"tokens": ("token_fuse", 0.1)}),
}
"""Case → label, kinds of units, rule."""
OPERATORS: dict[str, tuple[str, ...]] = {
    "heads": ("heads",),
    "width": ("width",),
    "skip": ("skip",),
    "rank": ("rank", "tablerank"),
    "gptq": ("w8", "w8a8", "w8a8s", "w4", "w4a8"),
    "awq": ("awq", "awq8"),
    "awq_gptq": ("awqgptq",),
    "smoothquant": ("smooth", "smooths"),
    "sparsegpt": ("sparse",),
    "vocabulary": ("vocabulary",),
    "kv_cache": ("cache8",),
    "tome": ("tome",),
    "token_prune": ("prune",),
    "token_fuse": ("fuse",),
}
"""Operator → the cases that show what it alone buys."""


def verdict(latencies_percent: Sequence[float], size_percent: float) -> str:
    """`speed`, `bytes`, both or `neither`, of figures in percent of dense."""
    limit = 100 - THRESHOLD_PERCENT
    gains = {"speed": any(one < limit for one in latencies_percent), "bytes": size_percent < limit}
    return ", ".join(gain for gain, found in gains.items() if found) or "neither"


def run(options: Any) -> dict[str, float]:
    """Percent of dense, per case and runtime."""
    figures: dict[str, float] = {}
    with quickstart(library=False) as setting, TemporaryDirectory() as directory:
        import onnx

        text = (
            setting.plan.units,
            onnx.load(setting.context.skeleton_path),
            _inputs(setting.teacher.task, setting.plan.spec.target.workload),
        )
        vision, decoder = _vision(), _decoder(Path(directory))
        for runtime in RUNTIMES:
            for images, (units, skeleton, inputs) in ((False, text), (True, vision)):
                target = _target(setting.plan.spec.target, runtime, images)
                cases = {c: case for c, case in CASES.items() if ("tokens" in case[2]) == images}
                found = _percent(target, units, skeleton, inputs, cases, Path(directory))
                figures |= {f"{runtime}_{name}": value for name, value in found.items()}
        for runtime in GENERATING:
            target = _target(setting.plan.spec.target, runtime, False, prompt=128, generate=32)
            cases = {c: case for c, case in CASES.items() if c not in NO_TOKEN}
            found = _percent(target, *decoder, cases, Path(directory))
            figures |= {f"{runtime}_token_{name}": value for name, value in found.items()}
    return figures


def _percent(
    target: Any,
    units: Any,
    skeleton: Any,
    inputs: Any,
    cases: Mapping[str, tuple[str, tuple[str, ...], dict[str, Any]]],
    scratch: Path,
) -> dict[str, float]:
    """`{case}_latency_percent` and `{case}_size_percent` of one model on one runtime."""
    from autocomp.core.unit import dense_format
    from autocomp.operators import option_formats, token_reduction
    from autocomp.targets.profile import lower_formats
    from autocomp.targets.profile_pieces import in_range

    def opened(formats: Any, reductions: Any = None) -> tuple[Callable[[], float], int]:
        """Times the model whenever it is called; and its bytes on disk."""
        lowered = lower_formats(target, skeleton, units, formats, reductions)
        size = target.write(lowered, scratch / "model").size_bytes
        session, feeds = target.open(lowered), in_range(inputs, formats)

        def latency_ms() -> float:
            ms: float = target.to_ms(target.time_session(session, feeds, **TIMING))
            return ms

        return latency_ms, size

    dense = {unit.name: dense_format(unit) for unit in units}
    whole_ms, whole_bytes = opened(dense)
    figures = {}
    for case, (_, kinds, rule) in cases.items():
        formats, reductions = dict(dense), {}
        for unit in units:
            if unit.kind in kinds and not (case == "skip" and (unit.layer or 0) % 2):
                option = _option(unit, rule)
                formats[unit.name] = option_formats(unit, option)
                shorter = token_reduction(unit, option)
                if shorter is not None:
                    reductions[unit.name] = shorter
        sites = [one for unit in formats.values() for one in unit.values()]
        if any(target.formats_supported(one) is not None for one in sites):
            continue
        print(f"  {target.name}: {case}", flush=True)
        case_ms, size_bytes = opened(formats, reductions or None)
        ratio = median(case_ms() / whole_ms() for _ in range(REPEATS))
        figures[f"{case}_latency_percent"] = 100 * ratio
        figures[f"{case}_size_percent"] = 100 * size_bytes / whole_bytes
    return figures


def _option(unit: Any, rule: Mapping[str, Any]) -> Any:
    """The one option of a rule that is not dense."""
    from autocomp.operators import unit_options
    from autocomp.operators.protocol import Rule

    asked = dict(rule)
    if "tokens" in asked:
        method, ratio = asked["tokens"]
        asked["tokens"] = {"method": method, "ratios": [ratio]}
    return next(option for option in unit_options(unit, Rule(**asked)) if not option.dense)


def _target(section: Any, runtime: str, images: bool, **generation: int) -> Any:
    from dataclasses import asdict

    from autocomp.targets import make_target

    workload = section.workload.model_copy(update=generation)
    if images:
        workload = workload.model_copy(update={"image": 224})
    target = make_target(section.model_copy(update={"runtime": runtime, "workload": workload}))
    asdict(target.record_reference())
    return target


def _inputs(task: Any, workload: Any) -> dict[str, Any]:
    tensors = task.example_inputs(workload.batch, workload.sequence)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _decoder(scratch: Path) -> tuple[Any, Any, Any]:
    """Units, skeleton with a cache and inputs of the small Llama of `cost_table_decode`."""
    from autocomp.models.discover import find_units
    from autocomp.targets.skeleton import export_skeleton
    from benchmarks.cost_table_decode import Tokens, random_llama

    model = random_llama(scratch / "llama")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    units = tuple(find_units(model.config.to_dict(), shapes, "language-modeling", None))
    inputs = {name: ids.numpy() for name, ids in Tokens().example_inputs(1, 128).items()}
    return units, export_skeleton(model, units, Tokens(), decode=True), inputs


class _Images:
    """What exporting asks of a task: one image of 224 pixels."""

    dynamic_axes: ClassVar = {"pixel_values": {0: "batch"}}

    def example_inputs(self, batch: int, sequence: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator)}


def _vision() -> tuple[Any, Any, Any]:
    """Units, skeleton and inputs of a random DINOv2-small."""
    import torch
    from transformers import Dinov2Config, Dinov2ForImageClassification

    from autocomp.models.discover import find_units
    from autocomp.targets.skeleton import export_skeleton

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    config.num_labels = 10
    model = Dinov2ForImageClassification(config).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    units = tuple(find_units(config.to_dict(), shapes, "image-classification", 10))
    task = _Images()
    inputs = {k: v.numpy() for k, v in task.example_inputs(1, 0).items()}
    return units, export_skeleton(model, units, task), inputs
