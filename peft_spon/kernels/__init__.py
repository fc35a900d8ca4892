# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Products that do not read the weights of inputs that are 0: ops for CPUs (C) and GPUs (Triton)."""

from .cpu import Kernel
from .dispatch import (
    MOST_ROWS,
    active_kernel,
    bind_threshold_gemv,
    dense_gemv,
    int8_linear,
    make_ready,
    reads_int8,
    skips,
    sparse_gemv,
    sparse_linear,
    threshold_gemv,
    transposed_storage,
)
from .ops import DTYPES


__all__ = [
    "DTYPES",
    "MOST_ROWS",
    "Kernel",
    "active_kernel",
    "bind_threshold_gemv",
    "dense_gemv",
    "int8_linear",
    "make_ready",
    "reads_int8",
    "skips",
    "sparse_gemv",
    "sparse_linear",
    "threshold_gemv",
    "transposed_storage",
]
