"""The card of an exported directory is true: its load code runs, its figures are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from autocomp.core.candidate import Candidate
from autocomp.export.card import model_card
from autocomp.export.companions import Companions
from autocomp.export.protocol import ExportRequest
from autocomp.spec.schema import Spec
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Artifact
from autocomp.tasks.image_classification import Preprocessing

REPORT = {
    "quality": 0.0125,
    "metric": {"name": "perplexity", "value": 80.0},
    "teacher_quality": 0.0142,
    "teacher_metric": {"name": "perplexity", "value": 70.4},
}


def _request(
    companions: Companions,
    task: str,
    model: Path,
    report: Any = None,
    workload: dict[str, int] | None = None,
) -> ExportRequest:
    spec = Spec.model_validate(
        {
            "version": 1,
            "model": {"source": "m"},
            "task": {"name": task, "data": {"source": "d"}},
            "target": {"workload": workload or {}},
            "budget": {},
            "space": [{"match": "*"}],
        }
    )
    record = TrialRecord("t", "search", "milp", "complete", Candidate.of({}))
    return ExportRequest(spec, record, Artifact(model, 1), companions, None, report)


def _code(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert found is not None
    return found[1]


def _save(path: Path, nodes: list[Any], inputs: list[Any], constants: list[Any] = ()) -> None:
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs, [output], list(constants))
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


@pytest.mark.parametrize("shape", [(40, 40), (48, 30)])
def test_the_image_card_prepares_pixels_as_the_study_did(shape, tmp_path, monkeypatch, capsys):
    how = Preprocessing(size=14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    companions = Companions(tmp_path)
    pixels = np.zeros((1, 3, 14, 14), np.float32)
    companions.write(
        tmp_path / "none", ("blue", "red"), {"pixel_values": pixels}, how.processor_json()
    )
    assert [file.name for file in companions.files()] == ["preprocessor_config.json"]
    (tmp_path / "labels.txt").write_text("r\ng\nb\n")
    _save(
        tmp_path / "model.onnx",
        [helper.make_node("ReduceMean", ["pixel_values", "axes"], ["logits"], keepdims=0)],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, 14, 14])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    # away from 0 and 255: PIL clips overshoot between its two passes, the study clips once; smooth:
    # the study resizes to whole pixels before it crops, PIL's fit crops first
    coarse = np.random.default_rng(0).integers(80, 170, size=(4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    picture.save(tmp_path / "image.png")
    image = np.array(picture)
    card = model_card(
        _request(companions, "image-classification", tmp_path / "model.onnx"), "model.onnx"
    )
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(_code(card), names)
    expected = how.apply(image[None])
    np.testing.assert_allclose(names["feeds"]["pixel_values"], expected, atol=4 / 255 / 0.2)
    assert capsys.readouterr().out.strip() == "rgb"[expected.mean(axis=(0, 2, 3)).argmax()]


def test_the_language_model_card_predicts_a_token(tmp_path, monkeypatch, capsys):
    names = ["[UNK]", "She", "opened", "the", "door", "and"]
    words = {word: i for i, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    companions = Companions(tmp_path)
    companions.write(tmp_path / "none", (), {"input_ids": np.zeros((1, 4), np.int64)})
    _save(  # predicts the token it sees
        tmp_path / "model.onnx",
        [helper.make_node("OneHot", ["input_ids", "depth", "values"], ["logits"])],
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [
            helper.make_tensor("depth", TensorProto.INT64, [1], [6]),
            helper.make_tensor("values", TensorProto.FLOAT, [2], [0.0, 1.0]),
        ],
    )
    request = _request(companions, "language-modeling", tmp_path / "model.onnx", REPORT)
    card = model_card(request, "model.onnx")
    assert "perplexity on the report split, after selection: 80 (teacher 70.4; quality 88" in card
    monkeypatch.chdir(tmp_path)
    exec(_code(card), {})
    assert capsys.readouterr().out.strip() == "and"


def test_the_card_of_a_model_that_generates_keeps_its_cache(tmp_path, monkeypatch, capsys):
    """The model's next token is the sum of all so far, modulo six; a cache holds what it read."""
    words = {word: i for i, word in enumerate(["She", "opened", "the", "door", "and", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    companions = Companions(tmp_path)
    companions.write(tmp_path / "none", (), {"input_ids": np.zeros((1, 4), np.int64)})
    node, past = helper.make_node, "past_key_values.0.key"
    nodes = [
        node("Unsqueeze", ["input_ids", "axes"], ["ids"]),
        node("Cast", ["ids"], ["new"], to=TensorProto.FLOAT),
        node("Concat", [past, "new"], ["present.0.key"], axis=2),
        node("ReduceSum", ["present.0.key", "axes_summed"], ["sum"], keepdims=0),
        node("Mod", ["sum", "six"], ["rest"], fmod=1),
        node("Cast", ["rest"], ["next"], to=TensorProto.INT64),
        node("OneHot", ["next", "depth", "values"], ["logits"]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 3]),
        helper.make_tensor("axes_summed", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("six", TensorProto.FLOAT, [], [6.0]),
        helper.make_tensor("depth", TensorProto.INT64, [1], [6]),
        helper.make_tensor("values", TensorProto.FLOAT, [2], [0.0, 1.0]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"]),
        helper.make_tensor_value_info(past, TensorProto.FLOAT, ["b", 1, "past", 1]),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("logits", "present.0.key")
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    opset = helper.make_opsetid("", 20)
    onnx.save(
        helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "model.onnx"
    )
    request = _request(
        companions,
        "language-modeling",
        tmp_path / "model.onnx",
        workload={"prompt": 5, "generate": 4},
    )
    card = model_card(request, "model.onnx")
    assert "prompt of 5 tokens, 4 generated, 1 thread(s)" in card
    assert "| latency of a generated token |" in card
    assert "| reading the prompt, 5 tokens |" in card
    monkeypatch.chdir(tmp_path)
    exec(_code(card), {})
    ids = [0, 1, 2, 3, 4]
    for _ in range(4):
        ids.append(sum(ids) % 6)
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids)
    assert len(_code(card).splitlines()) <= 16
