# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading of merged checkpoints: transformers' loader, its layers made sparse, and what was loaded checked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from .checksums import fingerprint, in_threads, is_same_weight, tensors_checksum
from .config import check_prefill, check_sparsity
from .criteria import Sparsifier, make_criterion
from .files import header_problem
from .merged import SAVE_AGAIN, SponMergedConfig, hashed_names, hashed_tensors, prepare_saving
from .sparse_linear import REPAIR, LayerSettings, SparseMixin, make_sparse, merged_specs


class SponQuantizer(HfQuantizer):
    """Makes the layers of a model that is being loaded sparse, before its weights come, and checks it after that."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        for file in checkpoint_files or []:  # transformers 4 does not say
            if str(file).endswith(".safetensors") and (problem := header_problem(file)):
                raise ValueError(f"{problem}; save or download the model again.")
        for name, entry in self.quantization_config.layers.items():
            layer = find_layer(model, name)
            if layer is None:
                continue
            n_in, n_out = layer_sizes(layer)
            settings, names = read_entry(name, entry, n_in, n_out)
            shapes = {part: spec.shape for part, spec in merged_specs(settings.sparsifier).items()}
            shapes |= {"spon_input_scale": (n_in,), "spon_shift": (n_out,)}
            missing = {
                part: torch.full(shapes[part], torch.nan, dtype=torch.float32, device=layer.weight.device)
                for part in names
            }
            make_sparse(layer, settings, missing)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        where = model.name_or_path or "the folder"
        layers = {name: layer for name in config.layers if (layer := find_layer(model, name)) is not None}
        other = find_other_fingerprint(model, config) if config.weights else find_other_weight(model, config)
        was_cast = False
        for name, layer in layers.items():
            for part, value in layer.own_tensors().items():
                if value.dtype != torch.float32:
                    # transformers 4 casts all that it loads to the dtype of the model.
                    was_cast = was_cast or value.dtype == model.dtype
                    setattr(layer, part, value.float())
            threshold = config.layers[name]["threshold"]
            if was_cast and threshold is not None:
                layer.spon_threshold.fill_(threshold)
        problem = find_problem(config, layers, exact=not was_cast) or other
        if problem:
            raise ValueError(f"{where}: {problem}")
        # From here on it is an ordinary model that can be cast and trained.
        for attribute in ("hf_quantizer", "quantization_method"):
            vars(model).pop(attribute, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        model.is_quantized = False
        model.config.quantization_config = config
        prepare_saving(model)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def find_layer(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The layer in a model with or without head; None for a layer of the head that a headless model lacks.

    Raises:
        `ValueError`: the model has no such layer.
    """
    modules = dict(model.named_modules())
    for candidate in names_across_heads(model, name):
        if isinstance(modules.get(candidate), nn.Module) and hasattr(modules[candidate], "weight"):
            return modules[candidate]
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model and not name.startswith(prefix):
        return None
    raise ValueError(
        f"config.json: {type(model).__name__} has no linear layer '{name}'; the file is damaged, was edited, or is "
        "of another model."
    )


