"""Streamed statistics against plain hooks on a full forward pass, for every layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_examples import EXAMPLES, Example, logits
from torch import nn

from autocomp.calibrate.stats import Need, SiteStats, UnitStats, holds, load_stats, save_stats
from autocomp.calibrate.stream import calibrate, fingerprint
from autocomp.core.errors import InternalError, ModelError, StorageError
from autocomp.core.unit import Unit


@pytest.fixture(params=list(EXAMPLES))
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


def cut(inputs: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    count = len(next(iter(inputs.values())))
    return [
        {name: value[start : start + size] for name, value in inputs.items()}
        for start in range(0, count, size)
    ]


def collect(
    model: nn.Module, units: list[Unit], batches: list[Any], directory: Path, **options: Any
) -> dict[str, UnitStats]:
    files: dict[str, Path] = {}
    for _, found in calibrate(model, units, batches, directory, **options):
        files |= found
    return {name: load_stats(path) for name, path in files.items()}


def hooked(
    model: nn.Module, units: list[Unit], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Site → its inputs at real tokens `(N, columns)`, float64, from one full forward pass."""
    seen: dict[str, torch.Tensor] = {}
    mask = inputs.get("attention_mask")

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            keep = mask is not None and x.ndim == 3
            seen[name] = (x[mask.bool()] if keep else x.flatten(0, -2)).double()

        return hook

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(watch(site.name))
        for unit in units
        if unit.kind != "embedding"
        for site in unit.sites
    ]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def assert_equals_hooked(
    stats: dict[str, UnitStats], seen: dict[str, torch.Tensor], units: list[Unit]
) -> None:
    for unit in units:
        if unit.kind == "embedding":
            assert unit.name not in stats
            continue
        for site in unit.sites:
            x, found = seen[site.name], stats[unit.name][site.name]
            assert found.count == len(x), site.name
            gram = x.t() @ x
            scale = float(gram.abs().max())
            torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-5 * scale)
            torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_equals_hooks_on_a_full_pass_whatever_the_batch(
    example: Example, size: int, tmp_path: Path
) -> None:
    model, units, inputs = example.model(), example.units(), example.inputs(batch=6)
    stats = collect(model, units, cut(inputs, size), tmp_path)
    assert_equals_hooked(stats, hooked(model, units, inputs), units)


def test_trimmed_batches_give_the_same(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, units, inputs = example.model(), example.units(), example.inputs(batch=3)
    trimmed = []
    for batch in cut(inputs, 1):
        length = int(batch["attention_mask"].sum())
        trimmed.append({name: value[:, :length] for name, value in batch.items()})
    stats = collect(model, units, trimmed, tmp_path)
    assert_equals_hooked(stats, hooked(model, units, inputs), units)
    assert fingerprint(trimmed) == fingerprint([inputs])


def test_sites_with_one_input_share_one_gram(example: Example, tmp_path: Path) -> None:
    units = example.units()
    stats = collect(example.model(), units, [example.inputs()], tmp_path)
    unit = next(unit for unit in units if unit.kind == "attention")
    by_role = {site.role: stats[unit.name][site.name].gram for site in unit.sites}
    assert by_role["query"] is by_role["key"] is by_role["value"]
    assert by_role["output"] is not by_role["query"]


def test_leaves_the_model_and_the_disk_as_they_were(example: Example, tmp_path: Path) -> None:
    model, units, inputs = example.model(), example.units(), example.inputs()
    model.config.use_cache = True
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, units, [inputs], tmp_path)
    assert model.training
    assert model.config.use_cache is True
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks
    assert all("forward" not in vars(module) for module in model.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{unit.name}.safetensors" for unit in units if unit.kind != "embedding"
    )


