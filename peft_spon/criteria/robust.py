# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

from .weighted import Weighted


@dataclass(frozen=True)
class Robust(Weighted):
    """
    Keep x_i when s_i > threshold * mean(s), s_i = |x_i| * ||W_:,i||, mean over the token. Ours.

    A few massive activations make a token's root mean square several times as large, and with it the bound of
    `weighted` for all its other entries; the mean hardly moves.
    """

    name: ClassVar[str] = "robust"
    order: ClassVar[int] = 1
