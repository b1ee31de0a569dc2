"""The tables of docs/benchmarks.md: `python -m benchmarks.tables` writes them from the results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. Needs nothing but the result
files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    NAMES,
    mixer_tables,
    pipeline,
    rivals_dinov2,
    rivals_llama,
    rivals_minilm,
    rivals_minilm_twentieth,
)
from benchmarks.mixers import CASES as MIXED
from benchmarks.operators import CASES, GENERATING, RUNTIMES, verdict
from benchmarks.peer_solvers import METHODS, WIDTHS
from benchmarks.results import read
from benchmarks.rivals_tables import proposals, rivals
from benchmarks.search_quality import tables as search_quality

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

ROWS: dict[str, list[tuple[str, str, str]]] = {
    "screening": [
        ("from_scratch_calibrate_s", "from scratch: calibration, s", ""),
        ("from_scratch_compress_s", "from scratch: operators, s", ""),
        ("from_scratch_evaluate_s", "from scratch: evaluation, s", ""),
        ("from_scratch_s", "from scratch, s", ""),
        ("stitched_s", "stitched, s", ""),
        ("stitched_first_read_s", "stitched, its items read and checked for the first time, s", ""),
        ("ratio", "**ratio**", "≥ 20"),
        ("ratio_first_read", "ratio, items read for the first time", ""),
        ("replace_one_score_s", "a replace-one score, s", ""),
    ],
    "cost_table": [
        ("candidates", "candidates", "≥ 20"),
        ("fastest_ms", "fastest, ms", ""),
        ("slowest_ms", "slowest, ms", ""),
        ("sum_bias_percent", "sum of sublayers timed alone, before the fit: mean bias, %", ""),
        ("mean_error_percent", "**mean error, %**", "≤ 5"),
        ("worst_error_percent", "worst error, %", ""),
        ("spearman", "**rank correlation (Spearman)**", "≥ 0.95"),
        ("table_s", "making the table, s", ""),
    ],
    "library_build": [
        ("gptq_block_s", "GPTQ of one block, s", ""),
        ("training_pass_s", "one forward and backward pass, s", ""),
        ("time_ratio", "**ratio**", "≤ 2"),
        ("worker_peak_mb", "peak of the worker, MB", ""),
        ("worker_imports_mb", "of which imports, MB", ""),
        ("build_peak_mb", "peak of the build, MB", ""),
        ("model_mb", "model, MB", ""),
        ("statistics_mb", "statistics of the block, MB", ""),
        ("limit_mb", "twice the model and the statistics, MB", ""),
        ("memory_share_percent", "**peak of the build, % of that**", "≤ 100"),
    ],
    "block_memory": [
        ("attention_weights_mb", "attention: weights, MB", ""),
        ("attention_gram_mb", "attention: Gram matrices, MB", ""),
        ("attention_gptq_peak_mb", "attention: peak of GPTQ at 4 bits, MB", ""),
        ("ffn_weights_mb", "feed-forward: weights, MB", ""),
        ("ffn_gram_mb", "feed-forward: Gram matrices, MB", ""),
        ("ffn_gptq_peak_mb", "feed-forward: peak of GPTQ at 4 bits, MB", ""),
        ("ffn_sparse_gptq_peak_mb", "feed-forward: peak of SparseGPT with GPTQ, MB", ""),
        ("ffn_three_peak_mb", "feed-forward: peak of GPTQ, half the width, both, MB", ""),
        ("attention_gptq_s", "attention: GPTQ, s", ""),
        ("ffn_gptq_s", "feed-forward: GPTQ, s", ""),
        ("ffn_sparse_gptq_s", "feed-forward: SparseGPT with GPTQ, s", ""),
        ("ffn_three_s", "feed-forward: GPTQ, half the width, both, s", ""),
    ],
    "rank_flips": [
        ("trials", "trials", ""),
        ("screened", "of which were screened", ""),
        ("screening_kl", "screening, before training: with the KL at the end", ""),
        ("rung_12_kl", "an eighth of the tokens", ""),
        ("rung_25_kl", "a quarter", ""),
        ("rung_50_kl", "half", ""),
        ("screening_quality", "screening: with the accuracy at the end", ""),
        ("rung_12_quality", "an eighth of the tokens", ""),
        ("rung_25_quality", "a quarter", ""),
        ("rung_50_quality", "half", ""),
    ],
    "controller": [
        ("screened", "screened candidates", ""),
        ("trials", "trials", ""),
        ("preparation_s", "preparation (not counted), s", ""),
        ("scores_s", "scores, s", ""),
        ("screening_s", "screening, s", ""),
        ("trials_s", "trials, s", ""),
        ("report_s", "report, s", ""),
        ("overhead_screening_s", "overhead of scores and screening, s", ""),
        ("overhead_trials_s", "overhead of trials, s", ""),
        ("overhead_percent", "**overhead, %**", "≤ 10"),
    ],
}
"""Benchmark → (figure, label, goal) in the order of the table."""

ROWS["cost_table_openvino"] = ROWS["cost_table"]
ROWS["cost_table_all_operators"] = ROWS["cost_table"]
ROWS["cost_table_decode"] = [(figure, label, "") for figure, label, _ in ROWS["cost_table"]]
ROWS["cost_table_decode_openvino"] = ROWS["cost_table_decode"]


OPERATOR_COLUMNS = [
    (runtime, kind)
    for runtime in RUNTIMES
    for kind in ("latency", "size", *(["token"] if runtime in GENERATING else []), "verdict")
]


def operator_verdict(figures: dict[str, float], runtime: str, case: str) -> str:
    """What a case buys on a runtime, in a run or in a generated token; – where it has no figure."""
    latencies = [f"{runtime}_{case}_latency_percent", f"{runtime}_token_{case}_latency_percent"]
    sizes = [f"{runtime}_{case}_size_percent", f"{runtime}_token_{case}_size_percent"]
    size = next((figures[key] for key in sizes if key in figures), None)
    if size is None:
        return "–"
    return verdict([figures[key] for key in latencies if key in figures], size)


def _operators(figures: dict[str, float]) -> list[list[str]]:
    """A row per case: label, then figures and verdict per runtime, – where it is not offered."""
    units = {"latency": "latency, %", "size": "size, %", "token": "a token, %"}
    head = [f"{runtime}: {units.get(kind, kind)}" for runtime, kind in OPERATOR_COLUMNS]
    rows = [["operator", *head]]
    for case, (label, _, _) in CASES.items():
        cells = []
        for runtime, kind in OPERATOR_COLUMNS:
            own = f"{runtime}_{case}_{kind}_percent"
            key = f"{runtime}_token_{case}_latency_percent" if kind == "token" else own
            cell = f"{figures[key]:.0f}" if key in figures else "–"
            cells.append(operator_verdict(figures, runtime, case) if kind == "verdict" else cell)
        rows.append([label, *cells])
    return rows


def _solvers(figures: dict[str, float]) -> list[list[str]]:
    """A row per method and width: seconds and errors of both; – where the peer was not run."""
    columns = [(figure, side) for figure in ("s", "error_percent") for side in ("ours", "peer")]
    rows = [["", "ours, s", "peer, s", "ours, error, %", "peer, error, %"]]
    for method, label in METHODS.items():
        for width in WIDTHS:
            keys = [f"{method}_{width}_{side}_{figure}" for figure, side in columns]
            cells = [_number(figures[key]) if key in figures else "–" for key in keys]
            rows.append([f"{label}, {width} × {width}", *cells])
    return rows


WIDE: dict[str, Callable[[dict[str, float]], list[list[str]]]] = {
    "operators": _operators,
    "peer_solvers": _solvers,
    "mixer_latency": mixer_tables.latency,
    **{f"mixers_{model}": partial(mixer_tables.quality, model) for model in MIXED},
    "search_quality_enumerated": search_quality.enumerated,
    "search_quality_large": search_quality.large,
    "pipeline": pipeline.table,
    "rivals_minilm": partial(rivals, rivals_minilm.MATCH, "accuracy"),
    "rivals_minilm_twentieth": partial(rivals, rivals_minilm_twentieth.MATCH, "accuracy"),
    "rivals_llama": partial(rivals, rivals_llama.MATCH, "perplexity"),
    "rivals_dinov2": partial(rivals, rivals_dinov2.MATCH, "accuracy"),
}
"""Benchmark → rows of its table, head first, where that is no list of figures."""

BELOW = {name: proposals for name in WIDE if name.startswith("rivals_")}
"""Benchmark → rows of another table below it."""


def table(name: str, result: dict[str, Any]) -> str:
    """The Markdown table of one result."""
    if name in WIDE:
        tables = [rows(result["figures"]) for rows in (WIDE[name], BELOW.get(name)) if rows]
        lines = [line for cells in tables if cells[1:] for line in (*_markdown(cells), "")]
        return "\n".join([*lines, _origin(result)])
    lines = ["| | measured | goal |", "|---|---:|---:|"]
    lines += [
        f"| {label} | {_cell(result['figures'], figure)} | {goal} |"
        for figure, label, goal in ROWS[name]
    ]
    return "\n".join([*lines, "", _origin(result)])


def _markdown(cells: list[list[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [head, "|---|" + "---:|" * (len(cells[0]) - 1), *rows]


def plain(name: str, result: dict[str, Any]) -> str:
    """The same for a terminal."""
    if name in WIDE:
        return "\n".join(
            f"  {first:<40}{''.join(f'{cell:>24}' for cell in rest)}"
            for first, *rest in WIDE[name](result["figures"])
        )
    rows = [
        (label.replace("**", ""), _cell(result["figures"], figure), goal)
        for figure, label, goal in ROWS[name]
    ]
    width = max(len(label) for label, _, _ in rows)
    return "\n".join(
        f"  {label:<{width}}  {value:>10}{f'   (goal {goal})' if goal else ''}"
        for label, value, goal in rows
    )


def filled(text: str) -> str:
    """`text` with every marked table made anew; one without a result says so."""

    def one(match: re.Match[str]) -> str:
        result = read(match[2])
        body = "Not measured yet." if result is None else table(match[2], result)
        return f"{match[1]}{body}\n{match[3]}"

    return _MARKED.sub(one, text)


def _cell(figures: dict[str, float], figure: str) -> str:
    """A figure, or – where a result is older than the figure."""
    return _number(figures[figure]) if figure in figures else "–"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _origin(result: dict[str, Any]) -> str:
    device, versions = result["device"], result["versions"]
    runtimes = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime"))
    return f"{device['cpu']}, {device['cores']} cores, {runtimes}, {result['date']}."


def main() -> None:
    """Rewrite docs/benchmarks.md."""
    text = DOCS.read_text(encoding="utf-8")
    missing = [name for name in NAMES if f"<!-- results: {name} -->" not in text]
    if missing:
        raise SystemExit(f"{DOCS.name} has no place for {', '.join(missing)}")
    DOCS.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
