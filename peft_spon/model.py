# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""SPON as a PEFT tuner: finds the linear layers, wraps them, checks what is loaded."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, set_adapter
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import SponConfig, check_sparsity
from .layer import Place, SponLayer, SponLinear
from .loading import checked, module_keys, modules_checksum, own_checksum, undo_load
from .lora import (
    active_lora,
    apply_trainable,
    check_biases,
    check_finite,
    delete_lora,
    lora_checksums,
    lora_layers,
    lora_names,
    lora_taken_over,
    model_inside,
    set_auxiliary,
    trainable_choice,
)
from .merged import prepare_saving
from .modes import keep_switched_off
from .peft_model import save_and_load_checked
from .prefill import follow_prompts
from .sites import adapter_config, change_config, is_new, outer_modules, plain_name, resolve_adapter, spon_layers
from .sparse_linear import fold_scale
from .targets import (
    all_linear,
    check_matches,
    check_names,
    check_patterns,
    default_targets,
    layer_sparsity,
    matches,
)
from .weights import has_plain_weight, linear_sizes


class SponModel(BaseTuner):
    """
    A model whose targeted linear layers compute `y = W (S(x) + anchor) + b` (SPON, arXiv 2512.12744).

    Made by `peft.get_peft_model(model, SponConfig(...))`; see [`SponConfig`] for the dials. Another adapter with the
    configuration that one has in the model, `model.add_adapter("ref", model.peft_config["default"])`, is its copy:
    anchors, gains and thresholds. TRL's preference trainers make their reference that way.

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
        config = peft_config[adapter_name] if is_new_model else peft_config
        trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        with (
            earlier_spon_taken_out(model, None if is_new_model else adapter_name),
            lora_taken_over(model, adapter_name, config) as (inner, taken),
        ):
            super().__init__(inner, peft_config, adapter_name, *args, **kwargs)
        self.taken_over, self.trained_before = taken, trained
        save_and_load_checked(self)
        if inner is not given:  # PEFT reads the name off the model it was given
            self.peft_config[adapter_name].base_model_name_or_path = vars(inner).get("name_or_path") or None

    def give_back(self) -> None:
        """Once all SPON layers are out again: the model as it was, its LoRA and what of it is trained included."""
        if self.taken_over:
            self.taken_over.give_back()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained_before)

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
        layer.trainable_choice = trainable_choice(self.model)
        layer.place = Place(parent, target_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version hands the child's weight on, which layers without a `.weight` do not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """Let `model(..., adapter_names=[...])` and `generate` choose one adapter per sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        # Errors begin with PEFT's words for the same misuse of LoRA.
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. The adapters are "
                f"{sorted(self.peft_config)}; '__base__' stands for the model without them: without SPON, or, beside "
                "names of LoRAs, without LoRA."
            )
        lora = set(lora_names(self.peft_config))
        if set(adapter_names) != {"__base__"}:  # rows that all want no LoRA, as in a batch where others want one
            lora &= set(adapter_names)
        if lora and set(adapter_names) - lora - {"__base__"}:
            raise ValueError(
                f"adapter_names is {adapter_names}: name LoRA adapters ({sorted(lora)}), or SPON adapters, not both; "
                "the other kind stays as it is."
            )
        kind = LoraLayer if lora else SponLayer
        of_kind = lora or set(self.peft_config) - set(lora_names(self.peft_config))
        chosen = set(adapter_names) & of_kind or of_kind  # all rows "__base__": whatever is active is off
        beams = kwargs.get("num_beams") or 1
        if beams > 1 and not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = self.model.get_encoder() if self.get_model_config(self.model).get("is_encoder_decoder") else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = []
        for module in self.modules():
            is_wrapper = isinstance(module, AuxiliaryTrainingWrapper) and module._adapters & chosen
            if isinstance(module, kind) or is_wrapper:
                # Beam search repeats the rows that the decoder sees; the encoder ran before that.
                names = list(adapter_names) if module in in_encoder else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        check_biases(lora_layers(self.model), adapter_names)
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
        check_biases(lora_layers(self.model), adapter_names)
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
        if safe_merge:
            check_finite(lora_layers(self.model))
        if adapter_names is not None and lora_layers(self.model):
            set_auxiliary(self.model, adapter_names)  # the modules_to_save of what is merged, not of the rest
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if vars(model).get("_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # no adapter is left that transformers' add_adapter had put there
        if fold_gain:
            for name in layers:
                fold_scale(model.get_submodule(name))
        prepare_saving(model)
        return model

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the active adapters. With LoRA beneath: those of the kind that is named; the other kind stays as it is.

        Args:
            adapter_name (`str` or `list[str]`): SPON adapters, LoRA adapters, or both.
            inference_mode (`bool`, *optional*, defaults to `False`): freeze them.
        """
        wanted = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        lora = [name for name in wanted if name in lora_names(self.peft_config)]
        spon = [name for name in wanted if name not in lora]
        active = active_lora(self.model)
        if lora:
            set_adapter(self.model, lora, inference_mode=inference_mode, layer_cls=LoraLayer)
        if spon or not lora:
            super().set_adapter(adapter_name if not lora else spon, inference_mode)
        if lora or active:
            set_auxiliary(self.model, [*self.active_adapters, *(lora or active)], inference_mode)

    def enable_adapter_layers(self) -> None:
        """As PEFT's; what is trained stays as `set_trainable` chose it, and open `dense_mode` blocks stay dense."""
        super().enable_adapter_layers()
        choice = trainable_choice(self.model)
        if choice is not None and active_lora(self.model):
            apply_trainable(self.model, choice)
        keep_switched_off(self.model, enabled=True)

    def disable_adapter_layers(self) -> None:
        """As PEFT's; `dense_mode` blocks that are open leave the layers off when they end."""
        super().disable_adapter_layers()
        keep_switched_off(self.model, enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a SPON adapter, or a LoRA beneath; with the last LoRA its layers go, too.

        Args:
            adapter_name (`str`): its name.

        Raises:
            `ValueError`: unknown, or merged.
        """
        if adapter_name not in lora_names(self.peft_config):
            active = active_lora(self.model)
            super().delete_adapter(adapter_name)
        else:
            delete_lora(self.model, adapter_name)
            active = active_lora(self.model)
        if active:
            set_auxiliary(self.model, [*self.active_adapters, *active])

    def set_sparsity(
        self, sparsity: float, pattern: dict[str, float] | None = None, adapter_name: str | None = None
    ) -> None:
        """
        Turn the sparsity dial. Calibrated thresholds are re-derived from the stored quantile tables, without data.

        Args:
            sparsity (`float`): share of the input entries that S zeroes, in [0, 1).
            pattern (`dict[str, float]`, *optional*): layer name or regular expression to sparsity; replaces the
                adapter's `sparsity_pattern`. Left out, the pattern is cleared: every layer gets `sparsity`.
            adapter_name (`str`, *optional*): which adapter; default: the first active one.

        Raises:
            `ValueError`: a sparsity outside [0, 1), a pattern that matches no layer, an unknown adapter.
        """
        set_sparsity(self.model, sparsity, pattern, adapter_name)

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


def check_can_be_reference(model: nn.Module, source: str, name: str) -> None:
    """Raises `ValueError` if a copy of an adapter could not be a reference: the LoRA beneath belongs to both."""
    parameters = [p for layer in lora_layers(model) for key, p in layer.named_parameters() if "lora_" in key]
    if any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"Adapter {name!r} would be a copy of {source!r} (as TRL's preference trainers add it for a reference), "
            "but the LoRA beneath SPON, which is trained, would be part of both. Give the trainer a ref_model of its "
            "own, load_with_lora(base, folder).get_base_model(); where it takes none (GRPO), use beta=0.0, or freeze "
            'the LoRA: set_trainable(model, "anchors").'
        )


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def compile_in_place(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `torch.compile`, which change all names below them, also in files.

    What they wrap stays compiled, as `module.compile()` does it.
    """
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if "_orig_mod" in module._modules:
                setattr(parent, child, compile_in_place(module))
    if "_orig_mod" not in model._modules:
        return model
    inner = model._orig_mod
    inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)
    return inner


@contextmanager
def earlier_spon_taken_out(model: nn.Module, only: str | None) -> Iterator[None]:
    """
    Take SPON adapters out of a model on which `get_peft_model` is called again: their layers would go on acting.

    Such a call is a notebook's cell that is run again, on the base model that it has changed before. If the body
    raises, the layers are back. A `PeftModel` with SPON is left alone, see [`lora.lora_taken_over`].

    Args:
        model (`torch.nn.Module`): what the user hands to `get_peft_model`.
        only (`str`, *optional*): take out the adapter of this name and leave the others; default: all.
    """
    inner = model_inside(model)
    layers = list(spon_layers(inner).values())
    configs: dict[str, PeftConfig] = getattr(inner, "peft_config", {})
    held = {name for layer in layers for name in layer.spon_settings}
    held |= {name for name, config in configs.items() if isinstance(config, SponConfig)}
    gone = held if only is None else held & {only}
    is_spon_model = isinstance(model, PeftModel) and isinstance(model.base_model, SponModel)
    if is_spon_model or not layers or (only is not None and not gone):
        yield
        return
    places, before, merged = [], dict(configs), [(layer, list(layer.merged_adapters)) for layer in layers]
    for parent in list(inner.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, SponLayer) and set(module.spon_settings) <= gone:
                places.append((parent, child, module, module.base_layer))
            elif isinstance(module, AuxiliaryTrainingWrapper) and module._adapters and module._adapters <= gone:
                places.append((parent, child, module, module.original_module))
    for layer in layers:
        layer.unmerge()
    for parent, child, _, plain in places:
        setattr(parent, child, plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        for name in gone:
            configs.pop(name, None)
            for layer in spon_layers(inner).values():
                layer.delete_adapter(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield
    except BaseException:
        for parent, child, module, _ in places:
            setattr(parent, child, module)
        for layer, names in merged:
            if names:
                layer.merge(adapter_names=names)
        configs.clear()
        configs.update(before)
        raise
    warnings.warn(
        f"The model held SPON layers of an earlier call (adapters {sorted(gone)}); they were taken out, and what is "
        "new is there alone. Save an adapter before you put another one on the same model, or use "
        "model.add_adapter('name', config) to have several.",
        stacklevel=3,
    )


def set_sparsity(
    model: nn.Module, sparsity: float, pattern: dict[str, float] | None = None, adapter_name: str | None = None
) -> None:
    """As [`SponModel.set_sparsity`], for any model that holds SPON layers (transformers' `add_adapter` too)."""
    pattern = pattern or {}
    check_sparsity(sparsity, pattern)
    name = resolve_adapter(model, adapter_name, may_be_merged=True)
    layers = {key: layer for key, layer in spon_layers(model).items() if name in layer.spon_settings}
    check_matches("sparsity_pattern", pattern, list(layers))
    for key, layer in layers.items():
        layer.set_sparsity(name, layer_sparsity(sparsity, pattern, key))
    change_config(model, name, sparsity=sparsity, sparsity_pattern=dict(pattern))
