"""Loading: equal to what was saved, the same new head everywhere, quiet, offline, clear errors."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES, Example, logits
from safetensors.torch import load_file, save_file
from torch import nn

from autocomp.core.errors import ModelError
from autocomp.models.conversion import as_transformers
from autocomp.models.layouts import LAYOUTS
from autocomp.models.load import load_model, load_tokenizer


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"network use: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _saved(example: Example, path: Path, *, headless: bool = False) -> nn.Module:
    model = example.model()
    native = as_transformers(model)
    (getattr(native, LAYOUTS[example.model_type].prefix) if headless else native).save_pretrained(
        path
    )
    return model


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_loaded_model_is_the_saved_one(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[name]
    model = _saved(example, tmp_path)
    capfd.readouterr()
    loaded = load_model(tmp_path, example.task)
    assert torch.equal(logits(loaded, example.inputs()), logits(model, example.inputs()))
    assert not loaded.training
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.use_cache is False
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_half_precision_checkpoints_become_float32(tmp_path: Path) -> None:
    example = EXAMPLES["vit"]
    example.model().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, example.task)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["bert", "vit", "dinov2"])
def test_new_head_is_the_same_every_time(
    name: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    example = EXAMPLES[name]
    model = _saved(example, tmp_path, headless=True)
    capfd.readouterr()
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, "autocomp"):
        first = load_model(tmp_path, example.task, num_labels=4)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1).equal(drawn)  # the caller's random numbers are not disturbed
    second = load_model(tmp_path, example.task, num_labels=4)
    assert first.classifier.out_features == 4
    assert first.classifier.weight.equal(second.classifier.weight)
    assert first.classifier.weight.abs().sum() > 0
    prefix = LAYOUTS[name].prefix
    for key, value in getattr(model, prefix).state_dict().items():
        assert getattr(first, prefix).state_dict()[key].equal(value), key
    assert "new head (classifier.bias, classifier.weight)" in caplog.text
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_head_for_other_labels_is_replaced(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model = _saved(example, tmp_path)
    loaded = load_model(tmp_path, example.task, num_labels=6)
    assert loaded.classifier.weight.shape == (6, 24)
    assert loaded.bert.pooler.dense.weight.equal(model.bert.pooler.dense.weight)


def test_weights_missing_outside_the_head_are_an_error(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    _saved(example, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weights outside the head .*{name}"):
        load_model(tmp_path, example.task)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path, example.task)
    _saved(example, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": {"AutoModel": "modelling.Own"}}))
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        load_model(tmp_path, example.task)
    file.write_text(json.dumps({**config, "model_type": "brt"}))
    with pytest.raises(ModelError, match="Did you mean 'bert'"):
        load_model(tmp_path, example.task)
    file.write_text(json.dumps({**config, "hidden_act": "no_such_activation"}))
    with pytest.raises(ModelError, match=r"transformers cannot load it .*no_such_activation"):
        load_model(tmp_path, example.task)
    file.write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        load_model(tmp_path, example.task)


def test_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert load_tokenizer(tmp_path)("a")["input_ids"] == [0]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
