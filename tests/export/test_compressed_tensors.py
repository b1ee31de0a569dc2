"""compressed-tensors: packed codes that its own package unpacks, served by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Finished, finished, quantise_unit, share
from reduced import group_heads, keep_heads, keep_width
from safetensors.torch import load_file
from torch import nn

from autocomp.core.errors import UserError
from autocomp.core.unit import Unit
from autocomp.export.compressed_tensors import CompressedTensorsExporter, compress, pack
from autocomp.export.reloaded import float_copy
from autocomp.export.structure import fill_up
from autocomp.library.student import unit_state
from autocomp.models.modules import QuantLinear
from autocomp.models.surgery import install, skip
from autocomp.targets.protocol import Target

TARGET: Target = object()  # type: ignore[assignment]
MISSING = "the extra compressed-tensors is not installed"
Units = dict[str, Unit]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 8}
SHAPE = {**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}


def mixed(model: nn.Module, units: Units) -> None:
    """Every scheme there is, ragged shapes, scaled inputs, a skipped layer and half of another."""
    keep_heads(model, units["layers.0.attention"], group_heads(units["layers.0.attention"], [3]))
    keep_width(model, units["layers.0.ffn"], range(40))
    for name in ("layers.1.attention", "layers.1.ffn", "layers.2.ffn"):
        skip(model, units[name])
    torch.manual_seed(0)
    norm, inner = torch.rand(64) + 0.5, torch.rand(40) + 0.5
    heads = (torch.rand(1, 16) + 0.5).repeat(2, 1).flatten()  # both heads of the group alike
    scaled = dict.fromkeys(("q_proj", "k_proj", "v_proj"), norm) | {"o_proj": heads}
    quantise_unit(model, units["layers.0.attention"], 8, activations=8, scaled=scaled)
    scaled = {"gate_proj": norm, "up_proj": norm, "down_proj": inner}
    quantise_unit(model, units["layers.0.ffn"], 4, 32, scaled=scaled)
    unit = units["layers.2.attention"]
    quantise_unit(model, unit, 8, activations=8, ranges=(-3.0, 5.0))
    quantise_unit(model, units["embeddings"], 8)


def float_logits(trial: Finished) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = float_copy(trial.student)(**trial.example.inputs()).logits
    return logits


def unpacked(tensors: dict[str, torch.Tensor], place: str, bits: int) -> torch.Tensor:
    """By the definition: code i of a row is `bits` bits at bit i · bits of its words."""
    rows, columns = tensors[f"{place}.weight_shape"].tolist()
    words = tensors[f"{place}.weight_packed"].to(torch.int64) & 0xFFFFFFFF
    index = torch.arange(columns) * bits
    values = (words[:, index // 32] >> (index % 32)) & ((1 << bits) - 1)
    codes = (values - (1 << (bits - 1))).float()
    scales = tensors[f"{place}.weight_scale"]
    return codes.view(rows, scales.shape[1], -1).mul(scales[..., None]).view(rows, columns)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 5])
def test_packing_is_that_of_the_package(bits: int, columns: int) -> None:
    package = pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert package is not None
    torch.manual_seed(0)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (3, columns), dtype=torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


def test_tensors_of_each_scheme(tmp_path: Path) -> None:
    trial = finished(tmp_path, "llama", mixed, **SHAPE)
    structure, schemes, tensors = compress(trial.student, trial.units)
    # 40 channels become 64: a multiple of the group
    assert (structure.config.num_hidden_layers, structure.config.intermediate_size) == (2, 64)
    assert schemes["model.layers.0.mlp.up_proj"].format == "pack-quantized"
    assert schemes["model.layers.1.self_attn.q_proj"].activations == "static"  # was layer 2
    down = trial.student.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, QuantLinear)
    found = unpacked(tensors, "model.layers.0.mlp.down_proj", 4)
    assert torch.equal(found, fill_up(down.dequantised(), (64, 64)))
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert query.dtype == torch.int8
    # -3 … 5 on 255 steps: zero is step 96 of 0 … 255
    assert tensors["model.layers.1.self_attn.q_proj.input_zero_point"].tolist() == [96 - 128]
    scale = tensors["model.layers.1.self_attn.q_proj.input_scale"]
    torch.testing.assert_close(scale, torch.tensor([8 / 255]))
    assert "model.layers.1.mlp.up_proj.weight" in tensors  # skipped: dense zeros


@pytest.mark.parametrize(("kept", "groups"), [((1, 1, 1), 1), ((1, 2, 1), 2), ((1, 4, 4), 4)])
def test_shared_keys_are_repeated_where_other_layers_share_less(
    kept: tuple[int, ...], groups: int, tmp_path: Path
) -> None:
    def edit(model: nn.Module, units: Units) -> None:
        for layer, keep in enumerate(kept):
            share(model, units[f"layers.{layer}.attention"], keep)
            quantise_unit(model, units[f"layers.{layer}.attention"], 8)

    trial = finished(tmp_path, "llama", edit, **SHAPE)
    structure, _, tensors = compress(trial.student, trial.units)
    assert structure.config.num_key_value_heads == groups
    for layer, keep in enumerate(kept):
        place = f"model.layers.{layer}.self_attn.v_proj"
        value = trial.student.get_submodule(place)
        assert isinstance(value, QuantLinear)
        heads = value.dequantised().view(keep, -1, 64)
        expected = heads.repeat_interleave(groups // keep, dim=0).view(-1, 64)
        assert torch.equal(unpacked(tensors, place, 8), expected)
    assert bool(structure.notes) == (len(set(kept)) > 1)


def test_written_and_reloaded_in_a_clean_process(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason=MISSING)
    trial = finished(tmp_path, "llama", mixed, **SHAPE)
    out, exporter = tmp_path / "out", CompressedTensorsExporter()
    exporter.write(trial.request, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 3
    assert set(config["ignore"]) == {
        "lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))
    }  # fmt: skip
    verified = exporter.verify(trial.request, out, TARGET)
    assert 0 < verified.max_difference < 1e-3 * float(float_logits(trial).abs().max())
    assert "range per token" in (out / "README.md").read_text()
    assert "lm_head.weight" in load_file(out / "model.safetensors")  # the table was rounded


def whole(bits: int, *args: Any, **options: Any) -> Any:
    def edit(model: nn.Module, units: Units) -> None:
        for unit in units.values():
            if unit.layer is not None:
                quantise_unit(model, unit, bits, *args, **options)

    return edit


def one_site(model: nn.Module, units: Units) -> None:
    unit = units["layers.0.attention"]
    dense = unit_state(model, unit)
    quantise_unit(model, unit, 8)
    state = unit_state(model, unit)
    name = unit.sites[1].name
    install(model, unit, {**state, name: dense[name]})


def unlike(model: nn.Module, units: Units) -> None:
    """Two heads that share a value, scaled differently."""
    unit = units["layers.0.attention"]
    quantise_unit(model, unit, 8, scaled={"o_proj": torch.linspace(0.5, 2, 128)})


def untouched(model: nn.Module, units: Units) -> None:
    keep_width(model, units["layers.0.ffn"], range(40))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (whole(3), r"layers\.0\.attention: model\S*q_proj has 3-bit weights"),
        (whole(4, 16), r"layers\.0\.attention: .*groups of 16 columns \(allowed: 32, 64, 128"),
        (whole(4, activations=8), r"8-bit activations without 8-bit weights per row"),
        (whole(4, 128), r"layers\.0\.attention: \S*q_proj: 64 columns are no multiple of the gr"),
        (one_site, r"layers\.0\.attention: query, key, value are rounded in different ways"),
        (unlike, r"layers\.0\.attention: heads that share a value scale it differently"),
        (untouched, r"no linear layer of this trial is quantised\. Use --format huggingface"),
    ],
)
def test_what_cannot_be_expressed_is_refused(edit: Any, says: str, tmp_path: Path) -> None:
    trial = finished(tmp_path, "llama", edit, **SHAPE)
    with pytest.raises(UserError, match=says) as caught:
        compress(trial.student, trial.units)
    assert "--format" in str(caught.value)


def test_models_it_is_not_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = finished(tmp_path / "bert", "bert", untouched)
    with pytest.raises(UserError, match="text-classification, and this format is for decoders"):
        CompressedTensorsExporter().write(bert.request, tmp_path / "out")
    gpt2 = finished(tmp_path / "gpt2", "gpt2", untouched)
    with pytest.raises(UserError, match="gpt2 has Conv1D layers"):
        compress(gpt2.student, gpt2.units)
    monkeypatch.setattr("autocomp.export.compressed_tensors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'autocomp\[compressed-tensors\]'"):
        CompressedTensorsExporter().write(gpt2.request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_only_files_are_small(tmp_path: Path) -> None:
    trial = finished(tmp_path, "llama", whole(4, 32), **SHAPE)
    _, schemes, tensors = compress(trial.student, trial.units)
    for place in schemes:
        rows, columns = tensors[f"{place}.weight_shape"].tolist()
        own = [tensor for name, tensor in tensors.items() if name.startswith(f"{place}.")]
        assert sum(t.nbytes for t in own) == rows * columns // 2 + rows * columns // 32 * 4 + 16
