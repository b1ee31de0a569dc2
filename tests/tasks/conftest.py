"""Tiny random models and data sets, built in the test run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from autocomp.spec.schema import Spec

WORDS = [f"w{i}" for i in range(40)]
COLOURS = ("blue", "green", "red")


def save_tokenizer(path: Path, *, special: bool) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    # Settings a tokenizer may come with; tasks must not depend on them.
    tokenizer.enable_padding(length=64, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(max_length=5)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    ).save_pretrained(path)


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=44,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    save_tokenizer(path, special=True)
    return path


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path, special=False)
    return path


@pytest.fixture(scope="session")
def vit_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 texts of 2 to 12 words; the first word tells the label."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(200):
            words = [
                WORDS[i % 3],
                *generator.choice(WORDS[3:], size=int(generator.integers(1, 12))),
            ]
            writer.writerow([" ".join([*words, WORDS[3 + i % 37]]), COLOURS[i % 3]])
    return path


@pytest.fixture(scope="session")
def corpus_txt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("\n".join(" ".join(generator.choice(WORDS, size=9)) for _ in range(300)))
    return path


@pytest.fixture(scope="session")
def image_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 gray images of 12 × 12; the bright half tells the label."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, size=(120, 12, 12), dtype=np.uint8)
    labels = np.arange(120) % 2
    images[labels == 0, :6] += 120
    images[labels == 1, 6:] += 120
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x_train=images, y_train=labels)
    return path


def make_spec(
    task: str,
    source: Path | str,
    *,
    teacher: dict[str, Any] | None = None,
    workload: dict[str, Any] | None = None,
    seed: int = 0,
    **data: Any,
) -> Spec:
    """A spec around one data section; splits of 20 / 60 / 20 / 20 unless given."""
    sizes = {"calibrate": 20, "distil": 60, "search": 20, "report": 20}
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "unused"},
            "task": {
                "name": task,
                "data": {"source": str(source), **sizes, **data},
                "teacher": teacher or {"fit": "full"},
            },
            "target": {"workload": {"batch": 3, "sequence": 10, **(workload or {})}},
            "budget": {},
            "space": [{"match": "*"}],
            "search": {"seed": seed},
        }
    )


@pytest.fixture
def spec_of() -> Any:
    return make_spec
