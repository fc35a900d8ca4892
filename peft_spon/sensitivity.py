# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How much the KL to the dense model suffers from each layer at each sparsity: one forward, one backward."""

import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .budget import GRID
from .criteria import Criterion, entries_kept, threshold_at
from .data import Batch, count_tokens, padding_masks, without_padding
from .distillation import SelfDistillation
from .head import gathered_head, softcap_of
from .layer import SponLayer
from .lora import model_inside
from .losses import CHUNK_ELEMENTS, OutputHead
from .modes import attribute, dense_mode, evaluation_mode


@dataclass
class Looked:
    """
    The layers of an adapter, and the batches on which they are looked at.

    Attributes:
        model, layers, name: the model, the layers by name, the adapter's name.
        batches (`list`): this process's, on the model's device.
        hidden (`bool`, *optional*): no progress bar; default: unless standard error is a terminal.
        tokens (`int`): how many were counted, over all processes.
        rows (`dict[str, int]`): how many of them reached each layer, where that was counted.
    """

    model: nn.Module
    layers: dict[str, SponLayer]
    name: str
    batches: list[Batch]
    hidden: bool | None = None
    tokens: int = 0
    rows: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.tokens = sum(count_tokens(batch) for batch in self.batches)
        self.rows = dict.fromkeys(self.layers, 0)


class State:
    """A file with what has been found so far; none without a path. Every process has its own."""

    def __init__(self, path: str | os.PathLike | None, key: dict[str, Any]):
        self.path, self.key = None if path is None else f"{os.fspath(path)}{f'.{rank()}' if rank() else ''}", key
        self.found: dict[str, Any] = {}
        if self.path is not None and os.path.exists(self.path):
            try:
                saved = torch.load(self.path, weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError):
                saved = None
            if not isinstance(saved, dict) or "found" not in saved:
                raise ValueError(f"{self.path} is no state file of allocate; remove it, or name another state_file.")
            if saved.get("key") != key:
                raise ValueError(
                    f"{self.path} was written by an allocation with other arguments or data, or for another model; "
                    "remove it, or name another state_file."
                )
            self.found = saved["found"]

    def save(self, **found: Any) -> None:
        if self.path is not None:
            torch.save({"key": self.key, "found": found}, f"{self.path}.new")
            os.replace(f"{self.path}.new", self.path)


def kl_curves(looked: Looked, seed: int, kept: State) -> dict[str, list[float]]:
    """
    KL to the dense model at every sparsity of the grid, with that layer alone sparse, to second order.

    With y drawn from the dense model's own prediction, half the mean square of what zeroing does to log p(y) is
    that KL (Fisher). For one layer and token it is c(s) = sum of (Wᵀg)_i x_i over the entries that S removes at
    sparsity s, g the gradient at the layer's output: one backward gives all layers and sparsities.
    """
    reader = SelfDistillation(
        model_inside(looked.model), 1.0, lean=not getattr(looked.model.config, "is_encoder_decoder", False)
    )
    sums = {key: torch.zeros(len(GRID), dtype=torch.float64) for key in looked.layers}
    outputs, done = 0, 0
    if kept.found:
        outputs, done, looked.rows, sums = (kept.found[part] for part in ("outputs", "done", "rows", "sums"))
    bar = tqdm(desc="allocating", total=looked.tokens, unit=" tokens", disable=looked.hidden)
    trained = [parameter for parameter in looked.model.parameters() if parameter.requires_grad]
    with dense_mode(looked.model), evaluation_mode(looked.model), attribute(trained, "requires_grad", False), bar:
        for index, batch in enumerate(looked.batches):
            if index >= done:
                # Compiled code would call what is hooked in once, when it is traced, and never again.
                eager = torch.compiler.set_stance("force_eager")
                with eager, torch.enable_grad(), watched(looked, batch, sums):
                    outputs += backward_of_a_sample(reader, batch, seed + index * world_size() + rank())
                kept.save(outputs=outputs, done=index + 1, rows=looked.rows, sums=sums)
            bar.update(count_tokens(batch))
    looked.tokens = int(over_processes(torch.tensor(float(outputs))))
    looked.rows = dict(
        zip(looked.rows, over_processes(torch.tensor(list(looked.rows.values()))).tolist(), strict=True)
    )
    table = over_processes(torch.stack(list(sums.values()))) / (2 * max(looked.tokens, 1))
    if not table.isfinite().all():
        bad = next(key for key, row in zip(looked.layers, table, strict=True) if not row.isfinite().all())
        raise ValueError(
            f"The gradient at layer '{bad}' is NaN or infinite; check the model's weights and dtype (fp16 "
            "overflows, bf16 does not). Nothing was changed."
        )
    return {k: row.tolist() if looked.rows[k] else [] for k, row in zip(looked.layers, table, strict=True)}


