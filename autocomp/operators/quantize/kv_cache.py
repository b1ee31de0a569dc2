"""KV cache: keys and values are kept in 8 bits while a model generates.

Each channel of a layer of keys or values has a scale, fixed at calibration: its largest output on
the sample of inputs, over 127. Keys are rotated after their layer, a channel with the one half a
head further on, so both have the scale of the largest length of the pair: no rotation leaves it.
The weights of the unit do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.core.candidate import Step
from autocomp.core.errors import InternalError, UserError
from autocomp.core.factors import second_of
from autocomp.core.unit import SiteFormat, Unit
from autocomp.operators.protocol import (
    Need,
    Rule,
    SiteState,
    SiteStats,
    Stage,
    UnitState,
    UnitStats,
)

if TYPE_CHECKING:
    from torch import Tensor

BITS = 8


class KvCache:
    """Keys and values cached as int8, a fixed scale per channel."""

    name = "kv_cache"
    summary = "Keep keys and values in 8 bits while a model generates; a scale per channel."
    paper = "Hooper et al., 2024, KVQuant, arXiv:2401.18079 (its per-channel scales)"
    choices = "bits.cache: dense, 8"
    stage: Stage = "cache"
    version = 1
    speeds_up: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ()
    saves_memory: tuple[str, ...] = ("onnxruntime-cpu", "openvino-cpu")

    def options(self, unit: Unit, rule: Rule) -> Sequence[Step | None]:
        """Leave the cache, or 8 bits.

        Raises:
            UserError: at a unit without keys, or one that norms them behind their layer.
        """
        choices = rule.bits.get("cache", ["dense"])
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise UserError(
                f"kv_cache at {unit.name}: bits.cache must be a list like [dense, 8], not "
                f"{choices!r}"
            )
        steps: dict[Step | None, None] = {}
        for choice in choices:
            if choice != "dense" and (choice != BITS or isinstance(choice, bool)):
                raise UserError(
                    f"kv_cache at {unit.name}: bits.cache {choice!r} is not supported. Allowed: "
                    f"dense, {BITS}"
                )
            steps[None if choice == "dense" else Step.of(self.name, bits=BITS)] = None
        if any(steps) and unit.kind != "attention":
            raise UserError(
                f"kv_cache at {unit.name}: a unit of kind {unit.kind} caches nothing; give "
                f"bits.cache to layers.*.attention only"
            )
        if any(steps) and not unit.plain_keys:
            raise UserError(
                f"kv_cache at {unit.name}: this model norms its keys behind their layer, so their "
                f"range does not follow from it; leave bits.cache out"
            )
        return list(steps)

    def formats(
        self, unit: Unit, formats: Mapping[str, SiteFormat], step: Step
    ) -> dict[str, SiteFormat]:
        """Keys and values are cached in 8 bits, where the unit still has both."""
        names = _cached(unit, formats)
        changed = {name: replace(formats[name], cache_bits=step["bits"]) for name in names}
        return {**formats, **changed}

    def needs(self, step: Step) -> frozenset[Need]:
        """The sample of inputs."""
        return frozenset({"range"})

    def apply(self, unit: Unit, state: UnitState, step: Step, stats: UnitStats) -> UnitState:
        """Find the scales on the sample of inputs.

        Raises:
            InternalError: without one.
        """
        formats = self.formats(unit, {name: site.format for name, site in state.items()}, step)
        result = dict(state)
        for role, name in zip(("key", "value"), _cached(unit, state), strict=False):
            assert unit.head_dim is not None
            outputs = _outputs(name, state[name], stats.get(name))
            scale = channel_scales(outputs, unit.head_dim, rotated=role == "key")
            result[name] = replace(state[name], format=formats[name], output_scale=scale)
        return result


def channel_scales(outputs: Tensor, head_dim: int, *, rotated: bool) -> Tensor:
    """Scale of each channel of `outputs (n, heads · head_dim)`, above zero, `(channels,)`."""
    reach = outputs.abs()
    if rotated:
        pairs = outputs.reshape(len(outputs), -1, 2, head_dim // 2)
        reach = pairs.norm(dim=2, keepdim=True).expand_as(pairs).reshape(outputs.shape)
    scale = reach.amax(dim=0) / 127.0
    largest = scale.max().clamp_min(1e-12)
    return scale.clamp_min(largest * 1e-6)  # a channel that was never anything but zero


def _cached(unit: Unit, names: Mapping[str, object]) -> list[str]:
    """The layers that make keys and values, the second of two factors; none if one is gone."""
    found: list[str] = []
    for role in ("key", "value"):
        site = unit.site(role)
        if site is not None:
            found += [name for name in (site.name, second_of(site.name)) if name in names]
    return found if len(found) == 2 else []


def _outputs(name: str, site: SiteState, stats: SiteStats | None) -> Tensor:
    if stats is None or stats.sample is None:
        raise InternalError(f"kv_cache: {name} has no sample of inputs: calibrate again")
    inputs = stats.sample if site.kept_columns is None else stats.sample[:, site.kept_columns]
    outputs: Tensor = inputs @ site.on_plain_inputs().t()
    return outputs if site.bias is None else outputs + site.bias


OPERATOR = KvCache()
