# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA together with SPON: y = (W + B A) (S(x) + anchor) + b.

LoRA lies beneath, SPON outermost, whichever came first: LoRA sees the sparse input, so that both merge exactly. (LoRA
outside would see the raw x, and W S(x) + B A x is no linear layer with a sparse input.) `get_peft_model` of SPON over
a LoRA model takes that model's LoRA over; [`add_lora`] slides a LoRA beneath the SPON that is there. In the resulting
`PeftModel` both adapters have their names, SPON's by default `"default"` and LoRA's `"task"`.

A LoRA named `"spon-repair"` is a part of SPON's repair: `SponTrainer` trains it with the anchors so that the sparse
model predicts what the dense one *without* it does. It stays active beside whatever other LoRA is.
"""

from .adapters import (
    LoraBeneathSpon,
    LoraBeneathSponConfig,
    active_lora,
    lora_names,
    repair_lora,
    repair_parameters,
    task_loras,
)
from .adding import add_lora, add_repair_lora
from .belonging import lora_checksums, named_loras
from .checks import check_can_be_reference
from .loading import HUB_ARGUMENTS, load_loras_along, load_with_lora
from .saving import save_lora
from .taken_over import model_inside
from .trained import RESUMES_ALL, apply_trainable, set_trainable, trainable_choice, without_lora
from .tuner import OverLora


__all__ = [
    "HUB_ARGUMENTS",
    "LoraBeneathSpon",
    "LoraBeneathSponConfig",
    "OverLora",
    "RESUMES_ALL",
    "active_lora",
    "add_lora",
    "add_repair_lora",
    "apply_trainable",
    "check_can_be_reference",
    "load_loras_along",
    "load_with_lora",
    "lora_checksums",
    "lora_names",
    "model_inside",
    "named_loras",
    "repair_lora",
    "repair_parameters",
    "save_lora",
    "set_trainable",
    "task_loras",
    "trainable_choice",
    "without_lora",
]
