"""The seat of a mixer: where softmax attention is computed, in a model of transformers.

The same place is where keys and values pass a cache of 8 bits (`cached`).

transformers computes attention through a function that its config names. A model with mixers names
ours: it asks the attention module for its `mixer`, and where there is none does as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autocomp.core.errors import InternalError
from autocomp.core.unit import Unit
from autocomp.models.cached import CacheRounding
from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer, MixerShape
from autocomp.models.modules import Unread
from autocomp.models.surgery import SiteStateLike, model_layout, replace_module

INTERFACE = "autocomp-mixers"
"""Name of the attention function of models that hold mixers."""

MIXER = "mixer"
"""Attribute of an attention module under which its mixer sits."""


CACHE = "cache_rounding"
"""Attribute of an attention module under which the rounding of its cache sits."""


class MixerStateLike(Protocol):
    """What `install` reads of an operator's `MixerState`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> MixerShape: ...
    @property
    def parameters(self) -> Mapping[str, torch.Tensor]: ...


def mixer_shape(unit: Unit) -> MixerShape:
    """The shape of an attention unit, as mixers see it."""
    query = unit.site("query")
    if query is None or unit.heads is None or unit.kv_heads is None or unit.head_dim is None:
        raise ValueError(f"{unit.name} is no attention: nothing to replace")
    return MixerShape(
        hidden=query.columns,
        heads=unit.heads,
        kv_heads=unit.kv_heads,
        head_dim=unit.head_dim,
        causal=unit.causal,
        prefix=unit.protected_tokens,
    )


def core_path(model: nn.Module, unit: Unit) -> str:
    """Path of the module that calls the attention function: the first that skipping takes out."""
    layout = model_layout(model)
    assert unit.layer is not None
    return f"{layout.block_path(unit.layer)}.{next(iter(layout.attention.zero))}"


def install_mixer(model: nn.Module, unit: Unit, mixer: Mixer) -> None:
    """Seat `mixer` in an attention unit; projections it does not read become `Unread`."""
    core = model.get_submodule(core_path(model, unit))
    if mixer_of(model, unit) is None:
        core.register_forward_pre_hook(_remember, with_kwargs=True)
    mixer.train(model.training)
    setattr(core, MIXER, mixer)
    for site in unit.sites:
        if site.role != "output" and site.role not in mixer.reads:
            replace_module(model, site.name, Unread(mixer.shape.head_dim))
    _use_interface(model)


def mixer_of(model: nn.Module, unit: Unit) -> Mixer | None:
    """The mixer seated in `unit`, if there is one."""
    if unit.kind != "attention":
        return None
    try:
        core = model.get_submodule(core_path(model, unit))
    except AttributeError:  # skipped
        return None
    found = getattr(core, MIXER, None)
    return found if isinstance(found, Mixer) else None


def install_cache(model: nn.Module, unit: Unit, key_scale: Tensor, value_scale: Tensor) -> None:
    """Round what an attention unit would cache; scales `(kv heads · D,)`."""
    assert unit.head_dim is not None
    rounding = CacheRounding(key_scale, value_scale, unit.head_dim)
    setattr(model.get_submodule(core_path(model, unit)), CACHE, rounding)
    _use_interface(model)


def share_heads(model: nn.Module, unit: Unit, per_group: int) -> None:
    """Let `per_group` query heads of an attention unit share a head of keys and of values.

    transformers' attention repeats keys and values as often as this attribute of the module says,
    in models that have no groups of their own too.
    """
    core: Any = model.get_submodule(core_path(model, unit))
    if per_group != getattr(core, "num_key_value_groups", 1):
        core.num_key_value_groups = per_group


def state_mixer(state: Mapping[str, SiteStateLike]) -> Mixer | None:
    """The mixer that a state brings, around the state's own tensors."""
    brought = next((site.mixer for site in state.values() if site.mixer is not None), None)
    if brought is None:
        return None
    with torch.random.fork_rng(devices=[]):
        mixer = MIXERS.get(brought.name)(brought.shape)
    mixer.load_state_dict(dict(brought.parameters), assign=True)
    return mixer


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the projections are about to read, for mixers that read it too."""
    module.mixer_input = args[0] if args else kwargs["hidden_states"]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: `(B, H, T, D)` in, `(B, T, H, D)` out.

    Raises:
        InternalError: at a mixer, for scores that are not over √D, which is what mixers stand for.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mixer, cache = getattr(module, MIXER, None), getattr(module, CACHE, None)
    if cache is not None:
        key, value = cache(key, value)
    if mixer is None:
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **settings
        )
        return result
    if scaling is not None and not math.isclose(scaling, mixer.shape.head_dim**-0.5):
        raise InternalError(
            f"mixer {mixer.name!r} sits where scores are scaled by {scaling:g}; mixers stand for "
            f"{mixer.shape.head_dim**-0.5:g}, 1/√{mixer.shape.head_dim}. Leave out replace there"
        )
    x = module.mixer_input
    del module.mixer_input
    return mixer(x, query, key, value, _real(attention_mask)).transpose(1, 2), None


def _real(attention_mask: Tensor | None) -> Tensor | None:
    """Real tokens `(B, T)`: those the last one may look at. Masks are those of `sdpa`."""
    if attention_mask is None:
        return None
    last = attention_mask[:, 0, -1, :]
    return last if last.dtype == torch.bool else last == 0


def _use_interface(model: nn.Module) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(INTERFACE, _attend)
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)
    config: Any = model.config
    config._attn_implementation = INTERFACE
