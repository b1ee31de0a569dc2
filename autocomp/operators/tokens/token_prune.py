"""Token pruning: keep the patch tokens the class token attends to, drop the others.

The criterion is EViT's: the class token's attention, averaged over the heads, in the sublayer just
passed. The order of those that stay is kept; `token_fuse` also makes one of the dropped ones.
`models/tokens.py` and `targets/token_nodes.py` carry it out.
"""

from __future__ import annotations

from autocomp.operators.tokens.reducer import TokenReducer


class TokenPrune(TokenReducer):
    """Drop floor(ratio · patches) patch tokens behind an attention sublayer."""

    name = "token_prune"
    summary = "Drop the patch tokens of an image that the class token attends to least."
    paper = "Liang et al., 2022, EViT: Expediting Vision Transformers, arXiv:2202.07800"
    choices = "tokens.method: token_prune; tokens.ratios: shares of the patches dropped, below 1"
    version = 1
    most = 0.95


OPERATOR = TokenPrune()
