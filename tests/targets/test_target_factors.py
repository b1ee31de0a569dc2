"""Models with sites of low rank: lowered, run, sized and priced."""

from __future__ import annotations

import copy

import pytest
import torch
from target_examples import RUNTIMES, target, target_on

from autocomp.core.candidate import Option, Step
from autocomp.core.unit import dense_format
from autocomp.models.factors import LowRank
from autocomp.models.surgery import copy_for_surgery, install
from autocomp.operators import apply_option, option_formats
from autocomp.operators.protocol import SiteState
from autocomp.operators.protocol import SiteStats as Stats
from autocomp.targets.profile import profile

RANK = Step.of("rank", ratio=0.6)
BITS = {
    "dense": (),
    "int8": (Step.of("rtn", weights=8, activations=8, group=0),),
    "int4": (Step.of("rtn", weights=4, activations=32, group=16),),
}


def _state(model, unit) -> dict[str, SiteState]:
    formats = dense_format(unit)
    state = {}
    for site in unit.sites:
        module = model.get_submodule(site.name)
        bias = module.bias.detach() if site.bias else None
        state[site.name] = SiteState(module.weight.detach(), bias, formats[site.name])
    return state


def _option(unit, bits: str) -> Option:
    if unit.kind == "embedding" and bits == "int8":
        bits = "int4"
    return Option((RANK, *BITS[bits]))


def _factored(model, units, bits: str):
    student = copy_for_surgery(model)
    for unit in units:
        stats = {}
        if unit.kind != "embedding":
            shared = {
                s.columns: Stats(torch.eye(s.columns), torch.zeros(s.columns), 9)
                for s in unit.sites
            }
            stats = {site.name: shared[site.columns] for site in unit.sites}
        option = _option(unit, bits)
        install(student, unit, apply_option(unit, _state(model, unit), option, stats))
    return student


@pytest.mark.parametrize("runtime_name", RUNTIMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ["bert", "llama", "vit"])
def test_artifact_equals_torch_and_its_size_is_foretold(
    exported, layout, bits, runtime_name, tmp_path
) -> None:
    """Attention's number of heads is read off the second factors; every byte is accounted for."""
    model, units, task, skeleton = exported(layout)
    student = _factored(model, units, bits)
    runtime = target_on(runtime_name)
    artifact = runtime.write(runtime.lower(skeleton, student, units), tmp_path)
    feeds = {k: v.numpy() for k, v in task.example_inputs(2, 12).items()}
    tolerance = {"dense": 1e-4, "int8": 2e-2, "int4": 5e-3}  # int4 scales are float16 in the file
    if runtime_name == "openvino":  # which rounds groups of a token's columns, torch a tensor
        tolerance["int8"] = 0.1
    assert runtime.verify(artifact, student, feeds) < tolerance[bits]
    with torch.no_grad():
        inputs = task.example_inputs(2, 12)
        assert (student(**inputs).logits - model(**inputs).logits).abs().max() > 0.1
    in_units = {"dense": 0, "factored": 0}
    for unit in units:
        option = _option(unit, bits)
        for label, chosen in (("dense", Option()), ("factored", option)):
            formats = option_formats(unit, chosen).values()
            in_units[label] += sum(runtime.size_bytes(one) for one in formats)
    dense = runtime.write(runtime.lower(skeleton, model, units), tmp_path / "dense")
    rest = dense.size_bytes - in_units["dense"]
    layers = 2 * sum(len(unit.sites) for unit in units)
    if layout != "llama":  # whose dense head shares the table's bytes
        # Names and shapes of a node are estimated: a hundred bytes or two per layer.
        each = 200 if runtime_name == "onnxruntime" else 600  # XML says more than protobuf
        assert artifact.size_bytes == pytest.approx(rest + in_units["factored"], abs=each * layers)


def test_the_cost_table_prices_factors(exported) -> None:
    """Every option of every unit has an entry; whole candidates with factors are measured."""
    _, units, task, skeleton = exported("bert")
    runtime = target()
    formats = {}
    for unit in units:
        offered = [Option(), _option(unit, "int8")]
        formats[unit.name] = {option.key: option_formats(unit, option) for option in offered}
    inputs = {k: v.numpy() for k, v in task.example_inputs(1, 12).items()}
    table = profile(runtime, skeleton, units, formats, inputs, candidates=2)
    for unit in units:
        for key, left in formats[unit.name].items():
            entry = table.entry(unit.name, key)
            assert entry.latency_ms > 0
            assert entry.size_bytes == sum(runtime.size_bytes(one) for one in left.values())


def test_both_factors_learn() -> None:
    """Gradients reach both layers, rounded or not; copies are deep."""
    first, second = torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 5)
    module = LowRank(first, second)
    torch.testing.assert_close(
        module(torch.eye(6)), first.weight.t() @ second.weight.t() + second.bias
    )
    twin = copy.deepcopy(module)
    twin(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
