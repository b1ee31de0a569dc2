"""The Python interface: the same verbs as the command line.

    import autocomp as ac
    study = ac.search("search_spaces/quickstart.yaml")
    study.pick(latency="35%", size="30%").export("out/")

Everything heavy is imported inside the functions, so that checking a spec needs no torch.
"""

from __future__ import annotations

from autocomp.api.check import CheckReport, check
from autocomp.api.listing import list_kind
from autocomp.api.opened import OpenStudy, Picked, open_study
from autocomp.api.profile import profile
from autocomp.api.search import search

__all__ = [
    "CheckReport",
    "OpenStudy",
    "Picked",
    "check",
    "list_kind",
    "open_study",
    "profile",
    "search",
]
