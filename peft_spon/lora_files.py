# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of a LoRA that lies beneath SPON: which one a SPON adapter belongs to, loading both, saving the LoRA alone."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .checksums import fields_checksum, tensors_checksum
from .config import SponConfig
from .lora import (
    LORA_NAME,
    active_lora,
    apply_trainable,
    check_lora,
    check_trainable,
    expect,
    lora_layers,
    lora_names,
    moves_weights,
    restored_on_error,
    set_trainable,
    trainable_choice,
)
from .repair import REPAIR_LORA
from .sites import spon_layers


# What of `PeftModel.from_pretrained` says where on the Hub something is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# Fields of a `LoraConfig` that decide what is computed with given tensors.
LORA_FIELDS = (
    "task_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_bias",
    "lora_dropout",
    "use_qalora",
    "qalora_group_size",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "ensure_weight_tying",
    "megatron_config",
)


# ---- which LoRA a SPON adapter belongs to ------------------------------------------------------------------------
#
# Nothing is added to the files of a LoRA, which stays plain: the configuration of the SPON adapter that is saved over
# it names it by checksums of its tensors and of the fields that compute.


def lora_checksums(model: nn.Module, spon_tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, str]] | None:
    """
    What the configuration of a SPON adapter that is being saved says of the LoRAs beneath.

    Args:
        model (`torch.nn.Module`): the model that is saved.
        spon_tensors (`Mapping[str, torch.Tensor]`): the SPON adapter's part of the state dict, keys as in the model.

    Returns:
        `dict[str, dict[str, str]]`: name to checksums; `{}`: there is no LoRA. None: cannot be told, since what is
            saved is not what this process holds (sharded, or a state dict of the caller's own).
    """
    names = lora_names(model.peft_config)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())} if names else {}
    if names and not all(key in held and is_same(value, held[key]) for key, value in spon_tensors.items()):
        return None
    state = partial(get_peft_model_state_dict, model, None, save_embedding_layers=False)
    return {name: checksums_of(model.peft_config[name], state(name)) for name in names}


