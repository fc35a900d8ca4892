# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Training anchors by distillation: the teacher is the same model with SPON off."""

import itertools
import json
import math
import os
import re
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("SponTrainer needs TRL and datasets: pip install 'peft_spon[train]'") from error

from .calibration import calibrate
from .cards import public_name, quoted, without_local_base
from .config import SponConfig
from .data import check_training_data
from .distillation import SelfDistillation, noise_ahead, noisy_embedding, without_dropout
from .layer import SponLayer
from .lora import active_lora, apply_trainable, trainable_choice
from .losses import perplexity
from .modes import attribute, differentiable, evaluation_mode, every_token_sparse
from .sites import adapter_config, resolve_adapter, spon_layers
from .statistics import Removed, removed_by_s


logger = logging.get_logger(__name__)

# The KL before and after training is measured on the rows of so many steps, but on this many rows at least and not on
# more than so many tokens: little beside a training of 100 steps.
COMPARED_STEPS = 2
COMPARED_ROWS = 8
COMPARED_TOKENS = 8192
# Tokens on which the scale of the learning rates is measured.
SCALE_TOKENS = 8192
# Training stops when the mean KL of so many steps is twice that before the first step.
DIVERGENCE_WINDOW = 20
DIVERGENCE_FACTOR = 2.0
# A rise of the KL that says something: by more than one per cent, and more than fp32 rounding makes of equal
# distributions (nats).
KL_RISE = 0.01
KL_ROUNDING = 1e-6
# The gains' learning rate is for layers of which S removes this share (root mean squares) or more, on average: it
# falls with the square of a smaller share, as the gain that mends it does. 10 % sparsity removes 0.02, 50 % 0.2.
FULL_GAIN_SHARE = 0.2
# `modules_to_save` are weights of the model, not small additions to it.
MODULES_LEARNING_RATE = 1e-5
OWN_LOSS = "the loss of SponTrainer is the KL divergence from the dense to the sparse model"
NO_LABELS = (
    "Nothing can be learned: in the training data every label is -100 (TRL leaves such rows out) or every sequence "
    "has one token. Check completion_only_loss, assistant_only_loss, max_length, and the labels."
)
# Where a checkpoint's trainer_state.json keeps the mark and the window of the divergence watch.
WATCH_KEY = "SponDivergenceWatch"
DENSE_BROKEN = "and the dense model's log-likelihood is not finite either"


@dataclass
class SponTrainingConfig(SFTConfig):
    r"""
    Configuration of [`SponTrainer`]: everything of TRL's [`~trl.SFTConfig`], and the following.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `0.1`):
            Peak learning rate of the anchors, relative to the size of what they replace: the root mean square of what
            S removes from their layer, measured before the first step. Layers and models of any scale learn alike.
        gain_learning_rate (`float`, *optional*, defaults to `0.025`):
            Peak learning rate of the gains, which are relative by nature. Smaller by itself at low sparsity, where S
            removes less than a fifth of what the layers put out: by the square of that share.
        relative_learning_rate (`bool`, *optional*, defaults to `True`):
            `False`: `learning_rate` is in the units of the layer's activations, as in the paper.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of teacher and student in the KL divergence.
        calibration_tokens (`int`, *optional*, defaults to `65536`):
            Tokens of the training data on which an adapter without thresholds is calibrated before the first step.
        recalibrations (`int`, *optional*, defaults to `0`):
            How often, evenly spread over the training, the thresholds are fitted anew to the activations of the
            sparse model as it is by then, on the first eighth of `calibration_tokens` of the training data. What a
            layer sees changes with the anchors before it, so this keeps the realised sparsity near the wanted one.

    Defaults that differ from TRL's: `bf16` only where there is an accelerator, `ddp_find_unused_parameters=False`
    (every anchor is used in every step; set it to `True` for mixture-of-experts models).
    """

    learning_rate: float = field(
        default=0.1,
        metadata={
            "help": "Peak learning rate of the anchors, relative to the root mean square of what S removes from their "
            "layer."
        },
    )
    gain_learning_rate: float = field(default=0.025, metadata={"help": "Peak learning rate of the gains."})
    relative_learning_rate: bool = field(
        default=True,
        metadata={"help": "False: `learning_rate` is in the units of the layer's activations, as in the paper."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of teacher and student in the KL divergence."}
    )
    calibration_tokens: int = field(
        default=65536,
        metadata={
            "help": "Tokens of the training data on which an adapter without thresholds is calibrated before the "
            "first step."
        },
    )
    recalibrations: int = field(
        default=0,
        metadata={
            "help": "How often, evenly spread over the training, the thresholds are fitted anew to the activations of "
            "the sparse model."
        },
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
            raise ValueError(f"calibration_tokens is {self.calibration_tokens!r}; use at least 1, e.g. 65536.")
        if self.recalibrations < 0:
            raise ValueError(f"recalibrations is {self.recalibrations!r}; use 0 for none, or a number above, e.g. 4.")
        if not self.gain_learning_rate >= 0:
            raise ValueError(f"gain_learning_rate is {self.gain_learning_rate!r}; use a number >= 0, e.g. 0.025.")
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True replaces the output head, whose input the loss needs; leave it out."
            )

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
            "max_length": 128,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 10,
        }
        return cls(output_dir, **{**recipe, **kwargs})


