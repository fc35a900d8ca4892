# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Thresholds from data: one streaming pass, constant memory per layer, no stored activations."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .base_layer import prepared_state
from .criteria import entries_kept
from .data import Batch, check_arguments, check_sizes, iter_batches
from .layer import SponLayer
from .modes import dense_mode, every_token_sparse
from .sites import adapter_config, change_config, resolve_adapter, spon_layers
from .statistics import Moments, Observer, ScoreHistogram, Scores, watch


logger = logging.getLogger(__name__)
SPARSE = "calibrating on the sparse model"  # a progress bar's label


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

    criterion = config.make_criterion()
    is_rotated = any(needs_moments(layer, name) for layer in layers.values())
    if is_rotated and criterion.selects == "threshold" and iter(data) is data:
        raise ValueError(f"Criterion {criterion.name!r} reads the data twice, but it is an iterator; give a list.")

    def see(observer: Observer, sparse: bool = False) -> int:
        batches = iter_batches(
            data,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            max_tokens=max_tokens,
            text_column=text_column,
        )
        with every_token_sparse(model) if sparse else dense_mode(model):
            return watch(model, batches, observer, SPARSE if sparse else "calibrating", progress, max_tokens)

    def fit(sparse: bool) -> int:
        scores = Scores(layers, name)
        tokens = see(scores, sparse)
        histograms.update(scores.summed())
        if criterion.selects == "threshold":
            set_thresholds(layers, name, histograms)
        return tokens

    histograms: dict[str, ScoreHistogram] = {}
    before = {key: layer.saved_state(name) for key, layer in layers.items()}
    try:
        if is_rotated and not refit:
            moments = Moments({key: layer for key, layer in layers.items() if needs_moments(layer, name)}, name)
            tokens = see(moments)
            set_prepared(moments, name)
        if not is_rotated or criterion.selects == "threshold":
            tokens = fit(sparse=refit)
            if on_sparse and not refit and criterion.selects == "threshold":
                tokens = fit(sparse=True)
    except BaseException:
        for key, layer in layers.items():
            layer.restore_state(name, before[key])
        raise
    if is_rotated or criterion.selects == "threshold":
        change_config(model, name, calibrated=True)
    result = CalibrationResult(
        config.criterion, tokens, [_report(key, layer, name, histograms.get(key)) for key, layer in layers.items()]
    )
    logger.info("calibrated %d layers on %d tokens", len(layers), tokens)
    return result


@torch.no_grad()
def refit_thresholds(
    model: nn.Module, batches: Iterable[Batch], layers: dict[str, SponLayer], name: str, progress: bool | None = None
) -> None:
    """As `calibrate(refit=True)`, but a layer that few tokens reach, an expert, keeps its threshold."""
    scores = Scores(layers, name)
    with every_token_sparse(model):
        watch(model, batches, scores, SPARSE, progress)
    set_thresholds(layers, name, scores.summed(all_seen=False))


def set_thresholds(layers: dict[str, SponLayer], name: str, histograms: dict[str, ScoreHistogram]) -> None:
    """Quantiles and thresholds from the histograms of some layers' scores."""
    for key, histogram in histograms.items():
        layers[key].set_quantiles(name, histogram.quantiles())


def needs_moments(layer: SponLayer, adapter_name: str) -> bool:
    """Whether the criterion makes state of its own from the layer's inputs, beside thresholds."""
    criterion = layer.sparsifier(adapter_name).criterion
    return any(spec.from_data for spec in criterion.state(layer.in_features, layer.out_features).values())


def set_prepared(moments: Moments, adapter_name: str) -> None:
    """What the criterion makes of the moments, into the layers; made once for all that read the same input."""
    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, matrix in moments.summed().items():
        layer, reader = moments.layers[name], moments.reader[name]
        if reader not in made:
            criterion = layer.sparsifier(adapter_name).criterion
            specs = criterion.state(layer.in_features, layer.out_features)
            state = prepared_state(layer.base_layer, criterion, matrix)
            made[reader] = {part: state[part] for part, spec in specs.items() if spec.from_data}
        layer.set_state(adapter_name, made[reader], calibrated=True)


def _report(key: str, layer: SponLayer, name: str, histogram: ScoreHistogram | None) -> LayerCalibration:
    sparsifier = layer.sparsifier(name)
    if sparsifier.sparsity == 0:
        return LayerCalibration(key, 0.0, 0.0, None)
    if not sparsifier.uses_threshold:
        zeroed = 1 - entries_kept(layer.in_features, sparsifier.zeroed_share) / layer.in_features
        return LayerCalibration(key, sparsifier.sparsity, sparsifier.unread(zeroed), None)
    threshold = float(layer.sparsifier_state(name)["threshold"])
    return LayerCalibration(key, sparsifier.sparsity, sparsifier.unread(histogram.share_below(threshold)), threshold)
