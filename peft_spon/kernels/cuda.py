# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops on CUDA devices: the Triton kernel, or torch reading everything where triton is missing."""

import functools
import importlib.util

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


def sparse_gemv(z: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if active_kernel().name != "triton" or torch.cuda.get_device_capability(z.device) < (8, 0):
        return reference.masked_linear(z, weight_t, bias)
    from . import triton_kernel

    ops.check(z, weight_t, bias)
    shape = (*z.shape[:-1], weight_t.shape[1])
    if not z.numel() or not weight_t.numel():
        y = z.new_zeros(shape)
        return y if bias is None else y + bias.to(z.dtype)
    index = z.device.index
    with torch.cuda.device(index):
        counters, processors = _device(index)
        slot = _slots.setdefault((index, torch.cuda.current_stream(index).cuda_stream), len(_slots) % SLOTS)
        rows = z.reshape(-1, z.shape[-1]).contiguous()
        parts = [
            triton_kernel.launch(part, weight_t, bias, counters[slot], processors)
            for part in rows.split(triton_kernel.MOST_ROWS)
        ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


ops.LIBRARY.impl("sparse_gemv", sparse_gemv, "CUDA")
