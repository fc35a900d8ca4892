# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A sparsity budget split over layers: the arithmetic behind [`allocate`], on the numbers that an adapter keeps."""

import math
import re
from typing import Any

import torch


METHODS = ("kl", "greedy", "uniform")
# Sparsities at which each layer's curve is known. Between them the KL is a power of s; a greedy path is linear.
GRID = tuple(i / 10 for i in range(1, 10))
FINE = torch.linspace(0, 0.99, 199, dtype=torch.float64)


def split(allocation: dict[str, Any], sparsity: float) -> dict[str, float]:
    """
    Sparsity of every layer, so that the layers together, weighted by their sizes, have `sparsity`.

    Args:
        allocation (`dict`): what an adapter keeps, see [`check_allocation`].
        sparsity (`float`): of all layers together, in [0, 1).

    Returns:
        `dict[str, float]`: by layer name. A layer without a curve (no token reached it) gets `sparsity`.

    Raises:
        `ValueError`: a floor above `sparsity`, or a cap below it.
    """
    shares = dict.fromkeys(allocation["layers"], sparsity)
    curves = {name: layer["curve"] for name, layer in allocation["layers"].items() if layer["curve"]}
    if sparsity == 0 or not curves:
        return shares
    if allocation["method"] == "greedy":
        found = [at_target(curve, sparsity) for curve in curves.values()]
    else:
        floor, cap = allocation["floor"], cap_at(allocation["cap"], sparsity)
        if not floor <= sparsity <= cap:
            raise ValueError(
                f"Every layer is to have a sparsity between the floor {floor} and the cap {cap}, so all together "
                f"cannot have {sparsity}; allocate() with another floor or cap."
            )
        sizes = torch.tensor([allocation["layers"][name]["size"] for name in curves], dtype=torch.float64)
        found = cheapest(fine_curves(curves), sizes, sparsity, floor, cap).tolist()
    return {**shares, **{name: round(share, 6) for name, share in zip(curves, found, strict=True)}}


def cap_at(cap: float | None, sparsity: float) -> float:
    """The largest sparsity of a layer; by default it keeps half of what it would keep if all were alike."""
    return (1 + sparsity) / 2 if cap is None else cap


def cheapest(fine: torch.Tensor, sizes: torch.Tensor, sparsity: float, floor: float, cap: float) -> torch.Tensor:
    """
    The shares s_l, shape (layers,), with sum n_l s_l = S sum n_l whose summed KL is smallest.

    With convex curves the best split is where one more weight costs the same in every layer: one price, found by
    bisection.

    Args:
        fine (`torch.Tensor`): KL of every layer at [`FINE`], fp64, shape (layers, 199).
        sizes (`torch.Tensor`): n_l, fp64, shape (layers,).
    """
    slopes = fine.diff(dim=1) / (FINE[1] - FINE[0]) / sizes.clamp_min(1e-9)[:, None]
    slopes = slopes.cummax(dim=1).values  # convex

    def at(price: float) -> torch.Tensor:
        return FINE[(slopes <= price).sum(1)].clamp(floor, cap)

    def total(shares: torch.Tensor) -> float:
        return float((shares * sizes).sum() / sizes.sum())

    low, high = max(float(slopes.min()) / 2, 1e-30), float(slopes.max()) + 1e-30
    for _ in range(100):
        price = math.sqrt(low * high)
        low, high = (price, high) if total(at(price)) < sparsity else (low, price)
    below, above = at(low), at(high)
    if total(below) > sparsity:  # where nothing costs anything, as with the zeros that ReLU makes
        below, above = torch.full_like(below, floor), below
    if total(above) < sparsity:  # the grid ends below the cap
        below, above = above, torch.full_like(below, cap)
    gap = total(above) - total(below)
    return below + (above - below) * ((sparsity - total(below)) / gap if gap > 0 else 0.0)


def fine_curves(curves: dict[str, list[float]]) -> torch.Tensor:
    """KL of every layer at [`FINE`], fp64, shape (layers, 199): a power of s between the points of the grid."""
    at, x = torch.tensor(GRID, dtype=torch.float64).log(), FINE.clamp_min(1e-3).log()
    values = torch.tensor(list(curves.values()), dtype=torch.float64).clamp_min(1e-12).cummax(dim=1).values.log()
    right = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    weight = (x - at[right - 1]) / (at[right] - at[right - 1])
    return torch.lerp(values[:, right - 1], values[:, right], weight.expand(len(values), -1)).exp()


def at_target(path: list[float], sparsity: float) -> float:
    """A layer's sparsity where its block's is `sparsity`, linear in what is known at the grid, 0 and 1."""
    values = [0.0, *path, 1.0]
    position = sparsity * (len(GRID) + 1)
    index = min(int(position), len(GRID))
    return values[index] + (position - index) * (values[index + 1] - values[index])


def predicted_kl(allocation: dict[str, Any], shares: dict[str, float]) -> dict[str, float]:
    """KL to the dense model, in nats per token, that each layer's curve promises at its sparsity."""
    curves = {name: layer["curve"] for name, layer in allocation["layers"].items() if layer["curve"]}
    if not curves or allocation["method"] != "kl":
        return {}
    found = {}
    for name, fine in zip(curves, fine_curves(curves), strict=True):
        position = shares[name] / float(FINE[1])
        index = min(int(position), len(FINE) - 2)
        value = torch.lerp(fine[index], fine[index + 1], min(position - index, 1.0))
        found[name] = float(value) if shares[name] > 0 else 0.0
    return found


def exact_key(name: str) -> str:
    """A key of `sparsity_pattern` that matches one layer only, by its full name."""
    return f"^{re.escape(name)}"


def check_allocation(allocation: Any) -> None:
    """
    Raises `ValueError` unless it is what `allocate` writes, or None.

    That is `{"method": "kl" or "greedy", "floor": number, "cap": number or None, "layers": {name: {"size": number,
    "curve": numbers at GRID, or an empty list}}}`: sizes in weights (or bytes per token); curves the KL to the dense
    model with that layer alone sparse, in nats per token, or, `"greedy"`, the layer's sparsity where its block's is
    that of the grid.
    """
    if allocation is None:
        return
    is_whole = isinstance(allocation, dict) and allocation.keys() == {"method", "floor", "cap", "layers"}
    if is_whole:
        numbers = [allocation["floor"], 0.0 if allocation["cap"] is None else allocation["cap"]]
        layers = allocation["layers"]
        is_whole = allocation["method"] in METHODS[:2] and isinstance(layers, dict)
        is_whole = is_whole and all(
            isinstance(layer, dict) and layer.keys() == {"size", "curve"} and isinstance(layer["curve"], list)
            for layer in layers.values()
        )
    if is_whole:
        lengths = {len(layer["curve"]) for layer in layers.values()}
        numbers += [value for layer in layers.values() for value in (layer["size"], *layer["curve"])]
        is_whole = lengths <= {0, len(GRID)} and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            for value in numbers
        )
    if not is_whole:
        raise ValueError(
            f"allocation is {allocation!r:.80}, which is not what allocate() writes; leave it out, or allocate again."
        )
