"""A mixer as ONNX nodes: exported from torch once per structure, filled with parameters after that.

    x (B, T, C), query (B, H, T, D), key and value (B, G, T, D)[, real bool (B, T)] → (B, H, T, D)

and, where it decodes, `past.NAME` → `present.NAME` for every tensor of its state. Parameters are
inputs of the export, so that none is folded into a constant: candidates that differ in values alone
share one export. Batch and tokens stay open; only of a mixer that reads a square of patches from
the number of tokens, and so cannot be exported for any, is there a graph for each number.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autocomp.core.errors import InternalError
from autocomp.models.mixers.protocol import Mixer
from autocomp.targets.graph import Graph
from autocomp.targets.torch_export import to_onnx

PROJECTIONS = ("query", "key", "value")
_BATCH, _TOKENS = 2, 150
"""Of the example: with few tokens torch takes the number of a mixer's chunks, one, for fixed."""


@dataclass(frozen=True)
class MixerGraph:
    """The structure of a mixer.

    Attributes:
        nodes: in topological order.
        constants: initializers that are no parameters.
        inputs: what the nodes read of `x`, `query`, `key`, `value`, `real`, `past.NAME`, and
            `parameter.NAME`.
        outputs: `out`, `present.NAME`.
        state: name → shape without the batch, float32, zero before the first token.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    state: Mapping[str, tuple[int, ...]]

    def placed(
        self, prefix: str, names: Mapping[str, str], parameters: Mapping[str, Any]
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and initializers to put into a graph.

        Args:
            prefix: of every name that is not in `names`.
            names: input or output here → tensor there.
            parameters: name → array.
        """

        def name(tensor: str) -> str:
            return names.get(tensor) or (tensor and f"{prefix}.{tensor}")

        nodes = []
        for node in self.nodes:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.input[:] = [name(tensor) for tensor in node.input]
            copied.output[:] = [name(tensor) for tensor in node.output]
            nodes.append(copied)
        initializers = []
        for constant in self.constants:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(constant)
            tensor.name = name(constant.name)
            initializers.append(tensor)
        for key, array in parameters.items():
            label = f"parameter.{key}"
            if label in self.inputs:
                initializers.append(numpy_helper.from_array(array, name(label)))
        return nodes, initializers


class _Function(nn.Module):
    """A mixer as a function of its parameters and inputs; it is no submodule, so none is kept."""

    def __init__(self, mixer: Mixer, names: list[str], *, decode: bool) -> None:
        super().__init__()
        self.held = (_Extended(mixer) if decode else mixer,)
        self.mixer_prefix = "mixer." if decode else ""
        self.names, self.shape, self.reads = names, mixer.shape, mixer.reads

    def forward(self, *inputs: Tensor) -> Any:
        given = dict(zip(self.names, inputs, strict=True))
        parameters = {
            self.mixer_prefix + name.removeprefix("parameter."): tensor
            for name, tensor in given.items()
            if name.startswith("parameter.")
        }
        x = given["x"]
        unread = x.new_zeros(()).expand(x.shape[0], 1, x.shape[1], self.shape.head_dim)
        arguments = [x, *(given.get(role, unread) for role in PROJECTIONS)]
        state = {k.removeprefix("past."): v for k, v in given.items() if k.startswith("past.")}
        last = state if self.mixer_prefix else given.get("real")
        return torch.func.functional_call(self.held[0], parameters, (*arguments, last))


