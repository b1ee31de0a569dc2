"""The tables of the mixers' benchmarks."""

from __future__ import annotations

from benchmarks.mixer_latency import LENGTHS, RUNTIMES, SHAPES, SOFTMAX
from benchmarks.mixers import CASES, SKIP

Figures = dict[str, float]


def quality(model: str, figures: Figures) -> list[list[str]]:
    """A row per mixer; a cell holds the figures for 1, 2, 3 … replaced layers."""
    case = CASES[model]
    metric = "perplexity" if case.spec.startswith("llama") else "accuracy, %"
    counts = " / ".join(str(count) for count in case.counts)
    head = [
        f"{counts} layers replaced",
        "building a layer, s",
        "peak, MB",
        "error at the layer, %",
        "cosine",
        "KL, nats",
        f"{metric}",
        "KL, distilled",
        f"{metric}, distilled",
    ]
    columns = (
        ("local_cosine", ".3f"),
        ("local_kl", ".3g"),
        ("local_quality", ".1f"),
        ("kd_kl", ".3g"),
        ("kd_quality", ".1f"),
    )
    dense = _cell(figures, "skip_1_dense_quality", ".1f")
    rows = [head, ["attention as it was", "–", "–", "0", "1", "0", dense, "–", "–"]]
    for name in (*case.mixers, SKIP):
        cells = [
            _cell(figures, f"{name}_build_s", ".0f"),
            _cell(figures, f"{name}_peak_mb", ".0f"),
            _cell(figures, f"{name}_error_percent", ".1f"),
        ]
        for figure, form in columns:
            found = [
                "diverged"
                if figure.startswith("kd_") and f"{name}_{count}_kd_diverged" in figures
                else _cell(figures, f"{name}_{count}_{figure}", form)
                for count in case.counts
            ]
            cells.append(" / ".join(found))
        rows.append(["no attention" if name == SKIP else name, *cells])
    return rows


def latency(figures: Figures) -> list[list[str]]:
    """A row per shape and mixer: ms, and times faster than softmax attention."""
    columns = [(length, runtime) for length in LENGTHS for runtime in RUNTIMES]
    head = [f"{length}, {runtime}" for length, runtime in columns]
    rows = [["ms (× as fast as softmax)", *head]]
    for shape in SHAPES:
        names = {key.split("_")[1]: None for key in figures if key.startswith(f"{shape}_")}
        for name in names:
            cells = []
            for length, runtime in columns:
                key = f"{shape}_{name}_{length}_{runtime}_ms"
                softmax = figures.get(f"{shape}_{SOFTMAX}_{length}_{runtime}_ms")
                cell = _cell(figures, key, ".3g")
                if key in figures and softmax is not None and name != SOFTMAX:
                    cell = f"{cell} ({softmax / figures[key]:.2g}×)"
                cells.append(cell)
            rows.append([f"{shape}: {name}", *cells])
    return rows


def _cell(figures: Figures, key: str, form: str) -> str:
    return format(figures[key], form) if key in figures else "–"
