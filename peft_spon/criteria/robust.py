# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import State
from .relative import relative_to_mean
from .wina import Wina


@dataclass(frozen=True)
class Robust(Wina):
    """
    Keep x_i when s_i > threshold * mean(s), s_i = |x_i| * ||W_:,i||, mean over the token. Ours.

    A few massive activations make a token's root mean square several times as large, and with it the bound of
    `weighted` for all its other entries; the mean hardly moves.
    """

    name: ClassVar[str] = "robust"
    selects: ClassVar[str] = "threshold"

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return relative_to_mean(super().score(z, state))

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        return {"column_scale": state["column_scale"], "relative": 1}
