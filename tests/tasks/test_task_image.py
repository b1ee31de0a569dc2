"""Image classification beyond its contract: preprocessing, lazy splits, tokens."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from autocomp.core.errors import DataError, ModelError
from autocomp.tasks import make_task
from autocomp.tasks.image_classification import Preprocessing

NPZ = {"image": "x_train", "label": "y_train"}


@pytest.fixture
def spec(image_npz, spec_of):
    return spec_of("image-classification", image_npz, workload={"image": 16}, **NPZ)


def test_pixels_are_resized_gray_repeated_and_normalised(spec, vit_path):
    task = make_task(spec, vit_path)
    pixels = task.splits["calibrate"].inputs["pixel_values"]
    assert pixels.shape == (20, 3, 16, 16)
    assert pixels.dtype == np.float32
    rgb = pixels * np.array([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    rgb = rgb + np.array([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(rgb[:, 0], rgb[:, 2], atol=1e-5)
    assert rgb.min() >= -1e-6
    assert rgb.max() <= 1 + 1e-6
    # label 0 is bright on top, label 1 below
    brighter = (rgb[:, 0, :8].mean(axis=(1, 2)) < rgb[:, 0, 8:].mean(axis=(1, 2))).astype(int)
    assert np.array_equal(brighter, task.splits["calibrate"].labels)


@pytest.mark.parametrize(("mode", "number"), [("bilinear", 2), ("bicubic", 3)])
@pytest.mark.parametrize(("side", "shape"), [(9, (20, 20)), (40, (20, 20)), (10, (20, 36))])
def test_resize_agrees_with_the_reference_processor(mode, number, side, shape):
    # away from 0 and 255: PIL clips overshoot between its two passes, we clip once
    image = np.random.default_rng(0).integers(80, 170, size=(*shape, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size=side, mode=mode)
    arguments = preprocessing.processor_json()
    assert arguments["resample"] == number
    assert arguments.pop("image_processor_type") == "BitImageProcessor"
    reference = BitImageProcessorPil(**arguments)(Image.fromarray(image), return_tensors="np")
    ours = preprocessing.apply(image[None])
    # one step of 8-bit rounding, in units of the standard deviation
    np.testing.assert_allclose(ours, reference["pixel_values"], atol=1.5 / 255 / 0.224)


def test_wide_images_are_cropped_in_the_centre():
    image = np.zeros((1, 8, 24), dtype=np.uint8)
    image[:, :, 8:16] = 255
    ours = Preprocessing(size=8, mean=(0.0,) * 3, std=(1.0,) * 3).apply(image)
    np.testing.assert_allclose(ours, np.ones((1, 3, 8, 8)), atol=1e-6)


def test_processor_file_of_the_model_is_used(spec, vit_path, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(vit_path, path)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = Preprocessing.of_model(path, None)
    assert found == Preprocessing(16, (0.5,) * 3, (0.25,) * 3, "bilinear")
    for sizes in (
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}},
        {"size": 18},
    ):
        (path / "preprocessor_config.json").write_text(json.dumps(processor | sizes))
        assert Preprocessing.of_model(path, None).size == 18
        assert Preprocessing.of_model(path, 24).size == 24
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert make_task(spec, path).fingerprint("search") != make_task(spec, vit_path).fingerprint(
        "search"
    )
    (path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        make_task(spec, path)


def test_splits_are_encoded_when_used_and_survive_pickling(spec, vit_path):
    task = make_task(spec, vit_path)
    key = task.fingerprint("report")
    assert not task.splits._encoded
    assert len(pickle.dumps(task)) < 60_000  # 120 raw images of 144 bytes, not 3 · 16 · 16 floats
    other = pickle.loads(pickle.dumps(task))
    assert other.fingerprint("report") == key
    for name in task.splits:
        assert np.array_equal(
            task.splits[name].inputs["pixel_values"], other.splits[name].inputs["pixel_values"]
        )


def test_tokens_count_patches_and_the_class_token(spec, vit_path):
    task = make_task(spec, vit_path)
    batch = next(task.batches("distil", 7, seed=0))
    assert task.tokens(batch) == 7 * (2 * 2 + 1)
    inputs = task.example_inputs(25, 99)
    assert inputs["pixel_values"].shape == (25, 3, 16, 16)
    assert torch.equal(inputs["pixel_values"][20], inputs["pixel_values"][0])


def test_an_image_the_model_cannot_take_is_refused(image_npz, spec_of, vit_path, tmp_path):
    spec = spec_of("image-classification", image_npz, workload={"image": 24}, **NPZ)
    with pytest.raises(DataError, match=r"24 pixels, but the model \(vit\) takes 16"):
        make_task(spec, vit_path)
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "dinov2", "patch_size": 14}))
    spec = spec_of("image-classification", image_npz, workload={"image": 4}, **NPZ)
    with pytest.raises(DataError, match=r"4 pixels are less than one patch of the model \(14\)"):
        make_task(spec, path)
