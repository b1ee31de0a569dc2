"""Layouts of text encoders: BERT, RoBERTa, DistilBERT."""

from __future__ import annotations

from autocomp.models.layouts.layout import ConfigKeys, Layout, SiteSpec, SublayerSpec

_BERT_ATTENTION = SublayerSpec(
    sites=(
        SiteSpec("query", "attention.self.query", "queries", "hidden"),
        SiteSpec("key", "attention.self.key", "keys", "hidden"),
        SiteSpec("value", "attention.self.value", "keys", "hidden"),
        SiteSpec("output", "attention.output.dense", "hidden", "queries"),
    ),
    zero={"attention.self": 2, "attention.output.dense": 1},
)
_BERT_FFN = SublayerSpec(
    sites=(
        SiteSpec("up", "intermediate.dense", "width", "hidden"),
        SiteSpec("down", "output.dense", "hidden", "width"),
    ),
    zero={"intermediate": 1, "output.dense": 1},
)
_TABLES = (
    SiteSpec("embedding", "embeddings.word_embeddings", "vocabulary", "hidden", bias=False),
    SiteSpec("position", "embeddings.position_embeddings", "positions", "hidden", bias=False),
)
_BERT_KEYS = ConfigKeys(head_dim=None, vocabulary="vocab_size", positions="max_position_embeddings")
_NO_DECODER = {
    "is_decoder": (True,),
    "add_cross_attention": (True,),
    "position_embedding_type": ("relative_key", "relative_key_query"),
}

BERT = Layout(
    model_type="bert",
    prefix="bert",
    blocks="encoder.layer",
    attention=_BERT_ATTENTION,
    ffn=_BERT_FFN,
    embeddings=_TABLES,
    heads={
        "text-classification": (
            SiteSpec("pooler", "bert.pooler.dense", "hidden", "hidden"),
            SiteSpec("head", "classifier", "labels", "hidden"),
        )
    },
    dense_parts={"bert.embeddings.token_type_embeddings": "two rows"},
    keys=_BERT_KEYS,
    unsupported=_NO_DECODER,
)

ROBERTA = Layout(
    model_type="roberta",
    prefix="roberta",
    blocks="encoder.layer",
    attention=_BERT_ATTENTION,
    ffn=_BERT_FFN,
    embeddings=_TABLES,
    heads={
        "text-classification": (
            SiteSpec("pooler", "classifier.dense", "hidden", "hidden"),
            SiteSpec("head", "classifier.out_proj", "labels", "hidden"),
        )
    },
    dense_parts={"roberta.embeddings.token_type_embeddings": "one row or two"},
    keys=_BERT_KEYS,
    defaults={"pad_token_id": 1},
    unsupported=_NO_DECODER,
    offset="pad_token_id",
)

DISTILBERT = Layout(
    model_type="distilbert",
    prefix="distilbert",
    blocks="transformer.layer",
    attention=SublayerSpec(
        sites=(
            SiteSpec("query", "attention.q_lin", "queries", "hidden"),
            SiteSpec("key", "attention.k_lin", "keys", "hidden"),
            SiteSpec("value", "attention.v_lin", "keys", "hidden"),
            SiteSpec("output", "attention.out_lin", "hidden", "queries"),
        ),
        zero={"attention": 2},
    ),
    ffn=SublayerSpec(
        sites=(
            SiteSpec("up", "ffn.lin1", "width", "hidden"),
            SiteSpec("down", "ffn.lin2", "hidden", "width"),
        ),
        zero={"ffn": 1},
    ),
    embeddings=_TABLES,
    heads={
        "text-classification": (
            SiteSpec("pooler", "pre_classifier", "hidden", "hidden"),
            SiteSpec("head", "classifier", "labels", "hidden"),
        )
    },
    keys=ConfigKeys(
        layers="n_layers",
        hidden="dim",
        heads="n_heads",
        head_dim=None,
        width="hidden_dim",
        vocabulary="vocab_size",
        positions="max_position_embeddings",
    ),
)
