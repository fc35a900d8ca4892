# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops on CUDA devices: the Triton kernel, or torch reading everything where triton is missing."""

import functools
import importlib.util
import threading
from typing import Any

import torch

from . import ops, reference
from .cpu import Kernel


SLOTS = 128  # streams of a device, each with arrival counters of its own
_slots: dict[int, dict[int, int]] = {}
_lock = threading.Lock()


@functools.cache
def active_kernel(device: torch.device) -> Kernel:
    if importlib.util.find_spec("triton") is None:
        return Kernel("torch", "triton is not installed: every weight is read, no faster than dense")
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return Kernel("torch", f"the kernel needs compute capability 8.0, this GPU has {found[0]}.{found[1]}")
    return Kernel("triton", "compiled by triton on first use")


def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel serves a device."""
    return active_kernel(device).name == "triton"


def make_ready(device: torch.device) -> None:
    """Allocate what the kernel keeps on a device: later, a graph's own memory might be in use."""
    if has_kernel(device):
        _device(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _device(index: int) -> tuple[torch.Tensor, int]:
    """Arrival counters and number of multiprocessors of a device."""
    from .triton_kernel import COUNTERS

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Run the same shapes, dtypes and options once before capturing a CUDA graph: that is when triton compiles "
            "and loads its kernels."
        )
    counters = torch.zeros(SLOTS, COUNTERS, dtype=torch.int32, device=f"cuda:{index}")
    torch.cuda.synchronize(index)  # zero for every stream
    return counters, torch.cuda.get_device_properties(index).multi_processor_count


def _slot(index: int) -> int:
    """Which counters the current stream of a device has."""
    stream = torch.cuda.current_stream(index).cuda_stream
    with _lock:
        taken = _slots.setdefault(index, {})
        if stream not in taken and len(taken) == SLOTS:
            raise RuntimeError(f"sparse_gemv has run on {SLOTS} streams of cuda:{index}, its limit; reuse streams.")
        return taken.setdefault(stream, len(taken))


def sparse_gemv(z, weight_t, bias=None, weight_scale=None) -> torch.Tensor:
    if not has_kernel(z.device):
        return reference.masked_linear(z, weight_t, bias, weight_scale)
    return _launch(z, weight_t, bias, weight_scale)


def threshold_gemv(x, weight_t, tau, column_scale=None, gain=None, bias=None, relative=0, weight_scale=None):
    if not has_kernel(x.device):
        return reference.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative, weight_scale)
    ops.check_threshold(x, tau, column_scale, gain)
    ops.check_relative(relative)
    selection = {"tau": tau, "column_scale": column_scale, "gain": gain, "relative": relative}
    return _launch(x, weight_t, bias, weight_scale, **selection)


def _launch(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    **selection: Any,
) -> torch.Tensor:
    from . import triton_kernel

    ops.check(x, weight_t, bias, weight_scale)
    shape = (*x.shape[:-1], weight_t.shape[1])
    if not x.numel() or not weight_t.numel():
        y = x.new_zeros(shape)
        return y if bias is None else y + bias.to(x.dtype)
    index = x.device.index
    with torch.cuda.device(index):
        counters, processors = _device(index)
        counters = counters[_slot(index)]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        parts = [
            triton_kernel.launch(part, weight_t, bias, counters, processors, weight_scale=weight_scale, **selection)
            for part in rows.split(triton_kernel.MOST_ROWS)
        ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


ops.LIBRARY.impl("sparse_gemv", sparse_gemv, "CUDA")
ops.LIBRARY.impl("threshold_gemv", threshold_gemv, "CUDA")
