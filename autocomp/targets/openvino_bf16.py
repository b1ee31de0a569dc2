"""OpenVINO computing in bfloat16: a runtime of its own, as precision is one of a whole model.

Models are written as for `openvino_cpu`, byte for byte, and compiled to compute in bfloat16, which
is the plugin's default on these processors. Of 384 → 1536 at 512 tokens (µs, float32 against
bfloat16, AVX512-BF16):

    float, unpacked   5690  3020   inputs and weights rounded to bfloat16, sums in float32
    dynamic           2270  2520   the same integers; what they are taken from was rounded before
    static            1810  1760   the same integers, bit for bit
    nbits, one token    49    51   as dynamic

So it is faster where sites are left in floats, and no faster where all of them are int8. What it
rounds (norms and sums between the sites among it) has 8 significant bits, a relative error of at
most 2⁻⁹ an operation. A dozen operations a block, whose errors are independent, and L blocks make
about √(12 L) · 2⁻⁹ / √3 of the spread of logits: 1% at 6 blocks, 1.4% at 12. That is inside the 5%
that a trial allows an artifact to differ from torch in the mean; a model that amplifies rounding is
allowed what a change by `rounding` makes in it. Every mixer and token reduction differs from torch
by at most 2¹⁶ times what it differs by in float32, so nothing here is refused for its precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.core.errors import UserError
from autocomp.targets import openvino_cpu
from autocomp.targets.openvino_cpu import OpenVinoSession, OpenVinoTarget, capabilities

if TYPE_CHECKING:
    import onnx
    import openvino

PRECISION = "bf16"


if "BF16" not in capabilities():
    raise UserError(
        "runtime openvino_bf16 needs a processor with instructions for bfloat16 (avx512_bf16, "
        "amx_bf16, or bf16 on Arm), which this one lacks. Use runtime openvino"
    )


def open_session(model: Path | openvino.Model, threads: int) -> OpenVinoSession:
    """A session as the card of an exported model opens it: bfloat16, `threads` threads."""
    return openvino_cpu.open_session(model, threads, PRECISION)


class OpenVinoBf16Target(OpenVinoTarget):
    """A model as OpenVINO IR that computes in bfloat16 on this machine's CPU."""

    name = "openvino_bf16-cpu"
    rounding = 2.0**-9
    """Largest relative error of one operation: half a unit of the last of 8 bits."""
    summary = "OpenVINO on a CPU with bfloat16: floats in bfloat16, int8, 4-bit weights"

    def describe(self) -> dict[str, Any]:
        """See `CpuTarget.describe`; and the precision."""
        return {**super().describe(), "precision": PRECISION}

    def open(self, model: Path | onnx.ModelProto) -> OpenVinoSession:
        """See `open_session`."""
        source = model if isinstance(model, Path) else self._read(model)
        return open_session(source, self.workload.threads)
