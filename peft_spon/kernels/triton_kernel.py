# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""sparse_gemv in Triton; imported only where triton is.

One launch: a program sums its share of the inputs for its columns in fp32 and writes the partial sums; the program
that finishes a block of columns last adds them up in a fixed order, adds the bias and casts. So there are no
floating-point atomics: results are the same at every run. No autotuning, no allocation that depends on data, no
synchronisation: safe inside CUDA graphs, and compute capability 8.0 is enough.
"""

import torch
import triton
import triton.language as tl


MOST_ROWS = 8
PROGRAMS_PER_PROCESSOR = 6  # several per SM keep enough masked loads in flight
MOST_SPLITS = 64
COUNTERS = 4096  # column blocks of one launch


@triton.jit
def _sparse_gemv(
    z,
    weight_t,
    bias,
    y,
    partial,
    counters,
    n_in,
    n_out,
    stride,
    n_split,  # inputs of one program, a multiple of BLOCK_IN
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = columns < n_out
    rows = tl.arange(0, ROWS_PADDED)
    first = split * n_split
    last = tl.minimum(first + n_split, n_in)
    if ROWS == 1:
        sums = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    else:
        sums = tl.zeros((ROWS_PADDED, BLOCK_OUT), tl.float32)
    for start in range(first, last, BLOCK_IN):
        inputs = start + tl.arange(0, BLOCK_IN)
        # A row of W^T spans a whole warp or more, so its predicate is uniform and a skipped row costs no traffic.
        if ROWS == 1:
            value = tl.load(z + inputs, mask=inputs < last, other=0.0)
            active = value.to(tl.float32) != 0
        else:
            value = tl.load(
                z + rows[:, None] * n_in + inputs[None, :],
                mask=(rows < ROWS)[:, None] & (inputs < last)[None, :],
                other=0.0,
            )
            active = tl.max((value.to(tl.float32) != 0).to(tl.int32), axis=0) != 0
        weight = tl.load(
            weight_t + inputs.to(tl.int64)[:, None] * stride + columns[None, :],
            mask=active[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if ROWS == 1:
            sums += value.to(tl.float32)[:, None] * weight.to(tl.float32)
        elif DOT_IN_FP32:
            sums = tl.dot(value.to(tl.float32), weight.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(value, weight, sums, input_precision="ieee")
    rows_out = rows[:, None] * n_out + columns[None, :]
    mask = (rows < ROWS)[:, None] & inside[None, :]
    if ROWS == 1:
        total = tl.sum(sums, axis=0)[None, :]
    else:
        total = sums
    if SPLITS > 1:
        tl.store(partial + split * ROWS * n_out + rows_out, total, mask=mask)
        tl.debug_barrier()  # every thread's sums are written before this program counts as arrived
        arrived = tl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu")
    else:
        arrived = 0
    if arrived == SPLITS - 1:
        if SPLITS > 1:
            tl.debug_barrier()
            total = tl.zeros_like(total)
            for other in range(SPLITS):
                total += tl.load(partial + other * ROWS * n_out + rows_out, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counters + block, 0)
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y + rows_out, total.to(y.dtype.element_ty), mask=mask)


def plan(rows: int, n_in: int, n_out: int, itemsize: int, processors: int) -> tuple[int, int, int, int]:
    """Block sizes and splits for a shape: (BLOCK_IN, BLOCK_OUT, inputs per split, splits)."""
    block_in = 16 if rows == 1 else 32
    block_out = 512 // itemsize if rows == 1 else 128
    blocks = triton.cdiv(n_out, block_out)
    most = min(MOST_SPLITS, max(1, n_in // (4 * block_in)))
    splits = min(most, max(1, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, blocks)))
    n_split = triton.cdiv(triton.cdiv(n_in, splits), block_in) * block_in
    return block_in, block_out, n_split, triton.cdiv(n_in, n_split)


def launch(
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    processors: int,
) -> torch.Tensor:
    """y (rows, out) of z (rows, in), contiguous, 1 to 8 rows; `counters`, int32 zeros, are left as zeros."""
    (rows, n_in), n_out = z.shape, weight_t.shape[1]
    block_in, block_out, n_split, splits = plan(rows, n_in, n_out, z.element_size(), processors)
    blocks = triton.cdiv(n_out, block_out)
    if blocks > len(counters):
        splits, n_split = 1, n_in  # so many blocks fill any device
    y = z.new_empty(rows, n_out)
    partial = z.new_empty((splits, rows, n_out) if splits > 1 else 0, dtype=torch.float32)
    _sparse_gemv[(blocks, splits)](
        z,
        weight_t,
        z if bias is None else bias,
        y,
        partial,
        counters,
        n_in,
        n_out,
        weight_t.stride(0),
        n_split,
        ROWS=rows,
        ROWS_PADDED=1 if rows == 1 else 16,
        HAS_BIAS=bias is not None,
        DOT_IN_FP32=z.is_cpu,  # the interpreter, which multiplies the bits of bf16 as integers
        SPLITS=splits,
        BLOCK_IN=block_in,
        BLOCK_OUT=block_out,
        num_warps=4,
    )
    return y
