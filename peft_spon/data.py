# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""One reading of "data" for calibration and evaluation: texts, rows of a data set, or ready batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


Batch = dict[str, torch.Tensor]


def iter_batches(
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = None,
    text_column: str = "text",
) -> Iterator[Batch]:
    """
    Turn data into batches a model takes.

    Texts and tokenised rows are joined (texts opened by the beginning-of-text token where the tokenizer adds one, and
    closed by the end-of-text token, if it has one; padding that an `attention_mask` marks is left out) and cut into
    blocks of `max_length` tokens; the last block may be shorter, nothing is padded and nothing else is dropped. Ready
    batches pass through as they are.

    Args:
        data (`Iterable`):
            Strings; rows (mappings, such as a `datasets.Dataset`) with a text column or with `input_ids` of one
            sequence; or batches (mappings of tensors with `input_ids` of shape (batch, tokens), or such a tensor).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts.
        batch_size (`int`, *optional*, defaults to 8): blocks per batch.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop after that many tokens.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.

    Yields:
        `dict[str, torch.Tensor]`: model inputs, `input_ids` of shape (batch, tokens).

    Raises:
        `ValueError`: no data, texts without a tokenizer, rows without text or tokens.
        `TypeError`: `data` is one string.
    """
    if isinstance(data, (str, bytes)):
        raise TypeError("data is one string; give a list of strings, a data set, or batches.")
    items = iter([data] if isinstance(data, Mapping) or isinstance(data, torch.Tensor) and data.ndim == 2 else data)
    first = next(items, None)
    if first is None:
        raise ValueError("The data is empty: nothing to calibrate or evaluate on. Give at least one text or batch.")
    items = itertools.chain([first], items)
    batches = (
        as_batches(items)
        if is_batch(first)
        else blocks(items, tokenizer, batch_size=batch_size, max_length=max_length, text_column=text_column)
    )
    seen, any_batch = 0, False
    for batch in batches:
        if max_tokens is not None and seen + batch["input_ids"].numel() > max_tokens:
            rows = (max_tokens - seen) // batch["input_ids"].shape[1]
            if rows == 0 and any_batch:
                return
            batch = {key: value[: max(rows, 1)] for key, value in batch.items()}
        any_batch = True
        seen += batch["input_ids"].numel()
        yield batch
        if max_tokens is not None and seen >= max_tokens:
            return
    if not any_batch:
        raise ValueError("The data holds no tokens: every text or row is empty. Give at least two tokens of text.")


def is_batch(item: Any) -> bool:
    """True for a ready batch: a 2-d tensor of ids, or a mapping with one."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else item
    return isinstance(ids, torch.Tensor) and ids.ndim == 2


def as_batches(items: Iterable[Any]) -> Iterator[Batch]:
    """Ready batches as plain dicts of their tensors, empty ones left out."""
    for item in items:
        batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
        batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        if batch["input_ids"].numel() > 0:
            yield batch


def blocks(
    items: Iterable[Any], tokenizer: Any, *, batch_size: int, max_length: int, text_column: str
) -> Iterator[Batch]:
    """Texts or tokenised rows, joined and cut into batches of full blocks, then the rest as one shorter block."""
    waiting: list[int] = []
    size = batch_size * max_length
    for item in items:
        waiting.extend(tokens_of(item, tokenizer, text_column))
        while len(waiting) >= size:
            yield {"input_ids": torch.tensor(waiting[:size]).view(batch_size, max_length)}
            del waiting[:size]
    full = len(waiting) // max_length * max_length
    if full:
        yield {"input_ids": torch.tensor(waiting[:full]).view(-1, max_length)}
    if len(waiting) - full >= 2:  # one token alone predicts nothing
        yield {"input_ids": torch.tensor([waiting[full:]])}


def tokens_of(item: Any, tokenizer: Any, text_column: str) -> list[int]:
    """Token ids of one text or row."""
    if isinstance(item, Mapping):
        if "input_ids" in item:
            ids = torch.as_tensor(item["input_ids"]).flatten()
            if "attention_mask" in item:
                ids = ids[torch.as_tensor(item["attention_mask"]).flatten().bool()]
            return ids.tolist()
        if text_column not in item:
            raise ValueError(
                f"A row of the data has the columns {sorted(item)}, but neither 'input_ids' nor {text_column!r}; name "
                "the column with the texts in text_column."
            )
        item = item[text_column]
    if isinstance(item, torch.Tensor):
        return item.flatten().tolist()
    if not isinstance(item, str):
        raise ValueError(f"An item of the data is of type {type(item).__name__}; give strings, rows, or batches.")
    if tokenizer is None:
        raise ValueError("The data holds texts but no tokenizer was given; pass tokenizer=..., or tokenised data.")
    ids = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
    opening = tokenizer("")["input_ids"][:1]  # what models of the tokenizer have seen at the start of every text
    if opening and opening[0] == tokenizer.bos_token_id:
        ids = opening + ids
    return ids + [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids


def without_padding(x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """The tokens of x (..., tokens, features) that a mask of the same tokens does not mark as padding.

    Args:
        x (`torch.Tensor`): a layer's input.
        masks (`list[torch.Tensor]`): boolean, from [`padding_masks`].

    Returns:
        `torch.Tensor`: x, or a matrix (tokens, features) of what remains.
    """
    for mask in masks:
        if x.shape[:-1] == mask.shape or (x.ndim == 2 and x.shape[0] == mask.numel()):
            return x.flatten(0, -2)[mask.flatten().to(x.device)]
    return x


def padding_masks(batch: Batch) -> list[torch.Tensor]:
    """The attention masks of a batch as booleans, those that mark any padding."""
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    return [mask.bool() for mask in masks if mask is not None and not bool(mask.all())]


def to_device(batch: Batch, model: torch.nn.Module) -> Batch:
    """The batch on the device of the model's first parameter that is in memory: offloaded ones are on "meta"."""
    devices = (p.device for p in model.parameters())
    device = next((d for d in devices if d.type != "meta"), torch.device("cpu"))
    return {key: value.to(device) for key, value in batch.items()}
