# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How good a sparse model is: dense against sparse against sparse with anchors, on the same text."""

from .continuations import Agreement
from .measurements import measure_report
from .metrics import evaluate
from .report import report_of, write_report
from .scores import EvaluationResult, PositionScores, Scores


__all__ = [
    "Agreement",
    "EvaluationResult",
    "PositionScores",
    "Scores",
    "evaluate",
    "measure_report",
    "report_of",
    "write_report",
]
