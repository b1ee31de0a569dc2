"""What attention is called with, recorded while calibration streams by, and played back later.

An operator that trains needs more of its unit's input than a Gram matrix: whole sequences of the
hidden states that attention reads, which tokens are real, and what the block passes besides
(position embeddings). A recording holds these for up to `TOKENS` tokens, with what it takes to
build the attention module again: the model's config and the module's parameters that belong to no
site (norms of queries and keys). One safetensors file a unit; equal tensors once. Needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from autocomp.core.errors import InternalError, ModelError
from autocomp.core.files import write_atomic
from autocomp.core.unit import Unit
from autocomp.models.seat import core_path

TOKENS = 65536
"""Real tokens recorded of a unit, at most."""

_HALF_RANGE = 6e4


@dataclass
class Call:
    """One call of an attention module.

    Attributes:
        hidden: `(B, T, C)`, what the projections read; float16 unless that is too narrow.
        real: bool `(B, T)`, false at padding; `None` where every token is real.
        args, kwargs: the call; `Hidden` and `Mask` stand where those two are passed.
    """

    hidden: Tensor
    real: Tensor | None
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of every sequence, `(B,)`."""
        batch, tokens = self.hidden.shape[:2]
        return torch.full((batch,), tokens) if self.real is None else self.real.sum(dim=1)

    def rows(self, index: Tensor) -> Call:
        """The call with these sequences alone."""
        batch = len(self.hidden)

        def of(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [of(entry) for entry in value]
            per_row = isinstance(value, Tensor) and value.ndim and len(value) == batch > 1
            return value[index] if per_row else value

        return Call(
            self.hidden[index],
            None if self.real is None else self.real[index],
            of(self.args),
            {name: of(value) for name, value in self.kwargs.items()},
        )

    def run(self, module: nn.Module, *, causal: bool) -> Tensor:
        """What `module`, an attention module, returns first: `(B, T, …)`."""
        hidden = self.hidden.float()

        def of(value: Any) -> Any:
            if isinstance(value, list):
                return tuple(of(entry) for entry in value)
            if value is HIDDEN:
                return hidden
            return self._mask(causal) if value is MASK else value

        arguments = [of(value) for value in self.args]
        output = module(*arguments, **{name: of(value) for name, value in self.kwargs.items()})
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _mask(self, causal: bool) -> Tensor | None:
        """Who sees whom, bool `(B, 1, T, T)`."""
        if self.real is None:
            return None
        batch, tokens = self.real.shape
        allowed = torch.ones(tokens, tokens, dtype=torch.bool)
        if causal:
            allowed = allowed.tril()
        return (allowed & self.real[:, None, None, :]).expand(batch, 1, tokens, tokens)


class _Marker:
    def __init__(self, name: str) -> None:
        self.name = name


HIDDEN, MASK = _Marker("hidden"), _Marker("mask")
"""Stand in a recorded call where the hidden states and the attention mask are passed."""


@dataclass
class Recording:
    """What is known of one attention module.

    Attributes:
        calls: in the order of the examples.
        model_class: of transformers.
        config: as in `config.json`.
        rest: parameters and buffers of the module that are no site's; names relative to it.
    """

    calls: list[Call]
    model_class: str
    config: dict[str, Any]
    rest: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Records the attention modules of `units` while the model runs.

    Use `watching(mask)` around a forward pass, `mask (B, T)` true at real tokens.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], tokens: int = TOKENS) -> None:
        self._model = model
        self._cores = {unit.name: core_path(model, unit) for unit in units}
        self._units = {unit.name: unit for unit in units}
        self._calls: dict[str, list[Call]] = {unit.name: [] for unit in units}
        self._left = {unit.name: tokens for unit in units}

    @contextmanager
    def watching(self, mask: Tensor | None) -> Iterator[None]:
        """Record what the modules are called with meanwhile, as far as there is room."""

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self._left[name] > 0:
                    self._keep(name, _call(args, kwargs, mask))

            return hook

        handles = [
            self._model.get_submodule(path).register_forward_pre_hook(watch(name), with_kwargs=True)
            for name, path in self._cores.items()
            if self._left[name] > 0
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, call: Call) -> None:
        used = call.lengths.cumsum(0)
        whole = int((used <= self._left[name]).sum())
        if whole < len(used):
            self._left[name] = 0
            call = call.rows(torch.arange(whole))
        else:
            self._left[name] -= int(used[-1])
        if whole:
            self._calls[name].append(call)

    def save(self, unit: str, path: Path) -> None:
        """Write the recording of a unit, atomically.

        Raises:
            ModelError: if its attention was never called.
            StorageError: if the disk is full or refuses.
        """
        if not self._calls[unit]:
            raise ModelError(
                f"{unit} was not called during calibration, or no example of it is shorter than "
                f"{TOKENS} tokens: there is nothing to train it on"
            )
        tensors: dict[str, Tensor] = {}
        shared = _Shared()
        calls = []
        for index, call in enumerate(self._calls[unit]):
            tensors[f"hidden.{index}"] = call.hidden.contiguous()
            if call.real is not None:
                tensors[f"real.{index}"] = call.real.contiguous()
            calls.append({"args": shared.encode(call.args), "kwargs": shared.encode(call.kwargs)})
        tensors |= {f"shared.{index}": tensor for index, tensor in enumerate(shared.tensors)}
        for name, tensor in self._rest(unit):
            tensors[f"rest.{name}"] = tensor.detach().clone().contiguous()
        config: Any = self._model.config
        about = {
            "calls": calls,
            "class": type(self._model).__name__,
            "config": json.loads(config.to_json_string(use_diff=False)),
        }
        data = save(tensors, metadata={"recording": json.dumps(about)})

        def write(temporary: Path) -> None:
            temporary.write_bytes(data)

        write_atomic(path, write)

    def _rest(self, unit: str) -> Iterator[tuple[str, Tensor]]:
        path = self._cores[unit]
        sites = tuple(f"{site.name}." for site in self._units[unit].sites)
        module = self._model.get_submodule(path)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not f"{path}.{name}".startswith(sites):
                yield name, tensor


