"""What mixers cost: which a format asks for, made with fresh parameters, and their bytes.

A unit with a mixer is timed as every other, linear layers and mixer in one piece; its time depends
on shapes, not on the values of parameters. No mixer is made that no option names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import onnx

from autocomp.core.errors import InternalError
from autocomp.core.factors import first_of, second_of
from autocomp.core.unit import Role, Site, SiteFormat, Unit, UnitFormat
from autocomp.targets.mixer_nodes import Seat, seated
from autocomp.targets.token_nodes import Reductions, sequence_lengths

if TYPE_CHECKING:
    from autocomp.models.mixers.protocol import Mixer


_GROUPED: tuple[Role, ...] = ("key", "value")


def mixer_name(formats: UnitFormat) -> str | None:
    """The mixer a unit in these formats has; `None` for attention."""
    return next((one.mixer for one in formats.values() if one.mixer is not None), None)


def undecodable(name: str) -> str | None:
    """Why a mixer cannot decode, or `None`."""
    from autocomp.models.mixers import MIXERS
    from autocomp.models.mixers.protocol import Mixer

    kind = MIXERS.get(name)
    if kind.empty_state is Mixer.empty_state or kind.extend is Mixer.extend:
        return (
            f"mixer {name!r} keeps no state to decode with: it reads whole sequences. Leave it out "
            "of replace, or measure a workload that does not generate"
        )
    return None


def made_up_mixer(unit: Unit, formats: UnitFormat) -> Mixer:
    """The mixer of a format with fresh parameters, for the heads that are left.

    Raises:
        InternalError: if it cannot stand there.
    """
    import torch

    from autocomp.models.mixers import MIXERS
    from autocomp.models.mixers.protocol import MixerShape

    name, head_dim = mixer_name(formats), unit.head_dim
    assert name is not None
    assert head_dim is not None
    groups = [second_or_own(formats, unit.site(role)) for role in _GROUPED]
    kv_heads = next((one.rows // head_dim for one in groups if one is not None), None)
    output = unit.site("output")
    assert output is not None
    own = formats.get(output.name) or formats[first_of(output.name)]
    heads = own.columns // head_dim
    query = unit.site("query")
    assert query is not None
    shape = MixerShape(
        hidden=query.columns,
        heads=heads,
        kv_heads=kv_heads or heads * (unit.kv_heads or 1) // (unit.heads or 1),
        head_dim=head_dim,
        causal=unit.causal,
        prefix=unit.protected_tokens,
    )
    kind = MIXERS.get(name)
    reason = kind.refuses(shape)
    if reason is not None:
        raise InternalError(f"{unit.name}: mixer {name!r} cannot stand there: {reason}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(shape).eval()


def second_or_own(formats: UnitFormat, site: Site | None) -> SiteFormat | None:
    """The format that says how many rows a site has left, of it or its second factor."""
    if site is None:
        return None
    return formats.get(site.name) or formats.get(second_of(site.name))


def takes(unit: Unit, formats: UnitFormat, tokens: int | None) -> bool:
    """Whether so many patches may arrive at a unit in these formats; `None` is text."""
    from autocomp.targets.mixer_graph import mixer_graph

    if tokens is None or mixer_name(formats) is None:
        return True
    try:
        mixer_graph(made_up_mixer(unit, formats), tokens=tokens)
    except InternalError:
        return False
    return True


def format_seats(
    skeleton: onnx.ModelProto,
    units: Iterable[Unit],
    formats: Mapping[str, UnitFormat],
    reductions: Reductions | None = None,
) -> dict[str, Seat]:
    """Seats of the mixers that formats ask for, with fresh parameters."""
    mixers = {
        unit: made_up_mixer(unit, formats[unit.name])
        for unit in units
        if mixer_name(formats[unit.name]) is not None
    }
    return seated(skeleton, mixers, reductions or {})


def arriving(skeleton: onnx.ModelProto, unit: Unit) -> int | None:
    """Patches that arrive at a unit of the dense model; `None` for text."""
    return sequence_lengths(skeleton.graph.node, {}).get(unit.name)
