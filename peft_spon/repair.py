# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The one forward of SPON: y = W (scale * S(x) + inner) + b + shift (SPON, arXiv 2512.12744, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .criteria import Sparsifier, State


# The name of a LoRA beneath SPON that is part of the repair: trained with the anchors, off where they are off.
REPAIR_LORA = "spon-repair"


@dataclass(frozen=True)
class Repair:
    """
    What mends a sparse layer, each None where there is none; live parameters of adapters, or merged constants.

    Attributes:
        scale (`torch.Tensor`): 1 + gain, shape (in,).
        inner (`torch.Tensor`): anchor in front of W, the paper's α, shape (in,).
        shift (`torch.Tensor`): anchor behind W, or W α, shape (out,).
    """

    scale: torch.Tensor | None = None
    inner: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def then(self, gain: torch.Tensor | None, inner: torch.Tensor | None, shift: torch.Tensor | None) -> "Repair":
        """This repair with another adapter after it: gains multiply, also the anchors before them, anchors add."""
        scale = self.scale
        own = self.inner
        if gain is not None:
            factor = 1 + gain
            scale = factor if scale is None else scale * factor
            own = None if own is None else own * factor
        return Repair(scale, add(own, inner), add(self.shift, shift))


def add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """a + b, where None is nothing."""
    return b if a is None else a if b is None else a + b


def repaired_linear(
    x: torch.Tensor,
    linear: Callable[[torch.Tensor], torch.Tensor],
    sparsifier: Sparsifier,
    state: State,
    repair: Repair,
    first_sparse: int = 0,
) -> torch.Tensor:
    """
    y = W (scale * S(x) + inner) + b + shift from token `first_sparse` on; the tokens before it are dense, W x + b.

    Args:
        x (`torch.Tensor`): the layer's input, shape (..., tokens, in), or (in,).
        linear (`Callable`): x to W x + b: a linear layer, quantised or not, LoRA in it or not.
        sparsifier ([`Sparsifier`]): S.
        state (`dict`): its tensors.
        repair ([`Repair`]): what was trained, in fp32; it acts in the dtype of x.
        first_sparse (`int`, *optional*, defaults to 0): position on the token axis.

    Returns:
        `torch.Tensor`: shape (..., tokens, out).
    """
    if first_sparse > 0 and first_sparse >= x.shape[-2]:
        return linear(x)
    s = sparsifier(x, state)
    if repair.scale is not None:
        s = s * repair.scale.to(s)  # its device, too: the model may be a replica
    if repair.inner is not None:
        s = s + repair.inner.to(s)
    if first_sparse > 0:
        s = torch.cat([x[..., :first_sparse, :], s[..., first_sparse:, :]], dim=-2)
    y = linear(s)
    if repair.shift is None:
        return y
    shift = repair.shift.to(y)
    if first_sparse > 0:
        shift = (torch.arange(y.shape[-2], device=y.device) >= first_sparse).unsqueeze(-1) * shift
    return y + shift
