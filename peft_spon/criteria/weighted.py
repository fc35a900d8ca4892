# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import State
from .relative import relative_to_mean
from .wina import Wina


@dataclass(frozen=True)
class Weighted(Wina):
    """Keep x_i when s_i > threshold * rms(s), s_i = |x_i| * ||W_:,i||. Ours: WINA with a threshold for its sort."""

    name: ClassVar[str] = "weighted"
    selects: ClassVar[str] = "threshold"
    order: ClassVar[int] = 2

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return relative_to_mean(super().score(z, state), self.order)

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        return {"column_scale": state["column_scale"], "relative": self.order}
