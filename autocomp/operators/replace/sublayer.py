"""One attention sublayer, alone: transformers' own module, without the model around it. Torch.

The model is built from its config without memory; only the attention module of one unit gets
weights, so whatever transformers does between projections and product (rotary positions, norms of
queries and keys) is done here too.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from autocomp.calibrate.record import Call, Recording
from autocomp.core.errors import InternalError
from autocomp.core.unit import Role, Unit
from autocomp.models.conversion import to_linear
from autocomp.models.load import quiet
from autocomp.models.mixers.protocol import Mixer
from autocomp.models.seat import core_path, install_mixer, share_heads
from autocomp.models.surgery import dense_linear, replace_module
from autocomp.operators.protocol import UnitState

_SHARED: tuple[Role, Role] = ("query", "key")

Layers = dict[str, tuple[Tensor, Tensor | None]]
"""Site name → weight `(rows, columns)` and bias `(rows,)` or `None`."""


class Sublayer:
    """Attention of one unit, from what attention reads to behind the output projection.

    Args:
        state: dense; its tensors are copied.
    """

    def __init__(self, recording: Recording, unit: Unit, state: UnitState) -> None:
        self.unit = unit
        self.model = _skeleton(recording)
        for site in unit.sites:
            weight, bias = state[site.name].weight, state[site.name].bias
            copied = dense_linear(weight.clone(), None if bias is None else bias.clone())
            replace_module(self.model, site.name, copied)
        self._path = core_path(self.model, unit)
        core = self.model.get_submodule(self._path)
        for name, tensor in recording.rest.items():
            place, _, own = name.rpartition(".")
            module = core.get_submodule(place)
            if own in module._parameters:
                setattr(module, own, nn.Parameter(tensor.clone(), requires_grad=False))
            else:
                module.register_buffer(own, tensor.clone(), persistent=False)

    @property
    def output(self) -> nn.Linear:
        """The output projection."""
        site = self.unit.site("output")
        assert site is not None
        module = self.model.get_submodule(site.name)
        assert isinstance(module, nn.Linear)
        return module

    def seat(self, mixer: Mixer) -> None:
        """Put `mixer` in the place of softmax."""
        install_mixer(self.model, self.unit, mixer)

    def share(self, pooled: Layers) -> None:
        """Let fewer keys and values, by these layers, serve all query heads."""
        for name, (weight, bias) in pooled.items():
            layer = dense_linear(weight.clone(), None if bias is None else bias.clone())
            replace_module(self.model, name, layer)
        query, key = (self.unit.site(role) for role in _SHARED)
        assert query is not None
        assert key is not None
        share_heads(self.model, self.unit, query.rows // len(pooled[key.name][0]))

    def projections(self) -> dict[str, nn.Linear]:
        """The linear layers that are there, by site name."""
        found = {site.name: self.model.get_submodule(site.name) for site in self.unit.sites}
        return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}

    def layers(self) -> Layers:
        """Weights and biases as they are now, copied."""
        return {
            name: (
                linear.weight.detach().clone(),
                None if linear.bias is None else linear.bias.detach().clone(),
            )
            for name, linear in self.projections().items()
        }

    def run(self, call: Call) -> Tensor:
        """`(B, T, C)`: what the sublayer adds to the residual stream."""
        out = call.run(self.model.get_submodule(self._path), causal=self.unit.causal)
        site = self.unit.site("output")
        assert site is not None
        if not site.name.startswith(f"{self._path}."):
            out = self.output(out)
        return out


def _skeleton(recording: Recording) -> nn.Module:
    """The model without memory: every tensor is on the meta device."""
    build: Any = getattr(transformers, recording.model_class, None)
    if build is None:
        raise InternalError(
            f"transformers has no {recording.model_class}: attention of models with code of their "
            f"own cannot be replaced"
        )
    settings = dict(recording.config)
    for_model: Any = transformers.AutoConfig.for_model
    config = for_model(settings.pop("model_type"), **settings)
    with quiet(), torch.device("meta"):
        model: nn.Module = build._from_config(config, attn_implementation="sdpa")
    to_linear(model)
    return model.eval()