def load_recording(path: Path) -> Recording:
    """Read what `Recorder.save` wrote; memory-mapped.

    Raises:
        InternalError: if the file is missing or damaged; calibration has to run again.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["recording"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InternalError(
            f"the recorded inputs {path} cannot be read ({error}); delete the file and start the "
            f"same command again"
        ) from error
    calls = [
        Call(
            tensors[f"hidden.{index}"],
            tensors.get(f"real.{index}"),
            _decode(entry["args"], tensors),
            _decode(entry["kwargs"], tensors),
        )
        for index, entry in enumerate(about["calls"])
    ]
    rest = {k.removeprefix("rest."): v for k, v in tensors.items() if k.startswith("rest.")}
    return Recording(calls, about["class"], about["config"], rest)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> Call:
    values = dict(kwargs)
    hidden = args[0] if args else values["hidden_states"]
    masked = False

    def of(value: Any) -> Any:
        nonlocal masked
        if value is hidden:
            return HIDDEN
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == hidden.shape[1]:
            masked = True
            return MASK
        if isinstance(value, list | tuple):
            return [of(entry) for entry in value]
        known = value is None or isinstance(value, Tensor | bool | int | float | str)
        return value if known else None  # caches and the like

    encoded = [of(value) for value in args], {name: of(value) for name, value in values.items()}
    real = mask if mask is not None and (masked or not bool(mask.all())) else None
    x = hidden.detach()
    narrow = x.half() if float(x.abs().max()) < _HALF_RANGE else x.clone()
    return Call(narrow, real, *encoded)


class _Shared:
    """Tensors among the arguments of calls, equal ones once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def encode(self, value: Any) -> Any:
        """As JSON: a one-entry mapping says what stands for something else."""
        if isinstance(value, _Marker):
            return {"stand-in": value.name}
        if isinstance(value, Tensor):
            return {"tensor": self._slot(value)}
        if isinstance(value, list):
            return [self.encode(entry) for entry in value]
        if isinstance(value, dict):
            return {"named": {name: self.encode(entry) for name, entry in value.items()}}
        return value

    def _slot(self, value: Tensor) -> int:
        for slot, other in enumerate(self.tensors):
            if other is value or (
                other.shape == value.shape
                and other.dtype == value.dtype
                and torch.equal(other, value)
            ):
                return slot
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[f"shared.{held}"]
    if kind == "named":
        return {name: _decode(entry, tensors) for name, entry in held.items()}
    return HIDDEN if held == HIDDEN.name else MASK
