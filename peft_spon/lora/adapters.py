# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapters of a SPON model: how they are marked, named and found."""

import copy
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, LoraModel, PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from torch import nn

from ..config import SponPeftType
from ..repair import REPAIR_LORA


LORA_NAME = "task"


class LoraBeneathSponConfig(LoraConfig):
    """A `LoraConfig` inside a SPON model, made by `beneath`; saved as the plain `LoraConfig` it is."""

    def __post_init__(self):
        raise ValueError(
            f"{CONFIG_NAME} has peft_type={SponPeftType.LORA.value!r}, which no file has: it was edited. Save or "
            "download the adapter again."
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": PeftType.LORA}


class LoraBeneathSpon(LoraModel):
    """How the tensors of a LoRA inside a SPON model are called in files: as in a model without SPON."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return super()._remove_adapter_name_from_key(key.replace(".base_layer.lora_", ".lora_"), adapter_name)


def beneath(config: LoraConfig) -> LoraBeneathSponConfig:
    """The same configuration, as of a LoRA that lies beneath SPON."""
    config = copy.copy(config)
    config.__class__ = LoraBeneathSponConfig
    config.peft_type = SponPeftType.LORA
    return config


def is_plain_lora(config: PeftConfig) -> bool:
    """True for LoRA itself, not for other methods, some of whose configurations are subclasses of LoRA's."""
    return config.peft_type in (PeftType.LORA, SponPeftType.LORA)


def lora_names(configs: dict[str, PeftConfig]) -> list[str]:
    """Names of the LoRA adapters beneath SPON."""
    return [name for name, config in configs.items() if isinstance(config, LoraBeneathSponConfig)]


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """All LoRA layers, beneath SPON layers or where SPON has no layer."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_lora(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters that take part in the forward."""
    layers = [layer for layer in lora_layers(model) if layer.r]
    return list(layers[0].active_adapters) if layers else []


def task_loras(names: list[str]) -> list[str]:
    """Of some LoRAs those that are no part of SPON's repair."""
    return [name for name in names if name != REPAIR_LORA]


def repair_lora(names: list[str]) -> list[str]:
    """Of some LoRAs the one that is part of SPON's repair, if it is among them."""
    return [name for name in names if name == REPAIR_LORA]


def repair_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the repair LoRA."""
    return [
        parameter
        for layer in lora_layers(model)
        for name, parameter in layer.named_parameters()
        if f".{REPAIR_LORA}." in f".{name}."
    ]


def wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """What holds the `modules_to_save` of adapters."""
    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


def free_name(taken: dict[str, Any]) -> str:
    """`"task"`, or `"task2"`, ... where that is taken."""
    return next(name for name in [LORA_NAME, *(f"{LORA_NAME}{i}" for i in range(2, 1000))] if name not in taken)
