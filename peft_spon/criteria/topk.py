# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import ClassVar

from .magnitude import Magnitude


@dataclass(frozen=True)
class TopK(Magnitude):
    """Keep the k largest |x_i| of every token: exact sparsity, no calibration, at the price of a selection."""

    name: ClassVar[str] = "topk"
    selects: ClassVar[str] = "topk"
