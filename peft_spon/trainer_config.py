# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What [`SponTrainer`] can be told, and what of it cannot work."""

from dataclasses import dataclass, field
from typing import Any

import torch


try:
    from trl import SFTConfig, SFTTrainer  # noqa: F401  trainer.py takes it from here
except ImportError as error:
    raise ImportError("SponTrainer needs TRL and datasets: pip install 'peft_spon[train]'") from error


OWN_LOSS = "the loss of SponTrainer is the KL divergence from the dense to the sparse model"


@dataclass
class SponTrainingConfig(SFTConfig):
    r"""
    Configuration of [`SponTrainer`]: everything of TRL's [`~trl.SFTConfig`], and the following.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `0.2`):
            Peak learning rate of the anchors, relative to the size of what they can replace: the mean over tokens of
            what S removes from their layer, as a root mean square over features, measured before the first step.
            Layers and models of any scale learn alike.
        gain_learning_rate (`float`, *optional*, defaults to `0.01`):
            Peak learning rate of the gains, which are relative by nature. Smaller by itself at low sparsity, where S
            removes less than a fifth of what the layers put out: by the square of that share.
        relative_learning_rate (`bool`, *optional*, defaults to `True`):
            `False`: `learning_rate` is in the units of the layer's activations, as in the paper.
        repair_lora (`int`, *optional*, defaults to `0`):
            Rank of a LoRA beneath SPON that is trained with the anchors, to the same end, and is part of the repair:
            `dense_mode` is without it. 0: none is added, but one that is there is trained on. 16 was measured. It is
            saved beside the adapter, loads with `load_with_lora`, and costs nothing at run time once it is merged:
            the merged weights are then no longer the base's.
        repair_lora_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of that LoRA.
        warmup_share (`float`, *optional*, defaults to `0.1`):
            Share of the steps, rounded down, over which the rates rise from 0; `warmup_steps` overrides it.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of teacher and student in the KL divergence.
        calibration_tokens (`int`, *optional*, defaults to `8192`):
            Tokens of the training data on which an adapter without thresholds is calibrated before the first step,
            and on which thresholds are fitted anew.
        recalibrations (`int`, *optional*, defaults to `4`):
            How often, evenly spread over the training, the thresholds are fitted anew to the activations of the
            sparse model as it is by then, on `calibration_tokens` of the training data. What a layer sees changes with
            the anchors before it, so this keeps the realised sparsity at the wanted one. 0: the thresholds stay as
            the training finds them.
        report_to_html (`bool`, *optional*, defaults to `False`):
            After the last step measure a report, on held-out data if there is any, and write it as `report.html` into
            `output_dir`; see docs/report.md. For trainings in one process.

    Defaults that differ from TRL's: `bf16` only where there is an accelerator, `ddp_find_unused_parameters=False`
    (every anchor is used in every step; set it to `True` for mixture-of-experts models).
    """

    learning_rate: float = field(
        default=0.2,
        metadata={
            "help": "Peak learning rate of the anchors, relative to the mean of what S removes from their layer."
        },
    )
    gain_learning_rate: float = field(default=0.01, metadata={"help": "Peak learning rate of the gains."})
    relative_learning_rate: bool = field(
        default=True,
        metadata={"help": "False: `learning_rate` is in the units of the layer's activations, as in the paper."},
    )
    repair_lora: int = field(
        default=0,
        metadata={"help": "Rank of a LoRA beneath SPON that is trained with the anchors and is part of the repair."},
    )
    repair_lora_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that LoRA."})
    warmup_share: float = field(
        default=0.1,
        metadata={"help": "Share of the steps over which the rates rise from 0; `warmup_steps` overrides it."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of teacher and student in the KL divergence."}
    )
    calibration_tokens: int = field(
        default=8192,
        metadata={
            "help": "Tokens of the training data on which an adapter without thresholds is calibrated before the "
            "first step, and on which thresholds are fitted anew."
        },
    )
    recalibrations: int = field(
        default=4,
        metadata={
            "help": "How often, evenly spread over the training, the thresholds are fitted anew to the activations of "
            "the sparse model; 0 for never."
        },
    )
    report_to_html: bool = field(
        default=False, metadata={"help": "Write a report of the trained model, report.html, into `output_dir`."}
    )

    def __post_init__(self):
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False  # TRL's default is bf16, which stops with an error where there is no accelerator
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # needed with reentrant checkpointing, and faster
        if self.loss_type == "chunked_nll":
            self.loss_type = "nll"  # TRL 1.7 to 1.14 replace the model's forward for this default; we bring our own
        super().__post_init__()
        if self.loss_type not in (None, "nll"):
            raise ValueError(f"loss_type is {self.loss_type!r}, but {OWN_LOSS}; leave it out.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor!r}, but {OWN_LOSS}, and the dense model's "
                "predictions are no labels to smooth; leave it out."
            )
        if vars(self).get("router_aux_loss_coef"):
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef!r}, but {OWN_LOSS}, and the routers are frozen; "
                "leave it out."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}; use a number above 0, 1.0 for plain KL.")
        if self.calibration_tokens < 1:
            raise ValueError(f"calibration_tokens is {self.calibration_tokens!r}; use at least 1, e.g. 8192.")
        if self.recalibrations < 0:
            raise ValueError(f"recalibrations is {self.recalibrations!r}; use 0 for none, or a number above, e.g. 4.")
        if not self.gain_learning_rate >= 0:
            raise ValueError(f"gain_learning_rate is {self.gain_learning_rate!r}; use a number >= 0, e.g. 0.01.")
        if isinstance(self.repair_lora, bool) or not isinstance(self.repair_lora, int) or self.repair_lora < 0:
            raise ValueError(f"repair_lora is {self.repair_lora!r}; use 0 for none, or the LoRA's rank, e.g. 16.")
        if not self.repair_lora_learning_rate >= 0:
            raise ValueError(
                f"repair_lora_learning_rate is {self.repair_lora_learning_rate!r}; use a number >= 0, e.g. 1e-3."
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share is {self.warmup_share!r}; use a number in [0, 1), 0 for no warm-up.")
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True replaces the output head, whose input the loss needs; leave it out."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As transformers'; without `warmup_steps`, `warmup_share` of the training, and none of less than a step."""
        return super().get_warmup_steps(num_training_steps) or int(self.warmup_share * num_training_steps)

    @classmethod
    def published(cls, output_dir: str, **kwargs: Any) -> "SponTrainingConfig":
        """
        The published recipe (SPON, arXiv 2512.12744), as two independent replications have it: AdamW without decay at
        1e-5, 8 blocks of 128 tokens, 10 epochs. For [`SponConfig.published`].

        Args:
            output_dir (`str`): where checkpoints go.
            kwargs: any other field, or one to override.
        """
        recipe = {
            "learning_rate": 1e-5,
            "relative_learning_rate": False,
            "warmup_share": 0.0,
            "recalibrations": 0,
            "max_length": 128,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 10,
        }
        return cls(output_dir, **{**recipe, **kwargs})


def check_arguments(args: Any, given: dict[str, Any]) -> None:
    """Refuse what SponTrainer's own loss leaves no room for.

    Args:
        args: the settings.
        given (`dict`): the arguments that would go to TRL's trainer.

    Raises:
        `TypeError`: `args` is of another class.
        `ValueError`: metrics of logits, or a loss, are given.
    """
    if not isinstance(args, SponTrainingConfig):
        raise TypeError(f"args is a {type(args).__name__}; SponTrainer takes a SponTrainingConfig.")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(name) is not None:
            raise ValueError(
                f"{name} needs the logits of all tokens, which are never made here; kl, perplexity and "
                "top1_agreement are evaluated by themselves, and peft_spon.evaluate() reports more."
            )
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            f"compute_loss_func was given, but {OWN_LOSS}; leave it out, or use TRL's SFTTrainer for a loss of "
            "your own."
        )
