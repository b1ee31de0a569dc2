"""A unit's state as named tensors and plain data, which a file holds, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from autocomp.core.unit import SiteFormat
from autocomp.library.mixers import pack_mixer, unpack_mixer
from autocomp.library.training import pack_training, unpack_training
from autocomp.models.codes import dequantise
from autocomp.operators.protocol import SiteState, UnitState

_MIXER, _TRAINING = "mixer_state", "training"


def pack_state(state: UnitState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A quantised site is stored as codes and scales, from which its weight follows exactly.

    A sparse one as a bit per weight and, float, the weights that the mask lets be; what it was
    before sparsity is only needed while it is built. The ends of a static range are float32 values,
    so nothing of them is lost either. A mixer, and how attention was trained, are stored with the
    site whose input changed.
    """
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[str, Any] = {}
    for name, site in state.items():
        parts = {
            "bias": site.bias,
            "kept_columns": site.kept_columns,
            "input_scale": site.input_scale,
            "input_range": None if site.input_range is None else torch.tensor(site.input_range),
            "kept_rows": site.kept_rows,
            "row_of": site.row_of,
            "output_scale": site.output_scale,
        }
        if site.mask is not None:
            parts["bits"] = pack_mask(site.mask)
        if site.codes is None:
            parts["weight"] = site.weight if site.mask is None else site.weight[site.mask]
        else:
            parts |= {"codes": site.codes, "scales": site.scales}
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{name}|{part}"] = tensor.detach().contiguous()
        sites[name] = asdict(site.format)
        if site.mixer is not None:
            packed, sites[name][_MIXER] = pack_mixer(site.mixer)
            tensors |= {f"{name}|{part}": tensor for part, tensor in packed.items()}
        if site.training is not None:
            packed, sites[name][_TRAINING] = pack_training(site.training)
            tensors |= {f"{name}|{part}": tensor for part, tensor in packed.items()}
    return tensors, sites


def unpack_state(sites: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> UnitState:
    """Inverse of `pack_state`."""
    state: UnitState = {}
    for name, fields in sites.items():
        mixer, training = fields.get(_MIXER), fields.get(_TRAINING)
        beside = (_MIXER, _TRAINING)
        form = SiteFormat(**{part: value for part, value in fields.items() if part not in beside})
        codes, scales = tensors.get(f"{name}|codes"), tensors.get(f"{name}|scales")
        bits = tensors.get(f"{name}|bits")
        mask = None if bits is None else unpack_mask(bits, (form.rows, form.columns))
        if codes is None or scales is None:
            weight = tensors[f"{name}|weight"]
            if mask is not None:
                weight = torch.zeros(mask.shape).masked_scatter_(mask, weight)
        else:
            weight = dequantise(codes, scales, form)
        ends = tensors.get(f"{name}|input_range")
        state[name] = SiteState(
            weight=weight,
            bias=tensors.get(f"{name}|bias"),
            format=form,
            codes=codes,
            scales=scales,
            kept_columns=tensors.get(f"{name}|kept_columns"),
            input_scale=tensors.get(f"{name}|input_scale"),
            input_range=None if ends is None else (float(ends[0]), float(ends[1])),
            kept_rows=tensors.get(f"{name}|kept_rows"),
            row_of=tensors.get(f"{name}|row_of"),
            mask=mask,
            mixer=None if mixer is None else unpack_mixer(mixer, tensors, f"{name}|"),
            training=None if training is None else unpack_training(training, tensors, f"{name}|"),
            output_scale=tensors.get(f"{name}|output_scale"),
        )
    return state


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A bit per entry of a bool tensor, the first in the lowest: uint8 `(ceil(entries / 8),)`."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack_mask(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `pack_mask`, bool of this shape."""
    count = math.prod(shape)
    flat = np.unpackbits(bits.numpy(), count=count, bitorder="little")
    return torch.from_numpy(flat.view(np.bool_)).reshape(shape)
