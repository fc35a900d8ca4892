# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints: what `merge_and_unload` gives, saved and loaded by transformers' own methods.

The folder holds the base's `weight` and `bias` tensors untouched, what SPON adds beside them (`spon_shift` and the
other buffers of [`SparseMixin`]), and in `config.json` a `quantization_config` with `quant_method: "spon"`, through
which transformers finds the loader in [`merged_loading`]. A program without peft_spon warns that it does not know the
method, ignores the additional tensors and has the dense base model.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._version import __version__
from .base_layer import has_plain_weight
from .cards import keep_card_on_hub, merged_card, replaceable_card
from .checksums import fields_checksum, in_threads, tensors_checksum, weight_hashes
from .config import check_version
from .decode import prepare_for_decode, restore_from_decode
from .files import move_into_place, written_aside
from .prefill import follow_prompts, layers_with_prefill
from .results import known_results
from .sparse_linear import SparseMixin


logger = logging.get_logger(__name__)

METHOD = "spon"
ENTRY = {"criterion", "criterion_kwargs", "sparsity", "prefill", "calibrated", "threshold", "state", "checksum"}


class SponMergedConfig(QuantizationConfigMixin):
    """
    The `quantization_config` of a merged checkpoint, written by `save_pretrained`.

    Args:
        layers (`dict[str, dict]`): per sparse layer what S is, and which buffers are stored.
        weights (`dict[str, str]`): what peft_spon 0.1 and 0.2 know of the base's weights; else empty.
        checksum (`str`): of `layers` and `weights`.
        peft_spon_version (`str`): version that wrote the checkpoint.
        hashes (`dict[str, dict]`, *optional*): of every parameter and of what SPON adds, see `weight_hashes`; None for
            what the saving process could not read (sharded, without a gathered state dict).
        model_class (`str`, *optional*): of the saved model: where it is loaded as that, no parameter may be new.

    Raises:
        `ValueError`: a field is missing, has a wrong value, or comes from a newer version.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        weights: dict[str, str] | None = None,
        checksum: str | None = None,
        peft_spon_version: str | None = None,
        hashes: dict[str, dict[str, Any] | None] | None = None,
        model_class: str | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        self.quant_method = METHOD
        found = {"layers": layers, "weights": weights, "checksum": checksum, "peft_spon_version": peft_spon_version}
        for name, value in found.items():
            if not isinstance(value, dict if name in ("layers", "weights") else str):
                raise ValueError(f"config.json: quantization_config.{name} is {value!r}; {SAVE_AGAIN}")
            setattr(self, name, value)
        check_version(peft_spon_version, "config.json: quantization_config.peft_spon_version")
        if fields_checksum({"layers": layers, "weights": weights}) != checksum:
            raise ValueError(f"config.json: quantization_config is not as it was saved; {SAVE_AGAIN}")
        for name, entry in check_hashes(hashes, weights).items():
            if entry is not None and not is_hash_entry(entry):
                raise ValueError(f"config.json: quantization_config.hashes of '{name}' is {entry!r}; {SAVE_AGAIN}")
        if not isinstance(model_class, str if hashes else (str, type(None))):
            raise ValueError(f"config.json: quantization_config.model_class is {model_class!r}; {SAVE_AGAIN}")
        self.hashes, self.model_class = hashes, model_class
        unknown = set(kwargs)
        for entry in layers.values():
            unknown |= set(entry) - ENTRY
        if unknown:
            logger.warning(
                f"config.json has {sorted(unknown)}, which peft_spon {__version__} does not know and leaves out; it "
                f"was written by peft_spon {peft_spon_version}."
            )


SAVE_AGAIN = "the file is damaged or was edited; save the merged model again."


def check_hashes(hashes: Any, weights: dict[str, str]) -> dict[str, Any]:
    """The hashes, or none for a checkpoint of peft_spon 0.1 or 0.2. Raises `ValueError` if they are no dictionary."""
    if hashes is None and weights:
        return {}
    if not isinstance(hashes, dict):
        raise ValueError(f"config.json: quantization_config.hashes is {hashes!r}; {SAVE_AGAIN}")
    return hashes


def is_hash_entry(entry: Any) -> bool:
    """True for what `weight_hashes` gives."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "hashes"}:
        return False
    is_dtype = isinstance(entry["dtype"], str) and isinstance(getattr(torch, entry["dtype"], None), torch.dtype)
    return is_dtype and isinstance(entry["shape"], list) and isinstance(entry["hashes"], dict)


