# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Criterion, Spec, State


@dataclass(frozen=True)
class Wina(Criterion):
    """Keep the k largest |x_i| * ||W_:,i|| of every token. WINA, arXiv 2505.19427, section 3, without its rotation.

    Args:
        norm (`float`, *optional*, defaults to 2.0): order of the column norm; 1.0 is WAS (EMNLP 2025).
    """

    name: ClassVar[str] = "wina"
    selects: ClassVar[str] = "topk"

    norm: float = 2.0

    def __post_init__(self):
        if not self.norm > 0:
            raise ValueError(f"Criterion '{self.name}': norm is {self.norm!r}; use a number above 0, e.g. 2.0.")

    def state(self, n_in: int, n_out: int) -> dict[str, Spec]:
        return {"column_scale": Spec((n_in,))}

    def prepare(self, weight: torch.Tensor, moments: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"column_scale": weight.float().norm(p=self.norm, dim=0)}

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return (z.detach().float() * state["column_scale"]).abs_()
