# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL to dense, top-1 agreement and realised sparsity of a model with a SPON adapter."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Batch, check_arguments, count_tokens, iter_batches, to_device
from ..lora import model_inside
from ..losses import compare_logits, perplexity
from ..modes import dense_mode, evaluation_mode, every_token_sparse, without_anchors
from ..sites import resolve_sites
from ..statistics import Zeros


@dataclass(frozen=True)
class Scores:
    """One way of running the model, over all predicted tokens.

    Attributes:
        perplexity (`float`): exp of the mean negative log-likelihood per token; infinite where that overflows.
        standard_error (`float`): of the perplexity, from the variance of the tokens' log-likelihoods.
        kl (`float`): mean KL(dense || this) of the next-token distributions, in nats per token.
        top1_agreement (`float`): share of tokens whose most likely next token is the dense model's.
        sparsity (`float`): realised share of input entries that S zeroed, layers weighted by their weight counts.
    """

    perplexity: float
    standard_error: float
    kl: float
    top1_agreement: float
    sparsity: float


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of [`evaluate`]; `print(result)` shows the table.

    Attributes:
        dense, sparse, anchored ([`Scores`]): adapter off; S on, anchors and gains off; all on (`None` for an adapter
            without anchors).
        tokens (`int`): predicted tokens.
        sparse_tokens (`str`): which tokens were sparse.
        layer_sparsity (`dict[str, float]`): realised sparsity of every layer, anchors on.
    """

    dense: Scores
    sparse: Scores
    anchored: Scores | None
    tokens: int
    sparse_tokens: str
    layer_sparsity: dict[str, float] = field(default_factory=dict)

    @property
    def damage_removed(self) -> float:
        """Share of plain sparsity's rise in perplexity that the anchors take back (NaN without rise or anchors)."""
        damage = self.sparse.perplexity - self.dense.perplexity
        if self.anchored is None or damage <= 0:
            return math.nan
        return (self.sparse.perplexity - self.anchored.perplexity) / damage

    def __str__(self) -> str:
        lines = [f"{'':<17} {'perplexity':>15}  {'KL to dense':>11}  {'top-1 as dense':>14}  {'sparsity':>8}"]
        rows = {"dense": self.dense, "sparse": self.sparse, "sparse + anchors": self.anchored}
        for name, row in rows.items():
            if row is None:
                continue
            perplexity = f"{row.perplexity:.3f} ± {row.standard_error:.3f}"
            lines.append(
                f"{name:<17} {perplexity:>15}  {row.kl:>11.4f}  {row.top1_agreement:>14.1%}  {row.sparsity:>8.1%}"
            )
        lines.append(
            f"{self.tokens:,} predicted tokens; {len(self.layer_sparsity)} sparse layers, {self.sparse_tokens}"
        )
        return "\n".join(lines)

    def layer_table(self) -> str:
        """Realised sparsity of every layer, one line each."""
        width = max(len(name) for name in self.layer_sparsity)
        return "\n".join(f"{name:<{width}}  {share:7.2%}" for name, share in self.layer_sparsity.items())


