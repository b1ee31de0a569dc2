"""Load a model or its tokenizer from a local directory through transformers.

Nothing is fetched, no code of the model is run unless asked, only safetensors are read, and
transformers' progress bars and reports are silenced while it happens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from autocomp.core.errors import ModelError
from autocomp.models.conversion import to_linear
from autocomp.models.discover import find_units
from autocomp.models.sources import read_config, read_tensor_shapes

logger = logging.getLogger(__name__)

_CLASSES: dict[str, Any] = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "language-modeling": transformers.AutoModelForCausalLM,
}


def load_model(
    path: Path, task: str, num_labels: int | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The task model in `path`: float32, evaluation mode, scaled-dot-product attention, no cache.

    A head the checkpoint does not hold, or holds for another number of labels, is initialised anew,
    the same on every machine. Linear layers that transformers stores otherwise (GPT-2) are plain
    ones here: save such a model by `save_model`. `config.use_cache` is switched off: autocomp
    evaluates whole sequences.

    Raises:
        ModelError: when files are missing or damaged, the layout is unknown, the task does not
            suit the model, remote code would be needed, or weights outside the head are missing.
    """
    config = read_config(path)
    if config.get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"{path}: this model comes with its own code (auto_map in config.json). If you trust "
            f"it, set model.trust_remote_code: true"
        )
    units = find_units(config, read_tensor_shapes(path), task, num_labels)
    arguments: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model, info = _CLASSES[task].from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=num_labels is not None,
                output_loading_info=True,
                **arguments,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: transformers cannot load it for {task}: {reason}") from error
    head = {f"{site.name}.{part}" for site in units[-1].sites for part in ("weight", "bias")}
    absent = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    if lost := sorted(absent - head):
        raise ModelError(
            f"{path}: {len(lost)} weights outside the head are not in the checkpoint: "
            f"{', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}"
        )
    if absent:
        logger.info("%s: new head (%s)", path, ", ".join(sorted(absent)))
    model.config.use_cache = False
    to_linear(model)
    return model.eval()  # type: ignore[no-any-return]


def task_class(task: str) -> Any:
    """transformers' auto class of a task."""
    return _CLASSES[task]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in `path`.

    Raises:
        ModelError: when there is none or it cannot be loaded.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        raise ModelError(f"{path}: no tokenizer.json; text tasks need the model's tokenizer")
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: transformers cannot load the tokenizer: {reason}") from error


def load_tokenizer_files(path: Path) -> Any:
    """The tokenizer that `tokenizer.json` in `path` describes, whatever model it was made for.

    Raises:
        ModelError: when it cannot be loaded.
    """
    with quiet():
        try:
            return transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: transformers cannot load the tokenizer: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log below errors and its progress bars inside the block."""
    control: Any = transformers.utils.logging
    level, bars = control.get_verbosity(), control.is_progress_bar_enabled()
    control.set_verbosity_error()
    control.disable_progress_bar()
    try:
        yield
    finally:
        control.set_verbosity(level)
        if bars:
            control.enable_progress_bar()
