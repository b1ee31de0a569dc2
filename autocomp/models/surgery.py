"""Surgery on a model in memory: install compressed units, skip sublayers.

Nothing here copies a weight it does not have to. `copy_for_surgery` and `install` share storage
with their source, which makes a stitched model cheap to make and to screen; take a
`copy.deepcopy` of it before training, or the source is trained too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from autocomp.core.factors import first_of, second_of, site_of
from autocomp.core.unit import Role, SiteFormat, Unit
from autocomp.models.factors import LowRank
from autocomp.models.layouts import Layout, SublayerSpec, layout_of
from autocomp.models.modules import QuantEmbedding, QuantLinear, Skip, Unread
from autocomp.models.pruned_table import PrunedTable
from autocomp.models.sparse import SparseLinear

if TYPE_CHECKING:
    from autocomp.models.seat import MixerStateLike

Model = TypeVar("Model", bound=nn.Module)


class SiteStateLike(Protocol):
    """What `install` reads of an operator's `SiteState`; shapes as there."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    format: SiteFormat
    codes: torch.Tensor | None
    scales: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_range: tuple[float, float] | None
    mask: torch.Tensor | None
    kept_rows: torch.Tensor | None
    row_of: torch.Tensor | None
    output_scale: torch.Tensor | None

    @property
    def mixer(self) -> MixerStateLike | None: ...


def copy_for_surgery(model: Model) -> Model:
    """A copy of `model`'s structure whose parameters and buffers share the original's storage.

    Replacing modules of the copy, freezing its parameters or changing its config leaves the
    original as it was; writing into a tensor does not. Ties between parameters are kept.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def install(model: nn.Module, unit: Unit, state: Mapping[str, SiteStateLike]) -> None:
    """Put what operators made of `unit` in its place; an empty `state` skips the unit.

    A site becomes a `QuantLinear` or `QuantEmbedding` if it has codes, a `SparseLinear` if it has
    a mask alone, else a plain layer of its new shape; `LowRank` where the state holds its two
    factors, `PrunedTable` around a table that lost rows. Where the output brings a mixer, that is
    seated, and projections it does not read are gone; else attention is told how many query heads
    share a key-value head now. The tensors of `state` are used as they are.
    A table and a head that shared their weight no longer do once either is installed: each then has
    its own.

    Raises:
        ValueError: if `state` does not hold exactly the sites of the unit, or the unit was skipped.
    """
    if not state:
        skip(model, unit)
        return
    from autocomp.models.seat import install_mixer, share_heads, state_mixer

    mixer = state_mixer(state)
    names = [
        site.name
        for site in unit.sites
        if mixer is None or site.role == "output" or site.role in mixer.reads
    ]
    if sorted(names) != sorted({site_of(name) for name in state}):
        raise ValueError(f"{unit.name} has sites {names}, but the state holds {sorted(state)}")
    modules = unit_modules(model, unit)
    if not modules:
        raise ValueError(f"{unit.name} was skipped in this model: nothing can be installed there")
    for name in names:
        padding_idx = getattr(modules[name], "padding_idx", None)
        if name in state:
            new = _layer(state[name], padding_idx)
        else:
            first, second = state[first_of(name)], state[second_of(name)]
            new = LowRank(_layer(first, padding_idx), _layer(second, None))
        replace_module(model, name, new)
    if mixer is not None:
        install_mixer(model, unit, mixer)
    elif unit.kind == "attention":
        share_heads(model, unit, _rows(unit, state, "query") // _rows(unit, state, "key"))
    if unit.kind in ("embedding", "head"):
        _untie(model)
    scales = [one.output_scale for one in state.values() if one.output_scale is not None]
    if scales:
        from autocomp.models.seat import install_cache

        key, value = scales  # in the order of the unit's sites
        install_cache(model, unit, key, value)


def _rows(unit: Unit, state: Mapping[str, SiteStateLike], role: Role) -> int:
    """Rows of the site of a role, of its second factor where it has two."""
    site = unit.site(role)
    assert site is not None
    return state[site.name if site.name in state else second_of(site.name)].format.rows


def _layer(site: SiteStateLike, padding_idx: int | None) -> nn.Module:
    if not site.format.embedding:
        layer = _linear(site)
        if site.output_scale is not None:
            layer.register_buffer("output_scale", site.output_scale, persistent=False)
        return layer
    if site.kept_rows is None or site.row_of is None:
        return _embedding(site, padding_idx)
    padding_row = None if padding_idx is None else int(site.row_of[padding_idx])
    return PrunedTable(_embedding(site, padding_row), site.row_of, site.kept_rows)


def _linear(site: SiteStateLike) -> nn.Module:
    if site.codes is not None:
        assert site.scales is not None
        return QuantLinear(
            site.weight,
            site.bias,
            site.scales,
            site.format,
            site.codes,
            input_scale=site.input_scale,
            input_range=site.input_range,
            mask=site.mask,
        )
    if site.format.scaled or site.format.static:
        raise ValueError(f"inputs are scaled or static before weights are quantised: {site.format}")
    if site.mask is not None:
        return SparseLinear(site.weight, site.bias, site.mask, site.format)
    return dense_linear(site.weight, site.bias)


def _embedding(site: SiteStateLike, padding_idx: int | None) -> nn.Module:
    if site.codes is not None:
        assert site.scales is not None
        return QuantEmbedding(site.weight, site.scales, padding_idx, site.format, site.codes)
    return dense_embedding(site.weight, padding_idx)


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer around these tensors, `(rows, columns)` and `(rows,)`, without copying."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def dense_embedding(weight: torch.Tensor, padding_idx: int | None) -> nn.Embedding:
    """A table around this tensor `(rows, columns)`, without copying."""
    rows, columns = weight.shape
    table = nn.Embedding(rows, columns, device="meta")
    table.padding_idx = padding_idx
    table.weight = nn.Parameter(weight.detach())
    return table


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in the model's training or evaluation mode."""
    parent, _, name = path.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), name, module)


