# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that the dense model writes itself: to calibrate, allocate and train on without a data set."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .data import check_sizes, check_tokenizer, conversation_prompt, describe, opened, to_device
from .modes import attribute, dense_mode, evaluation_mode
from .sites import Site


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    n: int,
    *,
    tokens: int | None = None,
    prompts: Iterable[Any] | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    path: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> "Dataset":
    """
    Texts drawn from the dense model, token by token from its own distribution (S off; no top-k, top-p, penalties or
    other rules of the model's `generation_config`).

    Anchors trained on them are trained where the model is when it writes, and no data set is needed. A text ends at
    the model's end of text, or with its `tokens`-th token.

    Args:
        model (`torch.nn.Module`): a causal language model, with a SPON adapter or without.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        n (`int`): how many texts.
        tokens (`int`, *optional*): tokens of a text at most, its prompt included; default: 512, or as many as the
            model has positions.
        prompts (`Iterable`, *optional*): texts, cut at half of `tokens`, or conversations (lists of messages, which
            the model answers; longer ones are left out), taken in turn. Default: from nothing, the
            beginning-of-text token.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits.
        batch_size (`int`, *optional*, defaults to 8): texts at a time.
        seed (`int`, *optional*, defaults to 0): the same texts for the same seed and batch size; the random numbers
            of the program are not touched.
        path (`str`, *optional*): a file to which they are written as they come, one JSON object a line. Texts that it
            holds already, from a run that was stopped, are not drawn again.
        progress (`bool`, *optional*): progress bar; default: when standard error is a terminal.

    Returns:
        `datasets.Dataset`: with the columns `text` and `input_ids` (prompt and end of text included): what
        [`calibrate`], [`evaluate`] and [`SponTrainer`] take.

    Raises:
        `ValueError`: a size below 1, more tokens than the model has positions, a temperature of 0 or below, an empty
            prompt, only too long conversations, a tokenizer without a beginning and end of text, no causal model, a
            file of other texts.
        `TypeError`: arguments in another order. `ImportError`: without `datasets`.

    Example:

    ```python
    >>> texts = sample_texts(model, tokenizer, 256, path="own.jsonl")
    >>> SponTrainer(model, SponTrainingConfig("out"), train_dataset=texts, processing_class=tokenizer).train()
    ```
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            "sample_texts gives a data set, for which it needs datasets: pip install datasets"
        ) from error
    order = "The order is sample_texts(model, tokenizer, n)."
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {describe(model)}, not a torch.nn.Module. {order}")
    if tokenizer is None:
        raise TypeError(f"tokenizer is None; give the model's. {order}")
    check_tokenizer(tokenizer, order)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no causal language model, so it writes no text from a prompt.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(512, positions or 512) if tokens is None else tokens
    check_sizes(n=n, tokens=tokens, batch_size=batch_size)
    if positions is not None and tokens > positions:
        raise ValueError(f"tokens is {tokens}, but the model has {positions} positions; use {positions} or fewer.")
    if tokens < 2:
        raise ValueError(f"tokens is {tokens!r}: a text begins with one that is given; use 2 or more, e.g. 512.")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature!r}; use a number above 0, 1.0 for the model's own distribution."
        )
    starts = [start_of_text(tokenizer)] if prompts is None else starts_of(prompts, tokenizer, max(1, tokens // 2))
    name = model.config._name_or_path
    made_by = {"model": name, "tokens": tokens, "temperature": temperature, "seed": seed}
    made_by["prompts"] = hashlib.sha256(json.dumps(starts).encode()).hexdigest()[:16]
    rows = [] if path is None else read_rows(Path(path), made_by, starts)[:n]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    is_sparse = any(isinstance(module, Site) for module in model.modules())
    hidden = None if progress is None else not progress
    with (
        dense_mode(model) if is_sparse else nullcontext(),
        evaluation_mode(model),
        own_distribution(model),
        torch.random.fork_rng(list(devices), device_type=next(iter(devices)).type if devices else "cuda"),
        tqdm(desc="sampling texts", total=n, initial=len(rows), unit=" texts", disable=hidden) as bar,
    ):
        while len(rows) < n:
            first, count = len(rows), min(batch_size, n - len(rows))
            # A run that goes on draws what it would have drawn without the stop.
            torch.manual_seed((seed * 1_000_003 + first) % 2**63)
            batch = [starts[i % len(starts)] for i in range(first, first + count)]
            found = continue_prompts(
                model,
                batch,
                tokens,
                tokenizer.pad_token_id,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
            )
            new = [{"text": tokenizer.decode(ids, skip_special_tokens=True), "input_ids": ids} for ids in found]
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(path).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**row, **made_by}) + "\n" for row in new)
            rows += new
            bar.update(count)
    return Dataset.from_list([{key: row[key] for key in ("text", "input_ids")} for row in rows])


def start_of_text(tokenizer: Any) -> list[int]:
    """What stands in front of a text that has no prompt."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]  # without the first, texts follow the end of another
    known = [id for id in ids if id is not None]
    if not known:
        raise ValueError(
            "The tokenizer has neither a beginning- nor an end-of-text token to start from; give prompts."
        )
    return known[:1]


