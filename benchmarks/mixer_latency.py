"""What an attention sublayer costs with each mixer in it, at three lengths, on both runtimes.

One sublayer with its projections, lowered as a cost table lowers it, in the shapes of MiniLM (12
heads of 32, both ways), the small Llama (6 heads of 32 on 2 groups, causal) and DINOv2-small (6
heads of 64, patches), one thread, batch 1, float32. Latency does not depend on the values of
weights. All sublayers of a length take turns with the anchor, so their proportions hold.
"""

from __future__ import annotations

from typing import Any, ClassVar

RUNTIMES = ("onnxruntime", "openvino")
LENGTHS = (128, 512, 2048)
PIXELS = {128: 154, 512: 322, 2048: 630}
"""Sides of images that are nearly as many patches of 14 × 14: 122, 530 and 2,026 with the class."""
ROUNDS = {128: 60, 512: 30, 2048: 12}
SHAPES = ("minilm", "llama", "dinov2")
SOFTMAX = "softmax"


def run(options: Any) -> dict[str, float]:
    """`{shape}_{mixer}_{length}_{runtime}_ms`."""
    figures: dict[str, float] = {}
    for shape in SHAPES:
        for length in LENGTHS:
            for runtime in RUNTIMES:
                print(f"  {shape}, {length} tokens, {runtime}", flush=True)
                for mixer, latency_ms in _sublayers(shape, length, runtime).items():
                    figures[f"{shape}_{mixer}_{length}_{runtime}_ms"] = latency_ms
    return figures


def mixers(shape: str) -> list[str]:
    """Those that can stand in attention of this shape."""
    from autocomp.models.mixers import MIXERS
    from autocomp.models.seat import mixer_shape

    _, _, units = _model(shape, LENGTHS[0])
    attention = mixer_shape(_attention(units))
    return [name for name in MIXERS if MIXERS.get(name).refuses(attention) is None]


def _sublayers(shape: str, length: int, runtime: str) -> dict[str, float]:
    """Mixer, or `softmax` → reference milliseconds."""
    from autocomp.core.candidate import Option, Step
    from autocomp.core.unit import dense_format
    from autocomp.operators import option_formats
    from autocomp.spec.schema import TargetSection, WorkloadSection
    from autocomp.targets import make_target
    from autocomp.targets.profile_pieces import UnitPieces, cost_key

    model, inputs, units = _model(shape, length)
    workload = WorkloadSection(batch=1, sequence=length, image=inputs.image)
    target: Any = make_target(TargetSection(runtime=runtime, workload=workload))
    target.record_reference()
    unit = _attention(units)
    formats = {SOFTMAX: dense_format(unit)} | {
        name: option_formats(unit, Option((Step.of("replace", mixer=name),)))
        for name in mixers(shape)
    }
    skeleton = target.export(model, units, inputs)
    arrays = {name: tensor.numpy() for name, tensor in inputs.example_inputs(1, length).items()}
    pieces = UnitPieces(target, skeleton, [unit], {unit.name: formats}, arrays).lowered()
    timings = target.time_pieces(list(pieces.values()), rounds=ROUNDS[length])
    times = dict(zip(pieces, map(target.to_ms, timings), strict=True))
    return {name: times[cost_key(unit, one, target)] for name, one in formats.items()}


def _attention(units: Any) -> Any:
    return next(unit for unit in units if unit.kind == "attention")


class _Text:
    """What exporting asks of a task: ids, with a mask for an encoder."""

    image: ClassVar = None

    def __init__(self, *, mask: bool) -> None:
        self._names = ("input_ids", "attention_mask") if mask else ("input_ids",)
        self.dynamic_axes = {name: {0: "batch", 1: "sequence"} for name in self._names}

    def example_inputs(self, batch: int, sequence: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 1000, (batch, sequence), generator=generator)
        return dict(zip(self._names, (ids, torch.ones_like(ids)), strict=False))


class _Images:
    """One image of so many pixels a side."""

    dynamic_axes: ClassVar = {"pixel_values": {0: "batch"}}

    def __init__(self, image: int) -> None:
        self.image = image

    def example_inputs(self, batch: int, sequence: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        size = (batch, 3, self.image, self.image)
        return {"pixel_values": torch.randn(*size, generator=generator)}


def _model(shape: str, length: int) -> tuple[Any, Any, Any]:
    """A random model of one layer, what it reads, and its units."""
    import torch
    import transformers

    from autocomp.models.discover import find_units

    torch.manual_seed(0)
    inputs: Any = _Text(mask=shape == "minilm")
    if shape == "minilm":
        config = transformers.BertConfig(
            vocab_size=1000,
            hidden_size=384,
            num_hidden_layers=1,
            num_attention_heads=12,
            intermediate_size=1536,
            max_position_embeddings=max(LENGTHS),
        )
        model = transformers.BertForSequenceClassification(config)
        task = "text-classification"
    elif shape == "llama":
        config = transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=max(LENGTHS),
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
        task = "language-modeling"
    else:
        inputs = _Images(PIXELS[length])
        config = transformers.Dinov2Config(
            hidden_size=384,
            num_hidden_layers=1,
            num_attention_heads=6,
            image_size=PIXELS[length],
            patch_size=14,
        )
        model = transformers.Dinov2ForImageClassification(config)
        task = "image-classification"
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    labels = None if task == "language-modeling" else 2
    return model.eval(), inputs, tuple(find_units(config.to_dict(), shapes, task, labels))
