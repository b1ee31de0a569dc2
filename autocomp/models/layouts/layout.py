"""The vocabulary of a layout: what an entry of the tables beside this file may say. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autocomp.core.unit import Role

Dimension = Literal["hidden", "queries", "keys", "width", "vocabulary", "positions", "labels"]
"""`queries` is heads × head_dim, `keys` is kv_heads × head_dim."""


@dataclass(frozen=True)
class SiteSpec:
    """A linear layer or table: where it is, and its shape in terms of the model's dimensions.

    `bias` may be a config key. `times` multiplies `columns` (DINOv2's classifier reads the class
    token beside the mean of the patches).
    """

    role: Role
    path: str
    rows: Dimension
    columns: Dimension
    bias: bool | str = True
    times: int = 1


@dataclass(frozen=True)
class SublayerSpec:
    """A sublayer's sites, paths relative to the block, and how to take it out.

    `zero`: modules that become a `Skip`, with the number of outputs the caller unpacks (attention
    modules return output and weights). `identity`: modules that then have nothing to do.
    """

    sites: tuple[SiteSpec, ...]
    zero: Mapping[str, int]
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigKeys:
    """Which config keys hold the dimensions. `None`: the model has none, or it follows.

    `kv_heads` falls back to `heads`; `head_dim` to `hidden / heads`; `width` to
    `hidden × width_times` where that is given. With `width_ratio`, the width is `hidden × ratio`.
    """

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = "head_dim"
    width: str = "intermediate_size"
    width_ratio: str | None = None
    width_times: int | None = None
    vocabulary: str | None = None
    positions: str | None = None


@dataclass(frozen=True)
class Layout:
    """Everything autocomp knows about one `model_type`.

    Attributes:
        model_type: as in config.json.
        prefix: name of the base model inside the task model.
        blocks: path of the list of blocks, inside the base model.
        attention, ffn: the sublayers of a block.
        embeddings: tables, inside the base model; empty where there is none (vision).
        heads: task → sites behind the blocks, paths in the task model. Also the list of tasks.
        dense_parts: linear layers and tables (paths in the task model) no unit covers → why.
        keys: config keys of the dimensions.
        defaults: values of config keys that config.json may leave out.
        unsupported: config key → values this entry does not describe; where the config holds a
            list, one such entry is enough.
        leading_tokens: tokens before an image's patches (class token, registers); 0 for text.
            Above 0, a block is `x + scale(module(norm(x)))` twice, with the norm first among a
            sublayer's `identity`, and its tokens can be merged or dropped between the two.
        averaged: the norm, inside the base model, whose patch tokens the head takes the mean of.
        tied: config key that says that the language-modeling head shares the embedding's weight.
        renames: (module name, name in older checkpoints) fragments; transformers converts these
            on load, and writes the older ones on save.
        transposed: linear layers inside a block that checkpoints store as `(columns, rows)`,
            transformers' `Conv1D`; paths relative to the block. They are turned on load.
        fused: layers of `transposed` that hold several sites → names of the sites below that path,
            in the order of their outputs. They are taken apart on load.
        normed_keys: whether attention norms the keys between their layer and the product.
        buffers: ends of the names of tensors in checkpoints that are no parameters.
        offset: config key; that value + 1 rows of the position table precede the first token's.
    """

    model_type: str
    prefix: str
    blocks: str
    attention: SublayerSpec
    ffn: SublayerSpec
    heads: Mapping[str, tuple[SiteSpec, ...]]
    embeddings: tuple[SiteSpec, ...] = ()
    dense_parts: Mapping[str, str] = field(default_factory=dict)
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    leading_tokens: int = 0
    averaged: str | None = None
    tied: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ("position_ids",)
    offset: str | None = None
    normed_keys: bool = False

    def block_path(self, layer: int) -> str:
        """Path of a block in the task model."""
        return f"{self.prefix}.{self.blocks}.{layer}"


def projections(parent: str, bias: bool | str, output_bias: bool | str) -> tuple[SiteSpec, ...]:
    """The four projections of attention as most models of transformers 5 name them."""
    return (
        SiteSpec("query", f"{parent}.q_proj", "queries", "hidden", bias),
        SiteSpec("key", f"{parent}.k_proj", "keys", "hidden", bias),
        SiteSpec("value", f"{parent}.v_proj", "keys", "hidden", bias),
        SiteSpec("output", f"{parent}.o_proj", "hidden", "queries", output_bias),
    )


def gated(bias: bool | str) -> tuple[SiteSpec, ...]:
    """The feed-forward sublayer of the Llama family."""
    return (
        SiteSpec("gate", "mlp.gate_proj", "width", "hidden", bias),
        SiteSpec("up", "mlp.up_proj", "width", "hidden", bias),
        SiteSpec("down", "mlp.down_proj", "hidden", "width", bias),
    )
