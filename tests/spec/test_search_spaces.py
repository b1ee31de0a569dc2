"""The shipped specs are valid, by our loader and by the committed JSON schema on its own."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from autocomp.core.errors import SpecError
from autocomp.spec.json_schema import render
from autocomp.spec.loader import load_spec
from autocomp.spec.task import TASKS

SPACES = Path(__file__).parents[2] / "search_spaces"
SPECS = sorted(SPACES.glob("*.yaml"))
SCHEMA = json.loads((SPACES / "schema.json").read_text(encoding="utf-8"))


def test_the_committed_schema_is_the_codes():
    assert (SPACES / "schema.json").read_text(encoding="utf-8") == render(), (
        "run: python -m autocomp.spec.json_schema search_spaces/schema.json"
    )


def test_they_are_all_here():
    assert [path.stem for path in SPECS] == [
        "all_operators",
        "llama_cpu",
        "llama_decode_cpu",
        "long_context",
        "minilm_tenth",
        "minilm_twentieth",
        "quickstart",
        "short_context",
        "tiny",
        "vit_cpu",
    ]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_valid(path, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "data.txt").touch()
    given = {"model.source": f"{tmp_path}/model", "task.data.source": f"{tmp_path}/data.txt"}
    spec, source = load_spec(path, given)
    assert source.file == path
    assert spec.model.source == f"{tmp_path}/model"
    assert spec.task.name in TASKS
    limits = spec.budget.limits()
    assert limits.latency is not None
    assert limits.size is not None
    assert limits.latency.relative
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_editors_find_the_schema(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n# ")


@pytest.mark.parametrize(
    ("old", "new"),
    [("label: topic", "lable: topic"), ("{trials: 5}", "{trials: five}"), ("version: 1", "")],
)
def test_the_schema_refuses_what_the_loader_refuses(good, old, new):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(yaml.safe_load(good))
    assert not validator.is_valid(yaml.safe_load(good.replace(old, new)))


def test_every_key_is_explained():
    def unexplained(name, node):
        for key, field in node.get("properties", {}).items():
            if "$ref" not in field and not field.get("description"):
                yield f"{name}.{key}"

    nodes = {"Spec": SCHEMA, **SCHEMA["$defs"]}
    assert [found for name, node in nodes.items() for found in unexplained(name, node)] == []


def test_the_identity_of_the_quickstart_is_independent_of_where_it_lies(tmp_path):
    text = (SPACES / "quickstart.yaml").read_text()
    (tmp_path / "copy.yaml").write_text(text)
    here = load_spec(SPACES / "quickstart.yaml").spec
    assert load_spec(tmp_path / "copy.yaml").spec.key == here.key


@pytest.mark.parametrize("name", ["tiny", "vit_cpu", "llama_cpu", "llama_decode_cpu"])
def test_what_the_user_must_give_is_said(tmp_path, name):
    copy = tmp_path / "copy.yaml"
    copy.write_text((SPACES / f"{name}.yaml").read_text())
    with pytest.raises(SpecError) as caught:
        load_spec(copy)
    for place in ("model.source", "task.data.source"):
        assert f" {place}: no such file or directory" in str(caught.value)
        assert f"give yours with --set {place}=PATH" in str(caught.value)


def test_tiny_takes_what_lies_beside_it(tmp_path):
    (tmp_path / "tiny.yaml").write_text((SPACES / "tiny.yaml").read_text())
    (tmp_path / "tiny" / "model").mkdir(parents=True)
    (tmp_path / "tiny" / "data.jsonl").touch()
    spec = load_spec(tmp_path / "tiny.yaml").spec
    assert spec.model.source == f"{tmp_path}/tiny/model"
    assert spec.task.data.source == f"{tmp_path}/tiny/data.jsonl"
