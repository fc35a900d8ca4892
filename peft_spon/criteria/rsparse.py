# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Criterion, Spec, State


@dataclass(frozen=True)
class RSparse(Criterion):
    """
    S(x) = kept + V Vᵀ (x - kept): what is not kept still passes W's `rank` strongest input directions V.

    W V Vᵀ is the truncated singular value decomposition of W, so W S(x) = W kept + U_r S_r V_rᵀ (x - kept):
    R-Sparse, arXiv 2504.19449, section 3. Kept is x_i when |x_i| * ||W_:,i|| > threshold. The low-rank product is part
    of the budget: at sparsity s the channels get what it leaves of 1 - s.

    Args:
        rank (`int`, *optional*, defaults to 16): columns r of V, at most an eighth of the layer's smaller side;
            r (in + out) weights are read for them at every token.
        channel_share (`float`, *optional*): share of the budget 1 - s for channels, in (0, 1], whatever the rank
            costs; default: what the rank leaves.
    """

    name: ClassVar[str] = "rsparse"

    rank: int = 16
    channel_share: float | None = None

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"Criterion 'rsparse': rank is {self.rank!r}; use a whole number >= 0, e.g. 16.")
        if self.channel_share is not None and not 0 < self.channel_share <= 1:
            raise ValueError(f"Criterion 'rsparse': channel_share is {self.channel_share!r}; use a number in (0, 1].")

    def state(self, n_in: int, n_out: int) -> dict[str, Spec]:
        return {"column_scale": Spec((n_in,)), "directions": Spec((n_in, self.columns(n_in, n_out)))}

    def columns(self, n_in: int, n_out: int) -> int:
        """How many directions a layer of these sizes has."""
        return min(self.rank, n_in // 8, n_out // 8)

    def prepare(self, weight: torch.Tensor, moments: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        weight = weight.float()
        n_out, n_in = weight.shape
        rank = self.columns(n_in, n_out)
        # Of the smaller Gram matrix: a singular value decomposition of W costs many times as much.
        if n_in <= n_out:
            directions = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, n_in - rank :]
        else:
            left = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, n_out - rank :]
            directions = torch.linalg.qr(weight.T @ left).Q
        return {"column_scale": weight.norm(dim=0), "directions": directions.contiguous()}

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        return (z.detach().float() * state["column_scale"]).abs_()

    def decode(self, kept: torch.Tensor, z: torch.Tensor, state: State) -> torch.Tensor:
        directions = state["directions"].to(z.dtype)
        return kept + ((z - kept) @ directions) @ directions.T

    def fold(
        self, weight: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        directions = state["directions"].to(weight.dtype)
        return weight, (weight @ directions, directions.T)

    def extra_reads(self, n_in: int, n_out: int) -> float:
        return self.columns(n_in, n_out) * (n_in + n_out) / (n_in * n_out)

    def zeroed_share(self, sparsity: float, n_in: int, n_out: int) -> float:
        if self.channel_share is None:
            return super().zeroed_share(sparsity, n_in, n_out)
        return 1 - self.channel_share * (1 - sparsity)
