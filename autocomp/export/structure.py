"""A compressed model as a stock transformers one: the smallest config that holds every layer.

A config says one number of heads and one inner width for all layers. What a layer has less of is
filled up with zeros, which leaves its function as it is:

- a head whose value rows and output columns are zero adds nothing;
- an inner channel whose rows and column are zero adds nothing (biases included);
- a skipped sublayer whose output layer is zero adds nothing to the residual stream.

It also says one number of query heads that share keys and values. Where heads share them more
widely in some layers, or the config has no such number (BERT, ViT), keys and values are repeated.

A layer both of whose sublayers are skipped goes altogether where its norms go with it (pre-norm);
after a post-norm layer two norms remain, so there it is filled up. Some models cannot state a head
width beside the number of heads (BERT): these keep the number they had. `stock_config`
finds the config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autocomp.core.errors import InternalError, UserError
from autocomp.core.factors import factored_sites
from autocomp.core.unit import Unit
from autocomp.export.shared_heads import repeated_note
from autocomp.export.stock_config import build, fitted, set_layers
from autocomp.library.student import unit_state
from autocomp.models.layouts import Layout
from autocomp.models.pruned_table import model_vocabulary
from autocomp.models.surgery import model_layout
from autocomp.models.vocabulary import Vocabulary
from autocomp.operators.protocol import SiteState, UnitState

_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
Shape = tuple[int, int]


@dataclass(frozen=True)
class Structure:
    """A stock model, and how the student's sites go into it.

    Attributes:
        config: the transformers config.
        model: built from it, without memory (`meta`), its linear layers plain ones.
        layers: the student's layers that remain, in order.
        states: site name in `model` → what is there, as large as the student has it; absent where
            the sublayer was skipped.
        shapes: site name in `model` → shape there.
        names: site name in `model` → name in the student.
        idle: prefixes of names in `model` of what belongs to skipped sublayers: any value will do.
        vocabulary: the tokens kept, if not all.
        notes: what was filled up with zeros or repeated, for the card.
    """

    config: Any
    model: nn.Module
    layers: tuple[int, ...]
    states: Mapping[str, SiteState]
    shapes: Mapping[str, Shape]
    names: Mapping[str, str]
    idle: tuple[str, ...]
    vocabulary: Vocabulary | None
    notes: tuple[str, ...]


def stock_structure(
    student: nn.Module, units: Sequence[Unit], task: str, format: str, *, multiple: int = 1
) -> Structure:
    """The smallest stock model that computes what `student` does, with its weights as floats.

    Args:
        multiple: what the inputs of output and down projections are to be a multiple of, if the
            dense model's are.

    Raises:
        UserError: naming the first unit that cannot be expressed, and why.
    """
    layout = model_layout(student)
    states: Mapping[str, UnitState]
    states = {unit.name: unit_state(student, unit) for unit in units}
    for unit in units:
        if factored := sorted(factored_sites(states[unit.name])):
            raise cannot(format, unit, f"{factored[0]} is a product of two layers (low rank)")
        if any(site.output_scale is not None for site in states[unit.name].values()):
            raise cannot(format, unit, "its keys and values are cached in 8 bits")
    layers = _kept_layers(layout, units, states)
    vocabulary = model_vocabulary(student)
    config = copy.deepcopy(student.config)
    if hasattr(config, "use_cache"):
        config.use_cache = True
    set_layers(layout, config, layers)
    if vocabulary is not None:
        _set_vocabulary(layout, config, vocabulary, units, format)
    config, states, repeats = fitted(layout, config, task, units, states, multiple)
    model = build(config, task)
    found, shapes, names = _placed(layout, units, states, layers, model)
    for name, site in found.items():
        rows, columns = shapes[name]
        if site.format.rows > rows or site.format.columns > columns:
            unit = next(unit for unit in units if any(s.name == names[name] for s in unit.sites))
            raise cannot(
                format,
                unit,
                f"{names[name]} is {site.format.rows} × {site.format.columns}, and "
                f"{layout.model_type} has only {rows} × {columns} there",
            )
    idle = tuple(_idle(layout, units, states, layers))
    notes = (*_notes(units, layers, found, shapes), *repeated_note(repeats))
    return Structure(config, model, layers, found, shapes, names, idle, vocabulary, notes)


def cannot(format: str, unit: Unit, what: str) -> UserError:
    """The error for a unit that a format cannot express."""
    return UserError(
        f"cannot export as {format}: {unit.name}: {what}, which this format cannot express. "
        f"Leave out --format for the runtime's own (onnx, openvino), or pick another trial"
    )


def fill_up(tensor: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """`tensor` at the start of a tensor of zeros."""
    wanted = tuple(shape)
    if tuple(tensor.shape) == wanted:
        return tensor
    filled = tensor.new_zeros(wanted)
    filled[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return filled


def load_weights(structure: Structure, student: nn.Module) -> nn.Module:
    """`structure.model` with the student's weights as floats; plain linear layers throughout."""
    model = structure.model
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in structure.shapes.items():
        rows, columns = shape
        site = structure.states.get(name)
        weight = torch.zeros(0, 0) if site is None else site.on_plain_inputs()
        bias = torch.zeros(0) if site is None or site.bias is None else site.bias
        tensors[f"{name}.weight"] = fill_up(weight, (rows, columns)).contiguous()
        if getattr(model.get_submodule(name), "bias", None) is not None:
            tensors[f"{name}.bias"] = fill_up(bias, (rows,)).contiguous()
    rest = _renamed(structure, student)
    for name, tensor in model.state_dict().items():
        if name in tensors:
            continue
        if name not in rest and not name.startswith(structure.idle):
            raise InternalError(f"{name} of a stock model has no counterpart in the student")
        tensors[name] = rest.get(name, torch.ones(tensor.shape))
    tied = getattr(structure.config, "tie_word_embeddings", False)
    model.load_state_dict(tensors, assign=True, strict=True)
    if tied:
        control: Any = model
        control.tie_weights()
    return model.eval()


