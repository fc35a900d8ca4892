# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Criterion


@dataclass(frozen=True)
class Wina(Criterion):
    """Keep the k largest |x_i| * ||W_:,i|| of every token. WINA, arXiv 2505.19427, section 3, without its rotation.

    Args:
        norm (`float`, *optional*, defaults to 2.0): order of the column norm; 1.0 is WAS (EMNLP 2025).
    """

    name: ClassVar[str] = "wina"
    uses_threshold: ClassVar[bool] = False
    uses_column_norms: ClassVar[bool] = True

    norm: float = 2.0

    def __post_init__(self):
        if not self.norm > 0:
            raise ValueError(f"Criterion '{self.name}': norm is {self.norm!r}; use a number above 0, e.g. 2.0.")

    def score(self, x: torch.Tensor, column_norms: torch.Tensor | None = None) -> torch.Tensor:
        return (x.detach().float() * column_norms).abs_()

    def norm_of_columns(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float().norm(p=self.norm, dim=0)
