# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""One sparsity budget for all layers, spread by what it costs in each of them. docs/allocation.md has the method."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .budget import FINE, METHODS, cap_at, predicted_kl, split
from .calibration import calibrate, needs_moments, refit_thresholds
from .checksums import tensors_checksum
from .data import Batch, check_arguments, check_sizes, count_tokens, iter_batches, to_device
from .greedy import greedy_paths
from .model import set_sparsity
from .modes import differentiable, evaluation_mode, every_token_sparse
from .sensitivity import Looked, State, kl_curves
from .sites import adapter_config, change_config, resolve_adapter, spon_layers
from .statistics import Zeros, run


# Tokens that each method looks at, unless told otherwise.
TOKENS = {"kl": 4096, "greedy": 1024, "uniform": 4096}


@dataclass(frozen=True)
class LayerAllocation:
    """One layer's part: weights, wanted and realised sparsity (shares), the KL predicted for it (nats per token)."""

    name: str
    weights: int
    sparsity: float
    realised: float
    kl: float | None


@dataclass(frozen=True)
class Allocation:
    """Outcome of [`allocate`]; `print(result)` shows one line per layer.

    Attributes:
        method (`str`): `"kl"`, `"greedy"` or `"uniform"`.
        sparsity (`float`): wanted, over all layers, by their weights (or bytes).
        realised (`float`): on the first tokens of the data, which thresholds were fitted to, S on every token, layers
            weighted by their weights.
        tokens (`int`): tokens on which the method has looked at the layers, over all processes for `"kl"`.
        kl, uniform_kl (`float`, *optional*): predicted KL to the dense model in nats per token, with this allocation
            and with every layer alike; a sum over layers, too low where the sparse model is far from the dense one.
        price (`float`, *optional*): what one more point of sparsity costs in predicted KL: the same in every layer
            that is neither at its cap nor at its floor.
        layers (`list[LayerAllocation]`): one entry per layer, in the model's order.
    """

    method: str
    sparsity: float
    realised: float
    tokens: int
    kl: float | None = None
    uniform_kl: float | None = None
    price: float | None = None
    layers: list[LayerAllocation] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':<{width}}  {'weights':>11}  sparsity  realised  predicted KL"]
        for layer in self.layers:
            kl = "" if layer.kl is None else f"{layer.kl:12.5f}"
            row = f"{layer.name:<{width}}  {layer.weights:11,}  {layer.sparsity:8.2%}  {layer.realised:8.2%}  {kl}"
            lines.append(row.rstrip())
        lines.append(
            f"method {self.method!r}, {self.tokens:,} tokens: {self.sparsity:.2%} wanted, {self.realised:.2%} realised"
        )
        if self.kl is not None:
            lines.append(
                f"predicted KL to dense {self.kl:.4f} nats per token, {self.uniform_kl:.4f} with all layers alike; "
                f"one more point of sparsity costs {self.price:.4f}"
            )
        return "\n".join(lines)


