"""Run in a process of its own: load an exported directory with stock transformers, save its logits.

    python -P reload.py DIRECTORY AUTO_CLASS INPUTS.safetensors LOGITS.safetensors

Nothing of autocomp is imported: what loads here loads anywhere. `logits` are those of the weights
alone; where activations are quantised too, `served` are with them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(directory: str, auto_class: str, inputs: str, output: str) -> None:
    """Write the logits of the model in `directory` on `inputs`."""
    torch.set_num_threads(1)
    model: Any = getattr(transformers, auto_class).from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    )
    feeds = load_file(inputs)
    logits = {"logits": _logits(model.eval(), feeds)}
    if getattr(model.config, "quantization_config", None) is not None:
        logits["served"] = logits["logits"]
        for module in model.modules():
            module.quantization_enabled = False  # weights are decompressed by the first run
        logits["logits"] = _logits(model, feeds)
    if "autocomp" in sys.modules:
        raise SystemExit("autocomp was imported")
    save_file(logits, output)


def _logits(model: Any, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**feeds).logits
    return logits.float().contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
