"""GPTQ and SparseGPT on one linear layer, beside llm-compressor: seconds and output error by width.

Square layers with correlated inputs of uneven energy; both sides get the same weight, Gram matrix,
damping (1% of the mean diagonal) and, for GPTQ, our scales, so that the solvers are compared and
not the grids. Processor seconds of one thread from the Gram matrix on, the sides alternating, the
median of `REPEATS`; ours include the search for the scales. The error is that of the output
relative to its energy, on the calibration inputs.

llm-compressor is no dependency. Without it the peer's columns stay empty; `INSTALL` says how to get
it for one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.setting import cpu_seconds

WIDTHS = (384, 768, 2048, 4096)
REPEATS = 3
TOKENS_PER_COLUMN = 4

METHODS = {
    "gptq": "GPTQ 4-bit, groups of 128",
    "sparsegpt": "SparseGPT 50%",
    "sparsegpt_2_4": "SparseGPT 2:4",
}
INSTALL = """\
llmcompressor is not installed: the peer is skipped. To have it for one run, in a directory that
can be deleted afterwards (its other requirements are not needed here):
  python -m pip install --no-deps --target peer llmcompressor==0.14.0.1 \\
      compressed-tensors==0.20.0 accelerate loguru psutil
  PYTHONPATH=peer python -m benchmarks peer_solvers"""

Solver = Callable[[], tuple[float, float]]
"""Seconds and relative output error."""


def run(options: Any) -> dict[str, float]:
    """Every method at every width: `{method}_{width}_{side}_s` and `_error_percent`."""
    import torch

    torch.set_num_threads(1)
    with_peer = find_spec("llmcompressor") is not None
    if not with_peer:
        print(INSTALL, flush=True)
    figures: dict[str, float] = {}
    for width in WIDTHS:
        weight, inputs = layer(width)
        gram = inputs.t() @ inputs
        ours, peers = _ours(weight, gram, len(inputs)), _peers(weight, gram, len(inputs))
        for method in METHODS:
            sides = {"ours": ours[method]} | ({"peer": peers[method]} if with_peer else {})
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            for _ in range(REPEATS if width <= 2048 else 1):
                for side, solver in sides.items():
                    found[side].append(solver())
            for side, runs in found.items():
                name = f"{method}_{width}_{side}"
                figures[f"{name}_s"] = statistics.median(seconds for seconds, _ in runs)
                figures[f"{name}_error_percent"] = 100 * runs[0][1]
    return figures


def layer(width: int) -> tuple[Any, Any]:
    """Weight `(width, width)` and inputs `(tokens, width)`, float32, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    mixing *= torch.linspace(-2.0, 1.0, width).exp()
    tokens = TOKENS_PER_COLUMN * width
    inputs = torch.randn(tokens, width, generator=generator) @ mixing.t()
    return torch.randn(width, width, generator=generator) * 0.02, inputs


def _ours(weight: Any, gram: Any, tokens: int) -> dict[str, Solver]:
    from autocomp.core.candidate import Step

    steps = {
        "gptq": Step.of("gptq", weights=4, activations=32, group=128),
        "sparsegpt": Step.of("sparsegpt", level=0.5),
        "sparsegpt_2_4": Step.of("sparsegpt", level="2:4"),
    }
    return {
        name: lambda step=step: _apply(step, weight, gram, tokens)  # type: ignore[misc]
        for name, step in steps.items()
    }


def _apply(step: Any, weight: Any, gram: Any, tokens: int) -> tuple[float, float]:
    from autocomp.calibrate.stats import SiteStats
    from autocomp.core.candidate import Option
    from autocomp.core.unit import Site, Unit, dense_format
    from autocomp.operators import apply_option
    from autocomp.operators.protocol import SiteState

    width = len(weight)
    unit = Unit("head", "head", (Site("linear", "head", width, width, False),))
    state = {"linear": SiteState(weight, None, dense_format(unit)["linear"])}
    # As many tokens as make the damping least; a fresh matrix, so that nothing is remembered.
    stats = {"linear": SiteStats(gram.clone(), gram.new_zeros(width), max(tokens, 30 * width))}
    start = cpu_seconds()
    after = apply_option(unit, state, Option((step,)), stats)["linear"]
    return cpu_seconds() - start, _error(weight, after.weight, gram)


def _peers(weight: Any, gram: Any, tokens: int) -> dict[str, Solver]:
    hessian = gram * (2 / tokens)

    def timed(solve: Callable[[Any, Any], Any]) -> tuple[float, float]:
        given = weight.clone(), hessian.clone()
        start = cpu_seconds()
        found = solve(*given)
        return cpu_seconds() - start, _error(weight, found, gram)

    return {
        "gptq": lambda: timed(_gptq(weight)),
        "sparsegpt": lambda: timed(lambda w, h: _sparse(w, h, 0, 0)),
        "sparsegpt_2_4": lambda: timed(lambda w, h: _sparse(w, h, 2, 4)),
    }


def _sparse(weight: Any, hessian: Any, kept: int, group: int) -> Any:
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    module = torch.nn.Linear(*weight.t().shape, bias=False)
    module.weight.data = weight
    result = sparsify_weight(module, {module: hessian}, 0.5, kept, group, 128, 0.01, False)
    return (result[1] if isinstance(result, tuple) else result).detach()


def _gptq(weight: Any) -> Callable[[Any, Any], Any]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    from autocomp.core.unit import SiteFormat
    from autocomp.operators.quantize.grid import search_scales

    form = SiteFormat(weight.shape[0], weight.shape[1], False, weight_bits=4, group=128)
    scales = search_scales(weight, form)
    zeros = torch.zeros(scales.shape, dtype=torch.int8)
    args = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=128, actorder="weight"
    )

    def solve(weight: Any, hessian: Any) -> Any:
        given = weight[None], hessian[None], scales[None], zeros[None]
        return quantize_weight(*given, None, args)[0][0]

    return solve


def _error(weight: Any, found: Any, gram: Any) -> float:
    from autocomp.operators.gram import output_error

    return output_error(weight - found, gram) / output_error(weight, gram)
