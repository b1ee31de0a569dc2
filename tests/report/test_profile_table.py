"""The profile's table: what `api.profile` returns of a cost table, every figure once."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from autocomp.api.profile import _report
from autocomp.core.candidate import Option, Step
from autocomp.report.profile_table import grouped, print_profile
from autocomp.spec.schema import TargetSection
from autocomp.targets.cost_table import CostTable, Entry

GPTQ = Option((Step.of("gptq", weights=8, activations=8, group=0),))
SKIP = Option((Step.of("skip"),))
COSTS = {
    "embeddings": {Option(): (0.02, 47_000_000), GPTQ: (0.02, 12_000_000)},
    **{
        f"layers.{layer}.{part}": {
            Option(): (latency, 7_100_000),
            GPTQ: (latency / 4, 1_800_000),
            SKIP: (0.0, 0),
        }
        for layer in range(4)
        for part, latency in (("attention", 0.4), ("ffn", 0.8))
    },
    "head": {Option(): (0.01, 8000)},
}


def reported(units: dict[str, Any], runtime: str | None = None) -> dict[str, Any]:
    """What the API makes of a cost table with these entries."""
    table = CostTable(
        device="d",
        workload={"batch": 1, "sequence": 32, "threads": 1},
        entries={
            unit: {
                option.key: Entry(latency, size, "float" if latency else "")
                for option, (latency, size) in options.items()
            }
            for unit, options in units.items()
        },
        base_ms=0.1,
        rest_bytes=40_000,
        ties={},
    )
    smallest = {unit: list(options)[-1].key for unit, options in units.items()}
    dense = {unit: Option().key for unit in units}
    table.fit([(dense, 5.0), (smallest, 0.2), (dense, 5.1), (smallest, 0.21)])
    plan: Any = SimpleNamespace(
        spec=SimpleNamespace(target=TargetSection()),
        units=[SimpleNamespace(name=name) for name in units],
        options={name: tuple(options) for name, options in units.items()},
        possible=lambda *_: True,
    )
    return _report(plan, runtime, table)


def printed(data: dict[str, Any], width: int = 100) -> list[str]:
    output = io.StringIO()
    print_profile(Console(file=output, width=width), data)
    return output.getvalue().splitlines()


def test_alike_units_are_one_row_for_each_option() -> None:
    report = reported(COSTS)
    lines = printed(report)
    (first,) = [i for i, line in enumerate(lines) if line.startswith("layers.0–3.attention")]
    rows = [" ".join(line.split()) for line in lines[first : first + 3]]
    assert rows == [
        "layers.0–3.attention dense 0.4 ms 100% 7.1 MB 100%",
        "gptq activations=8 group=0 weights=8 0.1 ms 25% 1.8 MB 25%",
        "skip 0 ms 0.0% 0 B 0.0%",
    ]
    assert sum("layers." in line for line in lines) == 2
    assert not any("…" in line for line in lines)


def test_the_whole_model_and_the_error_are_stated() -> None:
    report = reported(COSTS)
    error = report["estimated"]["error"]
    text = " ".join(" ".join(printed(report)).split())
    assert f"left out of the correction: {error:.1%} on average." in text
    dense = report["estimated"]["dense"]
    assert f"dense, estimated {dense['latency_ms']:.3g} ms 104 MB" in text
    assert "onnxruntime-cpu (onnxruntime " in text
    assert "Latency is processor time of its one thread" in text
    unknown = {**report, "estimated": {**report["estimated"], "error": None, "dense": None}}
    text = " ".join(printed(unknown))
    assert "not known" in text
    assert "dense, estimated" not in text


def test_every_runtime_has_its_table() -> None:
    report = reported(COSTS)
    lines = printed({"runtimes": {"onnxruntime": report, "openvino": report}})
    assert sum(line.startswith("layers.0–3.ffn") for line in lines) == 2


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ((), ["embeddings", "layers.0–3.attention", "layers.0–3.ffn", "head"]),
        (
            ("layers.1.ffn",),
            ["embeddings", "layers.0–3.attention", "layers.0,2–3.ffn", "layers.1.ffn", "head"],
        ),
    ],
)
def test_what_differs_stands_apart(changed: tuple[str, ...], names: list[str]) -> None:
    units = {
        unit: {**options, Option(): (9.0, 9)} if unit in changed else options
        for unit, options in COSTS.items()
    }
    report = reported(units)["units"]
    assert list(grouped(report)) == names
    assert {
        f"{option} {costs}" for options in report.values() for option, costs in options.items()
    } == {
        f"{option} {costs}"
        for options in grouped(report).values()
        for option, costs in options.items()
    }
    assert re.fullmatch(r"layers\.0–3\.attention", list(grouped(report))[1])
