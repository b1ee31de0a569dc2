"""Discovery against the modules transformers builds, for every layout; and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from model_examples import EXAMPLES, Example
from torch import nn

from autocomp.core.errors import ModelError
from autocomp.models.conversion import as_transformers
from autocomp.models.discover import (
    Stored,
    find_units,
    rest_parameters,
    stored_tensors,
    tensor_keys,
)
from autocomp.models.layouts import LAYOUTS
from autocomp.models.sources import read_config, read_tensor_shapes


@pytest.fixture(params=sorted(LAYOUTS))
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


def _save(example: Example, path: Path, *, headless: bool) -> nn.Module:
    model = example.model()
    native = as_transformers(model)
    (getattr(native, LAYOUTS[example.model_type].prefix) if headless else native).save_pretrained(
        path
    )
    return model


def test_every_matrix_is_in_a_unit_or_its_absence_is_justified(example: Example) -> None:
    model = example.model()
    layout = LAYOUTS[example.model_type]
    matrices = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    covered = [site.name for unit in example.units() for site in unit.sites]
    assert len(covered) == len(set(covered))
    assert matrices - set(covered) == set(layout.dense_parts)
    assert set(covered) <= matrices
    assert all(layout.dense_parts.values())


def test_sites_have_the_shapes_of_the_modules(example: Example) -> None:
    model = example.model()
    units = example.units()
    for unit in units:
        for site in unit.sites:
            module = model.get_submodule(site.name)
            assert tuple(module.weight.shape) == (site.rows, site.columns), site.name
            assert (getattr(module, "bias", None) is not None) == site.bias, site.name
            assert isinstance(module, nn.Embedding) == site.table
        assert unit.parameters == sum(
            parameter.numel()
            for site in unit.sites
            for parameter in model.get_submodule(site.name).parameters()
        )


def test_units_come_in_model_order_with_their_dimensions(example: Example) -> None:
    units = example.units()
    names = [unit.name for unit in units]
    layers = [f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")]
    tables = ["embeddings"] if example.task != "image-classification" else []
    assert names == [*tables, *layers, "head"]
    config = example.full_config()
    attention, ffn = (unit for unit in units if unit.layer == 1)
    assert attention.heads == config.num_attention_heads
    assert attention.kv_heads == getattr(config, "num_key_value_heads", attention.heads)
    assert attention.heads * attention.head_dim == attention.site("output").columns
    assert ffn.width == ffn.site("down").columns
    assert [unit.name for unit in units if unit.skippable] == layers


@pytest.mark.parametrize("headless", [True, False])
def test_checkpoints_are_read_with_or_without_head(
    example: Example, headless: bool, tmp_path: Path
) -> None:
    _save(example, tmp_path, headless=headless)
    config, shapes = read_config(tmp_path), read_tensor_shapes(tmp_path)
    units = find_units(config, shapes, example.task, example.labels)
    assert units == example.units()
    for unit in units:
        keys = tensor_keys(config, unit, shapes)
        parameters = {
            f"{site.name}.{part}"
            for site in unit.sites
            for part in (("weight", "bias") if site.bias else ("weight",))
        }
        new_head = headless and unit.kind == "head" and unit.tied_to is None
        assert set(keys) == parameters if not new_head else set(keys) < parameters
        assert set(keys.values()) <= set(shapes)


@pytest.mark.parametrize("headless", [True, False])
def test_tensor_keys_name_the_right_tensors(
    example: Example, headless: bool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = _save(example, tmp_path, headless=headless)
    config, tensors = read_config(tmp_path), load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    for unit in example.units():
        for name, stored in stored_tensors(config, unit, read_tensor_shapes(tmp_path)).items():
            assert stored.read(tensors[stored.key]).equal(state[name]), (name, stored)


def test_fused_tensors_hold_several_sites(tmp_path: Path) -> None:
    """GPT-2's c_attn is (columns, query + key + value rows)."""
    example = EXAMPLES["gpt2"]
    _save(example, tmp_path, headless=True)
    config, shapes = read_config(tmp_path), read_tensor_shapes(tmp_path)
    attention, ffn = (unit for unit in example.units() if unit.layer == 1)
    site = "transformer.h.1.attn.c_attn"
    stored = stored_tensors(config, attention, shapes)
    assert stored[f"{site}.key.weight"] == Stored("h.1.attn.c_attn.weight", True, (24, 48))
    assert stored[f"{site}.value.bias"] == Stored("h.1.attn.c_attn.bias", False, (48, 72))
    up = stored_tensors(config, ffn, shapes)["transformer.h.1.mlp.c_fc.weight"]
    assert up == Stored("h.1.mlp.c_fc.weight", True)
    units = find_units(config, shapes, example.task)
    rest = rest_parameters(config, units, {**shapes, "h.1.attn.bias": (1, 1, 16, 16)})
    norms = [f"h.{i}.ln_{j}" for i in range(3) for j in (1, 2)]
    assert set(rest) == {
        f"{name}.{part}" for name in [*norms, "ln_f"] for part in ("weight", "bias")
    }
    wrong = {**shapes, "h.1.attn.c_attn.weight": (72, 24)}
    with pytest.raises(ModelError, match=r"c_attn\.weight is \(72, 24\).* says \(24, 72\)"):
        find_units(config, wrong, example.task)


