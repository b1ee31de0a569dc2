"""Two real runtimes in one study, to an export of each that its own runtime verifies; generation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import SHARED, VOCABULARY, Command, write_model
from transformers import LlamaConfig, LlamaForCausalLM

openvino = pytest.importorskip("openvino", reason="the runtime is an extra")
pytestmark = pytest.mark.timeout(900)  # a busy host; seconds on an idle one

RUNTIMES = ("onnxruntime", "openvino")


def loosest(trials: list[dict[str, Any]], runtime: str) -> dict[str, Any]:
    """The trial of a runtime that is cheapest to ask for: its smallest one."""
    return min((t for t in trials if t["runtime"] == runtime), key=lambda t: t["size_bytes"])


def test_a_search_over_both_runtimes_exports_either(command: Command, tmp_path: Path) -> None:
    study = tmp_path / "study"
    settings = ("target.runtime=[onnxruntime, openvino]", "search.trials=4", "search.screen=12")
    ended = command.run(
        "search", *command.spec_arguments(*settings), "--study", study, "--json", timeout_s=800
    )
    assert ended.status == 0, ended.err
    trials = ended.json["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert {t["runtime"] for t in trials if t["kind"] == "search"} <= set(RUNTIMES)
    assert {trial["runtime"] for trial in trials} == set(RUNTIMES)
    front = command.run("front", study, "--json").json
    assert {trial["id"] for trial in front["trials"] if trial["on_front"]}

    # Two budgets: any latency, and what only the smallest model of OpenVINO's keeps.
    loose = command.run("pick", study, "--size", "100%", "--json")
    assert loose.status == 0, loose.err
    exported = set()
    for runtime in RUNTIMES:
        chosen = loosest(trials, runtime)
        out = tmp_path / runtime
        ended = command.run("pick", study, "--trial", chosen["id"], "--export", out, "--json")
        assert ended.status == 0, ended.err
        assert ended.json["runtime"] == runtime
        assert ended.json["export"]["max_difference"] == 0
        exported |= {file.suffix for file in out.iterdir() if file.stem == "model"}
        assert f"Target: {runtime} on cpu" in (out / "README.md").read_text()
    assert {".onnx", ".xml", ".bin"} <= exported

    # Whoever has the directory and OpenVINO alone gets the trial's model.
    settings_of_the_card = {"INFERENCE_PRECISION_HINT": "f32"}
    path = tmp_path / "openvino" / "model.xml"
    compiled = openvino.Core().compile_model(path, "CPU", settings_of_the_card)
    ids = np.array([[2, 20, 21, 170, 3]])
    logits = compiled({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    assert logits.shape == (1, 3)
    assert np.isfinite(logits).all()


def write_language(directory: Path) -> tuple[Path, Path]:
    """A random Llama (2 layers, hidden 32) with the tiny study's tokenizer, and text for it."""
    model = write_model(directory / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    for file in model.glob("model*"):
        file.unlink()
    LlamaForCausalLM(config).save_pretrained(model)
    draw, text = random.Random(0), directory / "text.txt"
    lines = (" ".join(draw.choices(SHARED[:20], k=24)) for _ in range(400))
    text.write_text("\n".join(lines), encoding="utf-8")
    return model, text


SPEC = """\
version: 1
model: {{source: {model}}}
task:
  name: language-modeling
  data: {{source: {text}, format: text, calibrate: 4, distil: 8, search: 4, report: 4}}
  teacher: {{fit: none}}
target: {{runtime: openvino, workload: {{prompt: 8, generate: 4, sequence: 16, threads: 1}}}}
budget: {{latency: 200%, size: 100%}}
objectives: [quality, latency, size]
space:
  - match: "layers.*.ffn"
    structure: {{width: [1.0, 0.5]}}
    bits: {{method: rtn, weights: [dense, 8], activations: [dense, 8]}}
distill: {{tokens: [0], batch: 4}}
search: {{screen: 6, trials: 1, seed: 0}}
"""


def test_a_search_whose_model_generates_on_openvino(command: Command, tmp_path: Path) -> None:
    model, text = write_language(tmp_path)
    spec, study = tmp_path / "decode.yaml", tmp_path / "study"
    spec.write_text(SPEC.format(model=model, text=text), encoding="utf-8")
    ended = command.run("search", spec, "--study", study, "--json", timeout_s=800)
    assert ended.status == 0, ended.err
    trials = ended.json["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert any(trial["kind"] == "search" for trial in trials)
    out = tmp_path / "out"
    ended = command.run("pick", study, "--size", "100%", "--export", out, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["export"]["max_difference"] == 0
    card = (out / "README.md").read_text()
    assert "prompt of 8 tokens, 4 generated" in card
    assert "latency of a generated token" in card
    caches = [one.any_name for one in openvino.Core().compile_model(out / "model.xml").inputs]
    assert sum(name.startswith("past_key_values.") for name in caches) == 4
    assert json.loads((study / "front.json").read_text())["trials"]
