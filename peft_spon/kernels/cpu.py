# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The ops on CPUs: sparse_gemv.c through ctypes, or `embedding_bag` where there is no compiled library.

The library is, in this order, the one that came with the wheel, or one compiled on first use (1 to 5 seconds, once)
into `$XDG_CACHE_HOME/peft_spon`. The environment variable PEFT_SPON_CPU_KERNEL changes that: `no-build` compiles
nothing, `torch` uses `embedding_bag`, and `avx512`, `avx2`, `neon` or `portable` choose an instruction set.
"""

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import build, ops, reference


CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
DONE, NEAR, NO_MEMORY = range(3)
INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")
# (out, in) strides (1, out): torch multiplies that 10 to 100 times as slowly as fp32 in a dtype that its matrix
# library does not know on this machine.
SLOW_DTYPES = {
    dtype
    for dtype, known in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, known)())
}


class Kernel(NamedTuple):
    """What computes the ops: its name, and where it comes from or why there is no better one."""

    name: str
    origin: str


class Library(NamedTuple):
    gemv: ctypes._CFuncPtr
    threshold_gemv: ctypes._CFuncPtr
    read: ctypes._CFuncPtr


@functools.cache
def _load() -> tuple[Library | None, Kernel]:
    wish = os.environ.get("PEFT_SPON_CPU_KERNEL", "")
    if wish not in ("", "no-build", "torch", *INSTRUCTION_SETS):
        raise ValueError(
            f"PEFT_SPON_CPU_KERNEL is {wish!r}; it must be one of 'no-build', 'torch', {INSTRUCTION_SETS}, or unset."
        )
    if wish == "torch":
        return None, Kernel("embedding_bag", "asked for by PEFT_SPON_CPU_KERNEL=torch")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_spon"
    path, origin = build.SOURCE.with_name(build.library_name()), "came with the package"
    try:
        if not path.exists():
            path, origin = cache.expanduser() / path.name, "compiled on first use"
        if not path.exists():
            if wish == "no-build":
                return None, Kernel("embedding_bag", "nothing compiled, PEFT_SPON_CPU_KERNEL=no-build")
            build.compile_into(path.parent)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # Runtime: the user has no home
        said = (getattr(error, "stderr", None) or "").strip()[-500:]
        return None, Kernel("embedding_bag", f"no compiled library: {error} {said}".strip())
    _share_torchs_threads(library)
    library.spon_choose.restype = ctypes.c_char_p
    chosen = library.spon_choose(wish.encode() if wish in INSTRUCTION_SETS else None)
    if chosen is None:
        raise ValueError(f"PEFT_SPON_CPU_KERNEL is {wish!r}, which this machine does not have.")
    pointers, sizes, codes = [ctypes.c_void_p], [ctypes.c_long], [ctypes.c_int]
    library.spon_gemv.argtypes = pointers * 5 + sizes * 4 + codes * 4 + sizes
    library.spon_threshold_gemv.argtypes = pointers * 9 + codes + sizes * 4 + codes * 3 + sizes
    library.spon_read.argtypes = pointers + sizes * 2
    library.spon_read.restype = ctypes.c_float
    found = Library(library.spon_gemv, library.spon_threshold_gemv, library.spon_read)
    return found, Kernel(f"c-{chosen.decode()}", f"{origin}: {path}")


def _share_torchs_threads(library: ctypes.CDLL):
    """Hands the library torch's own OpenMP: looked up where torch finds it, so that there is no second pool."""
    torch_cpu = next(Path(torch.__file__).parent.glob("lib/*torch_cpu.*"), None)
    try:
        pool = ctypes.CDLL(str(torch_cpu))
        entries = [pool.GOMP_parallel, pool.omp_get_thread_num, pool.omp_get_num_threads]
    except (OSError, AttributeError):
        return  # another OpenMP (macOS): one thread
    library.spon_set_pool(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))


def active_kernel() -> Kernel:
    return _load()[1]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _readable(bias: torch.Tensor | None) -> torch.Tensor | None:
    if bias is not None and not (bias.is_contiguous() and bias.dtype in ops.DTYPES):
        return bias.float().contiguous()
    return bias


def _product(
    library: Library,
    z: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    dense: bool,
) -> torch.Tensor:
    ops.check(z, weight_t, bias, weight_scale)
    n_in, n_out = weight_t.shape
    z, bias = z.contiguous(), _readable(bias)
    y = z.new_empty((*z.shape[:-1], n_out))
    status = library.gemv(
        z.data_ptr(),
        weight_t.data_ptr(),
        _address(weight_scale),
        _address(bias),
        y.data_ptr(),
        y.numel() // n_out if n_out else 0,
        n_in,
        n_out,
        weight_t.stride(0),
        CODES[z.dtype],
        CODES[weight_t.dtype],
        0 if bias is None else CODES[bias.dtype],
        dense,
        torch.get_num_threads(),
    )
    if status == NO_MEMORY:
        raise MemoryError(f"No memory for the {n_in} inputs of a layer.")
    return y


