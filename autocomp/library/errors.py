"""What an option does to a unit's outputs, on the calibration tokens: one figure per site."""

from __future__ import annotations

import torch

from autocomp.operators.factorize.factors import multiplied
from autocomp.operators.gram import derived, output_error
from autocomp.operators.protocol import (
    LocalTraining,
    SiteState,
    SiteStats,
    UnitState,
    UnitStats,
    trained_stats,
    training_of,
)


def relative_errors(
    original: UnitState, before: UnitState, after: UnitState, stats: UnitStats
) -> dict[str, float]:
    """Site → ‖Wx − Ŵx‖² / ‖Wx‖² over the calibration tokens, biases included in the difference.

    Where outputs were removed there is no original to compare with: `before`, the state before the
    last step, stands in, and where the last step removed them, the kept ones are unchanged. Factors
    are multiplied: the error is that of the site they stand for. Without a Gram matrix, of a table
    or because no operator needed it, the error is ‖W − Ŵ‖² / ‖W‖².

    Where attention was trained (a mixer, shared keys and values), projections have no original
    either: what later steps do to them is compared with `before`. The output's error is that of the
    sublayer on held-out tokens, after training, and what later steps add.
    """
    training = training_of(after)
    if training is not None:
        return _errors_behind(training, before, after, stats)
    errors: dict[str, float] = {}
    before, after = multiplied(before), multiplied(after)
    for name, site in after.items():
        reference = original[name]
        if reference.weight.shape[0] != site.weight.shape[0]:
            reference = before[name]
            if reference.weight.shape[0] != site.weight.shape[0]:
                errors[name] = 0.0
                continue
        errors[name] = _relative_error(reference, site, stats.get(name))
    return errors


def _errors_behind(
    training: LocalTraining, before: UnitState, after: UnitState, stats: UnitStats
) -> dict[str, float]:
    """`before` is the state before the last step: dense, where that is the one that trains."""
    errors = dict.fromkeys(after, 0.0)
    if training_of(before) is not None:
        known = {**stats, **trained_stats(before)}
        for name, site in after.items():
            errors[name] = _relative_error(before[name], site, known.get(name))
    output = next(name for name, site in after.items() if site.training is not None)
    errors[output] += float(training.report.get("error", 0.0))
    return errors


def _relative_error(reference: SiteState, site: SiteState, stats: SiteStats | None) -> float:
    weight, after = reference.weight, site.on_plain_inputs()
    if weight.shape != after.shape:
        assert site.kept_columns is not None
        after = torch.zeros_like(weight)
        after[:, site.kept_columns] = site.on_plain_inputs()
    if stats is None or not stats.has_gram:
        return _relative_distance(weight, after)
    difference = weight - after
    gram, mean = stats.gram, stats.mean
    if reference.kept_columns is not None and weight.shape[1] != gram.shape[0]:
        kept = reference.kept_columns
        gram, mean = gram[kept][:, kept], mean[kept]
    error = output_error(difference, gram)
    if reference.bias is not None and site.bias is not None:
        shift = (reference.bias - site.bias).double()
        drift = difference.double() @ mean.double()
        error += float(stats.count * (shift @ shift + 2 * (shift @ drift)))
    key = ("energy", id(weight), weight._version)
    energy = derived(stats.gram, key, lambda: (weight, output_error(weight, gram)))[1]
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖² / ‖one‖², a thousand rows at a time: tables are large."""
    error = energy = 0.0
    for left, right in zip(torch.split(one, 1024), torch.split(other, 1024), strict=True):
        error += float((left - right).square().sum())
        energy += float(left.square().sum())
    return error / energy if energy > 0 else 0.0
