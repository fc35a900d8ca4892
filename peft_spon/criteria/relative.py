# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Criterion, State


@dataclass(frozen=True)
class Relative(Criterion):
    """Keep x_i when |x_i| > threshold * rms(x), rms over the token. Ours: `magnitude` made scale-free."""

    name: ClassVar[str] = "relative"

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return relative_to_mean(z.detach().float().abs(), 2)

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        return {"relative": 2}


def relative_to_mean(score: torch.Tensor, order: int) -> torch.Tensor:
    """Scores (..., in) divided, in place, by their mean (order 1) or root mean square (2) over the last axis; all-zero
    tokens stay zero."""
    if order == 1:
        mean = score.mean(-1, keepdim=True)
    else:
        mean = torch.linalg.vector_norm(score, dim=-1, keepdim=True) * score.shape[-1] ** -0.5
    return score.div_(mean.clamp_min_(torch.finfo(torch.float32).tiny))
