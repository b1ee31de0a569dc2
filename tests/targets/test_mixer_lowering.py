"""Mixers in lowered graphs: equal to torch on both runtimes, whole sequences and token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mixer_examples import RUNTIMES, arrays, attention, in_pieces, target, with_mixers
from target_examples import TextTask, quantise_unit, small_model
from torch import Tensor, nn

from autocomp.core.errors import InternalError
from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import SiteFormat, dense_format
from autocomp.models.factors import LowRank
from autocomp.models.mixers import MIXERS
from autocomp.models.mixers.protocol import Mixer, MixerShape, State, hidden_padding, repeated
from autocomp.models.modules import QuantLinear
from autocomp.models.seat import mixer_of
from autocomp.models.surgery import replace_module, skip
from autocomp.models.tokens import install_tokens
from autocomp.targets import mixer_graph
from autocomp.targets.generation import generate
from autocomp.targets.mixer_nodes import student_seats
from autocomp.targets.profile import lower_formats, profile
from autocomp.targets.weights import model_parameters, model_weights


class Convolved(Mixer):
    """Values convolved over three tokens, times a gate read from x, plus a decayed sum.

    It has all that lowering must get right: parameters, a buffer, an input beside the projections,
    a window, a sum, a query and a key that are not read.
    """

    name, summary, paper, reads = "convolved", "", "", ("value",)

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        width = shape.heads * shape.head_dim
        generator = torch.Generator().manual_seed(3)
        self.kernel = nn.Parameter(torch.randn(width, 1, 3, generator=generator) * 0.5)
        self.gate = nn.Linear(shape.hidden, width)
        nn.init.normal_(self.gate.weight, std=0.2, generator=generator)
        self.register_buffer("gain", torch.tensor(1.5))

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        (value,) = hidden_padding(real, repeated(self.shape.heads, value))
        lead = 2 if self.shape.causal else 1
        return self._mixed(x, nn.functional.pad(value, (0, 0, lead, 2 - lead)))

    def _mixed(self, x: Tensor, padded: Tensor) -> Tensor:
        flat = padded.transpose(2, 3).flatten(1, 2)  # (B, H·D, T + 2)
        out = nn.functional.conv1d(flat, self.kernel, groups=flat.shape[1]).transpose(1, 2)
        out = out * torch.sigmoid(self.gate(x)) * self.gain
        return out.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)

    def empty_state(self, batch: int) -> State:
        return {"last": torch.zeros(batch, self.shape.heads, 2, self.shape.head_dim)}

    def extend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, state: State
    ) -> tuple[Tensor, State]:
        padded = torch.cat([state["last"], repeated(self.shape.heads, value)], dim=2)
        return self._mixed(x, padded), {"last": padded[:, :, -2:]}


class Square(Mixer):
    """Every patch takes its right neighbour's value in its row; leading tokens keep theirs."""

    name, summary, paper, reads = "square", "", "", ("value",)

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None
    ) -> Tensor:
        assert self.shape.prefix is not None
        patches = value[:, :, self.shape.prefix :]
        side = int(patches.shape[2] ** 0.5)
        if side * side != patches.shape[2]:
            raise ValueError(f"{patches.shape[2]} patches are no square")
        rows = patches.unflatten(2, (side, side)).roll(-1, dims=3).flatten(2, 3)
        return torch.cat([value[:, :, : self.shape.prefix], rows], dim=2)


ELU = MIXERS.get("elu")
assert ELU is not None


