# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints: what `merge_and_unload` gives, saved and loaded by transformers' own methods.

The folder holds the base's `weight` and `bias` tensors untouched, what SPON adds beside them (`spon_shift` and the
other buffers of [`SparseMixin`]), and in `config.json` a `quantization_config` with `quant_method: "spon"`, through
which transformers finds the loader below. A program without peft_spon warns that it does not know the method, ignores
the additional tensors and has the dense base model.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._version import __version__
from .cards import keep_card_on_hub, merged_card, replaceable_card
from .checksums import fields_checksum, fingerprint, tensors_checksum
from .config import check_prefill, check_sparsity, check_version, make_criterion
from .sparse_linear import STATE, LayerSettings, SparseMixin, make_sparse
from .weights import has_plain_weight


logger = logging.get_logger(__name__)

METHOD = "spon"
ENTRY = {"criterion", "criterion_kwargs", "sparsity", "prefill", "calibrated", "threshold", "state", "checksum"}


class SponMergedConfig(QuantizationConfigMixin):
    """
    The `quantization_config` of a merged checkpoint, written by `save_pretrained`.

    Args:
        layers (`dict[str, dict]`): per sparse layer what S is, and which buffers are stored.
        weights (`dict[str, str]`): fingerprints of the base's weights, to notice files of another model.
        checksum (`str`): of `layers` and `weights`.
        peft_spon_version (`str`): version that wrote the checkpoint.

    Raises:
        `ValueError`: a field is missing, has a wrong value, or comes from a newer version.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        weights: dict[str, str] | None = None,
        checksum: str | None = None,
        peft_spon_version: str | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        self.quant_method = METHOD
        found = {"layers": layers, "weights": weights, "checksum": checksum, "peft_spon_version": peft_spon_version}
        for name, value in found.items():
            if not isinstance(value, dict if name in ("layers", "weights") else str):
                raise ValueError(f"config.json: quantization_config.{name} is {value!r}; {REPAIR}")
            setattr(self, name, value)
        check_version(peft_spon_version, "config.json: quantization_config.peft_spon_version")
        if fields_checksum({"layers": layers, "weights": weights}) != checksum:
            raise ValueError(f"config.json: quantization_config is not as it was saved; {REPAIR}")
        unknown = set(kwargs)
        for entry in layers.values():
            unknown |= set(entry) - ENTRY
        if unknown:
            logger.warning(
                f"config.json has {sorted(unknown)}, which peft_spon {__version__} does not know and leaves out; it "
                f"was written by peft_spon {peft_spon_version}."
            )


REPAIR = "the file is damaged or was edited; save the merged model again."


def describe(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> SponMergedConfig:
    """The `quantization_config` of a merged model as it is now.

    Args:
        model (`torch.nn.Module`): a model with `SparseMixin` layers.
        state_dict (`dict`, *optional*): its tensors, where they are gathered from several processes.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMixin)}
    entries = {name: layer_entry(layer) for name, layer in layers.items()}
    names = [name for name, _ in model.named_parameters()]
    held = dict(model.named_parameters()) if state_dict is None else state_dict
    readable = {name: held[name] for name in names if name in held and is_readable(held[name])}
    weights = {name: fingerprint(tensor) for name, tensor in readable.items()}
    checksum = fields_checksum({"layers": entries, "weights": weights})
    return SponMergedConfig(entries, weights, checksum, __version__)


def is_readable(tensor: torch.Tensor) -> bool:
    """False for weights that are sharded, offloaded or quantised."""
    return not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.is_floating_point() and tensor.numel() > 0


def layer_entry(layer: SparseMixin) -> dict[str, Any]:
    settings = layer.spon_settings
    return {
        "criterion": settings.criterion.name,
        "criterion_kwargs": asdict(settings.criterion),
        "sparsity": settings.sparsity,
        "prefill": settings.prefill,
        "calibrated": settings.calibrated,
        # Also here: JSON holds every bit, while transformers 4 casts tensors to the dtype of the model.
        "threshold": None if layer.spon_threshold is None else layer.spon_threshold.item(),
        "state": list(own_tensors(layer)),
        "checksum": tensors_checksum(own_tensors(layer)),
    }


