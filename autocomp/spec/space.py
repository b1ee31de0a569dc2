"""The rules of a spec's space: which units, and what may be done to them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from autocomp.spec.section import Section


class StructureSection(Section):
    """Structural choices, alternatives to each other; fractions are of what is kept.

    Leaving a unit as it is is offered if any list of fractions holds 1.0, or if no fractions are
    listed: `{heads: [1.0, 0.5], rank: [0.5]}` offers it, `{heads: [0.5], skip: true}` does not.
    """

    heads: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="Fractions of attention heads (of key-value groups under GQA) kept.",
    )
    groups: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="Fractions of the key-value heads to which these are pooled, rounded to a "
        "divisor of their number; one at least. Trained on the unit's own inputs.",
    )
    width: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, min_length=1, description="Fractions of the feed-forward width kept."
    )
    rank: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="Fractions of the rank at which two factors hold as many weights as the layer.",
    )
    vocabulary: bool = Field(
        False, description="Also offer keeping the embeddings of the task's own tokens alone."
    )
    skip: bool = Field(False, description="Also offer dropping the sublayer.")
    replace: list[str] | None = Field(
        None,
        min_length=1,
        description="Also offer replacing attention by these mixers; see `autocomp ls mixers`.",
    )
    at_most: int | None = Field(
        None,
        ge=0,
        description="How many of the units of this rule a candidate may replace; all by default.",
    )

    @model_validator(mode="after")
    def _at_most_of_something(self) -> Self:
        if self.at_most is not None and self.replace is None:
            raise ValueError(
                "at_most caps how many units are replaced, and nothing replaces any. Add replace: "
                "[...], or leave at_most out"
            )
        return self


class TokensSection(Section):
    """Shortening the sequence of patch tokens behind an attention sublayer (vision)."""

    method: str | list[str] = Field(
        "tome", description="Token operator(s): tome, token_prune, token_fuse."
    )
    ratios: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.0],
        min_length=1,
        description="Shares of the patch tokens then present that are merged or dropped; 0.0 "
        "leaves all.",
    )


def _level(value: float | str) -> float | str:
    if isinstance(value, str):
        kept, colon, group = value.partition(":")
        counts = kept.isascii() and kept.isdecimal() and group.isascii() and group.isdecimal()
        if not (colon and counts and 0 < int(kept) < int(group) <= 64):
            raise ValueError(
                f"must be a fraction like 0.5, or N:M like 2:4 (N of every M weights kept, "
                f"M at most 64), got {value!r}"
            )
    elif not 0 <= value < 1:
        raise ValueError(f"must be a fraction of zeros in [0, 1), or N:M like 2:4, got {value:g}")
    return value


class SparsitySection(Section):
    """Which weights become zero. Bytes, not speed: the runtimes multiply by zeros all the same."""

    method: str | list[str] = Field(
        "sparsegpt", description="Sparsity operator(s): sparsegpt, wanda, magnitude."
    )
    levels: list[Annotated[float | str, AfterValidator(_level)]] = Field(
        [0.0],
        min_length=1,
        description="Fractions of zeros, 0.0 for none; or N:M like 2:4, N of every M weights of a "
        "row kept.",
    )


class BitsSection(Section):
    """Precision choices."""

    method: str | list[str] = Field("gptq", description="Quantisation operator(s).")
    weights: list[Literal["dense"] | int] = Field(
        ["dense"], min_length=1, description="Weight bits; dense is the target's own."
    )
    activations: list[Literal["dense", "static"] | int] = Field(
        ["dense"],
        min_length=1,
        description="Activation bits; dense is the target's own. 8 finds the range of each tensor "
        "at run time; static is 8 bits with the range fixed at calibration.",
    )
    cache: list[Literal["dense"] | int] = Field(
        ["dense"],
        min_length=1,
        description="Bits of the key-value cache of a model that generates, at attention units: "
        "dense is the target's own; 8 rounds each channel in a scale fixed at calibration.",
    )
    range: Literal["minmax", "percentile", "mse"] = Field(
        "mse", description="How the range of static activations is fixed."
    )
    migration: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.5],
        min_length=1,
        description="smoothquant: how much of the inputs' spread the weights take over.",
    )
    per_site: bool = Field(
        False,
        description="Also offer each number of bits with one group of sites (the values, the "
        "output, ...) left at the next higher number.",
    )
    group: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] = Field(
        32,
        description="Columns that share a scale, below 8-bit weights; a list offers each. 0: a "
        "whole row.",
    )


class RuleSection(Section):
    """Which units, and what may be done to them. The last rule that matches a unit holds."""

    match: str = Field(description="Glob over unit names: layers.*.attention, embeddings, head.")
    structure: StructureSection = StructureSection()
    tokens: TokensSection | None = Field(
        None, description="Shortening the sequence of patches (vision)."
    )
    sparsity: SparsitySection = SparsitySection()
    bits: BitsSection = BitsSection()