def describe(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None, hashed: bool = True
) -> SponMergedConfig:
    """The `quantization_config` of a merged model as it is now.

    Args:
        model (`torch.nn.Module`): a model with `SparseMixin` layers.
        state_dict (`dict`, *optional*): its tensors, where they are gathered from several processes.
        hashed (`bool`, *optional*, defaults to `True`): `False`: without the hashes, which cost 2 s per GB and thread;
            such a configuration is not for files.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMixin)}
    entries = {name: layer_entry(layer) for name, layer in layers.items()}
    hashes = dict(in_threads(hash_named, hashed_tensors(model, state_dict))) if hashed else {}
    checksum = fields_checksum({"layers": entries, "weights": {}})
    return SponMergedConfig(entries, {}, checksum, __version__, hashes, type(model).__name__)


def hash_named(named: tuple[str, torch.Tensor | None]) -> tuple[str, dict[str, Any] | None]:
    name, tensor = named
    return name, None if tensor is None else weight_hashes(tensor)


def hashed_names(model: nn.Module) -> list[str]:
    """Names of all parameters, of tied ones all names, and of what SPON adds."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return names + [
        name for name, _ in model.named_buffers(remove_duplicate=False) if name.rpartition(".")[2].startswith("spon_")
    ]


def hashed_tensors(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The tensors of these names, offloaded ones read one after the other; None for those that cannot be read."""
    for name in hashed_names(model):
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = getattr(module, own_name) if state_dict is None else state_dict.get(name)
        if state_dict is None and tensor.is_meta:
            with align_module_device(module):
                tensor = getattr(module, own_name)
        is_whole = tensor is not None and not isinstance(tensor, DTensor) and not tensor.is_meta
        yield name, tensor if is_whole else None


def layer_entry(layer: SparseMixin) -> dict[str, Any]:
    settings, own = layer.spon_settings, layer.own_tensors()
    sparsifier = settings.sparsifier
    return {
        "criterion": sparsifier.criterion.name,
        "criterion_kwargs": asdict(sparsifier.criterion),
        "sparsity": sparsifier.sparsity,
        "prefill": settings.prefill,
        "calibrated": sparsifier.calibrated,
        # Also here: JSON holds every bit, while transformers 4 casts tensors to the dtype of the model.
        "threshold": own["spon_threshold"].item() if "spon_threshold" in own else None,
        "state": list(own),
        "checksum": tensors_checksum(own),
    }


def prepare_saving(model: nn.Module) -> None:
    """Let a merged transformers model save itself with `save_merged`; does nothing for other modules."""
    if isinstance(model, PreTrainedModel) and any(isinstance(layer, SparseMixin) for layer in model.modules()):
        # On the instance: the model stays of its plain class.
        model.save_pretrained = partial(save_merged, model)
        model.prepare_for_decode = partial(prepare_for_decode, model)
        model.restore_from_decode = partial(restore_from_decode, model)
        keep_card_on_hub(model, partial(merged_card_for_hub, model))
        if layers_with_prefill(model):
            follow_prompts(model)
        if quantized_layer(model) is None:
            model.config.quantization_config = describe(model, hashed=False)


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
    if not is_main_process:
        return plain(model, folder, is_main_process=False, **kwargs)
    model.config.quantization_config = describe(model, kwargs.get("state_dict"))
    hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
    with written_aside(folder) as aside:
        plain(model, aside, **(kwargs | unshared_state(model, kwargs.get("state_dict"))))
        merged_card(aside, model.config, folder.name, known_results(model, None))
        if replaceable_card(folder) is None:  # somebody's own
            (aside / "README.md").unlink()
        move_into_place(aside, folder, "config.json", is_stale=weights_of(kwargs.get("variant")).fullmatch)
    model.config.quantization_config = describe(model, hashed=False)  # of what may be trained from here on
    if push_to_hub:
        token = {"token": kwargs["token"]} if "token" in kwargs else {}
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub, **token)


def unshared_state(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    """The `state_dict` to save where layers share tensors of S, with copies of these: transformers refuses them."""
    held = model.state_dict() if state_dict is None else state_dict
    ours = {name: tensor for name, tensor in held.items() if ".spon_" in name and not tensor.is_meta}
    first = {tensor.data_ptr(): name for name, tensor in reversed(ours.items())}
    copies = {name: tensor.clone() for name, tensor in ours.items() if first[tensor.data_ptr()] != name}
    return {"state_dict": {**held, **copies}} if copies else {}


def weights_of(variant: str | None) -> re.Pattern:
    """What the files of a model's weights can be called."""
    stem = "model" if variant is None else rf"model\.{re.escape(variant)}"
    return re.compile(
        rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index(\..+)?\.json)?|model\.safetensors\.index.*json"
    )
