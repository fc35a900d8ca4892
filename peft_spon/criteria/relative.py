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
        return relative_to_rms(z.detach().float().abs())

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        return {"relative": 2}


def relative_to_rms(score: torch.Tensor) -> torch.Tensor:
    """Scores (..., in) divided, in place, by their root mean square over the last axis; all-zero tokens stay zero."""
    rms = torch.linalg.vector_norm(score, dim=-1, keepdim=True) * score.shape[-1] ** -0.5
    return score.div_(rms.clamp_min_(torch.finfo(torch.float32).tiny))


def relative_to_mean(score: torch.Tensor) -> torch.Tensor:
    """Scores (..., in) divided, in place, by their mean over the last axis; all-zero tokens stay zero."""
    return score.div_(score.mean(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny))
