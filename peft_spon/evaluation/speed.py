# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of `generate`, of several models that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria

from ..data import check_sizes
from ..sites import resolve_sites
from ..statistics import Zeros


@dataclass(frozen=True)
class Speed:
    """
    What `generate` took.

    Attributes:
        token (`float`): seconds per decode step, the median.
        prompt (`float`): seconds until the first token, the median.
        rows (`int`): sequences that ran at a time.
    """

    token: float
    prompt: float
    rows: int

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return 1 / self.token


class _Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.times = now, [now()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_speed(
    models: Mapping[str, Callable[[], nn.Module]],
    input_ids: torch.Tensor,
    new_tokens: int = 32,
    rounds: int = 5,
    now: Callable[[], float] = time.perf_counter,
    **generate: Any,
) -> dict[str, Speed]:
    """
    Time per token of greedy `generate`, the models taking turns, so that a busy machine slows all of them.

    Args:
        models (`Mapping`): name to a function that gives the model, called before each of its turns, untimed: it may
            turn a dial of a model that several names share.
        input_ids (`torch.Tensor`): the prompts, shape (rows, tokens).
        new_tokens (`int`, *optional*, defaults to 32): of each turn; end-of-text tokens are passed over.
        rounds (`int`, *optional*, defaults to 5): turns of each; there is one more, which is not counted.
        now (`Callable`, *optional*): the clock, in seconds; `time.process_time` with one thread, on a busy machine.
        generate: more arguments of `generate`, such as `cache_implementation="static"`.

    Returns:
        `dict[str, Speed]`: by name.

    Raises:
        `ValueError`: a size below 1, or `new_tokens` below 2.
    """
    check_turns(*input_ids.shape, new_tokens, rounds)
    steps, prompts = {name: [] for name in models}, {name: [] for name in models}
    # One by one: of a GenerationConfig, None would give way to the model's own end of text.
    greedy = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **generate}
    for turn in range(rounds + 1):
        for name, model in models.items():
            ready, clock = model(), _Clock(now)
            mask = torch.ones_like(input_ids)
            ready.generate(input_ids=input_ids, attention_mask=mask, stopping_criteria=[clock], **greedy)
            if turn:
                times = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
                prompts[name].append(times[0])
                steps[name] += times[1:]
    return {
        name: Speed(statistics.median(steps[name]), statistics.median(prompts[name]), len(input_ids))
        for name in models
    }


def check_turns(rows: int, prompt_tokens: int, new_tokens: int, rounds: int) -> None:
    """Raises `ValueError` for sizes with which [`measure_speed`] has nothing to time."""
    check_sizes(rows=rows, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens!r}: the first comes with the prompt; use 2 or more, e.g. 32.")


@torch.no_grad()
def decode_sparsity(model: nn.Module, input_ids: torch.Tensor, steps: int = 24) -> float:
    """
    Share of the weights of the sparse layers that greedy decode steps do not need.

    Args:
        model (`torch.nn.Module`): with a SPON adapter, or merged.
        input_ids (`torch.Tensor`): the prompts, shape (rows, tokens).
        steps (`int`, *optional*, defaults to 24): tokens after the first.
    """
    name, found = resolve_sites(model, None)
    outputs = model(input_ids=input_ids, use_cache=True)
    with Zeros(found, name) as zeros:
        for _ in range(steps):
            batch = {"input_ids": outputs.logits[:, -1:].argmax(-1)}
            zeros.start_batch(batch)
            outputs = model(**batch, past_key_values=outputs.past_key_values, use_cache=True)
    return zeros.overall()
