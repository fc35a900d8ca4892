# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops in plain torch: what they mean, and what serves where no kernel does."""

import torch
from torch.nn import functional as F

from . import ops


def sparse_gemv(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition: y = z W^T + b in fp32 from the rows of weight_t whose input is not 0 throughout the batch."""
    active = (z != 0).flatten(0, -2).any(0) if z.dim() > 1 else z != 0
    y = z[..., active].float() @ weight_t[active].float()
    y = y if weight_scale is None else y * weight_scale
    return (y if bias is None else y + bias.float()).to(z.dtype)


def masked_linear(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same values from the whole weight: no data-dependent shape, safe in CUDA graphs."""
    ops.check(z, weight_t, bias, weight_scale)
    if weight_scale is not None:
        return blockwise(z, weight_t, bias, weight_scale)
    return F.linear(z, weight_t.t(), None if bias is None else bias.to(z.dtype))


def blockwise(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same where torch has no fast product, or none at all: blocks of W^T are converted to fp32 on the way, or to
    bf16 on GPUs, whose sums are in fp32 (8 bits fit into it, and sums of them do not fit into fp16).
    """
    y, wide = z.new_empty((*z.shape[:-1], weight_t.shape[1])), z
    if not (z.is_cuda and z.dtype == torch.bfloat16):
        wide = z.float()
    for start in range(0, weight_t.shape[1], 1024):
        block = slice(start, start + 1024)
        part = wide @ weight_t[:, block].to(wide.dtype)
        part = part if weight_scale is None else part * weight_scale[block]
        y[..., block] = part if bias is None else part + bias[block]
    return y


def score(x: torch.Tensor, column_scale: torch.Tensor | None) -> torch.Tensor:
    """|x| or |x * column_scale| in fp32, as in the criteria."""
    return (x.float() if column_scale is None else x.float() * column_scale).abs()


def power_mean(scores: torch.Tensor, order: int) -> torch.Tensor:
    """fp32, (..., 1): by what a relative criterion divides its scores (..., in): mean (1) or root mean square (2)."""
    if order == 1:
        mean = scores.mean(-1, keepdim=True)
    else:
        mean = torch.linalg.vector_norm(scores, dim=-1, keepdim=True) * scores.shape[-1] ** -0.5
    return mean.clamp_min_(torch.finfo(torch.float32).tiny)


def select(
    x: torch.Tensor,
    tau: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    relative: int = 0,
) -> torch.Tensor:
    """S(x) * gain: x where score > tau, x * 0 elsewhere (NaN stays NaN)."""
    ops.check_relative(relative)
    scores = score(x, column_scale)
    if relative:
        scores = scores / power_mean(scores, relative)
    z = x * torch.gt(scores, tau).to(x.dtype)
    return z if gain is None else (z * gain).to(x.dtype)


def threshold_gemv(x, weight_t, tau, column_scale=None, gain=None, bias=None, relative=0, weight_scale=None):
    ops.check_threshold(x, tau, column_scale, gain)
    return torch.ops.peft_spon.sparse_gemv(select(x, tau, column_scale, gain, relative), weight_t, bias, weight_scale)


ops.LIBRARY.impl("sparse_gemv", masked_linear, "CompositeExplicitAutograd")
ops.LIBRARY.impl("dense_gemv", masked_linear, "CompositeExplicitAutograd")
ops.LIBRARY.impl("threshold_gemv", threshold_gemv, "CompositeExplicitAutograd")
