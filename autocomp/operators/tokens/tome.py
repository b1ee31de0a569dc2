"""Token merging: pairs of similar patch tokens become one, by bipartite soft matching on the keys.

As published: tokens at even places look for the most similar token at an odd place (cosine of the
keys, averaged over the heads), the best `r` pairs are merged by an average weighted with the number
of patches each stands for. Left out: proportional attention (adding log size to the attention
scores), which the paper itself drops for models that are trained afterwards; `models/tokens.py` and
`targets/token_nodes.py` carry the merge out.
"""

from __future__ import annotations

from autocomp.operators.tokens.reducer import TokenReducer


class Tome(TokenReducer):
    """Merge floor(ratio · patches) patch tokens behind an attention sublayer."""

    name = "tome"
    summary = "Merge similar patch tokens of an image behind an attention sublayer."
    paper = "Bolya et al., 2022, Token Merging: Your ViT But Faster, arXiv:2210.09461"
    choices = "tokens.method: tome; tokens.ratios: shares of the patches merged, 0 to 0.5"
    version = 1
    most = 0.5


OPERATOR = Tome()