def test_a_width_left_out_is_a_multiple_of_hidden() -> None:
    config = {"model_type": "gpt2", **EXAMPLES["gpt2"].config, "n_inner": None}
    assert find_units(config, {}, "language-modeling")[2].width == 96


def test_a_tied_head_is_the_table() -> None:
    example = EXAMPLES["llama"]
    config = example.full_config(tie_word_embeddings=True).to_dict()
    shapes = {"model.embed_tokens.weight": (50, 24)}
    head = example.units(tie_word_embeddings=True)[-1]
    assert tensor_keys(config, head, shapes) == {"lm_head.weight": "model.embed_tokens.weight"}
    untied = example.units(tie_word_embeddings=False)[-1]
    assert untied.tied_to is None
    assert tensor_keys(config, untied, shapes) == {}


def test_discovery_imports_no_torch(tmp_path: Path) -> None:
    _save(EXAMPLES["bert"], tmp_path, headless=True)
    script = (
        "import sys; from pathlib import Path\n"
        "from autocomp.models.sources import read_config, read_tensor_shapes, resolve_source\n"
        "from autocomp.models.discover import find_units\n"
        "path = resolve_source(sys.argv[1])\n"
        "config, shapes = read_config(path), read_tensor_shapes(path)\n"
        "units = find_units(config, shapes, 'text-classification', 3)\n"
        "print([u.name for u in units])\n"
        "assert not {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layers.2.ffn" in done.stdout


def test_labels_come_from_the_argument_then_the_config() -> None:
    example = EXAMPLES["bert"]
    config = example.full_config().to_dict()
    assert find_units(config, {}, example.task, 7)[-1].site("head").rows == 7
    assert find_units(config, {}, example.task)[-1].site("head").rows == 3
    config.pop("id2label")
    assert find_units(config, {}, example.task)[-1].site("head").rows == 2


def test_a_config_may_leave_defaults_out(tmp_path: Path) -> None:
    """Older config.json files hold less than `to_dict` does."""
    for example in EXAMPLES.values():
        config = {"model_type": example.model_type, **example.config}
        assert find_units(config, {}, example.task, example.labels) == example.units()
    config = dict(EXAMPLES["llama"].config, model_type="llama")
    del config["num_key_value_heads"], config["head_dim"]
    attention = find_units(config, {}, "language-modeling")[1]
    assert (attention.kv_heads, attention.head_dim) == (6, 4)


def test_unknown_layout_says_what_it_saw_and_how_to_add_it() -> None:
    shapes = {f"h.{i}.attn.c_attn.weight": (8, 24) for i in range(4)} | {"ln.weight": (8,)}
    with pytest.raises(ModelError) as error:
        find_units({"model_type": "lama"}, shapes, "language-modeling")
    message = str(error.value)
    assert "'lama'" in message
    assert "Did you mean 'llama'?" in message
    assert "h.{i}.attn.c_attn.weight 8×24 (4 times)" in message
    assert "ln.weight" not in message
    assert "autocomp/models/layouts/" in message
    assert (
        "Known: bert, deit, dinov2, distilbert, gpt2, llama, qwen2, qwen3, roberta, vit." in message
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder=True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, object], message: str) -> None:
    config = {"model_type": "bert", **EXAMPLES["bert"].config, **change}
    with pytest.raises(ModelError, match=message):
        find_units(config, {}, "text-classification")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert", {"position_embedding_type": "relative_key"}),
        ("roberta", {"add_cross_attention": True}),
        ("deit", {"architectures": ["DeiTForImageClassificationWithTeacher"]}),
        ("dinov2", {"use_swiglu_ffn": True}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
    ],
)
def test_what_a_layout_does_not_describe_is_refused(name: str, change: dict[str, object]) -> None:
    example = EXAMPLES[name]
    config = {"model_type": name, **example.config, **change}
    with pytest.raises(
        ModelError, match=rf"{name}.* does not describe models with {next(iter(change))}="
    ):
        find_units(config, {}, example.task)


def test_wrong_task_lists_the_right_ones() -> None:
    config = {"model_type": "bert", **EXAMPLES["bert"].config}
    with pytest.raises(ModelError, match="its tasks: text-classification"):
        find_units(config, {}, "image-classification")


def test_checkpoint_that_disagrees_is_refused(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    _save(example, tmp_path, headless=True)
    config, shapes = read_config(tmp_path), read_tensor_shapes(tmp_path)
    with pytest.raises(ModelError, match=r"intermediate\.dense\.weight is \(40, 24\).*\(48, 24\)"):
        find_units({**config, "intermediate_size": 48}, shapes, example.task, 3)
    renamed = {name.replace("intermediate", "inner"): s for name, s in shapes.items()}
    with pytest.raises(ModelError, match=r"no bert\..*intermediate.*recognised: .*inner\.dense"):
        find_units(config, renamed, example.task, 3)


def test_head_of_another_size_is_replaced_only_when_asked(tmp_path: Path) -> None:
    example = EXAMPLES["vit"]
    _save(example, tmp_path, headless=False)
    config, shapes = read_config(tmp_path), read_tensor_shapes(tmp_path)
    assert find_units(config, shapes, example.task, 9)[-1].site("head").rows == 9
    config["id2label"] = json.loads('{"0": "a"}')
    with pytest.raises(ModelError, match=r"classifier\.weight is \(3, 24\)"):
        find_units(config, shapes, example.task)
