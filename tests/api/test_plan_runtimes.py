"""Which runtimes a spec is searched on, and what each of them cannot carry out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from autocomp.api.check import report
from autocomp.api.plan import Plan, make_plan
from autocomp.core.errors import SpecError
from autocomp.core.unit import SiteFormat
from autocomp.targets import TARGETS, runtimes
from autocomp.targets.onnxruntime_cpu import OnnxRuntimeTarget

SPEC = """\
version: 1
model: {source: ./model}
task: {name: text-classification, data: {source: ./data.jsonl, calibrate: 8, distil: 16,
       search: 16, report: 16}, teacher: {fit: full}}
target: {device: cpu, runtime: auto, workload: {sequence: 16}}
budget: {size: 30%}
space:
  - match: "layers.*.ffn"
    bits: {method: rtn, weights: [dense, 8, 4], activations: [dense, 8], group: 32}
  - match: embeddings
    bits: {method: rtn, weights: [8, 4], group: 32}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spec")
    config = BertConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(root / "model")
    rows = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(80)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "spec.yaml").write_text(SPEC)
    return root


Lacks = Callable[[SiteFormat], bool]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Lacks], None]:
    """Registers ONNX Runtime again, lacking some formats, for one test."""

    def run(name: str, lacks: Lacks) -> None:
        class Other(OnnxRuntimeTarget):
            def formats_supported(self, format: SiteFormat) -> str | None:
                return "lacks this format" if lacks(format) else super().formats_supported(format)

        Other.name = f"{name}-cpu"
        TARGETS.names()
        monkeypatch.setitem(TARGETS._loaded, Other.name, Other)

    return run


@pytest.fixture(autouse=True)
def _only_what_a_test_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    TARGETS.names()
    built_in = "onnxruntime-cpu"
    monkeypatch.setattr(TARGETS, "_paths", {built_in: TARGETS._paths[built_in]})
    monkeypatch.setattr(TARGETS, "_loaded", {})


def plan(directory: Path, **overrides: Any) -> Plan:
    return make_plan(directory / "spec.yaml", {f"target.{k}": v for k, v in overrides.items()})


def nothing(_: SiteFormat) -> bool:
    return False


def four_bits(format: SiteFormat) -> bool:
    return format.weight_bits == 4


def test_auto_is_every_runtime_that_is_there_the_default_first(
    directory: Path, add: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add("alike", nothing)
    add("missing", nothing)
    monkeypatch.setitem(TARGETS._paths, "broken-cpu", "a_package_nobody_has:Target")
    monkeypatch.setitem(runtimes.PACKAGES, "missing-cpu", "a_package_nobody_has")
    made = plan(directory)
    assert made.runtimes == ("onnxruntime", "alike")
    assert [made.suffix(runtime) for runtime in made.runtimes] == ["", "-alike"]
    broken, missing = made.notes
    assert broken.startswith("runtime broken is left out: ")
    assert missing == (
        "runtime missing is left out: the package a_package_nobody_has is not installed"
    )
    assert not any(made.excluded.values())
    assert plan(directory, runtime=["alike", "onnxruntime"]).runtimes == ("alike", "onnxruntime")
    with pytest.raises(SpecError, match=r"target\.runtime: missing-cpu cannot be used here: the "):
        plan(directory, **{"runtime": "missing"})
    with pytest.raises(
        SpecError, match=r"no runtime 'lost' for device 'cpu'. Available there: .*onnxruntime"
    ):
        plan(directory, runtime=["onnxruntime", "lost"])


def test_without_a_choice_nothing_is_named(directory: Path, add: Callable[..., None]) -> None:
    add("alike", nothing)
    made = plan(directory, runtime="alike")
    assert made.runtimes == (None,)
    assert made.formats_on(None) == made.formats
    assert made.spec.target.model_dump()["runtime"] == "alike"
    assert set(made.spec.target.model_dump()) == {"device", "runtime", "workload"}


def test_what_one_runtime_lacks_is_left_to_the_other(
    directory: Path, add: Callable[..., None]
) -> None:
    add("coarse", four_bits)
    made = plan(directory)
    for unit in made.units:
        for option in made.options[unit.name]:
            wanted = not any(step.args and step["weights"] == 4 for step in option.steps)
            assert made.possible("coarse", unit.name, option) == wanted
            assert made.possible("onnxruntime", unit.name, option)
            assert (option.key in made.formats_on("coarse")[unit.name]) == wanted
    checked = report(made)
    fine, coarse = checked.runtimes
    assert (fine["runtime"], coarse["runtime"]) == ("onnxruntime", "coarse")
    assert coarse["options"] == fine["options"] - len(made.excluded["coarse"])
    assert checked.smallest_size_bytes == fine["smallest_size_bytes"]
    assert coarse["smallest_size_bytes"] > fine["smallest_size_bytes"]
    (note,) = [note for note in checked.notes if note.startswith("not on coarse: ")]
    assert note.endswith(f"and {len(made.excluded['coarse']) - 1} more: it lacks this format")
    json.dumps(checked.to_json())


def test_a_choice_that_no_runtime_can_carry_out_is_an_error(
    directory: Path, add: Callable[..., None]
) -> None:
    add("coarse", four_bits)
    add("rough", four_bits)
    with pytest.raises(SpecError) as raised:
        plan(directory, runtime=["coarse", "rough"])
    message = str(raised.value)
    assert "spec.yaml:10 space[1]: embeddings, rtn" in message, "the first unit with 4 bits"
    assert "coarse-cpu lacks this format; rough-cpu lacks this format" in message
    assert message.endswith("No option with rtn weights=4 is possible")


def test_a_runtime_without_any_option_of_a_unit_is_left_out(
    directory: Path, add: Callable[..., None]
) -> None:
    add("bare", lambda left: left.embedding and left.weight_bits < 32)
    made = plan(directory)
    assert made.runtimes == ("onnxruntime",)
    assert made.notes == ("runtime bare is left out: it can carry out no option of embeddings",)