class _Sums:
    """Running sums over tokens for one way of running the model, `whose` name stands in errors."""

    def __init__(self, whose: str):
        self.whose = whose
        self.tokens, self.nll, self.nll_squared, self.kl, self.same = 0, 0.0, 0.0, 0.0, 0

    def add(self, logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits (tokens, vocabulary) in any dtype, labels (tokens,); forbidden tokens have logits of -inf."""
        broken = int((~logits.amax(-1).isfinite()).sum()) if len(labels) else 0
        if broken:
            raise ValueError(
                f"The logits of the {self.whose} model are NaN or infinite at {broken} of {len(labels)} tokens of a "
                "text; check its weights and its dtype (fp16 overflows, bf16 does not)."
            )
        found = compare_logits(logits, dense_logits, labels)
        nll = found.student_nll.double()
        if nll.isinf().any():
            raise ValueError(
                f"The {self.whose} model gives the token {int(labels[nll.isinf()][0])} of the data the probability 0 "
                "(it forbids it, by a logit of -inf), so its perplexity is infinite; set such labels to -100."
            )
        if found.kl.isinf().any():
            raise ValueError(
                f"The {self.whose} model forbids (by a logit of -inf) a token that the dense one allows, so the KL "
                "between them is infinite."
            )
        self.tokens += len(labels)
        self.nll += float(nll.sum())
        self.nll_squared += float(nll.square().sum())
        self.kl += float(found.kl.sum(dtype=torch.float64))
        self.same += int(found.agree.sum())

    def scores(self, sparsity: float) -> Scores:
        mean = self.nll / self.tokens
        variance = max(self.nll_squared / self.tokens - mean**2, 0.0)
        value = perplexity(mean)
        error = value * math.sqrt(variance / self.tokens) if math.isfinite(value) else math.inf
        return Scores(value, error, self.kl / self.tokens, self.same / self.tokens, sparsity)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    adapter_name: str | None = None,
    every_token: bool = True,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = None,
    text_column: str = "text",
    progress: bool | None = None,
) -> EvaluationResult:
    """
    Compare the dense model, the sparse one without anchors and the sparse one with anchors on the same text.

    Args:
        model (`torch.nn.Module`): a causal or encoder-decoder language model with a SPON adapter.
        data (`Iterable`): texts, rows of a data set, or batches, see [`data.iter_batches`]. Batches may have
            `labels` (-100: not counted); encoder-decoder models need them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts.
        adapter_name (`str`, *optional*): an active adapter; default: the first active one.
        every_token (`bool`, *optional*, defaults to `True`): sparsify every token; `False`: as the adapter's
            `prefill` says.
        batch_size (`int`, *optional*, defaults to 8): blocks per batch.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop after that many tokens; default: all of the data.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.
        progress (`bool`, *optional*): progress bar; default: when standard error is a terminal.

    Returns:
        [`EvaluationResult`]

    Raises:
        `ValueError`: no data, no SPON adapter, a model that predicts no next token, a size below 1, logits that are
            NaN or infinite (-inf is fine where all forbid the same tokens, none of them in the data).
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    check_arguments(model, data, tokenizer, "evaluate")
    name, layers = resolve_sites(model, adapter_name)
    has_anchors = any(layer.has_repair(name) for layer in layers.values())
    modes = {"dense": "dense", "sparse": "sparse", **({"anchored": "sparse (with anchors)"} if has_anchors else {})}
    sums = {mode: _Sums(whose) for mode, whose in modes.items()}
    zeros = {mode: Zeros(layers, name) for mode in ("sparse", "anchored")}
    batches = iter_batches(
        data, tokenizer, batch_size=batch_size, max_length=max_length, max_tokens=max_tokens, text_column=text_column
    )
    bar = tqdm(desc="evaluating", total=max_tokens, unit=" tokens", disable=None if progress is None else not progress)
    with evaluation_mode(model), bar:
        for batch in batches:
            inputs = to_device(batch, model)
            labels, shift = _labels(model, inputs)
            with dense_mode(model):
                dense = model(**inputs).logits
            for mode, total in sums.items():
                if mode == "dense":
                    logits = dense
                else:
                    with ExitStack() as stack:
                        zeros[mode].start_batch(inputs)
                        stack.enter_context(zeros[mode])
                        if every_token:
                            stack.enter_context(every_token_sparse(model))
                        if mode == "sparse":
                            stack.enter_context(without_anchors(model))
                        logits = model(**inputs).logits
                for row, row_dense, row_labels in zip(logits, dense, labels, strict=True):
                    counted = row_labels != -100
                    stop = len(row) - shift
                    total.add(row[:stop][counted], row_dense[:stop][counted], row_labels[counted])
            bar.update(count_tokens(batch))
    if sums["dense"].tokens == 0:
        raise ValueError("The data has no token to predict: every label is -100 or every text has one token.")
    first = next(iter(layers.values())).settings(name).prefill
    every = every_token or first == "sparse"
    last = "anchored" if has_anchors else "sparse"
    return EvaluationResult(
        dense=sums["dense"].scores(0.0),
        sparse=sums["sparse"].scores(zeros["sparse"].overall()),
        anchored=sums["anchored"].scores(zeros["anchored"].overall()) if has_anchors else None,
        tokens=sums["dense"].tokens,
        sparse_tokens="S on every token" if every else f"S on tokens as prefill={first!r} says",
        layer_sparsity=zeros[last].by_layer(),
    )


def _labels(model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, int]:
    """Labels aligned with the first (tokens - shift) logits: shift 1 for causal models, 0 for encoder-decoders."""
    if model.config.is_encoder_decoder:
        if "labels" not in inputs:
            raise ValueError("An encoder-decoder model is evaluated on batches with labels; the data has none.")
        return inputs["labels"], 0
    if not model.can_generate():
        kind = type(model_inside(model)).__name__
        raise ValueError(
            f"{kind} predicts no next token, so it has no perplexity; evaluate a ...ForCausalLM or an encoder-decoder "
            "model."
        )
    labels = inputs.get("labels", inputs["input_ids"])[:, 1:].clone()
    if "attention_mask" in inputs:
        is_token = inputs["attention_mask"].bool()
        labels[~(is_token[:, 1:] & is_token[:, :-1])] = -100  # neither padding, nor predicted from padding
    return labels, 1
