"""Directories of float weights: stock transformers computes what the trial's weights say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import EXAMPLES, Finished, finished, quantise_unit, share
from reduced import group_heads, keep_heads, keep_width
from safetensors.torch import load_file, save_file
from torch import nn

from autocomp.core.candidate import Candidate, Option, Step
from autocomp.core.errors import InternalError, StudyError, UserError
from autocomp.core.unit import Unit
from autocomp.export.huggingface import HuggingFaceExporter
from autocomp.export.reloaded import float_copy, reloaded_logits
from autocomp.export.structure import load_weights, stock_structure
from autocomp.library.student import load_student, unit_state
from autocomp.models.conversion import to_linear
from autocomp.models.load import quiet, task_class
from autocomp.models.surgery import install, skip
from autocomp.operators.protocol import SiteState
from autocomp.targets.protocol import Target

TARGET: Target = object()  # type: ignore[assignment]  # asked only where the vocabulary is pruned
Units = dict[str, Unit]


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**inputs).logits
    return output


def layers(units: Units, kind: str) -> list[Unit]:
    return [unit for unit in units.values() if unit.kind == kind]


def heads(model: nn.Module, unit: Unit, groups: list[int]) -> None:
    keep_heads(model, unit, group_heads(unit, groups))


def uniform(model: nn.Module, units: Units) -> None:
    """Two groups of heads and 21 channels everywhere, other ones in each layer."""
    for index, unit in enumerate(layers(units, "attention")):
        heads(model, unit, [[0, 1], [0, 2], [1, 2]][index])
    for index, unit in enumerate(layers(units, "ffn")):
        keep_width(model, unit, range(index, index + 21))


def ragged(model: nn.Module, units: Units) -> None:
    """Layers of different widths, sublayers that are not there, some weights in few bits."""
    attention, ffn = layers(units, "attention"), layers(units, "ffn")
    heads(model, attention[0], [2, 0])
    skip(model, attention[1])
    heads(model, attention[2], [1])
    keep_width(model, ffn[0], range(3, 20))
    keep_width(model, ffn[1], range(30))
    skip(model, ffn[2])
    quantise_unit(model, attention[0], 8, activations=8)
    quantise_unit(model, ffn[0], 4, 16)


def bits(model: nn.Module, units: Units) -> None:
    """A skipped layer; everything else in 8 or 4 bits, the table too."""
    skip(model, layers(units, "attention")[1])
    skip(model, layers(units, "ffn")[1])
    for unit in units.values():
        if unit.layer != 1:
            quantise_unit(model, unit, 8 if unit.kind != "ffn" else 4, None)


def shared(model: nn.Module, units: Units) -> None:
    """Keys and values shared by all heads in a layer, and fewer heads in the next."""
    attention = layers(units, "attention")
    share(model, attention[0], 1)
    heads(model, attention[1], [2, 0])
    quantise_unit(model, attention[0], 8, None)


EDITS = {"uniform": uniform, "ragged": ragged, "bits": bits, "shared": shared}


def stock(trial: Finished) -> tuple[Any, nn.Module]:
    """The structure, and a model of its config with the weights: `from_config` and nothing else."""
    structure = stock_structure(trial.student, trial.units, trial.example.task, "huggingface")
    model = type(structure.model)(structure.config).eval()
    to_linear(model)
    model.load_state_dict(load_weights(structure, trial.student).state_dict())
    return structure, model


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("model_type", EXAMPLES)
def test_every_layout_is_the_same_function(model_type: str, edit: str, tmp_path: Path) -> None:
    trial = finished(tmp_path, model_type, EDITS[edit])
    _, model = stock(trial)
    inputs = trial.example.inputs()
    expected = logits(float_copy(trial.student), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert (logits(trial.teacher, inputs) - expected).abs().max() > 0.1


def test_uniform_pruning_adds_no_zeros_where_the_config_can_say_it(tmp_path: Path) -> None:
    trial = finished(tmp_path, "llama", uniform)
    structure, _ = stock(trial)
    config = structure.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.head_dim, config.intermediate_size, config.hidden_size) == (8, 21, 24)
    assert structure.notes == ()


def shared_alike(model: nn.Module, units: Units) -> None:
    """One head of keys and values everywhere."""
    for unit in layers(units, "attention"):
        share(model, unit, 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_what_all_layers_share_is_said_in_the_config(model_type: str, tmp_path: Path) -> None:
    trial = finished(tmp_path, model_type, shared_alike)
    structure, model = stock(trial)
    config = structure.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 1)
    assert structure.notes == ()
    inputs = trial.example.inputs()
    expected = logits(trial.student, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_where_a_config_cannot_say_it_keys_are_repeated(tmp_path: Path) -> None:
    """BERT has a key for every query; layers of Llama share alike or not at all."""
    bert, _ = stock(finished(tmp_path / "bert", "bert", shared_alike))
    assert bert.notes == (
        f"{3 * 2 * 3 * 6 * 24:,} weights repeat keys and values that more heads share in the trial "
        f"than in this format: they take bytes and time, and change no output.",
    )
    llama, _ = stock(finished(tmp_path / "llama", "llama", shared))
    config = llama.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 3)
    assert any(f"{2 * 2 * 8 * 24:,} weights repeat" in note for note in llama.notes)


def test_bert_cannot_state_a_head_width(tmp_path: Path) -> None:
    structure, _ = stock(finished(tmp_path, "bert", uniform))
    assert structure.config.num_attention_heads == 4
    assert structure.config.intermediate_size == 21
    # 3 layers × 4 matrices × 2 heads of 6 × 24
    assert structure.notes[0].startswith("3,456 of ")


@pytest.mark.parametrize(("model_type", "remaining"), [("llama", 2), ("vit", 2), ("bert", 3)])
def test_a_skipped_layer_goes_where_its_norms_go(
    model_type: str, remaining: int, tmp_path: Path
) -> None:
    structure, _ = stock(finished(tmp_path, model_type, bits))
    assert structure.config.num_hidden_layers == remaining


def reloaded(directory: Path, task: str) -> nn.Module:
    """Loaded here, where importing transformers is paid for already."""
    with quiet():
        model: nn.Module = task_class(task).from_pretrained(directory)
    return model


def test_the_card_says_what_the_format_does_not(tmp_path: Path) -> None:
    trial = finished(tmp_path, "bert", ragged)
    out = tmp_path / "out"
    HuggingFaceExporter().write(trial.request, out)
    card = (out / "README.md").read_text()
    assert "those of float weights" in card
    assert "rounds activations" in card
    compile(card.partition("```python\n")[2].partition("```")[0], "card", "exec")
    assert json.loads((out / "config.json").read_text())["id2label"]["1"] == "label1"


@pytest.mark.parametrize(("model_type", "edit"), [("vit", "bits"), ("gpt2", "ragged")])
def test_files_under_other_names_load_too(model_type: str, edit: str, tmp_path: Path) -> None:
    trial = finished(tmp_path, model_type, EDITS[edit])
    HuggingFaceExporter().write(trial.request, tmp_path / "out")
    model, inputs = reloaded(tmp_path / "out", trial.example.task), trial.example.inputs()
    expected = logits(float_copy(trial.student), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_an_export_that_computes_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = finished(tmp_path, "bert", uniform)
    out = tmp_path / "out"
    HuggingFaceExporter().write(trial.request, out)
    tensors = load_file(out / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})

    def here(directory: Path, task: str, inputs: dict[str, Any]) -> dict[str, Any]:
        feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return {"logits": logits(reloaded(directory, task), feeds).numpy()}

    monkeypatch.setattr("autocomp.export.reloaded.reloaded_logits", here)
    with pytest.raises(InternalError, match=r"logits differ .* by 1"):
        HuggingFaceExporter().verify(trial.request, out, TARGET)
    tensors["classifier.bias"] = tensors["classifier.bias"] - 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert HuggingFaceExporter().verify(trial.request, out, TARGET).max_difference < 1e-3


def test_what_does_not_load_is_found(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="cannot be reloaded by transformers: "):
        reloaded_logits(tmp_path, "text-classification", {})


def test_tied_embeddings_stay_tied_or_are_two(tmp_path: Path) -> None:
    tied = finished(tmp_path / "tied", "llama", uniform, tie_word_embeddings=True)
    HuggingFaceExporter().write(tied.request, tmp_path / "one")
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")
    untied = finished(tmp_path / "untied", "llama", bits, tie_word_embeddings=True)
    HuggingFaceExporter().write(untied.request, tmp_path / "two")
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(tensors)
    for trial, out in ((tied, "one"), (untied, "two")):
        model, inputs = reloaded(tmp_path / out, trial.example.task), trial.example.inputs()
        expected = logits(float_copy(trial.student), inputs)
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_pruned_vocabulary(tmp_path: Path) -> None:
    kept = torch.arange(0, 50, 2)

    def prune(model: nn.Module, units: Units) -> None:
        unit = units["embeddings"]
        state = unit_state(model, unit)
        site = unit.site("embedding")
        assert site is not None
        here = state[site.name]
        row_of = torch.zeros(50, dtype=torch.int64)
        row_of[kept] = torch.arange(25)
        state[site.name] = SiteState(
            here.weight[kept], None, replace(here.format, rows=25), kept_rows=kept, row_of=row_of
        )
        install(model, unit, state)

    trial = finished(tmp_path, "bert", prune)
    structure, model = stock(trial)
    assert structure.vocabulary is not None
    assert (structure.config.vocab_size, structure.config.pad_token_id) == (25, 0)
    ids = kept[torch.tensor([[1, 4, 7], [3, 3, 9]])]
    expected = logits(trial.student, {"input_ids": ids})
    torch.testing.assert_close(logits(model, {"input_ids": ids // 2}), expected)
    with pytest.raises(UserError, match=r"embeddings: positions depend on pad_token_id"):
        stock(finished(tmp_path / "roberta", "roberta", prune))


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    def low_rank(model: nn.Module, units: Units) -> None:
        unit = units["layers.1.ffn"]
        state = unit_state(model, unit)
        name = unit.sites[0].name
        site = state.pop(name)
        rows, columns = site.weight.shape
        first = replace(site.format, rows=3, bias=False)
        second = replace(site.format, columns=3)
        state[f"{name}.first"] = SiteState(torch.ones(3, columns), None, first)
        state[f"{name}.second"] = SiteState(torch.ones(rows, 3), site.bias, second)
        install(model, unit, state)

    trial = finished(tmp_path, "bert", low_rank)
    with pytest.raises(UserError, match=r"layers\.1\.ffn: .*low rank.* Leave out --format"):
        HuggingFaceExporter().write(trial.request, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def rounded_cache(model: nn.Module, units: Units) -> None:
        unit = units["layers.1.attention"]
        state = unit_state(model, unit)
        for site in unit.sites:
            if site.role in ("key", "value"):
                here = state[site.name]
                here.output_scale = torch.full((site.rows,), 0.03)
                here.format = replace(here.format, cache_bits=8)
        install(model, unit, state)

    cached = finished(tmp_path / "cached", "llama", rounded_cache)
    with pytest.raises(UserError, match=r"layers\.1\.attention: .*cached in 8 bits"):
        HuggingFaceExporter().write(cached.request, tmp_path / "out")
    assert cached.request.student is not None
    again, _ = load_student(cached.request.student)  # it is stored all the same
    inputs = cached.example.inputs()
    assert torch.equal(logits(again, inputs), logits(cached.student, inputs))
    merging = Candidate.of({"layers.0.attention": Option((Step.of("tome", ratio=0.1),))})
    record = replace(trial.request.record, candidate=merging)
    reason = HuggingFaceExporter().supports(record)
    assert reason is not None
    assert reason.startswith("layers.0.attention: tome ratio=0.1 merges or drops tokens")


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_the_student_is_stored_bit_by_bit(model_type: str, tmp_path: Path) -> None:
    trial = finished(tmp_path, model_type, ragged)
    assert trial.request.student is not None
    again, units = load_student(trial.request.student)
    assert units == trial.units
    inputs = trial.example.inputs()
    assert torch.equal(logits(again, inputs), logits(trial.student, inputs))
    stored = load_file(trial.request.student)
    tables = [f"|{s.name}." for unit in units if unit.kind == "embedding" for s in unit.sites]
    assert not any(name.startswith(table) for table in tables for name in stored)


def test_a_trial_without_weights_or_teacher_says_so(tmp_path: Path) -> None:
    trial = finished(tmp_path, "bert", uniform)
    assert trial.request.student is not None
    gone = replace(trial.request, student=tmp_path / "nothing.safetensors")
    with pytest.raises(StudyError, match="no stored weights"):
        HuggingFaceExporter().write(gone, tmp_path / "out")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(StudyError, match="has changed"):
        HuggingFaceExporter().write(trial.request, tmp_path / "out")
    trial.request.student.write_bytes(b"no safetensors")
    with pytest.raises(StudyError, match="damaged"):
        load_student(trial.request.student)
