# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Criterion, Spec, State


@dataclass(frozen=True)
class LaRoSA(Criterion):
    """
    S(x) = Qᵀ topk(Q x): the k largest entries of every token in the basis of its layer's principal input directions.

    The rows of Q are the eigenvectors of E[x xᵀ], from calibration; layers that read the same input share one Q.
    LaRoSA, arXiv 2507.01299, section 3, with Q applied at run time (the paper absorbs it into the weights around the
    norms). Until calibrated it is plain `topk`.

    Args:
        max_width (`int`, *optional*, defaults to 8192): wider inputs keep plain top-k (the paper rotates the inputs of
            attention and MLP only); a rotation costs in x in products and weights.
    """

    name: ClassVar[str] = "larosa"
    selects: ClassVar[str] = "topk"

    max_width: int = 8192

    def __post_init__(self):
        if isinstance(self.max_width, bool) or not isinstance(self.max_width, int) or self.max_width < 0:
            raise ValueError(f"Criterion 'larosa': max_width is {self.max_width!r}; use a whole number, e.g. 8192.")

    def state(self, n_in: int, n_out: int) -> dict[str, Spec]:
        return {"rotation": Spec((n_in, n_in), from_data=True)} if n_in <= self.max_width else {}

    def prepare(self, weight: torch.Tensor, moments: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if moments is None:
            return {}
        return {"rotation": torch.linalg.eigh(moments.double()).eigenvectors.T.float().contiguous()}

    def encode(self, x: torch.Tensor, state: State) -> torch.Tensor:
        return x @ state["rotation"].T.to(x.dtype) if "rotation" in state else x

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return z.detach().float().abs()

    def decode(self, kept: torch.Tensor, z: torch.Tensor, state: State) -> torch.Tensor:
        return kept @ state["rotation"].to(kept.dtype) if "rotation" in state else kept

    def fold(self, weight: torch.Tensor, state: State) -> tuple[torch.Tensor, None]:
        return (weight @ state["rotation"].T.to(weight.dtype) if "rotation" in state else weight), None
