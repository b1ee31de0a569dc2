"""`cost_table` where a model generates: milliseconds a token, predicted against measured.

The space of `search_spaces/llama_decode_cpu.yaml` on a random Llama of the shape it is meant for
(6 layers of 192, 6 heads on 2 groups, feed-forward 512, 4,096 tokens): latency does not depend on
the values of weights. A token is that in the middle of the generation, after a prompt of 128.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from benchmarks.cost_table import figures_of

SPEC = Path(__file__).parents[1] / "search_spaces" / "llama_decode_cpu.yaml"
CANDIDATES = 24


def run(options: Any) -> dict[str, float]:
    """Errors over the candidates."""
    return measure("onnxruntime")


def measure(runtime: str) -> dict[str, float]:
    """The same of any runtime."""
    import time

    from autocomp.api.plan import make_plan
    from autocomp.targets import make_target
    from autocomp.targets.profile import check_table

    with TemporaryDirectory(prefix="autocomp-benchmark-") as directory:
        scratch = Path(directory)
        model = random_llama(scratch / "model")
        text = scratch / "text.txt"
        text.write_text("a line of text\n" * 2000, encoding="utf-8")
        sources = {"model.source": str(scratch / "model"), "task.data.source": str(text)}
        sources["target.runtime"] = runtime
        plan = make_plan(SPEC, sources)
        target: Any = make_target(plan.spec.target)
        target.record_reference()
        skeleton = target.export(model, plan.units, Tokens())
        inputs = {k: v.numpy() for k, v in Tokens().example_inputs(1, 128).items()}
        start = time.perf_counter()
        table = target.profile(skeleton, plan.units, plan.formats, inputs)
        seconds = time.perf_counter() - start
        accuracy = check_table(
            table, target, skeleton, plan.units, plan.formats, inputs, candidates=CANDIDATES
        )
    return figures_of(accuracy, seconds, table)


class Tokens:
    """What exporting asks of a task: ids without a mask."""

    dynamic_axes: ClassVar = {"input_ids": {0: "batch", 1: "sequence"}}

    def example_inputs(self, batch: int, sequence: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(3, 4096, (batch, sequence), generator=generator)}


def random_llama(path: Path) -> Any:
    """The random Llama, also written to `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    model.config.use_cache = False
    return model
