# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`prepare_for_decode`: sparse layers whose decode steps do not read the weights of inputs that S zeroes."""

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from .base_layer import has_plain_weight
from .kernels import Kernel, active_kernel, reads_int8
from .layer import SponLayer
from .sites import Site, sites
from .transposed import can_transpose


@dataclass(frozen=True)
class DecodeSummary:
    """
    What [`prepare_for_decode`] did.

    Attributes:
        prepared (`list[str]`): names of the layers that skip weights from now on.
        left (`dict[str, str]`): names of the others, and why: they work, no faster than before.
        kernels (`dict[str, Kernel]`): what computes on each device.
        weight_dtype (`torch.dtype`, *optional*): of the copies that are read; None: the weights themselves are.
    """

    prepared: list[str]
    left: dict[str, str]
    kernels: dict[str, Kernel]
    weight_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        lines = [
            f"{len(self.prepared)} of {len(self.prepared) + len(self.left)} sparse layers skip weights in decoding"
        ]
        lines += [f"  {device}: {kernel.name} ({kernel.origin})" for device, kernel in self.kernels.items()]
        if self.weight_dtype is not None:
            lines.append("  and read copies of them in 8 bits; the weights themselves stay")
        lines += [f"  {count} as before: {reason}" for reason, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


def prepare_for_decode(model: nn.Module, weight_dtype: torch.dtype | None = None) -> DecodeSummary:
    """
    Make decoding fast: lay every sparse layer's weight out as W^T, so that a token reads only the rows that it needs.

    For adapters in use, merged models and merged folders. `generate` then uses the sparse kernel for inputs of one or
    a few tokens and one dense product for longer ones; the function that the model computes stays the same, up to the
    order of sums (and, with `weight_dtype`, the rounding of weights). Each weight is laid out in place: at most one
    exists twice meanwhile. The model is set to evaluation mode. Training mode, merging and [`restore_from_decode`]
    undo it; saved files do not differ.

    Args:
        model (`nn.Module`): a model with SPON adapters, or a merged one.
        weight_dtype (`torch.dtype`, *optional*): `torch.int8`: sparse layers compute with copies of their weights in 8
            bits; that is half of bf16's bytes to read. Prompts and evaluations then use them, too; with SPON
            off the model is the dense one with its own weights. The weights stay as they are, so the copies come on
            top: half as much again as a bf16 model's sparse layers.

    Returns:
        `DecodeSummary`: print it.

    Raises:
        `ValueError`: the model has no sparse layer, or another dtype than int8 is asked for.
    """
    if weight_dtype not in (None, torch.int8):
        raise ValueError(f"weight_dtype is {weight_dtype!r}; use torch.int8, or None to read the weights as they are.")
    found = sites(model)
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    model.eval()
    prepared, left, kernels = [], {}, {}
    for name, site in found.items():
        reason = why_not(site, counts)
        if reason is None and weight_dtype is not None:
            reason = why_no_copy(site)
        if reason is not None:
            left[name] = reason
            continue
        if site.decode_dtype is not weight_dtype:
            site.restore_decode()
        weight = site.plain_layer().weight
        kernels[str(weight.device)] = active_kernel(weight.device, weight.dtype)
        site.prepare_decode(weight_dtype)
        prepared.append(name)
    summary = DecodeSummary(prepared, left, kernels, weight_dtype if prepared else None)
    if left:
        warnings.warn(f"prepare_for_decode: {summary}", stacklevel=2)
    return summary


def why_not(site: Site, counts: Counter) -> str | None:
    """Why a layer cannot skip weights, or None. `counts`: how often each parameter, by its id, is in the model."""
    layer = site.plain_layer()
    if site.is_prepared:
        return None
    if not has_plain_weight(layer):
        return f"{type(layer).__name__}: its weights are quantised, or not those of a plain linear layer"
    if not can_transpose(layer, site.wrap):
        return f"{type(layer).__name__} is not exactly a linear layer"
    if layer.weight.is_meta:
        return "the weights are offloaded"
    if counts[id(layer.weight)] > 1:
        return "the weight is shared with another module"
    names = list(site.spon_settings) if isinstance(site, SponLayer) else [None]
    criteria = {name: site.sparsifier(name).criterion for name in names}
    if not all(criterion.is_mask for criterion in criteria.values()):
        return "its criterion has products beside W: " + ", ".join(sorted({c.name for c in criteria.values()}))
    kernel = active_kernel(layer.weight.device, layer.weight.dtype)
    if kernel.name in ("none", "torch"):
        return kernel.origin
    return None


def why_no_copy(site: Site) -> str | None:
    """Why a layer that can skip weights cannot read a copy of them in 8 bits, or None."""
    weight = site.plain_layer().weight
    if not reads_int8(weight.device):
        kernel = active_kernel(weight.device, weight.dtype)
        return f"weights of 8 bits need the C kernel or Triton's, and here is {kernel.name} ({kernel.origin})"
    if isinstance(site, SponLayer) and not site.is_w_alone():
        return "a LoRA beneath is not merged, and is computed beside the layer's own weights"
    if not weight.isfinite().all():
        return "some of its weights are not finite, and have no copy in 8 bits"
    return None


@torch.no_grad()
def restore_from_decode(model: nn.Module) -> None:
    """
    Undo [`prepare_for_decode`]: every weight lies in memory as before. Nothing happens to layers that were not
    prepared.

    Raises:
        `ValueError`: the model has no sparse layer.
    """
    for site in sites(model).values():
        site.restore_decode()
