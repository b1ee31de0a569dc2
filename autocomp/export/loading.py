"""The dozen lines of a model card that load and run the model; they need no autocomp, no torch."""

from __future__ import annotations

from collections.abc import Container

_TEXT = """\
from pathlib import Path
import numpy as np
{imports}
from tokenizers import Tokenizer

encoded = Tokenizer.from_file("tokenizer.json").encode("Shares rise as bank beats forecasts")
feeds = {{
    "input_ids": np.array([encoded.ids]), "attention_mask": np.array([encoded.attention_mask])
}}
{run}
print(Path("labels.txt").read_text().splitlines()[logits[0].argmax()])
"""
_IMAGE = """\
import json
from pathlib import Path
import numpy as np
{imports}
from PIL import Image, ImageOps

how = json.loads(Path("preprocessor_config.json").read_text())
size = (how["crop_size"]["width"], how["crop_size"]["height"])
image = ImageOps.fit(Image.open("image.png").convert("RGB"), size, how["resample"])
pixels = (np.asarray(image) / 255 - how["image_mean"]) / how["image_std"]
feeds = {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}}
{run}
print(Path("labels.txt").read_text().splitlines()[logits[0].argmax()])
"""
_TOKENS = """\
import numpy as np
{imports}
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
encoded = tokenizer.encode("She opened the door and")
feeds = {{"input_ids": np.array([encoded.ids])}}
{run}  # (1, tokens, vocabulary)
print(tokenizer.decode([logits[0, -1].argmax()]))  # the most likely next token
"""

_GENERATE = """\
import numpy as np
{imports}
from tokenizers import Tokenizer

{open}
tokenizer = Tokenizer.from_file("tokenizer.json")
ids = new = tokenizer.encode("She opened the door and").ids
caches = {caches}  # past_key_values.N.key, .value: (batch, heads, past, width)
past = {{{name}: np.zeros({shape},
    {type}) for c in caches}}  # one example, nothing past
for _ in range({tokens}):
    logits, *present = {run}
    past = dict(zip(past, present))
    new = [int(logits[0, -1].argmax())]  # the most likely next token
    ids = ids + new
print(tokenizer.decode(ids))
"""

_ONNXRUNTIME = {
    "imports": "import onnxruntime as ort",
    "run": """\
session = ort.InferenceSession("{file}")
logits = session.run(None, {{k.name: feeds[k.name] for k in session.get_inputs()}})[0]""",
}
_ONNXRUNTIME_GENERATE = {
    "imports": "import onnxruntime as ort",
    "open": 'session = ort.InferenceSession("{file}")',
    "caches": "session.get_inputs()[1:]",
    "name": "c.name",
    "shape": "[n if isinstance(n, int) else int(not axis) for axis, n in enumerate(c.shape)]",
    "type": '{{"tensor(int64)": "int64", "tensor(int8)": "int8"}}.get(c.type, "float32")',
    "run": 'session.run(None, {{"input_ids": np.array([new]), **past}})',
}
_OPENVINO = {
    "imports": "import openvino as ov",
    "run": """\
model = ov.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "{precision}"}})
logits = model({{k.any_name: feeds[k.any_name] for k in model.inputs}})["logits"]""",
}
_OPENVINO_GENERATE = {
    "imports": "import openvino as ov",
    "open": """\
model = ov.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "{precision}"}})""",
    "caches": "model.inputs[1:]",
    "name": "c.any_name",
    "shape": "[n.get_length() if n.is_static else int(not axis) "
    "for axis, n in enumerate(c.get_partial_shape())]",
    "type": "c.element_type.to_dtype()",
    "run": 'model({{"input_ids": np.array([new]), **past}}).to_tuple()',
}


PRECISIONS = {"openvino_bf16": "bf16"}
"""Runtime → what it computes floats in, where that is not float32."""


def loading_code(
    inputs: Container[str],
    file: str,
    generate: int | None = None,
    runtime: str | list[str] | None = None,
) -> str:
    """Python that runs `file` on one example; which it is follows from the names of its inputs.

    Where the workload generates, it is the prompt that `generate` tokens are added to. Floats are
    computed as `runtime` does.
    """
    precision = PRECISIONS.get(str(runtime), "f32")
    openvino = file.endswith(".xml")
    if generate is not None and "pixel_values" not in inputs:
        template, parts = _GENERATE, _OPENVINO_GENERATE if openvino else _ONNXRUNTIME_GENERATE
    else:
        parts = _OPENVINO if openvino else _ONNXRUNTIME
        if "pixel_values" in inputs:
            template = _IMAGE
        else:
            template = _TEXT if "attention_mask" in inputs else _TOKENS
    written = {n: part.format(file=file, precision=precision) for n, part in parts.items()}
    return template.format(tokens=generate, **written)
