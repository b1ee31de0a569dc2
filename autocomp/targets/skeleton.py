"""The skeleton: one exported graph that every candidate of a model is lowered from.

The dense torch model is exported once with `torch.onnx.export(dynamo=True)` while marker nodes
stand for its linear layers, its embedding sites and its attention products:

    autocomp::Linear(x; site)                          (…, in)  → (…, out)
    autocomp::Embedding(ids; site)                     (B, T)   → (B, T, width)
    autocomp::Attention(q, k, v[, mask]; …)            (B, H, T, D) × 3 → (B, T, H·D)

and for the places where tokens can be merged or dropped (`token_markers`).
For a workload that decodes, attentions also read and write a key-value cache (`cache`), and
positions count from the number of tokens in it.

The graph holds no big weights and no fixed number of heads, so structure and precision of every
site remain open; `lower` fills them in. Batch and sequence stay dynamic.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import onnx
import torch
from onnx import helper
from torch import nn

from autocomp.core.errors import InternalError
from autocomp.core.unit import Unit
from autocomp.targets.cache import STAND_IN, add_cache
from autocomp.targets.graph import Graph, attribute
from autocomp.targets.protocol import ExportTask
from autocomp.targets.skeleton_format import DOMAIN
from autocomp.targets.token_markers import mark_tokens
from autocomp.targets.torch_export import to_onnx

_MASKED = -1e9
"""Added to the scores of padding: exp() of it is exactly zero in float32."""


class _LinearMarker(nn.Module):
    """Stands for a linear layer; keeps the parameters out of the graph."""

    def __init__(self, site: str, linear: nn.Linear) -> None:
        super().__init__()
        self.rows = linear.out_features
        self.attributes: dict[str, Any] = {
            "site": site,
            "rows": linear.out_features,
            "columns": linear.in_features,
            "bias": int(linear.bias is not None),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Linear",
            (x,),
            attrs=self.attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )


class _EmbeddingMarker(nn.Module):
    """Stands for an embedding table."""

    def __init__(self, site: str, table: nn.Embedding) -> None:
        super().__init__()
        self.width = table.embedding_dim
        self.attributes: dict[str, Any] = {
            "site": site,
            "rows": table.num_embeddings,
            "columns": table.embedding_dim,
            "bias": 0,
        }

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Embedding",
            (ids,),
            attrs=self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.width),
            version=1,
        )


def _attention_marker(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `(B, H, T, D)` in, `(B, T, H, D)` out.

    The model reshapes that to `(B, T, H·D)`, which is what the marker stands for in the graph.
    """
    batch, heads, length, head_dim = query.shape
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention",
        (query, key, value) if attention_mask is None else (query, key, value, attention_mask),
        attrs={
            "head_dim": int(head_dim),
            "layer": int(getattr(module, "layer_idx", -1)),
            "causal": int(getattr(module, "is_causal", False)),
            "scale": float(head_dim**-0.5 if scaling is None else scaling),
        },
        dtype=torch.float32,
        shape=(batch, length, heads, value.shape[-1]),
        version=1,
    )
    return out, None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    *,
    padded: bool = True,
    **_: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: additive `(B, 1, T, T)` of padding alone, if there is any."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise InternalError(
            f"attention pattern {getattr(mask_function, '__qualname__', mask_function)!r} has no "
            "lowering: full and causal attention have one. Add it in autocomp/targets/skeleton.py"
        )
    if attention_mask is None or not padded:
        return None
    keep = attention_mask[:, None, None, :].to(torch.bool)
    bias = torch.where(keep, 0.0, _MASKED).to(torch.float32)
    return bias.expand(batch_size, 1, q_length, kv_length)


class _Logits(nn.Module):
    """The model as a function of its named inputs that returns the logits alone.

    Text without a mask is whole sequences. transformers must be told so: without a mask it looks
    for several sequences packed into one, and attention then depends on the position ids.
    The second axis of an input `past` says how many tokens come before.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.m = model
        self.names = list(names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        past = named.pop(STAND_IN, None)
        if not _padded(self.names):
            named["attention_mask"] = torch.ones_like(named["input_ids"])
        if past is not None:
            positions = torch.arange(named["input_ids"].shape[1]) + past.shape[1]
            named["position_ids"] = positions[None]
        logits: torch.Tensor = self.m(**named).logits
        return logits


def _padded(names: Sequence[str]) -> bool:
    """Whether an input says what is padding; images have none and need none."""
    return "attention_mask" in names or "input_ids" not in names


def _marked_copy(model: nn.Module, embedding_sites: set[str]) -> nn.Module:
    """A copy of `model` that shares its parameters, with markers in place of linears and sites."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    marked = copy.deepcopy(model, shared)
    for name, module in list(marked.named_modules()):
        for child, part in list(module.named_children()):
            site = f"{name}.{child}" if name else child
            if isinstance(part, nn.Linear):
                setattr(module, child, _LinearMarker(site, part))
            elif site in embedding_sites and isinstance(part, nn.Embedding):
                setattr(module, child, _EmbeddingMarker(site, part))
    return marked.eval()


