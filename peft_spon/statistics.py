# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What is counted over the inputs of the sparse layers: histograms of scores, second moments, what S removes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .criteria import QUANTILE_POINTS, Sparsifier
from .data import Batch, count_tokens, iter_batches, padding_masks, to_device, without_padding
from .layer import SponLayer
from .modes import evaluation_mode, every_token_sparse
from .sites import Site, resolve_adapter, spon_layers


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


class Observer:
    """
    `with observer:` shows every layer's input, padding left out, to `see`, in front of the layer's own forward.

    Args:
        layers (`dict[str, Site]`): the sparse layers, by name.
        adapter_name (`str` or `None`): the adapter in question; `None` for merged layers.
    """

    def __init__(self, layers: dict[str, Site], adapter_name: str | None):
        self.layers, self.adapter_name = layers, adapter_name
        self.masks: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def __enter__(self):
        self.handles = [
            layer.register_forward_pre_hook(lambda module, args, name=name: self._observe(name, module, args[0]))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        self.last = None
        for handle in self.handles:
            handle.remove()

    def start_batch(self, batch: Batch) -> None:
        """Remember which tokens are padding. Nothing is kept of the batch before."""
        self.masks = padding_masks(batch)
        self.last = None

    @torch.no_grad()
    def _observe(self, name: str, layer: Site, x: torch.Tensor) -> None:
        is_new, self.last = x is not self.last, x
        self.see(name, layer, x, is_new)

    def tokens_of(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., tokens, features) without padding."""
        return without_padding(x, self.masks)

    def see(self, name: str, layer: Site, x: torch.Tensor, is_new: bool) -> None:
        """One layer's input, shape (..., in); `is_new`: not the tensor that the layer before it has read."""
        raise NotImplementedError


class Scores(Observer):
    """A histogram of the scores of every layer's input."""

    def __init__(self, layers: dict[str, SponLayer], adapter_name: str):
        super().__init__(layers, adapter_name)
        self.histograms: dict[str, ScoreHistogram] = {}
        self._counts: dict[Any, torch.Tensor] = {}

    def see(self, name: str, layer: SponLayer, x: torch.Tensor, is_new: bool) -> None:
        if is_new:
            self._counts = {}
        criterion = layer.sparsifier(self.adapter_name).criterion
        # Layers that read the same input and score it alike (q, k, v; gate, up) are counted once.
        key = name if criterion.state(layer.in_features, layer.out_features) else criterion
        if key not in self._counts:
            self._counts[key] = bin_counts(layer.score(self.tokens_of(x), self.adapter_name))
        if name not in self.histograms:
            self.histograms[name] = ScoreHistogram(x.device)
        self.histograms[name].add(self._counts[key])

    def summed(self, all_seen: bool = True) -> dict[str, ScoreHistogram]:
        """The histograms of all layers, over all processes.

        Args:
            all_seen (`bool`, *optional*, defaults to `True`): `False`: without the layers that few tokens reached,
                less than 256 and less than a quarter of what the others saw.

        Raises:
            `ValueError`: NaN or infinity, or, with `all_seen`, a layer that no token reached.
        """
        # A layer that was not called may be offloaded, on no device.
        device = next((histogram.counts.device for histogram in self.histograms.values()), torch.device("cpu"))
        tokens = {}
        for name, layer in self.layers.items():
            histogram = self.histograms.setdefault(name, ScoreHistogram(device))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(histogram.counts)
            tokens[name] = histogram.total / layer.in_features
            if all_seen or tokens[name]:
                check_seen(name, histogram.total, histogram.non_finite)
        enough = 0 if all_seen else min(256, max(tokens.values()) / 4)
        return {name: self.histograms[name] for name in self.layers if tokens[name] >= max(enough, 1)}


class Moments(Observer):
    """E[x xᵀ] of the inputs, fp64: one matrix (in, in) for all layers that read the same input."""

    def __init__(self, layers: dict[str, SponLayer], adapter_name: str):
        super().__init__(layers, adapter_name)
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.reader: dict[str, str] = {}  # layer to the first one that reads the same input
        self._first = ""

    def see(self, name: str, layer: SponLayer, x: torch.Tensor, is_new: bool) -> None:
        if is_new:
            self._first = name
            x = self.tokens_of(x).flatten(0, -2).float()
            self.sums[name] = self.sums.get(name, 0) + (x.T @ x).double()
            self.tokens[name] = self.tokens.get(name, 0) + len(x)
        self.reader.setdefault(name, self._first)

    def summed(self) -> dict[str, torch.Tensor]:
        """The matrices of all layers, over all processes; one object for those that read the same input.

        Raises:
            `ValueError`: NaN or infinity, or a layer that no token reached.
        """
        means = {}
        for name, layer in self.layers.items():
            reader = self.reader.get(name, name)
            if reader not in means:
                width, device = layer.in_features, next(layer.parameters()).device
                total = self.sums.get(reader, torch.zeros(width, width, dtype=torch.float64, device=device))
                tokens = torch.tensor([self.tokens.get(reader, 0)], device=total.device)
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.all_reduce(total)
                    torch.distributed.all_reduce(tokens)
                check_seen(name, int(tokens), int((~total.diagonal().isfinite()).sum()))
                means[reader] = total / tokens
            means[name] = means[reader]
        return means


class Zeros(Observer):
    """How many entries of its input S drops, per layer, as the layer's own forward is about to do."""

    def __init__(self, layers: dict[str, Site], adapter_name: str | None):
        super().__init__(layers, adapter_name)
        self.dropped = dict.fromkeys(layers, 0)
        self.seen = dict.fromkeys(layers, 0)

    def see(self, name: str, layer: Site, x: torch.Tensor, is_new: bool) -> None:
        first = layer.first_sparse_token(x, self.adapter_name)
        kept = torch.ones_like(x)
        if first < x.shape[-2]:
            sparsifier, state = layer.sparsifier(self.adapter_name), layer.sparsifier_state(self.adapter_name)
            z = sparsifier.criterion.encode(x[..., first:, :], state)
            kept[..., first:, :] = sparsifier.keep(z, state)
        kept = self.tokens_of(kept)
        self.seen[name] += kept.numel()
        # A tensor on its device: to read it here, a GPU would be waited for.
        self.dropped[name] += kept.numel() - kept.sum(dtype=torch.int64)

    def sparsifiers(self) -> dict[str, Sparsifier]:
        """S of every layer."""
        return {name: layer.sparsifier(self.adapter_name) for name, layer in self.layers.items()}

    def by_layer(self) -> dict[str, float]:
        """Realised sparsity of every layer: the share of its weights that was not read."""
        return {
            name: sparsifier.unread(int(self.dropped[name]) / max(self.seen[name], 1))
            for name, sparsifier in self.sparsifiers().items()
        }

    def overall(self) -> float:
        """That of all layers together."""
        weights = {name: s.n_in * s.n_out for name, s in self.sparsifiers().items()}
        shares = self.by_layer()
        return sum(shares[name] * weights[name] for name in weights) / sum(weights.values())


class NotFinite(ValueError):
    """A layer's input had NaN or infinite entries."""


def check_seen(name: str, total: int, non_finite: int) -> None:
    """Raises `NotFinite` if a layer's input had NaN or infinite entries, `ValueError` if there was none."""
    if non_finite:
        raise NotFinite(
            f"{non_finite} of {total} entries of the input of layer '{name}' are NaN or infinite; check the model's "
            "weights and dtype (fp16 overflows, bf16 does not). Nothing was changed."
        )
    if total == 0:
        raise ValueError(
            f"No token of the data reached layer '{name}'. It was never called (an expert that was never chosen, a "
            "part for pictures or speech while the data has text only, or only its weight is read?). Give more "
            "data, or leave the layer out with exclude_modules. Nothing was changed."
        )


def watch(
    model: nn.Module,
    batches: Iterable[Batch],
    observer: Observer,
    label: str,
    progress: bool | None = None,
    max_tokens: int | None = None,
) -> int:
    """Run the model, in eval mode, over all batches for what the observer sees of it; the number of tokens seen."""
    tokens = 0
    bar = tqdm(desc=label, total=max_tokens, unit=" tokens", disable=None if progress is None else not progress)
    with observer, evaluation_mode(model), bar:
        for batch in batches:
            inputs = to_device(batch, model)
            observer.start_batch(inputs)
            run(model, inputs)
            tokens += count_tokens(batch)
            bar.update(count_tokens(batch))
    return tokens


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


@dataclass(frozen=True)
class Removed:
    """What S takes away from a layer, in the sparse model, over tokens and features.

    For an output-side anchor that is W x - W S(x), for an input-side one x - S(x).

    Attributes:
        rms (`float`): its root mean square.
        mean (`float`): the root mean square, over features, of its mean over tokens: all that an anchor can replace,
            and so the natural unit of the layer's anchor. Chance is subtracted, and where no more is left than chance
            makes, it is that; 0 where S removes nothing.
        share (`float`): that, relative to the root mean square of W x, or of x.
    """

    rms: float
    mean: float
    share: float


class _Removal(Observer):
    """Squares of what S removes, and of all, per layer; and its sum over tokens, per feature."""

    def __init__(self, layers: dict[str, SponLayer], adapter_name: str):
        super().__init__(layers, adapter_name)
        self.squares: dict[str, torch.Tensor] = {}
        self.totals: dict[str, torch.Tensor] = {}
        self.entries: dict[str, int] = {}

    def see(self, name: str, layer: SponLayer, x: torch.Tensor, is_new: bool) -> None:
        x = self.tokens_of(x).flatten(0, -2)
        whole, removed = x, x - layer.sparsify(x, self.adapter_name)
        if layer.settings(self.adapter_name).anchor_space == "output":
            at_zero = layer.base_layer(torch.zeros_like(x[:1]))
            whole, removed = (layer.base_layer(value) - at_zero for value in (whole, removed))
        sums = torch.stack([value.float().square().sum(dtype=torch.float64) for value in (removed, whole)])
        self.squares[name] = self.squares.get(name, 0.0) + sums.cpu()
        self.totals[name] = self.totals.get(name, 0.0) + removed.float().sum(0, dtype=torch.float64).cpu()
        self.entries[name] = self.entries.get(name, 0) + removed.numel()


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
    seen = _Removal({key: layer for key, layer in spon_layers(model).items() if name in layer.spon_settings}, name)
    with every_token_sparse(model):
        watch(model, batches, seen, "measuring what S removes", progress, max_tokens)
    table = torch.stack([_row(seen, key) for key in seen.squares])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The same numbers on every rank, to the last bit: they set learning rates.
        table = table.to(next(model.parameters()).device)
        torch.distributed.broadcast(table, src=0)
    found = {}
    for key, (square, whole, mean) in zip(seen.squares, table.tolist(), strict=True):
        found[key] = Removed(math.sqrt(square), math.sqrt(mean), math.sqrt(square / whole) if whole > 0 else 0.0)
    return found


def _row(seen: _Removal, key: str) -> torch.Tensor:
    """Of one layer: mean squares of what S removes, of all, and of the mean of what it removes; shape (3,)."""
    square, whole = seen.squares[key] / seen.entries[key]
    tokens = seen.entries[key] / len(seen.totals[key])
    chance = square / tokens
    return torch.stack([square, whole, ((seen.totals[key] / tokens).square().mean() - chance).maximum(chance)])
