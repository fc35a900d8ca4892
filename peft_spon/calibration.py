# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Thresholds from data: one streaming pass, constant memory per layer, no stored activations."""

import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .criteria import entries_kept
from .data import (
    Batch,
    check_arguments,
    check_sizes,
    count_tokens,
    iter_batches,
    padding_masks,
    to_device,
    without_padding,
)
from .layer import QUANTILE_POINTS, SponLayer, spon_layers
from .model import adapter_config, resolve_adapter
from .modes import dense_mode, evaluation_mode, every_token_sparse


logger = logging.getLogger(__name__)

# The top 16 bits of a non-negative fp32 number (8 of exponent, 7 of mantissa) number the bins of a histogram whose
# bins are at most 0.8 % wide, over all of fp32: no range to guess, no parameter to tune, sums merge across processes.
BINS = 1 << 15
FIRST_NON_FINITE = 0x7F80


class ScoreHistogram:
    """Streaming histogram of non-negative fp32 scores with logarithmic bins, 256 kB whatever it has seen."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, counts: torch.Tensor) -> None:
        """Add the counts, int64 of shape (32768,), of one more batch of scores, from `bin_counts`."""
        self.counts += counts

    @property
    def total(self) -> int:
        """How many scores it has seen."""
        return int(self.counts.sum())

    @property
    def non_finite(self) -> int:
        """How many of them were NaN or infinite."""
        return int(self.counts[FIRST_NON_FINITE:].sum())

    def quantiles(self, points: int = QUANTILE_POINTS) -> torch.Tensor:
        """fp32 quantiles at `points` evenly spaced shares from 0 to 1, linear inside a bin; shape (points,)."""
        counts = self.counts.double()
        cumulative = counts.cumsum(0)
        wanted = torch.linspace(0, 1, points, dtype=torch.float64, device=counts.device) * cumulative[-1]
        first, last = self._occupied()
        index = torch.searchsorted(cumulative, wanted).clamp(first, last)
        inside = (wanted - (cumulative[index] - counts[index])) / counts[index].clamp_min(1)
        table = torch.lerp(bin_edge(index).double(), bin_edge(index + 1).double(), inside.clamp(0, 1))
        # The lowest bin holds the exact zeros that ReLU makes, not a spread of values.
        return torch.where(index == 0, 0.0, table).float()

    def share_below(self, threshold: float) -> float:
        """Share of the scores that are <= threshold, linear inside a bin."""
        index = int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32)) >> 16
        low, high = bin_edge(torch.tensor([index, index + 1])).tolist()
        inside = 1.0 if index == 0 else (threshold - low) / (high - low)
        return (float(self.counts[:index].sum()) + float(self.counts[index]) * inside) / self.total

    def _occupied(self) -> tuple[int, int]:
        seen = self.counts.nonzero()
        return int(seen[0]), int(seen[-1])


def bin_counts(score: torch.Tensor) -> torch.Tensor:
    """int64 counts, shape (32768,), of fp32 scores >= 0 per bin; NaN and infinity fall into the bins from 0x7F80."""
    bits = score.float().flatten().view(torch.int32)
    return torch.bincount((bits >> 16) & (BINS - 1), minlength=BINS)


def bin_edge(index: torch.Tensor) -> torch.Tensor:
    """fp32 lower edge of bins."""
    return (index << 16).to(torch.int32).view(torch.float32)


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration found for one layer: wanted and realised sparsity (shares), threshold (None for top-k)."""

    name: str
    wanted: float
    realised: float
    threshold: float | None


@dataclass(frozen=True)
class CalibrationResult:
    """Outcome of [`calibrate`]; `print(result)` shows one line per layer.

    Attributes:
        criterion (`str`): the adapter's criterion.
        tokens (`int`): tokens seen by this process's pass.
        layers (`list[LayerCalibration]`): one entry per layer, in the model's order.
    """

    criterion: str
    tokens: int
    layers: list[LayerCalibration] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':<{width}}  wanted  realised  threshold ({self.criterion}, {self.tokens:,} tokens)"]
        for layer in self.layers:
            threshold = "none" if layer.threshold is None else f"{layer.threshold:.6g}"
            lines.append(f"{layer.name:<{width}}  {layer.wanted:6.1%}  {layer.realised:8.2%}  {threshold:>9}")
        return "\n".join(lines)