MIXED = {"elu": {0: ELU}, "both": {0: Convolved, 1: ELU}, "convolved": {0: Convolved, 1: Convolved}}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layout", ["bert", "llama", "dinov2"])
@pytest.mark.parametrize("mixers", MIXED.values(), ids=MIXED)
def test_lowered_equals_torch(exported, layout, mixers, runtime, tmp_path):
    model, units, task, skeleton = exported(layout)
    student = with_mixers(layout, model, units, mixers)
    before = skeleton.SerializeToString()
    the = target(runtime)
    artifact = the.write(the.lower(skeleton, student, units), tmp_path)
    for shape in ((1, 12), (3, 5), (2, 1)):
        assert the.verify(artifact, student, arrays(task, *shape)) < 1e-4
    assert skeleton.SerializeToString() == before
    assert artifact.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def _surrounded(student, units) -> None:
    """8-bit sites around both mixers, a skipped sublayer, a low-rank output."""
    quantise_unit(student, next(u for u in units if u.name == "layers.1.ffn"), 8, None, 8)
    skip(student, next(u for u in units if u.name == "layers.0.ffn"))
    for layer in (0, 1):
        unit = attention(units, layer)
        read = [site for site in unit.sites if hasattr(student.get_submodule(site.name), "weight")]
        quantise_unit(student, replace(unit, sites=tuple(read)), 8, None, 8)
    output = attention(units, 1).site("output")
    first, second = nn.Linear(output.columns, 9, bias=False), nn.Linear(9, output.rows)
    replace_module(student, output.name, LowRank(first, second))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_what_is_done_to_the_sites_around_goes_on_working(exported, layout, runtime, tmp_path):
    model, units, task, skeleton = exported(layout)
    student = with_mixers(layout, model, units, MIXED["both"])
    _surrounded(student, units)
    the = target(runtime)
    asked = []
    provide = model_weights(student)

    def provider(site: str) -> Any:
        asked.append(site)
        return provide(site)

    seats = student_seats(skeleton, student, units, {})
    lowered = the.lower_weights(skeleton, provider, model_parameters(student), seats=seats)
    artifact = the.write(lowered, tmp_path)
    spread = float(student(**task.example_inputs(1, 12)).logits.detach().std())
    difference = the.verify(artifact, student, arrays(task, 3, 12)) / spread
    assert difference < (2e-2 if runtime == "onnxruntime" else 0.25)  # ranges per token there
    unread = [attention(units, 0).site(role).name for role in ("query", "key")]
    assert not set(asked) & set(unread)
    assert attention(units, 0).site("value").name in asked


def test_scaled_inputs_fold_into_the_norm_beside_a_mixer_that_reads_none(exported):
    """`elu` reads the norm's output by its shape at most; a gate reads its values."""
    model, units, _, skeleton = exported("llama")
    for mixer, folded in ((ELU, True), (Convolved, False)):
        student = with_mixers("llama", model, units, {0: mixer})
        read = [s for s in attention(units, 0).sites if s.role in mixer.reads]
        for site in read:
            dense = student.get_submodule(site.name)
            spec = SiteFormat(
                site.rows, site.columns, False, weight_bits=8, activation_bits=8, scaled=True
            )
            scales = dense.weight.detach().abs().amax(1, keepdim=True) / 127
            vector = torch.linspace(0.5, 2.0, site.columns)
            module = QuantLinear(dense.weight.detach(), None, scales, spec, input_scale=vector)
            replace_module(student, site.name, module.eval())
        lowered = target("onnxruntime").lower(skeleton, student, units)
        names = {name for node in lowered.graph.node for name in node.input}
        assert any(".folded" in name for name in names) is folded


DECODE = {"prompt": 9, "generate": 12}
UNMASKED = TextTask(masked=False)


