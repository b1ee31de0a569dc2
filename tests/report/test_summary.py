"""A candidate in figures, against sums done by hand."""

from __future__ import annotations

import pytest

from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.metric import Scale
from autocomp.core.unit import Site, Unit
from autocomp.report.figures import format_excess, format_quality, format_share, summarise_option
from autocomp.report.summary import candidate_figures, figures_text


def unit(name: str, parameters: int, *, heads: int | None = None, width: int | None = None) -> Unit:
    site = Site(f"{name}.site", "up", parameters, 1, bias=False)
    kind = "attention" if heads else "ffn" if width else "embedding"
    return Unit(name, kind, (site,), heads=heads, width=width, head_dim=32 if heads else None)


UNITS = [
    unit("embeddings", 1000),
    unit("layers.0.attention", 400, heads=4),
    unit("layers.0.ffn", 600, width=64),
    unit("layers.1.attention", 400, heads=4),
    unit("layers.1.ffn", 600, width=64),
]
CANDIDATE = Candidate.of(
    {
        "embeddings": Option((Step.of("rtn", weights=4, group=32),)),
        "layers.0.attention": Option((Step.of("heads", keep=2), Step.of("gptq", weights=8))),
        "layers.0.ffn": Option(),
        "layers.1.attention": Option((Step.of("skip"),)),
        "layers.1.ffn": Option((Step.of("width", keep=16),)),
    },
    Distillation(tokens=50_000, lr=2e-4, temperature=4.0),
).to_json()


def test_with_units_means_are_weighted() -> None:
    figures = candidate_figures(CANDIDATE, UNITS)
    weights = [(1000, 4), (200, 8), (600, 32), (150, 32)]
    total = sum(count for count, _ in weights)
    assert figures["mean_bits"] == pytest.approx(sum(c * b for c, b in weights) / total, abs=1e-3)
    assert figures["removed_share"] == pytest.approx(1 - total / 3000, abs=1e-4)
    assert figures["heads_kept"] == pytest.approx((0.5 + 0.0) / 2)
    assert figures["width_kept"] == pytest.approx((1.0 + 0.25) / 2)
    assert figures["skipped_units"] == 1
    assert (figures["tokens"], figures["lr"], figures["temperature"]) == (50_000, 2e-4, 4.0)


def test_factors_and_a_pruned_vocabulary_remove_weights() -> None:
    """Shares of the weights that are left, counted by hand; positions stay."""
    sites = (
        Site("words", "embedding", 1000, 64, bias=False),
        Site("positions", "position", 100, 64, bias=False),
    )
    table = Unit("embeddings", "embedding", sites)
    ffn = Unit("layers.0.ffn", "ffn", (Site("up", "up", 64, 64, bias=False),), width=64)
    for option, left in (
        (Step.of("vocabulary", keep=300, unknown=1), 400 * 64),
        (Step.of("rank", ratio=0.5), 32 * 1064 + 100 * 64),  # 0.5 × 60.2, to a multiple of 8
    ):
        half = Option((Step.of("rank", ratio=0.5),))  # rank 16
        candidate = Candidate.of({"embeddings": Option((option,)), "layers.0.ffn": half}).to_json()
        share = (left + 16 * 128) / (1100 * 64 + 64 * 64)
        figures = candidate_figures(candidate, [table, ffn])
        assert figures["removed_share"] == pytest.approx(1 - share, abs=1e-4)


def test_shared_keys_remove_weights() -> None:
    roles = ("query", "key", "value", "output")
    sites = tuple(Site(role, role, 32, 32, bias=False) for role in roles)
    attention = Unit("layers.0.attention", "attention", sites, heads=4, kv_heads=4, head_dim=8)
    shared = Option((Step.of("groups", keep=1), Step.of("gptq", weights=8)))
    figures = candidate_figures(Candidate.of({attention.name: shared}).to_json(), [attention])
    assert figures["removed_share"] == pytest.approx(2 * 24 / 128)
    assert figures["heads_kept"] == 1.0


def test_zeros_are_counted_among_the_weights_that_remain() -> None:
    candidate = Candidate.of(
        {
            "embeddings": Option((Step.of("rtn", weights=4, group=32),)),
            "layers.0.attention": Option((Step.of("heads", keep=2), Step.of("wanda", level="1:4"))),
            "layers.0.ffn": Option((Step.of("sparsegpt", level=0.5), Step.of("gptq", weights=8))),
            "layers.1.attention": Option((Step.of("skip"),)),
        }
    ).to_json()
    figures = candidate_figures(candidate, UNITS[:4])
    zeros = (200 * 0.75 + 600 * 0.5) / (1000 + 200 + 600)
    assert figures["mean_sparsity"] == pytest.approx(zeros, abs=1e-4)
    assert "25% zeros" in figures_text(figures)


