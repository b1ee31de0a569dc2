"""Merged and dropped tokens: against the definition in loops, and in whole models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_examples import EXAMPLES
from reduced import keep_heads
from torch import nn

from autocomp.core.tokens import TokenReduction
from autocomp.core.unit import Unit
from autocomp.models.surgery import copy_for_surgery, skip
from autocomp.models.tokens import (
    AveragedNorm,
    TokenSizes,
    class_attention,
    drop_tokens,
    fuse_tokens,
    install_tokens,
    merge_tokens,
    model_reductions,
    token_sizes,
)

VISION = ("vit", "deit", "dinov2")
LEADING = {"vit": 1, "deit": 2, "dinov2": 1}
PATCHES = 36


def vision(layout: str) -> tuple[nn.Module, list[Unit], dict[str, torch.Tensor]]:
    """A small model of 36 patches, its units and a batch of three."""
    example = EXAMPLES[layout]
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, 48, 48, generator=generator)
    return example.model(image_size=48), example.units(image_size=48), {"pixel_values": images}


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def shortened(model: nn.Module, units: list[Unit], **ratios: tuple[str, float]) -> nn.Module:
    """A copy with `layer_0=("tome", 0.25)` and so on installed."""
    leading = units[0].protected_tokens or 0
    reductions = {
        f"layers.{name.removeprefix('layer_')}.attention": TokenReduction(method, ratio, leading)  # type: ignore[arg-type]
        for name, (method, ratio) in ratios.items()
    }
    copied = copy_for_surgery(model)
    install_tokens(copied, units, reductions)
    return copied


def defined_merge(
    x: torch.Tensor, metric: torch.Tensor, count: int, protected: int, sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3 of the paper for one example, in loops: no tensor operation but sums and dots."""
    evens = [t for t in range(len(x)) if t >= protected and t % 2 == 0]
    odds = [t for t in range(len(x)) if t >= protected and t % 2 == 1]
    edges = []
    for a in evens:
        best, partner = -math.inf, -1
        for b in odds:
            dot = sum(float(p) * float(q) for p, q in zip(metric[a], metric[b], strict=True))
            similarity = dot / float(metric[a].norm() * metric[b].norm())
            if similarity > best:
                best, partner = similarity, b
        edges.append((best, a, partner))
    chosen = sorted(edges, key=lambda edge: -edge[0])[:count]
    merged = {a: b for _, a, b in chosen}
    rows, mass = [], []
    for t in [*range(protected), *(a for a in evens if a not in merged), *odds]:
        members = [t, *(a for a, b in merged.items() if b == t)]
        total = sum(float(sizes[m]) for m in members)
        rows.append(sum(x[m] * float(sizes[m]) for m in members) / total)
        mass.append(total)
    return torch.stack(rows), torch.tensor(mass, dtype=x.dtype)[:, None]


@pytest.mark.parametrize(
    ("tokens", "count", "protected"), [(17, 4, 1), (18, 8, 1), (12, 3, 2), (16, 5, 5), (5, 2, 1)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_merging_is_what_the_paper_defines(tokens, count, protected, weighted):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, 7, generator=generator, dtype=torch.float64)
    metric = torch.randn(3, tokens, 4, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, tokens, 1), generator=generator).double() if weighted else None
    found, found_sizes = merge_tokens(x, metric, count, protected, sizes)
    assert found.shape == (3, tokens - count, 7)
    for row in range(3):
        ones = torch.ones(tokens, 1, dtype=torch.float64)
        known = ones if sizes is None else sizes[row]
        expected, mass = defined_merge(x[row], metric[row], count, protected, known)
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found_sizes[row], mass)
    assert torch.equal(found[:, :protected], x[:, :protected])


def test_several_tokens_may_merge_into_one():
    """Two even tokens next to the same odd one: the average of the three."""
    metric = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, -0.01]])[None]
    x = torch.arange(5.0)[None, :, None]
    found, sizes = merge_tokens(x, metric, 2, 1)
    assert found.flatten().tolist() == pytest.approx([0.0, (1 + 2 + 4) / 3, 3.0])
    assert sizes.flatten().tolist() == [1, 3, 1]


@pytest.mark.parametrize("layout", VISION)
def test_dropping_goes_by_the_attention_of_the_class_token(layout):
    """The weights are those the model's own eager attention returns."""
    model, units, inputs = vision(layout)
    eager = EXAMPLES[layout].model(image_size=48)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True).attentions[1]  # (B, H, T, T)
    seen: list[torch.Tensor] = []
    path = "dinov2.encoder.layer" if layout == "dinov2" else f"{layout}.layers"
    first, tokens = LEADING[layout], LEADING[layout] + PATCHES
    for name in ("q_proj", "k_proj"):
        model.get_submodule(f"{path}.1.attention.{name}").register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
    run(model, inputs)
    attention = class_attention(*seen, head_dim=units[0].head_dim)
    torch.testing.assert_close(attention, weights[:, :, 0].mean(dim=1), rtol=1e-5, atol=1e-6)
    x = torch.arange(float(tokens)).expand(3, tokens)[..., None]
    found, sizes = drop_tokens(x, attention, 9, first)
    assert sizes is None
    for row in range(3):
        ranked = sorted(range(first, tokens), key=lambda t: -float(attention[row, t]))
        assert found[row].flatten().tolist() == [*range(first), *sorted(ranked[:27])]