def own_tensors(layer: SparseMixin) -> dict[str, torch.Tensor]:
    """What SPON stores beside the weight of a layer."""
    return {name: getattr(layer, name) for name in STATE if getattr(layer, name) is not None}


# ---- saving ------------------------------------------------------------------------------------------------------


def prepare_saving(model: nn.Module) -> None:
    """Let a merged transformers model save itself with `save_merged`; does nothing for other modules."""
    if isinstance(model, PreTrainedModel) and any(isinstance(layer, SparseMixin) for layer in model.modules()):
        # On the instance: the model stays of its plain class.
        model.save_pretrained = partial(save_merged, model)
        keep_card_on_hub(model, partial(merged_card_for_hub, model))
        if quantized_layer(model) is None:
            model.config.quantization_config = describe(model)


def merged_card_for_hub(model: PreTrainedModel, folder: str, name: str) -> None:
    """Write the card, unless only adapters on top of the merged model were saved."""
    if Path(folder, "config.json").exists():
        merged_card(folder, model.config, name)


def quantized_layer(model: nn.Module) -> str | None:
    """Name of a sparse layer whose weight is not plain floating point, or None."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMixin)}
    return next((name for name, layer in layers.items() if not has_plain_weight(layer)), None)


def save_merged(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """
    `save_pretrained` of a merged model: transformers' own, its files written aside and moved into place.

    The old `config.json` goes first and the new one comes last, so that a folder whose saving was interrupted does
    not load at all.

    Args:
        model (`PreTrainedModel`): the merged model.
        save_directory (`str`): folder, created if need be.
        is_main_process (`bool`, *optional*, defaults to `True`): `False`: nothing is written by this process.
        push_to_hub (`bool`, *optional*, defaults to `False`): push to `repo_id` after that.
        kwargs: all other arguments of transformers' `save_pretrained`.

    Raises:
        `ValueError`: a quantised base, whose configuration has no room for S; weights as pickles; a folder that holds
            an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapters on top are saved
        return type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)
    if (name := quantized_layer(model)) is not None:
        raise ValueError(
            f"'{name}' is quantised, and a quantised checkpoint has no room for S and the anchors: it would load "
            "without them in silence. Keep the adapter (save_pretrained before merging) and merge after loading, or "
            "merge into the base model in bf16."
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "A part of the model is wrapped by torch.compile, which changes the names of what would be saved, so that "
            "it would not load; compile in place instead: part.compile()."
        )
    if not kwargs.get("safe_serialization", True):
        raise ValueError("safe_serialization=False writes pickles; merged SPON models are saved as safetensors only.")
    folder = Path(save_directory)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"'{folder}' holds an adapter (adapter_config.json), and from_pretrained would load that instead of the "
            "merged model; choose another folder."
        )
    plain = type(model).save_pretrained
    model.config.quantization_config = describe(model, kwargs.get("state_dict"))
    if not is_main_process:
        return plain(model, folder, is_main_process=False, **kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".spon-saving-*"):
        shutil.rmtree(left_over)
    hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
    with tempfile.TemporaryDirectory(prefix=".spon-saving-", dir=folder) as aside:
        plain(model, aside, **kwargs)
        merged_card(aside, model.config, folder.name)
        move_into_place(Path(aside), folder, kwargs.get("variant"))
    if push_to_hub:
        token = {"token": kwargs["token"]} if "token" in kwargs else {}
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub, **token)


def move_into_place(aside: Path, folder: Path, variant: str | None) -> None:
    """Move all files of `aside` into `folder`: the old config goes first, the new one comes last."""
    (folder / "config.json").unlink(missing_ok=True)
    new = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
    stem = "model" if variant is None else rf"model\.{re.escape(variant)}"
    stale = re.compile(
        rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index(\..+)?\.json)?|model\.safetensors\.index.*json"
    )
    for path in folder.iterdir():
        if stale.fullmatch(path.name) and Path(path.name) not in new:
            path.unlink()
    rank = {".safetensors": 0}
    for name in sorted(new, key=lambda name: (name.name == "config.json", rank.get(name.suffix, 1), str(name))):
        if str(name) == "README.md" and replaceable_card(folder) is None:
            continue  # somebody's own card
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)


