# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight lies in memory as W^T: a product can leave out the rows whose inputs are 0."""

from collections.abc import Callable
from types import MethodType

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .kernels import sparse_linear, transposed_storage


class TransposedLinear(nn.Linear):
    """nn.Linear with a weight of strides (1, out): the same function, shapes and files.

    Attributes:
        zeros (`float`): share of zeros that an input is expected to have; by it and the number of rows the product is
            chosen.
    """

    zeros = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, self.weight, self.bias, self.zeros)

    @property
    def weight_t(self) -> torch.Tensor:
        """W^T, shape (in, out), contiguous."""
        return self.weight.t()


class TransposedConv1D(Conv1D):
    """transformers' Conv1D, whose weight is W^T already; the same attributes."""

    zeros = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, self.weight.t(), self.bias, self.zeros)

    @property
    def weight_t(self) -> torch.Tensor:
        """W^T, shape (in, out), contiguous."""
        return self.weight


TRANSPOSED = {nn.Linear: TransposedLinear, Conv1D: TransposedConv1D}

# From the class of a dense layer to that of the layer: of merged layers, `sparse_class`.
Wrap = Callable[[type[nn.Module]], type[nn.Module]]


def can_transpose(layer: nn.Module, wrap: Wrap) -> bool:
    """Whether a layer is exactly a plain linear layer; subclasses may do anything."""
    return any(wrap(plain) is type(layer) for plain in TRANSPOSED)


def transpose_weight(layer: nn.Module, wrap: Wrap) -> None:
    """Lay the weight of a layer, in place, as W^T. Only this one weight exists twice meanwhile."""
    lay_out(layer)
    change_class(layer, next(wrap(new) for plain, new in TRANSPOSED.items() if wrap(plain) is type(layer)))


def lay_out(layer: nn.Module) -> None:
    """W in memory as W^T; nothing happens where it is so already."""
    if isinstance(layer, nn.Linear):
        layer.weight.data = transposed_storage(layer.weight.data)


def weight_t_of(layer: nn.Module) -> torch.Tensor:
    """W^T, shape (in, out). A property of its class costs compiled code more at every step than reading it."""
    return layer.weight if isinstance(layer, Conv1D) else layer.weight.t()


def restore_weight(layer: nn.Module, wrap: Wrap) -> None:
    """Undo [`transpose_weight`]."""
    change_class(layer, next(wrap(plain) for plain, new in TRANSPOSED.items() if wrap(new) is type(layer)))
    layer.weight.data = layer.weight.data.contiguous()


def change_class(layer: nn.Module, new: type[nn.Module]) -> None:
    layer.__class__ = new
    if "_old_forward" in vars(layer):
        # accelerate's hooks (device_map) call the forward that the layer had when they were added.
        layer._old_forward = MethodType(new.forward, layer)
