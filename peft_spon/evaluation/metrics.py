# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""KL to dense, top-1 agreement, perplexity, greedy continuations and realised sparsity of a sparse model."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import Batch, check_arguments, count_tokens, iter_batches, to_device
from ..head import BeforeHead
from ..lora import active_lora, model_inside, repair_lora
from ..losses import CHUNK_ELEMENTS, Distillation, compare_logits, perplexity
from ..modes import dense_mode, evaluation_mode, every_token_sparse, without_anchors
from ..results import remember_results
from ..sites import Site, resolve_sites
from ..statistics import Zeros
from .continuations import Agreement, Prompts, agreement
from .report import report_of, results_text
from .scores import EvaluationResult, PositionScores, Scores


# A chunk's fp32 logits take at most this share of the head's own bytes: several are alive at a time.
CHUNK_SHARE = 1 / 32
# But it has this many elements at least (1 MB), or small vocabularies would be gone through token by token.
MIN_CHUNK_ELEMENTS = 1 << 18
# 95 % of a normal distribution lie within so many standard deviations.
Z_95 = 1.96
# Positions up to this one are the first bin; each further bin ends at four times the end of the one before.
FIRST_BIN = 16


class _Tokens:
    """What one way of running the model gave for every predicted token; `whose` name stands in errors."""

    def __init__(self, whose: str):
        self.whose = whose
        self.parts: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, dense_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits (tokens, vocabulary) in any dtype, labels (tokens,); forbidden tokens have logits of -inf."""
        found = compare_logits(logits, dense_logits, labels)
        self._check(logits, found, labels)
        columns = (found.student_nll, found.kl, found.agree)
        self.parts.append(torch.stack([column.double() for column in columns]).cpu())

    def _check(self, logits: torch.Tensor, found: Distillation, labels: torch.Tensor) -> None:
        broken = int((~logits.amax(-1).isfinite()).sum())
        if broken:
            raise ValueError(
                f"The logits of the {self.whose} model are NaN or infinite at {broken} of {len(labels)} tokens of a "
                "text; check its weights and its dtype (fp16 overflows, bf16 does not)."
            )
        forbidden = found.student_nll.isinf()
        if forbidden.any():
            raise ValueError(
                f"The {self.whose} model gives the token {int(labels[forbidden][0])} of the data the probability 0 "
                "(it forbids it, by a logit of -inf), so its perplexity is infinite; set such labels to -100."
            )
        if found.kl.isinf().any():
            raise ValueError(
                f"The {self.whose} model forbids (by a logit of -inf) a token that the dense one allows, so the KL "
                "between them is infinite."
            )

    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Negative log-likelihood, KL, agreement (0 or 1), each fp64 of shape (tokens,)."""
        return tuple(torch.cat(self.parts, dim=1))

    def scores(self, dense: "_Tokens", rows: torch.Tensor, sparsity: float, compared: Agreement | None) -> Scores:
        """Means over all tokens, and what is said of them; `rows` (tokens,) is the row of each token."""
        nll, kl, same = self.columns()
        value = perplexity(float(nll.mean()))
        error = value * float(nll.std(correction=0)) / math.sqrt(len(nll)) if math.isfinite(value) else math.inf
        difference = nll - dense.columns()[0]
        mean, spread = float(difference.mean()), Z_95 * _clustered_error(difference, rows)
        interval = (perplexity(mean - spread), perplexity(mean + spread))
        return Scores(
            float(kl.mean()), float(same.mean()), value, error, perplexity(mean), interval, sparsity, compared
        )


def _clustered_error(values: torch.Tensor, rows: torch.Tensor) -> float:
    """Standard error of a mean over tokens, of which those in one row depend on each other; infinite for one row."""
    count = int(rows.max()) + 1
    if count < 2:
        return math.inf
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, rows, values - values.mean())
    return math.sqrt(float(sums.square().sum()) * count / (count - 1)) / len(values)


def _by_position(last: _Tokens, dense: _Tokens, positions: torch.Tensor) -> list[PositionScores]:
    (nll, kl, same), dense_nll = last.columns(), dense.columns()[0]
    found, first, end = [], 0, FIRST_BIN
    while first <= int(positions.max()):
        inside = (positions >= first) & (positions < end)
        if inside.any():
            ppl = [perplexity(float(values[inside].mean())) for values in (nll, dense_nll)]
            means = float(kl[inside].mean()), float(same[inside].mean())
            found.append(PositionScores(first, end - 1, int(inside.sum()), *means, *ppl))
        first, end = end, 4 * end
    return found


