# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Training anchors by distillation: the teacher is the same model with SPON off."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .batches import calibration_data, first_batches, shows_progress
from .calibration import calibrate, refit_thresholds
from .cards import CITATION, TITLE, trainer_card
from .comparison import Comparison
from .config import SponConfig
from .data import check_training_data, count_tokens, iter_batches
from .distillation import SelfDistillation, noisy_embedding, without_dropout
from .distilling import DistillingTrainer
from .divergence import (
    NO_LABELS,
    WATCH_KEY,
    DivergenceWatch,
    TrainingDiverged,
    back_to,
    broken,
    rises,
    this_moment,
    trained_parameters,
)
from .evaluation import measure_report, write_report
from .layer import SponLayer
from .learning_rates import lora_apart, parameter_groups
from .lora import (
    active_lora,
    add_repair_lora,
    apply_trainable,
    model_inside,
    repair_parameters,
    task_loras,
    trainable_choice,
)
from .modes import differentiable
from .results import known_results, remember_results
from .resume import whole_checkpoint_for_all
from .sites import adapter_config, resolve_adapter, spon_layers
from .statistics import NotFinite, Removed, removed_by_s
from .trainer_config import SponTrainingConfig, check_arguments


logger = logging.get_logger(__name__)

# The page that `report_to_html` writes, and the tokens that it is measured on.
REPORT, REPORT_TOKENS = "report.html", 8192
# Tokens on which the scale of the learning rates is measured.
SCALE_TOKENS = 2048
REFITTED = (
    " (Thresholds were fitted anew on the way: where they had zeroed less than was asked for, it rises by that.)"
)
DENSE_BROKEN = "and the dense model's log-likelihood is not finite either"