@pytest.mark.parametrize("weighted", [False, True])
def test_fusing_puts_a_weighted_mean_behind_those_that_stay(weighted):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 11, 4, generator=generator, dtype=torch.float64)
    attention = torch.rand(2, 11, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, 11, 1), generator=generator).double() if weighted else None
    found, found_sizes = fuse_tokens(x, attention, 4, 2, sizes)
    assert found.shape == (2, 8, 4)
    for row in range(2):
        ranked = sorted(range(2, 11), key=lambda t: -float(attention[row, t]))
        stay, gone = [0, 1, *sorted(ranked[:5])], ranked[5:]
        total = sum(float(attention[row, t]) for t in gone)
        mean = sum(x[row, t] * (float(attention[row, t]) / total) for t in gone)
        torch.testing.assert_close(found[row], torch.cat([x[row, stay], mean[None]]))
        mass = torch.ones(11, dtype=torch.float64) if sizes is None else sizes[row, :, 0]
        expected = [float(mass[t]) for t in stay] + [sum(float(mass[t]) for t in gone)]
        assert found_sizes[row].flatten().tolist() == expected


@pytest.mark.parametrize("layout", VISION)
@pytest.mark.parametrize("method", ["tome", "token_prune", "token_fuse"])
def test_nothing_removed_changes_no_bit(layout, method):
    model, units, inputs = vision(layout)
    same = shortened(model, units, layer_0=(method, 0.0), layer_1=(method, 0.02))
    assert torch.equal(run(same, inputs), run(model, inputs))


@pytest.mark.parametrize("layout", VISION)
def test_later_units_see_fewer_tokens(layout):
    model, units, inputs = vision(layout)
    student = shortened(model, units, layer_0=("tome", 0.25), layer_2=("token_prune", 0.5))
    lengths: list[int] = []
    for unit in units[:-1]:
        student.get_submodule(unit.sites[0].name).register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1])
        )
    run(student, inputs)
    patches = [36, 27, 27, 27, 27, 14]
    assert lengths == [LEADING[layout] + count for count in patches]
    assert (run(student, inputs) - run(model, inputs)).abs().max() > 1e-3
    assert {name: r.ratio for name, r in model_reductions(student).items()} == {
        "layers.0.attention": 0.25,
        "layers.2.attention": 0.5,
    }
    assert model_reductions(model) == {}


@pytest.mark.parametrize("layout", VISION)
def test_an_example_does_not_depend_on_its_batch(layout):
    model, units, inputs = vision(layout)
    student = shortened(
        model, units, layer_0=("tome", 0.3), layer_1=("token_fuse", 0.2), layer_2=("tome", 0.4)
    )
    together = run(student, inputs)
    alone = [run(student, {"pixel_values": image[None]}) for image in inputs["pixel_values"]]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [(("tome", 0.5), ("tome", 0.5)), (("token_fuse", 0.5), ("tome", 0.5))],
    ids=["merged", "fused, merged"],
)
def test_sizes_count_every_patch_once_and_weigh_the_mean(first, second):
    model, units, inputs = vision("dinov2")
    student = shortened(model, units, layer_0=first, layer_1=second)
    hidden: list[torch.Tensor] = []
    student.get_submodule("dinov2.encoder").register_forward_hook(
        lambda module, args, out: hidden.append(out.last_hidden_state)
    )
    heads: list[torch.Tensor] = []
    student.get_submodule("classifier").register_forward_pre_hook(
        lambda module, args: heads.append(args[0])
    )
    run(student, inputs)
    sizes = token_sizes(student)
    assert sizes is not None
    assert sizes.now is not None
    assert sizes.now.shape == (3, 10 if first[0] == "tome" else 11, 1)
    assert sizes.now[:, 1:].sum(dim=1).flatten().tolist() == [PATCHES] * 3
    assert (sizes.now[:, 0] == 1).all()
    norm = model.get_submodule("dinov2.layernorm")
    normed = norm(hidden[0].detach())
    weighted = (normed * sizes.now)[:, 1:].sum(dim=1) / PATCHES
    torch.testing.assert_close(heads[0], torch.cat([normed[:, 0], weighted], dim=1))


def test_without_sizes_the_averaged_norm_is_the_norm():
    norm = nn.LayerNorm(6)
    x = torch.randn(2, 5, 6)
    assert torch.equal(AveragedNorm(norm, TokenSizes(), 1)(x), norm(x))


def test_each_pass_begins_with_every_token_for_itself():
    model, units, inputs = vision("dinov2")
    student = shortened(model, units, layer_0=("tome", 0.4), layer_1=("tome", 0.4))
    first = run(student, inputs)
    assert torch.equal(run(student, inputs), first)


@pytest.mark.parametrize("layout", VISION)
def test_it_composes_with_pruned_heads_skips_and_training(layout):
    model, units, inputs = vision(layout)
    student = copy.deepcopy(model)
    keep_heads(student, units[0], [1, 3])
    skip(student, units[1])
    skip(student, units[2])
    install_tokens(
        student,
        units,
        {
            "layers.0.attention": TokenReduction("tome", 0.25),
            "layers.2.attention": TokenReduction("token_prune", 0.25),
        },
    )
    student = copy.deepcopy(student).train()
    loss = student(**inputs).logits.square().mean()
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.requires_grad and p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    query = student.get_submodule(units[0].sites[0].name).weight
    assert query.grad.abs().max() > 0
    assert query.shape[0] == 2 * units[0].head_dim


def test_text_has_no_tokens_to_spare():
    example = EXAMPLES["bert"]
    with pytest.raises(ValueError, match="no tokens can be merged or dropped"):
        install_tokens(
            example.model(), example.units(), {"layers.0.attention": TokenReduction("tome", 0.1)}
        )
