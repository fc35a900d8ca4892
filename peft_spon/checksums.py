# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Checksums that tell whether saved files are whole and belong together."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


SAMPLES = 64


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and every byte, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fields_checksum(fields: Mapping[str, Any]) -> str:
    """sha256 of plain fields as JSON; sets count as sorted lists."""
    text = json.dumps(fields, sort_keys=True, default=lambda value: sorted(value))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """`"dtype shape hash"` of a weight: 64 evenly spaced entries, minimum and maximum. One pass, nothing copied.

    Finds a tensor of another model, one that was initialised anew, or one with NaN; not a single changed entry.

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
    return f"{str(values.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
