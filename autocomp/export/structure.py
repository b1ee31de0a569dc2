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
width beside the number of heads (BERT): these keep the number they had. Which configs a model
accepts is not guessed: it is built, without memory, and its shapes are looked at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autocomp.core.errors import InternalError, UserError
from autocomp.core.factors import factored_sites
from autocomp.core.unit import Unit
from autocomp.export.shared_heads import repeated, repeated_note, sharing
from autocomp.library.student import unit_state
from autocomp.models.conversion import to_linear
from autocomp.models.layouts import Layout
from autocomp.models.load import quiet, task_class
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
    _set_layers(layout, config, layers)
    if vocabulary is not None:
        _set_vocabulary(layout, config, vocabulary, units, format)
    config, states, repeats = _fitted(layout, config, task, units, states, multiple)
    model = _build(config, task)
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


def _set_layers(layout: Layout, config: Any, layers: tuple[int, ...]) -> None:
    types = getattr(config, "layer_types", None)
    setattr(config, layout.keys.layers, len(layers))
    if isinstance(types, list):
        config.layer_types = [types[layer] for layer in layers]


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


def _fitted(
    layout: Layout,
    config: Any,
    task: str,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    multiple: int,
) -> tuple[Any, Mapping[str, UnitState], int]:
    """The smallest config that a stock model is built with: groups of heads, then width.

    Returns:
        `config`, changed; the states, with keys and values repeated for as many heads as share them
        in it; how many weights that repeats.
    """
    attention = next(unit for unit in units if unit.kind == "attention")
    ffn = next(unit for unit in units if unit.kind == "ffn")
    assert attention.kv_heads is not None
    assert attention.heads is not None
    assert attention.head_dim is not None
    assert ffn.width is not None
    width = _largest(units, states, "ffn", "up")
    single = copy.deepcopy(config)
    _set_layers(layout, single, (0,))  # shapes of one layer are those of all
    own = attention.heads // attention.kv_heads
    common = math.gcd(*sharing(units, states)) or own
    for per_group in dict.fromkeys((common if layout.keys.kv_heads else own, own)):
        changes = _heads_changes(
            layout, single, task, attention, per_group, units, states, multiple
        )
        if changes is not None:
            _change(config, changes)
            _change(single, changes)
            break
    states, repeats = repeated(units, states, per_group)
    for count in range(max(width, 1), ffn.width + 1):
        changes = _width(layout, config, count)
        if count % multiple:
            continue
        if _gives(layout, single, changes, task, ffn, ("up",), (count,)):
            _change(config, changes)
            break
    return config, states, repeats


def _heads_changes(
    layout: Layout,
    config: Any,
    task: str,
    attention: Unit,
    per_group: int,
    units: Sequence[Unit],
    states: Mapping[str, UnitState],
    multiple: int,
) -> dict[str, int] | None:
    """The fewest groups of `per_group` heads that hold every layer, as changes of a config."""
    assert attention.heads is not None
    assert attention.head_dim is not None
    heads = _largest(units, states, "attention", "query") // attention.head_dim
    for count in range(max(heads // per_group, 1), attention.heads // per_group + 1):
        changes = _heads(layout, count, per_group, attention.head_dim)
        shape = (count * per_group * attention.head_dim, count * attention.head_dim)
        if shape[0] % multiple:
            continue
        if _gives(layout, config, changes, task, attention, ("query", "key"), shape):
            return changes
    return None


def _largest(units: Sequence[Unit], states: Mapping[str, UnitState], kind: str, role: Any) -> int:
    """Most rows of a role in any layer."""
    found = 0
    for unit in units:
        site = unit.site(role)
        if unit.kind == kind and site is not None and site.name in states[unit.name]:
            found = max(found, states[unit.name][site.name].format.rows)
    return found


def _heads(layout: Layout, groups: int, per_group: int, head_dim: int) -> dict[str, int]:
    keys = layout.keys
    changes = {keys.heads: groups * per_group}
    if keys.kv_heads is not None:
        changes[keys.kv_heads] = groups
    if keys.head_dim is not None:
        changes[keys.head_dim] = head_dim
    return changes


def _width(layout: Layout, config: Any, width: int) -> dict[str, Any]:
    if layout.keys.width_ratio is not None:
        return {layout.keys.width_ratio: width / getattr(config, layout.keys.hidden)}
    return {layout.keys.width: width}


def _change(config: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)


def _gives(
    layout: Layout,
    config: Any,
    changes: Mapping[str, Any],
    task: str,
    unit: Unit,
    roles: tuple[Any, ...],
    rows: tuple[int, ...],
) -> bool:
    """Whether a model of the changed config reloads with these rows at the sites of `roles`."""
    data = {**config.to_dict(), **changes}
    try:
        model = _build(type(config).from_dict(data), task)
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return False
    except Exception as error:  # a config's own validation has classes of its own
        if "Validation" in type(error).__name__:
            return False
        raise
    path, own = layout.block_path(0), layout.block_path(unit.layer or 0)
    for role, expected in zip(roles, rows, strict=True):
        site = unit.site(role)
        assert site is not None
        weight = model.get_submodule(path + site.name.removeprefix(own)).weight
        assert isinstance(weight, torch.Tensor)
        if weight.shape[0] != expected:
            return False
    return True


def _build(config: Any, task: str) -> nn.Module:
    with quiet(), torch.device("meta"):
        model: nn.Module = task_class(task).from_config(copy.deepcopy(config))
    to_linear(model)
    return model


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
