# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What SPON reads off a linear layer, plain, quantised or wrapped: sizes, W v, a criterion's state."""

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ._peft import dequantize_module_weight, in_out_features
from .criteria import Criterion
from .offload import execution_device, onloaded
from .sparse_linear import SparseMixin


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, also where another tuner or a quantiser wraps it.

    Raises:
        `TypeError`: the sizes cannot be told.
    """
    core = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(core, SparseMixin):
        raise TypeError(
            "The layer is a merged SPON layer already, and S of S(x) is another function. Load the base model and add "
            "the adapters to that."
        )
    if isinstance(core, AuxiliaryTrainingWrapper):
        raise TypeError(
            "The layer is in the modules_to_save of an adapter, so its weights change; name it in exclude_modules, or "
            "take it out of modules_to_save."
        )
    if isinstance(core, (nn.Embedding, nn.modules.conv._ConvNd)):
        sizes = (None, None)
    elif isinstance(core, nn.Module) and {"in_features", "out_features"} <= vars(core).keys():
        sizes = (core.in_features, core.out_features)
    else:
        sizes = in_out_features(core)
    if sizes[0] is None:
        raise TypeError(
            f"SPON sparsifies inputs of linear layers, and {type(core).__name__} is none (no in_features and "
            "out_features). Name linear layers in target_modules, or leave it out for the default."
        )
    return sizes


def has_plain_weight(layer: nn.Module) -> bool:
    """True for nn.Linear and Conv1D with floating-point weights, not for quantised ones and LoRA layers."""
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


def read_weight(layer: nn.Module) -> torch.Tensor | None:
    """W, shape (out, in), of a plain or quantised (bitsandbytes, torchao) layer; None where it cannot be read."""
    if not isinstance(layer, (nn.Linear, Conv1D)) or layer.weight.is_meta:
        return None
    kind = type(layer.weight).__name__
    if kind == "Int8Params":  # PEFT's function loses the scales of a layer on the CPU
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return layer.weight.data.float() * (scales.to(layer.weight.device).view(-1, 1) / 127)
    if kind == "Params4bit" and getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        # Packed for the CPU by its first forward; bitsandbytes 0.50 mixes up the scales when it undoes that.
        return None
    if isinstance(layer, Conv1D):
        return layer.weight.T
    return dequantize_module_weight(layer)


@torch.no_grad()
def through_weight(layer: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    """W vector in fp32, shape (out,), for a vector of shape (in,).

    Weights are read where that is possible (bitsandbytes' 8 bit would quantise the vector too); other layers are
    probed as functions, in the dtype they compute in.
    """
    with onloaded(layer):
        weight = read_weight(layer)
        return (probe(layer, vector[None]).float()[0]) if weight is None else weight.float() @ vector


@torch.no_grad()
def prepared_state(
    layer: nn.Module, criterion: Criterion, moments: torch.Tensor | None = None, chunk: int = 512
) -> dict[str, torch.Tensor]:
    """
    The criterion's state for a layer, from its weight and, for what comes from data, the moments of its input.

    Weights are read where that is possible; anything else (offloaded, LoRA inside) is probed with unit vectors. NaN
    where there are no weights yet: loading or a broadcast from rank 0 fills it in.
    """
    n_in, n_out = linear_sizes(layer)
    specs = {n: s for n, s in criterion.state(n_in, n_out).items() if moments is not None or not s.from_data}
    if not specs:
        return {}
    with onloaded(layer):
        weight = read_weight(layer)
        if weight is not None:
            state = criterion.prepare(weight, moments)
            return {name: state[name] for name in specs}
    reference = next(layer.parameters())
    core = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    device = execution_device(core) if reference.is_meta else reference.device
    if device is None:
        return {name: torch.full(spec.shape, math.nan, dtype=spec.dtype) for name, spec in specs.items()}
    columns = []
    for first in range(0, n_in, chunk):
        rows = torch.zeros(min(chunk, n_in - first), n_in, device=device)
        rows[:, first:].fill_diagonal_(1)
        columns.append(probe(layer, rows))
    state = criterion.prepare(torch.cat(columns).T, moments)
    return {name: state[name] for name in specs}


@torch.no_grad()
def probe(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """W rows, shape (n, out), of any layer that maps x to W x + b, in the dtype that it computes in."""
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.get_default_dtype())
    was_training = layer.training
    layer.eval()
    rows = torch.cat([torch.zeros_like(rows[:1]), rows]).to(dtype)
    y = layer(rows)
    layer.train(was_training)
    return y[1:] - y[0]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and what stands in for it: Conv1D, other tuners' linear layers, quantised layers that have sizes."""
    if isinstance(module, BaseTunerLayer):
        return is_linear(module.get_base_layer())
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    is_leaf = next(module.children(), None) is None
    return is_leaf and hasattr(module, "in_features") and hasattr(module, "out_features")