def unit_modules(model: nn.Module, unit: Unit) -> dict[str, nn.Module]:
    """Site name → module now there; empty when the unit is skipped.

    A projection that the unit's mixer does not read is not there.
    """
    try:
        modules = {site.name: model.get_submodule(site.name) for site in unit.sites}
    except AttributeError:
        if _skipped(model, unit):
            return {}
        raise ValueError(
            f"this model has no {unit.name}: {unit.sites[0].name} is missing"
        ) from None
    if any(isinstance(module, Skip) for module in modules.values()):
        return {}
    return {name: module for name, module in modules.items() if not isinstance(module, Unread)}


def _skipped(model: nn.Module, unit: Unit) -> bool:
    if unit.layer is None:
        return False
    block = model_layout(model).block_path(unit.layer)
    path = next(iter(_sublayer(model, unit).zero))
    return isinstance(model.get_submodule(f"{block}.{path}"), Skip)


def model_layout(model: nn.Module) -> Layout:
    """The layout of a loaded model. Raises ModelError for an unknown one."""
    return layout_of(str(getattr(model.config, "model_type", "")))


def _sublayer(model: nn.Module, unit: Unit) -> SublayerSpec:
    if unit.kind not in ("attention", "ffn"):
        raise ValueError(f"{unit.name} is no sublayer of a block: it cannot be skipped")
    layout = model_layout(model)
    return layout.attention if unit.kind == "attention" else layout.ffn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, first to last."""
    layout = model_layout(model)
    return list(model.get_submodule(f"{layout.prefix}.{layout.blocks}").children())


def skip(model: nn.Module, unit: Unit) -> None:
    """Take a sublayer out: its contribution to the residual stream becomes zero.

    In a pre-norm block the input passes through; in a post-norm block the norm of the input stays.

    Raises:
        ValueError: for a unit that is no sublayer.
    """
    recipe = _sublayer(model, unit)
    assert unit.layer is not None
    block = model_layout(model).block_path(unit.layer)
    for path in recipe.identity:
        replace_module(model, f"{block}.{path}", nn.Identity())
    for path, outputs in recipe.zero.items():
        replace_module(model, f"{block}.{path}", Skip(outputs))


def _untie(model: nn.Module) -> None:
    config: Any = model.config
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
