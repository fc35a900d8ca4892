# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""sparse_gemv and threshold_gemv in Triton; imported only where triton is.

One launch. A program has a share of the inputs and a block of columns: it finds which of its inputs are not 0 (S
included, also the mean that scores are relative to), lists them, reads only the rows of W^T on the list, and writes
its partial sums in fp32. The program that finishes a block of columns last adds them up in a fixed order, scales them
(weights of 8 bits), adds the bias and casts. So there are no floating-point atomics: results are the same at every
run. No autotuning, no allocation that depends on data, no synchronisation: safe inside CUDA graphs, and compute
capability 8.0 is enough.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


MOST_ROWS = 8
COUNTERS = 4096  # column blocks of one launch


@triton.jit
def _score(x, column_scale, inputs, inside, HAS_SCALE: tl.constexpr):
    """|x| or |x * column_scale| in fp32, as in the criteria; x (rows, inputs)."""
    score = x.to(tl.float32)
    if HAS_SCALE:
        score *= tl.load(column_scale + inputs, mask=inside, other=0.0)[None, :]
    return tl.abs(score)


@triton.jit
def _power_mean(
    x, column_scale, n_in, rows, ROWS: tl.constexpr, ORDER: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """What scores are relative to, one number per row: their mean (ORDER 1) or root mean square (2)."""
    total = tl.zeros((rows.shape[0], BLOCK), tl.float32)
    for start in range(0, n_in, BLOCK):
        inputs = start + tl.arange(0, BLOCK)
        inside = inputs < n_in
        block = tl.load(
            x + rows[:, None] * n_in + inputs[None, :], mask=(rows < ROWS)[:, None] & inside[None, :], other=0.0
        )
        score = _score(block, column_scale, inputs, inside, HAS_SCALE)
        if ORDER == 1:
            total += score
        else:
            total += score * score
    mean = tl.sum(total, axis=1) / n_in
    if ORDER == 2:
        mean = tl.sqrt_rn(mean)
    return tl.maximum(mean, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["n_split", "splits"])
def _sparse_gemv(
    x,
    weight_t,
    weight_scale,
    bias,
    tau,
    column_scale,
    gain,
    y,
    partial,
    counters,
    listed,
    values,
    n_in,
    n_out,
    stride,
    n_split,  # inputs of one program
    splits,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SELECTS: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DOT_IN_FP32: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
    BLOCK_MEAN: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = columns < n_out
    rows = tl.arange(0, ROWS_PADDED)
    first = split * n_split
    last = tl.minimum(first + n_split, n_in)
    if SELECTS:
        threshold = tl.load(tau)
        if ORDER > 0:
            mean = _power_mean(x, column_scale, n_in, rows, ROWS, ORDER, HAS_SCALE, BLOCK_MEAN)
    list_of_mine = listed + (block * splits + split) * BLOCK_LIST
    values_of_mine = values + (block * splits + split) * BLOCK_LIST * ROWS
    sums = tl.zeros((ROWS_PADDED, BLOCK_OUT), tl.float32)
    for start in range(first, last, BLOCK_LIST):
        # S, as in the criteria: what is not kept is multiplied by 0, so that NaN stays NaN.
        inputs = start + tl.arange(0, BLOCK_LIST)
        mine = inputs < last
        value = tl.load(
            x + rows[:, None] * n_in + inputs[None, :], mask=(rows < ROWS)[:, None] & mine[None, :], other=0.0
        )
        if SELECTS:
            score = _score(value, column_scale, inputs, mine, HAS_SCALE)
            if ORDER > 0:
                score = tl.div_rn(score, tl.broadcast_to(mean[:, None], score.shape))
            value = (value.to(tl.float32) * (score > threshold).to(tl.float32)).to(value.dtype)
            if HAS_GAIN:
                gains = tl.load(gain + inputs, mask=mine, other=0.0)[None, :]
                value = (value.to(tl.float32) * gains).to(value.dtype)
        active = tl.max((value.to(tl.float32) != 0).to(tl.int32), axis=0)
        place = tl.cumsum(active, axis=0) - 1
        count = tl.sum(active, axis=0)
        tl.store(list_of_mine + place, inputs, mask=active != 0)
        tl.store(
            values_of_mine + rows[:, None] * BLOCK_LIST + place[None, :],
            value,
            mask=(rows < ROWS)[:, None] & (active != 0)[None, :],
        )
        tl.debug_barrier()  # the list is read by other threads than those that wrote it
        for begin in tl.range(0, count, BLOCK_IN, num_stages=1):
            entries = begin + tl.arange(0, BLOCK_IN)
            here = entries < count
            index = tl.load(list_of_mine + entries, mask=here, other=0).to(tl.int64)
            weight = tl.load(
                weight_t + index[:, None] * stride + columns[None, :],
                mask=here[:, None] & inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            if ROWS == 1:
                entry = tl.load(values_of_mine + entries, mask=here, other=0.0)
                # Added up at once: sums of one number per column leave registers for loads, all of them on their way
                # before the first is needed. With one warp the compiler keeps to that; docs/speed.md, "On a GPU".
                sums += tl.sum(entry.to(tl.float32)[:, None] * weight.to(tl.float32), axis=0)[None, :]
            else:
                entry = tl.load(
                    values_of_mine + rows[:, None] * BLOCK_LIST + entries[None, :],
                    mask=(rows < ROWS)[:, None] & here[None, :],
                    other=0.0,
                )
                if DOT_IN_FP32:
                    sums = tl.dot(entry.to(tl.float32), weight.to(tl.float32), sums, input_precision="ieee")
                else:
                    sums = tl.dot(entry, weight.to(entry.dtype), sums, input_precision="ieee")
        tl.debug_barrier()  # before the next list takes its place
    rows_out = rows[:, None] * n_out + columns[None, :]
    mask = (rows < ROWS)[:, None] & inside[None, :]
    total = sums
    arrived = 0
    if splits > 1:
        tl.store(partial + split * ROWS * n_out + rows_out, total, mask=mask)
        tl.debug_barrier()  # every thread's sums are written before this program counts as arrived
        arrived = tl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        if splits > 1:
            tl.debug_barrier()
            if ROWS == 1:
                # Many at a time: one after the other, each would wait for memory.
                total = tl.zeros_like(total)
                for other in range(0, splits, BLOCK_PARTIAL):
                    others = other + tl.arange(0, BLOCK_PARTIAL)
                    parts = tl.load(
                        partial + others[:, None] * n_out + columns[None, :],
                        mask=(others < splits)[:, None] & inside[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    total += tl.sum(parts, axis=0)[None, :]
            else:
                total = tl.zeros_like(total)
                for other in range(splits):
                    total += tl.load(
                        partial + other * ROWS * n_out + rows_out, mask=mask, other=0.0, cache_modifier=".cg"
                    )
            tl.store(counters + block, 0)
        if HAS_WEIGHT_SCALE:
            total *= tl.load(weight_scale + columns, mask=inside, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y + rows_out, total.to(y.dtype.element_ty), mask=mask)


class Plan(NamedTuple):
    """How a shape is cut up.

    Attributes:
        block_in, block_out (`int`): rows and columns of W^T that a program reads at a time.
        block_list (`int`): inputs among which it looks for those that are not 0 at a time.
        n_split, splits (`int`): inputs of a program, and programs that share a block of columns.
        warps (`int`): of a program.
    """

    block_in: int
    block_out: int
    block_list: int
    n_split: int
    splits: int
    warps: int

    @property
    def block_partial(self) -> int:
        """Partial sums of each column that are added up at a time, at most."""
        return 4096 * self.warps // self.block_out


def plan(rows: int, n_in: int, n_out: int, itemsize: int, processors: int) -> Plan:
    """For one row, eight programs per processor, of one warp and 64 inputs or more. Measured on an H100."""
    if rows == 1:
        block_out, per_processor, least, most, warps = 64 if itemsize == 4 else 128, 8, 64, 512, 1
    else:
        block_out, per_processor, least, most, warps = 128, 2, 256, 256, 4
    blocks = triton.cdiv(n_out, block_out)
    splits = max(1, min(per_processor * processors // blocks, n_in // least)) if blocks <= COUNTERS else 1
    n_split = triton.cdiv(triton.cdiv(n_in, splits), 16) * 16
    # 8 kB at a time; where a program has few inputs, all of them at once.
    block_in = 32 if rows > 1 else 64 if n_split <= 64 else 8192 // (block_out * itemsize)
    block_list = min(most, triton.next_power_of_2(n_split))
    return Plan(block_in, block_out, block_list, n_split, triton.cdiv(n_in, n_split), warps)


def block_mean(rows: int, warps: int) -> int:
    """Inputs of each row that are added up at a time for the mean."""
    return 2048 * warps if rows == 1 else 256


def launch(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    processors: int,
    tau: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    relative: int = 0,
    weight_scale: torch.Tensor | None = None,
    cut: Plan | None = None,
) -> torch.Tensor:
    """y (rows, out) of x (rows, in), contiguous, 1 to 8 rows; without `tau`, x is sparse already.

    `weight_t` (in, out) has x's dtype, or is int8 with `weight_scale` (out,), fp32. `counters`, int32 zeros, are left
    as zeros. `cut`: another plan than that of the shape.
    """
    (rows, n_in), n_out = x.shape, weight_t.shape[1]
    bias = None if bias is None else bias.contiguous()
    cut = cut or plan(rows, n_in, n_out, weight_t.element_size(), processors)
    blocks = triton.cdiv(n_out, cut.block_out)
    programs = blocks * cut.splits
    y = x.new_empty(rows, n_out)
    partial = x.new_empty((cut.splits, rows, n_out) if cut.splits > 1 else 0, dtype=torch.float32)
    listed = x.new_empty(programs * cut.block_list, dtype=torch.int32)
    values = x.new_empty(programs * cut.block_list * rows)
    _sparse_gemv[(blocks, cut.splits)](
        x,
        weight_t,
        x if weight_scale is None else weight_scale,
        x if bias is None else bias,
        x if tau is None else tau,
        x if column_scale is None else column_scale,
        x if gain is None else gain,
        y,
        partial,
        counters,
        listed,
        values,
        n_in,
        n_out,
        weight_t.stride(0),
        cut.n_split,
        cut.splits,
        ROWS=rows,
        ROWS_PADDED=1 if rows == 1 else 16,
        HAS_WEIGHT_SCALE=weight_scale is not None,
        HAS_BIAS=bias is not None,
        SELECTS=tau is not None,
        ORDER=relative,
        HAS_SCALE=column_scale is not None,
        HAS_GAIN=gain is not None,
        DOT_IN_FP32=x.is_cpu,  # the interpreter, which multiplies the bits of bf16 as integers
        BLOCK_IN=cut.block_in,
        BLOCK_OUT=cut.block_out,
        BLOCK_LIST=cut.block_list,
        BLOCK_MEAN=block_mean(rows, cut.warps),
        BLOCK_PARTIAL=cut.block_partial,
        num_warps=cut.warps,
    )
    return y
