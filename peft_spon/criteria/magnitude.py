# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Criterion, State


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Keep x_i when |x_i| > threshold, one calibrated threshold per layer. TEAL, arXiv 2408.14690, section 4."""

    name: ClassVar[str] = "magnitude"

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return z.detach().float().abs()

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        return {}
