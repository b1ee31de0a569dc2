"""From codes and scales to the state of a site: every quantising operator ends here.

Needs torch.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError
from autocomp.core.unit import SiteFormat
from autocomp.models.codes import dequantise
from autocomp.operators.protocol import SiteState, SiteStats
from autocomp.operators.quantize.ranges import static_range


def quantised_site(
    site: SiteState,
    codes: Tensor,
    scales: Tensor,
    format: SiteFormat,
    step: Step,
    stats: SiteStats | None,
    input_scale: Tensor | None = None,
) -> SiteState:
    """`site` with its weight replaced by `codes` times `scales`, in `format`.

    Where activations are static, their range is fixed here, from `stats`. `input_scale (columns,)`
    is what inputs are multiplied by; `codes` times `scales` is the weight divided by it.
    """
    input_range = None
    if format.static:
        if stats is None:
            raise InternalError(f"{step.label()}: static activations need calibration statistics")
        input_range = static_range(stats, step["range"], site.kept_columns, input_scale)
    return replace(
        site,
        weight=dequantise(codes, scales, format),
        codes=codes,
        scales=scales,
        format=format,
        input_scale=input_scale,
        input_range=input_range,
    )
