# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A SPON adapter and its LoRAs, loaded together."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from ..repair import REPAIR_LORA
from ..sites import spon_layers
from .adapters import LORA_NAME, active_lora, lora_layers, lora_names
from .adding import moves_weights, restored_on_error
from .belonging import SavedLora, named_loras
from .checks import expect
from .trained import apply_trainable, check_trainable, set_trainable, trainable_choice


# What of `PeftModel.from_pretrained` says where on the Hub something is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


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
