# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops: schemas, what they return without computing it, and what they refuse. Devices register behind them."""

import torch


LIBRARY = torch.library.Library("peft_spon", "DEF")
for _name in ("sparse_gemv", "dense_gemv"):
    LIBRARY.define(f"{_name}(Tensor z, Tensor weight_t, Tensor? bias=None, Tensor? weight_scale=None) -> Tensor")
LIBRARY.define(
    "threshold_gemv(Tensor x, Tensor weight_t, Tensor tau, Tensor? column_scale=None, Tensor? gain=None, "
    "Tensor? bias=None, int relative=0, Tensor? weight_scale=None) -> Tensor"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(
    z: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None
):
    """Raises where a kernel would read what is not there. Written for speed: it runs at every call."""
    n_in, n_out = weight_t.shape
    if z.shape[-1] != n_in or (bias is not None and bias.shape != (n_out,)):
        raise ValueError(
            f"Shapes do not fit: input {tuple(z.shape)}, weight_t {(n_in, n_out)}, bias "
            f"{None if bias is None else tuple(bias.shape)}; they must be (..., in), (in, out) and (out,)."
        )
    device = z.device
    if weight_t.device != device or (bias is not None and bias.device != device):
        raise ValueError(f"Input is on {device}, weight_t and bias must be, too.")
    if weight_scale is not None:
        check_scale(z, weight_t, weight_scale)
    elif z.dtype != weight_t.dtype or z.dtype not in DTYPES:
        raise ValueError(
            f"Input is {z.dtype}, weight_t {weight_t.dtype}; both must be one of {DTYPES}, or weight_t int8 with a "
            "weight_scale."
        )
    if n_out > 1 and weight_t.stride(1) != 1:
        raise ValueError(
            f"weight_t {(n_in, n_out)} has strides {weight_t.stride()}: its rows must be contiguous. For a weight of "
            "shape (out, in), pass transposed_storage(weight).t()."
        )


def check_scale(z: torch.Tensor, weight_t: torch.Tensor, weight_scale: torch.Tensor):
    """The same for weights of 8 bits."""
    if weight_t.dtype != torch.int8 or z.dtype not in DTYPES:
        raise ValueError(f"weight_scale is of weights of int8, not {weight_t.dtype}, and inputs of {DTYPES}.")
    if (
        weight_scale.dtype != torch.float32
        or weight_scale.shape != weight_t.shape[1:]
        or not weight_scale.is_contiguous()
        or weight_scale.device != z.device
    ):
        raise ValueError(
            f"weight_scale must be a contiguous fp32 tensor of shape ({weight_t.shape[1]},) on {z.device}, not "
            f"{weight_scale.dtype} of shape {tuple(weight_scale.shape)} on {weight_scale.device}."
        )


def check_relative(relative: int):
    """Raises for what is no order of a mean; a flag would be read as order 1."""
    if isinstance(relative, bool) or relative not in (0, 1, 2):
        raise ValueError(
            f"relative is {relative!r}; use 1 for scores relative to their mean, 2 to their root mean square, or 0."
        )


def check_threshold(x: torch.Tensor, tau: torch.Tensor, *vectors: torch.Tensor | None):
    """The same for what S reads: tau of one element, the others of shape (in,), all fp32."""
    if tau.numel() != 1 or tau.dtype != torch.float32:
        raise ValueError(f"tau is {tau.dtype} of shape {tuple(tau.shape)}; it must be one fp32 number.")
    if tau.device != x.device:
        raise ValueError(f"tau is on {tau.device}, the input on {x.device}.")
    for vector in vectors:
        if vector is not None and (
            vector.dtype != torch.float32 or vector.shape != x.shape[-1:] or not vector.is_contiguous()
        ):
            raise ValueError(
                f"column_scale and gain must be contiguous fp32 tensors of shape ({x.shape[-1]},), not {vector.dtype} "
                f"of shape {tuple(vector.shape)}."
            )
        if vector is not None and vector.device != x.device:
            raise ValueError(f"column_scale or gain is on {vector.device}, the input on {x.device}.")


@torch.library.register_fake("peft_spon::sparse_gemv")
@torch.library.register_fake("peft_spon::dense_gemv")
def _(z, weight_t, bias=None, weight_scale=None):
    check(z, weight_t, bias, weight_scale)
    return z.new_empty((*z.shape[:-1], weight_t.shape[1]))


@torch.library.register_fake("peft_spon::threshold_gemv")
def _(x, weight_t, tau, column_scale=None, gain=None, bias=None, relative=0, weight_scale=None):
    check(x, weight_t, bias, weight_scale)
    check_threshold(x, tau, column_scale, gain)
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))
