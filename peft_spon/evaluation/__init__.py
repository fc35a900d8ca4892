# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How good a sparse model is: dense against sparse against sparse with anchors, on the same text."""

from .metrics import EvaluationResult, Scores, evaluate


__all__ = ["EvaluationResult", "Scores", "evaluate"]
