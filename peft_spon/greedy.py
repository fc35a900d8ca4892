# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""TEAL's allocation (arXiv 2408.14690): inside a block, that layer next whose step hurts the block's output least."""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .budget import GRID
from .modes import attribute, dense_mode, evaluation_mode, every_token_sparse, without_anchors
from .sensitivity import Looked, State, over_processes
from .sites import plain_name
from .statistics import run


# One layer at a time is raised, by this share of its block's weights, a quarter of the layer at most.
STEP, LARGEST_STEP = 0.05, 0.25
# Where the paths end, unless told otherwise; how many layers a block may have: all are tried at every step.
CAP, MAX_LAYERS = 0.95, 16


@torch.no_grad()
def greedy_paths(looked: Looked, floor: float, cap: float | None, kept: State) -> dict[str, list[float]]:
    """Sparsity of every layer where its block's is that of the grid: the layer is raised next whose step adds the
    least error to the block's output, per weight (TEAL: steps of equal weight)."""
    blocks: dict[str, list[str]] = {}
    for key in looked.layers:
        found = re.match(r".*?\.\d+(?=\.)", f".{key}")
        blocks.setdefault(found[0][1:] if found else key.rpartition(".")[0], []).append(key)
    if max(map(len, blocks.values())) > MAX_LAYERS:
        raise ValueError(
            "method='greedy' tries all layers of a block one by one, and there are blocks of more than "
            f"{MAX_LAYERS} (experts?); use method='kl'."
        )
    modules = {plain_name(key): module for key, module in looked.model.named_modules()}
    configs = {id(c): c for m in looked.model.modules() if (c := vars(m).get("config")) and hasattr(c, "use_cache")}
    paths = dict(kept.found.get("paths", {}))
    bar = tqdm(desc="allocating", total=len(blocks), unit=" blocks", disable=looked.hidden)
    with ExitStack() as stack:
        for context in (every_token_sparse, without_anchors, evaluation_mode):
            stack.enter_context(context(looked.model))
        stack.enter_context(attribute(list(configs.values()), "use_cache", False))
        stack.enter_context(bar)
        calls = calls_of(looked, {key: modules[key] for key in blocks})
        for block, keys in blocks.items():
            if not paths.keys() >= set(keys):
                paths |= path_of(looked, partial(error_of, modules[block], calls[block]), keys, floor, cap)
                kept.save(paths=paths)
            bar.update()
    return {key: paths[key] for key in looked.layers}


def calls_of(looked: Looked, blocks: dict[str, nn.Module]) -> dict[str, list[tuple]]:
    """Arguments and output of every call of the blocks in the dense model."""
    calls: dict[str, list[tuple]] = {key: [] for key in blocks}
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, key=key: calls[key].append((args, kwargs, first_of(out))), with_kwargs=True
        )
        for key, module in blocks.items()
    ]
    try:
        with dense_mode(looked.model):
            for batch in looked.batches:
                run(looked.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def error_of(block: nn.Module, calls: list[tuple]) -> float:
    """Squared error of a block's output, summed over its calls and all processes."""
    errors = [(first_of(block(*args, **kwargs)) - out).float().square().sum() for args, kwargs, out in calls]
    total = float(over_processes(torch.stack(errors).sum(dtype=torch.float64).cpu()))
    if not math.isfinite(total):
        raise ValueError(
            f"The outputs of a {type(block).__name__} are NaN or infinite; check the model's weights and dtype (fp16 "
            "overflows, bf16 does not). Nothing was changed."
        )
    return total


def path_of(
    looked: Looked, error: Callable[[], float], keys: list[str], floor: float, cap: float | None
) -> dict[str, list[float]]:
    """The layers of one block, raised step by step until all are at the cap, read off at the grid."""
    weights = {key: looked.layers[key].in_features * looked.layers[key].out_features for key in keys}
    cap = max(CAP if cap is None else cap, floor)
    now = dict.fromkeys(keys, floor)

    def place(key: str, share: float) -> None:
        looked.layers[key].set_sparsity(looked.name, share)

    def average() -> float:
        return sum(now[key] * weights[key] for key in keys) / sum(weights.values())

    for key in keys:
        place(key, floor)
    at, path, last = [average()], [dict(now)], error()
    while open_keys := [key for key in keys if now[key] < cap - 1e-9]:
        steps, costs = {}, {}
        for key in open_keys:
            steps[key] = min(STEP * sum(weights.values()) / weights[key], LARGEST_STEP, cap - now[key])
            place(key, now[key] + steps[key])
            costs[key] = error()
            place(key, now[key])
        best = min(open_keys, key=lambda key: (costs[key] - last) / (steps[key] * weights[key]))
        now[best], last = now[best] + steps[best], costs[best]
        place(best, now[best])
        at.append(average())
        path.append(dict(now))
    return {key: [interpolated(at, [point[key] for point in path], target) for target in GRID] for key in keys}


def first_of(output: Any) -> torch.Tensor:
    """A block's hidden states, which some give alone and some as the first of several."""
    return output[0] if isinstance(output, tuple) else output


def interpolated(at: list[float], values: list[float], target: float) -> float:
    """Of points (at, values) with rising `at`, the value at `target`, linear between them and constant outside."""
    index = next((i for i, place in enumerate(at) if place >= target), None)
    if index is None:
        return values[-1]
    if index == 0:
        return values[0]
    weight = (target - at[index - 1]) / (at[index] - at[index - 1])
    return values[index - 1] + weight * (values[index] - values[index - 1])
