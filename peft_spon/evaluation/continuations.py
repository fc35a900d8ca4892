# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How far greedy continuations of the same prompts agree: what a user of the sparse model sees."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Batch
from ..sampling import continue_prompts


PROMPT_TOKENS = 64
NEW_TOKENS = 64


@dataclass(frozen=True)
class Agreement:
    """Greedy continuations compared with the dense model's.

    Attributes:
        prompts (`int`): how many.
        common_prefix (`float`): mean number of tokens until the first that differs, of at most 64, or until the dense
            model's end of text.
        token_agreement (`float`): share of the dense continuations' tokens that stand at the same place.
    """

    prompts: int
    common_prefix: float
    token_agreement: float

    def __str__(self) -> str:
        return (
            f"greedy continuations of {self.prompts} prompts follow the dense ones for {self.common_prefix:.1f} of "
            f"{NEW_TOKENS} tokens, on average; {self.token_agreement:.1%} of all places agree"
        )


class Prompts:
    """
    The beginnings of the first rows that are long enough.

    Args:
        model (`torch.nn.Module`): which is to continue them.
        count (`int`): how many; 0: none, and nothing is generated.

    Raises:
        `ValueError`: a count below 0; an encoder-decoder.
    """

    def __init__(self, model: nn.Module, count: int):
        if count < 0:
            raise ValueError(f"continuations is {count!r}; use 0 for none, or a number of prompts, e.g. 32.")
        if count and model.config.is_encoder_decoder:
            raise ValueError("continuations are of causal language models; leave it out for an encoder-decoder.")
        self.count, self.kept = count, []

    def take(self, inputs: Batch) -> None:
        """Beginnings of a batch's rows: at most 64 tokens and half of the row, without padding."""
        if len(self.kept) >= self.count:
            return
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        for row, is_token in zip(ids, mask, strict=True):
            whole = row[is_token].tolist()
            if len(whole) >= 2 and len(self.kept) < self.count:
                self.kept.append(whole[: min(PROMPT_TOKENS, len(whole) // 2)])

    def continued(
        self,
        model: nn.Module,
        modes: Iterable[str],
        running: Callable[[str], AbstractContextManager],
        batch_size: int,
        progress: bool | None,
    ) -> dict[str, list[list[int]]]:
        """By mode the continuations of all prompts, each up to and with its end of text; none without prompts."""
        found = {mode: [] for mode in modes} if self.kept else {}
        groups: dict[int, list[list[int]]] = {}
        for prompt in self.kept:
            groups.setdefault(len(prompt), []).append(prompt)
        total, disable = len(self.kept) * len(found), None if progress is None else not progress
        if not total:
            return found
        with tqdm(desc="continuing prompts", total=total, unit=" texts", disable=disable) as bar:
            for length, prompts in groups.items():  # nothing is padded
                for first in range(0, len(prompts), batch_size):
                    batch = prompts[first : first + batch_size]
                    for mode, texts in found.items():
                        with running(mode):
                            whole = continue_prompts(model, batch, length + NEW_TOKENS, None, do_sample=False)
                        texts += [ids[length:] for ids in whole]
                        bar.update(len(batch))
        return found


def agreement(texts: list[list[int]], dense: list[list[int]]) -> Agreement:
    """How far continuations agree with the dense ones of the same prompts."""
    prefix = same = places = 0
    for text, wanted in zip(texts, dense, strict=True):
        equal = [a == b for a, b in zip(text, wanted, strict=False)]
        prefix += equal.index(False) if False in equal else len(equal)
        same += sum(equal)
        places += len(wanted)
    return Agreement(len(texts), prefix / len(texts), same / places)
