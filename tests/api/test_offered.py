"""What `check` says of options that no target can carry out or gains from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from autocomp.api.check import CheckReport, report
from autocomp.api.plan import Plan, make_plan
from autocomp.core.errors import SpecError

SPLITS = {"calibrate": 8, "distil": 16, "search": 16, "report": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each kind and data for it."""
    made = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    bert = BertConfig(vocab_size=256, max_position_embeddings=16, **shape)
    BertModel(bert).save_pretrained(made / "bert")
    vit = ViTConfig(image_size=32, patch_size=8, **shape)
    ViTModel(vit).save_pretrained(made / "vit")
    llama = LlamaConfig(vocab_size=256, max_position_embeddings=4096, **shape)
    LlamaForCausalLM(llama).save_pretrained(made / "llama")
    rows = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(80)]
    (made / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"word {i} and some more\n\n" for i in range(200))
    (made / "text.txt").write_text(lines)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    np.savez(made / "images.npz", image=images, label=np.arange(80) % 2)
    return made


def plan(
    root: Path, kind: str, space: list[dict[str, Any]], workload: dict[str, int] | None = None
) -> Plan:
    model, task, data = {
        "text": ("bert", "text-classification", {"source": "./text.jsonl"}),
        "image": ("vit", "image-classification", {"source": "./images.npz"}),
        "tokens": ("llama", "language-modeling", {"source": "./text.txt", "format": "text"}),
    }[kind]
    if workload is None:
        workload = {"sequence": 16} if kind == "text" else {}
    written: dict[str, Any] = {
        "version": 1,
        "model": {"source": f"./{model}"},
        "task": {"name": task, "data": {**data, **SPLITS}},
        "target": {"device": "cpu", "runtime": "onnxruntime", "workload": workload},
        "budget": {"size": "50%"},
        "space": space,
    }
    path = root / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return make_plan(path)


def labels(made: Plan, unit: str) -> set[str]:
    return {option.label() for option in made.options[unit]}


def told(made: Plan) -> list[str]:
    checked: CheckReport = report(made)
    return [note for note in checked.notes if note.startswith("not offered")]


def test_a_combination_that_gains_nothing_is_left_out_with_a_note(root: Path) -> None:
    """Half of 2-bit weights, with a bit for each to tell where, is no smaller than all of them."""
    rule = {
        "match": "layers.*.ffn",
        "sparsity": {"method": "sparsegpt", "levels": [0.0, 0.5]},
        "bits": {"method": "rtn", "weights": [8, 2]},
    }
    made = plan(root, "text", [rule])
    for layer in range(2):
        options = made.options[f"layers.{layer}.ffn"]
        asked = {(option.step("sparsegpt") is not None, option.steps[-1]["weights"])
                 for option in options}  # fmt: skip
        assert asked == {(False, 8), (True, 8), (False, 2)}
        assert len(options) == 3
    (note,) = told(made)
    assert note.startswith("not offered by layers.*.ffn: 2 options, the first of them layers.0.ffn")
    assert "onnxruntime-cpu stores 50% of 2-bit weights" in note
    assert "no fewer bytes than all of them" in note


def test_a_choice_that_is_possible_in_no_option_is_an_error(root: Path) -> None:
    rule = {
        "match": "layers.*.ffn",
        "sparsity": {"method": "sparsegpt", "levels": [0.0, 0.5]},
        "bits": {"method": "rtn", "weights": [2]},
    }
    with pytest.raises(SpecError, match=r"text\.yaml:\d+ space\[0\]: layers\.0\.ffn, ") as raised:
        plan(root, "text", [rule])
    assert "no fewer bytes" in str(raised.value)
    assert str(raised.value).endswith("No option with sparsegpt level=0.5 is possible")


@pytest.mark.parametrize("method", ["tome", "token_prune", "token_fuse"])
def test_a_ratio_that_removes_no_token_is_left_out(root: Path, method: str) -> None:
    """17 tokens, 16 of them patches: a twentieth of them is less than one."""
    rule = {
        "match": "layers.*.attention",
        "tokens": {"method": method, "ratios": [0.0, 0.05, 0.25]},
        "bits": {"method": "rtn", "weights": ["dense", 8]},
    }
    made = plan(root, "image", [rule])
    ratios = {step["ratio"] for o in made.options["layers.0.attention"] if (step := o.step(method))}
    assert ratios == {0.25}
    assert len(made.options["layers.0.attention"]) == 4
    (note,) = told(made)
    assert "4 options" in note
    assert "gains nothing from a ratio of 0.05, which removes none of 17 tokens" in note
    larger = plan(root, "text", [{"match": "layers.*.ffn"}])
    assert told(larger) == []


def test_fusing_one_token_removes_none(root: Path) -> None:
    """A sixteenth is one patch: merging or dropping it pays, fusing it puts one in its place."""
    for method, offered in (("tome", 2), ("token_prune", 2), ("token_fuse", 1)):
        tokens = {"method": method, "ratios": [0.0, 0.0625]}
        made = plan(root, "image", [{"match": "layers.*.attention", "tokens": tokens}])
        assert len(made.options["layers.1.attention"]) == offered


def test_a_ratio_alone_that_removes_no_token_is_an_error(root: Path) -> None:
    tokens = {"method": "tome", "ratios": [0.05]}
    with pytest.raises(SpecError, match="removes none of 17 tokens"):
        plan(root, "image", [{"match": "layers.*.attention", "tokens": tokens}])


def test_a_short_cache_is_refused_and_a_long_one_offered(root: Path) -> None:
    rule = {"match": "layers.*.attention", "bits": {"method": "rtn", "cache": ["dense", 8]}}
    with pytest.raises(SpecError, match="of cache at 8 \\+ 4 tokens") as raised:
        plan(root, "tokens", [rule], {"prompt": 8, "generate": 4, "sequence": 16})
    made = plan(root, "tokens", [rule], {"prompt": 600, "generate": 32, "sequence": 16})
    assert len(labels(made, "layers.0.attention")) == 2
    # 2 layers × (32 keys + 32 values) × 12 tokens, three bytes of four each
    share = 2 * 64 * 12 * 3 / made.dense_bytes
    assert share < 0.05
    assert f"{share:.1%} of the dense model's" in str(raised.value)
    assert 2 * 64 * 632 * 3 / made.dense_bytes > 0.05
