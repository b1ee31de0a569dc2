"""How models are laid out: one declarative entry per `model_type`, nothing else to write. No torch.

An entry names the places (module paths as transformers builds them), says which config keys hold
the dimensions, and how a sublayer is taken out. To add a layout, write one `Layout(...)`, put it in
`LAYOUTS`, and add a small config of that model to `tests/models/model_examples.py`: the tests of
discovery and surgery run over every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autocomp.core.errors import ModelError, did_you_mean
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

    `kv_heads` falls back to `heads`; `head_dim` to `hidden / heads`; with `width_ratio`, the width
    is `hidden × ratio`.
    """

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = "head_dim"
    width: str = "intermediate_size"
    width_ratio: str | None = None
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
        unsupported: config key → value this entry does not describe.
        leading_tokens: tokens before an image's patches (class token, registers); 0 for text.
            Above 0, a block is `x + scale(module(norm(x)))` twice, with the norm first among a
            sublayer's `identity`, and its tokens can be merged or dropped between the two.
        averaged: the norm, inside the base model, whose patch tokens the head takes the mean of.
        tied: config key that says that the head shares the embedding's weight.
        renames: (module name, name in older checkpoints) fragments; transformers converts these
            on load, and writes the older ones on save.
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
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    leading_tokens: int = 0
    averaged: str | None = None
    tied: str | None = None
    renames: tuple[tuple[str, str], ...] = ()

    def block_path(self, layer: int) -> str:
        """Path of a block in the task model."""
        return f"{self.prefix}.{self.blocks}.{layer}"


def _projections(parent: str, bias: bool | str, output_bias: bool | str) -> tuple[SiteSpec, ...]:
    """The four projections of attention as most models of transformers 5 name them."""
    return (
        SiteSpec("query", f"{parent}.q_proj", "queries", "hidden", bias),
        SiteSpec("key", f"{parent}.k_proj", "keys", "hidden", bias),
        SiteSpec("value", f"{parent}.v_proj", "keys", "hidden", bias),
        SiteSpec("output", f"{parent}.o_proj", "hidden", "queries", output_bias),
    )


BERT = Layout(
    model_type="bert",
    prefix="bert",
    blocks="encoder.layer",
    attention=SublayerSpec(
        sites=(
            SiteSpec("query", "attention.self.query", "queries", "hidden"),
            SiteSpec("key", "attention.self.key", "keys", "hidden"),
            SiteSpec("value", "attention.self.value", "keys", "hidden"),
            SiteSpec("output", "attention.output.dense", "hidden", "queries"),
        ),
        zero={"attention.self": 2, "attention.output.dense": 1},
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("up", "intermediate.dense", "width", "hidden"),
            SiteSpec("down", "output.dense", "hidden", "width"),
        ),
        zero={"intermediate": 1, "output.dense": 1},
    ),
    embeddings=(
        SiteSpec("embedding", "embeddings.word_embeddings", "vocabulary", "hidden", bias=False),
        SiteSpec("position", "embeddings.position_embeddings", "positions", "hidden", bias=False),
    ),
    heads={
        "text-classification": (
            SiteSpec("pooler", "bert.pooler.dense", "hidden", "hidden"),
            SiteSpec("head", "classifier", "labels", "hidden"),
        )
    },
    dense_parts={
        "bert.embeddings.token_type_embeddings": "two rows",
    },
    keys=ConfigKeys(head_dim=None, vocabulary="vocab_size", positions="max_position_embeddings"),
    unsupported={"is_decoder": True, "add_cross_attention": True},
)

VIT = Layout(
    model_type="vit",
    prefix="vit",
    blocks="layers",
    attention=SublayerSpec(
        sites=_projections("attention", bias="qkv_bias", output_bias=True),
        zero={"attention": 2},
        identity=("layernorm_before",),
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("up", "mlp.fc1", "width", "hidden"),
            SiteSpec("down", "mlp.fc2", "hidden", "width"),
        ),
        zero={"mlp": 1},
        identity=("layernorm_after",),
    ),
    heads={"image-classification": (SiteSpec("head", "classifier", "labels", "hidden"),)},
    defaults={"qkv_bias": True},
    leading_tokens=1,
    renames=(
        ("layers.", "encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ),
)

DINOV2 = Layout(
    model_type="dinov2",
    prefix="dinov2",
    blocks="encoder.layer",
    attention=SublayerSpec(
        sites=_projections("attention", bias="qkv_bias", output_bias=True),
        zero={"attention": 2},
        identity=("norm1", "layer_scale1"),
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("up", "mlp.fc1", "width", "hidden"),
            SiteSpec("down", "mlp.fc2", "hidden", "width"),
        ),
        zero={"mlp": 1},
        identity=("norm2", "layer_scale2"),
    ),
    heads={"image-classification": (SiteSpec("head", "classifier", "labels", "hidden", times=2),)},
    keys=ConfigKeys(width_ratio="mlp_ratio"),
    defaults={"qkv_bias": True, "mlp_ratio": 4},
    unsupported={"use_swiglu_ffn": True},
    leading_tokens=1,
    averaged="layernorm",
    renames=(
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
    ),
)

LLAMA = Layout(
    model_type="llama",
    prefix="model",
    blocks="layers",
    attention=SublayerSpec(
        sites=_projections("self_attn", bias="attention_bias", output_bias="attention_bias"),
        zero={"self_attn": 2},
        identity=("input_layernorm",),
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("gate", "mlp.gate_proj", "width", "hidden", bias="mlp_bias"),
            SiteSpec("up", "mlp.up_proj", "width", "hidden", bias="mlp_bias"),
            SiteSpec("down", "mlp.down_proj", "hidden", "width", bias="mlp_bias"),
        ),
        zero={"mlp": 1},
        identity=("post_attention_layernorm",),
    ),
    embeddings=(SiteSpec("embedding", "embed_tokens", "vocabulary", "hidden", bias=False),),
    heads={"language-modeling": (SiteSpec("head", "lm_head", "vocabulary", "hidden", bias=False),)},
    keys=ConfigKeys(kv_heads="num_key_value_heads", vocabulary="vocab_size"),
    defaults={"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    tied="tie_word_embeddings",
)

LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (BERT, VIT, DINOV2, LLAMA)}
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
            f"entry in autocomp/models/layouts.py.{parts}"
        )
    return LAYOUTS[model_type]
