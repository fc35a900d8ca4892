# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of a trainer that distils, and the means over tokens that it logs."""

from typing import Any

import torch
from torch import nn

from .distillation import SelfDistillation
from .losses import means, sums_by_row
from .modes import every_token_sparse
from .trainer_config import SFTTrainer


class DistillingTrainer(SFTTrainer):
    """
    SFTTrainer whose loss is the KL from the dense model to the sparse one, exact over all tokens of an update.

    Whatever the batches, processes and accumulation: sums over tokens are added, and divided once.

    Attributes:
        _distillation ([`SelfDistillation`]): how both run in one forward.
        _sums (`torch.Tensor`): of all tokens since the last log, shape (5,): count, KL, negative log-likelihood of
            student and teacher, agreement.
        _last (`torch.Tensor`): the same of the last training batch.
    """

    def _distil_with(self, distillation: SelfDistillation) -> None:
        self._distillation = distillation
        self._sums = torch.zeros(5, dtype=torch.float64)

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
            self._sums += self._gather(rows, inputs).cpu().double().sum(0)
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
        return sums_by_row(outputs, labels), outputs

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """The loss of a batch, for `evaluate` and `predict`; there are no logits to give back."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _gather(self, rows: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The rows of all processes, those that only fill up the last batch left out."""
        # Without padding a batch is one row, which accelerate cannot tell from a sample.
        gather = self.accelerator.gather_for_metrics if "attention_mask" in inputs else self.accelerator.gather
        return gather(rows.to(self.accelerator.device))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        training, self._sums = self._sums, torch.zeros(5, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = means(self._sums)
        self._sums = training
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in values.items()})
        if values:
            output.metrics[f"{metric_key_prefix}_loss"] = values["kl"]  # Trainer's is a mean of batches' means
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            sums = self.accelerator.reduce(self._sums.float().to(self.accelerator.device)).cpu().double()
            self._sums = torch.zeros(5, dtype=torch.float64)
            logs.update(means(sums))
        if "learning_rate" in logs and self.optimizer.param_groups[0].get("initial_lr"):
            # Trainer logs the first layer's rate; the schedule's share of the peak is the same for all.
            logs["learning_rate"] *= self.args.learning_rate / self.optimizer.param_groups[0]["initial_lr"]
        super().log(logs, start_time)
