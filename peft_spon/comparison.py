# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The KL to the dense model before and after training, on the same rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers.utils import logging

from .batches import first_batches, shows_progress
from .distillation import noise_ahead, noisy_embedding
from .modes import evaluation_mode


logger = logging.get_logger(__name__)

# The KL before and after training is measured on the rows of so many steps, but on this many rows at least and not on
# more than so many tokens: little beside a training of 100 steps.
COMPARED_STEPS = 2
COMPARED_ROWS = 8
COMPARED_TOKENS = 8192


@dataclass
class _Kept:
    """A batch, what the teacher's forward gave for it (nothing where that is all logits), and its rows that count."""

    batch: dict[str, Any]
    teacher: list[torch.Tensor]
    rows: int


class Comparison:
    """
    Measures the mean KL on the first batches of some data, as often as wanted, on the same rows.

    The dense model does not change, so it runs once: what goes into its output head is kept, in main memory.

    Args:
        trainer (`SponTrainer`): whose model, loader and batch size it is.
        data: rows, or a dictionary whose first value they are; default: held out, or to train on without any.
        noise (`bool`, *optional*, defaults to `False`): with NEFTune's noise on the embeddings, if it is on; for one
            measurement only.
    """

    def __init__(self, trainer: Any, data: Any = None, noise: bool = False):
        if data is None:
            data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        self.trainer = trainer
        self.noise = noise
        self.data = next(iter(data.values())) if isinstance(data, dict) else data
        self.kept: list[_Kept] = []

    @torch.no_grad()
    def mean_kl(self, text: str) -> float | None:
        """Mean KL per token, in nats, with the anchors and thresholds of now; None where no token counts."""
        trainer, sums = self.trainer, torch.zeros(5, dtype=torch.float64)
        logger.info(f"measuring the {text}")
        first = not self.kept
        noisy = noisy_embedding(trainer._distillation.model) if self.noise else []
        with evaluation_mode(trainer.model_wrapped), noise_ahead(noisy):
            for kept in self._batches(text):
                batch = trainer._prepare_inputs(kept.batch)
                with trainer._distillation.one_teacher(kept.teacher), trainer.compute_loss_context_manager():
                    rows, _ = trainer._distill(trainer.model_wrapped, batch)
                if first:
                    rows = trainer._gather(rows, batch)
                    lean = trainer._distillation.lean
                    teacher = [value.cpu() for value in kept.teacher] if lean else []
                    self.kept.append(_Kept(send_to_device(batch, "cpu"), teacher, len(rows)))
                else:
                    # Outside its loader a batch does not say which of its rows only fill it up.
                    rows = trainer.accelerator.gather(rows)[: kept.rows]
                sums += rows.cpu().double().sum(0)
        return float(sums[1] / sums[0]) if sums[0] else None

    def _batches(self, text: str) -> Iterator[_Kept]:
        """Those that are kept, or else the first of the data; with a progress bar."""
        trainer, args = self.trainer, self.trainer.args
        rows = args.per_device_train_batch_size * trainer.accelerator.num_processes
        wanted = max(math.ceil(COMPARED_ROWS / rows), COMPARED_STEPS * args.gradient_accumulation_steps)
        found = iter(self.kept)
        if not self.kept:
            found = (_Kept(batch, [], 0) for batch in first_batches(trainer, self.data, wanted, COMPARED_TOKENS))
        hidden = None if shows_progress(trainer) else True
        total = len(self.kept) or wanted
        with tqdm(desc=text, total=total, unit=" batches", disable=hidden, leave=False) as bar:
            for batch in found:
                yield batch
                bar.update()
