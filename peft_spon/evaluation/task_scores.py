# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What [`harness`] gives: scores of tasks, for each way of running a model."""

from dataclasses import asdict, dataclass
from typing import Any


LABELS = {"dense": "dense", "sparse": "sparse", "anchored": "sparse + anchors"}


@dataclass(frozen=True)
class TaskScores:
    """One task, one way of running the model.

    Attributes:
        metrics, standard_errors (`dict[str, float]`): by lm_eval's names, the filter after a comma if there is one.
        samples, shots (`int`, *optional*): documents, and examples in front of each (`None` for a group of tasks).
        sparsity (`float`, *optional*): realised while the task ran: share of input entries that S zeroed, padding left
            out, layers weighted by their weight counts (`None` for a group of tasks).
        sparse_tokens (`float`, *optional*): share of the tokens on which S was.
        answer_tokens, answer_seconds (`float`, *optional*): means per answer, of tasks that generate: tokens of the
            answer as it is scored; time of `generate`, that of a batch divided by its answers.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    samples: int | None
    shots: int | None
    sparsity: float | None = None
    sparse_tokens: float | None = None
    answer_tokens: float | None = None
    answer_seconds: float | None = None


@dataclass(frozen=True)
class HarnessResult:
    """Outcome of [`harness`]; `print(result)` shows the table.

    Attributes:
        dense, sparse, anchored (`dict[str, TaskScores]`, *optional*): scores by task, `None` where not run. As in
            [`EvaluationResult`]: adapter off; S on, anchors and gains off; all on.
        sparse_tokens (`str`): which tokens were sparse.
        sparse_layers (`int`): how many layers.
        batch_size (`int` or `str`), limit (`float`, *optional*), lm_eval (`str`): as called; lm_eval's version.
    """

    dense: dict[str, TaskScores] | None
    sparse: dict[str, TaskScores] | None
    anchored: dict[str, TaskScores] | None
    sparse_tokens: str
    sparse_layers: int
    batch_size: int | str
    limit: float | None
    lm_eval: str

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        states = {label: getattr(self, mode) for mode, label in LABELS.items() if getattr(self, mode) is not None}
        lines = [("", "", *states)]
        for task in next(iter(states.values())):
            columns = [_cells(tasks[task]) for tasks in states.values()]
            for place, name in enumerate(columns[0]):
                lines.append(("" if place else task, name, *(cells[name] for cells in columns)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            f"{task:<{widths[0]}}  {name:<{widths[1]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
            for task, name, *cells in lines
        ]
        limit = "" if self.limit is None else f"limit {self.limit:g}, so not the whole tasks; "
        text.append(
            f"{limit}{self.sparse_layers} sparse layers, {self.sparse_tokens}; batches of {self.batch_size}; lm_eval "
            f"{self.lm_eval}"
        )
        return "\n".join(text)


def _cells(scores: TaskScores) -> dict[str, str]:
    """Rows of the table, for one task and one way of running the model."""
    errors = scores.standard_errors
    cells = {
        name: f"{_number(value)} ± {_number(errors[name])}" if name in errors else _number(value)
        for name, value in scores.metrics.items()
    }
    formats = {
        "tokens per answer": ("{:.1f}", scores.answer_tokens),
        "seconds per answer": ("{:.3f}", scores.answer_seconds),
        "realised sparsity": ("{:.1%}", scores.sparsity),
        "tokens with S": ("{:.1%}", scores.sparse_tokens),
    }
    return cells | {name: form.format(value) for name, (form, value) in formats.items() if value is not None}


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"
