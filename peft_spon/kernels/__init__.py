# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Products that do not read the weights of inputs that are 0: ops for CPUs (C) and GPUs (Triton)."""

from .cpu import Kernel
from .dispatch import (
    active_kernel,
    dense_gemv,
    skips,
    sparse_gemv,
    sparse_linear,
    threshold_gemv,
    transposed_storage,
)


__all__ = [
    "Kernel",
    "active_kernel",
    "dense_gemv",
    "skips",
    "sparse_gemv",
    "sparse_linear",
    "threshold_gemv",
    "transposed_storage",
]
