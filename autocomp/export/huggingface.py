"""Export as a Hugging Face directory: config.json and float weights that stock transformers loads.

Quantised weights are written as the floats they stand for; quantised activations are not expressed.
What differs between layers is filled up with zeros (`export.structure`). So the directory computes
what the trial's weights say, and takes the bytes and the time of floats: it is for tools that read
transformers models, not for the figures the trial was chosen by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autocomp.core.errors import UserError
from autocomp.export.card import model_card
from autocomp.export.directory import fill_companions, write_directory
from autocomp.export.protocol import ExportRequest, Verification
from autocomp.operators import OPERATORS
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Target

_TEXT = """\
from transformers import {auto}, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), {auto}.from_pretrained(".")
encoded = tokenizer("Shares rise as bank beats forecasts", return_tensors="pt")
print(model(**encoded).logits.argmax(-1))
"""
_IMAGE = """\
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor, model = AutoImageProcessor.from_pretrained("."), {auto}.from_pretrained(".")
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
print(model(**pixels).logits.argmax(-1))
"""
_GENERATE = """\
from transformers import {auto}, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), {auto}.from_pretrained(".")
encoded = tokenizer("She opened the door and", return_tensors="pt")
print(tokenizer.decode(model.generate(**encoded, max_new_tokens=20)[0]))
"""
FLOATS = (
    "Measured on the trial's artifact for the target, not on these files: the bytes and speed of "
    "this directory are those of float weights."
)


class HuggingFaceExporter:
    """Writes the trial's torch weights under a stock config."""

    name = "huggingface"
    summary = "config.json and float safetensors that stock transformers loads, with tokenizer."
    expresses = (
        "pruned heads, width, layers and vocabulary (zeros fill what layers differ by), sparse and "
        "quantised weights (as floats); not low rank, not token merging, not replaced attention"
    )

    def supports(self, record: TrialRecord) -> str | None:
        """See `Exporter.supports`."""
        return inexpressible(record)

    def write(self, request: ExportRequest, directory: Path) -> None:
        """See `Exporter.write`."""
        if (reason := self.supports(request.record)) is not None:
            raise UserError(f"cannot export as {self.name}: {reason}")
        from autocomp.export.structure import load_weights, stock_structure
        from autocomp.library.student import load_student
        from autocomp.models.conversion import save_model
        from autocomp.models.load import quiet

        assert request.student is not None
        student, units = load_student(request.student)
        task = request.spec.task.name
        structure = stock_structure(student, units, task, self.name)
        model = load_weights(structure, student)
        labels = request.companions.label_names
        if labels:
            config: Any = model.config
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        remarks = [FLOATS, *structure.notes]
        if any(site.format.activation_bits == 8 for site in structure.states.values()):
            remarks.append("The trial rounds activations to 8 bits; this model does not.")
        card = model_card(request, "model.safetensors", loading(task), remarks)

        def fill(temporary: Path) -> None:
            with quiet():
                save_model(model, temporary)
            fill_companions(request, temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")

        write_directory(directory, fill)

    def verify(self, request: ExportRequest, directory: Path, target: Target) -> Verification:
        """See `Exporter.verify`."""
        from autocomp.export.reloaded import verify_reload

        return verify_reload(request, directory, target)


def inexpressible(record: TrialRecord) -> str | None:
    """What of a candidate no stock transformers model can do, by its options alone."""
    if record.artifact is None:
        return f"{record.id} has no exported model"
    for unit, option in record.candidate:
        for step in option.steps:
            if OPERATORS.get(step.operator).stage == "tokens":
                return (
                    f"{unit}: {step.label()} merges or drops tokens, which no config of "
                    f"transformers expresses. Leave out --format for the runtime's own"
                )
            if step.operator == "replace":
                return (
                    f"{unit}: {step['mixer']} in the place of attention, which no config of "
                    f"transformers expresses. Leave out --format for the runtime's own"
                )
    return None


def loading(task: str) -> str:
    """How to load the directory, Python."""
    from autocomp.models.load import task_class

    text = {"image-classification": _IMAGE, "language-modeling": _GENERATE}.get(task, _TEXT)
    return text.format(auto=task_class(task).__name__)


EXPORTER = HuggingFaceExporter()
