"""GPTQ and SparseGPT on one linear layer: seconds and output error by width.

Square layers with correlated inputs of uneven energy; the same weight, inputs and options can be
given to a peer (see `peer_solvers`). Processor seconds of one thread from the Gram matrix on, the
median of `REPEATS`; the error is that of the output relative to its energy, on the calibration
inputs. Damping is 1% of the mean diagonal, as peers have it.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.setting import cpu_seconds

WIDTHS = (384, 768, 2048, 4096)
REPEATS = 3
TOKENS_PER_COLUMN = 4


def run(options: Any) -> dict[str, float]:
    """Both solvers at every width."""
    import torch

    from autocomp.core.candidate import Step

    torch.set_num_threads(1)
    steps = {
        "gptq": Step.of("gptq", weights=4, activations=32, group=128),
        "sparsegpt": Step.of("sparsegpt", level=0.5),
        "sparsegpt_2_4": Step.of("sparsegpt", level="2:4"),
    }
    figures: dict[str, float] = {}
    for width in WIDTHS:
        weight, inputs = layer(width)
        gram = inputs.t() @ inputs
        for name, step in steps.items():
            repeats = REPEATS if width <= 2048 else 1
            found = [solve(step, weight, gram, len(inputs)) for _ in range(repeats)]
            figures[f"{name}_{width}_s"] = statistics.median(seconds for seconds, _ in found)
            figures[f"{name}_{width}_error_percent"] = 100 * found[0][1]
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


def solve(step: Any, weight: Any, gram: Any, tokens: int) -> tuple[float, float]:
    """Seconds and relative output error of one step on one layer."""
    from autocomp.calibrate.stats import SiteStats
    from autocomp.core.candidate import Option
    from autocomp.core.unit import Site, Unit, dense_format
    from autocomp.operators import apply_option
    from autocomp.operators.gram import output_error
    from autocomp.operators.protocol import SiteState

    width = len(weight)
    unit = Unit("head", "head", (Site("linear", "head", width, width, False),))
    state = {"linear": SiteState(weight, None, dense_format(unit)["linear"])}
    # As many tokens as make the damping least; a fresh matrix, so that nothing is remembered.
    stats = {"linear": SiteStats(gram.clone(), gram.new_zeros(width), max(tokens, 30 * width))}
    start = cpu_seconds()
    after = apply_option(unit, state, Option((step,)), stats)["linear"]
    seconds = cpu_seconds() - start
    return seconds, output_error(weight - after.weight, gram) / output_error(weight, gram)
