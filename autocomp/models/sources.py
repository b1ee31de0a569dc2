"""Where a model comes from, and what can be read of it without torch: config and tensor shapes.

Only safetensors are accepted: other formats run code when they are opened.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autocomp.core.errors import ModelError

PACKAGE_SCHEME = "package:"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.py",
)
_HEADER_LIMIT = 100_000_000


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The local directory of a model: `package:NAME/path`, a directory, or a hub id (downloaded).

    `revision` pins a hub id and is ignored otherwise. No code of the model or package is run.

    Raises:
        ModelError: when there is no such package, directory or hub model, or it cannot be fetched.
    """
    if source.startswith(PACKAGE_SCHEME):
        path = resolve_package_path(source)
        if not path.is_dir():
            raise ModelError(f"model.source {source}: {path} is a file; give the directory")
        return path
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if source and path.exists():
        raise ModelError(f"model.source {source}: is a file; give the directory that holds it")
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise ModelError(
            f"model.source {source}: no such directory. Give a local directory, a hub id "
            f"(owner/name) or package:NAME/path"
        )
    return _download(source, revision)


def resolve_package_path(source: str) -> Path:
    """`package:NAME/path` → the file or directory inside the installed package, not imported.

    Raises:
        ModelError: when the package is not installed or holds no such path.
    """
    name, _, inside = source.removeprefix(PACKAGE_SCHEME).partition("/")
    if not name.isidentifier():
        raise ModelError(
            f"{source}: {name!r} is no package name. Write package:NAME/path, NAME as it is "
            f"imported (no dots, no dashes)"
        )
    if ".." in Path(inside).parts:
        raise ModelError(f"{source}: the path must stay inside the package")
    spec = importlib.util.find_spec(name)
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    if not roots:
        raise ModelError(
            f"{source}: no package {name!r} is installed here. Install the distribution that "
            f"provides it (pip install …) and try again"
        )
    for root in roots:
        if (root / inside).exists():
            return root / inside
    entries = sorted(
        entry.name for entry in roots[0].iterdir() if not entry.name.startswith(("_", "."))
    )
    raise ModelError(
        f"{source}: package {name!r} holds no {inside!r}. It holds: {', '.join(entries[:20])}"
    )


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        if isinstance(error, GatedRepoError):
            advice = "accept its terms on the hub and log in (hf auth login)"
        elif isinstance(error, RepositoryNotFoundError):
            advice = "check the spelling; a private model needs hf auth login"
        elif isinstance(error, RevisionNotFoundError):
            advice = f"it has no revision {revision!r}"
        elif isinstance(error, LocalEntryNotFoundError):
            advice = "the hub cannot be reached; give a local directory instead"
        else:
            advice = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"model.source {source}: neither a local directory nor a model that could be fetched "
            f"from the hub: {advice}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ModelError: when it is missing or no JSON object, or says the weights are quantised already.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path}: no config.json; give the directory of a transformers model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds no JSON object")
    if config.get("quantization_config"):
        raise ModelError(
            f"{file}: the model is quantised already (quantization_config); give the dense one"
        )
    return config


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the headers of model.safetensors or of all its shards.

    Raises:
        ModelError: when there are no safetensors, a shard is missing, or a header is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        shapes.update(_read_header(file))
    return shapes


def has_classification_head(shapes: Iterable[str]) -> bool:
    """Whether tensors of these names hold a classifier; transformers would invent a random one."""
    return any(name.startswith(("classifier.", "score.")) for name in shapes)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names.

    Raises:
        ModelError: when there are none or a shard is missing.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            files = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: no valid index of shards: {error}") from error
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise ModelError(f"{path}: shards are missing: {', '.join(missing)}")
        return [path / name for name in files]
    others = sorted(
        file.name for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".h5")
    )
    if others:
        raise ModelError(
            f"{path}: weights only as {', '.join(others)}; safetensors only. Convert them: "
            f"load with transformers and save_pretrained, or use a revision that has them"
        )
    raise ModelError(f"{path}: no model.safetensors")


def code_files(path: Path) -> list[Path]:
    """The Python files of a model that comes with its own code (`auto_map`); else none."""
    return sorted(path.glob("*.py")) if read_config(path).get("auto_map") else []


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"{file}: a Git LFS pointer, not the weights. Run: git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _HEADER_LIMIT):
            raise ModelError(f"{file}: no safetensors file, or cut off; fetch it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{file}: damaged safetensors header; fetch it again") from error
    if size < 8 + length + end:
        raise ModelError(f"{file}: cut off: {size} bytes of {8 + length + end}; fetch it again")
    return shapes
