"""Whether the search finds better candidates than stock samplers, at equal evaluations.

`problem` says what is searched and counts evaluations, `methods` holds the searches, `measures`
what is made of a run. `enumerate` evaluates every candidate of a small space, so that the true
optimum is known (`search_quality_enumerated`); `linears` stitches single linear layers, for a space
far too large for that (`search_quality_large`).
"""
