"""Benchmarks whose figures the docs quote: `python -m benchmarks [NAME…]`.

Each module has `run(options) -> {figure: value}`; names of figures carry their unit. Results go to
`results/NAME.json`, and `python -m benchmarks.tables` puts them into `docs/benchmarks.md`.
"""

NAMES = (
    "screening",
    "cost_table",
    "cost_table_openvino",
    "cost_table_all_operators",
    "cost_table_decode",
    "cost_table_decode_openvino",
    "operators",
    "library_build",
    "block_memory",
    "peer_solvers",
    "controller",
    "mixers_minilm",
    "mixers_llama",
    "mixers_dinov2",
    "mixer_latency",
    "search_quality_enumerated",
    "search_quality_large",
    "rank_flips",
    "pipeline",
    "rivals_minilm",
    "rivals_minilm_twentieth",
    "rivals_llama",
    "rivals_dinov2",
)
