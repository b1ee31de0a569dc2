"""A small random model, compressed by hand, as a finished trial: what exporters are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_trial import spec_of
from torch import nn

from autocomp.core.candidate import Candidate
from autocomp.core.unit import Unit
from autocomp.export.companions import Companions
from autocomp.export.protocol import ExportRequest
from autocomp.library.student import save_student, teacher_digest, unit_state
from autocomp.models.codes import dequantise
from autocomp.models.conversion import save_model
from autocomp.models.discover import find_units
from autocomp.models.load import load_model
from autocomp.models.sources import read_config, read_tensor_shapes
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators.protocol import SiteState, UnitState
from autocomp.operators.prune.groups import pool
from autocomp.operators.quantize.grid import round_to_grid, search_scales
from autocomp.study.records import TrialRecord
from autocomp.targets.protocol import Artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from model_examples import EXAMPLES, Example

Edit = Callable[[nn.Module, dict[str, Unit]], None]


@dataclass(frozen=True)
class Finished:
    """A finished trial."""

    request: ExportRequest
    student: nn.Module
    teacher: nn.Module
    units: list[Unit]

    @property
    def example(self) -> Example:
        return EXAMPLES[str(self.student.config.model_type)]


def finished(root: Path, model_type: str, edit: Edit, **changes: Any) -> Finished:
    """A trial whose student is `edit` of a random teacher, its norms moved as by training."""
    example = EXAMPLES[model_type]
    source = root / "teacher"
    save_model(example.model(**changes), source)
    task, labels = example.task, example.labels
    teacher = load_model(source, task, labels)
    units = find_units(read_config(source), read_tensor_shapes(source), task, labels)
    student = copy_for_surgery(teacher)
    edit(student, {unit.name: unit for unit in units})
    for name, parameter in list(student.named_parameters()):
        if "norm" in name.lower() or "ln_" in name:
            parameter.data = parameter.detach() * 1.25
    path = root / "students" / "a.safetensors"
    about = {
        "teacher": str(source),
        "digest": teacher_digest(source),
        "task": task,
        "num_labels": labels,
    }
    save_student(path, student, teacher, units, about)
    artifact = root / "artifacts" / "a" / "model.onnx"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"graph")
    kept = Companions(root / "companions")
    names = () if labels is None else tuple(f"label{i}" for i in range(labels))
    inputs = {name: tensor.numpy() for name, tensor in example.inputs().items()}
    kept.write(root, names, inputs)
    record = TrialRecord(
        id="a",
        kind="search",
        proposed_by="milp",
        state="complete",
        candidate=Candidate.of({}),
        artifact="artifacts/a",
    )
    request = ExportRequest(spec_of(task), record, Artifact(artifact, 5), kept, None, None, path)
    return Finished(request, student, teacher, units)


def quantised(
    state: UnitState,
    bits: int,
    group: int | None = None,
    *,
    activations: int = 32,
    ranges: tuple[float, float] | None = None,
    scaled: Mapping[str, torch.Tensor] | None = None,
) -> UnitState:
    """`state` rounded to nearest; `scaled`: end of a site's name → what its inputs are times."""
    found: UnitState = {}
    for name, site in state.items():
        scale = next((v for end, v in (scaled or {}).items() if name.endswith(end)), None)
        weight = site.weight if scale is None else site.weight / scale
        table = site.format.embedding
        form = replace(
            site.format,
            weight_bits=bits,
            group=group,
            activation_bits=32 if table else activations,
            static=ranges is not None,
            scaled=scale is not None,
        )
        scales = search_scales(weight, form)
        codes = round_to_grid(weight, scales, form)
        found[name] = SiteState(
            weight=dequantise(codes, scales, form),
            bias=site.bias,
            format=form,
            codes=codes,
            scales=scales,
            input_scale=scale,
            input_range=ranges,
            kept_rows=site.kept_rows,
            row_of=site.row_of,
        )
    return found


def share(model: nn.Module, unit: Unit, keep: int) -> None:
    """Pool a unit's keys and values where it is, untrained."""
    state = unit_state(model, unit)
    for name, (weight, bias) in pool(replace(unit, plain_keys=True), state, keep, {}).items():
        form = replace(state[name].format, rows=len(weight))
        state[name] = replace(state[name], weight=weight, bias=bias, format=form)
    install(model, unit, state)


def quantise_unit(model: nn.Module, unit: Unit, bits: int, *args: Any, **options: Any) -> None:
    """Round a unit of the student where it is."""
    install(model, unit, quantised(unit_state(model, unit), bits, *args, **options))
