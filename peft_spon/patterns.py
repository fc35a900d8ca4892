# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Regular expressions in configurations, which may come from anybody's file: checked before PEFT matches them."""

import re
import time


MAX_LENGTH = 10_000
# Seconds of this thread for one match: usual patterns take microseconds, hostile ones years.
MAX_SECONDS = 0.02


def check_pattern(what: str, pattern: str) -> None:
    """Raises `ValueError` for what is no regular expression, or a very long one; `what` names it in the error."""
    if not isinstance(pattern, str):
        raise ValueError(f"{what} is {pattern!r}; use a name or a regular expression.")
    if len(pattern) > MAX_LENGTH:
        raise ValueError(
            f"{what} is a regular expression of {len(pattern):,} characters ({pattern[:40]!r}...), and {MAX_LENGTH:,} "
            "are allowed; give a list of names instead."
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} is {pattern[:200]!r}, which is not a regular expression: {error}.") from None


def check_speed(what: str, pattern: str, whole: str, names: list[str]) -> None:
    """Raises `ValueError` if matching `whole`, in which PEFT puts the pattern, with one of the names takes long.

    `re` cannot be interrupted, so the names are tried from their first character on: for a pattern that tries
    combinations, the time grows with every character, and is seen long before it matters.
    """
    if not re.search(r"[*+{]", pattern):
        return
    matched = re.compile(whole)
    whole_names = {re.sub(r"\d+", "0", name) for name in names}
    for name in whole_names | {name.rpartition(".")[2] for name in whole_names}:
        for length in range(1, len(name) + 1):
            if min_seconds(matched, name[:length]) > MAX_SECONDS:
                raise ValueError(
                    f"{what} is {pattern[:200]!r}, which takes very long to match names such as '{name}': repetitions "
                    "inside repetitions, or too many of them. Write it without, or give a list of names."
                )


def min_seconds(pattern: re.Pattern, text: str) -> float:
    """Processor time of this thread for one match; the shortest of some, as the garbage collector may come between."""
    shortest = float("inf")
    for _ in range(3):
        begin = time.thread_time()
        pattern.fullmatch(text)
        shortest = min(shortest, time.thread_time() - begin)
        if shortest <= MAX_SECONDS:
            break
    return shortest
