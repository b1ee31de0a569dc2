"""Memory while library items of a wide block are built: 4096 hidden, 11,008 feed-forward.

A Llama-like block of random weights, with Gram matrices of random inputs, written once; a fresh
process per case builds options of one unit as a worker does (`build_worker`). Its peak is resident
memory, less what it held after its imports; beside it stand the weights and the Gram matrices it
reads. A Gram matrix alone is 485 MB in the feed-forward sublayer: it is what the peak is made of.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HIDDEN, WIDTH, HEADS = 4096, 11_008, 32
TOKENS = 512
MB = 1e6

_GPTQ4 = ("gptq", {"weights": 4, "activations": 32, "group": 128})
_HALF = ("width", {"keep": WIDTH // 2})
CASES: dict[str, tuple[str, tuple[tuple[tuple[str, Mapping[str, Any]], ...], ...]]] = {
    "attention_gptq": ("attention", ((_GPTQ4,),)),
    "ffn_gptq": ("ffn", ((_GPTQ4,),)),
    "ffn_sparse_gptq": ("ffn", ((("sparsegpt", {"level": 0.5}), _GPTQ4),)),
    "ffn_three": ("ffn", ((_GPTQ4,), (_HALF,), (_HALF, _GPTQ4))),
}
"""Case → unit, and the steps of each option that is built."""


def run(options: Any) -> dict[str, float]:
    """`{case}_peak_mb`, `_s` for every case; what a unit's weights and Gram matrices take."""
    figures: dict[str, float] = {}
    with TemporaryDirectory(prefix="autocomp-benchmark-") as directory:
        scratch = Path(directory)
        units, files = _block(scratch)
        for name, unit in units.items():
            figures[f"{name}_weights_mb"] = 4 * unit.parameters / MB
            figures[f"{name}_gram_mb"] = files[name].stat().st_size / MB
        for case, (name, built) in CASES.items():
            figures |= _case(scratch, case, units[name], files[name], built)
    return figures


def _case(scratch: Path, case: str, unit: Any, file: Path, built: Any) -> dict[str, float]:
    from autocomp.core.candidate import Option, Step
    from autocomp.library.build import BuildTask

    steps = [tuple(Step.of(name, **args) for name, args in option) for option in built]
    keyed = tuple((Option(option), f"{case}-{at}") for at, option in enumerate(steps))
    task = BuildTask(scratch / "model", unit, keyed, file, scratch / "library")
    tasks = scratch / "tasks.pickle"
    tasks.write_bytes(pickle.dumps([task]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.build_worker", str(tasks)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    peak, imports, seconds = map(float, done.stdout.split())
    return {f"{case}_peak_mb": (peak - imports) / MB, f"{case}_s": seconds}


def _block(scratch: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Units of the only layer of a Llama on disk, and their files of statistics."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from autocomp.calibrate.stats import SiteStats, save_stats
    from autocomp.models.discover import find_units

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape)
            for name, value in LlamaForCausalLM(config).state_dict().items()
        }
    generator = torch.Generator().manual_seed(0)
    (scratch / "model").mkdir()
    config.save_pretrained(scratch / "model")
    save_file(
        {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()},
        scratch / "model" / "model.safetensors",
    )
    units = find_units(config.to_dict(), shapes, "language-modeling", 0)
    units = {unit.kind: unit for unit in units if unit.layer == 0}
    files = {}
    for name, unit in units.items():
        made: dict[str, SiteStats] = {}
        stats = {}
        for site in unit.sites:
            shared = "input" if site.role in ("query", "key", "value", "gate", "up") else site.name
            if shared not in made:
                x = torch.randn(TOKENS, site.columns, generator=generator)
                # As many tokens as such a matrix would be made of; fewer are drawn, to save time.
                made[shared] = SiteStats(x.t() @ x, x.mean(dim=0), 30 * site.columns)
            stats[site.name] = made[shared]
        files[name] = scratch / f"{name}.safetensors"
        save_stats(files[name], stats)
    return units, files
