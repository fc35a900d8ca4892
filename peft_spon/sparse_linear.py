# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a layer does at run time, and merged layers: y = W S(x) + b', b' = b + W anchor, S still active."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .criteria import Criterion, keep_above, keep_top_k
from .offload import align_hooks


# Buffers of a merged layer; those that it does not need are None.
STATE = ("spon_threshold", "spon_column_scale", "spon_input_scale", "spon_shift")


# torch 2.6 does not say.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


@dataclass(frozen=True)
class LayerSettings:
    """What one adapter asks of one layer."""

    criterion: Criterion
    sparsity: float
    prefill: str | float
    anchor_space: str
    calibrated: bool

    @property
    def uses_threshold(self) -> bool:
        """True: S compares with the stored threshold. False: it takes each token's k best entries."""
        return self.calibrated and self.criterion.uses_threshold


def keep_mask(
    x: torch.Tensor, settings: LayerSettings, threshold: torch.Tensor | None, norms: torch.Tensor | None
) -> torch.Tensor:
    """1 where S keeps the entry, 0 where it zeroes it, in the dtype of x; x and the mask have shape (..., in).

    Args:
        x (`torch.Tensor`): the layer's input.
        settings (`LayerSettings`): criterion and sparsity.
        threshold (`torch.Tensor` or `None`): fp32, shape (1,); only read if the settings use one.
        norms (`torch.Tensor` or `None`): fp32 column norms of W, shape (in,), for criteria that weigh by them.
    """
    if settings.sparsity == 0:
        return torch.ones_like(x)
    score = settings.criterion.score(x, norms)
    if settings.uses_threshold:
        return keep_above(score, threshold, x.dtype)
    return keep_top_k(score, settings.sparsity, x.dtype)


@dataclass
class Prompt:
    """Where a forward of `generate` stands: `tokens` new ones behind `cached` ones (at most `length` are counted).

    Attributes:
        length (`int`): tokens of the prompt.
        cached (`int`): how many of them are in the cache.
        tokens (`int`): tokens of the model's input, per row; 0 before the first forward.
    """

    length: int
    cached: int = 0
    tokens: int = 0


def first_sparse_token(x: torch.Tensor, prefill: str | float, prompt: Prompt | None = None) -> int:
    """Position on the token axis of x (..., tokens, in) where sparsity begins.

    Args:
        x (`torch.Tensor`): the layer's input.
        prefill (`str` or `float`): "sparse", "dense", or the share of the prompt's leading tokens that stay dense.
        prompt (`Prompt`, *optional*): where `generate` stands; without it an input of several tokens is a prompt.

    Raises:
        `ValueError`: it is no constant, and the model is being exported or traced, which would make it one.
    """
    if prefill in ("sparse", 0) or x.ndim == 1:
        return 0
    if torch.jit.is_tracing() or is_exporting():
        raise ValueError(
            f"prefill={prefill!r} leaves tokens dense by their number, and torch.export and torch.jit.trace would "
            "keep that of the example. Use prefill='sparse', or export an adapter inside every_token_sparse(model)."
        )
    here = x.shape[-2]
    if prompt is None or prompt.tokens == 0:
        prompt = Prompt(length=here, tokens=here)
    if prompt.length == 1:
        return 0
    dense = (prompt.length if prefill == "dense" else math.ceil(prefill * prompt.length)) - prompt.cached
    if dense <= 0:
        return 0
    if dense >= prompt.tokens:
        return here
    # In the middle of the input; a layer that sees other rows than the text's tokens counts its own.
    return dense if here == prompt.tokens else first_sparse_token(x, prefill)