class _Recorder:
    """Forward pre-hooks that histogram the scores of every layer's input; equal work for a shared input is shared."""

    def __init__(self, layers: dict[str, SponLayer], adapter_name: str):
        self.adapter_name = adapter_name
        self.layers = layers
        self.histograms: dict[str, ScoreHistogram] = {}
        self.masks: list[torch.Tensor] = []
        self._last_input: torch.Tensor | None = None
        self._last_counts: dict[Any, torch.Tensor] = {}
        self.handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self.observe(name, module, args[0]))
            for name, layer in layers.items()
        ]

    def start_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Remember which tokens are padding. Nothing is kept of the batch before."""
        self.masks = padding_masks(batch)
        self._last_input = None

    @torch.no_grad()
    def observe(self, name: str, layer: SponLayer, x: torch.Tensor) -> None:
        if x is not self._last_input:
            self._last_input, self._last_counts = x, {}
        criterion = layer.spon_settings[self.adapter_name].criterion
        # Layers that read the same input and score it alike (q, k, v; gate, up) are counted once.
        key = name if criterion.uses_column_norms else criterion
        if key not in self._last_counts:
            self._last_counts[key] = bin_counts(layer.score(without_padding(x, self.masks), self.adapter_name))
        if name not in self.histograms:
            self.histograms[name] = ScoreHistogram(x.device)
        self.histograms[name].add(self._last_counts[key])

    def remove(self) -> None:
        self._last_input = None
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    adapter_name: str | None = None,
    on_sparse: bool = False,
    refit: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = None,
    text_column: str = "text",
    progress: bool | None = None,
) -> CalibrationResult:
    """
    Find every layer's threshold from data, in one pass over the dense model.

    The scores of each layer's input stream into a histogram; what is stored with the adapter is a table of their
    quantiles, so `model.set_sparsity(...)` needs no data later. Nothing changes in the model if an error is raised.
    Under several processes each gives its own share of the data; the histograms are summed, so all end up equal.

    Args:
        model (`torch.nn.Module`): a model with a SPON adapter.
        data (`Iterable`): texts, rows of a data set, or batches, see [`data.iter_batches`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts.
        adapter_name (`str`, *optional*): which adapter; default: the first active one.
        on_sparse (`bool`, *optional*, defaults to `False`): a second pass, on the sparse model with its anchors, that
            fits each threshold to what the layer will see when the layers before it are sparse. Needs data that can
            be read twice.
        refit (`bool`, *optional*, defaults to `False`): only that second pass, starting from the thresholds there are.
        batch_size (`int`, *optional*, defaults to 8): blocks per batch.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop each pass after that many tokens; default: all of the data.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.
        progress (`bool`, *optional*): progress bar; default: when standard error is a terminal.

    Returns:
        [`CalibrationResult`]: per layer the wanted and realised sparsity and the threshold.

    Raises:
        `ValueError`: no data, no SPON adapter, NaN or infinite activations, a layer that was never called; `refit` of
            an adapter without thresholds; a size below 1.
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    check_arguments(model, data, tokenizer, "calibrate")
    check_sizes(batch_size=batch_size, max_length=max_length, max_tokens=max_tokens)
    name = resolve_adapter(model, adapter_name, must_be_active=on_sparse or refit)
    config = adapter_config(model, name)
    if refit and not config.calibrated:
        raise ValueError(f"refit=True adjusts thresholds, but adapter {name!r} has none yet; calibrate() first.")
    layers = {key: layer for key, layer in spon_layers(model).items() if name in layer.spon_settings}
    if on_sparse and not refit and iter(data) is data:
        raise ValueError("on_sparse=True reads the data twice, but it is an iterator; give a list or a data set.")

    def measure(sparse: bool) -> tuple[dict[str, ScoreHistogram], int]:
        batches = iter_batches(
            data,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            max_tokens=max_tokens,
            text_column=text_column,
        )
        label = "calibrating on the sparse model" if sparse else "calibrating"
        bar = tqdm(desc=label, total=max_tokens, unit=" tokens", disable=None if progress is None else not progress)
        return _measure(model, layers, name, batches, sparse=sparse, bar=bar)

    before = {key: layer.spon_settings[name] for key, layer in layers.items()}
    histograms, tokens = measure(sparse=refit)
    if config.make_criterion().uses_threshold:
        stored = {key: (layer.spon_quantiles, layer.spon_threshold) for key, layer in layers.items()}
        held = {key: [dict(buffers.items()) for buffers in pair] for key, pair in stored.items()}
        try:
            _store(layers, name, histograms)
            if on_sparse and not refit:
                histograms, tokens = measure(sparse=True)
                _store(layers, name, histograms)
        except BaseException:
            for key, layer in layers.items():
                layer.spon_settings[name] = before[key]
                for buffers, old in zip(stored[key], held[key], strict=True):
                    buffers.clear()
                    buffers.update(old)
            raise
        config.calibrated = True
    result = CalibrationResult(
        config.criterion, tokens, [_report(key, layer, name, histograms[key]) for key, layer in layers.items()]
    )
    logger.info("calibrated %d layers on %d tokens", len(layers), tokens)
    return result


@dataclass(frozen=True)
class Removed:
    """What S takes away from a layer, in the sparse model, over tokens and features.

    For an output-side anchor that is W x - W S(x), for an input-side one x - S(x).

    Attributes:
        rms (`float`): its root mean square, the natural unit of the layer's anchor; 1.0 where S removes nothing.
        share (`float`): that, relative to the root mean square of W x, or of x.
    """

    rms: float
    share: float


@torch.no_grad()
def removed_by_s(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    adapter_name: str | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = 8192,
    text_column: str = "text",
    progress: bool | None = None,
) -> dict[str, Removed]:
    """
    How much S takes away from each layer.

    Args:
        model (`torch.nn.Module`): a model with a SPON adapter.
        data, tokenizer, adapter_name, batch_size, max_length, max_tokens, text_column, progress: as in [`calibrate`].

    Returns:
        `dict[str, Removed]`: by layer name.
    """
    name = resolve_adapter(model, adapter_name)
    batches = iter_batches(
        data, tokenizer, batch_size=batch_size, max_length=max_length, max_tokens=max_tokens, text_column=text_column
    )
    squares: dict[str, torch.Tensor] = {}
    entries: dict[str, int] = {}

    def observe(key: str, layer: SponLayer, x: torch.Tensor) -> None:
        whole, removed = x, x - layer.sparsify(x, name)
        if layer.spon_settings[name].anchor_space == "output":
            at_zero = layer.base_layer(torch.zeros_like(x[..., :1, :]))
            whole, removed = (layer.base_layer(value) - at_zero for value in (whole, removed))
        sums = torch.stack([value.float().square().sum(dtype=torch.float64) for value in (removed, whole)])
        squares[key] = squares.get(key, 0.0) + sums.cpu()
        entries[key] = entries.get(key, 0) + removed.numel()

    handles = [
        layer.register_forward_pre_hook(lambda module, args, key=key: observe(key, module, args[0]))
        for key, layer in spon_layers(model).items()
        if name in layer.spon_settings
    ]
    bar = tqdm(
        desc="measuring what S removes",
        total=max_tokens,
        unit=" tokens",
        disable=None if progress is None else not progress,
    )
    try:
        with every_token_sparse(model), evaluation_mode(model), bar:
            for batch in batches:
                run(model, batch)
                bar.update(count_tokens(batch))
    finally:
        for handle in handles:
            handle.remove()
    table = torch.stack([squares[key] / torch.tensor([entries[key], 1.0]) for key in squares])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The same numbers on every rank, to the last bit: they set learning rates.
        table = table.to(next(model.parameters()).device)
        torch.distributed.broadcast(table, src=0)
    found = {}
    for key, (mean_square, whole) in zip(squares, table.tolist(), strict=True):
        share = math.sqrt(mean_square * entries[key] / whole) if whole > 0 else 0.0
        found[key] = Removed(math.sqrt(mean_square) or 1.0, share)
    return found


def run(model: nn.Module, batch: Batch) -> None:
    """One forward for what hooks see of it. The output head gets the last token only, as nothing reads the logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = None
    if head is not None and not isinstance(head, SponLayer) and "labels" not in batch:
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]) if args else None)
    try:
        model(**to_device(batch, model))
    finally:
        if handle is not None:
            handle.remove()


def _measure(
    model: nn.Module, layers: dict[str, SponLayer], name: str, batches, *, sparse: bool, bar: tqdm
) -> tuple[dict[str, ScoreHistogram], int]:
    """One pass over the data: a histogram per layer, summed over processes, and the number of tokens seen."""
    recorder = _Recorder(layers, name)
    tokens = 0
    try:
        with ExitStack() as stack:
            stack.enter_context(every_token_sparse(model) if sparse else dense_mode(model))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(bar)
            for batch in batches:
                recorder.start_batch(batch)
                run(model, batch)
                tokens += count_tokens(batch)
                bar.update(count_tokens(batch))
    finally:
        recorder.remove()
    for key, layer in layers.items():
        if key not in recorder.histograms:
            device = next(layer.parameters()).device
            recorder.histograms[key] = ScoreHistogram(device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(recorder.histograms[key].counts)
        if recorder.histograms[key].non_finite:
            raise ValueError(
                f"{recorder.histograms[key].non_finite} of {recorder.histograms[key].total} entries of the input of "
                f"layer '{key}' are NaN or infinite; check the model's weights and dtype (fp16 overflows, bf16 does "
                "not). Nothing was changed."
            )
        if recorder.histograms[key].total == 0:
            raise ValueError(
                f"No token of the data reached layer '{key}'. It was never called (an expert that was never chosen, a "
                "part for pictures or speech while the data has text only, or only its weight is read?). Give more "
                "data, or leave the layer out with exclude_modules. Nothing was changed."
            )
    return recorder.histograms, tokens


def _store(layers: dict[str, SponLayer], name: str, histograms: dict[str, ScoreHistogram]) -> None:
    for key, layer in layers.items():
        layer.set_quantiles(name, histograms[key].quantiles())


def _report(key: str, layer: SponLayer, name: str, histogram: ScoreHistogram) -> LayerCalibration:
    settings = layer.spon_settings[name]
    if settings.sparsity == 0:
        return LayerCalibration(key, 0.0, 0.0, None)
    if not settings.uses_threshold:
        kept = entries_kept(layer.in_features, settings.sparsity)
        return LayerCalibration(key, settings.sparsity, 1 - kept / layer.in_features, None)
    threshold = float(layer.spon_threshold[name])
    return LayerCalibration(key, settings.sparsity, histogram.share_below(threshold), threshold)
