# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The contract of S, the map that keeps the important entries of a linear layer's input and zeroes the rest."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Criterion:
    """One way of scoring the entries of an input. A subclass is one file: its fields are its dials.

    Class attributes:
        name (`str`): what users write in `SponConfig(criterion=...)`.
        uses_threshold (`bool`): True if S keeps `score > threshold` with a calibrated threshold per layer; False if
            it keeps the k best entries of every token and needs no calibration.
        uses_column_norms (`bool`): True if the score weighs entry i by the norm of column i of the weight.
    """

    name: ClassVar[str]
    uses_threshold: ClassVar[bool] = True
    uses_column_norms: ClassVar[bool] = False

    def score(self, x: torch.Tensor, column_norms: torch.Tensor | None = None) -> torch.Tensor:
        """Importance of every entry of the input.

        Args:
            x (`torch.Tensor`): layer input of shape (..., in), any float dtype.
            column_norms (`torch.Tensor`, *optional*): fp32 norms of the columns of W, shape (in,).

        Returns:
            `torch.Tensor`: fp32 scores >= 0 of shape (..., in); NaN where x is NaN.
        """
        raise NotImplementedError

    def norm_of_columns(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 norms, shape (in,), of the columns of a weight of shape (out, in)."""
        return weight.float().norm(dim=0)


def keep_above(score: torch.Tensor, threshold: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where the fp32 score is above the threshold, else 0, in `dtype`: S(x) is x times that.

    NaN is not above, but NaN times 0 is NaN: it propagates. Numbers, not booleans: on a CPU the product is ten times
    as fast as `masked_fill`.
    """
    return torch.gt(score, threshold, out=torch.empty_like(score, dtype=dtype))


def entries_kept(width: int, sparsity: float) -> int:
    """k = round((1 - sparsity) * width), at least one: how many of `width` entries a top-k S keeps."""
    return min(width, max(1, math.floor((1.0 - sparsity) * width + 0.5)))


def keep_top_k(score: torch.Tensor, sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    """1 for the k best entries of each token, else 0, in `dtype`; scores (..., in)."""
    k = entries_kept(score.shape[-1], sparsity)
    if k == score.shape[-1]:
        return torch.ones_like(score, dtype=dtype)
    kept = score.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(score, dtype=dtype).scatter_(-1, kept, 1)