def _renamed(structure: Structure, student: nn.Module) -> dict[str, torch.Tensor]:
    """The student's parameters outside sites under their names in the stock model."""
    layout = model_layout(student)
    order = enumerate(structure.layers)
    paths = {layout.block_path(old): layout.block_path(new) for new, old in order}
    renamed = {}
    for name, tensor in student.state_dict().items():
        head = f"{layout.prefix}.{layout.blocks}."
        if name.startswith(head):
            block = head + name.removeprefix(head).partition(".")[0]
            if block not in paths:
                continue
            name = paths[block] + name.removeprefix(block)
        renamed[name] = tensor.detach()
    return renamed


def _kept_layers(
    layout: Layout, units: Sequence[Unit], states: Mapping[str, UnitState]
) -> tuple[int, ...]:
    layers = sorted({unit.layer for unit in units if unit.layer is not None})
    if not (layout.attention.identity and layout.ffn.identity):
        return tuple(layers)  # post-norm: the norms of a skipped layer remain
    alive = {unit.layer for unit in units if unit.layer is not None and states[unit.name]}
    return tuple(layer for layer in layers if layer in alive) or (0,)


def _set_vocabulary(
    layout: Layout, config: Any, kept: Vocabulary, units: Sequence[Unit], format: str
) -> None:
    table = next(unit for unit in units if unit.site("embedding") is not None)
    for key in _TOKEN_IDS:
        value = getattr(config, key, None)
        if isinstance(value, int):
            new = kept.new_ids.get(value)
            if key == layout.offset and new != value:
                raise cannot(format, table, f"positions depend on {key}, which is {new} now")
            setattr(config, key, new)
        elif isinstance(value, list):
            setattr(config, key, [kept.new_ids[v] for v in value if v in kept.new_ids] or None)
    assert layout.keys.vocabulary is not None
    setattr(config, layout.keys.vocabulary, len(kept.kept))


def _placed(
    layout: Layout,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    layers: tuple[int, ...],
    model: nn.Module,
) -> tuple[dict[str, SiteState], dict[str, Shape], dict[str, str]]:
    found: dict[str, SiteState] = {}
    shapes: dict[str, Shape] = {}
    names: dict[str, str] = {}
    for unit in units:
        if unit.layer is not None and unit.layer not in layers:
            continue
        for site in unit.sites:
            name = site.name
            if unit.layer is not None:
                old, new = layout.block_path(unit.layer), layers.index(unit.layer)
                name = layout.block_path(new) + name.removeprefix(old)
            weight = model.get_submodule(name).weight
            if not isinstance(weight, torch.Tensor):
                raise InternalError(f"{name} of a stock {layout.model_type} has no weight")
            shapes[name], names[name] = (weight.shape[0], weight.shape[1]), site.name
            if site.name in states[unit.name]:
                found[name] = states[unit.name][site.name]
    return found, shapes, names


def _idle(
    layout: Layout,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    layers: tuple[int, ...],
) -> Iterator[str]:
    for unit in units:
        if unit.layer in layers and not states[unit.name]:
            sublayer = layout.attention if unit.kind == "attention" else layout.ffn
            for path in (*sublayer.identity, *sublayer.zero):
                yield f"{layout.block_path(layers.index(unit.layer))}.{path}."


def _notes(
    units: Sequence[Unit],
    layers: tuple[int, ...],
    found: Mapping[str, SiteState],
    shapes: Mapping[str, Shape],
) -> tuple[str, ...]:
    notes = []
    whole = len({unit.layer for unit in units if unit.layer is not None})
    if len(layers) < whole:
        notes.append(f"{whole - len(layers)} of {whole} layers were skipped and are not there.")
    sizes = [shape[0] * shape[1] for shape in shapes.values()]
    held = sum(site.format.rows * site.format.columns for site in found.values())
    added = sum(sizes) - held
    if added:
        notes.append(
            f"{added:,} of {sum(sizes):,} weights are zeros that fill layers up to the size all "
            f"layers have in this format: they take bytes and time, and change no output."
        )
    return tuple(notes)
