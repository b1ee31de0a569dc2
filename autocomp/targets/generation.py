"""Running a graph that has a key-value cache: what it is fed, and greedy generation. numpy alone.

A graph with a cache reads `past_key_values.N.key` and `.value` and gives `present.N.key` and
`.value` back, float32 or int8 `(B, kv heads, tokens, D)`; what a run gives, the next one reads.
Where a mixer replaced attention these are `past_state.N.NAME` and `present_state.N.NAME`, float32
`(B, …)` of constant size, zero before the first token. A graph whose positions no cache counts has
`past_length` and `present_length`, int64 `(1,)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PAST = "past_key_values."
PRESENT = "present."
PAST_STATE = "past_state."
PRESENT_STATE = "present_state."
PAST_LENGTH = "past_length"
PRESENT_LENGTH = "present_length"
_CARRIED = {PAST: PRESENT, PAST_STATE: PRESENT_STATE, PAST_LENGTH: PRESENT_LENGTH}


def feeds(
    session: Any, inputs: Mapping[str, Array], batch: int | None = None, past: int = 0
) -> dict[str, Array]:
    """What a session reads: of `inputs` what it asks for, and a made-up cache if it has one.

    The cache holds `past` tokens of `batch` examples (those of the first input unless given); empty
    it is that of a prompt, and its values make no difference to speed. States are zero.
    """
    values = session.get_inputs()
    if batch is None:
        batch = len(next(iter(inputs.values())))
    made = _cache(values, batch, past)
    return {
        value.name: made[value.name] if value.name in made else inputs[value.name]
        for value in values
    }


def _cache(values: Iterable[Any], batch: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for value in values:
        if value.name.startswith(PAST):
            shape = (batch, value.shape[1], tokens, value.shape[3])
            if getattr(value, "type", "") == "tensor(int8)":
                made[value.name] = rng.integers(-127, 128, shape, dtype=np.int8)
            else:
                made[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif value.name.startswith(PAST_STATE):
            made[value.name] = np.zeros((batch, *value.shape[1:]), np.float32)
        elif value.name == PAST_LENGTH:
            made[value.name] = np.array([tokens], np.int64)
    return made


def carried(names: Iterable[str]) -> dict[str, str]:
    """What a run reads of the one before, of inputs of these names → the output that gives it."""
    return {
        name: present + name.removeprefix(past)
        for name in names
        for past, present in _CARRIED.items()
        if name.startswith(past)
    }


def first_tokens(inputs: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Inputs with exactly `count` tokens per example: cut, or repeated from the start."""
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": ids[:, np.arange(count) % ids.shape[1]]}


def generate(session: Any, inputs: Mapping[str, Array], tokens: int) -> Array:
    """Continue each example greedily by `tokens` tokens, int64 `(B, tokens)`, with the cache.

    `session` is one of a graph with a cache; `inputs` has `input_ids` `(B, T)`, the prompts.
    """
    feed, new = feeds(session, inputs), []
    pasts = carried(value.name for value in session.get_inputs())
    names = ["logits", *pasts.values()]
    for _ in range(tokens):
        logits, *present = session.run(names, feed)
        new.append(logits[:, -1].argmax(axis=-1)[:, None])
        feed = {"input_ids": new[-1], **dict(zip(pasts, present, strict=True))}
    return np.concatenate(new, axis=1)