def test_replaced_attention_is_counted() -> None:
    mixed = Option((Step.of("replace", mixer="window"), Step.of("gptq", weights=8)))
    names = ("layers.0.attention", "layers.1.attention")
    figures = candidate_figures(Candidate.of(dict.fromkeys(names, mixed)).to_json())
    assert figures["replaced_units"] == 2
    assert "attention replaced in 2" in figures_text(figures)
    assert "replaced_units" not in candidate_figures(CANDIDATE)


def test_a_loss_beside_the_usual_one_is_named() -> None:
    figures = {"tokens": 5000, "lr": 1e-3, "temperature": 2.0, "loss": "logits"}
    assert figures_text(figures) == "5,000 tokens at lr 0.001, temperature 2"
    figures["loss"] = "logits+hidden"
    assert figures_text(figures) == "5,000 tokens at lr 0.001, temperature 2, loss logits+hidden"


def test_without_units_every_unit_counts_the_same() -> None:
    figures = candidate_figures(CANDIDATE)
    assert figures["mean_bits"] == pytest.approx((4 + 8 + 32 + 32) / 4)
    assert "heads_kept" not in figures


def test_under_grouped_queries_keep_counts_groups() -> None:
    grouped = Unit(
        "layers.0.attention",
        "attention",
        (Site("q", "query", 100, 1, bias=False),),
        heads=8,
        kv_heads=2,
        head_dim=4,
    )
    option = Candidate.of({"layers.0.attention": Option((Step.of("heads", keep=1),))})
    assert candidate_figures(option.to_json(), [grouped])["heads_kept"] == 0.5


def test_all_skipped() -> None:
    gone = Candidate.of({"layers.0.ffn": Option((Step.of("skip"),))}).to_json()
    figures = candidate_figures(gone, UNITS)
    assert "mean_bits" not in figures
    assert figures["removed_share"] == 1.0


def test_text() -> None:
    text = figures_text(candidate_figures(CANDIDATE, UNITS))
    assert text.startswith(
        "mean 15.2 bits · 1 unit skipped · 35% of weights removed · 50,000 tokens"
    )
    assert figures_text(candidate_figures(Candidate.of({}).to_json())) == "not distilled"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({}, "dense"),
        ({"skip": {}}, "skip"),
        (
            {"heads": {"keep": 6}, "gptq": {"activations": 8, "group": 0, "weights": 8}},
            "heads 6 + gptq w8 a8",
        ),
        ({"groups": {"keep": 2}, "gptq": {"weights": 4}}, "groups 2 + gptq w4"),
        ({"replace": {"mixer": "window"}, "gptq": {"weights": 4}}, "window + gptq w4"),
        ({"rtn": {"group": 32, "weights": 4, "activations": 32}}, "rtn w4 g32"),
        ({"other": {"alpha": 0.5}}, "other alpha=0.5"),
    ],
)
def test_options_are_short(option: dict[str, dict[str, object]], text: str) -> None:
    assert summarise_option(option) == text


def test_shares_and_overshoots() -> None:
    assert format_share(1.3, 6.5) == "20%"
    assert format_share(0.05, 1.0) == "5.0%"
    assert format_share(None, 1.0) == ""
    assert format_share(1.0, 0) == ""
    assert format_excess({"latency_ms": 0.123, "size_bytes": 1.5}) == "latency +12%, size ×2.5"
    assert format_excess({"peak_memory_bytes": float("inf")}) == "peak memory unmeasured"
    assert format_excess({"quality": 0.02}) == "quality −2%"
    perplexity = Scale("perplexity", True)
    assert format_excess({"quality": 0.2}, perplexity) == "perplexity +25%"
    assert format_excess({"quality": 0.8, "latency_ms": 0.1}, perplexity) == (
        "perplexity ×5, latency +10%"
    )


def test_small_qualities_keep_four_digits() -> None:
    """1 / perplexity: 97 and 100 must not look alike."""
    shown = [format_quality(value) for value in (None, 0.0, 1 / 97, 1 / 100, 0.9016)]
    assert shown == ["–", "0.000", "0.01031", "0.01000", "0.902"]
