"""Find the units of a model from its config and tensor shapes alone. No torch.

Shapes are derived from the config and checked against the checkpoint, whose names may carry the
task model's prefix or not (a headless base model), and may be those of older transformers.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocomp.core.errors import ModelError
from autocomp.core.unit import Site, Unit
from autocomp.models.layouts import Dimension, Layout, SiteSpec, layout_of

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name → shape, as in the checkpoint."""


def find_units(
    config: Mapping[str, Any], shapes: Shapes, task: str, num_labels: int | None = None
) -> list[Unit]:
    """The units of the task model, in model order: embeddings, blocks, head.

    `num_labels` is the size of the classifier; by default what the config says. With empty
    `shapes` the config alone is believed.

    Raises:
        ModelError: for an unknown layout, a task the layout has no head for, a config the layout
            does not describe, or a checkpoint that disagrees with its config.
    """
    layout = layout_of(str(config.get("model_type")), describe_parts(shapes))
    config = {**layout.defaults, **config}
    _check_supported(layout, config)
    if task not in layout.heads:
        raise ModelError(
            f"a {layout.model_type} model has no head for task {task!r}; "
            f"its tasks: {', '.join(layout.heads)}"
        )
    sizes = _dimensions(layout, config, num_labels)
    layers = _integer(config, layout.keys.layers)
    heads, head_dim = _integer(config, layout.keys.heads), _head_dim(layout, config)
    kv_heads = sizes["keys"] // head_dim
    units: list[Unit] = []
    if layout.embeddings:
        sites = _sites(layout.embeddings, layout.prefix, config, sizes)
        units.append(Unit("embeddings", "embedding", sites))
    for layer in range(layers):
        path = layout.block_path(layer)
        units.append(
            Unit(
                f"layers.{layer}.attention",
                "attention",
                _sites(layout.attention.sites, path, config, sizes),
                layer=layer,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                skippable=True,
                protected_tokens=layout.leading_tokens or None,
                causal="language-modeling" in layout.heads,
                plain_keys=not layout.normed_keys,
            )
        )
        units.append(
            Unit(
                f"layers.{layer}.ffn",
                "ffn",
                _sites(layout.ffn.sites, path, config, sizes),
                layer=layer,
                width=sizes["width"],
                skippable=True,
            )
        )
    tied = task == "language-modeling" and layout.tied is not None and bool(config.get(layout.tied))
    units.append(
        Unit(
            "head",
            "head",
            _sites(layout.heads[task], "", config, sizes),
            tied_to="embeddings" if tied else None,
        )
    )
    if shapes:
        _check_shapes(layout, units, shapes, new_labels=num_labels is not None)
    return units


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint keeps a parameter: the whole of a tensor, or a part of its outputs.

    Attributes:
        key: the tensor's name.
        transposed: whether the tensor is `(columns, rows)`.
        rows: first and one past the last output in a tensor that holds those of several sites.
    """

    key: str
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def read(self, tensor: Any) -> Any:
        """The parameter, `(rows, columns)` or `(rows,)`, from an array or a safetensors slice."""
        start, stop = (None, None) if self.rows is None else self.rows
        part = tensor[:, start:stop] if self.transposed else tensor[start:stop]
        return part.T if self.transposed else part


def stored_tensors(config: Mapping[str, Any], unit: Unit, shapes: Shapes) -> dict[str, Stored]:
    """Parameter of the task model (`SITE.weight`, `SITE.bias`) → where the checkpoint keeps it.

    A parameter the checkpoint does not hold (a new head) is left out; a tied head's weight is the
    table's.
    """
    layout = layout_of(str(config.get("model_type")), describe_parts(shapes))
    found: dict[str, Stored] = {}
    for site in unit.sites:
        for parameter in ("weight", "bias") if site.bias else ("weight",):
            name = f"{site.name}.{parameter}"
            stored = _stored(layout, unit, name, shapes)
            if stored is None and unit.tied_to is not None and parameter == "weight":
                table = f"{layout.prefix}.{layout.embeddings[0].path}.weight"
                stored = _stored(layout, unit, table, shapes)
            if stored is not None:
                found[name] = stored
    return found


def tensor_keys(config: Mapping[str, Any], unit: Unit, shapes: Shapes) -> dict[str, str]:
    """Parameter of the task model → name of the tensor that holds it; see `stored_tensors`."""
    return {name: stored.key for name, stored in stored_tensors(config, unit, shapes).items()}


def _stored(layout: Layout, unit: Unit, name: str, shapes: Shapes) -> Stored | None:
    site, _, parameter = name.rpartition(".")
    parts = _fused_sites(layout, unit, site)
    holder = site.rpartition(".")[0] if parts else site
    key = checkpoint_key(layout, f"{holder}.{parameter}", shapes)
    if key is None:
        return None
    transposed = parameter == "weight" and _path(layout, unit, holder) in layout.transposed
    if not parts:
        return Stored(key, transposed)
    before = list(itertools.takewhile(lambda part: part.name != site, parts))
    start = sum(part.rows for part in before)
    return Stored(key, transposed, (start, start + parts[len(before)].rows))


def _fused_sites(layout: Layout, unit: Unit, site: str) -> list[Site]:
    """The sites, in order, whose parameters share a tensor with those of `site`; else none."""
    holder, _, child = _path(layout, unit, site).rpartition(".")
    names = layout.fused.get(holder, ())
    if unit.layer is None or child not in names:
        return []
    return [
        other
        for name in names
        for other in unit.sites
        if other.name == f"{site.removesuffix(child)}{name}"
    ]


def _path(layout: Layout, unit: Unit, site: str) -> str:
    """A module's path inside the block of the unit."""
    return site if unit.layer is None else site.removeprefix(f"{layout.block_path(unit.layer)}.")


