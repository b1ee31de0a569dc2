"""Units and their sites: the compressible places of a model, described by shape alone. No torch.

A *unit* is an attention or feed-forward sublayer, an embedding or a head. Its *sites* are the
linear layers and embedding tables inside it, each named by its module path in the task model.
A *format* says what an option leaves at a site: shape, weight bits, grouping, activation bits.
Formats are all that a size estimate or a cost table needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

UnitKind = Literal["attention", "ffn", "embedding", "head"]
Role = Literal[
    "query",
    "key",
    "value",
    "output",
    "gate",
    "up",
    "down",
    "embedding",
    "position",
    "pooler",
    "head",
]


@dataclass(frozen=True)
class Site:
    """A linear layer, weight `(rows, columns)` = `(out, in)`, or a table `(vocabulary, width)`."""

    name: str
    role: Role
    rows: int
    columns: int
    bias: bool

    @property
    def table(self) -> bool:
        """Whether rows are gathered by index (an embedding) rather than multiplied with."""
        return self.role in ("embedding", "position")

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.rows * self.columns + (self.rows if self.bias else 0)


@dataclass(frozen=True)
class Unit:
    """A compressible place of a model.

    `name` is layout-independent (`layers.3.attention`, `layers.3.ffn`, `embeddings`, `head`).
    `layer` is the index of its block, `None` outside the blocks. `heads`, `kv_heads` and
    `head_dim` are set for attention; `width` (the inner width) for a feed-forward sublayer.
    `tied_to` names the unit whose weight this one shares, if any.
    `causal` says whether a token attends to earlier ones alone.
    `protected_tokens` counts the leading tokens (class, distillation, registers) that stay when
    patch tokens are merged or dropped behind this unit; `None` where that cannot be done.
    `plain_keys` says that keys are attended to as their layer gives them, or rotated: not normed.
    """

    name: str
    kind: UnitKind
    sites: tuple[Site, ...]
    layer: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    width: int | None = None
    skippable: bool = False
    tied_to: str | None = None
    protected_tokens: int | None = None
    causal: bool = False
    plain_keys: bool = True

    @property
    def parameters(self) -> int:
        """Number of weights and biases in all sites."""
        return sum(site.parameters for site in self.sites)

    def site(self, role: Role) -> Site | None:
        """The site of this role, or `None`."""
        return next((site for site in self.sites if site.role == role), None)


@dataclass(frozen=True)
class SiteFormat:
    """What an option leaves at one site.

    Attributes:
        rows, columns: the shape of the weight that remains, `(out, in)`.
        bias: whether a bias is added.
        embedding: True for a table that is gathered from, False for a linear layer.
        weight_bits: 32 (dense), 8, 4, 3 or 2.
        group: columns that share one scale; `None` is one scale per row. Unused when dense.
        activation_bits: 32 (float) or 8 (quantised, per tensor).
        static: whether the range of 8-bit activations is fixed at calibration, not at run time.
        scaled: whether inputs are multiplied by a vector first, the weight having been divided.
        nonzeros: weights stored where the site is sparse, in total; `None` is all of them.
        mixer: name of the mixer that makes this site's input in place of softmax attention; None is
            the model's own attention.
        cache_bits: of a layer of keys or values, those it has in the cache of a model that
            generates: 32 (float), or 8 in the scales of its outputs, fixed at calibration.
    """

    rows: int
    columns: int
    bias: bool
    embedding: bool = False
    weight_bits: int = 32
    group: int | None = None
    activation_bits: int = 32
    static: bool = False
    scaled: bool = False
    nonzeros: int | None = None
    mixer: str | None = None
    cache_bits: int = 32


UnitFormat = Mapping[str, SiteFormat]
"""Site name → format. An empty mapping is a skipped unit."""


def dense_format(unit: Unit) -> dict[str, SiteFormat]:
    """The format of a unit nothing was done to."""
    return {
        site.name: SiteFormat(site.rows, site.columns, site.bias, embedding=site.table)
        for site in unit.sites
    }


def resized(
    format: SiteFormat, *, rows: int | None = None, columns: int | None = None
) -> SiteFormat:
    """The same format with another shape."""
    return replace(
        format,
        rows=format.rows if rows is None else rows,
        columns=format.columns if columns is None else columns,
    )
