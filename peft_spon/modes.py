# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`with` blocks that switch parts of a model off or on, and leave it as it was.

Blocks may overlap and end in any order: what one holds stays until the last that holds it has ended. The switches are
attributes of the modules, which threads share: a block holds for every thread that runs the model. (Per thread would
be wrong where a backward pass, in a thread of its own, runs a checkpointed forward again.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import SponLayer
from .repair import REPAIR_LORA
from .sites import sites


@contextmanager
def layer_flag(model: nn.Module, flag: str, value: bool) -> Iterator[None]:
    """Set a switch of all sparse layers of a model inside a `with` block, restore it after."""
    with attribute(list(sites(model).values()), flag, value):
        yield


# Blocks of several threads count one after the other.
_COUNTING = threading.RLock()


@contextmanager
def attribute(modules: list[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of some modules inside a `with` block.

    After it the value is that of the latest block that still holds it, or, after the last one, as it was before them.
    """
    block = object()
    with _COUNTING:
        for module in modules:
            before, values = vars(module).get(held(name), (getattr(module, name), {}))
            setattr(module, held(name), (before, {**values, block: value}))
            setattr(module, name, value)
    try:
        yield
    finally:
        with _COUNTING:
            for module in modules:
                before, values = getattr(module, held(name))
                values = {other: held_value for other, held_value in values.items() if other is not block}
                setattr(module, name, next(reversed(values.values()), before))
                if values:
                    setattr(module, held(name), (before, values))
                else:
                    delattr(module, held(name))


def held(name: str) -> str:
    """Where a module keeps what its attribute `name` was, and what each open block has set it to."""
    return f"_spon_held_{name}"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`with evaluation_mode(model):` dropout off, every module's own mode restored after."""
    # The wrappers of torch.compile hand attributes on to what they wrap.
    modules = [module for module in model.modules() if "_orig_mod" not in module._modules]
    with attribute(modules, "training", False):
        yield


@contextmanager
def dense_mode(model: nn.Module) -> Iterator[None]:
    """`with dense_mode(model):` SPON off, so the model is its own dense teacher; other adapters stay as they are.

    A repair LoRA is a part of SPON and off, too.
    A merged model is dense with the weights that it has: what was merged into W itself (a LoRA, folded gains) stays.
    SPON's `modules_to_save` are off, too. Unlike PEFT's `disable_adapter()` it touches no `requires_grad`, so it is
    safe between forward and backward.
    """
    found = sites(model).values()
    layers = [site for site in found if isinstance(site, SponLayer)]
    merged = [site for site in found if not isinstance(site, SponLayer)]
    names = {name for layer in layers for name in layer.spon_settings}
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and names & set(module.active_adapters)
    ]
    with switched_off([*layers, *wrappers]), attribute(merged, "_dense", True), without_repair_lora(model):
        yield


@contextmanager
def without_repair_lora(model: nn.Module) -> Iterator[None]:
    """`with without_repair_lora(model):` the LoRA that is part of the repair is off, other ones stay as they are.

    Raises:
        `ValueError`: it is merged into the weights.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(REPAIR_LORA in layer.merged_adapters for layer in layers):
        raise ValueError("The repair LoRA is merged into the weights; call model.unmerge_adapter() first.")
    with only_active(layers, lambda name: name != REPAIR_LORA):
        yield


@contextmanager
def only_active(layers: list[LoraLayer], wanted: Callable[[str], bool]) -> Iterator[None]:
    """`with only_active(layers, wanted):` of the active LoRAs only those with a wanted name are active."""
    changed: dict[tuple[str, ...], list[LoraLayer]] = {}
    for layer in layers:
        names = tuple(name for name in layer.active_adapters if wanted(name))
        if len(names) < len(layer.active_adapters):
            changed.setdefault(names, []).append(layer)
    with ExitStack() as stack:
        for names, group in changed.items():
            stack.enter_context(attribute(group, "_active_adapter", list(names)))
        yield


def switched_off(modules: list[nn.Module]):
    """`with switched_off(modules):` these tuner layers are off, also after a `disable_adapter()` block inside."""
    return attribute(modules, "_disable_adapters", True)


def keep_switched_off(model: nn.Module, enabled: bool) -> None:
    """After PEFT has switched all tuner layers on or off: what open `switched_off` blocks hold, and leave behind."""
    for module in model.modules():
        if (state := vars(module).get(held("_disable_adapters"))) is not None:
            setattr(module, held("_disable_adapters"), (not enabled, state[1]))
            module._disable_adapters = True


@contextmanager
def without_anchors(model: nn.Module) -> Iterator[None]:
    """`with without_anchors(model):` plain sparsity, W S(x) + b, without anchors, gains and a repair LoRA."""
    with layer_flag(model, "_anchors_enabled", False), without_repair_lora(model):
        yield


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
