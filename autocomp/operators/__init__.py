"""Compression operators, one file per method, and the product of their steps at a unit."""

from autocomp.operators.options import (
    OPERATORS,
    apply_option,
    apply_step,
    family,
    option_formats,
    rule_of,
    sequence_lengths,
    step_needs,
    step_versions,
    token_reduction,
    tokens_kept,
    training_step,
    unit_options,
    weight_option,
)

__all__ = [
    "OPERATORS",
    "apply_option",
    "apply_step",
    "family",
    "option_formats",
    "rule_of",
    "sequence_lengths",
    "step_needs",
    "step_versions",
    "token_reduction",
    "tokens_kept",
    "training_step",
    "unit_options",
    "weight_option",
]