def rest_parameters(
    config: Mapping[str, Any], units: Iterable[Unit], shapes: Shapes
) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint that belong to no unit and are parameters: norms, a patch conv."""
    layout = layout_of(str(config.get("model_type")), describe_parts(shapes))
    inside = {key for unit in units for key in tensor_keys(config, unit, shapes).values()}
    return {
        name: tuple(shape)
        for name, shape in shapes.items()
        if name not in inside and not name.endswith(layout.buffers)
    }


def checkpoint_key(layout: Layout, name: str, shapes: Shapes) -> str | None:
    """The name a checkpoint has for a parameter of the task model, or `None` if it has it not."""
    bare = name.removeprefix(f"{layout.prefix}.")
    for candidate in (name, bare):
        for key in (candidate, _older_name(layout, candidate)):
            if key in shapes:
                return key
    return None


def _older_name(layout: Layout, name: str) -> str:
    for now, before in layout.renames:
        name = re.sub(rf"(?<![^.]){re.escape(now)}", before, name)
    return name


def describe_parts(shapes: Shapes, limit: int = 12) -> str:
    """What matrices a checkpoint holds, layer numbers folded: for a message to a person."""
    counts = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name), shape)
        for name, shape in shapes.items()
        if len(shape) == 2
    )
    if not counts:
        return ""
    parts = [
        f"{name} {'×'.join(map(str, shape))}" + (f" ({count} times)" if count > 1 else "")
        for (name, shape), count in list(counts.items())[:limit]
    ]
    more = len(counts) - len(parts)
    return f" Parts not recognised: {'; '.join(parts)}" + (f"; and {more} more" if more else "")


def _check_supported(layout: Layout, config: Mapping[str, Any]) -> None:
    """Raises ModelError for a config with a value the layout does not describe."""
    for key, values in layout.unsupported.items():
        found = config.get(key)
        for value in found if isinstance(found, list | tuple) else (found,):
            if value in values:
                raise ModelError(
                    f"the layout {layout.model_type!r} does not describe models with {key}={value}"
                )


def _dimensions(
    layout: Layout, config: Mapping[str, Any], num_labels: int | None
) -> dict[Dimension, int]:
    keys = layout.keys
    hidden, heads = _integer(config, keys.hidden), _integer(config, keys.heads)
    head_dim = _head_dim(layout, config)
    kv_heads = heads
    if keys.kv_heads is not None and config.get(keys.kv_heads) is not None:
        kv_heads = _integer(config, keys.kv_heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: {heads} heads cannot share {kv_heads} key-value heads")
    if keys.width_ratio is not None:
        width = int(hidden * float(config[keys.width_ratio]))
    elif keys.width_times is not None and config.get(keys.width) is None:
        width = hidden * keys.width_times
    else:
        width = _integer(config, keys.width)
    sizes: dict[Dimension, int] = {
        "hidden": hidden,
        "queries": heads * head_dim,
        "keys": kv_heads * head_dim,
        "width": width,
        "labels": config_labels(config) if num_labels is None else num_labels,
    }
    if keys.vocabulary is not None:
        sizes["vocabulary"] = _integer(config, keys.vocabulary)
    if keys.positions is not None:
        sizes["positions"] = _integer(config, keys.positions)
    return sizes


def _head_dim(layout: Layout, config: Mapping[str, Any]) -> int:
    key = layout.keys.head_dim
    if key is not None and config.get(key) is not None:
        return _integer(config, key)
    hidden, heads = _integer(config, layout.keys.hidden), _integer(config, layout.keys.heads)
    if hidden % heads:
        raise ModelError(f"config.json: hidden size {hidden} is no multiple of {heads} heads")
    return hidden // heads


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        found = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"config.json: {key} {found}; it must be a positive integer")
    return value


def config_labels(config: Mapping[str, Any]) -> int:
    """Number of labels a config declares; transformers' default of 2 when it does not."""
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) else int(config.get("num_labels") or 2)


def _sites(
    specs: Sequence[SiteSpec],
    parent: str,
    config: Mapping[str, Any],
    sizes: Mapping[Dimension, int],
) -> tuple[Site, ...]:
    return tuple(
        Site(
            name=f"{parent}.{spec.path}" if parent else spec.path,
            role=spec.role,
            rows=sizes[spec.rows],
            columns=sizes[spec.columns] * spec.times,
            bias=bool(config[spec.bias]) if isinstance(spec.bias, str) else spec.bias,
        )
        for spec in specs
    )


def _check_shapes(
    layout: Layout, units: Sequence[Unit], shapes: Shapes, *, new_labels: bool
) -> None:
    missing = []
    for unit in units:
        for site in unit.sites:
            stored = _stored(layout, unit, f"{site.name}.weight", shapes)
            if stored is None:
                if unit.kind != "head":
                    missing.append(f"{site.name}.weight")
                continue
            found = tuple(shapes[stored.key])
            rows = sum(part.rows for part in _fused_sites(layout, unit, site.name)) or site.rows
            expected = (site.columns, rows) if stored.transposed else (rows, site.columns)
            if site.role == "head" and new_labels and unit.tied_to is None:
                expected = (found[0], site.columns)
            if found != expected:
                raise ModelError(
                    f"the checkpoint disagrees with its config: {stored.key} is {found}, the "
                    f"config says {expected}"
                )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        known = {
            key
            for unit in units
            for key in tensor_keys({"model_type": layout.model_type}, unit, shapes).values()
        }
        rest = {name: shape for name, shape in shapes.items() if name not in known}
        raise ModelError(
            f"this is no {layout.model_type} checkpoint as the layout describes it: no "
            f"{', '.join(missing[:3])}{more}.{describe_parts(rest)}"
        )