@pytest.fixture(scope="module")
def decoders() -> dict[str, Any]:
    kept = {}
    for layout in ("llama", "gpt2"):
        changes = {"tie_word_embeddings": False} if layout == "llama" else {}
        model, units, _ = small_model(layout, **changes)
        model.config.use_cache = False
        skeleton = target("onnxruntime", **DECODE).export(model, units, UNMASKED)
        kept[layout] = (model, units, skeleton)
    return kept


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("layout", "mixers"),
    [("llama", {0: ELU}), ("llama", {0: Convolved, 1: ELU}), ("gpt2", {0: ELU, 1: Convolved})],
    ids=["one", "all", "all of gpt2"],
)
def test_token_by_token_equals_the_whole(decoders, layout, mixers, runtime, tmp_path):
    model, units, skeleton = decoders[layout]
    student = with_mixers(layout, model, units, mixers)
    the = target(runtime, **DECODE)
    artifact = the.write(the.lower(skeleton, student, units), tmp_path)
    ids = UNMASKED.example_inputs(3, 14)["input_ids"]
    assert the.verify(artifact, student, {"input_ids": ids.numpy()}) < 1e-4
    session = the.open(artifact.path)
    with torch.no_grad():
        whole = student(input_ids=ids).logits.numpy()
        expected = ids[:, :9]
        for _ in range(12):
            following = student(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
    assert np.abs(in_pieces(session, ids.numpy(), [5, 6, 7, 10]) - whole).max() < 1e-4
    new = generate(session, {"input_ids": ids[:, :9].numpy()}, 12)
    np.testing.assert_array_equal(new, expected[:, 9:].numpy())

    found = {value.name: tuple(value.shape[1:]) for value in session.get_inputs()}
    states = {"elu": {"sums": (4, 8, 9)}, "convolved": {"last": (4, 2, 8)}}
    for layer in (0, 1):
        kind = mixers.get(layer)
        assert (f"past_key_values.{layer}.key" in found) is (kind is None)
        for name, shape in states[kind.name].items() if kind else ():
            assert found[f"past_state.{layer}.{name}"] == shape
    assert ("past_length" in found) is (len(mixers) == 2)
    feed = the._timed_feed(session, {"input_ids": ids.numpy()})
    assert feed["input_ids"].shape == (3, 1)
    if len(mixers) == 2:
        assert feed["past_length"].tolist() == [15]


def test_peak_memory_of_states(decoders, tmp_path):
    model, units, skeleton = decoders["llama"]
    student = with_mixers("llama", model, units, {0: Convolved, 1: ELU})
    the = target("onnxruntime", **DECODE)
    artifact = the.write(the.lower(skeleton, student, units), tmp_path)
    assert the.peak_memory(artifact, arrays(UNMASKED, 1, 9)) > artifact.size_bytes


class Restless(Convolved):
    """One whose state is not zero at first."""

    name = "restless"

    def empty_state(self, batch: int) -> State:
        return {"last": torch.ones(batch, 1)}


def test_what_cannot_decode_is_refused(decoders, monkeypatch):
    model, units, skeleton = decoders["llama"]
    the = target("onnxruntime", **DECODE)
    for mixer, reason in (
        (Square, "cannot decode: square keeps no state"),
        (Restless, "all zeros"),
    ):
        student = with_mixers("llama", model, units, {0: mixer})
        with pytest.raises(InternalError, match=reason):
            the.lower(skeleton, student, units)
    monkeypatch.setattr(MIXERS, "get", {"square": Square, "elu": ELU}.get)
    left = SiteFormat(32, 32, False, mixer="square")
    assert "keeps no state to decode with" in the.formats_supported(left)
    assert the.formats_supported(replace(left, mixer="elu")) is None
    assert target("onnxruntime").formats_supported(left) is None


def test_structures_are_exported_once(exported, monkeypatch):
    """A second candidate differs in parameters alone; another kernel width is another structure."""
    model, units, task, skeleton = exported("bert")
    the = target("onnxruntime")
    calls = []
    monkeypatch.setattr(mixer_graph, "_KEPT", {})
    real = mixer_graph.to_onnx
    monkeypatch.setattr(mixer_graph, "to_onnx", lambda *a, **k: calls.append(1) or real(*a, **k))
    found = []
    for gain in (1.5, 3.0):
        student = with_mixers("bert", model, units, {0: Convolved, 1: Convolved})
        for layer in (0, 1):
            mixer_of(student, attention(units, layer)).gain.fill_(gain)
        lowered = the.lower(skeleton, student, units)
        (value,) = the.run_graph(lowered, arrays(task, 1, 5), ["logits"]).values()
        expected = student(**task.example_inputs(1, 5)).logits.detach().numpy()
        np.testing.assert_allclose(value, expected, atol=1e-4)
        found.append(value)
    assert np.abs(found[0] - found[1]).max() > 1e-2
    assert len(calls) == 1
    student = with_mixers("bert", model, units, {0: Convolved})
    mixer_of(student, attention(units, 0)).note = "another"
    the.lower(skeleton, student, units)
    assert len(calls) == 2


def test_patches_keep_their_square_behind_fewer_tokens():
    """What is exported for an image is for the number of patches that arrive at the unit."""
    model, units, task = small_model("dinov2", image_size=48, num_hidden_layers=3)
    task = replace(task, side=48)
    the = target("onnxruntime")
    skeleton = the.export(model, units, task)
    student = with_mixers("dinov2", model, units, {0: Square, 2: Square})
    merged = TokenReduction("tome", 11.5 / 36, 1)  # 36 patches become 25
    install_tokens(student, units, {"layers.1.attention": merged})
    seats = student_seats(skeleton, student, units, {"layers.1.attention": merged})
    assert [seat.tokens for seat in seats.values()] == [37, 26]
    lowered = the.lower(skeleton, student, units)
    (value,) = the.run_graph(lowered, arrays(task, 2, 0), ["logits"]).values()
    expected = student(**task.example_inputs(2, 0)).logits.detach().numpy()
    np.testing.assert_allclose(value, expected, atol=1e-4)
    install_tokens(student, units, {"layers.0.attention": merged})
    with pytest.raises(InternalError, match=r"layers\.0\.attention: tokens are chosen by its key"):
        the.lower(skeleton, student, units)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_mixers_have_their_price(exported, layout, runtime, monkeypatch):
    """Entries of mixers, dense and rounded; the foretold size is the artifact's."""
    monkeypatch.setattr(MIXERS, "get", {"convolved": Convolved, "elu": ELU}.get)
    _, units, task, skeleton = exported(layout)
    formats = {unit.name: {"dense": dense_format(unit)} for unit in units}
    for layer in (0, 1):
        unit = attention(units, layer)
        for mixer in (ELU, Convolved):
            formats[unit.name][mixer.name] = mixer_formats(unit, mixer)
            formats[unit.name][f"{mixer.name} 8"] = mixer_formats(unit, mixer, weight_bits=8)
    the = target(runtime)
    inputs = arrays(task, 1, 12)
    table = profile(the, skeleton, units, formats, inputs, candidates=1)
    table.ties = {}
    entries = table.entries["layers.0.attention"]
    assert set(entries) == {"dense", "elu", "elu 8", "convolved", "convolved 8"}
    assert all(entry.latency_ms > 0 for entry in entries.values())
    assert entries == table.entries["layers.1.attention"]
    gate = 4 * (32 * 32 + 32 + 3 * 32)
    unread = 2 * 4 * 32 * 32 if layout == "bert" else 4 * 32 * (32 + 16)
    beyond = entries["convolved"].size_bytes - (entries["dense"].size_bytes - unread + gate)
    assert abs(beyond) < (6_000 if runtime == "onnxruntime" else 30_000)
    dense = {unit.name: "dense" for unit in units}
    before = the.lowered_bytes(lower_formats(the, skeleton, units, chosen(formats, dense)))
    for key in ("elu", "convolved", "convolved 8"):
        choice = dense | {"layers.0.attention": key}
        lowered = lower_formats(the, skeleton, units, chosen(formats, choice))
        added = table.predict(choice).size_bytes - table.predict(dense).size_bytes
        found = the.lowered_bytes(lowered) - before
        assert added == pytest.approx(found, abs=500 if runtime == "onnxruntime" else 4_000)


def chosen(formats: Any, choice: dict[str, str]) -> dict[str, Any]:
    return {unit: formats[unit][key] for unit, key in choice.items()}


def mixer_formats(unit: Any, mixer: type[Mixer], **changes: Any) -> dict[str, SiteFormat]:
    """The formats of a unit with a mixer, as the operator leaves them."""
    dense = dense_format(unit)
    return {
        site.name: replace(
            dense[site.name], mixer=mixer.name if site.role == "output" else None, **changes
        )
        for site in unit.sites
        if site.role in (*mixer.reads, "output")
    }


def test_a_generating_table_has_states(decoders):
    _, units, skeleton = decoders["llama"]
    formats = {unit.name: {"dense": dense_format(unit)} for unit in units}
    for layer in (0, 1):
        unit = attention(units, layer)
        formats[unit.name] = {"elu": mixer_formats(unit, ELU)}
    the = target("onnxruntime", **DECODE)
    table = profile(the, skeleton, units, formats, arrays(UNMASKED, 1, 9), candidates=1)
    assert table.entries["layers.0.attention"]["elu"].latency_ms > 0


def test_fewer_patches_are_priced_where_a_mixer_takes_them(monkeypatch):
    """`square` has no graph for 26 patches: it counts as at full length; `elu` at all lengths."""
    monkeypatch.setattr(MIXERS, "get", {"square": Square, "elu": ELU}.get)
    model, units, task = small_model("dinov2", image_size=48)
    task = replace(task, side=48)
    the = target("onnxruntime")
    skeleton = the.export(model, units, task)
    formats = {unit.name: {"dense": dense_format(unit)} for unit in units}
    for mixer in (ELU, Square):
        unit = attention(units, 1)
        formats[unit.name][mixer.name] = mixer_formats(unit, mixer)
    merged = {"layers.0.attention": {"dense": TokenReduction("tome", 0.3, 1)}}
    table = profile(
        the, skeleton, units, formats, arrays(task, 1, 0), reductions=merged, candidates=1
    )
    assert table.tokens is not None
    assert set(table.tokens.curves["layers.1.attention"]) == {"dense", "elu"}
    assert table.entries["layers.1.attention"]["square"].latency_ms > 0
