# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Checksums that tell whether saved files are whole and belong together."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch


SAMPLES = 64
# What a model may be loaded as, whatever it was saved as.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# hashlib works without the interpreter's lock; a batch of tensors at a time is in memory where they are offloaded.
THREADS, BATCH = 4, 8


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and every byte, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """128 bits of the sha256 of a tensor's bytes: 0.7 s per GB and thread, 2.5 s without SHA instructions."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()[:32]


def weight_hashes(tensor: torch.Tensor) -> dict[str, Any]:
    """`{"dtype", "shape", "hashes"}` of a weight: a hash of every bit, as it is and as it is in narrower dtypes."""
    dtypes = [tensor.dtype]
    if tensor.is_floating_point():
        dtypes += [dtype for dtype in FLOATS if not widens(tensor.dtype, dtype)]
    hashes = {dtype_name(dtype): tensor_hash(tensor.detach().to(dtype)) for dtype in dtypes}
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "hashes": hashes}


def is_same_weight(tensor: torch.Tensor, saved: Mapping[str, Any]) -> bool:
    """Whether a weight is the one of which `weight_hashes` gave `saved`, cast to any floating-point dtype or not."""
    hashes = saved["hashes"]
    if dtype_name(tensor.dtype) in hashes:
        return tensor_hash(tensor) == hashes[dtype_name(tensor.dtype)]
    dtype = getattr(torch, saved["dtype"])
    if not widens(dtype, tensor.dtype):
        return False
    tensor = tensor.detach().reshape(-1)
    narrow = tensor.to(dtype)
    # No bits that the narrow dtype does not have; as integers, so that a NaN equals itself.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    is_exact = torch.equal(narrow.to(tensor.dtype).view(bits), tensor.view(bits))
    return is_exact and tensor_hash(narrow) == hashes.get(dtype_name(dtype))


def widens(old: torch.dtype, new: torch.dtype) -> bool:
    """True if every value of the old dtype is one of the new dtype."""
    return torch.promote_types(old, new) == new


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_threads(function: Any, items: Iterable[Any]) -> list[Any]:
    """`[function(item) for item in items]`, by several threads; `items` are taken a batch at a time."""
    items, found = iter(items), []
    # In a forked process torch's own pool is made anew at its next use, and two threads at once can find none.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(items, BATCH)):
            found += pool.map(function, batch)
    return found


def fields_checksum(fields: Mapping[str, Any]) -> str:
    """sha256 of plain fields as JSON; sets count as sorted lists."""
    text = json.dumps(fields, sort_keys=True, default=lambda value: sorted(value))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """`"dtype shape hash"` of a weight: 64 evenly spaced entries, minimum and maximum. One pass, nothing copied.

    Merged models of peft_spon 0.1 and 0.2 have it. Finds a tensor of another model, one that was initialised anew, or
    one with NaN; not a single changed entry.

    Args:
        tensor (`torch.Tensor`): any shape, floating point.
        dtype (`torch.dtype`, *optional*): take the fingerprint that the tensor has in this dtype.
    """
    flat = tensor.detach().reshape(-1)
    index = torch.arange(SAMPLES, device=flat.device) * max(flat.numel() - 1, 0) // (SAMPLES - 1)
    values = torch.cat([flat[index], torch.stack(flat.aminmax())]) if flat.numel() else flat
    values = values.to(dtype or tensor.dtype)
    text = str(values.float().cpu().tolist())
    shape = "x".join(str(size) for size in tensor.shape)
    return f"{dtype_name(values.dtype)} {shape} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
