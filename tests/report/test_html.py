"""The web page: self-contained, escaped, and holding the figures of the study."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from samples import baselines, failed, on_two_runtimes, record, records, view

from autocomp.core.budget import Budget
from autocomp.report.html import front_html


class Page(HTMLParser):
    """Tags with attributes, and the text of the data block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "title":
            self.title += data

    @property
    def shown(self) -> str:
        """Everything a person may read that comes from the data."""
        data = self.data
        words = [data["measure"], data["budget"], data["quality"]["title"], str(data["report"])]
        return " ".join([*words, *(trial["missed"] for trial in data["trials"])])

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded


def test_it_needs_nothing_from_the_network() -> None:
    text = front_html(view())
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed")]
    assert not [1 for _, attributes in page.tags if "src" in attributes or "href" in attributes]
    urls = set(re.findall(r"https?://[^\"'\s]+", text))
    assert urls == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "localStorage" not in text
    assert "cookie" not in text


def test_it_is_small() -> None:
    assert len(front_html(view([]))) < 20_000
    each = len(front_html(view(records(30)))) - len(front_html(view(records(10))))
    assert each / 20 < 2_000


def test_names_cannot_break_out() -> None:
    evil = "</script><img src=x onerror=alert(1)>&\u2028"
    data = view([*baselines(), record(1, id=evil)])
    data["study"] = evil
    text = front_html(data)
    page = Page(text)
    assert len(page.scripts) == 2
    assert "<img" not in text
    assert page.title == f"{evil}: front"
    assert page.data["study"] == evil
    assert page.data["trials"][-1]["id"] == evil


def test_scripts_insert_text_never_markup() -> None:
    text = front_html(view())
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text
    assert "document.write" not in text


def test_the_figures_are_the_study_s() -> None:
    source = view()
    page = Page(front_html(source)).data
    assert page["budget"] == "latency ≤ 1.3 ms, size ≤ 10.1 MB"
    assert len(page["trials"]) == len(source["trials"])
    for shown, trial in zip(page["trials"], source["trials"], strict=True):
        assert (shown["id"], shown["front"]) == (trial["id"], trial["on_front"])
        assert shown["latency_ms"] == trial["latency_ms"]
        assert shown["chosen"] == (trial["id"] == source["chosen"])
    dense = page["trials"][0]
    assert dense["text"]["latency_ms"] == "6.5 ms"
    assert dense["text"]["size_bytes_share"] == "100%"
    latency, size = page["costs"]
    assert (latency["limit"], size["limit"]) == (1.3, 10.1e6)
    for axis in (latency, size):
        shown = [trial[axis["name"]] for trial in page["trials"] if trial["drawn"]]
        assert axis["low"] < min(shown)
        assert max(shown) < axis["high"]
        assert all(axis["low"] <= tick <= axis["high"] for tick, _ in axis["ticks"])


def test_a_language_model_is_drawn_in_perplexity() -> None:
    trials = [
        replace(trial, metric={"name": "perplexity", "value": 1 / trial.quality})
        for trial in records()
        if trial.quality is not None
    ]
    floor = 0.9
    text = front_html(view(trials, Budget(latency_ms=1.3, quality=floor)))
    page = Page(text).data
    axis = page["quality"]
    assert (page["measure"], axis["title"]) == ("perplexity", "perplexity, lower is better")
    assert page["budget"] == "latency ≤ 1.3 ms, perplexity ≤ 1.111"
    assert axis["floorText"] == "budget perplexity ≤ 1.111"
    assert axis["low"] < axis["floor"] < axis["high"]
    assert len(axis["ticks"]) >= 3
    for height, tick in axis["ticks"]:
        assert axis["low"] <= height <= axis["high"]
        assert height == pytest.approx(-math.log(float(tick)), rel=1e-3, abs=1e-4)
    by_id = {trial["id"]: trial for trial in page["trials"]}
    for trial in trials:
        shown = by_id[trial.id]
        assert shown["shown"] == pytest.approx(1 / trial.quality)
        assert shown["height"] == pytest.approx(math.log(trial.quality))
    heights = [(trial["height"], trial["quality"]) for trial in page["trials"]]
    assert sorted(heights) == sorted(heights, key=lambda pair: pair[1])
    assert "quality" not in Page(text).shown


def test_who_misses_the_floor_and_by_how_much() -> None:
    trials = [*baselines(), record(1, id="poor", quality=0.81), record(2, id="good", quality=0.91)]
    page = Page(front_html(view(trials, Budget(quality=0.9)))).data
    by_id = {trial["id"]: trial for trial in page["trials"]}
    assert (by_id["poor"]["verdict"], by_id["poor"]["missed"]) == ("below", "quality −10%")
    assert (by_id["good"]["verdict"], by_id["good"]["missed"]) == ("met", "")
    assert by_id["dense"]["missed"] == ""
    assert page["quality"]["floor"] == 0.9
    assert page["latency"].startswith("processor time of its one thread")


def test_unmeasured_and_failed_trials_are_not_drawn() -> None:
    page = Page(front_html(view([failed(3), record(1, measured=None)]))).data
    assert [trial["drawn"] for trial in page["trials"]] == [False, False]
    assert page["failed"] == 1


def test_an_empty_study_has_a_page() -> None:
    page = Page(front_html(view([]))).data
    assert page["trials"] == []
    assert page["hypervolume"] is None


def test_the_report_split_is_told_of_where_it_was_opened() -> None:
    whole = view([record(1)])
    assert Page(front_html(whole)).data["report"] is None
    report = {
        "id": "t-1",
        "quality": 0.8,
        "teacher_quality": 0.9,
        "ratio": 0.8 / 0.9,
        "metric": {"name": "accuracy", "value": 0.8},
        "teacher_metric": {"name": "accuracy", "value": 0.9},
    }
    shown = Page(front_html({**whole, "report": report})).data["report"]
    assert shown.startswith("t-1 on the report split: accuracy 0.800, teacher 0.900")
    assert shown.endswith("88.9% of the teacher's")


def test_each_trial_tells_its_runtime_where_there_are_several() -> None:
    data = Page(front_html(view(on_two_runtimes()))).data
    assert data["runtimes"] == 2
    assert data["dense"] == "dense"
    for trial in data["trials"]:
        assert trial["runtime"] in ("onnxruntime", "openvino")
        assert trial["summary"].endswith(f"on {trial['runtime']}")
    assert Page(front_html(view())).data["runtimes"] == 1
