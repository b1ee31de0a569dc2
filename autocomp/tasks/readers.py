"""Readers: a data section to raw records, one function per format. No torch.

Tables (csv, jsonl, parquet, hub) go through `datasets`; npz through numpy, never unpickled.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.core.errors import DataError, ModelError, did_you_mean
from autocomp.models.sources import resolve_package_path
from autocomp.spec.task import DataSection

_BY_ENDING = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".npz": "npz",
    ".txt": "text",
}
_BUILDERS = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}


@dataclass(frozen=True)
class Records:
    """What a reader found, nothing interpreted yet.

    Attributes:
        contents: text, or images (an array `(N, H, W[, C])`, or a sequence of encoded images).
        labels: as stored, or `None` when no label was asked for.
        groups: as stored, or `None` when no column of groups was asked for.
        class_names: names of integer labels, where the source declares them.
        locate: position → how a person finds the example ("row 17", a path).
    """

    contents: Sequence[Any]
    labels: Sequence[Any] | None
    class_names: tuple[str, ...] | None
    locate: Callable[[int], str]
    groups: Sequence[Any] | None = None


def locate_source(data: DataSection) -> tuple[str, Path | None]:
    """The format, and the local path unless it is a hub dataset.

    Raises:
        DataError: for a missing file, or a format that cannot be told from the name.
    """
    source = data.source
    if not source.strip():
        raise DataError("task.data.source is empty. Give a path, package:NAME/path or a hub id")
    if data.format == "hub":
        return "hub", None
    if source.startswith("package:"):
        try:
            path = resolve_package_path(source)
        except ModelError as error:
            raise DataError(f"task.data.source: {error}") from error
    else:
        path = Path(source).expanduser()
    if path.exists():
        return (_format_of(path) if data.format == "auto" else data.format), path
    looks_local = (
        source.startswith(("package:", "/", "./", "../", "~"))
        or path.suffix.lower() in _BY_ENDING
        or source.count("/") > 1
    )
    if data.format != "auto" or looks_local:
        raise DataError(
            f"task.data.source: no file or directory {path}. Give an existing path, package:NAME/"
            f"path for data in an installed package, or a hub dataset id (format: hub)"
        )
    return "hub", None


def _format_of(path: Path) -> str:
    if path.is_dir():
        if any(path.glob("*/*.txt")):
            return "text-folders"
        for ending, name in ((".txt", "text"), (".parquet", "parquet")):
            if any(path.glob(f"*{ending}")):
                return name
        raise DataError(
            f"task.data.source: {path} holds neither folders of *.txt, nor *.txt, nor *.parquet. "
            f"Name a file, or set task.data.format"
        )
    try:
        return _BY_ENDING[path.suffix.lower()]
    except KeyError:
        raise DataError(
            f"task.data.source: cannot tell the format of {path.name} from its ending. Set "
            f"task.data.format to one of csv, jsonl, parquet, npz, text"
        ) from None


def read_records(
    data: DataSection, content: str, label: str | None, group: str | None = None
) -> Records:
    """Read the `content` column and, if asked for, those of the labels and of the groups.

    Raises:
        DataError: for a missing file or column, or a file that cannot be read.
    """
    form, path = locate_source(data)
    if group is not None and form in ("text-folders", "text"):
        raise DataError(
            f"task.data.group: {path} has no columns, so none that says what belongs together. Use "
            f"csv, jsonl, parquet, npz or a hub dataset"
        )
    if form == "text-folders":
        assert path is not None
        return _read_folders(path)
    if form == "text":
        assert path is not None
        if label is not None:
            raise DataError(
                f"task.data: {path} is running text, without labels. Classification needs "
                f"text-folders, csv, jsonl, parquet, npz or a hub dataset"
            )
        return _read_text(path)
    if form == "npz":
        assert path is not None
        return _read_npz(path, content, label, group)
    return _read_table(data, form, path, content, label, group)


def read_text_file(path: Path) -> str:
    """A text file, UTF-8 or else Windows-1252 / Latin-1.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"task.data: cannot read {path}: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _read_folders(path: Path) -> Records:
    files = [
        (folder.name, file)
        for folder in sorted(entry for entry in path.glob("*") if entry.is_dir())
        for file in sorted(folder.glob("*.txt"))
    ]
    if not files:
        raise DataError(f"task.data.source: {path} has no folders with *.txt files, one per label")
    return Records(
        contents=[read_text_file(file) for _, file in files],
        labels=[name for name, _ in files],
        class_names=None,
        locate=lambda i: str(files[i][1]),
    )


def _read_text(path: Path) -> Records:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return Records([read_text_file(file) for file in files], None, None, lambda i: str(files[i]))


