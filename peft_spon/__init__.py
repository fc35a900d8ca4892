# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""SPON: activation sparsity for language models, repaired by trained anchors, as a PEFT adapter.

Importing this package registers SPON with PEFT.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .allocation import Allocation, allocate
from .calibration import CalibrationResult, calibrate
from .config import SponConfig
from .criteria import CRITERIA, Criterion, register_criterion
from .decode import DecodeSummary, prepare_for_decode, restore_from_decode
from .evaluation import EvaluationResult, evaluate
from .layer import SponLayer
from .linear import SponLinear
from .lora import add_lora, load_with_lora, save_lora, set_trainable, without_lora
from .model import SponModel, set_sparsity
from .modes import dense_mode, every_token_sparse, without_anchors
from .register import register
from .sampling import sample_texts


if TYPE_CHECKING:
    from .trainer import SponTrainer, SponTrainingConfig

register()

__all__ = [
    "CRITERIA",
    "Allocation",
    "CalibrationResult",
    "Criterion",
    "DecodeSummary",
    "EvaluationResult",
    "SponConfig",
    "SponLayer",
    "SponLinear",
    "SponModel",
    "SponTrainer",
    "SponTrainingConfig",
    "__version__",
    "add_lora",
    "allocate",
    "calibrate",
    "dense_mode",
    "evaluate",
    "every_token_sparse",
    "load_with_lora",
    "prepare_for_decode",
    "register_criterion",
    "restore_from_decode",
    "sample_texts",
    "save_lora",
    "set_sparsity",
    "set_trainable",
    "without_anchors",
    "without_lora",
]


def __getattr__(name: str) -> Any:
    # The trainer needs TRL, which is large and optional; everything else works without it.
    if name in ("SponTrainer", "SponTrainingConfig"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
