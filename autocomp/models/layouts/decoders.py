"""Layouts of language models: Llama, Qwen2, Qwen3, GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from autocomp.models.layouts.layout import (
    ConfigKeys,
    Layout,
    SiteSpec,
    SublayerSpec,
    gated,
    projections,
)

_EMBEDDINGS = (SiteSpec("embedding", "embed_tokens", "vocabulary", "hidden", bias=False),)
_HEADS = {"language-modeling": (SiteSpec("head", "lm_head", "vocabulary", "hidden", bias=False),)}
_KEYS = ConfigKeys(kv_heads="num_key_value_heads", vocabulary="vocab_size")
_SLIDING = {"use_sliding_window": (True,), "layer_types": ("sliding_attention",)}


def _rotary(
    model_type: str,
    *,
    bias: bool | str,
    output_bias: bool | str,
    ffn_bias: bool | str,
    defaults: Mapping[str, object],
    unsupported: Mapping[str, tuple[object, ...]] = MappingProxyType({}),
    normed_keys: bool = False,
) -> Layout:
    """Norm, rotary attention, norm, gated feed-forward; biases as `projections` takes them."""
    return Layout(
        model_type=model_type,
        prefix="model",
        blocks="layers",
        attention=SublayerSpec(
            sites=projections("self_attn", bias=bias, output_bias=output_bias),
            zero={"self_attn": 2},
            identity=("input_layernorm",),
        ),
        ffn=SublayerSpec(
            sites=gated(bias=ffn_bias), zero={"mlp": 1}, identity=("post_attention_layernorm",)
        ),
        embeddings=_EMBEDDINGS,
        heads=_HEADS,
        keys=_KEYS,
        defaults={"tie_word_embeddings": False, **defaults},
        unsupported=unsupported,
        tied="tie_word_embeddings",
        normed_keys=normed_keys,
    )


LLAMA = _rotary(
    "llama",
    bias="attention_bias",
    output_bias="attention_bias",
    ffn_bias="mlp_bias",
    defaults={"attention_bias": False, "mlp_bias": False},
)

QWEN2 = _rotary(
    "qwen2",
    bias=True,
    output_bias=False,
    ffn_bias=False,
    defaults={"num_key_value_heads": 32},
    unsupported=_SLIDING,
)

QWEN3 = _rotary(
    "qwen3",
    bias="attention_bias",
    output_bias="attention_bias",
    ffn_bias=False,
    defaults={"attention_bias": False, "head_dim": 128, "num_key_value_heads": 32},
    unsupported=_SLIDING,
    normed_keys=True,
)

GPT2 = Layout(
    model_type="gpt2",
    prefix="transformer",
    blocks="h",
    attention=SublayerSpec(
        sites=(
            SiteSpec("query", "attn.c_attn.query", "queries", "hidden"),
            SiteSpec("key", "attn.c_attn.key", "keys", "hidden"),
            SiteSpec("value", "attn.c_attn.value", "keys", "hidden"),
            SiteSpec("output", "attn.c_proj", "hidden", "queries"),
        ),
        zero={"attn": 2},
        identity=("ln_1",),
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("up", "mlp.c_fc", "width", "hidden"),
            SiteSpec("down", "mlp.c_proj", "hidden", "width"),
        ),
        zero={"mlp": 1},
        identity=("ln_2",),
    ),
    embeddings=(
        SiteSpec("embedding", "wte", "vocabulary", "hidden", bias=False),
        SiteSpec("position", "wpe", "positions", "hidden", bias=False),
    ),
    heads=_HEADS,
    keys=ConfigKeys(
        layers="n_layer",
        hidden="n_embd",
        heads="n_head",
        head_dim=None,
        width="n_inner",
        width_times=4,
        vocabulary="vocab_size",
        positions="n_positions",
    ),
    defaults={"tie_word_embeddings": True},
    unsupported={
        "add_cross_attention": (True,),
        "scale_attn_by_inverse_layer_idx": (True,),  # mixers stand for scores over √D
        "scale_attn_weights": (False,),
    },
    tied="tie_word_embeddings",
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    fused={"attn.c_attn": ("query", "key", "value")},
    buffers=(".attn.bias", ".attn.masked_bias"),
)
