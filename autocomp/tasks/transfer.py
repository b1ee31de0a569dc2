"""Texts without labels that students are distilled on beside the distil split. No torch.

What a teacher says of such texts is as good a lesson as what it says of labelled ones (Hinton,
Vinyals & Dean, 2015, arXiv:1503.02531, section 1), and a few hundred labelled texts seen again and
again are learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocomp.core.errors import DataError
from autocomp.spec.task import DataSection, TransferSection
from autocomp.tasks.data import Examples
from autocomp.tasks.readers import read_records
from autocomp.tasks.splits import Indices, uncounted


def transfer_texts(
    data: DataSection, examples: Examples, distil: Indices, seed: int
) -> Sequence[str]:
    """As many different texts as `data.transfer` asks for, in a seeded order; none if it does not.

    Without a source of its own these are further lines of the distil split's texts, so nothing of
    a text that the search or the report looks at, nor of those candidates are screened on
    (`splits.uncounted`). No text equals an example of any split.

    Args:
        distil: positions of the distil split in `examples`.

    Raises:
        DataError: if there are too few, or the source cannot be read.
    """
    wanted = data.transfer
    if wanted is None:
        return ()
    if wanted.source is None:
        lending = distil[uncounted(len(distil)) :]
        origin = f"the distil split of {examples.origin}, beyond task.data.lines: {data.lines},"
        found = [line for i in lending for line in examples.further[i]]
    else:
        origin, found = wanted.source, _texts_of(data, wanted)
    known = set(examples.contents)
    texts = [text for text in dict.fromkeys(found) if text not in known]
    if len(texts) < wanted.examples:
        raise DataError(
            f"{origin} has {len(texts)} texts that are no examples yet, but task.data.transfer "
            f"asks for {wanted.examples}. Lower task.data.transfer.examples, or give more text"
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order[: wanted.examples]]


def _texts_of(data: DataSection, wanted: TransferSection) -> list[str]:
    section = wanted.model_dump(include={"source", "format", "subset", "split", "text"})
    contents = read_records(data.model_copy(update=section), wanted.text, None).contents
    return [text.strip() for text in contents if isinstance(text, str) and text.strip()]
