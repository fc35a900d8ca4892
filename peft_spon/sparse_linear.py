# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a layer does at run time, and merged layers: y = W S(x) + b', b' = b + W anchor, S still active."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .criteria import Sparsifier, Spec
from .decoder import Decoder, Decoding, Running, constant_bias
from .offload import align_hooks
from .repair import Repair, repaired_linear
from .transposed import weight_t_of


# torch 2.6 does not say.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


@dataclass(frozen=True)
class LayerSettings:
    """What one adapter asks of one layer."""

    sparsifier: Sparsifier
    prefill: str | float
    anchor_space: str


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


# What a merged layer has for its repair, beside the state of its S; each None where it is not needed.
REPAIR = ("spon_input_scale", "spon_shift")


def merged_specs(sparsifier: Sparsifier) -> dict[str, Spec]:
    """What of S a merged layer keeps, by the names of its buffers: no quantiles, since it has no dial."""
    return {f"spon_{name}": spec for name, spec in sparsifier.specs().items() if name != "quantiles"}


class SparseMixin(Decoding):
    """A linear layer whose input S sparsifies: y = W (scale * S(x)) + b + shift. In front of the layer's own class.

    `weight` and `bias` are those of the dense layer, untouched. What SPON adds is beside them, in fp32 whatever the
    dtype of the model:

    Attributes:
        spon_shift: W times the anchor (or the output-side anchor), shape (out,), or None.
        spon_input_scale: 1 + gain, shape (in,), or None.
        spon_settings: `LayerSettings`.

    and `spon_<name>` for every name in [`merged_specs`], such as `spon_threshold`.
    """

    spon_settings: LayerSettings
    state_names: tuple[str, ...]  # of S's tensors; asking the criterion at every forward takes longer than S
    prompt: Prompt | None = None  # inside `generate`, see prefill.py
    # Switches, see modes.py.
    _dense = False
    _anchors_enabled = True
    _every_token = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_prepared and not (args or kwargs) and (y := self.decode_step(x)) is not None:
            return y
        linear = partial(super().forward, *args, **kwargs) if args or kwargs else super().forward
        if self._dense:
            return linear(x)
        first, scale, shift = self.first_sparse_token(x), None, None
        if self._anchors_enabled:
            scale, shift = self._buffers["spon_input_scale"], self._buffers["spon_shift"]
        if not (args or kwargs) and (in_eight_bits := self.int8_linear(x)) is not None:
            linear = in_eight_bits
        elif first == 0 and shift is not None and self.shifted_forward is not None:
            linear, shift = self.shifted_forward, None
        repair = Repair(scale, None, shift)
        return repaired_linear(x, linear, self.spon_settings.sparsifier, self.sparsifier_state(), repair, first)

    # W x + b' in one GEMM, where the layer's class allows it.
    shifted_forward: Callable[[torch.Tensor], torch.Tensor] | None = None

    # As of an adapter's layer; there is no adapter to name. (No `state`: bitsandbytes' layers have one of their own.)

    def settings(self, adapter_name: None = None) -> LayerSettings:
        """What S is, and on which tokens."""
        return self.spon_settings

    def sparsifier(self, adapter_name: None = None) -> Sparsifier:
        """S."""
        return self.spon_settings.sparsifier

    def sparsifier_state(self, adapter_name: None = None) -> dict[str, torch.Tensor]:
        """The tensors of S, by the names of its specs."""
        return {name: self._buffers[f"spon_{name}"] for name in self.state_names}

    def first_sparse_token(self, x: torch.Tensor, adapter_name: None = None) -> int:
        """Position on the token axis of x (..., tokens, in) where sparsity begins; 0 in training."""
        if self._every_token or self.training:
            return 0
        return first_sparse_token(x, self.spon_settings.prefill, self.prompt)

    def has_repair(self, adapter_name: None = None) -> bool:
        """Whether there is a gain or a shift."""
        return self.spon_input_scale is not None or self.spon_shift is not None

    @staticmethod
    def wrap(dense: type[nn.Module]) -> type[nn.Module]:
        """The class of a merged layer, of that of the dense layer."""
        return sparse_class(dense)

    def plain_layer(self) -> nn.Module:
        """The layer itself."""
        return self

    def weight_t_now(self) -> torch.Tensor:
        """W^T."""
        return weight_t_of(self)

    def running_now(self) -> Running | None:
        """S; None with S or anchors off."""
        if self._dense or not self._anchors_enabled:
            return None
        return Running((None,), (), (), self.spon_settings.sparsifier)

    def make_decoder(self, running: Running) -> Decoder:
        """The constants of a decode step."""
        bias = constant_bias(self.bias, self.spon_shift)
        int8, scale = self.int8_weight(), self.spon_input_scale
        return Decoder(running, self, int8, scale, bias, None, self.sparsifier_state(), [self])

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What SPON has beside the weight."""
        names = (*merged_specs(self.spon_settings.sparsifier), *REPAIR)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def merged_bias(self) -> torch.Tensor:
        """b' = b + W anchor, added in fp32, in the dtype of the weight, shape (out,)."""
        shift = self.spon_shift if self.bias is None else self.bias.float() + self.spon_shift
        return shift.to(self.weight.dtype)

    def _apply(self, fn: Callable, recurse: bool = True):
        before = self.own_tensors()
        super()._apply(fn, recurse)
        for name, old in before.items():
            if getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        s = self.spon_settings.sparsifier
        return f"{super().extra_repr()}, criterion={s.criterion.name}, sparsity={s.sparsity}"

    def __reduce_ex__(self, protocol: int):
        # Classes made by sparse_class() have no importable name.
        base = next(c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, SparseMixin))
        return _new_sparse, (base,), self.__getstate__()


class SparseLinear(SparseMixin, nn.Linear):
    """nn.Linear with S on its input."""

    def shifted_forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.merged_bias())


class SparseConv1D(SparseMixin, Conv1D):
    """transformers' Conv1D (GPT-2) with S on its input."""

    def shifted_forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.merged_bias(), x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


@cache
def sparse_class(base: type[nn.Module]) -> type[SparseMixin]:
    """The sparse subclass of a linear layer's class; any module that maps x to W x + b will do."""
    known = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}
    return known.get(base) or type(f"Sparse{base.__name__}", (SparseMixin, base), {"__module__": __name__})


def _new_sparse(base: type[nn.Module]) -> nn.Module:
    cls = sparse_class(base)
    return cls.__new__(cls)


def make_sparse(layer: nn.Module, settings: LayerSettings, tensors: dict[str, torch.Tensor | None]) -> nn.Module:
    """Turn a linear layer, in place, into one of its sparse class.

    Args:
        layer (`nn.Module`): the dense layer; it keeps its weight, bias, hooks and place in the model.
        settings (`LayerSettings`): criterion, sparsity, prefill.
        tensors (`dict`): the buffers by their names in [`merged_specs`] and `REPAIR`.

    Returns:
        `nn.Module`: the same object.
    """
    layer.__class__ = sparse_class(type(layer))
    layer.spon_settings = settings
    layer.state_names = tuple(name.removeprefix("spon_") for name in merged_specs(settings.sparsifier))
    for name in (*merged_specs(settings.sparsifier), *REPAIR):
        layer.register_buffer(name, tensors.get(name))
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
