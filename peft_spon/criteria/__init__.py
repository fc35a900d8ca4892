# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""S: which entries of a linear layer's input are kept.

One file per method; to add one, write its file and list it here.
"""

from .base import Criterion, entries_kept, keep_above, keep_top_k
from .magnitude import Magnitude
from .relative import Relative
from .topk import TopK
from .weighted import Weighted
from .wina import Wina


CRITERIA: dict[str, type[Criterion]] = {c.name: c for c in (Magnitude, Relative, TopK, Wina, Weighted)}

__all__ = [
    "CRITERIA",
    "Criterion",
    "Magnitude",
    "Relative",
    "TopK",
    "Weighted",
    "Wina",
    "entries_kept",
    "keep_above",
    "keep_top_k",
]
