# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""When a training of anchors goes wrong, and what it goes back to."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .layer import SponLayer
from .sites import spon_layers


# Training stops when the mean KL of so many steps is twice that before the first step.
DIVERGENCE_WINDOW = 20
DIVERGENCE_FACTOR = 2.0
# A rise of the KL that says something: by more than one per cent, and more than fp32 rounding makes of equal
# distributions (nats).
KL_RISE = 0.01
KL_ROUNDING = 1e-6
# Where a checkpoint's trainer_state.json keeps what the watch knows.
WATCH_KEY = "SponDivergenceWatch"

# Copies of what is trained, and of the thresholds and their tables of all layers.
Moment = tuple[list[torch.Tensor], list[list[dict[str, torch.Tensor]]]]
NO_LABELS = (
    "Nothing can be learned: in the training data every label is -100 (TRL leaves such rows out) or every sequence "
    "has one token. Check completion_only_loss, assistant_only_loss, max_length, and the labels."
)


class TrainingDiverged(RuntimeError):
    """The KL became NaN or infinite or doubled; the message says where the last good anchors are."""


def rises(after: float, before: float, share: float = KL_RISE) -> bool:
    """Whether a KL rose by more than a share of what it was, and by more than rounding."""
    return after > (1 + share) * before + KL_ROUNDING


class DivergenceWatch:
    """Notices a KL that is not finite or has doubled, and keeps the anchors of the best stretch of steps.

    Args:
        good (`Moment`): what to go back to until something better comes: what the training began with.

    Attributes:
        start (`float`): mean KL before the first step, on training data.
        before (`dict[str, float]`): what the KL after training is compared with, by the kind of data, `"held-out"` or
            `"training"`: that before the first step, without noise.
        first (`float`): KL of the first step, before its update.
        best (`float`): the lowest mean KL of a stretch of steps.
        steps (`int`): how many it has seen.
    """

    def __init__(self, good: Moment = ((), ())):
        self.recent: deque[float] = deque(maxlen=DIVERGENCE_WINDOW)
        self.start = math.inf
        self.before: dict[str, float] = {}
        self.first = 0.0
        self.best = math.inf
        self.good = good
        self.steps = 0

    def begin(self, kl: float | None, sparsity: float) -> None:
        """Take the KL before the first step, on training data (None: no token counts there).

        Raises:
            `ValueError`: nothing can be learned.
            `TrainingDiverged`: the model is broken already.
        """
        if kl is None:
            raise ValueError(NO_LABELS)
        if not math.isfinite(kl):
            raise TrainingDiverged(
                f"The KL is {kl} before the first step: logits are NaN or infinite. Check the model's weights and its "
                "dtype (fp16 overflows, bf16 does not); peft_spon.evaluate(model, data) says which model's they are."
            )
        if kl == 0:
            raise ValueError(
                f"Nothing can be learned: the sparse model predicts exactly what the dense one does (sparsity is "
                f"{sparsity:g}). Make it sparse: SponConfig(sparsity=0.5), or model.set_sparsity(0.5)."
            )
        self.start = kl

    def look_at(self, kl: float, now: Callable[[], Moment]) -> str | None:
        """One more step's KL, before the update that follows it; says what is wrong, or None."""
        if not math.isfinite(kl):
            return f"The KL is {kl}"
        self.first = self.first if self.steps else kl
        self.steps += 1
        self.recent.append(kl)
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) < DIVERGENCE_WINDOW:
            return None
        # Both are of the start: few rows, or other ones, must not raise an alarm.
        start = max(self.start, self.first)
        if rises(mean, start, DIVERGENCE_FACTOR - 1):
            return f"The KL diverges: {mean:.4g} over the last {len(self.recent)} steps, {start:.4g} at the start,"
        if self.steps % DIVERGENCE_WINDOW == 0 and mean < self.best:
            self.best = mean
            self.good = now()
        return None

    def look_at_end(self, after: float, before: float, kind: str) -> str | None:
        """The KL on some kind of data after and before all steps; says what is wrong, or None."""
        if not math.isfinite(after):
            return f"The KL on {kind} data is {after} after the last step"
        # A longer training has been watched all along.
        if self.steps < DIVERGENCE_WINDOW and rises(after, before, DIVERGENCE_FACTOR - 1):
            return f"The KL diverges: {after:.4g} on {kind} data after the last step, {before:.4g} at the start"
        return None

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the anchors of a resumed training are good until better ones come."""
        return {
            "start": self.start,
            "before": self.before,
            "first": self.first,
            "steps": self.steps,
            "recent": list(self.recent),
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; those of 0.2 have no `before`."""
        self.start, self.first, self.steps = saved["start"], saved["first"], saved["steps"]
        self.before = dict(saved.get("before", {}))
        self.recent.extend(saved["recent"])


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that require a gradient, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def broken(model: nn.Module, device: torch.device) -> torch.Tensor:
    """int64 number, shape (), of trained parameters with NaN or infinity in them; of shards, this process's."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained_parameters(model)]
    return (~torch.stack([p.isfinite().all().to(device) for p in local])).sum()


def this_moment(model: nn.Module) -> Moment:
    """Copies to go back to with [`back_to`]."""
    tables = [
        [{name: value.clone() for name, value in held.items()} for held in _tables(layer)]
        for layer in spon_layers(model).values()
    ]
    return [p.detach().clone() for p in trained_parameters(model)], tables


def back_to(moment: Moment, model: nn.Module) -> None:
    """Put anchors and thresholds of a moment back; whole or sharded as the parameters are."""
    parameters, tables = moment
    with torch.no_grad():
        for parameter, value in zip(trained_parameters(model), parameters, strict=True):
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
    for layer, values in zip(spon_layers(model).values(), tables, strict=True):
        for held, value in zip(_tables(layer), values, strict=True):
            held.update(value)


def _tables(layer: SponLayer) -> list[Any]:
    return [getattr(layer, f"spon_{name}") for name in layer.state_names]