def sparse_gemv(z, weight_t, bias=None, weight_scale=None) -> torch.Tensor:
    library, _ = _load()
    if library is None:
        if weight_scale is not None:  # right, and slow
            return reference.masked_linear(z, weight_t, bias, weight_scale)
        return bag(z, weight_t, bias)
    return _product(library, z, weight_t, bias, weight_scale, dense=False)


def dense_gemv(z, weight_t, bias=None, weight_scale=None) -> torch.Tensor:
    library, _ = _load()
    if library is None:
        if weight_scale is not None:
            return reference.masked_linear(z, weight_t, bias, weight_scale)
        return linear(z, weight_t, bias)
    return _product(library, z, weight_t, bias, weight_scale, dense=True)


def threshold_gemv(x, weight_t, tau, column_scale=None, gain=None, bias=None, relative=0, weight_scale=None):
    ops.check(x, weight_t, bias, weight_scale)
    ops.check_threshold(x, tau, column_scale, gain)
    return bind_threshold_gemv(weight_t, tau, column_scale, gain, bias, relative, weight_scale, x.dtype)(x)


def bind_threshold_gemv(
    weight_t, tau, column_scale=None, gain=None, bias=None, relative=0, weight_scale=None, dtype=None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> threshold_gemv(x, ...) at half the fixed cost: the rest, which must fit and stay, is given once."""
    ops.check_relative(relative)
    library, _ = _load()
    if library is None:
        return lambda x: sparse_gemv(
            reference.select(x, tau, column_scale, gain, relative), weight_t, bias, weight_scale
        )
    n_in, n_out = weight_t.shape
    bias = _readable(bias)
    function, threads = library.threshold_gemv, torch.get_num_threads
    before = weight_t.data_ptr(), _address(weight_scale), _address(bias)
    state = tau.data_ptr(), _address(column_scale), _address(gain)
    codes = CODES[dtype or weight_t.dtype], CODES[weight_t.dtype], 0 if bias is None else CODES[bias.dtype]
    sizes = n_in, n_out, weight_t.stride(0), *codes
    held = weight_t, weight_scale, tau, column_scale, gain, bias

    def product(x: torch.Tensor, held=held) -> torch.Tensor:
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], n_out))
        rows = y.numel() // n_out if n_out else 0
        status = function(x.data_ptr(), *before, y.data_ptr(), *state, None, relative, rows, *sizes, threads())
        if status == NEAR:
            mean = reference.power_mean(reference.score(x, column_scale), relative)
            near = mean.data_ptr()
            status = function(x.data_ptr(), *before, y.data_ptr(), *state, near, relative, rows, *sizes, threads())
        if status == NO_MEMORY:
            raise MemoryError(f"No memory for the {n_in} inputs of a layer.")
        return y

    return product


def bag(z: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """sparse_gemv in plain torch: each row of z is a bag of rows of weight_t, in as many column blocks as threads.

    `embedding_bag` shares bags between threads, never columns: the weight is seen as (in * blocks, out / blocks).
    """
    ops.check(z, weight_t, bias)
    n_in, n_out = weight_t.shape
    rows = z.flatten(0, -2) if z.dim() > 1 else z[None]
    if len(rows) == 1:
        active = rows[0].nonzero().squeeze(1)
        starts, values = active.new_zeros(1), rows[0][active]
    else:
        row, active = rows.nonzero(as_tuple=True)
        starts, values = torch.bincount(row, minlength=len(rows)).cumsum(0).roll(1), rows[row, active]
        starts[:1] = 0
    if not len(active) or not n_out:
        y = z.new_zeros((*z.shape[:-1], n_out))
        return y if bias is None else (y + bias).to(z.dtype)
    blocks = torch.get_num_threads()
    if n_out % blocks or weight_t.stride(0) != n_out:
        blocks = 1
    if blocks > 1:
        block = torch.arange(blocks)[:, None]
        active = (active * blocks + block).reshape(-1)
        starts = (starts + block * len(values)).reshape(-1)
        values = values.repeat(blocks)
        weight_t = weight_t.view(n_in * blocks, n_out // blocks)
    y = F.embedding_bag(active, weight_t, starts, mode="sum", per_sample_weights=values)
    y = y.view(blocks, len(rows), -1).transpose(0, 1).reshape(*z.shape[:-1], n_out)
    return y if bias is None else (y + bias).to(z.dtype)


def linear(z: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """z W^T + b for many rows, in blocks where torch is slow at it."""
    if z.dtype not in SLOW_DTYPES:
        return reference.masked_linear(z, weight_t, bias)
    ops.check(z, weight_t, bias)
    return reference.blockwise(z, weight_t, bias)


ops.LIBRARY.impl("sparse_gemv", sparse_gemv, "CPU")
ops.LIBRARY.impl("dense_gemv", dense_gemv, "CPU")
ops.LIBRARY.impl("threshold_gemv", threshold_gemv, "CPU")
