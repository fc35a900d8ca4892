# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""SPON around a linear layer: its forward, a decode step, merging (SPON, arXiv 2512.12744, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._peft import check_adapters_to_merge
from .base_layer import has_plain_weight, through_weight
from .config import SponConfig
from .decoder import Decoder, Decoding, Running, constant_bias
from .layer import SponLayer
from .offload import execution_device
from .repair import Repair, repaired_linear
from .sparse_linear import make_sparse, merged_specs
from .transposed import weight_t_of


@dataclass(frozen=True)
class Merged:
    """Several merged adapters: S of the first of them, one repair, and where its shift has gone.

    `repair.inner`, the input-side anchors, is only kept apart from the shift where W may still change: with LoRA
    beneath.
    """

    first: str
    repair: Repair
    original_bias: torch.Tensor | None = None
    in_bias: bool = False


class SponLinear(Decoding, nn.Module, SponLayer):
    """SPON around a linear callable: nn.Linear, Conv1D, a quantised layer, a LoRA layer. One GEMM per forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SponConfig, sparsity: float, has_anchor: bool
    ) -> None:
        nn.Module.__init__(self)
        SponLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._merged: Merged | None = None
        self.update_layer(adapter_name, config, sparsity, has_anchor)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_prepared and not (args or kwargs) and (y := self.decode_step(x)) is not None:
            return y
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if not torch.compiler.is_compiling() and (outer := self.place.taken_by(self)) is not None:
            raise ValueError(
                f"A {type(outer).__name__} layer was put around the SPON layer '{self.place.name}', where it sees the "
                "inputs before S and cannot be merged. Load the base model again and put LoRA beneath SPON: "
                "peft_spon.add_lora(model, LoraConfig(...)) on a SPON model, get_peft_model(model, SponConfig(...)) "
                "over a LoRA model, peft_spon.load_with_lora(base, spon_folder, lora_folder) for saved ones."
            )
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self._merged is not None:
            first, repair = self._merged.first, self._merged.repair
            if self._merged.in_bias:
                repair = replace(repair, shift=None)
            return self._sparse_forward(x, self._linear(x, *args, **kwargs), first, repair)
        active = [name for name in self.active_adapters if name in self.spon_settings]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.adapters_run.update(active)
        repair = self.repair(active if self._anchors_enabled else [])
        return self._sparse_forward(x, self._linear(x, *args, **kwargs), active[0], repair)

    def _sparse_forward(self, x: torch.Tensor, linear: Callable, first: str, repair: Repair) -> torch.Tensor:
        """S and `prefill` of the adapter `first`, and a repair."""
        start = self.first_sparse_token(x, first)
        return repaired_linear(x, linear, self.sparsifier(first), self.sparsifier_state(first), repair, start)

    def _linear(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """What S(x) goes into: W and b, with the LoRA that is around them."""
        if args or kwargs:
            return partial(self.base_layer, *args, **kwargs)
        return (self.int8_linear(x) if self.is_w_alone() else None) or self.base_layer

    def is_w_alone(self) -> bool:
        """Whether W is all that S(x) goes through: no LoRA is computed beside it, or will be taken out of it first."""
        base = self.base_layer
        return base is self.plain_layer() or base.merged != base.disable_adapters

    def merged_into_weight(self) -> tuple[str, ...]:
        """Of a LoRA beneath."""
        return tuple(self.base_layer.merged_adapters) if isinstance(self.base_layer, BaseTunerLayer) else ()

    def plain_layer(self) -> nn.Module:
        """The linear layer that holds W, in LoRA or not."""
        return self.get_base_layer()

    def weight_t_now(self) -> torch.Tensor:
        """W^T of the layer beneath."""
        return weight_t_of(self.base_layer)

    def running_now(self) -> Running | None:
        """The adapters in use; None with S or anchors off."""
        if self._disable_adapters or not self._anchors_enabled:
            return None
        settings, merged = self.spon_settings, tuple(self.merged_adapters)
        names = merged or tuple([name for name in self.active_adapters if name in settings])
        if not names:
            return None
        base, beneath = self.base_layer, ()
        if isinstance(base, BaseTunerLayer):
            if base.merged and base.disable_adapters:
                return None  # its next forward takes it out of W
            scaling = tuple(vars(base).get("scaling", {}).items())
            beneath = self.merged_into_weight(), base.disable_adapters, tuple(base.active_adapters), scaling
        return Running(names, merged, beneath, settings[names[0]].sparsifier)

    @torch.no_grad()
    def make_decoder(self, running: Running) -> Decoder:
        """The constants of a decode step: a LoRA beneath stays around W, unless it is merged or off."""
        self.adapters_run.update(running.names)
        base, core, is_around = self.base_layer, self.plain_layer(), not self.is_w_alone()
        repair = self.repair(running.names) if self._merged is None else self._merged.repair
        int8, inner = None if is_around else self.int8_weight(), repair.inner
        if inner is not None and int8 is not None:
            inner = int8(inner, None)
        elif inner is not None:
            inner = through_weight(base if is_around else core, inner)
        shift = None if self._merged is not None and self._merged.in_bias else repair.shift
        bias = constant_bias(None if is_around else core.bias, shift, inner)
        around = base if is_around else None
        made_of = [module for module in self.modules() if module is not self]
        state = self.sparsifier_state(running.names[0])
        return Decoder(running, core, int8, repair.scale, bias, around, state, made_of)

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        """Raises `ValueError` as LoRA's layers do: not one name per row, or merged adapters."""
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. Give one name per sample; models that flatten batch "
                "and tokens before a layer cannot mix adapters there."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any):
        """One adapter name per row of the batch; "__base__" rows stay dense."""
        dense = partial(self.base_layer, *args, **kwargs)
        linear, y = self._linear(x, *args, **kwargs), None
        for name in dict.fromkeys(adapter_names):
            index = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            rows = x[index]
            if name in self.spon_settings:
                part = self._sparse_forward(rows, linear, name, self.repair([name] if self._anchors_enabled else []))
            else:
                part = dense(rows)
            y = part.new_empty(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, index, part)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """b' = b + W anchor, in fp32. S stays active, gains stay a scale of the input: W is not touched.

        The shift W anchor goes into the bias (created where there is none) of plain linear layers; beside the weight
        of quantised and other layers, and where `prefill` leaves tokens dense, since these get no anchor.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): raise `ValueError` if the shift is not finite.
            adapter_names (`list[str]`, *optional*): what to merge, in this order; default: the active adapters.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spon_settings]
        if not new:
            return
        names = [*self.merged_adapters, *new]
        before = list(self.merged_adapters)
        self._int8 = None  # a LoRA beneath is merged along, and W does not tell
        self.unmerge()
        try:
            repair = self.merged_repair(names, safe_merge)
        except ValueError:
            if before:
                self.merge(adapter_names=before)
            raise
        base = self.base_layer
        is_plain = (
            has_plain_weight(base)
            and execution_device(base) is None  # a hook brings back the bias that it knows
            and self.spon_settings[names[0]].prefill == "sparse"
        )
        merged = Merged(names[0], repair)
        if repair.shift is not None and is_plain:
            bias = base.bias
            merged = replace(merged, original_bias=bias, in_bias=True)
            total = repair.shift if bias is None else bias.detach().float() + repair.shift
            base.bias = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
        self._merged = merged
        self.merged_adapters = names

    def names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """What is merged already, then the given (or active) adapters that this layer has."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in wanted if name in self.spon_settings and name not in self.merged_adapters]
        return [*self.merged_adapters, *new]

    def unmerge(self) -> None:
        """Undo `merge`: the bias is again the very tensor it was, or None."""
        self._int8 = None
        if self._merged is not None and self._merged.in_bias:
            self.base_layer.bias = self._merged.original_bias
        self._merged = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped layer itself, or the sparse linear layer that the merged adapters make of it.

        Args:
            merge (`bool`): merge, or give the dense layer back.
            safe_merge (`bool`): raise `ValueError` if something is not finite.
            adapter_names (`list[str]`, *optional*): what to merge; default: the active adapters.
        """
        names = self.names_to_merge(adapter_names)
        self.restore_decode()
        self.unmerge()
        if isinstance(self.base_layer, BaseTunerLayer):
            # LoRA beneath: into W first, so that the anchor passes the new W.
            if merge:
                self.base_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            else:
                self.base_layer.unmerge()
            self.base_layer = self.get_base_layer()
        if not merge or not names:
            return self.base_layer
        base = self.base_layer
        repair = self.merged_repair(names, safe_merge)
        settings, state = self.spon_settings[names[0]], self.sparsifier_state(names[0])
        tensors = {name: state[name.removeprefix("spon_")] for name in merged_specs(settings.sparsifier)}
        return make_sparse(base, settings, {**tensors, "spon_input_scale": repair.scale, "spon_shift": repair.shift})

    def __repr__(self) -> str:
        return "spon." + super().__repr__()
