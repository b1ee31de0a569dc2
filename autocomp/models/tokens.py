"""Fewer tokens from a layer on: an image's patch tokens merged (ToMe), dropped or fused (EViT).

A block of a vision model is `x + attention(norm(x))`, then `x + ffn(norm(x))`. `install_tokens`
puts a `TokenBlock` in its place, which holds the same modules under the same names and shortens
the sequence between the two. How many tokens go follows from how many arrive, never from their
values: shapes stay static.

A merged token stands for several patches. That number, its *size*, weighs later merges and the mean
over patch tokens where a head takes one (DINOv2), so that each patch counts once, as it did before;
it is handed on beside the hidden states, in the `TokenSizes` all blocks of a model share. A fused
token stands for all it is made of, a dropped one counts no more. Attention is not weighted by size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit
from autocomp.models.layouts import SublayerSpec
from autocomp.models.surgery import model_layout, replace_module


class TokenSizes:
    """How many patches each token stands for at this point of a forward pass.

    `now` is float32 `(B, T, 1)`, or `None` while every token stands for itself.
    """

    def __init__(self) -> None:
        self.now: torch.Tensor | None = None


class TokenBlock(nn.Module):
    """A pre-norm block that shortens its sequence between attention and feed-forward.

    Args:
        block: the block, whose modules it takes over.
        attention, ffn: the block's sublayers, as its layout describes them.
        reduce: called as `reduce(x, queries, keys)` with `(B, T, C)` and the outputs of the query
            and key projections `(B, T, H·D)`; returns `(B, T', C)`.
    """

    def __init__(
        self, block: nn.Module, attention: SublayerSpec, ffn: SublayerSpec, reduce: nn.Module
    ) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.reduce_tokens = reduce
        self._attention, self._ffn = attention, ffn
        self.training = block.training

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`(B, T, C)` → `(B, T', C)`."""
        if attention_mask is not None:
            raise ValueError("tokens are merged or dropped only where no attention mask is given")
        with self._outputs("query") as queries, self._outputs("key") as keys:
            x = self._sublayer(self._attention, hidden_states, **kwargs)
        if queries and keys:
            x = self.reduce_tokens(x, queries[-1], keys[-1])
        return self._sublayer(self._ffn, x)

    def _sublayer(self, spec: SublayerSpec, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        norm, *after = spec.identity
        (path,) = spec.zero
        out = self.get_submodule(path)(self.get_submodule(norm)(x), **kwargs)
        if spec.zero[path] > 1:
            out = out[0]
        for name in after:
            out = self.get_submodule(name)(out)
        return x + out  # type: ignore[no-any-return]

    @contextmanager
    def _outputs(self, role: str) -> Iterator[list[torch.Tensor]]:
        """What the projection of this role gives meanwhile; nothing if attention is skipped."""
        path = next(site.path for site in self._attention.sites if site.role == role)
        seen: list[torch.Tensor] = []
        try:
            projection = self.get_submodule(path)
        except AttributeError:
            yield seen
            return
        handle = projection.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            yield seen
        finally:
            handle.remove()


class ReduceTokens(nn.Module):
    """Carries a `TokenReduction` out on the hidden states of one forward pass.

    Args:
        unit: name of the attention unit it stands behind.
        reduction: what to do.
        head_dim: width of an attention head.
        sizes: shared by the model.
        first: whether it is the first of the model, where every token stands for itself.
    """

    def __init__(
        self, unit: str, reduction: TokenReduction, head_dim: int, sizes: TokenSizes, first: bool
    ) -> None:
        super().__init__()
        self.unit, self.reduction, self.head_dim = unit, reduction, head_dim
        self.sizes, self.first = sizes, first

    def forward(self, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`(B, T, C)`, and projections `(B, T, H·D)`, → `(B, reduction.kept(T), C)`."""
        sizes = None if self.first else self.sizes.now
        removed = self.reduction.removed(x.shape[1])
        if removed and self.reduction.method == "tome":
            metric = _by_head(keys.detach(), self.head_dim).mean(dim=2)
            x, sizes = merge_tokens(x, metric, removed, self.reduction.protected, sizes)
        elif removed:
            attention = class_attention(queries.detach(), keys.detach(), self.head_dim)
            count, protected = self.reduction.chosen(x.shape[1]), self.reduction.protected
            shorten = fuse_tokens if self.reduction.method == "token_fuse" else drop_tokens
            x, sizes = shorten(x, attention, count, protected, sizes)
        self.sizes.now = sizes
        return x

    def extra_repr(self) -> str:
        """Method and ratio."""
        return f"{self.reduction.method}, ratio={self.reduction.ratio}"


class AveragedNorm(nn.LayerNorm):
    """The final norm of a model whose head takes the mean over patch tokens.

    Patch tokens are scaled by size over mean size: their plain mean is then the one weighted by
    size, in which every patch that was not dropped counts once.
    """

    def __init__(self, norm: nn.LayerNorm, sizes: TokenSizes, protected: int) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.sizes, self.protected = sizes, protected

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(B, T, C)` → `(B, T, C)`."""
        x = super().forward(input)
        sizes = self.sizes.now
        if sizes is None:
            return x
        patches = sizes[:, self.protected :]
        scaled = x[:, self.protected :] * (patches / patches.mean(dim=1, keepdim=True))
        return torch.cat([x[:, : self.protected], scaled], dim=1)


def merge_tokens(
    x: torch.Tensor,
    metric: torch.Tensor,
    count: int,
    protected: int,
    sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: the `count` best pairs of patch tokens are averaged by size.

    Each patch token at an even place is paired with the one at an odd place whose metric is most
    alike (cosine); of equal ones the first. Order of the result: the protected tokens, the even
    ones that were not merged, the odd ones.

    Args:
        x: `(B, T, C)`.
        metric: `(B, T, D)`, what similarity is measured on.
        count: at most half of the patch tokens.
        protected: leading tokens that take no part.
        sizes: `(B, T, 1)`, or `None` for all ones.

    Returns:
        `(B, T − count, C)` and the sizes `(B, T − count, 1)`.
    """
    if sizes is None:
        sizes = x.new_ones(*x.shape[:2], 1)
    even, odd = protected + protected % 2, protected + 1 - protected % 2
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, even::2] @ metric[:, odd::2].transpose(1, 2)  # (B, A, B)
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, rest = order[:, :count, None], order[:, count:].sort(dim=-1).values[..., None]
    partner = partner.gather(1, merged[..., 0])[..., None]  # (B, count, 1)

    def add(values: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return values.scatter_add(1, partner.expand_as(more), more)

    def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index.expand(-1, -1, values.shape[-1]))

    x_even, x_odd = x[:, even::2], x[:, odd::2]
    size_even, size_odd = sizes[:, even::2], sizes[:, odd::2]
    size_merged = take(size_even, merged)
    total = add(size_odd, size_merged)
    average = add(x_odd * size_odd, take(x_even, merged) * size_merged) / total
    return (
        torch.cat([x[:, :protected], take(x_even, rest), average], dim=1),
        torch.cat([sizes[:, :protected], take(size_even, rest), total], dim=1),
    )


def class_attention(queries: torch.Tensor, keys: torch.Tensor, head_dim: int) -> torch.Tensor:
    """How much the first token attends to each, `(B, T)`: mean over heads of the softmax.

    `queries`: `(B, T, H·D)`; `keys`: `(B, T, G·D)`, each for H / G adjacent query heads.
    """
    key = _by_head(keys, head_dim).permute(0, 2, 3, 1)  # (B, G, D, T)
    query = queries[:, 0].reshape(len(queries), key.shape[1], -1, head_dim)  # (B, G, H / G, D)
    scores: torch.Tensor = (query @ key) * head_dim**-0.5
    return scores.softmax(dim=-1).mean(dim=(1, 2))


def _by_head(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`(B, T, H·D)` → `(B, T, H, D)`."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def drop_tokens(
    x: torch.Tensor,
    attention: torch.Tensor,
    count: int,
    protected: int,
    sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Drop the `count` patch tokens of least `attention` `(B, T)`; the others keep their order.

    Returns:
        `(B, T − count, C)`, and the sizes `(B, T − count, 1)` if any were given.
    """
    order = attention[:, protected:].argsort(dim=-1, descending=True, stable=True)
    kept = order[:, : x.shape[1] - protected - count].sort(dim=-1).values[..., None] + protected

    def take(values: torch.Tensor) -> torch.Tensor:
        patches = values.gather(1, kept.expand(-1, -1, values.shape[-1]))
        return torch.cat([values[:, :protected], patches], dim=1)

    return take(x), None if sizes is None else take(sizes)


def fuse_tokens(
    x: torch.Tensor,
    attention: torch.Tensor,
    count: int,
    protected: int,
    sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put one token, the last, in the place of the `count` patch tokens of least `attention`.

    It is their mean weighted by attention `(B, T)`. The paper's weights are not brought to a sum of
    one; a mean keeps the scale of the other tokens, which a model that is not trained again needs.

    Returns:
        `(B, T − count + 1, C)` and the sizes `(B, T − count + 1, 1)`.
    """
    if sizes is None:
        sizes = x.new_ones(*x.shape[:2], 1)
    order = attention[:, protected:].argsort(dim=-1, descending=True, stable=True) + protected
    gone = order[:, x.shape[1] - protected - count :, None]
    weights = attention[..., None].gather(1, gone)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    fused = (x.gather(1, gone.expand(-1, -1, x.shape[2])) * weights).sum(dim=1, keepdim=True)
    total = sizes.gather(1, gone).sum(dim=1, keepdim=True)
    x, kept_sizes = drop_tokens(x, attention, count, protected, sizes)
    assert kept_sizes is not None
    return torch.cat([x, fused], dim=1), torch.cat([kept_sizes, total], dim=1)


def install_tokens(
    model: nn.Module, units: Sequence[Unit], reductions: Mapping[str, TokenReduction]
) -> None:
    """Shorten the sequence behind the attention units named; last of all surgery on `model`.

    Raises:
        ValueError: for a unit behind which tokens cannot be merged or dropped.
    """
    layout = model_layout(model)
    sizes = TokenSizes()
    first = True
    for unit in units:
        reduction = reductions.get(unit.name)
        if reduction is None:
            continue
        if unit.protected_tokens is None or unit.layer is None or unit.head_dim is None:
            raise ValueError(f"{unit.name}: no tokens can be merged or dropped behind this unit")
        path = layout.block_path(unit.layer)
        reduce = ReduceTokens(unit.name, reduction, unit.head_dim, sizes, first)
        block = TokenBlock(model.get_submodule(path), layout.attention, layout.ffn, reduce)
        replace_module(model, path, block)
        first = False
    if layout.averaged is not None and not first:
        path = f"{layout.prefix}.{layout.averaged}"
        norm = model.get_submodule(path)
        assert isinstance(norm, nn.LayerNorm)
        replace_module(model, path, AveragedNorm(norm, sizes, layout.leading_tokens))


def model_reductions(model: nn.Module) -> dict[str, TokenReduction]:
    """Attention unit → what is done to the sequence behind it."""
    return {
        module.unit: module.reduction
        for module in model.modules()
        if isinstance(module, ReduceTokens)
    }


def token_sizes(model: nn.Module) -> TokenSizes | None:
    """What the blocks hand on beside the hidden states; `None` where no token is merged."""
    for module in model.modules():
        if isinstance(module, ReduceTokens):
            return module.sizes
    return None
