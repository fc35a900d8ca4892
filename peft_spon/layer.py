# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a SPON layer holds: the state of any number of adapters around one linear layer."""

import math
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .base_layer import linear_sizes, prepared_state, through_weight
from .config import SponConfig
from .containers import Fp32BufferDict, Fp32ParameterDict, Place
from .criteria import Sparsifier
from .offload import execution_device
from .repair import Repair
from .sparse_linear import LayerSettings, Prompt, first_sparse_token


class SponLayer(BaseTunerLayer):
    """State of SPON around one linear layer of size in -> out, for any number of adapters.

    Attributes:
        spon_anchor: trained anchors, shape (in,) or (out,) by the adapter's `anchor_space`; fp32, or in the model's
            dtype with PEFT's `autocast_adapter_dtype=False`.
        spon_gain: trained gains, shape (in,), likewise.
        spon_settings: `LayerSettings` per adapter.
        spon_<name>: for each name in the [`Sparsifier.specs`] of an adapter, its tensors: `spon_threshold`, ...
    """

    adapter_layer_names = ("spon_anchor", "spon_gain")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.spon_anchor = Fp32ParameterDict()
        self.spon_gain = Fp32ParameterDict()
        self.spon_settings: dict[str, LayerSettings] = {}
        self.state_names: tuple[str, ...] = ()  # the containers of S's state, of all adapters
        self._disable_adapters = False
        self._anchors_enabled = True
        self._every_token = False
        self.prompt: Prompt | None = None  # inside `generate`, see prefill.py
        self._state_seen: set[str] = set()  # adapters whose calibrated state is known to be there
        self.adapters_run: set[str] = set()  # those that hold work: a forward has used them, or they were loaded, ...
        self.place = Place()
        self.merged_adapters = []
        self.in_features, self.out_features = linear_sizes(base_layer)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """PEFT's list of what is kept per adapter and not trained."""
        return (*(f"spon_{name}" for name in self.state_names), "spon_settings")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The containers of all tensors of adapters: what files hold."""
        return (*self.adapter_layer_names, *(f"spon_{name}" for name in self.state_names))

    def update_layer(self, adapter_name: str, config: SponConfig, sparsity: float, has_anchor: bool) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name (`str`): name of the new adapter.
            config (`SponConfig`): its configuration.
            sparsity (`float`): sparsity of this layer, after `sparsity_pattern`.
            has_anchor (`bool`): whether this layer carries an anchor (and a gain), after `anchor_modules`.
        """
        criterion = config.make_criterion()
        sparsifier = Sparsifier(criterion, self.in_features, self.out_features, sparsity, config.calibrated)
        self.adapters_run.discard(adapter_name)
        self._state_seen.discard(adapter_name)
        self._set_settings(adapter_name, LayerSettings(sparsifier, config.prefill, config.anchor_space))
        if has_anchor:
            width = self.in_features if config.anchor_space == "input" else self.out_features
            self.spon_anchor[adapter_name] = nn.Parameter(initial_vector(width, config.init_weights))
            if config.gain:
                self.spon_gain[adapter_name] = nn.Parameter(initial_vector(self.in_features, config.init_weights))
        for name in replace(sparsifier, calibrated=True).specs():
            self._make_container(name)
        # Loading fills what comes from data. NaN marks it as missing until then.
        missing = {n: torch.full(spec.shape, math.nan, dtype=spec.dtype) for n, spec in sparsifier.specs().items()}
        self.set_state(adapter_name, {**missing, **prepared_state(self.base_layer, criterion)})
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Give an adapter what another one with the same configuration holds: anchors, gains, thresholds, settings."""
        for held in (self.spon_anchor, self.spon_gain):
            if source in held:
                held[adapter_name].copy_(held[source])
        self.set_state(adapter_name, {name: tensor.clone() for name, tensor in self.sparsifier_state(source).items()})
        self._set_settings(adapter_name, self.spon_settings[source])

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
        for name in self.state_names:
            held = getattr(self, f"spon_{name}")
            if adapter_name in held and held[adapter_name].device not in (device, meta):
                held[adapter_name] = held[adapter_name].to(device)

    def cast_to_base(self, adapter_name: str) -> None:
        """Anchors and gains of an adapter in the dtype of the base layer, where that is floating point."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            return
        for held in (self.spon_anchor, self.spon_gain):
            if adapter_name in held:
                held[adapter_name].data = held[adapter_name].data.to(dtype)

    def settings(self, adapter_name: str) -> LayerSettings:
        """What an adapter asks of this layer."""
        return self.spon_settings[adapter_name]

    def _set_settings(self, adapter_name: str, settings: LayerSettings) -> None:
        # A new dict, not a changed one: a prepared layer notes what is set on it.
        self.spon_settings = {**self.spon_settings, adapter_name: settings}

    def sparsifier(self, adapter_name: str) -> Sparsifier:
        """S of an adapter."""
        return self.spon_settings[adapter_name].sparsifier

    def has_repair(self, adapter_name: str) -> bool:
        """Whether an adapter has an anchor here."""
        return adapter_name in self.spon_anchor

    def sparsifier_state(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's S, by the names of its specs.

        Raises:
            `ValueError`: the adapter is said to be calibrated, but nothing was loaded.
        """
        state = {}
        for name in self.state_names:
            tensors = self._modules[f"spon_{name}"]._buffers  # getattr takes longer than S of a small layer
            if adapter_name in tensors:
                state[name] = tensors[adapter_name]
        is_known = adapter_name in self._state_seen or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not is_known:
            if any(tensor.isnan().any() for tensor in state.values() if not tensor.is_meta):
                raise ValueError(
                    f"Adapter {adapter_name!r} is said to be calibrated but has no thresholds: its SponConfig is that "
                    "of a saved adapter. Load the adapter (PeftModel.from_pretrained), or set calibrated=False."
                )
            self._state_seen.add(adapter_name)
        return state

    def set_state(self, adapter_name: str, tensors: dict[str, torch.Tensor], calibrated: bool | None = None) -> None:
        """Store tensors of an adapter's S; `calibrated=True`: with these, all of its state is there."""
        for name, tensor in tensors.items():
            self._make_container(name)
            getattr(self, f"spon_{name}")[adapter_name] = tensor
        settings = self.spon_settings[adapter_name]
        if calibrated is not None:
            settings = replace(settings, sparsifier=replace(settings.sparsifier, calibrated=calibrated))
        self._set_settings(adapter_name, settings)  # the same or not: a prepared layer is to know of the tensors

    def _make_container(self, name: str) -> None:
        if name not in self.state_names:
            self.state_names = (*self.state_names, name)
            setattr(self, f"spon_{name}", Fp32BufferDict())

    def saved_state(self, adapter_name: str) -> tuple[LayerSettings, dict[str, torch.Tensor]]:
        """What [`restore_state`] takes to undo a calibration."""
        return self.spon_settings[adapter_name], dict(self.sparsifier_state(adapter_name))

    def restore_state(self, adapter_name: str, saved: tuple[LayerSettings, dict[str, torch.Tensor]]) -> None:
        """Settings and state of an adapter as they were; what has been added since goes."""
        settings, tensors = saved
        self._set_settings(adapter_name, settings)
        for name in self.state_names:
            held = getattr(self, f"spon_{name}")
            if adapter_name in held:
                del held[adapter_name]
        self.set_state(adapter_name, tensors)

    def score(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The criterion's fp32 scores of what it makes of an input of shape (..., in)."""
        criterion, state = self.sparsifier(adapter_name).criterion, self.sparsifier_state(adapter_name)
        return criterion.score(criterion.encode(x, state), state)

    def sparsify(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """S(x), shape (..., in). The mask carries no gradient; kept entries pass theirs through unchanged."""
        return self.sparsifier(adapter_name)(x, self.sparsifier_state(adapter_name))

    def set_sparsity(self, adapter_name: str, sparsity: float) -> None:
        """Change the sparsity of an adapter; a calibrated threshold is read off the stored quantile table."""
        sparsifier, state = self.sparsifier(adapter_name).at(sparsity, self.sparsifier_state(adapter_name))
        self._set_settings(adapter_name, replace(self.spon_settings[adapter_name], sparsifier=sparsifier))
        self.set_state(adapter_name, state)

    def set_quantiles(self, adapter_name: str, quantiles: torch.Tensor) -> None:
        """Store the quantile table that calibration found, shape (257,), and derive the threshold from it."""
        self.set_state(adapter_name, {"quantiles": quantiles}, calibrated=True)
        self._state_seen.add(adapter_name)
        self.set_sparsity(adapter_name, self.sparsifier(adapter_name).sparsity)

    def first_sparse_token(self, x: torch.Tensor, adapter_name: str) -> int:
        """Position on the token axis of x (..., tokens, in) where sparsity begins, by the adapter's `prefill`."""
        if self._every_token or self.training:
            return 0
        return first_sparse_token(x, self.spon_settings[adapter_name].prefill, self.prompt)

    def repair(self, adapter_names: list[str]) -> Repair:
        """Gains and anchors of some adapters, in the order in which they act, as they are trained: live, and fp32
        whatever they are kept in."""
        repair = Repair()
        for name in adapter_names:
            gain = self.spon_gain[name].float() if name in self.spon_gain else None
            anchor = self.spon_anchor[name].float() if name in self.spon_anchor else None
            is_inside = self.spon_settings[name].anchor_space == "input"
            repair = repair.then(gain, *((anchor, None) if is_inside else (None, anchor)))
        return repair

    @torch.no_grad()
    def merged_repair(self, adapter_names: list[str], safe_merge: bool = False) -> Repair:
        """That repair as constants; input-side anchors α as the shift W α.

        With LoRA beneath they stay in front of W + B A, so that a merged layer follows its LoRA.

        Args:
            adapter_names (`list[str]`): adapters of this layer, in the order in which they act.
            safe_merge (`bool`, *optional*, defaults to `False`): raise `ValueError` if something is NaN or infinite.
        """
        live = self.repair(adapter_names)
        scale, inner, shift = (None if t is None else t.detach().clone() for t in (live.scale, live.inner, live.shift))
        if inner is not None and not isinstance(self.base_layer, BaseTunerLayer):
            through = through_weight(self.base_layer, inner)
            inner, shift = None, through if shift is None else shift + through
        found = [value for value in (scale, inner, shift) if value is not None]
        if safe_merge and not all(torch.isfinite(value).all() for value in found):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken: "
                f"not finite in a layer of {self.in_features} to {self.out_features} features. Nothing was merged."
            )
        return Repair(scale, inner, shift)


def initial_vector(width: int, zeros: bool) -> torch.Tensor:
    """fp32 vector of zeros, or of small random numbers."""
    return torch.zeros(width) if zeros else torch.randn(width) * 0.1
