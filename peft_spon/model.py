# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""SPON as a PEFT tuner: finds the linear layers, wraps them, checks what is loaded."""

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ._peft import check_target_module_exists
from .base_layer import has_plain_weight, linear_sizes
from .budget import exact_key, split
from .config import SponConfig, check_sparsity
from .containers import Place
from .decode import DecodeSummary, prepare_for_decode, restore_from_decode
from .layer import SponLayer
from .linear import SponLinear
from .loading import checked, module_keys, modules_checksum, own_checksum, undo_load
from .lora import OverLora, check_can_be_reference, lora_checksums
from .merged import prepare_saving
from .modes import keep_switched_off
from .peft_model import save_and_load_checked
from .prefill import follow_prompts
from .results import known_results
from .sites import adapter_config, change_config, is_new, outer_modules, resolve_adapter, spon_layers
from .sparse_linear import fold_scale
from .taking_over import compile_in_place, earlier_spon_taken_out
from .targets import (
    all_linear,
    check_matches,
    check_names,
    check_patterns,
    default_targets,
    layer_sparsity,
    matches,
)


class SponModel(OverLora, BaseTuner):
    """
    A model whose targeted linear layers compute `y = W (S(x) + anchor) + b` (SPON, arXiv 2512.12744).

    Made by `peft.get_peft_model(model, SponConfig(...))`; see [`SponConfig`] for the dials. Another adapter with the
    configuration that one has in the model, `model.add_adapter("ref", model.peft_config["default"])`, is its copy:
    anchors, gains and thresholds. TRL's preference trainers make their reference that way.

    The configuration is found as `model.peft_config["default"]`, the user's own object. Calibration and the dial put a
    changed copy in its place, so that one object can serve several models.

    Args:
        model (`torch.nn.Module`): the model to adapt; its weights are frozen and never changed.
        peft_config (`SponConfig`): the configuration.
        adapter_name (`str`, *optional*, defaults to `"default"`): name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): create empty anchors on the meta device.

    Example:

    ```python
    >>> import peft_spon
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForCausalLM

    >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    >>> model = get_peft_model(base, peft_spon.SponConfig(sparsity=0.5))
    ```
    """

    prefix: str = "spon_"
    tuner_layer_cls = SponLayer
    target_module_mapping: dict[str, list[str]] = {}  # targets are found by walking the model, see _prepare_model

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        given, model = model, compile_in_place(model)
        is_new_model = isinstance(peft_config, dict)  # of get_peft_model; injecting adds to what is in the model
        with earlier_spon_taken_out(model, None if is_new_model else adapter_name):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        save_and_load_checked(self)
        if self.model is not given:  # PEFT reads the name off the model it was given
            self.peft_config[adapter_name].base_model_name_or_path = vars(self.model).get("name_or_path") or None

    def _check_new_adapter_config(self, config: SponConfig) -> None:
        config.check_speed([name for name, _ in self.model.named_modules()])  # before PEFT matches anything
        super()._check_new_adapter_config(config)

    def _prepare_adapter_config(self, peft_config: SponConfig, model_config: dict) -> SponConfig:
        # As with PEFT's own methods, the user's object is the adapter's configuration. It may serve several adapters:
        # what calibration and the dial change, they change in a copy (sites.change_config). That of an adapter in
        # this model is how TRL's preference trainers add a copy of it as their reference.
        if peft_config.modules_to_save:  # PEFT adds heads to the user's object for each model
            peft_config.modules_to_save = list(dict.fromkeys(peft_config.modules_to_save))
        *others, name = [name for name, config in self.peft_config.items() if config is peft_config]
        self._copy_of = others[0] if others else None
        if self._copy_of is not None:
            check_can_be_reference(self.model, self._copy_of, name)
            self.peft_config[name] = copy.copy(peft_config)
        return self.peft_config[name]

    def _prepare_model(self, peft_config: SponConfig, model: nn.Module) -> None:
        """Resolve the default targets and check everything that can be wrong before a layer is touched."""
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(peft_config, model)
        elif peft_config.target_modules == "all-linear":
            peft_config.target_modules = all_linear(peft_config, model)
        names = [name for name, _ in outer_modules(model) if check_target_module_exists(peft_config, name)]
        for name in names:
            try:
                linear_sizes(model.get_submodule(name))
            except TypeError as error:
                raise TypeError(f"Target '{name}': {error}") from None
        if not peft_config._is_saved:  # what a saved adapter names has been loaded before
            check_names(peft_config, model, names)
        if names:
            check_patterns(peft_config, names)
        if peft_config.prefill != "sparse":
            follow_prompts(model)

    def _create_and_replace(
        self,
        peft_config: SponConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        sparsity = layer_sparsity(peft_config.sparsity, peft_config.sparsity_pattern, current_key)
        has_anchor = matches(peft_config.anchor_modules, current_key)
        if isinstance(target, SponLayer):
            target.update_layer(adapter_name, peft_config, sparsity, has_anchor)
            if self._copy_of in target.spon_settings:
                target.copy_adapter(self._copy_of, adapter_name)
            return
        layer = SponLinear(target, adapter_name, peft_config, sparsity, has_anchor)
        layer.place = Place(parent, target_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version hands the child's weight on, which layers without a `.weight` do not have.
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merge adapters: b' = b + W anchor in fp32, S and gains stay active. `unmerge_adapter` restores every bit.

        A LoRA beneath goes into W; PEFT subtracts it again when it is unmerged, exact up to rounding.

        Args:
            adapter_names (`list[str]`, *optional*): what to merge, in this order; default: the active adapters.
            safe_merge (`bool`, *optional*, defaults to `False`): check that everything is finite first.

        Raises:
            `ValueError`: with `safe_merge`, something is NaN or infinite; a LoRA with `lora_bias` on layers without
                bias. Nothing is merged then.
        """
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = {layer: list(layer.merged_adapters) for layer in layers}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            for layer, names in before.items():
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
            raise

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        fold_gain: bool = False,
    ) -> nn.Module:
        """
        The base model with merged layers: its own class, its linear layers sparse (`SparseLinear`), S active.

        `save_pretrained` of the result writes the base's weights untouched and what SPON adds beside them, and
        `from_pretrained`, with `import peft_spon`, loads it back; see [`peft_spon.merged`].

        Args:
            progressbar (`bool`, *optional*, defaults to `False`): show progress.
            safe_merge (`bool`, *optional*, defaults to `False`): check that everything is finite first.
            adapter_names (`list[str]`, *optional*): what to merge, in this order; default: the active adapters.
            fold_gain (`bool`, *optional*, defaults to `False`): multiply the gains into the weights, one rounding of
                their dtype. Saves a product per input at run time; the weights are then no longer the base's.

        Raises:
            `ValueError`: with `safe_merge`, something is NaN or infinite; with `fold_gain`, quantised weights; a LoRA
                with `lora_bias` on layers without bias.
        """
        layers = spon_layers(self.model)
        for name, layer in layers.items():
            if fold_gain and layer.spon_gain and not has_plain_weight(layer.get_base_layer()):
                raise ValueError(
                    f"fold_gain=True changes weights, and those of '{name}' are not plain floating point; leave it "
                    "out: the gain then stays a scale of the layer's input."
                )
            names = layer.names_to_merge(adapter_names)
            if safe_merge and names:
                layer.merged_repair(names, safe_merge)
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if vars(model).get("_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # no adapter is left that transformers' add_adapter had put there
        if fold_gain:
            for name in layers:
                fold_scale(model.get_submodule(name))
        prepare_saving(model)
        return model

    def enable_adapter_layers(self) -> None:
        """As PEFT's; open `dense_mode` blocks stay dense."""
        super().enable_adapter_layers()
        keep_switched_off(self.model, enabled=True)

    def disable_adapter_layers(self) -> None:
        """As PEFT's; `dense_mode` blocks that are open leave the layers off when they end."""
        super().disable_adapter_layers()
        keep_switched_off(self.model, enabled=False)

    def set_sparsity(
        self, sparsity: float, pattern: dict[str, float] | None = None, adapter_name: str | None = None
    ) -> None:
        """
        Turn the sparsity dial. Calibrated thresholds are re-derived from the stored quantile tables, without data.

        Args:
            sparsity (`float`): share of the input entries that S zeroes, in [0, 1).
            pattern (`dict[str, float]`, *optional*): layer name or regular expression to sparsity; replaces the
                adapter's `sparsity_pattern`. Left out: every layer gets `sparsity`, or, after [`allocate`], its share
                of a budget of `sparsity` for all of them, split anew. `{}`: every layer alike, for good.
            adapter_name (`str`, *optional*): which adapter; default: the first active one.

        Raises:
            `ValueError`: a sparsity outside [0, 1), a pattern that matches no layer, an unknown adapter.
        """
        set_sparsity(self.model, sparsity, pattern, adapter_name)

    def prepare_for_decode(self, weight_dtype: torch.dtype | None = None) -> DecodeSummary:
        """Let decode steps skip the weights of inputs that S zeroes; see [`prepare_for_decode`]."""
        return prepare_for_decode(self.model, weight_dtype)

    def restore_from_decode(self) -> None:
        """Undo [`SponModel.prepare_for_decode`]."""
        restore_from_decode(self.model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # What PEFT's methods call once an adapter is there. S's state is fp32 in either case.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in spon_layers(self.model).values():
                layer.cast_to_base(adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # In files as in a model of which nothing is compiled.
        return super()._remove_adapter_name_from_key(key.replace("_orig_mod.", ""), adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SponConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        named = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in found.items()}
        # The configuration, which PEFT saves next, says which tensors belong to it.
        config._tensors_checksums = {
            "tensors": own_checksum(named),
            "modules": modules_checksum(model, adapter_name, state_dict),
        }
        config._module_names = set(module_keys(model, adapter_name))
        config._lora_checksums = lora_checksums(model, found)
        config._results = known_results(model, adapter_name)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SponConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        checksums = config.checksums or {}
        config.checksums = None  # what is loaded may be changed and saved again
        try:
            remapped = checked(model, adapter_name, state_dict, remapped, checksums, config._sizes_are_fixed)
        except ValueError:
            if is_new(model, adapter_name):
                undo_load(model, adapter_name)
            raise
        adapter_config(model, adapter_name)  # it is in use now
        return remapped


def set_sparsity(
    model: nn.Module, sparsity: float, pattern: dict[str, float] | None = None, adapter_name: str | None = None
) -> None:
    """As [`SponModel.set_sparsity`], for any model that holds SPON layers (transformers' `add_adapter` too)."""
    check_sparsity(sparsity, pattern or {})
    name = resolve_adapter(model, adapter_name, may_be_merged=True)
    layers = {key: layer for key, layer in spon_layers(model).items() if name in layer.spon_settings}
    allocation = adapter_config(model, name).allocation if pattern is None else None
    if allocation is not None:
        if allocation["layers"].keys() != layers.keys():
            raise ValueError(
                f"The allocation of adapter {name!r} is for other layers than this model's; allocate() again, or give "
                "a pattern ({}: every layer alike)."
            )
        pattern = {exact_key(key): share for key, share in split(allocation, sparsity).items()}
    pattern = dict(pattern or {})
    check_matches("sparsity_pattern", pattern, list(layers))
    for key, layer in layers.items():
        layer.set_sparsity(name, layer_sparsity(sparsity, pattern, key))
    change_config(model, name, sparsity=sparsity, sparsity_pattern=pattern, allocation=allocation)
