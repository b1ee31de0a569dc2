"""Small random models, one per layout, for the tests of this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from autocomp.core.unit import Unit
from autocomp.models.conversion import to_linear
from autocomp.models.discover import find_units


@dataclass(frozen=True)
class Example:
    """A layout's smallest model that still has several heads, layers and (Llama) groups."""

    model_type: str
    task: str
    config: dict[str, Any]
    labels: int | None = 3

    def model(self, **changes: Any) -> nn.Module:
        """The task model with random weights of a usable spread, in evaluation mode."""
        config = self.full_config(**changes)
        torch.manual_seed(0)
        auto = {
            "text-classification": transformers.AutoModelForSequenceClassification,
            "image-classification": transformers.AutoModelForImageClassification,
            "language-modeling": transformers.AutoModelForCausalLM,
        }[self.task]
        config.architectures = config.architectures or []
        model = auto.from_config(config, attn_implementation="sdpa")
        for parameter in dict.fromkeys(model.parameters()):
            spread = 0.3 if parameter.ndim > 1 else 0.1
            nn.init.normal_(parameter, std=spread, mean=0.0 if parameter.ndim > 1 else 0.5)
        model.config.use_cache = False
        to_linear(model)
        return model.eval()

    def full_config(self, **changes: Any) -> Any:
        """The transformers config."""
        arguments = {**self.config, **changes}
        if self.labels is not None:
            arguments["num_labels"] = self.labels
        return transformers.AutoConfig.for_model(self.model_type, **arguments)

    def units(self, **changes: Any) -> list[Unit]:
        """The units, from the config alone."""
        return find_units(self.full_config(**changes).to_dict(), {}, self.task, self.labels)

    def inputs(self, batch: int = 3) -> dict[str, torch.Tensor]:
        """A batch; text of different lengths."""
        torch.manual_seed(1)
        if self.task == "image-classification":
            return {"pixel_values": torch.randn(batch, 3, 16, 16)}
        ids = torch.randint(2, self.config["vocab_size"], (batch, 7))
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, 7 - row :] = 0
        return {"input_ids": ids, "attention_mask": mask}


_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

_DECODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
_ENCODER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}

EXAMPLES = {
    example.model_type: example
    for example in (
        Example("bert", "text-classification", _ENCODER),
        Example("roberta", "text-classification", {**_ENCODER, "pad_token_id": 1}),
        Example(
            "distilbert",
            "text-classification",
            {
                "vocab_size": 50,
                "dim": 24,
                "n_layers": 3,
                "n_heads": 4,
                "hidden_dim": 40,
                "max_position_embeddings": 16,
            },
        ),
        Example("vit", "image-classification", {**_VISION, "intermediate_size": 40}),
        Example("deit", "image-classification", {**_VISION, "intermediate_size": 40}),
        Example("dinov2", "image-classification", {**_VISION, "mlp_ratio": 2}),
        Example("llama", "language-modeling", {**_DECODER, "head_dim": 8}, labels=None),
        Example("qwen2", "language-modeling", _DECODER, labels=None),
        Example("qwen3", "language-modeling", {**_DECODER, "head_dim": 8}, labels=None),
        Example(
            "gpt2",
            "language-modeling",
            {
                "vocab_size": 50,
                "n_embd": 24,
                "n_layer": 3,
                "n_head": 4,
                "n_inner": 40,
                "n_positions": 16,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            labels=None,
        ),
    )
}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of the task model, no gradient."""
    with torch.no_grad():
        output: torch.Tensor = model(**inputs).logits
    return output
