# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

import torch

from .relative import relative_to_rms
from .wina import Wina


@dataclass(frozen=True)
class Weighted(Wina):
    """Keep x_i when s_i > threshold * rms(s), s_i = |x_i| * ||W_:,i||. Ours: WINA with a threshold for its sort."""

    name: ClassVar[str] = "weighted"
    uses_threshold: ClassVar[bool] = True

    def score(self, x: torch.Tensor, column_norms: torch.Tensor | None = None) -> torch.Tensor:
        return relative_to_rms(super().score(x, column_norms))
