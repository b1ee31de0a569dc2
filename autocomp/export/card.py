"""The model card: what the model is, what it costs, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

from autocomp.core.measurement import Measurement
from autocomp.core.quantities import format_bytes, format_ms
from autocomp.export.protocol import ExportRequest
from autocomp.models.vocabulary import load_vocabulary

_LOAD_TEXT = """\
from pathlib import Path
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

session = ort.InferenceSession("{file}")
encoded = Tokenizer.from_file("tokenizer.json").encode("Shares rise as bank beats forecasts")
feeds = {{
    "input_ids": np.array([encoded.ids]), "attention_mask": np.array([encoded.attention_mask])
}}
{result}
"""
_LOAD_IMAGE = """\
import json
from pathlib import Path
import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

how = json.loads(Path("preprocessor_config.json").read_text())
size = (how["crop_size"]["width"], how["crop_size"]["height"])
image = ImageOps.fit(Image.open("image.png").convert("RGB"), size, how["resample"])
pixels = (np.asarray(image) / 255 - how["image_mean"]) / how["image_std"]
feeds = {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}}
logits = ort.InferenceSession("{file}").run(None, feeds)[0]
print(Path("labels.txt").read_text().splitlines()[logits[0].argmax()])
"""
_CLASSIFY = """\
logits = session.run(None, {k.name: feeds[k.name] for k in session.get_inputs()})[0]
print(Path("labels.txt").read_text().splitlines()[logits[0].argmax()])"""
_LOAD_TOKENS = """\
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

session = ort.InferenceSession("{file}")
tokenizer = Tokenizer.from_file("tokenizer.json")
encoded = tokenizer.encode("She opened the door and")
logits = session.run(None, {{"input_ids": np.array([encoded.ids])}})[0]  # (1, tokens, vocabulary)
print(tokenizer.decode([logits[0, -1].argmax()]))  # the most likely next token
"""
_LOAD_GENERATE = """\
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

session, tokenizer = ort.InferenceSession("{file}"), Tokenizer.from_file("tokenizer.json")
ids = new = tokenizer.encode("She opened the door and").ids
caches = session.get_inputs()[1:]  # past_key_values.N.key, .value: (batch, heads, past, width)
past = {{c.name: np.zeros((1, c.shape[1], 0, c.shape[3]), np.float32) for c in caches}}
for _ in range({tokens}):
    logits, *present = session.run(None, {{"input_ids": np.array([new]), **past}})
    past = dict(zip(past, present))
    new = [int(logits[0, -1].argmax())]  # the most likely next token
    ids = ids + new
print(tokenizer.decode(ids))
"""


_MEASURED = "Measured on the exported file, on the target; the estimate came from the cost table."


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
        "What was done to each unit is in `candidate.yaml`.",
        *_vocabulary(request),
        "",
        "## Load",
        "",
        "```python",
        (loading or _loading(request, file)).rstrip(),
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


def _quality(request: ExportRequest) -> list[str]:
    record = request.record
    name = record.metric.get("name", "quality")
    lines = []
    if record.metric:
        lines.append(f"- {name} on the search split: {record.metric['value']:.4g}")
    if record.teacher_kl is not None:
        lines.append(f"- KL to the teacher on the search split: {record.teacher_kl:.4g} nats")
    if request.report is not None:
        report = request.report
        whole = {"name": "quality", "value": report["quality"]}
        teacher = {"value": report["teacher_quality"]}
        found, reference = report.get("metric", whole), report.get("teacher_metric", teacher)
        ratio = report["quality"] / report["teacher_quality"] if report["teacher_quality"] else 0.0
        lines.append(
            f"- {found['name']} on the report split, opened once: {found['value']:.4g} (teacher "
            f"{reference['value']:.4g}; quality {ratio:.1%} of the teacher's)"
        )
    return lines


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


def _loading(request: ExportRequest, file: str) -> str:
    if "pixel_values" in request.companions.inputs:
        return _LOAD_IMAGE.format(file=file)
    generate = request.spec.target.workload.generate
    if generate is not None:
        return _LOAD_GENERATE.format(file=file, tokens=generate)
    if "attention_mask" not in request.companions.inputs:
        return _LOAD_TOKENS.format(file=file)
    return _LOAD_TEXT.format(file=file, result=_CLASSIFY)
