# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The contract of a criterion: what a method keeps of a linear layer's input, and the state that it needs for that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """One tensor that a criterion keeps per layer.

    Attributes:
        shape (`tuple[int, ...]`): its shape.
        dtype (`torch.dtype`): its dtype; it stays in it whatever the dtype of the model.
        from_data (`bool`): False if it is made of the weight; True if calibration makes it, of the input's moments
            alone, so that layers which read the same input share it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    from_data: bool = False


@dataclass(frozen=True)
class Criterion:
    """
    One method of zeroing inputs. A subclass is one file: its fields are its dials, `score` is its formula.

    With z = encode(x), S(x) = decode(kept, z), where kept = z * [the score of z is above the threshold], or, with
    `selects = "topk"`, z with all but the k best entries of every token zeroed. For a mask, encode and decode are
    left as they are: S(x) = kept.

    Class attributes:
        name (`str`): what users write in `SponConfig(criterion=...)`.
        selects (`str`): `"threshold"`: one calibrated threshold per layer; `"topk"`: k entries of every token, no
            threshold to calibrate.

    In all methods x and z have the shape (..., in), any float dtype; `state` holds the tensors that
    [`Criterion.state`] names.
    """

    name: ClassVar[str]
    selects: ClassVar[str] = "threshold"

    def state(self, n_in: int, n_out: int) -> dict[str, Spec]:
        """What the criterion keeps for a layer of `n_in` inputs and `n_out` outputs. Files call it `spon_<name>`."""
        return {}

    def prepare(self, weight: torch.Tensor, moments: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        That state, as far as it can be made.

        Args:
            weight (`torch.Tensor`): W, shape (out, in), any float dtype.
            moments (`torch.Tensor`, *optional*): E[x xᵀ] of the layer's input, fp64, shape (in, in). Calibration gives
                it to criteria that have state `from_data`, which it asks for then.
        """
        return {}

    def encode(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """z, in which entries are kept or zeroed: x itself, or x in another basis."""
        return x

    def score(self, z: torch.Tensor, state: State) -> torch.Tensor:
        """Importance of every entry of z: fp32, >= 0, of the shape of z, without gradient; NaN where z is NaN."""
        raise NotImplementedError

    def decode(self, kept: torch.Tensor, z: torch.Tensor, state: State) -> torch.Tensor:
        """S(x), shape (..., in), from z and what is kept of it."""
        return kept

    def fold(
        self, weight: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """
        What a kernel needs instead of `decode`: W S(x) = W' kept + A (B (z - kept)).

        Args:
            weight (`torch.Tensor`): W, shape (out, in).

        Returns:
            `tuple`: W', shape (out, in), and (A, B) of shapes (out, r) and (r, in), or None.
        """
        return weight, None

    def threshold_gemv(self, state: State) -> dict[str, Any]:
        """
        What makes the scores of [`kernels.threshold_gemv`] those of `score`: its arguments `column_scale` and
        `relative` (1: to their mean, 2: to their root mean square). Only a class that has both in one form defines
        it; see [`Criterion.is_fused`].
        """
        raise NotImplementedError

    @property
    def is_mask(self) -> bool:
        """Whether S(x) is x with entries zeroed: no other basis, nothing given back."""
        cls = type(self)
        return cls.encode is Criterion.encode and cls.decode is Criterion.decode

    @property
    def is_fused(self) -> bool:
        """Whether `threshold_gemv` tells the scores: it is defined, and `score` not once more by a subclass."""
        defines = {
            name: next(c for c in type(self).__mro__ if name in vars(c)) for name in ("score", "threshold_gemv")
        }
        return defines["threshold_gemv"] is not Criterion and issubclass(defines["threshold_gemv"], defines["score"])

    def extra_reads(self, n_in: int, n_out: int) -> float:
        """What a token reads beside W's columns of its kept entries, as a share of W's entries."""
        return 0.0

    def zeroed_share(self, sparsity: float, n_in: int, n_out: int) -> float:
        """Share of the entries of z to zero so that a share `sparsity` of the layer's weights is not read."""
        return min(sparsity + self.extra_reads(n_in, n_out), 1.0)
