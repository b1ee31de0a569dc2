"""Image classification: one label per image. Resized, cropped and normalised split by split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.core.errors import DataError, ModelError
from autocomp.core.hashing import content_key
from autocomp.models.sources import read_config
from autocomp.spec.schema import WorkloadSection
from autocomp.spec.task import TaskSection
from autocomp.tasks.base import Classification, LazySplits, tiled
from autocomp.tasks.data import Examples, align_labels, load_examples, pick
from autocomp.tasks.protocol import Array, Encoded, Split
from autocomp.tasks.splits import Indices

if TYPE_CHECKING:
    import torch

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbering, as processor files have it
_FIXED_SIZE = ("vit", "deit")  # their position embeddings are not interpolated
_BATCH = 256


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes `pixel_values`: shorter side to `size`, centre crop, normalise.

    `mean` and `std` are per RGB channel, of values in [0, 1]; the default is ImageNet's.
    """

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    mode: str = "bicubic"

    @classmethod
    def of_model(cls, model_path: Path, size: int | None) -> Preprocessing:
        """From the model's processor file; `size` overrides the configured image side.

        Raises:
            ModelError: if the processor file is no JSON.
        """
        path = model_path / "preprocessor_config.json"
        try:
            processor = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
        return cls(
            size=size or _side(processor) or int(read_config(model_path).get("image_size", 224)),
            mean=tuple(processor.get("image_mean") or cls.mean),
            std=tuple(processor.get("image_std") or cls.std),
            mode=_MODES.get(processor.get("resample", 3), "bicubic"),
        )

    def processor_json(self) -> dict[str, Any]:
        """The same as a transformers `preprocessor_config.json`."""
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": next(number for number, mode in _MODES.items() if mode == self.mode),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def apply(self, images: Array) -> Array:
        """uint8 `(N, H, W[, C])` of one size to float32 `(N, 3, size, size)`."""
        import torch
        from torch.nn import functional as F

        if images.ndim == 3:
            images = images[..., None]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        height, width = pixels.shape[2:]
        scale = self.size / min(height, width)
        if scale != 1:
            shape = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
            pixels = F.interpolate(pixels, shape, mode=self.mode, antialias=True)
        top, left = (pixels.shape[2] - self.size) // 2, (pixels.shape[3] - self.size) // 2
        pixels = pixels[:, :, top : top + self.size, left : left + self.size].clamp(0, 255)
        mean = torch.tensor(self.mean).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std).view(1, 3, 1, 1) * 255
        normalised: Array = ((pixels.expand(-1, 3, -1, -1) - mean) / std).contiguous().numpy()
        return normalised


def _side(processor: Mapping[str, Any]) -> int | None:
    """The image side a processor file ends with, if it says one."""
    for key in ("crop_size", "size"):
        size = processor.get(key)
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if isinstance(size, int):
            return size
    return None


def patches(model_path: Path, image: int | None) -> int:
    """Patches an image becomes, of the side `image` or the model's own."""
    side = Preprocessing.of_model(model_path, image).size
    return (side // _patch(read_config(model_path))) ** 2


def _patch(config: Mapping[str, Any]) -> int:
    return int(config.get("patch_size", 16))


class ImageClassification(Classification):
    """Images as `pixel_values` float32 `(N, 3, S, S)`, `S = workload.image`."""

    name = "image-classification"
    summary = "one label per image; accuracy"
    input_names = ("pixel_values",)
    dynamic_axes = {"pixel_values": {0: "batch"}}  # noqa: RUF012

    def __init__(
        self,
        examples: Examples,
        indices: Mapping[Split, Indices],
        preprocessing: Preprocessing,
        patch: int,
        batch: int,
    ) -> None:
        """`patch` is the side of the model's patches; tokens are counted by it."""
        names = examples.label_names
        self.preprocessing = preprocessing
        self._patch = patch
        self._raw = {
            name: (
                pick(examples.contents, chosen.tolist()),
                examples.labels[chosen],
                [examples.digests[i] for i in chosen],
            )
            for name, chosen in indices.items()
        }
        self._raw["transfer"] = self._raw["distil"]
        super().__init__(LazySplits(self._encode), names, len(names), batch)

    @classmethod
    def build(
        cls, section: TaskSection, workload: WorkloadSection, model_path: Path, seed: int = 0
    ) -> ImageClassification:
        """See `Task.build`."""
        examples = load_examples(section.data, "image")
        config = read_config(model_path)
        if section.teacher.fit == "none":
            examples = align_labels(examples, config.get("id2label"))
        indices = examples.split(section.data, seed)
        preprocessing = Preprocessing.of_model(model_path, workload.image)
        patch = _patch(config)
        fixed = config.get("image_size") if config.get("model_type") in _FIXED_SIZE else None
        if fixed is not None and fixed != preprocessing.size:
            raise DataError(
                f"target.workload.image: {preprocessing.size} pixels, but the model "
                f"({config['model_type']}) takes {fixed} and nothing else"
            )
        if preprocessing.size < patch:
            raise DataError(
                f"target.workload.image: {preprocessing.size} pixels are less than one patch of "
                f"the model ({patch}). Use a multiple of {patch}"
            )
        return cls(examples, indices, preprocessing, patch, workload.batch)

    def fingerprint(self, split: Split) -> str:
        """Of the stored images and the preprocessing: no image needs to be decoded for it."""
        _, labels, digests = self._raw[split]
        return content_key(
            [
                self.name,
                list(self.label_names),
                self.preprocessing.processor_json(),
                digests,
                labels.tolist(),
            ]
        )

    def processor_json(self) -> dict[str, Any]:
        """See `Task.processor_json`."""
        return self.preprocessing.processor_json()

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Patches, and one class token an image."""
        count, _, height, width = batch["pixel_values"].shape
        return count * ((height // self._patch) * (width // self._patch) + 1)

    def example_inputs(self, batch: int, sequence: int) -> dict[str, torch.Tensor]:
        """Calibration images `(batch, 3, S, S)`; `sequence` is ignored."""
        return {"pixel_values": tiled(self.splits["calibrate"].inputs["pixel_values"], batch)}

    def _encode(self, split: Split) -> Encoded:
        if split == "transfer":
            return self.splits["distil"]
        images, labels, _ = self._raw[split]
        size = self.preprocessing.size
        pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
        for start in range(0, len(images), _BATCH):
            part = [np.asarray(images[i]) for i in range(start, min(start + _BATCH, len(images)))]
            for shape in {image.shape for image in part}:
                same = [i for i, image in enumerate(part) if image.shape == shape]
                stacked = np.stack([part[i] for i in same])
                pixels[[start + i for i in same]] = self.preprocessing.apply(stacked)
        return Encoded({"pixel_values": pixels}, labels)