@contextmanager
def watched(looked: Looked, batch: Batch, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """What a backward inside the block tells about the layers goes into `sums`, fp64, shape (9,) each."""
    masks = padding_masks(batch)

    def before(layer: SponLayer, args: tuple, key: str) -> tuple:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        return (_Seen.apply(x, partial(see, key, layer)), *args[1:])

    def see(key: str, layer: SponLayer, x: torch.Tensor, gradient: torch.Tensor) -> None:
        looked.rows[key] += without_padding(x, masks).shape[:-1].numel()
        c = removed_products(layer, looked.name, x.flatten(0, -2), gradient.flatten(0, -2))
        sums[key] += c.square().sum(0, dtype=torch.float64).cpu()

    handles = [layer.register_forward_pre_hook(partial(before, key=key)) for key, layer in looked.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen(torch.autograd.Function):
    """x, and in the backward its gradient through one layer alone goes to `see`."""

    @staticmethod
    def forward(ctx, x, see):
        ctx.see = see
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.see(*ctx.saved_tensors, gradient)
        return gradient, None


def removed_products(layer: SponLayer, name: str, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """
    Sum of gradient_i (x - S(x))_i at every sparsity of the grid.

    Args:
        layer, name: the layer and its adapter.
        x, gradient (`torch.Tensor`): its input and the gradient there, shape (tokens, in).

    Returns:
        `torch.Tensor`: fp32, shape (tokens, 9).
    """
    sparsifier, state = layer.sparsifier(name), layer.sparsifier_state(name)
    criterion, kind = sparsifier.criterion, type(sparsifier.criterion)
    if (kind.encode, kind.decode) != (Criterion.encode, Criterion.decode):  # no mask of x
        removed = []
        for share in GRID:
            s, own = sparsifier.at(share, state)
            removed.append((gradient.float() * (x - s(x, own)).float()).sum(-1))
        return torch.stack(removed, dim=-1)
    products = gradient.float() * x.float()
    score = criterion.score(x, state)
    shares = [replace(sparsifier, sparsity=share).zeroed_share for share in GRID]
    if sparsifier.uses_threshold:
        bounds = torch.cat([threshold_at(state["quantiles"], share) for share in shares])
    else:  # the place of every entry in its token's order of scores, from the lowest
        score = score.argsort(dim=-1).argsort(dim=-1)
        bounds = torch.tensor([x.shape[-1] - entries_kept(x.shape[-1], s) - 1 for s in shares], device=x.device)
    first = torch.bucketize(score, bounds)  # the first sparsity of the grid that removes the entry, if any
    sums = products.new_zeros(len(products), len(GRID) + 1).scatter_add_(1, first, products)
    return sums.cumsum(1)[:, :-1]


def backward_of_a_sample(reader: SelfDistillation, batch: Batch, seed: int) -> int:
    """The gradient of log p(y) through the model, y drawn from its own prediction at every token; how many tokens."""
    if not reader.model.config.is_encoder_decoder:
        batch = {key: value for key, value in batch.items() if key != "labels"}
    values = reader.outputs(batch)
    rows = values.detach().flatten(0, -2)
    with ExitStack() as stack, torch.no_grad():
        head = None
        if reader.lean:
            weights = stack.enter_context(gathered_head(reader.model.get_output_embeddings()))
            head = OutputHead(*weights, reader.scale, softcap_of(reader.model))
        gradient = torch.empty_like(rows)
        device, width = (head.weight.device, head.weight.shape[0]) if reader.lean else (rows.device, rows.shape[-1])
        generator = torch.Generator(device).manual_seed(seed)
        size = max(1, CHUNK_ELEMENTS // width)
        for part, out in zip(rows.split(size), gradient.split(size), strict=True):
            logits = head.logits(part.to(device)) if reader.lean else part.float()
            p = logits.softmax(-1)
            y = torch.multinomial(p, 1, generator=generator)
            p.scatter_add_(1, y, -torch.ones_like(p[:, :1]))
            out.copy_(head.backward(p, logits) if reader.lean else p)
        gradient = gradient.view_as(values)
        mask = next((m for m in padding_masks(batch) if m.shape == values.shape[:-1]), None)
        counted = values.shape[:-1].numel()
        if mask is not None:
            gradient *= mask.to(gradient.device).unsqueeze(-1)
            counted = int(mask.sum())
    values.backward(gradient)
    return counted


def is_one_of_several() -> bool:
    """Whether there are other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's number."""
    return torch.distributed.get_rank() if is_one_of_several() else 0


def world_size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if is_one_of_several() else 1


def over_processes(value: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, summed over all processes."""
    if is_one_of_several():
        on_device = value.cuda() if torch.distributed.get_backend() == "nccl" else value
        torch.distributed.all_reduce(on_device)
        return on_device.cpu()
    return value
