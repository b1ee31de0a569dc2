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

_RUN = """\
session = ort.InferenceSession("{file}")
logits = session.run(None, {{k.name: feeds[k.name] for k in session.get_inputs()}})[0]"""
_RUN_OPENVINO = """\
model = ov.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
logits = model({{k.any_name: feeds[k.any_name] for k in model.inputs}})["logits"]"""


def loading_code(inputs: Container[str], file: str) -> str:
    """Python that runs `file` on one example; which it is follows from the names of its inputs."""
    openvino = file.endswith(".xml")
    if "pixel_values" in inputs:
        template = _IMAGE
    else:
        template = _TEXT if "attention_mask" in inputs else _TOKENS
    run = (_RUN_OPENVINO if openvino else _RUN).format(file=file)
    imports = "import openvino as ov" if openvino else "import onnxruntime as ort"
    return template.format(imports=imports, run=run)
