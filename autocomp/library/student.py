"""A finished trial's torch model on disk: what compressed units hold, and what training changed.

An artifact is in its runtime's own format. Other formats are written from the torch model, so a
trial keeps it: the state of every compressed unit packed as library items are (codes and scales,
a bit per weight of a mask), and each other parameter that is not the teacher's any more. What is
the teacher's is read from there again; its digest is kept, so that another one is not mistaken
for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from autocomp.core.errors import InternalError, StudyError
from autocomp.core.factors import first_of, second_of
from autocomp.core.files import write_atomic
from autocomp.core.hashing import content_key, file_digest
from autocomp.core.unit import SiteFormat, Unit
from autocomp.library.packing import pack_state, unpack_state
from autocomp.models.discover import find_units
from autocomp.models.factors import LowRank
from autocomp.models.load import load_model
from autocomp.models.mixers.protocol import Mixer
from autocomp.models.modules import QuantEmbedding, QuantLinear
from autocomp.models.pruned_table import PrunedTable
from autocomp.models.seat import MIXER, core_path, mixer_of
from autocomp.models.sources import read_config, read_tensor_shapes, weight_files
from autocomp.models.sparse import SparseLinear
from autocomp.models.surgery import install, unit_modules
from autocomp.operators.protocol import MixerState, SiteState, UnitState

FORMAT_VERSION = 1


def teacher_digest(path: Path) -> str:
    """Hash of the weights of a model directory."""
    return content_key([file_digest(file) for file in weight_files(path)], length=40)


def unit_state(model: nn.Module, unit: Unit) -> UnitState:
    """What a stitched model holds at `unit`: what `install` would put there; empty if skipped."""
    state: UnitState = {}
    for name, module in unit_modules(model, unit).items():
        if isinstance(module, LowRank):
            state[first_of(name)] = _site_state(name, module.first)
            state[second_of(name)] = _site_state(name, module.second)
        else:
            state[name] = _site_state(name, module)
    mixer = mixer_of(model, unit)
    if mixer is not None:
        output = unit.site("output")
        assert output is not None
        site = state[output.name]
        state[output.name] = replace(
            site, format=replace(site.format, mixer=mixer.name), mixer=_mixer_state(mixer)
        )
    return state


def _mixer_state(mixer: Mixer) -> MixerState:
    parameters = {name: value.detach() for name, value in mixer.state_dict().items()}
    return MixerState(mixer.name, mixer.shape, parameters)


def _site_state(name: str, module: nn.Module) -> SiteState:
    if isinstance(module, PrunedTable):
        site = _site_state(name, module.table)
        site.kept_rows, site.row_of = module.kept, module.row_of
        return site
    if isinstance(module, QuantLinear | QuantEmbedding):
        linear = module if isinstance(module, QuantLinear) else None
        return SiteState(
            weight=module.dequantised(),
            bias=None if linear is None or linear.bias is None else linear.bias.detach(),
            format=module.format,
            codes=module.codes(),
            scales=module.scales,
            input_scale=None if linear is None else linear.input_scale,
            input_range=None if linear is None else linear.input_range,
            mask=module.mask,
            output_scale=getattr(module, "output_scale", None),
        )
    if not isinstance(module, nn.Linear | nn.Embedding | SparseLinear):
        raise InternalError(f"{name} is {type(module).__name__}: this holds no site's weights")
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    if isinstance(module, SparseLinear):
        form = module.format
    else:
        table = isinstance(module, nn.Embedding)
        rows, columns = weight.shape
        form = SiteFormat(rows, columns, bias is not None, embedding=table)
    scale = getattr(module, "output_scale", None)
    if scale is not None:
        form = replace(form, cache_bits=8)
    return SiteState(
        weight=weight,
        bias=None if bias is None else bias.detach(),
        format=form,
        mask=getattr(module, "mask", None),
        output_scale=scale,
    )


def save_student(
    path: Path,
    student: nn.Module,
    teacher: nn.Module,
    units: Sequence[Unit],
    about: Mapping[str, Any],
) -> int:
    """Write the student, atomically; returns the bytes it takes.

    Args:
        about: what `load_student` needs to find the teacher: `teacher` (its directory), `digest`
            (from `teacher_digest`), `task`, `num_labels`; `trust_remote_code` if it comes with its
            own code.

    Raises:
        StorageError: if the disk is full or refuses; nothing partial is left.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed: dict[str, Any] = {}
    inside: set[str] = set()
    for unit in units:
        if _dense(student, unit):
            continue
        state = unit_state(student, unit)
        inside.update(f"{site.name}." for site in unit.sites)
        if mixer_of(student, unit) is not None:
            inside.add(f"{core_path(student, unit)}.{MIXER}.")
        parts, packed[unit.name] = pack_state(state)
        tensors |= {f"{unit.name}|{name}": tensor for name, tensor in parts.items()}
    known = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if name not in known:
            raise InternalError(f"{name} of the student has no counterpart in the teacher")
        if not torch.equal(tensor, known[name]):
            tensors[f"|{name}"] = tensor.detach().contiguous()
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()  # the format stores no tensor under two names
        seen.add(tensor.data_ptr())
    metadata = {"student": json.dumps({**about, "format": FORMAT_VERSION, "units": packed})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return path.stat().st_size


def _dense(student: nn.Module, unit: Unit) -> bool:
    """Whether every site is a plain layer of its original shape, and attention is softmax."""
    modules = unit_modules(student, unit)
    if not modules or mixer_of(student, unit) is not None:
        return False
    return all(
        type(modules[site.name]) in (nn.Linear, nn.Embedding)
        and not hasattr(modules[site.name], "output_scale")
        and tuple(modules[site.name].weight.shape) == (site.rows, site.columns)  # type: ignore[arg-type]
        for site in unit.sites
    )


def load_student(path: Path) -> tuple[nn.Module, list[Unit]]:
    """The trained model of a trial, and its units as they are in the teacher.

    Token reductions are not in it: they are in the candidate, and change no weight.

    Raises:
        StudyError: if the file is missing or damaged, or the teacher is not there any more.
    """
    if not path.is_file():
        raise StudyError(
            f"{path} is missing: the trial has no stored weights (it is from an older version, or "
            f"they were removed). Run it again in a new study: autocomp search SPEC --study DIR "
            f"--trials N"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["student"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is damaged ({error}): run the trial again") from error
    source = Path(about["teacher"])
    if not source.is_dir() or teacher_digest(source) != about["digest"]:
        raise StudyError(
            f"{source} is gone or has changed: the trial's weights are stored as differences from "
            f"the teacher in it. Restore that directory, or run the study again"
        )
    task, labels = about["task"], about["num_labels"]
    model = load_model(source, task, labels, about.get("trust_remote_code", False))
    units = find_units(read_config(source), read_tensor_shapes(source), task, labels)
    for unit in units:
        if unit.name in about["units"]:
            prefix = f"{unit.name}|"
            parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            install(model, unit, unpack_state(about["units"][unit.name], parts))
    present = model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("|"):
            present[name[1:]].copy_(tensor)
    return model.eval(), units
