"""Examples: raw records checked, deduplicated and labelled. No torch.

A `DataError` here names the example, what is wrong with it and what would be right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from autocomp.core.errors import DataError, did_you_mean
from autocomp.spec.task import DataSection
from autocomp.tasks.protocol import Split
from autocomp.tasks.readers import EncodedImages, Records, locate_source, read_records
from autocomp.tasks.splits import Indices, split_indices


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one kind.

    Attributes:
        contents: text, or images: uint8 `(H, W)` or `(H, W, C)` each.
        labels: int64 `(N,)`, indices into `label_names`.
        label_names: sorted, or in the order the source declares.
        digests: SHA-256 of each example's full content.
        origin: how messages name the data.
        further: of each text the lines that `data.lines` leaves out; empty for images.
        groups: which examples belong together; `None` where each stands for itself.
        held_out: so many examples at the end are from `data.held_out`; `None` without it.
    """

    contents: Sequence[Any]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    digests: tuple[str, ...] = field(repr=False)
    origin: str
    further: Sequence[Sequence[str]] = field(default=(), repr=False)
    groups: Sequence[Any] | None = field(default=None, repr=False)
    held_out: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, data: DataSection, seed: int) -> dict[Split, Indices]:
        """Positions of the examples of each split.

        Raises:
            DataError: if there are too few of them.
        """
        return split_indices(
            len(self),
            split_sizes(data),
            seed=seed,
            labels=self.labels,
            groups=self.groups,
            held_out=self.held_out,
            label_names=self.label_names,
            origin=self.origin,
        )


def split_sizes(data: DataSection) -> dict[Split, int]:
    """How many examples each split was asked to have."""
    return {
        "calibrate": data.calibrate,
        "distil": data.distil,
        "search": data.search,
        "report": data.report,
    }


def load_examples(data: DataSection, content: Literal["text", "image"]) -> Examples:
    """Read, check and deduplicate labelled text or images; those that are held out come last.

    Raises:
        DataError: for a missing file or column, an empty text, a label that cannot be read.
    """
    examples = _load(data, content)
    if data.held_out is None:
        return examples
    return _followed(examples, _load(held_out_section(data), content), unique=data.unique)


def held_out_section(data: DataSection) -> DataSection:
    """Where the held-out examples are, as a section of its own.

    Raises:
        DataError: if it names no source, and the data is no dataset of the hub.
    """
    assert data.held_out is not None
    given = data.held_out.model_dump(exclude_none=True)
    if data.held_out.source is None:
        if locate_source(data)[0] != "hub":
            raise DataError(
                f"task.data.held_out names no source, and {data.source} has no splits to choose "
                f"from: only datasets of the hub do. Write held_out: {{source: …}}"
            )
        del given["format"]
    return data.model_copy(update={**given, "held_out": None})


def _followed(examples: Examples, held_out: Examples, *, unique: bool) -> Examples:
    """The examples and then the held-out ones; what is in both is held out.

    Raises:
        DataError: for a held-out label that the others do not have.
    """
    position = {name: i for i, name in enumerate(examples.label_names)}
    for name in held_out.label_names:
        if name not in position:
            raise DataError(
                f"{held_out.origin}: label {name!r} is none of those in {examples.origin}, where "
                f"it would be learnt.{did_you_mean(name, examples.label_names)} Rename it, or "
                f"remove its examples"
            )
    renumbered = np.asarray([position[name] for name in held_out.label_names])[held_out.labels]
    seen = set(held_out.digests) if unique else set()
    kept = [i for i, digest in enumerate(examples.digests) if digest not in seen]
    also = "" if len(kept) == len(examples) else f", {len(examples) - len(kept)} of them held out"
    return Examples(
        contents=_joined(pick(examples.contents, kept), held_out.contents),
        labels=np.concatenate([examples.labels[kept], renumbered]),
        label_names=examples.label_names,
        digests=(*(examples.digests[i] for i in kept), *held_out.digests),
        origin=f"{examples.origin}{also}, with {held_out.origin}",
        further=[*(examples.further[i] for i in kept), *held_out.further]
        if examples.further
        else (),
        groups=None
        if examples.groups is None or held_out.groups is None
        else [*(examples.groups[i] for i in kept), *held_out.groups],
        held_out=len(held_out),
    )


def _joined(one: Sequence[Any], other: Sequence[Any]) -> Sequence[Any]:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.shape[1:] != other.shape[1:]:
            raise DataError(
                f"task.data.held_out: its images have the shape {other.shape[1:]}, those of "
                f"task.data.source {one.shape[1:]}"
            )
        return np.concatenate([one, other])
    if isinstance(one, EncodedImages) and isinstance(other, EncodedImages):
        return EncodedImages([part.stored(i) for part in (one, other) for i in range(len(part))])
    return [*one, *other]


def _load(data: DataSection, content: Literal["text", "image"]) -> Examples:
    column = data.text if content == "text" else data.image
    records = read_records(data, column, data.label, data.group)
    if len(records.contents) == 0:
        raise DataError(f"{data.source} has no examples")
    assert records.labels is not None
    labels, names = _parse_labels(records)
    _check_groups(records)
    if content == "text":
        _check_text(records)
        digests = tuple(_digest(text.encode()) for text in records.contents)
    else:
        digests = tuple(_image_digests(records))
    kept = _first_of_each(digests) if data.unique else list(range(len(digests)))
    contents: Sequence[Any] = pick(records.contents, kept)
    further: Sequence[Sequence[str]] = ()
    if content == "text" and data.lines is not None:
        lines = [_lines(text) for text in contents]
        contents = ["\n".join(its[: data.lines]) for its in lines]
        further = [its[data.lines :] for its in lines]
    elif content == "text":
        contents = [text.strip() for text in contents]
    dropped = len(digests) - len(kept)
    return Examples(
        contents=contents,
        labels=labels[kept],
        label_names=names,
        digests=tuple(digests[i] for i in kept),
        origin=f"{data.source} ({dropped} duplicates dropped)" if dropped else data.source,
        further=further,
        groups=None if records.groups is None else [records.groups[i] for i in kept],
    )


