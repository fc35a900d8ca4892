# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Which LoRA a saved SPON adapter belongs to.

Nothing is added to the files of a LoRA, which stays plain: the configuration of the SPON adapter that is saved over it
names it by checksums of its tensors and of the fields that compute.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..checksums import fields_checksum, tensors_checksum
from ..config import SponConfig
from .adapters import lora_names
from .checks import check_lora


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
