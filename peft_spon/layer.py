# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The SPON layer: y = W (S(x) + anchor) + b around any linear layer (SPON, arXiv 2512.12744, section 3)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import SponConfig
from .offload import StaysLoaded, execution_device
from .sparse_linear import (
    LayerSettings,
    Prompt,
    add_from,
    dense_before,
    first_sparse_token,
    keep_mask,
    make_sparse,
)
from .weights import column_norms, has_plain_weight, linear_sizes, through_weight


# Points of the stored quantile table of a layer's scores: neighbours are 1/256 = 0.39 points of sparsity apart.
QUANTILE_POINTS = 257


class Fp32BufferDict(StaysLoaded, BufferDict):
    """Persistent buffers keyed by adapter name that follow the device of the module but never leave fp32."""

    def __init__(self):
        super().__init__(persistent=True)

    def _apply(self, fn: Callable, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self


class Place:
    """Where a SPON layer is in its model: the attribute `name` of `parent`.

    To notice a LoRA layer that was put around it. Copies of a whole model have theirs; a layer copied or pickled alone
    has none.
    """

    def __init__(self, parent: nn.Module | None = None, name: str = ""):
        self.parent, self.name = parent, name

    def taken_by(self, layer: nn.Module) -> nn.Module | None:
        """The tuner layer of another kind that is there instead of the SPON layer, or None."""
        there = layer if self.parent is None else self.parent._modules.get(self.name, layer)
        # A SPON layer is there where this one is a replica of it (nn.DataParallel).
        is_other = there is not layer and isinstance(there, BaseTunerLayer) and not isinstance(there, SponLayer)
        return there if is_other else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Place":
        return Place(memo.get(id(self.parent)), self.name)

    def __reduce__(self):
        return Place, ()


class Fp32ParameterDict(StaysLoaded, nn.ParameterDict):
    """Parameters keyed by adapter name that follow the device of the module but never leave fp32."""

    def _apply(self, fn: Callable, recurse: bool = True):
        before = {name: parameter.data for name, parameter in self.items()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self[name].dtype != old.dtype:
                self[name].data = old.to(self[name].device)
        return self


@dataclass(frozen=True)
class Merged:
    """What several merged adapters come to: y = W (scale * S(x) + inner) + b + shift, S of the first of them.

    `inner`, the input-side anchors, is only kept apart from the shift where W may still change: with LoRA beneath.
    """

    first: str
    scale: torch.Tensor | None
    inner: torch.Tensor | None
    shift: torch.Tensor | None
    original_bias: torch.Tensor | None = None
    in_bias: bool = False


class SponLayer(BaseTunerLayer):
    """State of SPON around one linear layer of size in -> out, for any number of adapters.

    Attributes:
        spon_anchor: trained anchors, fp32, shape (in,) or (out,) by the adapter's `anchor_space`.
        spon_gain: trained gains, fp32, shape (in,).
        spon_threshold: calibrated thresholds on the criterion's score, fp32, shape (1,).
        spon_quantiles: the score's quantiles at 0, 1/256, ..., 1, fp32, shape (257,): any sparsity without data.
        spon_column_scale: norms of the columns of W for criteria that weigh by them, fp32, shape (in,).
        spon_settings: `LayerSettings` per adapter.
    """

    adapter_layer_names = ("spon_anchor", "spon_gain")
    other_param_names = ("spon_threshold", "spon_quantiles", "spon_column_scale", "spon_settings")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.spon_anchor = Fp32ParameterDict()
        self.spon_gain = Fp32ParameterDict()
        self.spon_threshold = Fp32BufferDict()
        self.spon_quantiles = Fp32BufferDict()
        self.spon_column_scale = Fp32BufferDict()
        self.spon_settings: dict[str, LayerSettings] = {}
        self._disable_adapters = False
        self._anchors_enabled = True
        self._every_token = False
        self.prompt: Prompt | None = None  # inside `generate`, see prefill.py
        self._thresholds_seen: set[str] = set()  # adapters whose thresholds are known to be there
        self.adapters_run: set[str] = set()  # those that a forward has used
        self.trainable_choice: str | None = None  # see lora.set_trainable
        self.place = Place()
        self.merged_adapters = []
        self.in_features, self.out_features = linear_sizes(base_layer)

    def update_layer(self, adapter_name: str, config: SponConfig, sparsity: float, has_anchor: bool) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name (`str`): name of the new adapter.
            config (`SponConfig`): its configuration.
            sparsity (`float`): sparsity of this layer, after `sparsity_pattern`.
            has_anchor (`bool`): whether this layer carries an anchor (and a gain), after `anchor_modules`.
        """
        criterion = config.make_criterion()
        self.adapters_run.discard(adapter_name)
        self._thresholds_seen.discard(adapter_name)
        self.spon_settings[adapter_name] = LayerSettings(
            criterion, sparsity, config.prefill, config.anchor_space, config.calibrated
        )
        if has_anchor:
            width = self.in_features if config.anchor_space == "input" else self.out_features
            self.spon_anchor[adapter_name] = nn.Parameter(initial_vector(width, config.init_weights))
            if config.gain:
                self.spon_gain[adapter_name] = nn.Parameter(initial_vector(self.in_features, config.init_weights))
        if criterion.uses_threshold and config.calibrated:
            # Loading fills these. NaN marks them as missing until then.
            self.spon_threshold[adapter_name] = torch.full((1,), math.nan)
            self.spon_quantiles[adapter_name] = torch.full((QUANTILE_POINTS,), math.nan)
        if criterion.uses_column_norms:
            self.spon_column_scale[adapter_name] = column_norms(self.base_layer, criterion)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Give an adapter what another one with the same configuration holds: anchors, gains, thresholds, settings."""
        for held in (self.spon_anchor, self.spon_gain):
            if source in held:
                held[adapter_name].copy_(held[source])
        for buffers in (self.spon_threshold, self.spon_quantiles, self.spon_column_scale):
            if source in buffers:
                buffers[adapter_name] = buffers[source].clone()
        self.spon_settings[adapter_name] = self.spon_settings[source]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's: choose the active adapters and make them trainable, unless these are frozen for a LoRA."""
        super().set_adapter(adapter_names, inference_mode or self.trainable_choice == "lora")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Device only: PEFT's version also casts to the base layer's dtype, and thresholds and anchors are fp32.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        meta = torch.device("meta")
        if device == meta:
            device = execution_device(self.get_base_layer())
        if device is None:
            return
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if adapter_name in held and held[adapter_name].device not in (device, meta):
                old = held[adapter_name]
                held[adapter_name] = nn.Parameter(old.detach().to(device), requires_grad=old.requires_grad)
        for name in ("spon_threshold", "spon_quantiles", "spon_column_scale"):
            held = getattr(self, name)
            if adapter_name in held and held[adapter_name].device not in (device, meta):
                held[adapter_name] = held[adapter_name].to(device)

    def score(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The criterion's fp32 scores of an input of shape (..., in)."""
        criterion = self.spon_settings[adapter_name].criterion
        norms = self.spon_column_scale[adapter_name] if criterion.uses_column_norms else None
        return criterion.score(x, norms)

    def keep_mask(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """1 where S keeps the entry, 0 where it zeroes it, in the dtype of x; x and the mask have shape (..., in)."""
        settings = self.spon_settings[adapter_name]
        threshold = self.spon_threshold[adapter_name] if settings.uses_threshold else None
        unseen = threshold is not None and adapter_name not in self._thresholds_seen
        if unseen and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            if threshold.isnan():
                raise ValueError(
                    f"Adapter {adapter_name!r} is said to be calibrated but has no thresholds: its SponConfig is that "
                    "of a saved adapter. Load the adapter (PeftModel.from_pretrained), or set calibrated=False."
                )
            self._thresholds_seen.add(adapter_name)
        norms = self.spon_column_scale[adapter_name] if settings.criterion.uses_column_norms else None
        return keep_mask(x, settings, threshold, norms)

    def sparsify(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """S(x), shape (..., in). The mask carries no gradient; kept entries pass theirs through unchanged."""
        if self.spon_settings[adapter_name].sparsity == 0:
            return x
        return x * self.keep_mask(x, adapter_name)

    def set_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Change the sparsity of an adapter; a calibrated threshold is read off the stored quantile table."""
        settings = self.spon_settings[adapter_name]
        self.spon_settings[adapter_name] = replace(settings, sparsity=sparsity)
        if settings.uses_threshold:
            self.spon_threshold[adapter_name] = threshold_at(self.spon_quantiles[adapter_name], sparsity)

    def set_quantiles(self, adapter_name: str, quantiles: torch.Tensor) -> None:
        """Store the quantile table that calibration found, shape (257,), and derive the threshold from it."""
        settings = self.spon_settings[adapter_name]
        self.spon_quantiles[adapter_name] = quantiles
        self.spon_threshold[adapter_name] = threshold_at(quantiles, settings.sparsity)
        self.spon_settings[adapter_name] = replace(settings, calibrated=True)

    def first_sparse_token(self, x: torch.Tensor, adapter_name: str) -> int:
        """Position on the token axis of x (..., tokens, in) where sparsity begins, by the adapter's `prefill`."""
        if self._every_token or self.training:
            return 0
        return first_sparse_token(x, self.spon_settings[adapter_name].prefill, self.prompt)

    def adapt_input(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """(1 + gain) * S(x) + anchor for input-side anchors, shape (..., in).

        With several active adapters S is the first one's; their gains multiply and their anchors add.
        """
        first = self.first_sparse_token(x, adapter_names[0])
        if first > 0 and first >= x.shape[-2]:
            return x
        sparse = self.sparsify(x, adapter_names[0])
        for name in adapter_names if self._anchors_enabled else []:
            if name in self.spon_gain:
                sparse = sparse * (1 + self.spon_gain[name]).to(sparse.dtype)
            if name in self.spon_anchor and self.spon_settings[name].anchor_space == "input":
                sparse = sparse + self.spon_anchor[name].to(sparse.dtype)
        return dense_before(first, x, sparse)

    def adapt_output(self, y: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """y plus the output-side anchors of the adapters, on the sparse tokens of x; y has shape (..., out)."""
        for name in adapter_names if self._anchors_enabled else []:
            if name in self.spon_anchor and self.spon_settings[name].anchor_space == "output":
                y = add_from(self.first_sparse_token(x, adapter_names[0]), y, self.spon_anchor[name])
        return y

    @torch.no_grad()
    def merged_effect(self, adapter_names: list[str], safe_merge: bool = False) -> Merged:
        """Gains and anchors of some adapters as one scale (in,) and one shift (out,), in fp32.

        Args:
            adapter_names (`list[str]`): adapters of this layer, in the order in which they act.
            safe_merge (`bool`, *optional*, defaults to `False`): raise `ValueError` if something is NaN or infinite.

        With LoRA beneath, input-side anchors stay in front of W + B A, so that a merged layer follows its LoRA.
        """
        scale = inner = shift = None
        for name in adapter_names:
            if name in self.spon_gain:
                factor = 1 + self.spon_gain[name].detach()
                scale = factor if scale is None else scale * factor
                inner = None if inner is None else inner * factor  # an earlier anchor passes later gains
            if name in self.spon_anchor:
                anchor = self.spon_anchor[name].detach().clone()
                if self.spon_settings[name].anchor_space == "input":
                    inner = anchor if inner is None else inner + anchor
                else:
                    shift = anchor if shift is None else shift + anchor
        if inner is not None and not isinstance(self.base_layer, BaseTunerLayer):
            through = through_weight(self.base_layer, inner)
            shift = through if shift is None else shift + through
            inner = None
        found = [value for value in (scale, inner, shift) if value is not None]
        if safe_merge and not all(torch.isfinite(value).all() for value in found):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: "
                f"not finite in a layer of {self.in_features} to {self.out_features} features. Nothing was merged."
            )
        return Merged(adapter_names[0], scale, inner, shift)


class SponLinear(nn.Module, SponLayer):
    """SPON around a linear callable: nn.Linear, Conv1D, a quantised layer, a LoRA layer. One GEMM per forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SponConfig, sparsity: float, has_anchor: bool
    ) -> None:
        super().__init__()
        SponLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._merged: Merged | None = None
        self.update_layer(adapter_name, config, sparsity, has_anchor)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
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
            return self._merged_forward(self._merged, x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.spon_settings]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.adapters_run.update(active)
        y = self.base_layer(self.adapt_input(x, active), *args, **kwargs)
        return self.adapt_output(y, x, active)

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any):
        """One adapter name per row of the batch; "__base__" rows stay dense. Still one GEMM for all rows."""
        if self.merged:
            raise ValueError("adapter_names cannot choose among merged adapters; call unmerge_adapter() first.")
        if len(adapter_names) != x.shape[0]:
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries but this layer's input has {x.shape[0]} rows; give "
                "one name per sample. Models that flatten batch and tokens before a layer cannot mix adapters there."
            )
        rows = {
            name: torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            for name in dict.fromkeys(adapter_names)
            if name in self.spon_settings
        }
        adapted = x.clone()
        for name, index in rows.items():
            adapted[index] = self.adapt_input(x[index], [name])
        y = self.base_layer(adapted, *args, **kwargs)
        for name, index in rows.items():
            y = y.index_copy(0, index, self.adapt_output(y[index], x[index], [name]))
        return y

    def _merged_forward(self, merged: Merged, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first = self.first_sparse_token(x, merged.first)
        sparse = self.sparsify(x, merged.first)
        if merged.scale is not None:
            sparse = sparse * merged.scale.to(sparse)  # device, too: the model may have been moved, or be a replica
        if merged.inner is not None:
            sparse = sparse + merged.inner.to(sparse)
        y = self.base_layer(dense_before(first, x, sparse), *args, **kwargs)
        return y if merged.shift is None or merged.in_bias else add_from(first, y, merged.shift.to(y))

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
        self.unmerge()
        try:
            merged = self.merged_effect(names, safe_merge)
        except ValueError:
            if before:
                self.merge(adapter_names=before)
            raise
        base = self.base_layer
        in_bias = (
            merged.shift is not None
            and has_plain_weight(base)
            and execution_device(base) is None  # a hook brings back the bias that it knows
            and self.spon_settings[names[0]].prefill == "sparse"
        )
        if in_bias:
            bias = base.bias
            merged = replace(merged, original_bias=bias, in_bias=True)
            total = merged.shift if bias is None else bias.detach().float() + merged.shift
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
        merged = self.merged_effect(names, safe_merge)
        settings = self.spon_settings[names[0]]
        state = {
            "spon_threshold": self.spon_threshold[names[0]] if settings.uses_threshold else None,
            "spon_column_scale": self.spon_column_scale[names[0]] if settings.criterion.uses_column_norms else None,
            "spon_input_scale": merged.scale,
            "spon_shift": merged.shift,
        }
        return make_sparse(base, settings, state)

    def __repr__(self) -> str:
        return "spon." + super().__repr__()


def spon_layers(model: nn.Module) -> dict[str, SponLayer]:
    """Name in the plain base model to SPON layer, in the model's order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, SponLayer)}


def outer_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Named modules from the outside in, without what lies inside tuner layers and modules_to_save wrappers."""
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        yield full, child
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from outer_modules(child, f"{full}.")


def plain_name(name: str) -> str:
    """The name a module has in the plain model, without the prefixes of PEFT's and torch.compile's wrappers."""
    return name.replace("_orig_mod.", "").removeprefix("base_model.model.")


def initial_vector(width: int, zeros: bool) -> torch.Tensor:
    """fp32 vector of zeros, or of small random numbers."""
    return torch.zeros(width) if zeros else torch.randn(width) * 0.1


def threshold_at(quantiles: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Threshold, shape (1,), under which a share `sparsity` of the scores lies, interpolated in the quantile table."""
    position = sparsity * (len(quantiles) - 1)
    low = min(int(position), len(quantiles) - 2)
    return torch.lerp(quantiles[low], quantiles[low + 1], position - low).reshape(1)