class _Extended(nn.Module):
    """`Mixer.extend` as a forward, its state in a fixed order."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        names = list(state)
        out, left = self.mixer.extend(x, query, key, value, state)
        return (out, *(left[name] for name in names))


_KEPT: dict[object, MixerGraph] = {}
_FIXED: set[object] = set()
"""Structures that have no graph for any number of tokens."""


def mixer_graph(
    mixer: Mixer, *, masked: bool = False, decode: bool = False, tokens: int | None = None
) -> MixerGraph:
    """The structure of `mixer`, exported unless this process has it. `mixer` is not modified.

    Args:
        masked: whether an input says which tokens are real.
        decode: `extend` instead of `forward`.
        tokens: T where one number will do, as in an image.

    Raises:
        InternalError: if torch cannot export it, or it is asked to decode and cannot, with why.
    """
    form = (_structure(mixer), masked, decode)

    def kept(tokens: int | None) -> MixerGraph:
        if (form, tokens) not in _KEPT:
            copied = copy.deepcopy(mixer).eval()
            _KEPT[form, tokens] = _export(copied, masked, decode, tokens)
        return _KEPT[form, tokens]

    if tokens is None:
        return kept(None)
    if form not in _FIXED:
        try:
            return kept(None)
        except InternalError:
            _FIXED.add(form)
    return kept(tokens)


def _structure(mixer: Mixer) -> object:
    """Equal for mixers that differ in the values of their parameters alone."""
    parameters = mixer.state_dict()
    plain = (int, float, str, tuple, type(None))
    settings = [
        (f"{path}.{name}", repr(value))
        for path, module in mixer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, plain) and name != "training"
    ]
    fixed = [
        (name, hashlib.sha256(buffer.detach().cpu().contiguous().numpy().tobytes()).hexdigest())
        for name, buffer in mixer.named_buffers()
        if name not in parameters
    ]
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()]
    return (type(mixer), mixer.shape, tuple(shapes), tuple(settings), tuple(fixed))


def empty_state(mixer: Mixer) -> dict[str, Tensor]:
    """The state of one example before the first token.

    Raises:
        InternalError: if the mixer keeps none, or one that is not zero in float32.
    """
    try:
        state = mixer.empty_state(1)
    except NotImplementedError as error:
        raise InternalError(
            f"mixer {mixer.name!r} cannot decode: {error}. Leave it out of replace, or measure a "
            "workload that does not generate"
        ) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32 or tensor.shape[:1] != (1,) or bool(tensor.any()):
            raise InternalError(
                f"mixer {mixer.name!r}: its state {name!r} must be float32 (B, …), all zeros "
                "before the first token"
            )
    return state


def _export(mixer: Mixer, masked: bool, decode: bool, tokens: int | None) -> MixerGraph:
    shape, length = mixer.shape, tokens or _TOKENS
    state = empty_state(mixer) if decode else {}
    if decode:
        _check_sizes(mixer, state)
    heads = {"query": shape.heads, "key": shape.kv_heads, "value": shape.kv_heads}
    parameters = mixer.state_dict()
    inputs = {f"parameter.{name}": tensor.detach() for name, tensor in parameters.items()}
    inputs["x"] = torch.randn(_BATCH, length, shape.hidden)
    for role in mixer.reads:
        inputs[role] = torch.randn(_BATCH, heads[role], length, shape.head_dim)
    if masked and not decode:
        inputs["real"] = torch.ones(_BATCH, length, dtype=torch.bool)
    for name, tensor in state.items():
        inputs[f"past.{name}"] = tensor.expand(_BATCH, *tensor.shape[1:]).clone()
    open_axes: list[dict[int, Any] | None] = [None] * len(parameters)
    for name, value in list(inputs.items())[len(parameters) :]:
        axes = [0] if name.startswith("past.") or tokens else [0, 2 if value.ndim == 4 else 1]
        open_axes.append(dict.fromkeys(axes, torch.export.Dim.DYNAMIC))
    outputs = ["out", *(f"present.{name}" for name in state)]
    what = f"mixer {mixer.name!r}"
    model = to_onnx(
        _Function(mixer, list(inputs), decode=decode),
        inputs,
        {"inputs": tuple(open_axes)},
        outputs,
        what=what,
    )
    return _tidy(model, list(inputs), outputs, state, what)


@torch.no_grad()
def _check_sizes(mixer: Mixer, state: Mapping[str, Tensor]) -> None:
    """Raises InternalError where a token changes the state's size."""
    shape = mixer.shape
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (torch.randn(1, count, 1, shape.head_dim) for count in heads)
    _, after = mixer.extend(torch.randn(1, 1, shape.hidden), query, key, value, dict(state))
    for name, before in state.items():
        if name not in after or after[name].shape != before.shape:
            found = tuple(after[name].shape) if name in after else "gone"
            raise InternalError(
                f"mixer {mixer.name!r}: its state {name!r} is {tuple(before.shape)} before and "
                f"{found} after a token; its size must stay"
            )


def _tidy(
    model: onnx.ModelProto,
    inputs: list[str],
    outputs: list[str],
    state: Mapping[str, Tensor],
    what: str,
) -> MixerGraph:
    """What is left of an export: short names, no metadata, nothing dead."""
    if len(model.functions):
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    graph = Graph(model)
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") or any(a.HasField("g") for a in node.attribute):
            raise InternalError(
                f"{what} is exported with {node.domain}::{node.op_type}, which is no plain "
                "operator of ONNX: write it without branches and loops over tensors"
            )
    graph.merge_equal()
    graph.prune()
    names = {name: name for name in (*inputs, *outputs)}
    for node in graph.nodes:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        for tensors in (node.input, node.output):
            tensors[:] = [t and names.setdefault(t, str(len(names))) for t in tensors]
    for constant in graph.initializers.values():
        constant.name = names[constant.name]
    return MixerGraph(
        tuple(graph.nodes),
        tuple(graph.initializers.values()),
        frozenset(t for node in graph.nodes for t in node.input if t in inputs),
        tuple(outputs),
        {name: tuple(tensor.shape[1:]) for name, tensor in state.items()},
    )
