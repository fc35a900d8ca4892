# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops on CUDA devices: the Triton kernel, or torch reading everything where triton is missing."""

import functools
import importlib.util
from typing import Any

import torch

from . import ops, reference
from .cpu import Kernel


SLOTS = 64  # launches that may run at a time, by stream
_slots: dict[tuple[int, int], int] = {}


@functools.cache
def active_kernel() -> Kernel:
    if importlib.util.find_spec("triton") is None:
        return Kernel("torch", "triton is not installed: every weight is read, no faster than dense")
    return Kernel("triton", "compiled by triton on first use")


@functools.cache
def _device(index: int) -> tuple[torch.Tensor, int]:
    """Arrival counters and number of multiprocessors of a device."""
    from .triton_kernel import COUNTERS

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("Call sparse_gemv once on this device before capturing a CUDA graph: triton compiles then.")
    counters = torch.zeros(SLOTS, COUNTERS, dtype=torch.int32, device=f"cuda:{index}")
    torch.cuda.synchronize(index)  # zero for every stream
    return counters, torch.cuda.get_device_properties(index).multi_processor_count


def has_kernel(x: torch.Tensor) -> bool:
    """Whether the Triton kernel serves the device of x."""
    return active_kernel().name == "triton" and torch.cuda.get_device_capability(x.device) >= (8, 0)


def sparse_gemv(z: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not has_kernel(z):
        return reference.masked_linear(z, weight_t, bias)
    return _launch(z, weight_t, bias)


def threshold_gemv(x, weight_t, tau, column_scale=None, gain=None, bias=None, relative=0):
    if not has_kernel(x):
        return reference.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative)
    ops.check_threshold(x, tau, column_scale, gain)
    ops.check_relative(relative)
    return _launch(x, weight_t, bias, tau=tau, column_scale=column_scale, gain=gain, relative=relative)


def _launch(x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None, **selection: Any) -> torch.Tensor:
    from . import triton_kernel

    ops.check(x, weight_t, bias)
    shape = (*x.shape[:-1], weight_t.shape[1])
    if not x.numel() or not weight_t.numel():
        y = x.new_zeros(shape)
        return y if bias is None else y + bias.to(x.dtype)
    index = x.device.index
    with torch.cuda.device(index):
        counters, processors = _device(index)
        slot = _slots.setdefault((index, torch.cuda.current_stream(index).cuda_stream), len(_slots) % SLOTS)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        parts = [
            triton_kernel.launch(part, weight_t, bias, counters[slot], processors, **selection)
            for part in rows.split(triton_kernel.MOST_ROWS)
        ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


ops.LIBRARY.impl("sparse_gemv", sparse_gemv, "CUDA")
ops.LIBRARY.impl("threshold_gemv", threshold_gemv, "CUDA")
