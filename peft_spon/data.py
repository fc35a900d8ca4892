# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""One reading of "data" for calibration and evaluation: texts, rows of a data set, conversations, or ready batches."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch.nn.functional import pad


Batch = dict[str, Any]  # tensors, or lists of tensors where pictures differ in size

CONVERSATIONS = ("messages", "conversations")


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

    Texts and rows are tokenised as TRL's `SFTTrainer` does (texts opened by the beginning-of-text token where the
    tokenizer adds one, and closed by the end-of-text token, if it has one; conversations by the chat template), joined
    (padding that an `attention_mask` marks is left out) and cut into blocks of `max_length` tokens; the last block may
    be shorter, nothing is padded and nothing else is dropped. Ready batches pass through as they are.

    Args:
        data (`Iterable`):
            Strings; lists of token ids; rows (mappings, such as a `datasets.Dataset`) with `input_ids` of one
            sequence, `prompt` and `completion`, `messages`, or a text column; a mapping of such columns, such as a
            tokenizer's output; or batches: mappings of tensors with `input_ids` of shape (batch, tokens), or such a
            tensor, or whatever else the model takes (`input_features`, `pixel_values`, ...).
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): needed for texts and conversations.
        batch_size (`int`, *optional*, defaults to 8): blocks per batch.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop after that many tokens.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.

    Yields:
        `dict[str, torch.Tensor]`: model inputs, `input_ids` of shape (batch, tokens).

    Raises:
        `ValueError`: no data, texts without a tokenizer, rows without text or tokens, several splits, a size below 1.
        `TypeError`: `data` is one string or no data at all, `tokenizer` is no tokenizer.
    """
    check_sizes(batch_size=batch_size, max_length=max_length, max_tokens=max_tokens)
    check_tokenizer(tokenizer)
    return limited(batches_of(data, tokenizer, batch_size, max_length, text_column), max_tokens)


def batches_of(
    data: Iterable[Any], tokenizer: Any, batch_size: int, max_length: int, text_column: str
) -> Iterator[Batch]:
    """All of the data in batches, see [`iter_batches`]."""
    items = items_of(data, text_column)
    first = next(items, None)
    if first is None:
        raise ValueError("The data is empty: nothing to calibrate or evaluate on. Give at least one text or batch.")
    items = itertools.chain([first], items)
    if is_batch(first):
        yield from as_batches(items)
    else:
        yield from blocks(items, tokenizer, batch_size=batch_size, max_length=max_length, text_column=text_column)


def limited(batches: Iterator[Batch], max_tokens: int | None) -> Iterator[Batch]:
    """The first batches with at most `max_tokens` tokens; of the last one, the rows that fit, if it has rows."""
    seen, any_batch = 0, False
    for batch in batches:
        tokens = count_tokens(batch)
        if max_tokens is not None and seen + tokens > max_tokens:
            count = len(next(iter(batch.values())))
            rows = (max_tokens - seen) * count // tokens
            if rows == 0 and any_batch:
                return
            if all(isinstance(value, torch.Tensor) and value.ndim <= 2 for value in batch.values()):
                batch = {key: value[: max(rows, 1)] for key, value in batch.items()}
        any_batch = True
        seen += count_tokens(batch)
        yield batch
        if max_tokens is not None and seen >= max_tokens:
            return
    if not any_batch:
        raise ValueError("The data holds no tokens: every text or row is empty. Give at least two tokens of text.")


def check_arguments(model: Any, data: Any, tokenizer: Any, function: str) -> None:
    """Raises `TypeError` if the arguments of `function` are not of their kinds, as when two are swapped."""
    order = f"The order is {function}(model, data, tokenizer)."
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {describe(model)}, not a torch.nn.Module. {order}")
    if isinstance(data, torch.nn.Module):
        raise TypeError(f"data is {describe(data)}; give texts, a data set, or batches. {order}")
    check_tokenizer(tokenizer, order)


def check_tokenizer(tokenizer: Any, order: str = "") -> None:
    """Raises `TypeError` if it is neither None nor a tokenizer (anything that can be called with a text)."""
    if isinstance(tokenizer, (str, os.PathLike)):
        name = os.fspath(tokenizer)
        raise TypeError(f"tokenizer is a name; load it first: AutoTokenizer.from_pretrained({name!r}). {order}")
    if tokenizer is not None and (not callable(tokenizer) or isinstance(tokenizer, torch.nn.Module)):
        raise TypeError(f"tokenizer is {describe(tokenizer)}, which cannot be called with a text. {order}")


def check_sizes(**sizes: int | None) -> None:
    """Raises `ValueError` for a size that is no whole number above 0; `max_tokens` may be None."""
    for name, value in sizes.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (is_whole and value >= 1) and not (name == "max_tokens" and value is None):
            example = {
                "batch_size": 8,
                "max_length": 512,
                "tokens": 512,
                "n": 256,
                "texts": 256,
                "steps": 150,
                "rows": 1,
                "prompt_tokens": 16,
                "new_tokens": 32,
                "rounds": 5,
                "threads": 2,
            }.get(name, 65536)
            raise ValueError(f"{name} is {value!r}; use a whole number above 0, for example {example}.")


def describe(value: Any) -> str:
    """A value's kind, and the value itself if it is short, for error messages."""
    text = f" ({value!r})" if isinstance(value, (str, int, float, os.PathLike)) and len(repr(value)) < 60 else ""
    return f"of type {type(value).__name__}{text}"