def pick(contents: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Some of the contents; encoded images stay encoded."""
    if isinstance(contents, np.ndarray):
        return contents[indices]
    if isinstance(contents, EncodedImages):
        return EncodedImages([contents.stored(i) for i in indices])
    return [contents[i] for i in indices]


def load_corpus(data: DataSection) -> list[str]:
    """Running text for language modelling: files, or the rows of a text column.

    Raises:
        DataError: for a missing file or column, or no text at all.
    """
    records = read_records(data, data.text, None)
    texts = [text for text in records.contents if isinstance(text, str) and text.strip()]
    if not texts:
        raise DataError(f"{data.source} holds no text in {data.text!r}")
    return texts


def align_labels(examples: Examples, id2label: Mapping[str, str] | None) -> Examples:
    """Number the labels as a model that already has its head does.

    Label names are matched with the model's, ignoring case; failing that, labels that are numbers
    below the model's number of classes are taken as they are.

    Raises:
        DataError: if neither fits.
    """
    by_index = {int(i): name for i, name in (id2label or {"0": "LABEL_0", "1": "LABEL_1"}).items()}
    names = tuple(by_index[i] for i in sorted(by_index))
    position = {name.casefold(): i for i, name in enumerate(names)}
    wanted = [name.casefold() for name in examples.label_names]
    if all(name in position for name in wanted):
        mapping = [position[name] for name in wanted]
    elif all(name.isdigit() and int(name) < len(names) for name in wanted):
        mapping = [int(name) for name in wanted]
    else:
        odd = next(name for name in examples.label_names if name.casefold() not in position)
        raise DataError(
            f"{examples.origin}: label {odd!r} is none of the model's.{did_you_mean(odd, names)} "
            f"The model's labels: {', '.join(names[:20])}. Rename the labels, or fit a head for "
            f"them with task.teacher.fit: full (or head)"
        )
    labels = np.asarray(mapping, dtype=np.int64)[examples.labels]
    return replace(examples, labels=labels, label_names=names)


def _parse_labels(records: Records) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    assert records.labels is not None
    raw = [_label(value, i, records) for i, value in enumerate(records.labels)]
    if records.class_names is not None:
        return np.asarray(raw, dtype=np.int64), records.class_names
    kinds = {type(value) for value in raw}
    if len(kinds) > 1:
        odd = next(i for i, value in enumerate(raw) if type(value) is not type(raw[0]))
        raise DataError(
            f"{records.locate(odd)}: label {raw[odd]!r} is no {type(raw[0]).__name__} like the "
            f"ones before it. Labels are all text or all whole numbers"
        )
    values = sorted(set(raw))
    if len(values) < 2:
        raise DataError(
            f"{records.locate(0)}: every example has the label {values[0]!r}; classification "
            f"needs at least two"
        )
    position = {value: i for i, value in enumerate(values)}
    return np.asarray([position[v] for v in raw], dtype=np.int64), tuple(map(str, values))


def _label(value: Any, index: int, records: Records) -> int | str:
    """A label as text or as a whole number."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if records.class_names is None or 0 <= value < len(records.class_names):
            return value
        raise DataError(
            f"{records.locate(index)}: label {value} is outside 0–{len(records.class_names) - 1}, "
            f"the {len(records.class_names)} classes the dataset declares"
        )
    raise DataError(
        f"{records.locate(index)}: label {value!r} cannot be read. A label is a text or a whole "
        f"number, one per example"
    )


def _check_groups(records: Records) -> None:
    for i, group in enumerate(records.groups or ()):
        if not isinstance(group, str | int | float):
            raise DataError(
                f"{records.locate(i)}: group {group!r} cannot be read. A group is a text or a "
                f"number, one per example"
            )


def _check_text(records: Records) -> None:
    for i, text in enumerate(records.contents):
        if not isinstance(text, str):
            found = "nothing" if text is None else type(text).__name__
            raise DataError(
                f"{records.locate(i)}: expected text, found {found}. Remove the example, or set "
                f"task.data.text to the column with the text"
            )
        if not text.strip():
            raise DataError(f"{records.locate(i)}: empty text. Remove the example")


def _lines(text: str) -> list[str]:
    """Lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _image_digests(records: Records) -> list[str]:
    contents = records.contents
    if isinstance(contents, EncodedImages):
        return [_digest(contents.stored(i)) for i in range(len(contents))]
    if not isinstance(contents, np.ndarray):
        raise DataError(
            f"{records.locate(0)}: no image. Set task.data.image to the column with the images"
        )
    if (
        contents.dtype != np.uint8
        or contents.ndim not in (3, 4)
        or contents.shape[3:]
        not in (
            (),
            (1,),
            (3,),
        )
    ):
        raise DataError(
            f"{records.locate(0)}: images of shape {contents.shape} and type {contents.dtype}; "
            f"expected uint8 (N, height, width) or (N, height, width, 3)"
        )
    return [_digest(image.tobytes()) for image in contents]


def _first_of_each(digests: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    return list(first.values())


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