# ---- loading -----------------------------------------------------------------------------------------------------


class SponQuantizer(HfQuantizer):
    """Makes the layers of a model that is being loaded sparse, before its weights come, and checks it after that."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, entry in self.quantization_config.layers.items():
            layer = find_layer(model, name)
            if layer is None:
                continue
            settings, names = read_entry(name, entry)
            sizes = {"spon_threshold": 1, "spon_shift": layer_sizes(layer)[1]}
            device = layer.weight.device
            state = {
                part: torch.full((sizes.get(part, layer_sizes(layer)[0]),), torch.nan, device=device) for part in names
            }
            make_sparse(layer, settings, {part: tensor.float() for part, tensor in state.items()})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        where = model.name_or_path or "the folder"
        layers = {name: layer for name in config.layers if (layer := find_layer(model, name)) is not None}
        was_cast = False
        for name, layer in layers.items():
            for part in STATE:
                value = getattr(layer, part)
                if value is not None and value.dtype != torch.float32:
                    # transformers 4 casts all that it loads to the dtype of the model.
                    was_cast = was_cast or value.dtype == model.dtype
                    setattr(layer, part, value.float())
            threshold = config.layers[name]["threshold"]
            if was_cast and threshold is not None:
                layer.spon_threshold.fill_(threshold)
        problem = find_problem(model, config, layers, exact=not was_cast)
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


def read_entry(name: str, entry: dict[str, Any]) -> tuple[LayerSettings, list[str]]:
    """Settings of a layer and the names of its buffers.

    Raises:
        `ValueError`: naming the layer.
    """
    try:
        check_sparsity(entry["sparsity"], {})
        check_prefill(entry["prefill"])
        criterion = make_criterion(entry["criterion"], entry["criterion_kwargs"])
        settings = LayerSettings(criterion, entry["sparsity"], entry["prefill"], "output", bool(entry["calibrated"]))
        needed = {"spon_threshold": settings.uses_threshold, "spon_column_scale": criterion.uses_column_norms}
        wrong = [part for part, needs in needed.items() if needs != (part in entry["state"])]
        if wrong or not set(entry["state"]) <= set(STATE):
            raise ValueError(f"state is {entry['state']}, which does not fit criterion {criterion.name!r}.")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json: layer '{name}': {error} {REPAIR.capitalize()}") from None
    return settings, entry["state"]


def find_problem(
    model: PreTrainedModel, config: SponMergedConfig, layers: dict[str, SparseMixin], exact: bool
) -> str | None:
    """What is wrong with a model that was just loaded: values not finite, or not those that were saved. Or None."""
    for name, layer in layers.items():
        own = own_tensors(layer)
        is_finite = all(not value.is_meta and torch.isfinite(value).all() for value in own.values())
        if not is_finite or (exact and tensors_checksum(own) != config.layers[name]["checksum"]):
            return (
                f"layer '{name}': {', '.join(own)} in the safetensors files are not those that were saved with this "
                "config.json; one is missing, damaged, or of another model. Save the merged model again."
            )
    for name, parameter in model.named_parameters():
        saved = next((config.weights[n] for n in names_across_heads(model, name) if n in config.weights), None)
        is_whole = not isinstance(parameter, DTensor) and not parameter.is_meta
        if saved is None or not is_whole:
            continue
        dtype, shape, _ = f"{saved}  ".split(" ")[:3]
        saved_dtype = getattr(torch, dtype, None)
        if not isinstance(saved_dtype, torch.dtype):
            return f"config.json: the fingerprint of weight '{name}' is {saved!r}; {REPAIR}"
        is_float = parameter.is_floating_point()
        is_cast_down = is_float and torch.promote_types(saved_dtype, parameter.dtype) != parameter.dtype
        resized = shape != "x".join(str(size) for size in parameter.shape)
        is_saved = is_float and fingerprint(parameter, saved_dtype) == saved
        if not is_saved and not is_cast_down and not resized:
            return (
                f"weight '{name}' is not the one that was saved: it is missing in the safetensors files (see the "
                "loading report above), damaged, or of another model."
            )
    return None
