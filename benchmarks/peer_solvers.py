"""The layers of `solvers`, solved by llm-compressor: `python -m benchmarks.peer_solvers`.

No dependency of ours: run it in an environment of its own that has llmcompressor beside autocomp.
Prints seconds and output error of both; GPTQ is given our scales, so that the solvers are compared
and not the grids.
"""

from __future__ import annotations

from typing import Any

from benchmarks.setting import cpu_seconds
from benchmarks.solvers import layer, solve

WIDTHS = (384, 768, 2048)


def main() -> None:
    """Every width, both methods, both libraries."""
    import torch

    from autocomp.core.candidate import Step
    from autocomp.core.unit import SiteFormat
    from autocomp.operators.gram import output_error
    from autocomp.operators.quantize.grid import search_scales

    torch.set_num_threads(1)
    for width in WIDTHS:
        weight, inputs = layer(width)
        gram = inputs.t() @ inputs
        hessian = gram * (2 / len(inputs))
        scales = search_scales(weight, SiteFormat(width, width, False, weight_bits=4, group=128))
        energy = output_error(weight, gram)
        for label, step, peer in (
            ("SparseGPT 50%", Step.of("sparsegpt", level=0.5), lambda w, h, s: _sparse(w, h, 0, 0)),
            (
                "SparseGPT 2:4",
                Step.of("sparsegpt", level="2:4"),
                lambda w, h, s: _sparse(w, h, 2, 4),
            ),
            ("GPTQ", Step.of("gptq", weights=4, activations=32, group=128), _gptq),
        ):
            start = cpu_seconds()
            found = peer(weight.clone(), hessian.clone(), scales)
            theirs = cpu_seconds() - start, output_error(weight - found, gram) / energy
            ours = solve(step, weight, gram, len(inputs))
            print(
                f"{label}, {width}: ours {ours[0]:.3f} s, error {ours[1]:.4%}; "
                f"llm-compressor {theirs[0]:.3f} s, error {theirs[1]:.4%}",
                flush=True,
            )


def _sparse(weight: Any, hessian: Any, kept: int, group: int) -> Any:
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    module = torch.nn.Linear(*weight.t().shape, bias=False)
    module.weight.data = weight
    result = sparsify_weight(module, {module: hessian}, 0.5, kept, group, 128, 0.01, False)
    return (result[1] if isinstance(result, tuple) else result).detach()


def _gptq(weight: Any, hessian: Any, scales: Any) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=128, actorder="weight"
    )
    zeros = torch.zeros(scales.shape, dtype=torch.int8)
    return quantize_weight(weight[None], hessian[None], scales[None], zeros[None], None, args)[0][0]


if __name__ == "__main__":
    main()
