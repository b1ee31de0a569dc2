"""Recorded inputs of attention: only when asked, whole sequences, bounded, equal tensors once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_examples import EXAMPLES
from replaced_examples import sequences
from safetensors import safe_open

from autocomp.calibrate import record as record_module
from autocomp.calibrate.record import HIDDEN, MASK, Recorder, load_recording
from autocomp.calibrate.stats import load_stats, recording_path
from autocomp.calibrate.stream import calibrate
from autocomp.core.errors import InternalError, ModelError

UNIT = "layers.1.attention"


def run(name: str, root: Path, **options: object) -> Path:
    example = EXAMPLES[name]
    batches = sequences(example)
    for _ in calibrate(example.model(), example.units(), batches, root, **options):  # type: ignore[arg-type]
        pass
    return root / f"{UNIT}.safetensors"


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    path = run("bert", tmp_path)
    assert not list(tmp_path.glob("*recording*"))
    before = path.read_bytes()
    run("bert", tmp_path, record=[UNIT])  # statistics are there, the recording is not
    assert [file.name for file in tmp_path.glob("*recording*")] == [f"{UNIT}.recording.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3"])
def test_records_what_the_attention_reads(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    path = recording_path(run(name, tmp_path, record=[UNIT]))
    recording = load_recording(path)
    model, unit = example.model(), next(u for u in example.units() if u.name == UNIT)
    seen: list[torch.Tensor] = []
    query = next(site.name for site in unit.sites if site.role == "query")
    model.get_submodule(query).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for call, batch in zip(recording.calls, sequences(example), strict=True):
        with torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].bool()
        assert call.real is not None
        assert torch.equal(call.real, real)
        x = seen.pop()
        torch.testing.assert_close(call.hidden.float()[real], x[real], rtol=1e-3, atol=1e-3)
        values = [*call.args, *call.kwargs.values()]
        assert sum(value is HIDDEN for value in values) == 1
        assert sum(value is MASK for value in values) == 1
    rest = {"q_norm.weight", "k_norm.weight"} if name == "qwen3" else set()
    assert set(recording.rest) == rest
    with safe_open(path, framework="pt") as file:
        shared = [key for key in file.keys() if key.startswith("shared.")]  # noqa: SIM118
    assert len(shared) <= (0 if name == "bert" else 8)


def test_more_examples_are_recorded_than_counted(tmp_path: Path) -> None:
    plain = load_stats(run("bert", tmp_path / "plain"))
    more = sequences(EXAMPLES["bert"], count=3)[2:]
    path = run("bert", tmp_path / "more", record=[UNIT], record_batches=more)
    assert len(load_recording(recording_path(path)).calls) == 3
    for name, site in load_stats(path).items():
        assert site.count == plain[name].count
        assert torch.equal(site.gram, plain[name].gram)


def test_sequences_are_whole_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.cat([b["attention_mask"].sum(1) for b in sequences(EXAMPLES["bert"])])
    limit = int(lengths[:30].sum()) + 2
    original = Recorder.__init__

    def bounded(self, model, units):  # type: ignore[no-untyped-def]
        original(self, model, units, limit)

    monkeypatch.setattr(Recorder, "__init__", bounded)
    path = recording_path(run("bert", tmp_path, record=[UNIT]))
    calls = load_recording(path).calls
    assert torch.equal(torch.cat([call.lengths for call in calls]), lengths[:30])


def test_wide_values_keep_their_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_HALF_RANGE", 1e-3)
    recording = load_recording(recording_path(run("bert", tmp_path, record=[UNIT])))
    assert all(call.hidden.dtype == torch.float32 for call in recording.calls)


def test_damage_and_silence_are_told(tmp_path: Path) -> None:
    path = recording_path(run("bert", tmp_path, record=[UNIT]))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InternalError, match=r"recorded inputs .* cannot be read"):
        load_recording(path)
    model, units = EXAMPLES["bert"].model(), EXAMPLES["bert"].units()
    with pytest.raises(ModelError, match="was not called"):
        Recorder(model, units[1:2]).save(units[1].name, path)
