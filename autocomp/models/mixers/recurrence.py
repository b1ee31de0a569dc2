"""One gated linear recurrence behind many mixers, in three forms that compute the same.

    S_t = diag(a_t) S_{t-1} + k_t v_tᵀ        o_t = q_t S_t

Linear attention, RetNet, Mamba-2 and RWKV-6 are this with three switches:

- `decay`, log a_t ≤ 0, broadcast to `(B, H, T, K)`: `None` for no decay, `(1, H, 1, 1)` a constant
  per head, `(B, H, T, 1)` a scalar per token, `(B, H, T, K)` a vector per token;
- `read_before`: a token reads S_{t-1} instead of S_t (RWKV);
- `diagonal`: the weight of a token's own k_t v_tᵀ in what it reads: 1, 0, or a vector `(H, K)`.

`recurrent` goes token by token, `chunkwise` is parallel in time and linear in T (training, prefill,
and decoding from a state), `quadratic` writes out every pair (the reference). A column of ones
appended to `value` gives the sum of the weights, for mixers that divide by it.

Decays are summed in float32 at least, and only ever over the tokens between two others:
exp(b_t)·exp(-b_s) of running sums b overflows as soon as decays are strong. Vector decays are
floored at `VECTOR_FLOOR`, in every form, which keeps blocks of 16 tokens in the range of float32.
No branch depends on T, so that the export to ONNX stays dynamic in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from autocomp.models.mixers.protocol import split_dim

CHUNK = 64
BLOCK = 16
VECTOR_FLOOR = -5.0

Diagonal = float | Tensor


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    read_before: bool = False,
    diagonal: Diagonal = 1.0,
) -> tuple[Tensor, Tensor]:
    """Token by token.

    Args:
        query, key: `(B, H, T, K)`.
        value: `(B, H, T, V)`.
        decay: log a_t, see the module.
        state: S before the first token, `(B, H, K, V)`; zero if `None`.

    Returns:
        What is read, `(B, H, T, V)`, and S behind the last token.
    """
    own = _own(query, key, value, diagonal)
    if state is None:
        state = _empty(key, value)
    kept = None if decay is None else _steps(decay, query).exp().to(query.dtype)
    read = []
    for token in range(query.shape[2]):
        carried = state
        if kept is not None:
            carried = kept[:, :, min(token, kept.shape[2] - 1), :, None] * state
        read.append(query[:, :, token, None, :] @ (state if read_before else carried))
        state = carried + key[:, :, token, :, None] * value[:, :, token, None, :]
    return torch.cat(read, dim=2) + own, state


def quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    read_before: bool = False,
    diagonal: Diagonal = 1.0,
    bidirectional: bool = False,
) -> Tensor:
    """Every pair of tokens, O(T²K): the reference. Arguments and result as of `recurrent`."""
    tokens = query.shape[2]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril(-1)
    if decay is None:
        scores = query @ key.transpose(-1, -2)
    else:
        steps = _steps(decay, query).expand(-1, -1, tokens, -1).transpose(-1, -2)
        weights = segment_sums(steps, read_before=read_before).exp().to(query.dtype)
        pairs = query[:, :, :, None, :] * key[:, :, None, :, :]
        scores = (pairs * weights.permute(0, 1, 3, 4, 2)).sum(-1)
    out = torch.where(earlier, scores, 0.0) @ value + _own(query, key, value, diagonal)
    if bidirectional:
        query, key, value = (tensor.flip(2) for tensor in (query, key, value))
        back = None if decay is None else decay.flip(2)
        turned = quadratic(query, key, value, back, read_before=read_before, diagonal=0.0)
        out = out + turned.flip(2)
    return out


def chunkwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    read_before: bool = False,
    diagonal: Diagonal = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Pairs within chunks, states between them: O(T·chunk). As `recurrent`, and equal to it.

    T need not be a multiple of `chunk`. A sequence shorter than a chunk is one chunk of its length,
    so that one token costs what `recurrent` takes for it, in an exported graph too.

    The limit: with decay, states are carried over the chunks by one product that takes
    (T / chunk)²·K·V multiplications a head. At K = 64 that is as much at T = 4096 as the pairs take
    by their values, T·chunk·V, and beyond it quadratic in T.
    """
    tokens = query.shape[2]
    vector = decay is not None and decay.shape[-1] > 1
    chunk = shorter(tokens, chunk)
    block = shorter(chunk, BLOCK)
    if vector:  # a whole number of blocks
        chunk = (chunk + block - 1) // block * block
    chunks = (tokens + chunk - 1) // chunk  # of positive numbers: ONNX divides towards zero
    missing = chunks * chunk - tokens
    own = _own(query, key, value, diagonal)
    q, k, v = (
        split_dim(pad(tensor, (0, 0, 0, missing)), 2, (chunks, chunk))
        for tensor in (query, key, value)
    )
    pairs = _pairs(q, k, decay, (tokens, missing, chunk, block), read_before)
    written = pairs.writing.transpose(-1, -2) @ v  # (B, H, N, K, V): what each chunk adds
    start = (_empty(key, value) if state is None else state.to(q.dtype))[:, :, None]
    states = _carried(torch.cat([start, written], dim=2), pairs.totals)
    out = pairs.scores @ v + pairs.reading @ states[:, :, :-1]
    return out.flatten(2, 3)[:, :, :tokens] + own, states[:, :, -1]


def bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None = None,
    *,
    read_before: bool = False,
    diagonal: Diagonal = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Over the sequence in both directions, a token's own term once: `(B, H, T, V)`.

    Without decay that is one product of sums over all tokens.
    """
    if decay is None:
        out = query @ (key.transpose(-1, -2) @ value)
        return out if _is(diagonal, 1.0) else out + _own(query, key, value, diagonal - 1.0)
    forward, _ = chunkwise(
        query, key, value, decay, read_before=read_before, diagonal=diagonal, chunk=chunk
    )
    query, key, value, decay = (tensor.flip(2) for tensor in (query, key, value, decay))
    backward, _ = chunkwise(
        query, key, value, decay, read_before=read_before, diagonal=0.0, chunk=chunk
    )
    return forward + backward.flip(2)


def shorter(one: int, other: int) -> int:
    """The smaller of two lengths; in an export, of whatever length it is called with."""
    length: int = torch.sym_min(one, other)  # type: ignore[no-untyped-call]
    return length


def segment_sums(steps: Tensor, *, read_before: bool = False) -> Tensor:
    """`(…, L)` → `(…, L, L)`: [t, s] = sum of the steps behind s up to t, or to before t.

    Where s is not earlier than t it is 0: those pairs are for the caller to mask.
    """
    length = steps.shape[-1]
    later = torch.ones(length, length, dtype=steps.dtype, device=steps.device).triu(1)
    sums = (steps[..., None, :] * later).cumsum(-1).transpose(-1, -2)
    return pad(sums, (0, 0, 1, 0))[..., :-1, :] if read_before else sums


class _Pairs(NamedTuple):
    """What chunks compute with: N chunks of L tokens."""

    scores: Tensor
    """`(B, H, N, L, L)`: strictly earlier tokens of the chunk."""
    reading: Tensor
    """`(B, H, N, L, K)`: queries, for the state in front of the chunk."""
    writing: Tensor
    """`(B, H, N, L, K)`: keys, for the state behind it."""
    totals: Tensor | None
    """`(B, H, K or 1, N)`: log decay over each chunk."""


def _pairs(
    q: Tensor, k: Tensor, decay: Tensor | None, sizes: tuple[int, ...], read_before: bool
) -> _Pairs:
    tokens, missing, chunk, block = sizes
    if decay is None:
        return _Pairs(_earlier(q @ k.transpose(-1, -2)), q, k, None)
    constant = decay.shape[2] == 1
    steps = _steps(decay, q)
    padded = split_dim(pad(steps.expand(-1, -1, tokens, -1), (0, 0, 0, missing)), 2, (-1, chunk))
    if decay.shape[-1] > 1:
        return _vector_pairs(q, k, padded, (chunk // block, block), read_before)
    flat = padded.squeeze(-1)  # (B or 1, H, N, L)
    pattern = steps.expand(-1, -1, chunk, -1).transpose(-1, -2) if constant else flat
    within = segment_sums(pattern, read_before=read_before).exp().to(q.dtype)
    return _Pairs(
        _earlier((q @ k.transpose(-1, -2)) * within),
        q * _so_far(pattern, read_before).exp().to(q.dtype)[..., None],
        k * _to_come(flat).exp().to(q.dtype)[..., None],
        flat.sum(-1)[:, :, None],
    )


def _vector_pairs(
    q: Tensor, k: Tensor, steps: Tensor, sizes: tuple[int, int], read_before: bool
) -> _Pairs:
    """Blocks of up to 16 tokens: the decay between two tokens is cut at the reader's block.

    The exponents are then those of a block at most, half of it to each side of its middle.
    """
    blocks, block = sizes
    cut = split_dim(steps, 3, (blocks, block)).transpose(-1, -2)  # (B, H, N, blocks, K, block)
    so_far = _so_far(cut, read_before).transpose(-1, -2)
    to_come = _to_come(cut).transpose(-1, -2)
    middle = _so_far(cut, True)[..., block // 2][..., None, :]  # (B, H, N, blocks, 1, K)
    totals = cut.sum(-1).transpose(-1, -2)  # (B, H, N, K, blocks)

    index = torch.arange(blocks, device=q.device)
    # from the end of block j to the start of block i: the blocks between; back over i where j = i
    between = segment_sums(totals, read_before=True)
    between = between - torch.where(index[:, None] == index, totals[..., None, :], 0.0)
    between = between.permute(0, 1, 2, 4, 5, 3)[..., None, :]  # (B, H, N, i, j, 1, K)
    exponents = middle[:, :, :, :, None] + between + to_come[:, :, :, None]

    q_cut, k_cut = split_dim(q, 3, (blocks, block)), split_dim(k, 3, (blocks, block))
    asking = q_cut * (so_far - middle).exp().to(q.dtype)
    asked = k_cut[:, :, :, None] * exponents.exp().to(q.dtype)  # (B, H, N, i, j, block, K)
    scores = asking @ asked.flatten(4, 5).transpose(-1, -2)

    before = _so_far(totals, True).transpose(-1, -2)[..., None, :]
    behind = _to_come(totals).transpose(-1, -2)[..., None, :]
    return _Pairs(
        _earlier(scores.flatten(3, 4)),
        (q_cut * (so_far + before).exp().to(q.dtype)).flatten(3, 4),
        (k_cut * (to_come + behind).exp().to(q.dtype)).flatten(3, 4),
        totals.sum(-1).transpose(-1, -2),
    )


def _carried(added: Tensor, totals: Tensor | None) -> Tensor:
    """States `(B, H, N + 1, K, V)` behind each chunk, from the first state and what each adds."""
    if totals is None:
        return added.cumsum(2)
    weights = segment_sums(pad(totals, (1, 0))).exp().tril().to(added.dtype)
    if totals.shape[2] == 1:
        return split_dim((weights[:, :, 0] @ added.flatten(3)), 3, added.shape[3:])
    return (weights @ added.transpose(2, 3)).transpose(2, 3)


def _so_far(steps: Tensor, read_before: bool) -> Tensor:
    """`(…, L)`: the sum of the steps up to each, or before it."""
    sums = steps.cumsum(-1)
    return pad(sums, (1, 0))[..., :-1] if read_before else sums


def _to_come(steps: Tensor) -> Tensor:
    """`(…, L)`: the sum of the steps behind each; no difference of sums, which would cancel."""
    length = steps.shape[-1]
    return steps @ torch.ones(length, length, dtype=steps.dtype, device=steps.device).tril(-1)


def _earlier(scores: Tensor) -> Tensor:
    """Without the pairs that must not meet, whatever stands there."""
    length = scores.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril(-1)
    return torch.where(seen, scores, 0.0)


def _steps(decay: Tensor, query: Tensor) -> Tensor:
    steps = decay.to(torch.promote_types(query.dtype, torch.float32))
    return steps.clamp_min(VECTOR_FLOOR) if decay.shape[-1] > 1 else steps


def _own(query: Tensor, key: Tensor, value: Tensor, diagonal: Diagonal) -> Tensor:
    """A token's own term, `(B, H, T, V)`."""
    if isinstance(diagonal, Tensor):
        query = query * diagonal[:, None, :]
    elif diagonal == 0.0:
        return value.new_zeros(())
    elif diagonal != 1.0:
        query = query * diagonal
    return (query * key).sum(-1, keepdim=True) * value


def _empty(key: Tensor, value: Tensor) -> Tensor:
    batch, heads, _, width = key.shape
    return key.new_zeros(batch, heads, width, value.shape[-1])


def _is(diagonal: Diagonal, number: float) -> bool:
    return not isinstance(diagonal, Tensor) and diagonal == number
