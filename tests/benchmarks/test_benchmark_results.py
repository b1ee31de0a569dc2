"""Results have the promised shape, name nothing but the processor, and are what the docs quote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from autocomp.operators import OPERATORS  # noqa: E402
from autocomp.targets.cost_table import CostTable, Entry  # noqa: E402
from autocomp.targets.runtimes import with_relatives  # noqa: E402
from benchmarks import NAMES, controller, cost_table, operators, peer_solvers, results, tables  # noqa: E402
from benchmarks.operators import CASES  # noqa: E402

ADDED = {"sum_bias_percent"}
"""Figures that results taken before they were there need not have."""
FIRST = ("heads", "width", "skip", "rank", "w8a8", "w4", "sparse", "table8", "tome")
"""Cases that every result has."""
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_docs_quote_the_results() -> None:
    text = tables.DOCS.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python -m benchmarks.tables"
    assert [f"<!-- results: {name} -->" in text for name in NAMES] == [True] * len(NAMES)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_have_their_shape(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    result = json.loads(text)
    assert list(result) == ["device", "date", "versions", "figures"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    if path.stem == "operators":  # a figure less for what a runtime does not offer
        known = {
            f"{r}_{block}{case}_{kind}_percent"
            for r in operators.RUNTIMES
            for block in ("", "token_")
            for kind in ("latency", "size")
            for case in CASES
        }
        assert known >= set(result["figures"]) > {f"onnxruntime_{c}_size_percent" for c in FIRST}
    elif path.stem == "peer_solvers":  # the peer need not be there
        known = {
            f"{method}_{width}_{side}_{figure}"
            for method in peer_solvers.METHODS
            for width in peer_solvers.WIDTHS
            for side in ("ours", "peer")
            for figure in ("s", "error_percent")
        }
        assert known >= set(result["figures"]) >= {key for key in known if "_ours_" in key}
    elif path.stem.startswith("search_quality"):  # a row for each limit, with all its methods
        rows = tables.WIDE[path.stem](result["figures"])
        assert all(len(row) == len(rows[0]) for row in rows)
        assert set(rows[1][1]) - set("– /")
    elif path.stem in tables.WIDE:  # mixers: a table row for each, none of it empty
        rows = tables.WIDE[path.stem](result["figures"])
        assert len(rows) > 2
        built = [row for row in rows[2:] if row[0] != "no attention"]  # of which nothing is built
        assert all(set(cell) - set("– /") for row in built for cell in row)
    else:
        promised = {figure for figure, _, _ in tables.ROWS[path.stem]}
        assert promised - set(result["figures"]) <= ADDED
    assert all(isinstance(value, float | int) for value in result["figures"].values())
    assert set(result["device"]) == {"machine", "cpu", "instructions", "cores"}
    assert not re.search(r'"[^"]*(/|\\\\|~)[^"]*"', text), "a path"


def test_a_new_result_changes_the_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    text = "before\n<!-- results: cost_table -->\nold\n<!-- end -->\nafter\n"
    assert "Not measured yet." in tables.filled(text)
    figures = {figure: 1.23456 for figure, _, _ in tables.ROWS["cost_table"]}
    written = results.write("cost_table", figures)
    assert written == results.read("cost_table")
    filled = tables.filled(text)
    assert "| **mean error, %** | 1.235 | ≤ 5 |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")


def test_a_verdict_names_what_is_gained() -> None:
    assert operators.verdict([94.9, 100], 99) == "speed"
    assert operators.verdict([95.1], 94) == "bytes"
    assert operators.verdict([40], 50) == "speed, bytes"
    assert operators.verdict([95.1, 104], 96) == "neither"
    figures = {"openvino_w4_latency_percent": 101.0, "openvino_w4_size_percent": 60.0}
    assert tables.operator_verdict(figures, "openvino", "w4") == "bytes"
    figures["openvino_token_w4_latency_percent"] = 80.0
    assert tables.operator_verdict(figures, "openvino", "w4") == "speed, bytes"
    assert tables.operator_verdict(figures, "onnxruntime", "w4") == "–"


@pytest.mark.parametrize("name", operators.OPERATORS)
@pytest.mark.parametrize("runtime", operators.RUNTIMES)
def test_operators_buy_what_they_declare(name: str, runtime: str) -> None:
    """One case gains what is declared, unless one has no figures; no other gain is large."""
    result = results.read("operators")
    assert result is not None
    figures, operator = result["figures"], OPERATORS.get(name)
    cases = operators.OPERATORS[name]
    for gain, declared, kind in (
        ("speed", operator.speeds_up, "latency"),
        ("bytes", operator.shrinks, "size"),
    ):
        keys = [f"{runtime}_{block}{c}_{kind}_percent" for c in cases for block in ("", "token_")]
        found = [figures[key] for key in keys if key in figures]
        verdicts = [tables.operator_verdict(figures, runtime, case) for case in cases]
        if not found:
            continue
        if f"{runtime}-cpu" in with_relatives(declared):
            assert any(gain in one or one == "–" for one in verdicts), (gain, found)
        else:
            assert min(found) > 90, (gain, found)


def test_the_bias_of_the_sum_is_that_before_the_fit() -> None:
    entries = {unit: {"dense": Entry(ms, 10, "float")} for unit, ms in (("a", 1.0), ("b", 2.0))}
    table = CostTable("device", {}, entries, base_ms=1.0, rest_bytes=0)
    table.fit([({"a": "dense", "b": "dense"}, ms) for ms in (5.0, 5.0, 4.0)])
    assert table.predict({"a": "dense", "b": "dense"}).latency_ms != pytest.approx(4.0)
    assert cost_table.sum_bias(table) == pytest.approx((0.8 - 1 + 0.8 - 1 + 0) / 3)
    assert len(table.pairs) == 3


def test_a_peer_that_was_not_run_leaves_its_columns_empty() -> None:
    figures = {"gptq_384_ours_s": 0.02, "gptq_384_ours_error_percent": 0.25}
    figures |= {"sparsegpt_768_peer_s": 0.5}
    rows = {first: rest for first, *rest in tables.WIDE["peer_solvers"](figures)}
    assert rows["GPTQ 4-bit, groups of 128, 384 × 384"] == ["0.02", "–", "0.25", "–"]
    assert rows["SparseGPT 50%, 768 × 768"] == ["–", "0.5", "–", "–"]
    assert len(rows) == 1 + 3 * 4


def test_the_peer_is_missed_with_a_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_solvers, "find_spec", lambda name: None)
    monkeypatch.setattr(peer_solvers, "WIDTHS", (64,))
    found = peer_solvers.run(None)
    assert set(found) == {
        f"{method}_64_ours_{figure}"
        for method in peer_solvers.METHODS
        for figure in ("s", "error_percent")
    }
    assert "pip install --no-deps --target peer llmcompressor" in capsys.readouterr().out


def test_overhead_is_what_neither_trials_nor_waiting_account_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = [("teacher", 50, 0), ("scores", 10, 9), ("screening", 20, 18)]
    phases += [("trials", 60, 0), ("report", 2, 0)]
    payloads = [{"name": n, "seconds": s, "waited_s": w} for n, s, w in phases]

    class Trial:
        def __init__(self, kind: str, **seconds: float) -> None:
            self.kind, self.seconds = kind, seconds

    class FakeStudy:
        @staticmethod
        def open(path: Path) -> Any:
            return FakeStudy()

        @property
        def ledger(self) -> Any:
            return self

        def read(self) -> Any:
            return self

        def of(self, kind: str) -> dict[str, Any]:
            found = payloads if kind == "phase" else [{}] * 7
            return {str(at): payload for at, payload in enumerate(found)}

        def trials(self) -> list[Trial]:
            uniform, found = Trial("uniform", distil=40), Trial("search", distil=50, measure=20)
            return [Trial("dense", distil=1000), uniform, found]

    monkeypatch.setattr("autocomp.study.directory.Study", FakeStudy)
    found = controller.figures(Path("study"), workers=2)
    assert found["preparation_s"] == 50
    assert found["search_s"] == 92
    assert found["overhead_screening_s"] == 3
    assert found["overhead_trials_s"] == 60 - 110 / 2
    assert found["overhead_percent"] == pytest.approx(100 * (3 + 5 + 2) / 92)
    assert (found["screened"], found["trials"]) == (7, 2)