def dense_before(first: int, x: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """sparse, shape (..., tokens, in), with its first tokens taken from x."""
    return sparse if first == 0 else torch.cat([x[..., :first, :], sparse[..., first:, :]], dim=-2)


def add_from(first: int, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """y, shape (..., tokens, out), plus a shift of shape (out,) on all but its first tokens."""
    shift = shift.to(y.dtype)
    if first > 0:
        shift = (torch.arange(y.shape[-2], device=y.device) >= first).unsqueeze(-1) * shift
    return y + shift


class SparseMixin:
    """A linear layer whose input S sparsifies: y = W (scale * S(x)) + b + shift. In front of the layer's own class.

    `weight` and `bias` are those of the dense layer, untouched. What SPON adds is beside them, in fp32 whatever the
    dtype of the model, each None where it is not needed:

    Attributes:
        spon_shift: W times the anchor (or the output-side anchor), shape (out,).
        spon_input_scale: 1 + gain, shape (in,).
        spon_threshold: threshold on the criterion's score, shape (1,).
        spon_column_scale: norms of the columns of W for criteria that weigh by them, shape (in,).
        spon_settings: `LayerSettings`.
    """

    spon_settings: LayerSettings
    prompt: Prompt | None = None  # inside `generate`, see prefill.py

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # As with the adapter, training makes every token sparse.
        first = 0 if self.training else first_sparse_token(x, self.spon_settings.prefill, self.prompt)
        if first > 0 and first >= x.shape[-2]:
            return super().forward(x, *args, **kwargs)
        sparse = x
        if self.spon_settings.sparsity > 0:
            sparse = x * keep_mask(x, self.spon_settings, self.spon_threshold, self.spon_column_scale)
        if self.spon_input_scale is not None:
            sparse = sparse * self.spon_input_scale.to(sparse.dtype)
        sparse = dense_before(first, x, sparse)
        if self.spon_shift is None:
            return super().forward(sparse, *args, **kwargs)
        if first == 0 and (fused := self.fused_forward(sparse)) is not None:
            return fused
        return add_from(first, super().forward(sparse, *args, **kwargs), self.spon_shift)

    def fused_forward(self, sparse: torch.Tensor) -> torch.Tensor | None:
        """W sparse + b' in one GEMM, where the layer's class allows it."""
        return None

    def merged_bias(self) -> torch.Tensor:
        """b' = b + W anchor, added in fp32, in the dtype of the weight, shape (out,)."""
        shift = self.spon_shift if self.bias is None else self.bias.float() + self.spon_shift
        return shift.to(self.weight.dtype)

    def _apply(self, fn: Callable, recurse: bool = True):
        before = {name: getattr(self, name) for name in STATE}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        settings = self.spon_settings
        return f"{super().extra_repr()}, criterion={settings.criterion.name}, sparsity={settings.sparsity}"

    def __reduce_ex__(self, protocol: int):
        # Classes made by sparse_class() have no importable name.
        base = type(self).__mro__[type(self).__mro__.index(SparseMixin) + 1]
        return _new_sparse, (base,), self.__getstate__()


class SparseLinear(SparseMixin, nn.Linear):
    """nn.Linear with S on its input."""

    def fused_forward(self, sparse: torch.Tensor) -> torch.Tensor | None:
        return nn.functional.linear(sparse, self.weight, self.merged_bias())


class SparseConv1D(SparseMixin, Conv1D):
    """transformers' Conv1D (GPT-2) with S on its input."""

    def fused_forward(self, sparse: torch.Tensor) -> torch.Tensor | None:
        flat = torch.addmm(self.merged_bias(), sparse.reshape(-1, sparse.shape[-1]), self.weight)
        return flat.view(*sparse.shape[:-1], self.nf)


@cache
def sparse_class(base: type[nn.Module]) -> type[SparseMixin]:
    """The sparse subclass of a linear layer's class; any module that maps x to W x + b will do."""
    known = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}
    return known.get(base) or type(f"Sparse{base.__name__}", (SparseMixin, base), {"__module__": __name__})


def _new_sparse(base: type[nn.Module]) -> nn.Module:
    cls = sparse_class(base)
    return cls.__new__(cls)


def make_sparse(layer: nn.Module, settings: LayerSettings, state: dict[str, torch.Tensor | None]) -> nn.Module:
    """Turn a linear layer, in place, into one of its sparse class.

    Args:
        layer (`nn.Module`): the dense layer; it keeps its weight, bias, hooks and place in the model.
        settings (`LayerSettings`): criterion, sparsity, prefill.
        state (`dict`): the buffers by their names in `STATE`.

    Returns:
        `nn.Module`: the same object.
    """
    layer.__class__ = sparse_class(type(layer))
    layer.spon_settings = settings
    for name in STATE:
        layer.register_buffer(name, state.get(name))
    if "_old_forward" in vars(layer):
        # accelerate's hooks (device_map) call the forward that the layer had when they were added.
        layer._old_forward = MethodType(type(layer).forward, layer)
        for hook in align_hooks(layer):
            hook.offload_buffers = False  # it would not find SPON's where it keeps the layer's own
    return layer


@torch.no_grad()
def fold_scale(layer: nn.Module) -> None:
    """Multiply a merged layer's `spon_input_scale` into its weight: W becomes W diag(scale), computed in fp32."""
    if not isinstance(layer, SparseMixin) or layer.spon_input_scale is None:
        return
    scale = layer.spon_input_scale.unsqueeze(1) if isinstance(layer, Conv1D) else layer.spon_input_scale
    layer.weight.data = (layer.weight.float() * scale).to(layer.weight.dtype)
    layer.spon_input_scale = None