def test_yields_block_by_block_and_reports_progress(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, units, calls = example.model(), example.units(), []
    stream = calibrate(
        model,
        units,
        [example.inputs()],
        tmp_path,
        progress=lambda done, total: calls.append((done, total)),
    )
    index, files = next(stream)
    assert index == 0
    assert sorted(files) == ["layers.0.attention", "layers.0.ffn"]
    assert not (tmp_path / "layers.1.ffn.safetensors").exists()
    rest = dict(stream)
    assert sorted(rest) == [1, 2, 3]
    assert list(rest[3]) == ["head"]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_block_of_activations_is_on_disk_at_a_time(tmp_path: Path) -> None:
    example = EXAMPLES["llama"]
    batches = cut(example.inputs(batch=6), 2)
    sizes = []
    for _ in calibrate(example.model(), example.units(), batches, tmp_path):
        spilled = list(tmp_path.glob(".spill.*/*"))
        sizes.append(sum(path.stat().st_size for path in spilled))
        assert len(spilled) == len(batches)
    floats = 6 * 7 * example.config["hidden_size"] * 4
    assert all(floats <= size < floats + 1000 for size in sizes)


def test_a_second_run_does_not_run_the_model(tmp_path: Path) -> None:
    example = EXAMPLES["vit"]
    units = example.units()
    first = dict(calibrate(example.model(), units, [example.inputs()], tmp_path))

    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = example.model()
            self.config = self.inner.config

        def get_submodule(self, target: str) -> nn.Module:
            return self.inner.get_submodule(target)

        def forward(self, **inputs: Any) -> None:
            raise AssertionError("the model ran")

    again = dict(calibrate(Refuses(), units, [example.inputs()], tmp_path))
    assert again == first
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(AssertionError, match="the model ran"):
        dict(calibrate(Refuses(), units, [example.inputs()], tmp_path))


NEEDS: dict[str, set[Need]] = {
    "layers.0.attention": {"gram"},
    "layers.1.attention": {"range"},
    "layers.1.ffn": {"gram", "range"},
}


def test_only_what_is_needed_is_gathered(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, units, inputs = example.model(), example.units(), example.inputs()
    everything = collect(model, units, [inputs], tmp_path / "all")
    found = collect(model, units, [inputs], tmp_path / "some", needs=NEEDS)
    assert set(found) == set(NEEDS)
    for unit, needs in NEEDS.items():
        for name, site in found[unit].items():
            whole = everything[unit][name]
            assert site.count == whole.count > 0
            assert site.has_gram == ("gram" in needs)
            if "gram" in needs:
                torch.testing.assert_close(site.gram, whole.gram, rtol=0, atol=0)
                torch.testing.assert_close(site.mean, whole.mean, rtol=0, atol=0)
            else:
                assert site.mean.numel() == 0
            for part in ("low", "high", "sample"):
                one, other = getattr(site, part), getattr(whole, part)
                assert (one is not None) == ("range" in needs)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=0, atol=0)
    shared = found["layers.1.attention"]
    (key,) = [name for name in shared if name.endswith("key")]
    (query,) = [name for name in shared if name.endswith("query")]
    assert shared[key].gram is shared[query].gram, "sites of one input still share"


def test_where_nothing_is_needed_nothing_runs(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, calls = example.model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = calibrate(model, example.units(), [example.inputs()], tmp_path, needs={"head": set()})
    assert [files for _, files in stream] == [{}, {}, {}, {}]
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_less_than_is_needed_is_gathered_again(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model, units, inputs = example.model(), example.units(), [example.inputs()]
    collect(model, units, inputs, tmp_path, needs={"layers.0.ffn": {"range"}})
    path = tmp_path / "layers.0.ffn.safetensors"
    assert holds(path, {"range"})
    assert not holds(path, {"gram"})
    found = collect(model, units, inputs, tmp_path, needs={"layers.0.ffn": {"gram"}})
    assert all(site.has_gram for site in found["layers.0.ffn"].values())
    path.write_bytes(b"torn")
    assert not holds(path, {"gram"})
    assert not holds(tmp_path / "missing", {"gram"})


@pytest.mark.parametrize("needs", [{"gram"}, {"range"}])
def test_values_that_are_not_finite_show_in_either_part(tmp_path: Path, needs: set[Need]) -> None:
    example = EXAMPLES["bert"]
    model = example.model()
    with torch.no_grad():
        model.get_submodule(example.units()[0].sites[0].name).weight[:, 3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        collect(model, example.units(), [example.inputs()], tmp_path,
                needs={"layers.0.ffn": needs})  # fmt: skip


def test_an_abandoned_run_leaves_no_activations(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    stream: Iterator[Any] = calibrate(
        example.model(), example.units(), [example.inputs()], tmp_path
    )
    next(stream)
    assert list(tmp_path.glob(".spill.*"))
    stream.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.glob(".spill.*"))


def test_what_a_killed_run_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".spill.old", tmp_path / ".spill.young"
    for spill in (old, young):
        spill.mkdir()
        (spill / "0").write_bytes(b"activations")
    os.utime(old, (0, 0))
    example = EXAMPLES["bert"]
    collect(example.model(), example.units(), [example.inputs()], tmp_path)
    assert not old.exists()
    assert young.exists()


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    model = example.model()
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.intermediate.dense").bias[0] = torch.nan
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense is not finite"):
        collect(model, example.units(), [example.inputs()], tmp_path)


def test_no_real_token_is_refused(tmp_path: Path) -> None:
    example = EXAMPLES["bert"]
    inputs = example.inputs()
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    with pytest.raises(ModelError, match="saw no input"):
        collect(example.model(), example.units(), [inputs], tmp_path)


def test_fingerprint_follows_content() -> None:
    inputs = EXAMPLES["bert"].inputs(batch=4)
    base = fingerprint([inputs])
    assert fingerprint(cut(inputs, 1)) == base
    assert fingerprint([{**inputs, "labels": torch.arange(4)}]) == base
    padded = inputs["input_ids"].clone()
    padded[inputs["attention_mask"] == 0] = 9
    assert fingerprint([{**inputs, "input_ids": padded}]) == base
    other = inputs["input_ids"].clone()
    other[0, 0] += 1
    assert fingerprint([{**inputs, "input_ids": other}]) != base
    assert fingerprint([inputs], "other model") != base
    assert fingerprint([{n: v.flip(0) for n, v in inputs.items()}]) != base


def test_stats_files_round_trip_and_refuse_damage(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    gram = torch.rand(4, 4)
    stats = {
        "one": SiteStats(gram, torch.rand(4), 7),
        "two": SiteStats(gram, torch.rand(4), 7),
        "three": SiteStats(torch.rand(3, 3), torch.rand(3), 9),
    }
    save_stats(path, stats)
    loaded = load_stats(path)
    assert loaded["one"].gram is loaded["two"].gram
    for name, site in stats.items():
        assert torch.equal(loaded[name].gram, site.gram)
        assert loaded[name].count == site.count
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InternalError, match="cannot be read"):
        load_stats(path)
    with pytest.raises(InternalError, match="cannot be read"):
        load_stats(tmp_path / "absent")


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["bert"]
    original = Path.write_bytes

    def refuse(self: Path, data: bytes) -> int:
        if ".spill." in str(self):
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=r"No space left.*lower data\.calibrate"):
        collect(example.model(), example.units(), [example.inputs()], tmp_path)
    assert not list(tmp_path.glob("*"))
