# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The one place that touches PEFT's and transformers' registries."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .config import SponConfig, SponPeftType
from .lora import LoraBeneathSpon, LoraBeneathSponConfig
from .merged import METHOD, SponMergedConfig
from .merged_loading import SponQuantizer
from .model import SponModel


def register() -> None:
    """Make PEFT know SPON (`get_peft_model`, `PeftModel.from_pretrained`, transformers' `add_adapter`), and
    transformers the merged checkpoints.

    Raises:
        `RuntimeError`: another package has registered a method of the name SPON.
    """
    key = SponPeftType.SPON
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(key, SponConfig)
    if owner is not SponConfig:
        raise RuntimeError(
            f"PEFT already has a method named {key.value!r}: {owner.__module__}.{owner.__qualname__}. Import only one "
            "of the two packages in a process."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = SponConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = SponModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = SponModel.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[SponPeftType.LORA] = LoraBeneathSponConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SponPeftType.LORA] = LoraBeneathSpon
    PEFT_TYPE_TO_PREFIX_MAPPING[SponPeftType.LORA] = LoraBeneathSpon.prefix
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SponMergedConfig)
        register_quantizer(METHOD)(SponQuantizer)