def allocate(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    sparsity: float | None = None,
    *,
    method: str = "kl",
    floor: float = 0.0,
    cap: float | None = None,
    budget: str = "weights",
    adapter_name: str | None = None,
    batch_size: int = 1,
    max_length: int = 512,
    max_tokens: int | None = None,
    calibration_tokens: int = 8192,
    text_column: str = "text",
    seed: int = 0,
    state_file: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Allocation:
    """
    Spread a sparsity budget over the layers of an adapter, and set it: some bear much more of it than others.

    What is found becomes the adapter's `sparsity_pattern`, is saved with it, and `model.set_sparsity(s)` splits
    another budget by it, without data. Anchors and gains play no part in it. An adapter without thresholds is
    calibrated first. Last, one pass over the same data fits thresholds anew to the sparse model as it then is, as
    `calibrate(refit=True)` does, so that what was asked for is realised. Under several processes each gives its own
    share of the data. Nothing changes in the model if an error is raised.

    Args:
        model (`torch.nn.Module`): a model with a SPON adapter that is active.
        data (`Iterable`): texts, rows of a data set, or batches, see [`data.iter_batches`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts.
        sparsity (`float`, *optional*): of all layers together, in [0, 1); default: the adapter's own.
        method (`str`, *optional*, defaults to `"kl"`): `"kl"` (ours): least KL to the dense model, from one forward
            and one backward of the dense model. `"greedy"`: every block alike, inside it as TEAL (arXiv 2408.14690)
            does it, by the error of the block's output. `"uniform"`: every layer alike.
        floor (`float`, *optional*, defaults to 0): least sparsity of a layer.
        cap (`float`, *optional*): largest sparsity of a layer; default: (1 + sparsity) / 2, so that each keeps at
            least half of what it would keep if all were alike; 0.95 for `"greedy"`.
        budget (`str`, *optional*, defaults to `"weights"`): what is counted: a layer's weights, or the `"bytes"` of
            them that a token reads (dtype or quantisation, and how many of the tokens reach an expert; `"kl"` only).
        adapter_name (`str`, *optional*): which adapter; default: the first active one.
        batch_size (`int`, *optional*, defaults to 1): blocks per batch; memory grows with it as in a training step.
        max_length (`int`, *optional*, defaults to 512): tokens per block.
        max_tokens (`int`, *optional*): stop after that many tokens; default: 4,096, for `"greedy"` 1,024.
        calibration_tokens (`int`, *optional*, defaults to 8192): for an adapter without thresholds.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.
        seed (`int`, *optional*, defaults to 0): `"kl"` samples one next token per position.
        state_file (`str`, *optional*): what has been found so far is kept there, and gone on with if it is there.
        progress (`bool`, *optional*): progress bar; default: when standard error is a terminal.

    Returns:
        [`Allocation`]

    Raises:
        `ValueError`: no data, no active SPON adapter, an unknown method or budget, a floor above the sparsity or a cap
            below it, NaN or infinite gradients, a model without logits (`"kl"`), blocks of more than 16 sparse layers
            (`"greedy"`), a state file of something else.
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    check_arguments(model, data, tokenizer, "allocate")
    max_tokens = TOKENS.get(method) if max_tokens is None else max_tokens
    check_sizes(batch_size=batch_size, max_length=max_length, calibration_tokens=calibration_tokens)
    name = resolve_adapter(model, adapter_name, must_be_active=True)
    config = adapter_config(model, name)
    sparsity = config.sparsity if sparsity is None else sparsity
    check_dials(method, budget, sparsity, floor, cap)
    layers = {key: layer for key, layer in spon_layers(model).items() if name in layer.spon_settings}
    is_fitted = config.calibrated or not (
        config.make_criterion().selects == "threshold" or any(needs_moments(layer, name) for layer in layers.values())
    )
    if not is_fitted and iter(data) is data:
        raise ValueError(
            "The adapter has no thresholds yet, and finding them reads the data a first time, but it is an iterator; "
            "give a list or a data set, or calibrate(model, ...) before."
        )
    before = {key: layer.saved_state(name) for key, layer in layers.items()}
    size = {"batch_size": batch_size, "max_length": max_length, "text_column": text_column}
    try:
        # The backward needs 4-bit weights in the form that has one, also where thresholds are found first.
        with differentiable(model) if method == "kl" else nullcontext():
            if not is_fitted:
                calibrate(
                    model, data, tokenizer, adapter_name=name, max_tokens=calibration_tokens, progress=progress, **size
                )
            batches = [to_device(b, model) for b in iter_batches(data, tokenizer, max_tokens=max_tokens, **size)]
            looked = Looked(model, layers, name, batches, None if progress is None else not progress)
            allocation = None
            if method != "uniform":
                model_name = getattr(model.config, "_name_or_path", None)
                key = {"method": method, "model": model_name, "layers": list(layers), "data": checksum_of(batches)}
                key |= {"criterion": config.criterion, "dials": str(config.criterion_kwargs), "seed": seed}
                kept = State(state_file, {**key, **({"cap": cap, "floor": floor} if method == "greedy" else {})})
                curves = kl_curves(looked, seed, kept) if method == "kl" else greedy_paths(looked, floor, cap, kept)
                sizes = {key: size_of(looked, key, budget) for key in layers}
                entries = {
                    key: {"size": sizes[key], "curve": [float(f"{v:.6g}") for v in curves[key]]} for key in layers
                }
                allocation = {"method": method, "floor": floor, "cap": cap, "layers": entries}
                split(allocation, sparsity)  # raises what can be wrong with it before anything is changed
            change_config(model, name, allocation=allocation)
            set_sparsity(model, sparsity, None if allocation else {}, name)
            if config.make_criterion().selects == "threshold":
                # The sparse model's inputs are not the dense one's: what is zeroed would not be what was asked for.
                refit_thresholds(model, batches, layers, name, progress)
            return report(looked, method, sparsity, allocation)
    except BaseException:
        for key, layer in layers.items():
            layer.restore_state(name, before[key])
        model.peft_config[name] = config
        raise


def check_dials(method: str, budget: str, sparsity: float, floor: float, cap: float | None) -> None:
    """Raises `ValueError` for an unknown method or budget, and for shares that do not fit together."""
    for what, value, known in (("method", method, METHODS), ("budget", budget, ("weights", "bytes"))):
        if value not in known:
            raise ValueError(f"{what} is {value!r}; use one of {', '.join(known)}.")
    for what, value in {"sparsity": sparsity, "floor": floor, **({} if cap is None else {"cap": cap})}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{what} is {value!r}; use a number in [0, 1), for example 0.5.")
    if not floor <= sparsity <= cap_at(cap, sparsity):
        raise ValueError(
            f"floor is {floor!r} and cap {cap!r}, but all layers together are to have a sparsity of {sparsity!r}, "
            "which must lie between them."
        )
    if budget == "bytes" and method != "kl":
        raise ValueError(f"budget is 'bytes', but method={method!r} does not weigh layers by them; use method='kl'.")


def checksum_of(batches: list[Batch]) -> str:
    """Of everything that is in some batches."""
    parts = {
        f"{index} {name} {number}": part
        for index, batch in enumerate(batches)
        for name, value in batch.items()
        for number, part in enumerate([value] if isinstance(value, torch.Tensor) else value)
    }
    return tensors_checksum(parts)


def size_of(looked: Looked, key: str, budget: str) -> float:
    """Weights of a layer, or the bytes of them that a token reads, on average over the tokens."""
    layer = looked.layers[key]
    if budget == "weights":
        return layer.in_features * layer.out_features
    weight = layer.get_base_layer().weight
    return weight.numel() * weight.element_size() * min(looked.rows[key] / max(looked.tokens, 1) or 1.0, 1.0)


@torch.no_grad()
def report(looked: Looked, method: str, sparsity: float, allocation: dict[str, Any] | None) -> Allocation:
    """The result, with the realised sparsity of the first tokens, at most 1,024."""
    zeros, seen = Zeros(looked.layers, looked.name), 0
    with zeros, every_token_sparse(looked.model), evaluation_mode(looked.model):
        for batch in looked.batches:
            zeros.start_batch(batch)
            run(looked.model, batch)
            seen += count_tokens(batch)
            if seen >= 1024:
                break
    wanted = {key: layer.sparsifier(looked.name).sparsity for key, layer in looked.layers.items()}
    realised, kl, totals = zeros.by_layer(), {}, {}
    if method == "kl":
        kl = predicted_kl(allocation, wanted)
        step = float(FINE[1])
        middle = min(sparsity, 0.98)  # where the curves still have two sides
        around = [max(middle - step, 0.0), middle + step]
        low, high = (sum(predicted_kl(allocation, split_within(allocation, s)).values()) for s in around)
        totals = {
            "kl": sum(kl.values()),
            "uniform_kl": sum(predicted_kl(allocation, dict.fromkeys(looked.layers, sparsity)).values()),
            "price": (high - low) / (around[1] - around[0]) / 100,
        }
    rows = [
        LayerAllocation(key, size_of(looked, key, "weights"), wanted[key], realised[key], kl.get(key))
        for key in looked.layers
    ]
    return Allocation(method, sparsity, zeros.overall(), looked.tokens, **totals, layers=rows)


def split_within(allocation: dict[str, Any], sparsity: float) -> dict[str, float]:
    """[`split`] of a budget beside the one that the floor and the cap are for."""
    cap = allocation["cap"]
    return split(
        {**allocation, "floor": min(allocation["floor"], sparsity), "cap": cap and max(cap, sparsity)}, sparsity
    )
