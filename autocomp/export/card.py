"""The model card: what the model is, what it costs, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from autocomp.core.measurement import Measurement, latency_clock
from autocomp.core.metric import Scale
from autocomp.core.quantities import format_bytes, format_ms
from autocomp.export.loading import PRECISIONS, loading_code
from autocomp.export.protocol import ExportRequest
from autocomp.models.vocabulary import load_vocabulary

_MEASURED = "Measured on the exported file, on the target; the estimate came from the cost table."
_BF16 = (
    "What is not in integers is computed in bfloat16, which is asked for where the model is "
    "compiled: the figures hold on a processor with instructions for it."
)


def model_card(
    request: ExportRequest, file: str, loading: str | None = None, remarks: Sequence[str] = ()
) -> str:
    """The card, as Markdown.

    Args:
        file: name of the model's file.
        loading: how to load it, Python; by default with ONNX Runtime.
        remarks: what the figures mean for these files, where they were not measured on them.
    """
    spec, record = request.spec, request.record
    dense = None if request.dense is None else request.dense.measured
    workload = spec.target.workload
    runtime = record.candidate.runtime or spec.target.runtime
    lines = [
        f"# {spec.model.source.removeprefix('package:')}, compressed",
        "",
        f"Trial `{record.id}` of an autocomp study, proposed by {record.proposed_by}. Task: "
        f"{spec.task.name}. Target: {runtime} on {spec.target.device}, batch "
        f"{workload.batch}, {_shape(request)}, {workload.threads} thread(s).",
        "",
        "| | measured | of dense | estimated before the trial |",
        "|---|---|---|---|",
        *_rows(request, record.measured, dense, record.estimated),
        "",
        *_quality(request),
        "",
        *(remarks or [_MEASURED]),
        *([_BF16] if PRECISIONS.get(str(runtime)) == "bf16" and loading is None else []),
        _clock(request),
        "What was done to each unit is in `candidate.yaml`.",
        *_vocabulary(request),
        "",
        "## Load",
        "",
        "```python",
        (
            loading or loading_code(request.companions.inputs, file, workload.generate, runtime)
        ).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _rows(
    request: ExportRequest,
    measured: Measurement | None,
    dense: Measurement | None,
    estimated: Measurement | None,
) -> list[str]:
    rows = []
    prompt = request.spec.target.workload.prompt
    latency = [("latency", "latency_ms", format_ms)]
    if prompt is not None:
        latency = [
            ("latency of a generated token", "latency_ms", format_ms),
            (f"reading the prompt, {prompt} tokens", "prefill_ms", format_ms),
        ]
    for label, name, show in (
        *latency,
        ("size on disk", "size_bytes", format_bytes),
        ("peak memory", "peak_memory_bytes", format_bytes),
    ):
        value = getattr(measured, name, None)
        reference = getattr(dense, name, None)
        share = f"{value / reference:.1%}" if value is not None and reference else "–"
        rows.append(
            f"| {label} | {show(value)} | {share} | {show(getattr(estimated, name, None))} |"
        )
    return rows


def _clock(request: ExportRequest) -> str:
    """What the latency is: which clock, and what the other one said."""
    threads = request.spec.target.workload.threads
    measured = request.record.measured
    wall = None if measured is None else measured.latency_wall_ms
    if latency_clock(threads) == "processor":
        clock = "processor time of one thread"
    else:
        clock = f"wall-clock time on {threads} threads"
    line = f"Latency is {clock}, normalised by an anchor model run in between"
    return line + ("." if wall is None else f"; the plain wall-clock median was {format_ms(wall)}.")


def _quality(request: ExportRequest) -> list[str]:
    record = request.record
    name = record.metric.get("name", "quality")
    lines = []
    if record.metric:
        lines.append(
            f"- {name} on the search split: {record.metric['value']:.4g}{_interval(request)}"
        )
    if record.teacher_kl is not None:
        lines.append(f"- KL to the teacher on the search split: {record.teacher_kl:.4g} nats")
    if request.report is not None:
        report = request.report
        whole = {"name": "quality", "value": report["quality"]}
        teacher = {"value": report["teacher_quality"]}
        found, reference = report.get("metric") or whole, report.get("teacher_metric") or teacher
        ratio = report["quality"] / report["teacher_quality"] if report["teacher_quality"] else 0.0
        of = f"quality {ratio:.1%} of the teacher's"
        if report.get("ratio_low") is not None:
            of += f", 95% interval {report['ratio_low']:.1%} to {report['ratio_high']:.1%}, paired"
        lines.append(
            f"- {found['name']} on the report split, after selection: {found['value']:.4g} "
            f"(teacher {reference['value']:.4g}; {of})"
        )
        count = report.get("candidates") or 1
        looked = "this candidate" if count == 1 else f"{count} candidates"
        lines.append(f"- the report split was opened for {looked} of the study, and selected none")
    return lines


def _interval(request: ExportRequest) -> str:
    """` (95% interval 0.863 to 0.933)` of the metric; empty where it is not known."""
    its, record = request.interval, request.record
    if its is None:
        return ""
    low, high = Scale.of([(record.metric, record.quality)]).ends(its.low, its.high)
    return f" (95% interval {low:.4g} to {high:.4g})"


def _vocabulary(request: ExportRequest) -> list[str]:
    kept = load_vocabulary(request.artifact.path.parent)
    if kept is None:
        return []
    return [
        f"The vocabulary holds {len(kept.kept)} of {kept.size} tokens: use the tokenizer in this "
        f"directory, whose ids are not those of the source model (`vocabulary.json` lists these)."
    ]


def _shape(request: ExportRequest) -> str:
    workload = request.spec.target.workload
    if workload.image is not None:
        return f"{workload.image} × {workload.image} pixels"
    if workload.prompt is not None:
        return f"prompt of {workload.prompt} tokens, {workload.generate} generated"
    return f"{workload.sequence} tokens"
