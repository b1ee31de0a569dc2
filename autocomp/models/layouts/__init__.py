"""How models are laid out: one declarative entry per `model_type`, nothing else to write. No torch.

An entry names the places (module paths as transformers builds them), says which config keys hold
the dimensions, and how a sublayer is taken out. To add a layout, write one `Layout(...)` in the
file of its family, put it in `LAYOUTS`, and add a small config of that model to
`tests/models/model_examples.py`: the tests of discovery, surgery, calibration and lowering, and the
whole chain from calibration to a verified artifact, run over every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocomp.core.errors import ModelError, did_you_mean
from autocomp.models.layouts.decoders import GPT2, LLAMA, QWEN2, QWEN3
from autocomp.models.layouts.encoders import BERT, DISTILBERT, ROBERTA
from autocomp.models.layouts.layout import ConfigKeys, Dimension, Layout, SiteSpec, SublayerSpec
from autocomp.models.layouts.vision import DEIT, DINOV2, VIT

__all__ = [
    "LAYOUTS",
    "ConfigKeys",
    "Dimension",
    "Layout",
    "SiteSpec",
    "SublayerSpec",
    "first_position",
    "layout_of",
]

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout
    for layout in (BERT, ROBERTA, DISTILBERT, VIT, DEIT, DINOV2, LLAMA, QWEN2, QWEN3, GPT2)
}
"""`model_type` → layout."""


def layout_of(model_type: str, parts: str = "") -> Layout:
    """The layout of a `model_type`; `parts` describes the model's tensors for the message.

    Raises:
        ModelError: when there is none, saying what was found and how to add an entry.
    """
    if model_type not in LAYOUTS:
        raise ModelError(
            f"no layout for model_type {model_type!r}.{did_you_mean(model_type, LAYOUTS)} "
            f"Known: {', '.join(sorted(LAYOUTS))}. To add one, describe it by one Layout(...) "
            f"entry in autocomp/models/layouts/.{parts}"
        )
    return LAYOUTS[model_type]


def first_position(config: Mapping[str, Any]) -> int:
    """The row of the position table that a text's first token reads; 0 for an unknown layout."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None or layout.offset is None:
        return 0
    value = config.get(layout.offset)
    return 1 + int(layout.defaults[layout.offset] if value is None else value)