@contextlib.contextmanager
def _marked_attention(model: nn.Module, padded: bool) -> Iterator[None]:
    """Within it the model's attention is the marker; transformers models only."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("autocomp", _attention_marker)
    AttentionMaskInterface.register("autocomp", partial(_mask, padded=padded))
    config: Any = model.config
    previous = config._attn_implementation
    config._attn_implementation = "autocomp"
    try:
        yield
    finally:
        config._attn_implementation = previous


def export_skeleton(
    model: nn.Module, units: Sequence[Unit], task: ExportTask, *, decode: bool = False
) -> onnx.ModelProto:
    """Export the skeleton of a dense `model`, which is not modified. Takes seconds.

    With `decode` it has a key-value cache; the task's inputs must then be `input_ids` alone.

    Raises:
        InternalError: if torch cannot export the model, with the first line of its reason.
    """
    sites = {s.name for unit in units if unit.kind == "embedding" for s in unit.sites}
    marked = _marked_copy(model, sites)
    mark_tokens(marked, units)
    config: Any = marked.config
    if getattr(config, "use_cache", None):
        config.use_cache = False
    inputs = task.example_inputs(2, 16)
    axes = dict(task.dynamic_axes)
    if decode:
        inputs[STAND_IN] = torch.zeros(2, 5)
        axes[STAND_IN] = {1: STAND_IN}
    dynamic = tuple(dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs)
    names = list(inputs)
    with _marked_attention(marked, _padded(names)):
        exported = to_onnx(
            _Logits(marked, names),
            inputs,
            {"inputs": dynamic},
            ["logits"],
            what=type(model).__name__,
        )
    return _tidy(exported, axes, decode)


def _tidy(
    model: onnx.ModelProto, axes: Mapping[str, Mapping[int, str]], decode: bool
) -> onnx.ModelProto:
    """Parameters named as in torch, dynamic axes named, metadata dropped, attention resolved."""
    graph = Graph(model)
    graph.rename_initializers(lambda name: name.removeprefix("m."))
    for value in model.graph.input:
        del value.metadata_props[:]
        for axis, label in axes.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = label
    for value in model.graph.output:
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")
    for node in list(graph.nodes):  # resolving an attention inserts nodes
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type == "Attention" and node.domain == DOMAIN:
            _resolve_attention(graph, node)
    graph.merge_equal()
    if decode:
        add_cache(graph)
    graph.prune()
    return graph.to_model()


def _resolve_attention(graph: Graph, node: onnx.NodeProto) -> None:
    """Record whose heads the marker attends with; bypass the split into heads where possible.

    Query, key and value that come straight from `Transpose(Reshape(x))` are taken before it,
    `(B, T, H·D)`: the runtime's attention splits the heads itself.
    """
    for name, tensor in zip(("query", "key", "value"), node.input, strict=False):
        site = graph.upstream_site(tensor)
        if site is None:
            raise InternalError(f"no linear layer found that feeds the {name} of {node.name}")
        node.attribute.append(helper.make_attribute(f"{name}_site", site))
    head_dim = int(attribute(node, "head_dim"))
    sources = [_before_split(graph, tensor) for tensor in node.input[:3]]
    whole = None not in sources
    node.attribute.append(helper.make_attribute("flat", int(whole)))
    for index, source in enumerate(sources):
        rotary = _rotary_above(graph, node.input[index])
        if rotary is not None:
            for table in (1, 2):  # the runtime wants one a sequence
                rotary.input[table] = graph.expanded_to_batch(rotary.input[table])
        if whole and source is not None:
            if rotary is None:
                node.input[index] = source
            else:
                _rotate_whole(graph, rotary, source, head_dim)
        elif rotary is not None:  # four axes say how many heads there are; the count would be fixed
            kept = [item for item in rotary.attribute if item.name != "num_heads"]
            del rotary.attribute[:]
            rotary.attribute.extend(kept)
    # The output is (B, T, H·D) already: the model's own reshape to it is left out.
    for user in graph.users(node.output[0]):
        if user.op_type != "Reshape":
            raise InternalError(
                f"{user.op_type} after the attention of {attribute(node, 'query_site')}: the heads "
                "must be joined first. Describe this model in autocomp/targets/skeleton.py"
            )
        graph.replace_uses(user.output[0], node.output[0])


def _rotary_above(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The rotary embedding that makes `tensor`, if it is one."""
    node = graph.producer(tensor)
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _before_split(graph: Graph, tensor: str) -> str | None:
    """The `(B, T, H·D)` form of a tensor split into heads, a rotary embedding after it left out.

    Where something is done to each head before they change places (Qwen3's norms), its output is
    joined again.
    """
    rotary = _rotary_above(graph, tensor)
    inner = tensor if rotary is None else rotary.input[0]
    return graph.before_heads(inner) or graph.joined_heads(inner)


def _rotate_whole(graph: Graph, rotary: onnx.NodeProto, source: str, head_dim: int) -> None:
    """Let a rotary embedding read `source` `(B, T, H·D)`; H is that of the site it rotates."""
    site = graph.upstream_site(source)
    rotary.input[0] = source
    del rotary.attribute[:]
    rotary.attribute.append(helper.make_attribute("interleaved", 0))
    rotary.attribute.append(helper.make_attribute("heads_of", site))
    rotary.attribute.append(helper.make_attribute("head_dim", head_dim))
    rotary.domain = DOMAIN