@contextmanager
def running(model: nn.Module, mode: str, every_token: bool = True) -> Iterator[None]:
    """`with running(model, "sparse"):` the model runs that way: "dense", "sparse", or "anchored"."""
    with ExitStack() as stack:
        if mode == "dense":
            stack.enter_context(dense_mode(model))
        elif every_token:
            stack.enter_context(every_token_sparse(model))
        if mode == "sparse":
            stack.enter_context(without_anchors(model))
        yield


def modes_of(model: nn.Module, adapter_name: str | None, layers: dict[str, Site]) -> dict[str, str]:
    """Ways of running a model, as [`running`] knows them, to what errors call them; one without anchors has two."""
    has_anchors = any(layer.has_repair(adapter_name) for layer in layers.values())
    has_anchors = has_anchors or bool(repair_lora(active_lora(model)))
    return {"dense": "dense", "sparse": "sparse", **({"anchored": "sparse (with anchors)"} if has_anchors else {})}


def which_tokens(adapter_name: str | None, layers: dict[str, Site], every_token: bool) -> str:
    """Which tokens are sparse, in words."""
    prefill = next(iter(layers.values())).settings(adapter_name).prefill
    every = every_token or prefill == "sparse"
    return "S on every token" if every else f"S on tokens as prefill={prefill!r} says"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    adapter_name: str | None = None,
    every_token: bool = True,
    continuations: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = None,
    text_column: str = "text",
    progress: bool | None = None,
) -> EvaluationResult:
    """
    Compare the dense model, the sparse one without anchors and the sparse one with anchors on the same text.

    Judge by the KL to the dense model and the top-1 agreement: a perplexity can fall while the sparse model still says
    something else than the dense one. The logits of all tokens of a batch never exist, only those of a chunk (of all
    where a model does something unknown after its output head, or the head is quantised or adapted).

    Args:
        model (`torch.nn.Module`): a causal or encoder-decoder language model with a SPON adapter.
        data (`Iterable`): texts, rows of a data set, or batches, see [`data.iter_batches`]. Batches may have
            `labels` (-100: not counted); encoder-decoder models need them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts.
        adapter_name (`str`, *optional*): an active adapter; default: the first active one.
        every_token (`bool`, *optional*, defaults to `True`): sparsify every token; `False`: as the adapter's
            `prefill` says.
        continuations (`int`, *optional*, defaults to 0): also compare the greedy continuations, of 64 tokens each, of
            so many prompts: the first up to 64 tokens of the first rows. Each takes 64 decoding steps per way of
            running the model; 32 or more say something.
        batch_size (`int`, *optional*, defaults to 8): blocks per batch.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop after that many tokens; default: all of the data.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.
        progress (`bool`, *optional*): progress bar; default: when standard error is a terminal.

    Returns:
        [`EvaluationResult`]

    Raises:
        `ValueError`: no data, no SPON adapter, a model that predicts no next token, a size below 1, continuations of
            an encoder-decoder, logits that are NaN or infinite (-inf is fine where all forbid the same tokens, none of
            them in the data).
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    check_arguments(model, data, tokenizer, "evaluate")
    prompts = Prompts(model, continuations)
    name, layers = resolve_sites(model, adapter_name)
    modes = modes_of(model, name, layers)
    tokens = {mode: _Tokens(whose) for mode, whose in modes.items()}
    zeros = {mode: Zeros(layers, name) for mode in modes if mode != "dense"}

    before_head = BeforeHead(model_inside(model))
    before_head.forward = model

    def predictions(mode: str, inputs: Batch, counted: torch.Tensor) -> torch.Tensor:
        """Hidden states or logits that predict the counted labels: (tokens, ...)."""
        with ExitStack() as stack:
            stack.enter_context(running(model, mode, every_token))
            if mode in zeros:
                zeros[mode].start_batch(inputs)
                stack.enter_context(zeros[mode])
            values = before_head.run((), inputs)
        return values[:, : counted.shape[1]][counted.to(values.device)]

    batches = iter_batches(
        data, tokenizer, batch_size=batch_size, max_length=max_length, max_tokens=max_tokens, text_column=text_column
    )
    rows, positions, seen = [], [], 0
    bar = tqdm(desc="evaluating", total=max_tokens, unit=" tokens", disable=None if progress is None else not progress)
    # Hooks on a compiled model's layers are seen by none of its graphs, or stay in them.
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"), bar:
        for batch in batches:
            inputs = to_device(batch, model)
            labels, shift = _labels(model, inputs)
            inputs = _without_loss(model, inputs)
            before_head.lean = before_head.lean and "labels" not in inputs
            with running(model, "dense"):
                before_head.look((), inputs)
            counted, dense = labels != -100, None
            # Of hidden states all are kept, so that the dense model's logits are made once; of logits, those of two.
            for group in [list(modes)] if before_head.lean else [[mode] for mode in modes]:
                values = {mode: predictions(mode, inputs, counted) for mode in group}
                dense = values.get("dense", dense)
                for mode, *chunk in _chunks(before_head, values, dense, labels, counted):
                    tokens[mode].add(*chunk)
            rows.append(counted.nonzero()[:, 0].cpu() + seen)
            positions.append(_positions(inputs, labels, shift)[counted].cpu())
            seen += len(labels)
            prompts.take(inputs)
            bar.update(count_tokens(batch))
        if not any(len(part) for part in rows):
            raise ValueError("The data has no token to predict: every label is -100 or every text has one token.")
        compared = prompts.continued(
            model, modes, lambda mode: running(model, mode, every_token), batch_size, progress
        )
    last = list(modes)[-1]
    # Rows without a counted token count for nothing.
    row = torch.cat(rows).unique(return_inverse=True)[1]
    scores = {
        mode: found.scores(
            tokens["dense"],
            row,
            zeros[mode].overall() if mode in zeros else 0.0,
            agreement(compared[mode], compared["dense"]) if compared else None,
        )
        for mode, found in tokens.items()
    }
    result = EvaluationResult(
        dense=scores["dense"],
        sparse=scores["sparse"],
        anchored=scores.get("anchored"),
        tokens=len(row),
        sparse_tokens=which_tokens(name, layers, every_token),
        layer_sparsity=zeros[last].by_layer(),
        by_position=_by_position(tokens[last], tokens["dense"], torch.cat(positions)),
    )
    remember_results(model, name, results_text(report_of(result)))
    return result


def _chunks(
    before_head: BeforeHead,
    values: dict[str, torch.Tensor],
    dense: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Mode, its logits, the dense model's, labels: of one chunk of a row after the other.

    Args:
        before_head ([`BeforeHead`]): what gave the values.
        values (`dict[str, torch.Tensor]`): by mode, hidden states or logits of all counted tokens: (tokens, ...).
        dense (`torch.Tensor`): those of the dense model.
        labels, counted (`torch.Tensor`): ids, and whether they count: (rows, tokens).
    """
    with ExitStack() as stack:
        head = stack.enter_context(before_head.head()) if before_head.lean else None
        elements = MIN_CHUNK_ELEMENTS if head is None else int(head.weight.nbytes / 4 * CHUNK_SHARE)
        vocabulary = dense.shape[-1] if head is None else len(head.weight)
        size = max(1, min(max(elements, MIN_CHUNK_ELEMENTS), CHUNK_ELEMENTS) // vocabulary)

        def logits(part: torch.Tensor) -> torch.Tensor:
            return part if head is None else head.logits(part.to(head.weight.device))

        begin = 0
        for row, is_counted in zip(labels, counted, strict=True):
            ids = row[is_counted]
            for first in range(0, len(ids), size):
                chunk = slice(begin + first, begin + min(first + size, len(ids)))
                dense_logits = logits(dense[chunk])
                for mode, value in values.items():
                    own = dense_logits if value is dense else logits(value[chunk])
                    yield mode, own, dense_logits.to(own.device), ids[first : first + size].to(own.device)
            begin += len(ids)


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


def _without_loss(model: nn.Module, inputs: Batch) -> Batch:
    """The inputs without labels, of which the model would make a loss, from logits of all tokens."""
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    inner = model_inside(model)
    if not model.config.is_encoder_decoder or "labels" not in inputs or "decoder_input_ids" in inputs:
        return rest
    if not hasattr(inner, "prepare_decoder_input_ids_from_labels"):  # transformers' own way to ask
        return inputs
    return {**rest, "decoder_input_ids": inner.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}


def _positions(inputs: Batch, labels: torch.Tensor, shift: int) -> torch.Tensor:
    """Position of each label in its row, padding left out: shape of the labels."""
    if shift == 0 or "attention_mask" not in inputs:  # the mask of an encoder-decoder is of its encoder
        return torch.arange(labels.shape[1], device=labels.device).expand_as(labels) + shift
    return (inputs["attention_mask"].long().cumsum(1) - 1)[:, shift:]