class TrainingDiverged(RuntimeError):
    """The KL became NaN or infinite or doubled; the message says where the last good anchors are."""


class SponTrainer(SFTTrainer):
    """
    Trainer that fits a SPON adapter's anchors so that the sparse model predicts what the dense one does.

    The loss is the forward KL from the model with SPON off to the model with it on, exact over the vocabulary and
    averaged over the tokens whose label is not -100 (SPON, arXiv 2512.12744, section 3), without dropout. A LoRA
    beneath SPON belongs to both models: it is frozen, and what it has learned is what the sparse model keeps. Data,
    packing, evaluation, checkpoints, trackers and the Hub are those of TRL's [`~trl.SFTTrainer`]. An adapter without
    thresholds is calibrated on the training data first. S is active on every token while training, whatever `prefill`
    says.

    Logged, in training and with `eval_` in evaluation, as means over tokens: `kl` (nats), `perplexity` and
    `dense_perplexity` on the labels, `top1_agreement` with the dense model; `num_tokens`. At the end the KL on
    held-out data (training data, if there is no `eval_dataset`) is compared with that of the anchors before.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): a model, or its name; with a SPON adapter or without.
        args ([`SponTrainingConfig`], *optional*): training settings.
        peft_config ([`SponConfig`], *optional*): adapter to add; default for a model without one: `SponConfig()`.
        kwargs: all other arguments of [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `processing_class`, ...

    Raises:
        `ValueError`: no anchor can be trained; from `train()` before the first step: nothing can be learned.
        `TrainingDiverged`: from `train()`, when the KL is NaN, infinite, or has doubled.

    Example:

    ```python
    >>> from peft_spon import SponConfig, SponTrainer, SponTrainingConfig

    >>> trainer = SponTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M",
    ...     args=SponTrainingConfig(output_dir="smollm-spon", max_steps=200),
    ...     peft_config=SponConfig(sparsity=0.5),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "spon"]
    _name = "SPON"
    _paper = {
        "title": "Resting Neurons, Active Insights: Robustifying Activation Sparsity in LLMs via Spontaneity",
        "id": "2512.12744",
        "citation": textwrap.dedent(
            """\
            @article{xu2025spon,
                title  = {Resting Neurons, Active Insights: Robustifying Activation Sparsity in LLMs via Spontaneity},
                author = {Xu, Haotian and Yang, Jiannan and Gao, Tian and Weng, Tsui-Wei and Ma, Tengfei},
                year   = 2025,
                eprint = {arXiv:2512.12744}
            }"""
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SponTrainingConfig | None = None,
        *,
        peft_config: SponConfig | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SponTrainingConfig(f"{name.split('/')[-1] or 'model'}-SPON")
        if not isinstance(args, SponTrainingConfig):
            raise TypeError(f"args is a {type(args).__name__}; SponTrainer takes a SponTrainingConfig.")
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} needs the logits of all tokens, which are never made here; kl, perplexity and "
                    "top1_agreement are evaluated by themselves, and peft_spon.evaluate() reports more."
                )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                f"compute_loss_func was given, but {OWN_LOSS}; leave it out, or use TRL's SFTTrainer for a loss of "
                "your own."
            )
        has_adapter = isinstance(model, nn.Module) and bool(spon_layers(model))
        if isinstance(model, PeftModel) and not has_adapter:
            raise ValueError(
                f"The model has the adapters {sorted(model.peft_config)}, but no SPON; put it over them first: "
                "model = get_peft_model(model, SponConfig(sparsity=0.5))."
            )
        if peft_config is None and not has_adapter:
            peft_config = SponConfig(task_type="CAUSAL_LM")
        is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset") or kwargs.get("formatting_func")
        if not is_prepared:
            check_training_data(kwargs.get("train_dataset"), kwargs.get("eval_dataset"), args.dataset_text_field)
        self._has_own_collator = kwargs.get("data_collator") is not None
        super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)
        self.adapter_name = resolve_adapter(self.model, None)
        self._choice_before = trainable_choice(self.model)
        if active_lora(self.model):
            # The teacher has the LoRA, too: a LoRA that moved would move the target along.
            logger.info("Only the anchors are trained, the LoRA beneath them is frozen until the training ends")
            apply_trainable(self.model, "anchors")
        for layer in spon_layers(self.model).values():
            _keep_fp32(layer)
        if not self._trained_parameters():
            raise ValueError(
                "Nothing to train: no anchor requires a gradient. Load the adapter with is_trainable=True, or give it "
                "anchors (anchor_modules)."
            )
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self._distillation = SelfDistillation(inner, self.args.temperature)
        self._removed: dict[str, Removed] = {}
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._step_sums = torch.zeros(5, device=self.accelerator.device)
        self._watch = _DivergenceWatch()
        self.add_callback(_TrainingEvents(self))

    # ---- before and after the steps ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As [`~trl.SFTTrainer.train`]; a checkpoint that a killed training left half-written is never resumed."""
        resume = self._whole_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        with without_dropout(self.model), differentiable(self.model), self._anchors_chosen():
            return self._train(resume, *args, **kwargs)

    def _whole_checkpoint(self, wanted: str | bool) -> str | bool:
        """The checkpoint to resume: the wanted one, or the last whole one before it; half-written ones are renamed."""
        found = [wanted, None]
        if self.is_world_process_zero():
            try:
                found[0] = last_whole_checkpoint(wanted, self.args.output_dir)
            except ValueError as error:
                found[1] = str(error)
        found = broadcast_object_list(found)
        if found[1]:
            raise ValueError(found[1])
        return found[0]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # It is written last and says that the folder is whole, which one that is overwritten no longer is.
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.state.stateful_callbacks[WATCH_KEY] = {"args": {}, "attributes": self._watch.to_dict()}
        super()._save_checkpoint(model, trial)

    @contextmanager
    def _anchors_chosen(self) -> Iterator[None]:
        """Only the anchors are trained in here; after it what `set_trainable` chose before this trainer was made."""
        if not active_lora(self.model):
            yield
            return
        apply_trainable(self.model, "anchors")
        try:
            yield
        finally:
            if self._choice_before is not None:
                apply_trainable(self.model, self._choice_before)

    def _train(self, *args: Any, **kwargs: Any):
        if next(iter(self.train_dataset), None) is None:
            raise ValueError(NO_LABELS)
        self._prepare_adapter()
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # An evaluate() before train() marks the model as prepared without DDP; ranks would drift apart in silence.
            self.model._is_accelerate_prepared = False
        start = self._state()
        self._watch = _DivergenceWatch()
        output = super().train(*args, **kwargs)
        self._compare_with(start, output.metrics)
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        inner = self.model if model is None else model
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(inner, PeftModel) and active_lora(inner) and self.adapter_name == "default" and not is_sharded:
            # Older versions of transformers restore what is in subfolders only: the LoRA.
            inner.load_adapter(resume_from_checkpoint, self.adapter_name, is_trainable=True)

    def _prepare_adapter(self) -> None:
        """Thresholds where they are missing, and the scale of the learning rates."""
        config = adapter_config(self.model, self.adapter_name)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        is_whole = not is_sharded or not any(p.is_meta or p.numel() == 0 for p in self.model.parameters())
        if self._has_thresholds() and not config.calibrated:
            if not is_whole:
                raise ValueError(
                    "The adapter has no thresholds yet, and this process does not hold the whole model to find them; "
                    "calibrate(model, data) in one process, save the adapter, and train that."
                )
            logger.info(f"calibrating on {self.args.calibration_tokens} tokens of the training data")
            calibrate(self.model, **self._calibration_data(self.args.calibration_tokens))
        if self.args.relative_learning_rate:
            if not is_whole:
                raise ValueError(
                    "relative_learning_rate=True measures what S removes from each layer, and this process does not "
                    "hold the whole model; set it to False and give learning_rate in the units of the activations."
                )
            logger.info(f"measuring what S removes, on {SCALE_TOKENS} tokens of the training data")
            self._removed = removed_by_s(self.model, **self._calibration_data(SCALE_TOKENS))

    def _recalibrate(self) -> None:
        tokens = max(1, self.args.calibration_tokens // 8)
        logger.info(f"fitting the thresholds anew to the sparse model, on {tokens} tokens of the training data")
        calibrate(self.model, refit=True, **{**self._calibration_data(tokens), "progress": False})

    def _has_thresholds(self) -> bool:
        return adapter_config(self.model, self.adapter_name).make_criterion().selects == "threshold"

    def _calibration_data(self, tokens: int) -> dict[str, Any]:
        """The same tokens in the same blocks whatever the batch size and the number of processes."""
        settings = {
            "adapter_name": self.adapter_name,
            "batch_size": self.args.per_device_train_batch_size,
            "max_length": self.args.max_length or 1024,
            "progress": None if self._shows_progress() else False,
        }
        is_raw = self._has_own_collator and (self.args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if is_raw or "input_ids" not in next(iter(self.train_dataset), {}):
            return {"data": self._collated(tokens), "max_tokens": None, **settings}
        return {"data": self.train_dataset, "max_tokens": tokens, **settings}

    def _collated(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Training batches as the collator makes them of rows that only it can read, until they hold enough tokens."""
        seen = 0
        for batch in self._loader(self.train_dataset):
            yield {key: value for key, value in batch.items() if key != "labels"}
            seen += batch["input_ids"].numel() * self.accelerator.num_processes
            if seen >= tokens:
                return

    def _loader(self, data: Any) -> Any:
        """All batches of some data, in order, as large as those that are trained on."""
        with (
            attribute([self.args], "dataloader_drop_last", False),
            # Trainer would keep the loader, and give it back when another data set is to be evaluated.
            attribute([self.args], "dataloader_persistent_workers", False),
            attribute([self.args], "per_device_eval_batch_size", self.args.per_device_train_batch_size),
        ):
            return self.get_eval_dataloader(data)

    def _shows_progress(self) -> bool:
        return self.is_local_process_zero() and not self.args.disable_tqdm

    def _state(self) -> tuple[list[torch.Tensor], list[list[dict[str, torch.Tensor]]]]:
        """Copies of what is trained, and of the thresholds and their tables of all layers."""
        tables = [
            [{name: value.clone() for name, value in held.items()} for held in self._tables(layer)]
            for layer in spon_layers(self.model).values()
        ]
        return [p.detach().clone() for p in self._trained_parameters()], tables

    def _set_state(self, state: tuple[list[torch.Tensor], list[list[dict[str, torch.Tensor]]]]) -> None:
        parameters, tables = state
        _assign(self._trained_parameters(), parameters)
        for layer, values in zip(spon_layers(self.model).values(), tables, strict=True):
            for held, value in zip(self._tables(layer), values, strict=True):
                held.update(value)

    @staticmethod
    def _tables(layer: SponLayer) -> list[Any]:
        return [getattr(layer, f"spon_{name}") for name in layer.state_names]

    def _compare_with(self, start: tuple, metrics: dict[str, float]) -> None:
        """Held-out KL with the anchors and thresholds of the start and with those of now, into metrics and log."""
        if self.is_deepspeed_enabled:
            return  # ZeRO-3 holds parameters where they cannot be swapped
        trained = self._state()
        try:
            tokens, (after, before) = self._mean_kls([trained, start], "KL before and after training")
        finally:
            self._set_state(trained)
        if tokens == 0:
            return
        metrics.update({"kl_before": before, "kl_after": after})
        text = "held-out" if self.eval_dataset is not None else "training"
        if not math.isfinite(after):
            self._stop(f"The KL on {text} data is {after} after the last step")
        if self._watch.steps < DIVERGENCE_WINDOW and rises(after, before, DIVERGENCE_FACTOR - 1):
            self._stop(f"The KL diverges: {after:.4g} on {text} data after the last step, {before:.4g} at the start")
        if rises(after, before, KL_RISE):
            logger.warning(
                f"TRAINING MADE THE SPARSE MODEL WORSE: its KL to the dense model on {text} data rose from "
                f"{before:.4f} to {after:.4f}. Lower learning_rate and gain_learning_rate, or train longer."
            )
        else:
            logger.info(f"KL to the dense model on {text} data: {before:.4f} before, {after:.4f} after training")

    def _set_mark(self) -> None:
        """The KL before the first step, on the data that is trained on, so that it is compared with the like."""
        tokens, (kl,) = self._mean_kls([None], "KL before training", self.train_dataset)
        if tokens == 0:
            raise ValueError(NO_LABELS)
        if not math.isfinite(kl):
            raise TrainingDiverged(
                f"The KL is {kl} before the first step: logits are NaN or infinite. Check the model's weights and its "
                "dtype (fp16 overflows, bf16 does not); peft_spon.evaluate(model, data) says which model's they are."
            )
        if kl == 0:
            sparsity = adapter_config(self.model, self.adapter_name).sparsity
            raise ValueError(
                f"Nothing can be learned: the sparse model predicts exactly what the dense one does (sparsity is "
                f"{sparsity:g}). Make it sparse: SponConfig(sparsity=0.5), or model.set_sparsity(0.5)."
            )
        self._watch.start = kl

    def _mean_kl(self, data: Any = None) -> float:
        """Mean KL per token over the first batches of some data; default: held out, or to train on without any."""
        _, (kl,) = self._mean_kls([None], "KL", data)
        return kl

    @torch.no_grad()
    def _mean_kls(self, states: list[tuple | None], text: str, data: Any = None) -> tuple[int, list[float]]:
        """Counted tokens, and the mean KL with each of some anchors and thresholds (None: those of now)."""
        if data is None:
            data = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        sums = torch.zeros(len(states), 5, dtype=torch.float64)
        noisy = noisy_embedding(self._distillation.model)
        with evaluation_mode(self.model_wrapped), noise_ahead(noisy):
            for batch in self._compared(data, text):
                with self._distillation.one_teacher(), self.compute_loss_context_manager():
                    for number, state in enumerate(states):
                        if state is not None:
                            self._set_state(state)
                        rows, _ = self._distill(self.model_wrapped, batch)
                        sums[number] += self._gather_rows(rows, batch)
        return int(sums[0, 0]), (sums[:, 1] / sums[:, 0].clamp(min=1)).tolist()

    def _compared(self, data: Any, text: str) -> Iterator[dict[str, torch.Tensor]]:
        """The first batches of some data that have a label, as many as the KL is measured on."""
        args = self.args
        rows = args.per_device_train_batch_size * self.accelerator.num_processes
        wanted = max(math.ceil(COMPARED_ROWS / rows), COMPARED_STEPS * args.gradient_accumulation_steps)
        loader = self._loader(data)
        if not has_length(loader):  # an endless stream; training sees no more of it
            loader = itertools.islice(loader, max(wanted, args.max_steps * args.gradient_accumulation_steps))
        logger.info(f"measuring the {text}")
        hidden = None if self._shows_progress() else True
        seen = taken = 0
        with tqdm(desc=text, total=wanted, unit=" batches", disable=hidden, leave=False) as bar:
            for batch in loader:
                batch = self._prepare_inputs(batch)
                labels = batch.get("labels", batch["input_ids"])
                sizes = [labels.numel(), int((labels[:, 1:] != -100).sum())]
                tokens, counted = self.accelerator.reduce(torch.tensor(sizes, device=args.device)).tolist()
                if counted == 0:
                    continue
                yield batch
                bar.update()
                seen, taken = seen + tokens, taken + 1
                if taken >= wanted or seen >= COMPARED_TOKENS:
                    return

    # ---- optimisation --------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per layer's anchor, with its relative learning rate, one for the gains, one for the rest."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = []
            for name, layer in spon_layers(model).items():
                rate = self.args.learning_rate * (self._removed[name].rms if name in self._removed else 1.0)
                groups += [{"params": [parameter], "lr": rate} for parameter in layer.spon_anchor.values()]
            gains = [gain for layer in spon_layers(model).values() for gain in layer.spon_gain.values()]
            groups.append({"params": gains, "lr": self.args.gain_learning_rate * self._gain_scale()})
            ours = {parameter for group in groups for parameter in group["params"]}
            groups.append({"params": [p for p in model.parameters() if p not in ours], "lr": MODULES_LEARNING_RATE})
            for group in groups:
                group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
                group["weight_decay"] = self.args.weight_decay
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def _gain_scale(self) -> float:
        if not self._removed:
            return 1.0
        share = sum(removed.share for removed in self._removed.values()) / len(self._removed)
        return min(1.0, share / FULL_GAIN_SHARE) ** 2

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """Mean forward KL per labelled token, normalised over all accumulated batches."""
        rows, outputs = self._distill(model, inputs)
        total = outputs["kl"].numel() if num_items_in_batch is None else num_items_in_batch
        loss = outputs["kl"].sum() / torch.as_tensor(total).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is of all ranks, and DDP averages gradients over ranks.
            loss = loss * self.accelerator.num_processes
        if self.model.training:
            self._last = rows.sum(0)
            self._sums += self._last.cpu().double()
            mask = inputs.get("attention_mask")
            seen = inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.gather(seen).sum().item()
        else:
            self._sums += self._gather_rows(rows, inputs)
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def _distill(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Tokens, KL, student's and teacher's NLL, agreement per row of the batch, shape (rows, 5); and per token."""
        if "labels" not in inputs:
            raise ValueError(
                f"The batches have {sorted(inputs)}, but no labels, which say what tokens count; let the collator add "
                "them: the input_ids, and -100 where a token does not count."
            )
        labels = inputs["labels"]
        forward_inputs = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        with self._distillation, every_token_sparse(self.model):
            outputs = model(**forward_inputs, distill_labels=labels)
        kl = outputs["kl"].detach()
        columns = [torch.ones_like(kl), kl, outputs["student_nll"], outputs["teacher_nll"], outputs["agree"]]
        values = torch.stack([column.float() for column in columns], dim=1)
        row = (labels[:, 1:] != -100).nonzero()[:, 0].to(values.device)
        return values.new_zeros(labels.shape[0], 5).index_add_(0, row, values), outputs

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """The loss of a batch, for `evaluate` and `predict`; there are no logits to give back."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _gather_rows(self, rows: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sums over the rows of all processes, rows that only fill up the last batch left out."""
        # Without padding a batch is one row, which accelerate cannot tell from a sample.
        gather = self.accelerator.gather_for_metrics if "attention_mask" in inputs else self.accelerator.gather
        return gather(rows.to(self.accelerator.device)).cpu().double().sum(0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_sums = self._step_sums + self._last.to(self.accelerator.device)
        if self.accelerator.sync_gradients:  # the last of the accumulated batches
            tokens, kl, _, dense, _ = self.accelerator.reduce(self._step_sums).tolist()
            self._step_sums = torch.zeros_like(self._step_sums)
            if tokens > 0:
                problem = self._watch.look_at(kl / tokens, self._state)
                if problem:
                    problem += "" if math.isfinite(dense) else f" ({DENSE_BROKEN})"
                    self._stop(f"{problem} at step {self.state.global_step + 1}")
        return loss

    def _check_update(self) -> None:
        """After an update, before anything is saved: stop if it made an anchor NaN or infinite."""
        finite = [
            (p.to_local() if isinstance(p, DTensor) else p).isfinite().all().to(self.args.device)
            for p in self._trained_parameters()
        ]
        if self.accelerator.reduce((~torch.stack(finite)).sum()) > 0:
            self._stop(f"The anchors are NaN or infinite after step {self.state.global_step}")

    def _stop(self, problem: str) -> None:
        """Put the last good anchors and thresholds back, save them, raise."""
        self._set_state(self._watch.good)
        folder = os.path.join(self.args.output_dir, "last-good")
        self.save_model(folder)
        which = "The best anchors so far" if self._watch.best < math.inf else "The anchors that train() began with"
        raise TrainingDiverged(
            f"{problem}. {which} are back in the model and saved in '{folder}'. Lower learning_rate (now "
            f"{self.args.learning_rate:g}) and gain_learning_rate (now {self.args.gain_learning_rate:g}), or check "
            "the data and the dtype."
        )

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # ---- what is reported ----------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        training, self._sums = self._sums, torch.zeros(5, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = _means(self._sums)
        self._sums = training
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in values.items()})
        if values:
            output.metrics[f"{metric_key_prefix}_loss"] = values["kl"]  # Trainer's is a mean of batches' means
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            sums = self.accelerator.reduce(self._sums.float().to(self.accelerator.device)).cpu().double()
            self._sums = torch.zeros(5, dtype=torch.float64)
            logs.update(_means(sums))
        if "learning_rate" in logs and self.optimizer.param_groups[0].get("initial_lr"):
            # Trainer logs the first layer's rate; the schedule's share of the peak is the same for all.
            logs["learning_rate"] *= self.args.learning_rate / self.optimizer.param_groups[0]["initial_lr"]
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card (tags, paper, trackers, versions) with what this adapter is and a snippet that loads it."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        config = adapter_config(self.model, self.adapter_name)
        base = public_name(config.base_model_name_or_path or self.model.config._name_or_path)
        where = self.hub_model_id or Path(self.args.output_dir).resolve().name
        about = (
            f"A SPON adapter for `{base}`: {config.sparsity:.0%} of the inputs of its linear layers are zeroed at "
            f"every token (criterion `{config.criterion}`), and trained anchors repair the damage.\n"
        )
        quick_start = textwrap.dedent(
            f"""\
            ## Quick start

            ```python
            import peft_spon  # registers SPON with PEFT
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_pretrained({quoted(base)})
            model = PeftModel.from_pretrained(base, {quoted(where)})
            ```

            """
        )
        path = Path(self.args.output_dir, "README.md")
        card = re.sub(r"This model is a fine-tuned version of .*\n", lambda _: about, path.read_text())
        card = re.sub(r"## Quick start\n.*?(?=## Training procedure)", lambda _: quick_start, card, flags=re.DOTALL)
        path.write_text(card)
        without_local_base(path.parent)


def _means(sums: torch.Tensor) -> dict[str, float]:
    """Metrics from sums of (tokens, KL, student's and teacher's NLL, agreement); none without tokens."""
    tokens, kl, student_nll, teacher_nll, agree = sums.tolist()
    if tokens == 0:
        return {}
    return {
        "kl": kl / tokens,
        "perplexity": perplexity(student_nll / tokens),
        "dense_perplexity": perplexity(teacher_nll / tokens),
        "top1_agreement": agree / tokens,
    }


def rises(after: float, before: float, share: float) -> bool:
    """Whether a KL rose by more than a share of what it was, and by more than rounding."""
    return after > (1 + share) * before + KL_ROUNDING


class _DivergenceWatch:
    """Notices a KL that is not finite or has doubled, and keeps the anchors of the best stretch of steps."""

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=DIVERGENCE_WINDOW)
        self.start = math.inf  # mean KL before the first step
        self.first = 0.0  # KL of the first step, before its update
        self.best = math.inf
        self.good: tuple = ()
        self.steps = 0

    def look_at(self, kl: float, state: Callable[[], tuple]) -> str | None:
        """One more step's KL, before the update that follows it; says what is wrong, or None."""
        if not math.isfinite(kl):
            return f"The KL is {kl}"
        self.first = self.first if self.steps else kl
        self.steps += 1
        self.recent.append(kl)
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) < DIVERGENCE_WINDOW:
            return None
        # Both are of the start: few rows, or other ones, must not raise an alarm.
        start = max(self.start, self.first)
        if rises(mean, start, DIVERGENCE_FACTOR - 1):
            return f"The KL diverges: {mean:.4g} over the last {len(self.recent)} steps, {start:.4g} at the start,"
        if self.steps % DIVERGENCE_WINDOW == 0 and mean < self.best:
            self.best = mean
            self.good = state()
        return None

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the anchors of a resumed training are good until better ones come."""
        return {"start": self.start, "first": self.first, "steps": self.steps, "recent": list(self.recent)}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.start, self.first, self.steps = saved["start"], saved["first"], saved["steps"]
        self.recent.extend(saved["recent"])


class _TrainingEvents(TrainerCallback):
    """Recalibrates, gives the watch its mark, lets `num_tokens` go on from a checkpoint's last log."""

    def __init__(self, trainer: SponTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = logged[-1] if logged else 0
        self.trainer._watch.good = self.trainer._state()
        if WATCH_KEY in state.stateful_callbacks:
            self.trainer._watch.resume(state.stateful_callbacks[WATCH_KEY]["attributes"])
        else:
            self.trainer._set_mark()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._check_update()
        count = args.recalibrations if self.trainer._has_thresholds() else 0
        if state.global_step in {state.max_steps * i // (count + 1) for i in range(1, count + 1)} - {0}:
            self.trainer._recalibrate()


def last_whole_checkpoint(wanted: str | bool, output_dir: str) -> str:
    """
    The checkpoint to resume from. Half-written ones are renamed, since Trainer would count them as checkpoints.

    Args:
        wanted (`str` or `True`): a checkpoint's folder, or the last one in `output_dir`.
        output_dir (`str`): where the checkpoints of the training are.

    Returns:
        `str`: the wanted folder, or if a killed training left it half-written the last whole one before it.

    Raises:
        `ValueError`: there is none.
    """
    folder = Path(output_dir) if wanted is True else Path(wanted).parent
    number = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    if wanted is True:
        newest = math.inf
    elif Path(wanted).is_dir() and (match := number.fullmatch(Path(wanted).name)):
        newest = int(match[1])
    else:
        return wanted
    found = {path: number.fullmatch(path.name) for path in folder.glob("*") if path.is_dir()}
    steps = {int(match[1]): path for path, match in found.items() if match and int(match[1]) <= newest}
    for step, path in sorted(steps.items(), reverse=True):
        if is_whole(path):
            return wanted if step == newest else str(path)
        aside = path.with_name(f"incomplete-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning(
            f"The checkpoint '{path}' is half-written ({TRAINER_STATE_NAME}, which is written last, is missing or cut "
            f"off): the training was killed while saving it. It is called '{aside.name}' now, and the one before it "
            "is resumed."
        )
    if not steps:
        return wanted  # Trainer says that there is no checkpoint
    raise ValueError(
        f"'{folder}' has no whole checkpoint: the training was killed while saving its first one. Begin anew: train() "
        "without resume_from_checkpoint."
    )


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to the end."""
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False


def _assign(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    """Copy values, whole or sharded as the parameters are, into parameters."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _keep_fp32(layer: SponLayer) -> None:
    # SFTTrainer casts what it trains to bf16 on quantised bases; anchors move in steps that bf16 cannot hold.
    for held in (layer.spon_anchor, layer.spon_gain):
        for parameter in held.values():
            parameter.data = parameter.data.float()