def items_of(data: Any, text_column: str) -> Iterator[Any]:
    """The texts, rows or batches of the data one by one; columns are taken apart into rows."""
    if isinstance(data, (str, bytes)):
        raise TypeError("data is one string; give a list of strings, a data set, or batches.")
    if isinstance(data, os.PathLike):
        raise TypeError(
            f"data is the path '{os.fspath(data)}'; read the file first, for example "
            f"datasets.load_dataset('text', data_files='{os.fspath(data)}', split='train')."
        )
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # iterating over a data frame gives its columns' names
        raise TypeError(f"data is {describe(data)}; give datasets.Dataset.from_pandas(data).")
    if isinstance(data, Mapping):
        if not is_batch(data) and main_column(data, text_column) is None:
            keys = [str(key) for key in data]
            raise ValueError(
                f"data is a {type(data).__name__} with the keys {keys}. Give one of its splits, for example "
                f"data[{(keys or ['train'])[0]!r}]; if these are columns, name the one with the texts in text_column."
            )
        data = [data]
    elif isinstance(data, torch.Tensor):
        data = [data]
    elif not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"data is {describe(data)}; give a list of strings, a data set, or batches.")
    for item in data:
        column = main_column(item, text_column) if isinstance(item, Mapping) and not is_batch(item) else None
        if column is not None and is_column(item[column]):
            columns = {key: values for key, values in item.items() if is_sequence(values)}
            for values in zip(*columns.values(), strict=False):
                yield dict(zip(columns, values, strict=True))
        else:
            yield item


def is_sequence(value: Any) -> bool:
    """True for lists, tuples, arrays and tensors."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) >= 1


def is_column(value: Any) -> bool:
    """True for a sequence of texts or of sequences: several rows. A list of ids or of messages is one row's."""
    return is_sequence(value) and (len(value) == 0 or isinstance(value[0], str) or is_sequence(value[0]))


def main_column(row: Mapping[str, Any], text_column: str) -> str | None:
    """The column that holds a row's tokens or text, by the order in which `SFTTrainer` looks for them, or None."""
    if "input_ids" in row:
        return "input_ids"
    if text_column != "text" and text_column in row:  # asked for
        return text_column
    if "prompt" in row and "completion" in row:
        return "prompt"
    return next((name for name in (*CONVERSATIONS, text_column) if name in row), None)


def check_columns(row: Mapping[str, Any], text_column: str, argument: str = "text_column") -> str:
    """The column that holds a row's tokens or text; `argument` is where the user names that column.

    Raises:
        `ValueError`: there is none.
    """
    column = main_column(row, text_column)
    if column is None:
        raise ValueError(
            f"A row of the data has the columns {sorted(row)}, but neither 'input_ids' nor {text_column!r}, nor "
            f"'messages' or 'prompt' and 'completion'; name the column with the texts in {argument}."
        )
    return column


def check_training_data(train: Any, evaluation: Any, text_column: str) -> None:
    """Raises `ValueError` for a mapping of splits to train on, and for rows in which `SFTTrainer` finds no text."""
    if isinstance(train, Mapping):
        raise ValueError(
            f"train_dataset is a {type(train).__name__} with the keys {list(train)}; give one of its splits."
        )
    parts = [train, *(evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])]
    for part in parts:
        row = next(iter(part), None) if part is not None else None
        if isinstance(row, Mapping):
            check_columns(row, text_column, "dataset_text_field of SponTrainingConfig")


