"""Every registered mixer on both runtimes, off its start: whole sequences, and token by token.

One tiny layer, and sequences of several chunks. A structure is exported once in a process, so the
second runtime pays for its own part alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mixer_examples import RUNTIMES, arrays, attention, in_pieces, target
from target_examples import ImageTask, TextTask, small_model
from torch import nn

from autocomp.models.mixers import MIXERS
from autocomp.models.seat import install_mixer, mixer_shape
from autocomp.models.surgery import copy_for_surgery

pytestmark = pytest.mark.timeout(900)  # a busy host; seconds a structure on an idle one

LONG = {"num_hidden_layers": 1, "max_position_embeddings": 160}
DECODE = {"prompt": 9, "generate": 12}
DECODER = small_model("llama", tie_word_embeddings=False, **LONG)
LAYOUTS = {
    "bert": small_model("bert", **LONG),
    "dinov2": small_model("dinov2", num_hidden_layers=1, image_size=72),
}
"""72 pixels are 9 × 9 patches, which no window of 8 × 8 divides."""


OF_PATCHES = ("convolution", "fourier", "pooling", "retention", "window2d")
"""Those that do with an image what they do with no text; of mixers that fade, one of three."""

LONG_EXPORTS = ("rwkv6",)
"""Mixers whose export takes half a minute."""


def _is_slow(layout: str, name: str) -> bool:
    return name in LONG_EXPORTS or (layout == "dinov2" and name not in OF_PATCHES)


def taking(layout: str, units: Any) -> list[Any]:
    """(layout, mixer) of the mixers that can stand there. See `_is_slow`."""
    shape = mixer_shape(attention(units, 0))
    return [
        pytest.param(
            layout,
            name,
            id=f"{layout}-{name}",
            marks=[pytest.mark.slow] if _is_slow(layout, name) else [],
        )
        for name in MIXERS.names()
        if MIXERS.get(name).refuses(shape) is None
    ]


SEATS = [seat for layout, (_, units, _) in LAYOUTS.items() for seat in taking(layout, units)]
DECODING = [seat.values[1] for seat in taking("llama", DECODER[1])]


def moved(model: nn.Module, units: Any, name: str) -> nn.Module:
    """The model with a mixer whose parameters have left their start."""
    student, unit = copy_for_surgery(model), attention(units, 0)
    mixer = MIXERS.get(name)(mixer_shape(unit))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    install_mixer(student, unit, mixer)
    return student.eval()


@pytest.fixture(scope="module")
def skeletons() -> dict[str, Any]:
    """Made when first asked for."""
    return {}


def skeleton_of(skeletons: dict[str, Any], layout: str) -> Any:
    if layout not in skeletons:
        if layout == "llama":
            DECODER[0].config.use_cache = False
            made = target("onnxruntime", **DECODE).export(*DECODER[:2], TextTask(masked=False))
        else:
            model, units, task = LAYOUTS[layout]
            if isinstance(task, ImageTask):
                task = replace(task, side=72)
            made = target("onnxruntime").export(model, units, task)
        skeletons[layout] = made
    return skeletons[layout]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("layout", "name"), SEATS)
def test_lowered_equals_torch(skeletons, layout, name, runtime, tmp_path):
    """Two batches of texts with padding, beyond two chunks of 64 and within one; images."""
    model, units, task = LAYOUTS[layout]
    student, the = moved(model, units, name), target(runtime)
    if isinstance(task, ImageTask):
        task = replace(task, side=72)
    artifact = the.write(the.lower(skeleton_of(skeletons, layout), student, units), tmp_path)
    for shape in ((3, 150), (2, 7)) if layout == "bert" else ((2, 0),):
        inputs = task.example_inputs(*shape)
        spread = float(student(**inputs).logits.detach().std())
        assert the.verify(artifact, student, arrays(task, *shape)) < 1e-4 * max(1.0, spread)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG_EXPORTS else []) for n in DECODING],
)
def test_token_by_token_equals_the_whole(skeletons, name, runtime, tmp_path):
    """A prompt beyond two chunks, single tokens, a piece again; each piece from the state left."""
    model, units, _ = DECODER
    student, the = moved(model, units, name), target(runtime, **DECODE)
    artifact = the.write(the.lower(skeleton_of(skeletons, "llama"), student, units), tmp_path)
    session = the.open(artifact.path)
    ids = TextTask(masked=False).example_inputs(2, 150)["input_ids"]
    with torch.no_grad():
        whole = student(input_ids=ids).logits.numpy()
    found = in_pieces(session, ids.numpy(), [70, 71, 72, 138, 139])
    assert np.abs(found - whole).max() < 1e-4 * max(1.0, whole.std())
    assert np.abs(whole[:, 70:] - whole[:, 69:-1]).max() > 0.1


def test_every_mixer_is_here():
    """What is added to the registry is lowered here as well."""
    ours = {name for name in MIXERS if MIXERS.get(name).__module__.startswith("autocomp.")}
    assert {seat.values[1] for seat in SEATS} == ours
    assert set(DECODING) == ours - {"fourier", "window2d"}
