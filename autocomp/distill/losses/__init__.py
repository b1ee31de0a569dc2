"""What a student may learn from its teacher: one loss a file. See `protocol` for how to add one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocomp.core.registry import Registry

if TYPE_CHECKING:
    from autocomp.distill.losses.protocol import Loss

LOSSES: Registry[Loss] = Registry(
    "losses",
    {
        "hidden": "autocomp.distill.losses.hidden:HIDDEN",
        "logits": "autocomp.distill.losses.logits:LOGITS",
        "relations": "autocomp.distill.losses.relations:RELATIONS",
        "reverse_kl": "autocomp.distill.losses.reverse_kl:REVERSE_KL",
        "task": "autocomp.distill.losses.task:TASK",
        "top_k": "autocomp.distill.losses.top_k:TOP_K",
    },
)


def leads(name: str) -> bool:
    """Whether a sum may begin with this loss: it compares the outputs, and nothing else."""
    return LOSSES.get(name).reads == ("logits",)
