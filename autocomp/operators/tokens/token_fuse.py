"""Token fusion: what the class token attends to least becomes one token, the others stay.

EViT as published, criterion and fused token; the weights of the fused token are brought to a sum of
one. `models/tokens.py` and `targets/token_nodes.py` carry it out.
"""

from __future__ import annotations

from autocomp.operators.tokens.reducer import TokenReducer


class TokenFuse(TokenReducer):
    """Replace floor(ratio · patches) patch tokens by their mean, weighted by attention."""

    name = "token_fuse"
    summary = "Fuse the patch tokens of an image that the class token attends to least into one."
    paper = "Liang et al., 2022, EViT: Expediting Vision Transformers, arXiv:2202.07800"
    choices = "tokens.method: token_fuse; tokens.ratios: shares of the patches fused, below 1"
    version = 1
    most = 0.95


OPERATOR = TokenFuse()