def names_across_heads(model: PreTrainedModel, name: str) -> list[str]:
    """A name as saved, and as it is in the model's class with or without a head."""
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of an nn.Linear or Conv1D."""
    out, into = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
    return into, out


def read_entry(name: str, entry: dict[str, Any], n_in: int, n_out: int) -> tuple[LayerSettings, list[str]]:
    """Settings of a layer and the names of its buffers.

    Raises:
        `ValueError`: naming the layer.
    """
    try:
        check_sparsity(entry["sparsity"], {})
        check_prefill(entry["prefill"])
        criterion = make_criterion(entry["criterion"], entry["criterion_kwargs"])
        sparsifier = Sparsifier(criterion, n_in, n_out, entry["sparsity"], bool(entry["calibrated"]))
        settings = LayerSettings(sparsifier, entry["prefill"], "output")
        if set(entry["state"]) - set(REPAIR) != set(merged_specs(sparsifier)):
            raise ValueError(f"state is {entry['state']}, which does not fit criterion {criterion.name!r}.")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: layer '{name}': {error} {SAVE_AGAIN.capitalize()}") from None
    return settings, entry["state"]


def find_problem(config: SponMergedConfig, layers: dict[str, SparseMixin], exact: bool) -> str | None:
    """What is wrong with layers that were just loaded: values not finite, or not those that were saved. Or None."""
    problems = (state_problem(name, layer.own_tensors(), config.layers[name], exact) for name, layer in layers.items())
    return next((problem for problem in problems if problem), None)


def state_problem(name: str, own: dict[str, torch.Tensor], entry: dict[str, Any], exact: bool = True) -> str | None:
    """The same of one layer: `own` are its tensors as they are in the files, by name, `entry` is its description."""
    is_whole = own.keys() == set(entry["state"]) and not any(value.is_meta for value in own.values())
    is_finite = is_whole and all(torch.isfinite(value).all() for value in own.values())
    if is_finite and (not exact or tensors_checksum(own) == entry["checksum"]):
        return None
    return (
        f"layer '{name}': {', '.join(entry['state'])} in the safetensors files are not those that were saved with "
        "this config.json; one is missing, damaged, or of another model. Save the merged model again."
    )


def find_other_weight(model: PreTrainedModel, config: SponMergedConfig) -> str | None:
    """Which parameter of a model that was just loaded is not the one that was saved, or None.

    Every bit counts, whatever the dtype in which the model is loaded. A new head may be there, and a head be missing,
    where the model is loaded as another class than it was saved; never a parameter of the repeated blocks.
    """
    saved = {name: entry_across_heads(model, config.hashes, name) for name in hashed_names(model)}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    is_same_class = type(model).__name__ == config.model_class
    new = [name for name, found in saved.items() if found is None and (is_same_class or name.startswith(blocks))]
    gone = [name for name in config.hashes if is_same_class and name not in saved]
    for names, what in ((new, "is in the model but was not saved"), (gone, "was saved but is not in the model")):
        if names:
            return (
                f"config.json: weight '{names[0]}' {what} ({len(names)} such): the settings of the model were edited, "
                "or are of another one, or this version of transformers builds it otherwise than the one that saved "
                "it. Save the merged model again."
            )

    def is_other(named: tuple[str, torch.Tensor | None]) -> bool:
        name, tensor = named
        entry = None if saved[name] is None else config.hashes[saved[name]]
        # Of another shape it is new: transformers stops at that unless ignore_mismatched_sizes asks for it.
        comparable = entry is not None and tensor is not None and entry["shape"] == list(tensor.shape)
        return comparable and not is_same_weight(tensor, entry)

    others = in_threads(is_other, hashed_tensors(model))
    name = next((name for name, other in zip(saved, others, strict=True) if other), None)
    return None if name is None else not_as_saved(name)


def entry_across_heads(model: PreTrainedModel, entries: Mapping[str, Any], name: str) -> str | None:
    """The name under which an entry is, in a model with or without a head; None if there is none."""
    return next((candidate for candidate in names_across_heads(model, name) if candidate in entries), None)


def not_as_saved(name: str) -> str:
    return (
        f"weight '{name}' is not the one that was saved: it is missing in the safetensors files (see the loading "
        "report above), damaged, or of another model. Save or download the merged model again."
    )


def find_other_fingerprint(model: PreTrainedModel, config: SponMergedConfig) -> str | None:
    """As `find_other_weight`, for checkpoints of peft_spon 0.1 and 0.2."""
    for name, parameter in model.named_parameters():
        saved = config.weights.get(entry_across_heads(model, config.weights, name))
        is_whole = not isinstance(parameter, DTensor) and not parameter.is_meta
        if saved is None or not is_whole:
            continue
        dtype, shape, _ = f"{saved}  ".split(" ")[:3]
        saved_dtype = getattr(torch, dtype, None)
        if not isinstance(saved_dtype, torch.dtype):
            return f"config.json: the fingerprint of weight '{name}' is {saved!r}; {SAVE_AGAIN}"
        is_float = parameter.is_floating_point()
        is_cast_down = is_float and torch.promote_types(saved_dtype, parameter.dtype) != parameter.dtype
        resized = shape != "x".join(str(size) for size in parameter.shape)
        is_saved = is_float and fingerprint(parameter, saved_dtype) == saved
        if not is_saved and not is_cast_down and not resized:
            return not_as_saved(name)
    return None
