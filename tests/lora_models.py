# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models with LoRA beneath SPON, and what of them a failed call must leave alone."""

import torch
from models import MODELS, calibrated
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper

from peft_spon import SponConfig, add_lora
from peft_spon.lora import trainable_choice


def lora_config(**fields):
    """A LoRA that is not the identity, so that losing it shows."""
    return LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": "all-linear", **fields})


def spon_config(**fields):
    """`weighted`: a criterion that reads the weights, and has state of its own."""
    return SponConfig(**{"init_weights": False, "sparsity": 0.5, "criterion": "weighted", **fields})


def spon_then_lora(family="llama", lora=None, **fields):
    torch.manual_seed(3)
    model = calibrated(get_peft_model(MODELS[family](), spon_config(**fields)))
    return add_lora(model, lora or lora_config())


def lora_then_spon(family="llama", lora=None, **fields):
    torch.manual_seed(3)
    model = get_peft_model(MODELS[family](), lora or lora_config())
    return calibrated(get_peft_model(model, spon_config(**fields)))


ROUTES = {"spon first": spon_then_lora, "lora first": lora_then_spon}


def shake_heads(model):
    """Heads of `modules_to_save` that differ from the base's."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for i, copy in enumerate(module.modules_to_save.values()):
                    copy.weight.add_(torch.randn_like(copy.weight), alpha=0.1 + i)
    return model


def snapshot(model):
    """All that a failed call must leave alone."""
    return (
        [(name, type(module).__name__) for name, module in model.named_modules()],
        sorted(model.peft_config),
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [list(m.active_adapters) for m in model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))],
        trainable_choice(model),
    )


def trained(model):
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = {"lora": "lora_", "anchors": "spon_", "head": "modules_to_save"}
    return {kind for kind, part in kinds.items() if any(part in name for name in found)}, found
