# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What S does inside a model: per layer, along the text, for tokens read together, and from block to block."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..criteria import threshold_at
from ..layer import SponLayer
from ..modes import attribute
from ..sites import Site, plain_name
from ..statistics import Observer, ScoreHistogram, bin_counts, run
from .metrics import running


# How many tokens a batch, or a window of speculative decoding, reads the weights for.
TOGETHER = (1, 2, 4, 8)


class LayerWatch(Observer):
    """What S does in every layer, in the sparse model with anchors."""

    shape: torch.Size  # of the model's input: rows, tokens

    def __init__(self, layers: dict[str, Site], adapter_name: str | None):
        super().__init__(layers, adapter_name)
        self.histograms: dict[str, ScoreHistogram] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self.along: dict[str, torch.Tensor] = {}
        self.together: dict[str, torch.Tensor] = {}
        self.rows: Counter[str] = Counter()

    def see(self, name: str, layer: Site, x: torch.Tensor, is_new: bool) -> None:
        sparsifier, state = layer.sparsifier(self.adapter_name), layer.sparsifier_state(self.adapter_name)
        z = sparsifier.criterion.encode(x, state)
        if sparsifier.uses_threshold:
            if name not in self.histograms:
                self.histograms[name] = ScoreHistogram(x.device)
            self.histograms[name].add(bin_counts(sparsifier.criterion.score(z, state)))
        self.squares[name] = self.squares.get(name, 0) + removal(layer, x, sparsifier(x, state))
        # An expert sees some of the tokens: it has neither their order nor their rows.
        if x.shape[:-1].numel() == self.shape.numel():
            kept = sparsifier.keep(z, state).bool().view(*self.shape, -1)
            self.along[name] = self.along.get(name, 0) + kept_along(kept) * len(kept)
            self.rows[name] += len(kept)
            self.together[name] = self.together.get(name, 0) + kept_together(kept)

    def of(self, name: str) -> dict[str, Any]:
        """One layer's entries in the report."""
        layer = self.layers[name]
        sparsifier, state = layer.sparsifier(self.adapter_name), layer.sparsifier_state(self.adapter_name)
        found = {"wanted": sparsifier.sparsity, "weights": sparsifier.n_in * sparsifier.n_out}
        if name in self.histograms and sparsifier.sparsity > 0:
            found["threshold"] = float(state["threshold"])
            found["threshold_here"] = float(threshold_at(self.histograms[name].quantiles(), sparsifier.zeroed_share))
        if name in self.squares:
            whole, removed = self.squares[name].sqrt().tolist()
            found |= {"removed": removed / whole} if whole > 0 else {}
        if isinstance(layer, SponLayer) and layer.has_repair(self.adapter_name):
            found["anchor_norm"] = float(layer.spon_anchor[self.adapter_name].detach().float().norm())
            if self.adapter_name in layer.spon_gain:
                found["gain_rms"] = float(layer.spon_gain[self.adapter_name].detach().float().square().mean().sqrt())
        return found

    def _mean(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Over layers, weighted by their weights."""
        sizes = {name: self.layers[name].sparsifier(self.adapter_name) for name in values}
        weights = {name: s.n_in * s.n_out for name, s in sizes.items()}
        return sum(values[name] * weights[name] for name in values) / sum(weights.values())

    def active(self) -> dict[str, list[float]]:
        """Share of the entries that are kept, along the text."""
        if not self.along:
            return {}
        now, always, ever = self._mean({name: total / self.rows[name] for name, total in self.along.items()})
        tokens = lengths(len(now))
        begins = [0, *tokens[:-1]]
        return {
            "tokens": tokens,
            "now": [float(now[begin:end].mean()) for begin, end in zip(begins, tokens, strict=True)],
            "always": [float(always[end - 1]) for end in tokens],
            "ever": [float(ever[end - 1]) for end in tokens],
        }

    def union(self) -> dict[str, list[float | None]]:
        """Share of the weights that a batch or a window does not read; None where there are too few rows or tokens."""
        if not self.together:
            return {}
        unread: dict[str, torch.Tensor] = {}
        for name, (kept, looked_at) in self.together.items():
            zeroed = 1 - kept / looked_at
            independent = zeroed[0, 0] ** torch.tensor(TOGETHER)
            # What a criterion reads beside W is read once for all.
            unread[name] = self.layers[name].sparsifier(self.adapter_name).unread(torch.stack([*zeroed, independent]))
        return {
            "tokens": list(TOGETHER),
            **dict(zip(("windows", "batches", "independent"), self._mean(unread).tolist(), strict=True)),
        }


def removal(layer: Site, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Squares, summed over tokens and features, of W x and of W (x - S(x)); fp64, shape (2,)."""

    def dense(value: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, SponLayer):
            return layer.base_layer(value)
        with attribute([layer], "_dense", True):
            return layer.forward(value)  # a call would show the observer its own question

    bias = dense(torch.zeros_like(x[..., :1, :]))
    parts = (dense(x) - bias, dense(x - kept) - bias)
    return torch.stack([part.float().square().sum(dtype=torch.float64) for part in parts]).cpu()


def kept_along(kept: torch.Tensor) -> torch.Tensor:
    """Shares of the entries of a layer's input, by position: kept there; at every token so far; at any token so far.

    Args:
        kept (`torch.Tensor`): bool, shape (rows, tokens, in).

    Returns:
        `torch.Tensor`: fp64, shape (3, tokens), mean over rows and entries.
    """
    always, ever, shares = torch.ones_like(kept[:, 0]), torch.zeros_like(kept[:, 0]), []
    for now in kept.unbind(1):
        always, ever = always & now, ever | now
        shares.append(torch.stack([part.float().mean() for part in (now, always, ever)]))
    return torch.stack(shares, 1).double().cpu()


def kept_together(kept: torch.Tensor) -> torch.Tensor:
    """Entries that at least one of n tokens keeps, for n of `TOGETHER`, and how many entries were looked at.

    Args:
        kept (`torch.Tensor`): bool, shape (rows, tokens, in).

    Returns:
        `torch.Tensor`: fp64, shape (2, 2, len(TOGETHER)): kept and looked at, by consecutive tokens of a row and by
            rows at the same position.
    """
    rows, tokens, width = kept.shape
    found = torch.zeros(2, 2, len(TOGETHER), dtype=torch.float64)
    for i, count in enumerate(TOGETHER):
        windows = kept[:, : tokens // count * count].reshape(rows, -1, count, width).any(2)
        batches = kept[: rows // count * count].reshape(-1, count, tokens, width).any(1)
        for j, union in enumerate((windows, batches)):
            found[:, j, i] = torch.tensor([float(union.sum(dtype=torch.float64)), union.numel()])
    return found


def lengths(tokens: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the whole."""
    found = {size for i in range(tokens.bit_length()) for size in (1 << i, 3 << i)} | {tokens}
    return sorted(size for size in found if size <= tokens)


# ---- blocks ------------------------------------------------------------------------------------------------------


def block_drift(
    model: nn.Module, names: list[str], ids: torch.Tensor, ways: list[str], bar: tqdm
) -> list[dict[str, Any]]:
    """How far the hidden states behind each block are from the dense model's: the mean over tokens of
    |h - h_dense| / |h_dense|, in each way of running the model but the dense one."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    blocks = {name: modules[name] for name in dict.fromkeys(map(block_name, names)) if name}
    states: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return hook

    sums = {name: dict.fromkeys(ways[1:], 0.0) for name in blocks}
    with ExitStack() as stack:
        for name, module in blocks.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        for row in ids.split(1):
            dense: dict[str, torch.Tensor] = {}
            for way in ways:
                with running(model, way):
                    run(model, {"input_ids": row})
                if way == "dense":
                    dense = {name: state.float() for name, state in states.items()}
                    continue
                for name, state in states.items():
                    share = (state.float() - dense[name]).norm(dim=-1) / dense[name].norm(dim=-1).clamp_min(1e-12)
                    sums[name][way] += float(share.mean()) / len(ids)
            states.clear()
            bar.update()
    return [{"name": name, **shares} for name, shares in sums.items()]


def block_name(name: str) -> str:
    """Of a layer's name the part up to the first number: "model.layers.3"; empty without one."""
    parts = name.split(".")
    first = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:first])


# ---- text and time -----------------------------------------------------------------------------------------------
