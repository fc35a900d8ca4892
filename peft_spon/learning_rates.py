# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast each anchor, the gains and other trained weights learn."""

from typing import Any

from torch import nn

from .sites import spon_layers
from .statistics import Removed


# The gains' learning rate is for layers of which S removes this share (root mean squares) or more, on average: it
# falls with the square of a smaller share, as the gain that mends it does. 10 % sparsity removes 0.02, 50 % 0.2.
FULL_GAIN_SHARE = 0.2
# `modules_to_save` are weights of the model, not small additions to it.
MODULES_LEARNING_RATE = 1e-5


def parameter_groups(
    model: nn.Module, learning_rate: float, gain_learning_rate: float, removed: dict[str, Removed]
) -> list[dict[str, Any]]:
    """
    One group for an optimizer per layer's anchor, one for the gains, one for the rest; none is empty.

    Args:
        model (`torch.nn.Module`): a model with a SPON adapter.
        learning_rate (`float`): of the anchors, relative to the mean of what S removes from their layer.
        gain_learning_rate (`float`): of the gains, where S removes much.
        removed (`dict[str, Removed]`): by layer name; without it both are absolute.
    """
    layers = spon_layers(model)
    groups = []
    for name, layer in layers.items():
        rate = learning_rate * (removed[name].mean if name in removed else 1.0)
        groups += [{"params": [parameter], "lr": rate} for parameter in layer.spon_anchor.values()]
    gains = [gain for layer in layers.values() for gain in layer.spon_gain.values()]
    groups.append({"params": gains, "lr": gain_learning_rate * gain_scale(removed)})
    ours = {parameter for group in groups for parameter in group["params"]}
    groups.append({"params": [p for p in model.parameters() if p not in ours], "lr": MODULES_LEARNING_RATE})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return [group for group in groups if group["params"]]


def lora_apart(groups: list[dict[str, Any]], lora: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """The groups without the parameters of a repair LoRA, which get a group of their own, with its learning rate."""
    trained = [parameter for parameter in lora if parameter.requires_grad]
    own = set(trained)
    rest = [{**group, "params": [p for p in group["params"] if p not in own]} for group in groups]
    return [group for group in [*rest, {"params": trained, "lr": rate}] if group["params"]]


def gain_scale(removed: dict[str, Removed]) -> float:
    """What the gains' learning rate is multiplied by, at most 1."""
    if not removed:
        return 1.0
    share = sum(layer.share for layer in removed.values()) / len(removed)
    return min(1.0, share / FULL_GAIN_SHARE) ** 2
