# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""S of one layer: a criterion at a sparsity."""

import math
from dataclasses import dataclass, replace

import torch

from .base import Criterion, Spec, State


# Points of the stored quantile table of a layer's scores: neighbours are 1/256 = 0.39 points of sparsity apart.
QUANTILE_POINTS = 257


@dataclass(frozen=True)
class Sparsifier:
    """
    S, the map that keeps the important entries of a linear layer's input and zeroes the rest.

    It holds no tensors: these are its state, a dict that [`Sparsifier.specs`] describes.

    Attributes:
        criterion (`Criterion`): which entries are important.
        n_in, n_out (`int`): the layer's sizes.
        sparsity (`float`): share of the layer's weights that a token does not read, in [0, 1).
        calibrated (`bool`): whether calibration has made its part of the state; until then S keeps each token's k best
            entries by the criterion's score.
    """

    criterion: Criterion
    n_in: int
    n_out: int
    sparsity: float
    calibrated: bool = False

    @property
    def uses_threshold(self) -> bool:
        """True: S compares scores with the stored threshold. False: it takes each token's k best entries."""
        return self.calibrated and self.criterion.selects == "threshold"

    @property
    def zeroed_share(self) -> float:
        """Share of the entries that S zeroes; above `sparsity` where the criterion reads something else beside W."""
        return self.criterion.zeroed_share(self.sparsity, self.n_in, self.n_out) if self.sparsity > 0 else 0.0

    def unread(self, zeroed: float) -> float:
        """Share of the layer's weights that is not read where that share of the entries is zeroed."""
        return zeroed - self.criterion.extra_reads(self.n_in, self.n_out) if self.sparsity > 0 else zeroed

    def specs(self) -> dict[str, Spec]:
        """Names, shapes and dtypes of the state: the criterion's, then the threshold's."""
        specs = self.criterion.state(self.n_in, self.n_out)
        if self.criterion.selects == "threshold":
            specs["threshold"] = Spec((1,), from_data=True)
            specs["quantiles"] = Spec((QUANTILE_POINTS,), from_data=True)
        return {name: spec for name, spec in specs.items() if self.calibrated or not spec.from_data}

    def keep(self, z: torch.Tensor, state: State) -> torch.Tensor:
        """1 where S keeps the entry of z (..., in), 0 where it zeroes it, in the dtype of z, without gradient."""
        if self.sparsity == 0:
            return torch.ones_like(z)
        score = self.criterion.score(z, state)
        if self.uses_threshold:
            return keep_above(score, state["threshold"], z.dtype)
        return keep_top_k(score, self.zeroed_share, z.dtype)

    def __call__(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """S(x), shape (..., in). Kept entries pass their gradient through unchanged."""
        if self.sparsity == 0:
            return x
        z = self.criterion.encode(x, state)
        return self.criterion.decode(z * self.keep(z, state), z, state)

    def at(self, sparsity: float, state: State) -> tuple["Sparsifier", dict[str, torch.Tensor]]:
        """The same S at another sparsity, with its state: thresholds come from the stored quantiles, not from data."""
        new = replace(self, sparsity=sparsity)
        if not self.uses_threshold:
            return new, dict(state)
        return new, {**state, "threshold": threshold_at(state["quantiles"], new.zeroed_share)}


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


def threshold_at(quantiles: torch.Tensor, share: float) -> torch.Tensor:
    """Threshold, shape (1,), under which a share of the scores lies, interpolated in the quantile table (257,)."""
    position = share * (len(quantiles) - 1)
    low = min(int(position), len(quantiles) - 2)
    return torch.lerp(quantiles[low], quantiles[low + 1], position - low).reshape(1)