class SponTrainer(DistillingTrainer):
    """
    Trainer that fits a SPON adapter's anchors so that the sparse model predicts what the dense one does.

    The loss is the forward KL from the model with SPON off to the model with it on, exact over the vocabulary and
    averaged over the tokens whose label is not -100 (SPON, arXiv 2512.12744, section 3), without dropout. A LoRA
    beneath SPON belongs to both models: it is frozen, and what it has learned is what the sparse model keeps. A repair
    LoRA (`repair_lora` of the settings) is trained with the anchors, and the dense model is without it. Data,
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
        "title": TITLE,
        "id": "2512.12744",
        "citation": CITATION,
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
        check_arguments(args, kwargs)
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
        if self.args.report_to_html and self.accelerator.num_processes > 1:
            raise ValueError(
                "report_to_html=True measures in one process, and this training has several; leave it out, and write "
                "the report afterwards: peft_spon.evaluation.measure_report, or peft-spon report."
            )
        self._choice_before = trainable_choice(self.model)
        if self.args.repair_lora:
            add_repair_lora(self.model, self.args.repair_lora)
        if active_lora(self.model):
            # The teacher has the LoRA, too: a LoRA that moved would move the target along.
            if task_loras(active_lora(self.model)):
                logger.info("Only the anchors are trained, the LoRA beneath them is frozen until the training ends")
            apply_trainable(self.model, "anchors")
        for layer in spon_layers(self.model).values():
            _keep_fp32(layer)
        if not trained_parameters(self.model):
            raise ValueError(
                "Nothing to train: no anchor requires a gradient. Load the adapter with is_trainable=True, or give it "
                "anchors (anchor_modules)."
            )
        self._distil_with(SelfDistillation(model_inside(self.model), self.args.temperature))
        self._removed: dict[str, Removed] = {}
        self._step_sums = torch.zeros(5, device=self.accelerator.device)
        self._watch = DivergenceWatch()
        self._threshold_batches: list[dict[str, Any]] = []
        self._compared: Comparison | None = None
        self.add_callback(_TrainingEvents(self))

    # ---- before and after the steps ------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As [`~trl.SFTTrainer.train`]; a checkpoint that a killed training left half-written is never resumed."""
        resume = resume_from_checkpoint or None
        if resume:
            resume = whole_checkpoint_for_all(resume, self.args.output_dir, self.is_world_process_zero())
        with without_dropout(self.model), differentiable(self.model), self._anchors_chosen():
            return self._train(resume, *args, **kwargs)

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
        output = super().train(*args, **kwargs)
        self._compare_with_start(output.metrics)
        if self.args.report_to_html:
            self._write_report()
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        inner = self.model if model is None else model
        is_one = self.adapter_name == "default" and not self._is_sharded()
        if isinstance(inner, PeftModel) and active_lora(inner) and is_one:
            # Older versions of transformers restore what is in subfolders only: the LoRA.
            inner.load_adapter(resume_from_checkpoint, self.adapter_name, is_trainable=True)

    def _prepare_adapter(self) -> None:
        """Thresholds where they are missing, and the scale of the learning rates."""
        config = adapter_config(self.model, self.adapter_name)
        is_whole = not self._is_sharded() or not any(p.is_meta or p.numel() == 0 for p in self.model.parameters())
        if self._has_thresholds() and (self.args.recalibrations or not config.calibrated):
            self._threshold_batches = self._find_threshold_batches()  # kept: a stream would have to begin anew
        if self._has_thresholds() and not config.calibrated:
            if not is_whole:
                raise ValueError(
                    "The adapter has no thresholds yet, and this process does not hold the whole model to find them; "
                    "calibrate(model, data) in one process, save the adapter, and train that."
                )
            logger.info(f"calibrating on {self.args.calibration_tokens} tokens of the training data")
            calibrate(
                self.model,
                self._threshold_batches,
                adapter_name=self.adapter_name,
                max_tokens=sum(map(count_tokens, self._threshold_batches)),  # all of them; the bar knows its end
                progress=None if shows_progress(self) else False,
            )
        if self.args.relative_learning_rate:
            if not is_whole:
                raise ValueError(
                    "relative_learning_rate=True measures what S removes from each layer, and this process does not "
                    "hold the whole model; set it to False and give learning_rate in the units of the activations."
                )
            logger.info(f"measuring what S removes, on {SCALE_TOKENS} tokens of the training data")
            self._removed = removed_by_s(self.model, **calibration_data(self, SCALE_TOKENS))

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _recalibrate(self) -> None:
        tokens = self.args.calibration_tokens
        logger.info(f"fitting the thresholds anew to the sparse model, on {tokens} tokens of the training data")
        name = self.adapter_name
        layers = {key: layer for key, layer in spon_layers(self.model).items() if name in layer.spon_settings}
        try:
            refit_thresholds(self.model, self._threshold_batches, layers, name, progress=False)
        except NotFinite as error:
            self._stop(f"After step {self.state.global_step} {error}".rstrip("."))

    def _find_threshold_batches(self) -> list[dict[str, Any]]:
        """`calibration_tokens` of the training data."""
        found = calibration_data(self, self.args.calibration_tokens)
        if isinstance(found["data"], Dataset):
            # In random order, as it is trained on: its first rows may be alike.
            found["data"] = found["data"].shuffle(seed=self.args.seed)
        keys = ("data", "batch_size", "max_length", "max_tokens")
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed; what is trained does not depend on it
            return list(iter_batches(**{key: found[key] for key in keys}))

    def _has_thresholds(self) -> bool:
        return adapter_config(self.model, self.adapter_name).make_criterion().selects == "threshold"

    def _measure_start(self, saved: dict[str, Any] | None) -> None:
        """
        The KL before the first step, or what a checkpoint has of it: on the data that is trained on, as a step sees
        it, for the watch, and what the end is compared with.
        """
        self._watch = DivergenceWatch(this_moment(self.model))
        training = Comparison(self, self.train_dataset, noise=True)
        if saved is None:
            sparsity = adapter_config(self.model, self.adapter_name).sparsity
            self._watch.begin(training.mean_kl("KL before training"), sparsity)
        else:
            self._watch.resume(saved)
        is_same = self.eval_dataset is None and not noisy_embedding(self._distillation.model)
        self._compared = training if is_same else Comparison(self)
        kind = self._compared_kind()
        if kind not in self._watch.before:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed; training's rows do not depend on this one
                kl = self._watch.start if is_same else self._compared.mean_kl(f"KL on {kind} data before training")
            self._watch.before.update({} if kl is None else {kind: kl})

    def _compared_kind(self) -> str:
        return "training" if self.eval_dataset is None else "held-out"

    def _compare_with_start(self, metrics: dict[str, float]) -> None:
        """The KL now and before the first step, on held-out data if there is any, into metrics and log."""
        kind = self._compared_kind()
        before = self._watch.before.get(kind)
        if before is None:  # no label
            return
        after = self._compared.mean_kl(f"KL on {kind} data after training")
        self._compared = None
        metrics.update({"kl_before": before, "kl_after": after})
        if problem := self._watch.look_at_end(after, before, kind):
            self._stop(problem)
        if rises(after, before):
            has_refitted = self.args.recalibrations and self._has_thresholds()
            logger.warning(
                f"TRAINING MADE THE SPARSE MODEL WORSE: its KL to the dense model on {kind} data rose from "
                f"{before:.4f} to {after:.4f}. Lower learning_rate and gain_learning_rate, or train longer."
                f"{REFITTED if has_refitted else ''}"
            )
        else:
            logger.info(f"KL to the dense model on {kind} data: {before:.4f} before, {after:.4f} after training")
        text = (
            f"KL to the dense model on {kind} data, in nats per token, S on every token: {before:.4f} before, "
            f"{after:.4f} after {self.state.global_step} steps of training."
        )
        remember_results(self.model, self.adapter_name, text)

    def _write_report(self) -> None:
        """A page about the trained model, on held-out data if there is any, into the output folder."""
        batches = first_batches(self, Comparison(self).data, REPORT_TOKENS, REPORT_TOKENS)
        keys = ("input_ids", "attention_mask", "labels", "position_ids")
        found = measure_report(
            self.model,
            [{key: batch[key] for key in keys if key in batch} for batch in batches],
            self.processing_class,
            adapter_name=self.adapter_name,
            training=self.state.log_history,
            progress=None if shows_progress(self) else False,
        )
        write_report(found, Path(self.args.output_dir, REPORT))

    # ---- optimisation --------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per layer's anchor, with its relative learning rate, one for the gains, one for the rest."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.args.learning_rate, self.args.gain_learning_rate, self._removed)
            groups = lora_apart(groups, repair_parameters(model), self.args.repair_lora_learning_rate)
            for group in groups:
                group["weight_decay"] = self.args.weight_decay
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_sums = self._step_sums + self._last.to(self.accelerator.device)
        if self.accelerator.sync_gradients:  # the last of the accumulated batches
            tokens, kl, _, dense, _ = self.accelerator.reduce(self._step_sums).tolist()
            self._step_sums = torch.zeros_like(self._step_sums)
            if tokens > 0:
                problem = self._watch.look_at(kl / tokens, lambda: this_moment(self.model))
                if problem:
                    problem += "" if math.isfinite(dense) else f" ({DENSE_BROKEN})"
                    self._stop(f"{problem} at step {self.state.global_step + 1}")
        return loss

    def _check_update(self) -> None:
        """After an update, before anything is saved: stop if it made an anchor NaN or infinite."""
        if self.accelerator.reduce(broken(self.model, self.args.device)) > 0:
            self._stop(f"The anchors are NaN or infinite after step {self.state.global_step}")

    def _stop(self, problem: str) -> None:
        """Put the last good anchors and thresholds back, save them, raise."""
        back_to(self._watch.good, self.model)
        folder = os.path.join(self.args.output_dir, "last-good")
        self.save_model(folder)
        which = "The best anchors so far" if self._watch.best < math.inf else "The anchors that train() began with"
        raise TrainingDiverged(
            f"{problem}. {which} are back in the model and saved in '{folder}'. Lower learning_rate (now "
            f"{self.args.learning_rate:g}) and gain_learning_rate (now {self.args.gain_learning_rate:g}), or check "
            "the data and the dtype."
        )

    # ---- what is reported ----------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card (tags, paper, trackers, versions) with what this adapter is and a snippet that loads it."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        config = adapter_config(self.model, self.adapter_name)
        base = config.base_model_name_or_path or self.model.config._name_or_path
        name = self.hub_model_id or Path(self.args.output_dir).resolve().name
        results = known_results(self.model, self.adapter_name)
        if results and self.args.report_to_html and Path(self.args.output_dir, REPORT).exists():
            results += f"\n\nMore of it: [the whole report]({REPORT})."
        trainer_card(self.args.output_dir, config, base, name, results)


class _TrainingEvents(TrainerCallback):
    """Recalibrates, gives the watch its mark, lets `num_tokens` go on from a checkpoint's last log."""

    def __init__(self, trainer: SponTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = logged[-1] if logged else 0
        saved = state.stateful_callbacks.get(WATCH_KEY)
        self.trainer._measure_start(saved and saved["attributes"])

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._check_update()
        count = args.recalibrations if self.trainer._has_thresholds() else 0
        if state.global_step in {state.max_steps * i // (count + 1) for i in range(1, count + 1)} - {0}:
            self.trainer._recalibrate()


def _keep_fp32(layer: SponLayer) -> None:
    # SFTTrainer casts what it trains to bf16 on quantised bases; anchors move in steps that bf16 cannot hold.
    for held in (layer.spon_anchor, layer.spon_gain):
        for parameter in held.values():
            parameter.data = parameter.data.float()