def _read_npz(path: Path, content: str, label: str | None, group: str | None) -> Records:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            wanted = [name for name in (content, label, group) if name is not None]
            for name in wanted:
                _check_column(name, names, str(path), "array")
            arrays = {name: archive[name] for name in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"task.data: cannot read {path} as npz: {error}") from error
    contents = arrays.pop(content)
    for name, array in arrays.items():
        if array.shape != (len(contents),):
            raise DataError(
                f"{path}: array {name!r} has shape {array.shape}, but {content!r} has "
                f"{len(contents)} examples; expected ({len(contents)},)"
            )
    if contents.dtype.kind == "U":
        contents = contents.tolist()
    return Records(
        contents,
        None if label is None else arrays[label].tolist(),
        None,
        lambda i: f"{path.name} row {i}",
        None if group is None else arrays[group].tolist(),
    )


def _read_table(
    data: DataSection,
    form: str,
    path: Path | None,
    content: str,
    label: str | None,
    group: str | None,
) -> Records:
    import datasets

    origin = data.source
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # a bad file is reported once, by us
    try:
        if path is None:
            with _offline_unless_reachable(data.source):
                table = datasets.load_dataset(data.source, data.subset, split=data.split)
        else:
            table = datasets.load_dataset(
                _BUILDERS[form],
                data_files=_files(path, form),
                split="train",
                **_options(path, form),
            )
    except DataError:
        raise
    except Exception as error:  # datasets raises anything from OSError to its own classes
        cause = str(error.__cause__ or error).strip().splitlines()
        what = (
            f"{path} cannot be read as {form}"
            if path is not None
            else f"there is no file or directory {origin!r}, and it cannot be read from the hub"
        )
        raise DataError(
            f"task.data.source: {what}: {cause[0].rstrip('.') if cause else repr(error)}. Check "
            f"the path or dataset id, task.data.format, .subset and .split"
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
    for name in (content, label, group):
        if name is not None:
            _check_column(name, table.column_names, origin, "column")
    class_names = None
    if label is not None and isinstance(table.features[label], datasets.ClassLabel):
        class_names = tuple(table.features[label].names)
    contents: Sequence[Any]
    if isinstance(table.features[content], datasets.Image):
        table = table.cast_column(content, datasets.Image(decode=False))
        contents = EncodedImages(table[content])
    else:
        contents = table[content][:]
        if contents and isinstance(contents[0], dict | bytes):
            contents = EncodedImages(contents)
    return Records(
        contents,
        None if label is None else table[label][:],
        class_names,
        lambda i: f"{origin} row {i}",
        None if group is None else table[group][:],
    )


def _files(path: Path, form: str) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    files = sorted(str(file) for file in path.glob(f"*.{form}"))
    if not files:
        raise DataError(f"task.data.source: {path} holds no *.{form}. Name a file")
    return files


def _options(path: Path, form: str) -> dict[str, Any]:
    if form != "csv":
        return {}
    # "NA", "null" or "None" are words like any other, not missing values
    return {"sep": "\t" if path.suffix.lower() == ".tsv" else ",", "keep_default_na": False}


@contextmanager
def _offline_unless_reachable(source: str) -> Iterator[None]:
    """Ask the hub for the dataset once; if there is no answer, use what was fetched before.

    Left alone, `datasets` retries an unreachable hub for half a minute.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(source, timeout=10)
    except RepositoryNotFoundError as error:
        raise DataError(f"the hub has no dataset {source!r}, or it is private") from error
    except Exception:  # the client's transport errors share no base class across its versions
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_column(name: str, names: Sequence[str], origin: str, what: str) -> None:
    if name not in names:
        raise DataError(
            f"{origin} has no {what} {name!r}.{did_you_mean(name, names)} Its {what}s: "
            f"{', '.join(names)}. Set task.data.text, .image, .label or .group to the one you mean"
        )


class EncodedImages(Sequence[Any]):
    """Images as stored (PNG, JPEG…), decoded one at a time to uint8 RGB `(H, W, 3)`."""

    def __init__(self, rows: Sequence[Any]) -> None:
        """`rows`: bytes, or `{"bytes": …, "path": …}` as `datasets` stores images."""
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def stored(self, index: int) -> bytes:
        """The bytes of one image file.

        Raises:
            DataError: if the image is missing.
        """
        row = self._rows[index]
        if isinstance(row, dict):
            raw, path = row.get("bytes"), row.get("path")
            if raw is None and path is not None and Path(path).exists():
                raw = Path(path).read_bytes()
            row = raw
        if not isinstance(row, bytes):
            raise DataError(f"task.data: image {index} is missing")
        return row

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.stored(index))) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"task.data: image {index} cannot be decoded: {error}") from error
