# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The batches that a trainer looks at beside its steps."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from .modes import attribute


def loader(trainer: Trainer, data: Any) -> Any:
    """All batches of some data, in order, as large as those that are trained on."""
    with (
        attribute([trainer.args], "dataloader_drop_last", False),
        # Trainer would keep the loader, and give it back when another data set is to be evaluated.
        attribute([trainer.args], "dataloader_persistent_workers", False),
        attribute([trainer.args], "per_device_eval_batch_size", trainer.args.per_device_train_batch_size),
    ):
        return trainer.get_eval_dataloader(data)


def first_batches(trainer: Trainer, data: Any, count: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The first batches that have a label, on the trainer's device, until there are so many or so many tokens."""
    args = trainer.args
    batches = loader(trainer, data)
    if not has_length(batches):  # an endless stream; training sees no more of it
        batches = itertools.islice(batches, max(count, args.max_steps * args.gradient_accumulation_steps))
    seen = taken = 0
    for batch in batches:
        batch = trainer._prepare_inputs(batch)
        labels = batch.get("labels", batch["input_ids"])
        sizes = [labels.numel(), int((labels[:, 1:] != -100).sum())]
        tokens, counted = trainer.accelerator.reduce(torch.tensor(sizes, device=args.device)).tolist()
        if counted == 0:
            continue
        yield batch
        seen, taken = seen + tokens, taken + 1
        if taken >= count or seen >= max_tokens:
            return


def calibration_data(trainer: Trainer, tokens: int) -> dict[str, Any]:
    """Arguments of `calibrate`: the same tokens in the same blocks whatever batch size and number of processes."""
    args = trainer.args
    settings = {
        "adapter_name": trainer.adapter_name,
        "batch_size": args.per_device_train_batch_size,
        "max_length": args.max_length or 1024,
        "progress": None if shows_progress(trainer) else False,
    }
    is_raw = trainer._has_own_collator and (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if is_raw or "input_ids" not in next(iter(trainer.train_dataset), {}):
        return {"data": _collated(trainer, tokens), "max_tokens": None, **settings}
    return {"data": trainer.train_dataset, "max_tokens": tokens, **settings}


def _collated(trainer: Trainer, tokens: int) -> Iterator[dict[str, Any]]:
    """Training batches as the collator makes them of rows that only it can read, until they hold enough tokens."""
    seen = 0
    for batch in loader(trainer, trainer.train_dataset):
        yield {key: value for key, value in batch.items() if key != "labels"}
        # Summed, so that all processes stop at the same batch, however much padding theirs have.
        seen += int(trainer.accelerator.reduce(torch.tensor(batch["input_ids"].numel(), device=trainer.args.device)))
        if seen >= tokens:
            return


def shows_progress(trainer: Trainer) -> bool:
    """Whether this process may show a progress bar."""
    return trainer.is_local_process_zero() and not trainer.args.disable_tqdm
