# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A linear layer's weight in 8 bits, beside the weight: half of bf16's bytes to read, for decoding."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .kernels import int8_linear


LEVELS = 127  # of each sign
CHUNK = 1024  # outputs at a time, so that no whole copy in fp32 is there meanwhile


class Int8Weight:
    """
    W in 8 bits: rounded to 255 evenly spaced values per output, of which the outermost is its largest weight.

    Called, it is the layer with that W, b aside. It belongs to the values that the weight has when it is made.

    Args:
        layer (`nn.Module`): `nn.Linear` or `Conv1D`.
        merged (`tuple[str, ...]`, *optional*): adapters that are merged into the weight, which PEFT does in a way that
            the weight does not count as a change.

    Attributes:
        weight_t (`torch.Tensor`): int8, (in, out), rows contiguous.
        weight_scale (`torch.Tensor`): fp32, (out,): W^T is about `weight_t * weight_scale`.
        zeros (`float`): share of zeros that an input is expected to have; by it and the number of rows the product is
            chosen.
    """

    zeros = 0.0

    # Of tensors made in inference mode there would be no gradients later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layer: nn.Module, merged: tuple[str, ...] = ()):
        # Held, so that no other tensor comes to lie where this one lies.
        self.weight, self.made_of = layer.weight, layer.weight.detach()
        self.version, self.merged = version_of(layer.weight), merged
        weight = self.made_of.t() if isinstance(layer, Conv1D) else self.made_of
        n_out, n_in = weight.shape
        self.weight_t = weight.new_zeros((n_in, n_out), dtype=torch.int8)
        self.weight_scale = weight.new_ones(n_out, dtype=torch.float32)
        for start in range(0, n_out if n_in else 0, CHUNK):
            block, rows = slice(start, start + CHUNK), weight[start : start + CHUNK].float()
            scale = (rows.abs().amax(1) / LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
            self.weight_scale[block] = scale
            self.weight_t[:, block] = (rows / scale[:, None]).round_().t().to(torch.int8)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """W x + b, shape (..., out), of x (..., in)."""
        return int8_linear(x, self.weight_t, self.weight_scale, bias, self.zeros)

    def is_of(self, layer: nn.Module, merged: tuple[str, ...] = ()) -> bool:
        """Whether it was made of the values that the layer's weight has now."""
        weight, made_of = layer.weight, self.made_of
        is_there = (
            weight is self.weight and weight.data_ptr() == made_of.data_ptr() and weight.device == made_of.device
        )
        is_same = weight.dtype == made_of.dtype and version_of(weight) == self.version
        return is_there and is_same and merged == self.merged

    def __reduce__(self):
        return type(None), ()  # a copy of the layer makes its own


def version_of(tensor: torch.Tensor | None) -> int:
    """Counts in-place changes; tensors made in inference mode have no counter."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
