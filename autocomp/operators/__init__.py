"""Compression operators, one file per method, and the product of their steps at a unit."""

from autocomp.operators.options import (
    OPERATORS,
    apply_option,
    apply_step,
    option_formats,
    rule_of,
    sequence_lengths,
    token_reduction,
    tokens_kept,
    unit_options,
    weight_option,
)

__all__ = [
    "OPERATORS",
    "apply_option",
    "apply_step",
    "option_formats",
    "rule_of",
    "sequence_lengths",
    "token_reduction",
    "tokens_kept",
    "unit_options",
    "weight_option",
]