def starts_of(prompts: Iterable[Any], tokenizer: Any, most: int) -> list[list[int]]:
    """Token ids of prompts, of each text the first `most`; conversations, which end with the opening of an answer, are
    taken whole or not at all."""
    found = [(prompt_tokens(prompt, tokenizer), isinstance(prompt, str)) for prompt in prompts]
    if not found:
        raise ValueError("prompts is empty; give at least one, or leave it out: texts from nothing.")
    starts = [ids[:most] for ids, is_text in found if is_text or len(ids) <= most]
    if len(starts) < len(found):
        said = f"{len(found) - len(starts)} of {len(found)} prompts are conversations of more than {most} tokens"
        if not starts:
            raise ValueError(f"{said}, half of tokens; use more tokens, or shorter conversations.")
        logger.warning(f"{said}, half of tokens, and were left out.")
    return starts


def prompt_tokens(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids of a text, or of a conversation with the opening of the answer."""
    if isinstance(prompt, str):
        ids = opened(tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer)
    elif isinstance(prompt, (list, tuple)):
        ids = conversation_prompt(list(prompt), tokenizer)
    else:
        raise TypeError(f"A prompt is {describe(prompt)}; give texts, or conversations: lists of messages.")
    if not ids:
        raise ValueError("A prompt is empty; leave prompts out for texts from nothing.")
    return ids


def own_distribution(model: nn.Module) -> AbstractContextManager[None]:
    """`with own_distribution(model):` `generate` knows of the model's settings only where a text ends: those of some
    models repress what has been said, or forbid tokens."""
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    plain = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return attribute(holders, "generation_config", plain)


def read_rows(path: Path, made_by: dict[str, Any], starts: list[list[int]]) -> list[dict[str, Any]]:
    """The rows of a file that were written to their ends; what a killed run left of another is cut off.

    Raises:
        `ValueError`: they were made in another way.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        found = [{key: row[key] for key in made_by if key != "prompts"} for row in rows]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"'{path}' is no file of sample_texts; name another one.") from None
    for row in found:
        if (changed := next((key for key in row if row[key] != made_by[key]), None)) is not None:
            raise ValueError(
                f"'{path}' holds texts that were made with {changed}={row[changed]!r}, and now it is "
                f"{made_by[changed]!r}; name another file, or delete it."
            )
    for index, row in enumerate(rows):
        start = starts[index % len(starts)]
        # What older files do not say, their texts do, but for a prompt that another one begins with.
        if row.get("prompts", made_by["prompts"]) != made_by["prompts"] or row["input_ids"][: len(start)] != start:
            raise ValueError(f"'{path}' holds texts that follow other prompts; name another file, or delete it.")
    os.truncate(path, len(whole))
    return rows


# ---- generation, also for evaluate -------------------------------------------------------------------------------


def continue_prompts(
    model: nn.Module, prompts: list[list[int]], tokens: int, pad: int | None, **kwargs: Any
) -> list[list[int]]:
    """
    Prompts with what the model writes after them, up to and with its end of text.

    Args:
        model (`torch.nn.Module`): a causal language model.
        prompts (`list[list[int]]`): token ids.
        tokens (`int`): of a prompt and its continuation together, at most.
        pad (`int`, *optional*): what fills up the shorter ones, on the left.
        kwargs: of `generate`.
    """
    ends = ends_of_text(model)
    pad = pad if pad is not None else ends[0] if ends else 0
    width = max(map(len, prompts))
    batch = to_device(
        {
            "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        },
        model,
    )
    made = model.generate(**batch, max_new_tokens=tokens - width, num_beams=1, pad_token_id=pad, **kwargs)
    return [ids + until_end(row, ends) for ids, row in zip(prompts, made[:, width:].tolist(), strict=True)]


def ends_of_text(model: nn.Module) -> list[int]:
    """The tokens at which the model's `generate` stops."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Token ids up to and with the first end of text."""
    found = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: found + 1]