def is_same(saved: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a tensor that is saved has the values, shape and dtype of one in the model."""
    if isinstance(saved, DTensor) or isinstance(held, DTensor) or saved.is_meta or held.is_meta:
        return False
    return saved.dtype == held.dtype and torch.equal(saved.to(held.device), held)


def checksums_of(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Checksums of a LoRA, in memory or as it was read: of its tensors, and of the fields that compute."""
    fields = config.to_dict()
    computing = {name: fields.get(name) for name in LORA_FIELDS}
    for name, value in computing.items():
        if isinstance(value, (list, tuple, set)):  # from a file, a set comes in any order
            computing[name] = sorted(value, key=str)
    own = {key: value for key, value in tensors.items() if is_own(key, config)}
    return {"fields": fields_checksum(computing), "tensors": tensors_checksum(own)}


def is_own(key: str, config: LoraConfig) -> bool:
    """Whether a tensor in the file of a LoRA is LoRA's or of its `modules_to_save`: neither of the base's."""
    return ".lora_" in key or any(f".{name}." in key for name in config.modules_to_save or [])


class SavedLora:
    """
    A LoRA as it lies in a folder or on the Hub, read before anything goes into a model.

    Args:
        folder (`str`): folder or Hub id.
        name (`str`): what the LoRA is or will be called.
        subfolder (`str`, *optional*): inside `folder`.
        hub (`dict[str, Any]`): where on the Hub: `revision`, `token`, ...

    Raises:
        `ValueError`: files that cannot be read, or a LoRA that cannot lie beneath SPON.
    """

    def __init__(self, folder: str | os.PathLike, name: str, subfolder: str | None, hub: dict[str, Any]):
        self.where = "/".join([os.fspath(folder), *([subfolder] if subfolder else [])])
        self.name, self.is_chosen = name, subfolder is None
        place = {**hub, "subfolder": subfolder}
        self.config = self._read(CONFIG_NAME, PeftConfig.from_pretrained, os.fspath(folder), **place)
        check_lora(self.config, name)
        self.tensors = self._read(SAFETENSORS_WEIGHTS_NAME, load_peft_weights, os.fspath(folder), "cpu", **place)
        self.checksums = checksums_of(self.config, self.tensors)

    def _read(self, file: str, read: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(*args, **kwargs)
        except OSError:  # not found, no network: their own words
            raise
        except Exception as error:  # whatever PEFT and the parsers raise for files that are not what they expect
            cause = "" if error.__cause__ is None else f": {error.__cause__}"
            raise ValueError(
                f"The LoRA's {self.where}/{file} is missing, damaged or incomplete ({type(error).__name__}: "
                f"{error}{cause}); save or download it again."
            ) from error

    def check_tensors(self, model: nn.Module) -> None:
        """Raises `ValueError` for tensors that PEFT would load over those of the base."""
        strange = [key for key in self.tensors if not is_own(key, self.config)]
        if strange and isinstance(model, PreTrainedModel):
            # PEFT saves the embeddings along, where they are targets or were resized.
            embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
            along = tuple(f"base_model.model.{name}." for name, part in model.named_modules() if part in embeddings)
            strange = [key for key in strange if not key.startswith(along)]
        if strange:
            raise ValueError(
                f"{self.where}/{SAFETENSORS_WEIGHTS_NAME} has '{strange[0]}', which is not of the LoRA and would "
                "overwrite the base's; save or download the LoRA again."
            )

    def check_belongs(self, spon: str | os.PathLike, named: dict[str, dict[str, str]] | None) -> None:
        """Raises `ValueError` unless it is the LoRA that the SPON adapter in `spon` names; None: names none, older."""
        if named is None or (not named and self.is_chosen):
            return
        candidates = [wanted for name, wanted in named.items() if self.is_chosen or name == self.name]
        differ = [self._differs(wanted) for wanted in candidates]
        if None in differ:
            return
        where = f"{self.where}/{differ[0]}" if len(differ) == 1 else self.where
        was = f"the LoRAs {sorted(named)}" if named else "no LoRA"
        raise ValueError(
            f"{where} is not what the SPON adapter {spon} was saved with ({was}): it is damaged, of another saving "
            "(the last one may have been interrupted), or was trained further. Save the model again, or give the LoRA "
            "that belongs to it as lora. To combine the two on purpose: "
            "model = PeftModel.from_pretrained(base, spon); "
            "add_lora(model, LoraConfig.from_pretrained(lora), 'name'); model.load_adapter(lora, 'name')."
        )

    def _differs(self, wanted: dict[str, str]) -> str | None:
        """The file that is not what these checksums are of, or None."""
        files = {"tensors": SAFETENSORS_WEIGHTS_NAME, "fields": CONFIG_NAME}
        return next((file for part, file in files.items() if wanted.get(part) != self.checksums[part]), None)


def named_loras(spon: str | os.PathLike, **hub: Any) -> dict[str, dict[str, str]] | None:
    """What a saved SPON adapter says of its LoRAs, see `lora_checksums`.

    Raises:
        `ValueError`: it is no SPON adapter.
    """
    config = SponConfig.from_pretrained(spon, **hub)
    if not isinstance(config, SponConfig):
        raise ValueError(
            f"{spon} is given as the SPON adapter, but its {CONFIG_NAME} has peft_type={config.peft_type.value!r}. "
            "Give a SPON adapter there, and the LoRA behind it: load_with_lora(model, spon, lora)."
        )
    return (config.checksums or {}).get("loras")


# ---- loading and saving ------------------------------------------------------------------------------------------


def load_loras_along(
    load: Callable, model: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`load(model, checkpoint, "default")`, and with it all LoRAs of a checkpoint that Trainer has written.

    That is all that its `load_best_model_at_end` calls: the best anchors would end up over the last LoRA. Any other
    folder is loaded by `load` alone.
    """
    configs = model.peft_config
    given = Path(model_id)
    checkpoint = next((path for path in (given, given.parent) if (path / "trainer_state.json").exists()), None)
    if checkpoint is None or adapter_name not in configs or adapter_name in lora_names(configs):
        return load(model, model_id, adapter_name, *args, **kwargs)

    def place(name: str) -> Path:
        inside = checkpoint / name
        return inside if (inside / CONFIG_NAME).exists() else checkpoint

    spon = place(adapter_name) if given == checkpoint else given
    named, names = named_loras(spon), [name for name in lora_names(configs) if place(name) != spon]
    for name in names:
        subfolder = name if place(name) != checkpoint else None
        SavedLora(checkpoint, name, subfolder, {}).check_belongs(spon, named)
    result = load(model, spon, adapter_name, *args, **kwargs)
    if given != checkpoint:  # its caller goes through the subfolders
        return result
    for name in names:
        load(model, place(name), name, **kwargs)
    choice = trainable_choice(model)
    if choice is not None and active_lora(model):
        apply_trainable(model, choice)
    return result


def load_with_lora(
    model: nn.Module,
    spon: str | os.PathLike,
    lora: str | os.PathLike | list[str | os.PathLike] | None = None,
    adapter_name: str | list[str] | None = None,
    *,
    trainable: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """
    Load a SPON adapter and a LoRA onto a plain base model, LoRA beneath.

    A SPON adapter that was saved over LoRAs names them by checksums, and only these load with it. One that was saved
    without a LoRA, or by a peft_spon that did not name them yet, loads with any LoRA that is given as `lora`.

    Args:
        model (`torch.nn.Module`): the base model; as it was, if anything cannot be loaded.
        spon (`str`): folder or Hub id of the SPON adapter.
        lora (`str` or `list[str]`, *optional*): folder or Hub id of the LoRA; default: the folder `adapter_name`
            inside `spon`, where `model.save_pretrained` puts it.
        adapter_name (`str` or `list[str]`, *optional*): name of the LoRA. Of several, each from its folder, the first
            is active. Default: `"task"`; none, where the SPON adapter was saved with a repair LoRA alone. A repair
            LoRA always comes along, from its folder inside `spon`, and is active beside the other.
        trainable (`str`, *optional*): `"lora"`, `"anchors"` or `"both"`, see [`set_trainable`]; default: neither.
        kwargs: all other arguments of `PeftModel.from_pretrained`, for both: `revision`, `token`, ...

    Returns:
        `PeftModel`: with the SPON adapter `"default"`.

    Raises:
        `ValueError`: a model that has adapters already, as many folders as names are not given, damaged files, two
            that do not belong together, something else than a SPON adapter as `spon`, a LoRA that cannot lie beneath
            SPON. `OSError`: files that are not there.
        `TypeError`: arguments in another order.
    """
    call, paths = "load_with_lora(model, spon, lora)", (str, os.PathLike)
    expect(call, "model", model, nn.Module, "the base model")
    expect(call, "spon", spon, paths, "folder or Hub id of the SPON adapter")
    expect(call, "lora", lora, (*paths, list, type(None)), "folder or Hub id of the LoRA")
    expect(call, "adapter_name", adapter_name, (str, list, type(None)), "the LoRA's name")
    if trainable is not None:
        check_trainable(trainable)
    if isinstance(model, PeftModel) or spon_layers(model) or lora_layers(model):
        raise ValueError(
            "The model has adapters already, and this loads onto a plain base. Give it the base. Another LoRA "
            "beneath SPON: add_lora(model, LoraConfig.from_pretrained(folder), n); model.load_adapter(folder, n)."
        )
    hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    named, move = named_loras(spon, **hub), False
    if adapter_name is None:
        adapter_name = [] if lora is None and set(named or []) == {REPAIR_LORA} else LORA_NAME
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    given = list(lora) if isinstance(lora, list) else [lora]
    folders = [spon] * len(names) if lora is None else given
    if len(folders) != len(names):
        raise ValueError(f"lora has {len(folders)} entries and adapter_name {names}; give one name for each.")
    places = [{"subfolder": name} if lora is None else {} for name in names]
    if REPAIR_LORA in (named or []) and REPAIR_LORA not in names:
        names, folders, places = [*names, REPAIR_LORA], [*folders, spon], [*places, {"subfolder": REPAIR_LORA}]
    for folder, name, place in zip(folders, names, places, strict=True):
        saved = SavedLora(folder, name, place.get("subfolder"), hub)
        saved.check_belongs(spon, named)
        saved.check_tensors(model)
        move = move or moves_weights(saved.config)
    with restored_on_error(model, move):
        loaded = PeftModel.from_pretrained(model, folders[0], names[0], **places[0], **kwargs)
        for folder, name, place in zip(folders[1:], names[1:], places[1:], strict=True):
            loaded.load_adapter(folder, name, **place, **kwargs)
        loaded = PeftModel.from_pretrained(loaded, spon, **kwargs)
        if REPAIR_LORA in names:
            loaded.base_model.set_adapter(REPAIR_LORA, inference_mode=not kwargs.get("is_trainable", False))
        if trainable is not None:
            set_trainable(loaded, trainable)
    return loaded
