"""Small models and their export tasks for the tests of this room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from autocomp.core.unit import SiteFormat, Unit
from autocomp.models.conversion import to_linear
from autocomp.models.discover import find_units
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.models.surgery import replace_module
from autocomp.spec.schema import TargetSection, WorkloadSection
from autocomp.targets import make_target
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget
from autocomp.testing.target_contract import Sentences

SEQUENCE = 12
RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class TextTask(Sentences):
    """Export task of a text model; without `masked` there is no padding to speak of."""

    masked: bool = True

    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]:
        return self._given(super().dynamic_axes)

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        return self._given(super().example_inputs(batch, sequence))

    def _given(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: named[name] for name in named if self.masked or name == "input_ids"}


@dataclass(frozen=True)
class ImageTask:
    """Export task of an image model."""

    side: int = 16

    @property
    def dynamic_axes(self) -> Mapping[str, Mapping[int, str]]:
        return {"pixel_values": {0: "batch"}}

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {"pixel_values": torch.randn(batch, 3, self.side, self.side, generator=generator)}


_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_TEXT, "num_attention_heads": 4, "num_labels": 3},
    "llama": {
        **_TEXT,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        **_TEXT,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": 50,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "vit": {**_VISION, "intermediate_size": 64, "num_labels": 3},
    "deit": {
        **_VISION,
        "intermediate_size": 64,
        "num_labels": 3,
        "architectures": ["DeiTForImageClassification"],
    },
    "dinov2": {**_VISION, "mlp_ratio": 2, "num_labels": 3},
}
TASKS = {
    "bert": "text-classification",
    "llama": "language-modeling",
    "qwen3": "language-modeling",
    "gpt2": "language-modeling",
}


def small_model(layout: str, **changes: Any) -> tuple[nn.Module, list[Unit], TextTask | ImageTask]:
    """A random model with its units and its export task; `changes` are of its config."""
    task = TASKS.get(layout, "image-classification")
    auto = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "language-modeling": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
    }[task]
    config = transformers.AutoConfig.for_model(layout, **{**CONFIGS[layout], **changes})
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="sdpa").eval()
    for parameter in dict.fromkeys(model.parameters()):
        matrix = parameter.ndim > 1
        nn.init.normal_(parameter, std=0.2 if matrix else 0.1, mean=0.0 if matrix else 0.5)
    to_linear(model)
    units = find_units(config.to_dict(), {}, task, None if task == "language-modeling" else 3)
    return model, units, TextTask() if layout in TASKS else ImageTask()


def target(sequence: int = SEQUENCE, batch: int = 1) -> OnnxRuntimeTarget:
    """A single-threaded target; a single token makes it a decoding one."""
    return OnnxRuntimeTarget(WorkloadSection(batch=batch, sequence=sequence, threads=1))


def target_on(runtime: str, sequence: int = SEQUENCE) -> Any:
    """The same of any runtime; the test is skipped where an extra is not installed."""
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the runtime is an extra")
    workload = WorkloadSection(sequence=sequence, threads=1)
    return make_target(TargetSection(runtime=runtime, workload=workload))


def quantise_unit(
    model: nn.Module, unit: Unit, bits: int, group: int | None, activations: int
) -> None:
    """Round every site of a unit to nearest, in place."""
    for site in unit.sites:
        module: Any = model.get_submodule(site.name)
        weight = module.weight.detach()
        rows, columns = weight.shape
        width = group or columns
        padded = nn.functional.pad(weight, (0, -columns % width)).unflatten(1, (-1, width))
        scales = padded.abs().amax(-1) / (127 if bits == 8 else 7)
        bias = getattr(module, "bias", None)
        spec = SiteFormat(
            rows,
            columns,
            bias is not None,
            site.table,
            bits,
            group,
            32 if site.table else activations,
        )
        new: nn.Module
        if site.table:
            new = QuantEmbedding(weight.clone(), scales, module.padding_idx, spec)
        else:
            new = QuantLinear(weight.clone(), bias, scales, spec)
        replace_module(model, site.name, new.eval())
