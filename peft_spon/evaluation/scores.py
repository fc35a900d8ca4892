# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` finds: the scores of each way of running the model, and their tables."""

import math
import os
from dataclasses import dataclass, field

from .continuations import Agreement
from .report import report_of, write_report


@dataclass(frozen=True)
class Scores:
    """One way of running the model, over all predicted tokens.

    Attributes:
        kl (`float`): mean KL(dense || this) of the next-token distributions, in nats per token.
        top1_agreement (`float`): share of tokens whose most likely next token is the dense model's.
        perplexity (`float`): exp of the mean negative log-likelihood per token; infinite where that overflows.
        standard_error (`float`): of the perplexity, from the variance of the tokens' log-likelihoods.
        perplexity_ratio (`float`): this perplexity over the dense model's.
        ratio_interval (`tuple[float, float]`): its 95 % interval, from the differences of the log-likelihoods at the
            same tokens; rows (blocks of text) count as independent, tokens of one row do not, so that one row alone
            says nothing: (0, infinity).
        sparsity (`float`): realised share of input entries that S zeroed, layers weighted by their weight counts.
        continuations ([`Agreement`], *optional*): greedy continuations compared with the dense model's.
    """

    kl: float
    top1_agreement: float
    perplexity: float
    standard_error: float
    perplexity_ratio: float
    ratio_interval: tuple[float, float]
    sparsity: float
    continuations: Agreement | None = None


@dataclass(frozen=True)
class PositionScores:
    """The sparse model (with anchors, if there are any) at some positions of its rows.

    Attributes:
        first, last (`int`): positions of the predicted tokens; the first token of a row has position 0.
        tokens (`int`): how many.
        kl, top1_agreement, perplexity (`float`): as in [`Scores`].
        dense_perplexity (`float`): of the dense model, at the same tokens.
    """

    first: int
    last: int
    tokens: int
    kl: float
    top1_agreement: float
    perplexity: float
    dense_perplexity: float


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of [`evaluate`]; `print(result)` shows the table.

    Attributes:
        dense, sparse, anchored ([`Scores`]): adapter off; S on, anchors and gains off; all on (`None` for an adapter
            without anchors). A repair LoRA is on with the anchors, any other LoRA everywhere.
        tokens (`int`): predicted tokens.
        sparse_tokens (`str`): which tokens were sparse.
        layer_sparsity (`dict[str, float]`): realised sparsity of every layer, anchors on.
        by_position (`list[PositionScores]`): anchors on.
    """

    dense: Scores
    sparse: Scores
    anchored: Scores | None
    tokens: int
    sparse_tokens: str
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    by_position: list[PositionScores] = field(default_factory=list)

    @property
    def damage_removed(self) -> float:
        """Share of plain sparsity's rise in perplexity that the anchors take back (NaN without rise or anchors)."""
        damage = self.sparse.perplexity - self.dense.perplexity
        if self.anchored is None or damage <= 0:
            return math.nan
        return (self.sparse.perplexity - self.anchored.perplexity) / damage

    def __str__(self) -> str:
        lines = [
            f"{'':<17} {'KL to dense':>11}  {'top-1 as dense':>14}  {'perplexity':>10}  {'x dense (95 %)':>19}  "
            f"{'sparsity':>8}"
        ]
        rows = {"dense": self.dense, "sparse": self.sparse, "sparse + anchors": self.anchored}
        rows = {name: row for name, row in rows.items() if row is not None}
        for name, row in rows.items():
            low, high = row.ratio_interval
            ratio = "" if name == "dense" else f"{row.perplexity_ratio:.3f} ({low:.3f}-{high:.3f})"
            lines.append(
                f"{name:<17} {row.kl:>11.4f}  {row.top1_agreement:>14.1%}  {row.perplexity:>10.3f}  {ratio:>19}  "
                f"{row.sparsity:>8.1%}"
            )
        lines.append(
            f"{self.tokens:,} predicted tokens; {len(self.layer_sparsity)} sparse layers, {self.sparse_tokens}"
        )
        for name, row in rows.items():
            if row.continuations is not None and name != "dense":
                lines.append(f"{name}: {row.continuations}")
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a page of these results, one file that needs no other; [`measure_report`] makes a fuller one."""
        write_report(report_of(self), path)

    def layer_table(self) -> str:
        """Realised sparsity of every layer, one line each."""
        width = max(len(name) for name in self.layer_sparsity)
        return "\n".join(f"{name:<{width}}  {share:7.2%}" for name, share in self.layer_sparsity.items())

    def position_table(self) -> str:
        """The sparse model (with anchors, if there are any) by position, one line per bin."""
        lines = ["positions        tokens  KL to dense  top-1 as dense  perplexity  dense"]
        for row in self.by_position:
            where = f"{row.first} to {row.last}"
            lines.append(
                f"{where:<13} {row.tokens:>9,}  {row.kl:>11.4f}  {row.top1_agreement:>14.1%}  {row.perplexity:>10.3f}"
                f"  {row.dense_perplexity:.3f}"
            )
        return "\n".join(lines)
