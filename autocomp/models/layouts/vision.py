"""Layouts of image encoders: ViT, DeiT, DINOv2."""

from __future__ import annotations

from autocomp.models.layouts.layout import (
    ConfigKeys,
    Layout,
    SiteSpec,
    SublayerSpec,
    projections,
)

_MLP = (
    SiteSpec("up", "mlp.fc1", "width", "hidden"),
    SiteSpec("down", "mlp.fc2", "hidden", "width"),
)
_OLDER_ATTENTION = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)
_VIT_ATTENTION = SublayerSpec(
    sites=projections("attention", bias="qkv_bias", output_bias=True),
    zero={"attention": 2},
    identity=("layernorm_before",),
)
_VIT_FFN = SublayerSpec(sites=_MLP, zero={"mlp": 1}, identity=("layernorm_after",))
_VIT_RENAMES = (
    ("layers.", "encoder.layer."),
    *_OLDER_ATTENTION,
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)

VIT = Layout(
    model_type="vit",
    prefix="vit",
    blocks="layers",
    attention=_VIT_ATTENTION,
    ffn=_VIT_FFN,
    heads={"image-classification": (SiteSpec("head", "classifier", "labels", "hidden"),)},
    defaults={"qkv_bias": True},
    leading_tokens=1,
    renames=_VIT_RENAMES,
)

DEIT = Layout(
    model_type="deit",
    prefix="deit",
    blocks="layers",
    attention=_VIT_ATTENTION,
    ffn=_VIT_FFN,
    heads={"image-classification": (SiteSpec("head", "classifier", "labels", "hidden"),)},
    defaults={"qkv_bias": True},
    unsupported={"architectures": ("DeiTForImageClassificationWithTeacher",)},
    leading_tokens=2,
    renames=_VIT_RENAMES,
)

DINOV2 = Layout(
    model_type="dinov2",
    prefix="dinov2",
    blocks="encoder.layer",
    attention=SublayerSpec(
        sites=projections("attention", bias="qkv_bias", output_bias=True),
        zero={"attention": 2},
        identity=("norm1", "layer_scale1"),
    ),
    ffn=SublayerSpec(sites=_MLP, zero={"mlp": 1}, identity=("norm2", "layer_scale2")),
    heads={"image-classification": (SiteSpec("head", "classifier", "labels", "hidden", times=2),)},
    keys=ConfigKeys(width_ratio="mlp_ratio"),
    defaults={"qkv_bias": True, "mlp_ratio": 4},
    unsupported={"use_swiglu_ffn": (True,)},
    leading_tokens=1,
    averaged="layernorm",
    renames=_OLDER_ATTENTION,
)
