# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What training moves, and the model without its LoRA."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from packaging.version import Version
from torch import nn

from .._peft import set_requires_grad
from ..layer import SponLayer
from ..modes import only_active, switched_off
from ..repair import REPAIR_LORA
from ..sites import spon_layers
from .adapters import active_lora, lora_layers, repair_lora, task_loras, wrappers
from .checks import expect


# Before that, Trainer restores only the adapters that a checkpoint has in subfolders; SponTrainer restores all.
RESUMES_ALL = Version("5.23.0.dev0")
TRAINABLE = ("lora", "anchors", "both")


class Trainable:
    """
    Of a SPON tuner: what training moves, where there is a LoRA beneath.

    Attributes:
        trainable_choice (`str`, *optional*): what [`set_trainable`] chose.
    """

    trainable_choice: str | None = None


def check_trainable(what: str) -> None:
    """Raises `ValueError` for an unknown choice."""
    if what not in TRAINABLE:
        raise ValueError(f"trainable is {what!r}; use one of {', '.join(TRAINABLE)}.")


def set_trainable(model: nn.Module, what: str) -> None:
    """
    Choose what training moves: the active LoRA, the active SPON adapter's anchors and gains (with its repair LoRA, if
    there is one), or both.

    Args:
        model (`torch.nn.Module`): a model with SPON and LoRA.
        what (`str`): `"lora"`, `"anchors"` or `"both"`. Holds until the next call, also when adapters are switched.

    Raises:
        `ValueError`: an unknown choice, or a model without SPON or without LoRA.
        `TypeError`: arguments in another order.
    """
    expect("set_trainable(model, what)", "model", model, nn.Module, "a model with SPON and LoRA")
    layers = apply_trainable(model, what)
    if what != "lora" and "default" in layers[0].active_adapters and Version(transformers.__version__) < RESUMES_ALL:
        warnings.warn(
            f"transformers {transformers.__version__} resumes a checkpoint of a SPON adapter named 'default' beside a "
            "LoRA without its anchors. Upgrade to 5.23, or name it: get_peft_model(base, config, 'anchors').",
            stacklevel=2,
        )


def apply_trainable(model: nn.Module, what: str) -> list[SponLayer]:
    """`set_trainable` without its warning; gives the SPON layers."""
    check_trainable(what)
    layers = list(spon_layers(model).values())
    lora = active_lora(model)
    if not layers or not lora:
        raise ValueError(
            f"{type(model).__name__} has {'no LoRA' if layers else 'no SPON adapter'}; set_trainable chooses between "
            "the two. See add_lora."
        )
    if what == "lora" and not task_loras(lora):
        raise ValueError(
            "The only LoRA of the model is that of SPON's repair, which is trained with the anchors; use 'anchors', "
            "or add_lora() one for your task."
        )
    set_requires_grad(model, [*layers[0].active_adapters, *repair_lora(lora)], what in ("anchors", "both"))
    if task_loras(lora):
        set_requires_grad(model, task_loras(lora), what in ("lora", "both"))
    tuner = tuner_of(model)
    if tuner is not None:
        tuner.trainable_choice = what
    return layers


def tuner_of(model: nn.Module) -> Trainable | None:
    """The SponModel in a model; None where transformers' `add_adapter` has put SPON in."""
    return next((module for module in model.modules() if isinstance(module, Trainable)), None)


def trainable_choice(model: nn.Module) -> str | None:
    """What `set_trainable` chose; None: there was no choice."""
    tuner = tuner_of(model)
    return None if tuner is None else tuner.trainable_choice


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """`with without_lora(model):` LoRA off, SPON and its repair LoRA as they are. (`dense_mode`: the other way round.)

    Raises:
        `ValueError`: LoRA is merged into the weights.
    """
    expect("without_lora(model)", "model", model, nn.Module, "a model with SPON and LoRA")
    names = set(task_loras(active_lora(model)))
    layers = lora_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights; call model.unmerge_adapter() first.")
    off = [wrapper for wrapper in wrappers(model) if wrapper._adapters & names]
    if repair_lora(active_lora(model)):
        with switched_off(off), only_active(layers, lambda name: name == REPAIR_LORA):
            yield
    else:
        with switched_off([*layers, *off]):
            yield
