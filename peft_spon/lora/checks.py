# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What cannot be combined with SPON, and what a LoRA beneath it must not have, each with its remedy."""

import os
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import SponConfig
from ..layer import SponLayer
from ..sites import spon_layers
from .adapters import is_plain_lora, lora_layers


def expect(call: str, argument: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raises `TypeError` for an argument of another kind, as when the order is mixed up."""
    if not isinstance(value, kind):
        shown = f" {value!r}" if isinstance(value, (str, os.PathLike, int, float)) else ""
        raise TypeError(f"{call}: {argument} must be {what}, not {type(value).__name__}{shown}.")


def check_other_methods(model: nn.Module, configs: dict[str, PeftConfig]) -> None:
    """Raises `ValueError` if the model has adapters of methods with which SPON does not combine."""
    for name, config in configs.items():
        if isinstance(config, SponConfig) or is_plain_lora(config):
            continue
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"Adapter {name!r} is of type {config.peft_type.value}: a prompt that is learned for the dense model, "
                "and that no weights can take up. SPON does not combine with it; put SPON on the base model without "
                "it: get_peft_model(model.get_base_model(), SponConfig(...)), or load the base again."
            )
        check_lora(config, name)
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, (SponLayer, LoraLayer)):
            raise ValueError(
                f"'{name}' is a {type(layer).__module__}.{type(layer).__name__} layer; SPON combines with LoRA only. "
                "Take the other adapters out of the model first: merge_and_unload() or unload() of their PeftModel."
            )


def check_lora(config: PeftConfig, name: str) -> None:
    """Raises `ValueError` for what cannot lie beneath SPON."""
    if isinstance(config, SponConfig):
        raise ValueError(f"What is given as the LoRA {name!r} is a SPON adapter; give a LoRA there.")
    if not is_plain_lora(config):
        raise ValueError(
            f"Adapter {name!r} is of type {config.peft_type.value}; SPON combines with LoRA only. Merge it first: "
            "base = model.merge_and_unload() of its PeftModel, then get_peft_model(base, SponConfig(...))."
        )
    if config.bias != "none":
        raise ValueError(
            f"The LoRA adapter {name!r} has bias={config.bias!r}, but the biases belong to the base model, and SPON "
            "merges into them; use bias='none'."
        )
    if config.trainable_token_indices:
        raise ValueError(
            f"The LoRA adapter {name!r} has trainable_token_indices, which PEFT 0.21 cannot save beside an adapter "
            "without them; use modules_to_save=['embed_tokens'] for new tokens."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The LoRA adapter {name!r} has alora_invocation_tokens, which choose the tokens it acts on; SPON does "
            "not pass them on. Use a LoRA that acts on all tokens."
        )
    if config.arrow_config is not None and not config.arrow_config.task_adapter_names:
        raise ValueError(
            f"The LoRA adapter {name!r} is an Arrow router, which routes between LoRAs that are in the model: "
            "peft.create_arrow_model(base, folders, arrow_config) first, and SPON over what that gives."
        )
    if config.layer_replication:
        raise ValueError(
            f"The LoRA adapter {name!r} has layer_replication={config.layer_replication}, which rebuilds the base's "
            "list of blocks; SPON's layers belong to the base as it is. Save a base model with the repeated blocks, "
            "and put SPON and a LoRA without layer_replication onto that."
        )


def check_modules_to_save(model: nn.Module, spon: PeftConfig, lora: PeftConfig) -> None:
    """Raises `ValueError` if both adapters would train a copy of the same module: PEFT runs one at a time."""
    both = set(spon.modules_to_save or []) & set(lora.modules_to_save or [])
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if both & names:
        raise ValueError(
            f"modules_to_save has {sorted(both & names)} in the SPON adapter and in the LoRA, and only one copy can "
            "run; leave it out of one of them. (PEFT adds the classifier by itself where task_type is 'SEQ_CLS' or "
            "'TOKEN_CLS': leave task_type out of the SponConfig; the LoRA's classifier stays active.)"
        )
    wanted = tuple(lora.modules_to_save or [])
    sparse = [name for name in spon_layers(model) if name.endswith(wanted)]
    if sparse:
        raise ValueError(
            f"modules_to_save of the LoRA has '{sparse[0]}', which SPON makes sparse, so that its weights must stay; "
            "leave it out, or name it in exclude_modules of the SponConfig."
        )


def check_biases(layers: list[LoraLayer], adapter_names: list[str] | None) -> None:
    """Raises `ValueError` if a bias of these LoRA adapters (None: the active ones) has none of the base to merge into.

    PEFT would raise when the layer's weight is merged already.
    """
    for layer in layers:
        for name in layer.active_adapters if adapter_names is None else adapter_names:
            if layer.lora_bias.get(name) and getattr(layer.get_base_layer(), "bias", None) is None:
                raise ValueError(
                    f"The LoRA {name!r} has lora_bias=True, and the base has layers without a bias to merge it into. "
                    "Leave it unmerged, or train one without lora_bias."
                )


def check_finite(layers: list[LoraLayer]) -> None:
    """Raises `ValueError` if something in the active LoRA adapters of these layers is NaN or infinite."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if any(f".{adapter}." in name for adapter in layer.active_adapters) and not parameter.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(layer.active_adapters)} seems to be "
                    "broken. Nothing was merged."
                )


def check_can_be_reference(model: nn.Module, source: str, name: str) -> None:
    """Raises `ValueError` if a copy of an adapter could not be a reference: the LoRA beneath belongs to both."""
    parameters = [p for layer in lora_layers(model) for key, p in layer.named_parameters() if "lora_" in key]
    if any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"Adapter {name!r} would be a copy of {source!r} (as TRL's preference trainers add it for a reference), "
            "but the LoRA beneath SPON, which is trained, would be part of both. Give the trainer a ref_model of its "
            "own, load_with_lora(base, folder).get_base_model(); where it takes none (GRPO), use beta=0.0, or freeze "
            'the LoRA: set_trainable(model, "anchors").'
        )