def is_batch(item: Any) -> bool:
    """True for a ready batch: a 2-d tensor of ids, a mapping with one, or without ids but with other model inputs."""
    if not isinstance(item, Mapping):
        return isinstance(item, torch.Tensor) and item.ndim == 2
    if "input_ids" in item:
        return isinstance(item["input_ids"], torch.Tensor) and item["input_ids"].ndim == 2
    return any(isinstance(v, torch.Tensor) and v.ndim >= 2 and v.is_floating_point() for v in item.values())


def is_input(value: Any) -> bool:
    """True for a tensor or a list of tensors."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(part, torch.Tensor) for part in value)
    return isinstance(value, torch.Tensor)


def as_batches(items: Iterable[Any]) -> Iterator[Batch]:
    """Ready batches as plain dicts of their tensors, empty ones left out."""
    for item in items:
        batch = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
        batch = {key: value for key, value in batch.items() if is_input(value)}
        if count_tokens(batch) > 0:
            yield batch


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch; where it has neither ids nor embeddings nor sequences of labels, its rows."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels"):
        if name in batch and batch[name].ndim >= 2:
            return batch[name].shape[0] * batch[name].shape[1]
    return len(next(iter(batch.values())))


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
    """Token ids of one text, list of ids, or row."""
    row = item if isinstance(item, Mapping) else {}
    if isinstance(item, Mapping):
        column = check_columns(row, text_column)
        item = row[column]
        if column == "input_ids":
            ids = torch.as_tensor(item).flatten()
            if "attention_mask" in row:
                ids = ids[torch.as_tensor(row["attention_mask"]).flatten().bool()]
            return ids.tolist()
        if column == "prompt":
            item = item + row["completion"]
    if is_sequence(item):
        is_ids = all(isinstance(part, Integral) for part in (item.tolist() if hasattr(item, "tolist") else item))
        if is_ids and not row:
            return [int(part) for part in item]
        if row and all(isinstance(part, Mapping) for part in item):
            return conversation_tokens(row, list(item), tokenizer)
    if not isinstance(item, str):
        raise ValueError(
            f"An item of the data is {describe(item)}; give strings, lists of token ids, rows, or batches."
        )
    check_given(tokenizer)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    ids = opened(tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)
    is_closed = tokenizer.eos_token_id is None or (len(ids) > 0 and ids[-1] == tokenizer.eos_token_id)
    return ids if is_closed else ids + [tokenizer.eos_token_id]


def opened(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids of a text behind the beginning-of-text token, where the tokenizer adds one."""
    opening = tokenizer("")["input_ids"][:1]  # what models of the tokenizer have seen at the start of every text
    return opening + ids if opening and opening[0] == tokenizer.bos_token_id else ids


def conversation_prompt(messages: list[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of messages by the chat template, and of what opens the answer to them."""
    row = {"chat_template_kwargs": {"add_generation_prompt": True}}
    return conversation_tokens(row, messages, tokenizer)


def conversation_tokens(row: Mapping[str, Any], messages: list[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a row's messages by the chat template, with the row's `tools` and `chat_template_kwargs`."""
    check_given(tokenizer)
    names = {"from": "role", "value": "content"}  # of ShareGPT
    messages = [{names.get(key, key): value for key, value in message.items()} for message in messages]
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        "chat_template": getattr(tokenizer, "chat_template", None),
        **(row.get("chat_template_kwargs") or {}),
    }
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def check_given(tokenizer: Any) -> None:
    """Raises `ValueError` without a tokenizer."""
    if tokenizer is None:
        raise ValueError("The data holds texts but no tokenizer was given; pass tokenizer=..., or tokenised data.")


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
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batch = told_apart(batch)
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else [part.to(device) for part in value]
        for key, value in batch.items()
    }


def told_apart(batch: Batch) -> Batch:
    """A padding token more in an encoder whose rows are as long as the decoder's: masks are known by their shape."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    of_decoder = batch.get("decoder_input_ids", batch.get("labels"))
    if mask is None or ids is None or of_decoder is None or mask.shape != of_decoder.shape:
        return batch
    return {**batch, "input_ids": pad(ids, (0, 1)), "attention_mask": pad(mask, (0, 1))}
