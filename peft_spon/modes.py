# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`with` blocks that switch parts of a model off or on, and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import spon_layers


@contextmanager
def layer_flag(model: nn.Module, flag: str, value: bool) -> Iterator[None]:
    """Set a switch of all SPON layers of a model inside a `with` block, restore it after."""
    with attribute(list(spon_layers(model).values()), flag, value):
        yield


@contextmanager
def attribute(modules: list[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of some modules inside a `with` block, restore it after."""
    before = [getattr(module, name) for module in modules]
    try:
        for module in modules:
            setattr(module, name, value)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, name, old)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`with evaluation_mode(model):` dropout off, every module's own mode restored after."""
    with attribute([module for module in model.modules() if module.training], "training", False):
        yield


@contextmanager
def dense_mode(model: nn.Module) -> Iterator[None]:
    """`with dense_mode(model):` SPON off, so the model is its own dense teacher; other adapters stay as they are.

    SPON's `modules_to_save` are off, too. Unlike PEFT's `disable_adapter()` it touches no `requires_grad`, so it is
    safe between forward and backward.
    """
    layers = list(spon_layers(model).values())
    names = {name for layer in layers for name in layer.spon_settings}
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and names & set(module.active_adapters)
    ]
    with switched_off([*layers, *wrappers]):
        yield


HELD_OFF = "_spon_held_off"


@contextmanager
def switched_off(modules: list[nn.Module]) -> Iterator[None]:
    """`with switched_off(modules):` these tuner layers are off, also after a `disable_adapter()` block inside."""
    new = [module for module in modules if HELD_OFF not in vars(module)]
    for module in new:
        setattr(module, HELD_OFF, True)
    try:
        with attribute(modules, "_disable_adapters", True):
            yield
    finally:
        for module in new:
            delattr(module, HELD_OFF)


def keep_switched_off(model: nn.Module) -> None:
    """Switch what open `switched_off` blocks hold off again, after PEFT has switched everything on."""
    for module in model.modules():
        if HELD_OFF in vars(module):
            module._disable_adapters = True


def without_anchors(model: nn.Module):
    """`with without_anchors(model):` plain sparsity, W S(x) + b, without anchors and gains."""
    return layer_flag(model, "_anchors_enabled", False)


def every_token_sparse(model: nn.Module):
    """`with every_token_sparse(model):` S active on every token, whatever `prefill` says."""
    return layer_flag(model, "_every_token", True)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """`with differentiable(model):` bitsandbytes keeps its 4-bit weights in the form that has a backward.

    On CPUs with AVX-512 BF16 its layers pack their weights at the first forward without gradients, for a kernel that
    then, in training, gives no gradients and no error.

    Raises:
        `ValueError`: that has happened already.
    """
    switch = "support_avx512bf16_for_cpu"
    layers = [module for module in model.modules() if switch in vars(module)]
    if any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers):
        raise ValueError(
            "The 4-bit weights of this model have been packed for inference on the CPU (by a forward without "
            "gradients, such as an evaluation), and bitsandbytes cannot train through them; load the base model anew "
            "and train first."
        )
    with attribute(layers, switch, False):
        yield
