# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What callers use: the ops as functions, one copy of a weight, and which product serves how many rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from . import cpu, cuda, ops, reference


MOST_ROWS = 8
# Rows of a batch share one reading of the weights that any of them needs: sparsity ** rows is what can be skipped.
# Measured: below a fifth, skipping no longer beats reading everything (rows <= 2 at 50 %, 4 at 70 %, 8 at 90 %).
WORTH_SKIPPING = 0.2


def _eager_on_cpu(x: torch.Tensor, weight_t: torch.Tensor) -> bool:
    """Whether torch's dispatcher, a third of the fixed cost, may be left out: nothing traces or differentiates."""
    return (
        x.is_cpu
        and type(x) is type(weight_t) is torch.Tensor
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def sparse_gemv(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = z W^T + b where rows of `weight_t` whose input is 0 in every row of z are never read.

    Rows share a reading in groups of eight. Sums are fp32; NaN and infinities in z propagate; no gradients.

    Args:
        z (`torch.Tensor`): inputs already zeroed by S, (..., in), fp32, bf16 or fp16.
        weight_t (`torch.Tensor`): W^T, (in, out), rows contiguous, device of z, and its dtype, or int8. See
            `transposed_storage`.
        bias (`torch.Tensor`, *optional*): (out,), any float dtype; it is added in fp32.
        weight_scale (`torch.Tensor`, *optional*): of int8, fp32, (out,): W^T is `weight_t * weight_scale`.

    Returns:
        `torch.Tensor`: (..., out), dtype of z.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    if _eager_on_cpu(z, weight_t):
        return cpu.sparse_gemv(z, weight_t, bias, weight_scale)
    return torch.ops.peft_spon.sparse_gemv(z, weight_t, bias, weight_scale)


def dense_gemv(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sparse_gemv` that reads every row, by the same kernel: the same bits where the weights are finite."""
    if _eager_on_cpu(z, weight_t):
        return cpu.dense_gemv(z, weight_t, bias, weight_scale)
    return torch.ops.peft_spon.dense_gemv(z, weight_t, bias, weight_scale)


def threshold_gemv(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    tau: torch.Tensor,
    column_scale: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    relative: int = 0,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (S(x) * gain) W^T + b, S and the product in one call. S keeps x_i when s_i > tau, s = |x * column_scale|;
    with `relative`, s is divided by its power mean of that order over the token. The set is that of the criteria,
    on CPUs exactly: where rounding of the mean could decide about an entry, torch computes it. GPUs add the mean up in
    an order of their own, so there an entry within that rounding of the threshold may be decided either way.

    Args:
        x (`torch.Tensor`): inputs, (..., in), fp32, bf16 or fp16.
        weight_t (`torch.Tensor`): W^T, (in, out), rows contiguous, device of x, and its dtype, or int8.
        tau (`torch.Tensor`): threshold, one fp32 number.
        column_scale (`torch.Tensor`, *optional*): fp32, (in,); `weighted`: the norms of the columns of W.
        gain (`torch.Tensor`, *optional*): fp32, (in,), what the kept entries are multiplied by (1 + gamma).
        bias (`torch.Tensor`, *optional*): (out,), any float dtype; it is added in fp32.
        relative (`int`, *optional*, defaults to 0): scores relative to their mean (1) or root mean square (2); 0: not.
        weight_scale (`torch.Tensor`, *optional*): of int8, fp32, (out,): W^T is `weight_t * weight_scale`.

    Returns:
        `torch.Tensor`: (..., out), dtype of x.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    if _eager_on_cpu(x, weight_t):
        return cpu.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative, weight_scale)
    return torch.ops.peft_spon.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative, weight_scale)


def bind_threshold_gemv(
    weight_t: torch.Tensor, tau: torch.Tensor, dtype: torch.dtype | None = None, **others: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> threshold_gemv(x, weight_t, tau, **others) at a smaller fixed cost, without gradients.

    These tensors must stay where they are, and x be of this dtype (default: that of the weight), and of a device and
    width that fit.
    """
    if weight_t.is_cpu:
        x = weight_t.new_empty(weight_t.shape[0], dtype=dtype or weight_t.dtype)
        ops.check(x, weight_t, others.get("bias"), others.get("weight_scale"))
        return cpu.bind_threshold_gemv(weight_t, tau, dtype=dtype, **others)
    return partial(threshold_gemv, weight_t=weight_t, tau=tau, **others)


def transposed_storage(weight: torch.Tensor) -> torch.Tensor:
    """The same (out, in) weight in memory order (in, out), strides (1, out): its `.t()` is what the ops read.

    A copy of this one weight exists at a time if the caller replaces it: `p.data = transposed_storage(p.data)`. A
    weight already stored so is returned as it is. `transposed_storage(...).contiguous()` is the way back.
    """
    return weight.t().contiguous().t()


def skips(rows: int, sparsity: float) -> bool:
    """Whether reading only the weights that `rows` tokens need is faster than reading all of them."""
    return rows <= MOST_ROWS and sparsity**rows >= WORTH_SKIPPING


def sparse_linear(
    z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, sparsity: float = 0.5
) -> torch.Tensor:
    """F.linear(z, weight, bias) by the product that is fastest for this number of rows.

    Skipping weights for few rows, the same kernel without skipping for up to eight on a CPU, torch for more; always
    torch where gradients are wanted or the weight is not stored as `transposed_storage` makes it.

    Args:
        z (`torch.Tensor`): inputs already zeroed by S, (..., in).
        weight (`torch.Tensor`): (out, in), strides (1, out).
        bias (`torch.Tensor`, *optional*): (out,).
        sparsity (`float`, *optional*, defaults to 0.5): share of zeros to be expected in a row of z.
    """
    rows = z.numel() // z.shape[-1] if z.shape[-1] else 0
    is_ours = z.dtype == weight.dtype and z.dtype in ops.DTYPES and not torch.is_autocast_enabled(z.device.type)
    stored_transposed = is_ours and weight.stride(0) == 1
    differentiates = torch.is_grad_enabled() and (
        z.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if stored_transposed and not differentiates:
        if skips(rows, sparsity):
            return sparse_gemv(z, weight.t(), bias)
        if z.is_cpu and rows <= MOST_ROWS:
            return dense_gemv(z, weight.t(), bias)
    if stored_transposed and z.is_cpu:
        return cpu.linear(z, weight.t(), bias)
    return F.linear(z, weight, None if bias is None else bias.to(z.dtype))


def int8_linear(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    sparsity: float = 0.5,
) -> torch.Tensor:
    """F.linear(z, (weight_t * weight_scale).t(), bias) for any number of rows: by the kernel for up to eight, else,
    and where gradients are wanted, by torch's products of blocks of the weight.

    Args:
        z (`torch.Tensor`): inputs already zeroed by S, (..., in), fp32, bf16 or fp16.
        weight_t (`torch.Tensor`): int8, (in, out), rows contiguous.
        weight_scale (`torch.Tensor`): fp32, (out,).
        bias (`torch.Tensor`, *optional*): (out,).
        sparsity (`float`, *optional*, defaults to 0.5): share of zeros to be expected in a row of z.
    """
    rows = z.numel() // z.shape[-1] if z.shape[-1] else 0
    differentiates = torch.is_grad_enabled() and (z.requires_grad or (bias is not None and bias.requires_grad))
    if (z.is_cpu or z.is_cuda) and rows <= MOST_ROWS and not differentiates:
        product = sparse_gemv if z.is_cuda or skips(rows, sparsity) else dense_gemv
        return product(z, weight_t, bias, weight_scale)
    return reference.blockwise(z, weight_t, bias, weight_scale)


def reads_int8(device: torch.device) -> bool:
    """Whether a kernel reads weights of 8 bits as they are."""
    if device.type == "cuda":
        return cuda.has_kernel(device)
    return device.type == "cpu" and cpu.active_kernel().name.startswith("c-")


def make_ready(device: torch.device) -> None:
    """Allocate what the kernels keep on a device, before anything is captured in a graph."""
    if device.type == "cuda":
        cuda.make_ready(device)


def active_kernel(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> cpu.Kernel:
    """What computes `sparse_gemv` on a device: name, and where it comes from or why there is no better one.

    Args:
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the weights are.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): their dtype.

    Returns:
        `Kernel`: `name` is `c-avx512`, `c-avx2`, `c-neon`, `c-portable`, `embedding_bag`, `triton` or `torch` (the
        whole weight is read: no faster than dense); `origin` is a sentence.
    """
    device = torch.device(device)
    if dtype not in ops.DTYPES:
        return cpu.Kernel("none", f"{dtype} is not one of {ops.DTYPES}")
    if device.type == "cpu":
        return cpu.active_kernel()
    if device.type == "cuda":
        return cuda.active_kernel(device)
    return cpu.Kernel("torch", f"there is no kernel for {device.type}")
