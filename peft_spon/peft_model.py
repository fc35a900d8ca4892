# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of a model with SPON adapters: PEFT's own methods, with what is checked around them.

They are put on the instance: models without SPON, and PEFT's classes, are not touched.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from .cards import keep_card_on_hub, without_local_base
from .config import SponConfig, adapter_card_for_hub
from .loading import find_file_problem, module_keys, undo_load
from .lora import HUB_ARGUMENTS, load_loras_along
from .sites import is_new, plain_name, spon_layers


def save_and_load_checked(tuner: BaseTuner) -> None:
    """Put [`save_adapters`] and [`load_adapter`] on the `PeftModel` that is made around a tuner.

    Where there is none (transformers' `add_adapter`), the transformers model refuses pickles.
    """
    inner, found = tuner.model, weakref.ref(tuner)
    if isinstance(inner, PreTrainedModel):
        inner.save_pretrained = partial(save_injected, inner)

    def registered(module: nn.Module, name: str, child: nn.Module) -> None:
        if child is not found():
            return
        handle.remove()
        vars(inner).pop("save_pretrained", None)
        if isinstance(module, PeftModel):
            module.save_pretrained = partial(save_adapters, module)
            module.load_adapter = partial(load_adapter, module)
            keep_card_on_hub(module, adapter_card_for_hub)

    # PEFT does not tell a tuner about the model that it makes around it; torch tells who gets it as a child.
    handle = register_module_module_registration_hook(registered)
    weakref.finalize(tuner, handle.remove)


def save_adapters(
    model: PeftModel,
    save_directory: str | os.PathLike,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """
    `PeftModel.save_pretrained` of a model with SPON adapters.

    Args:
        model (`PeftModel`): the model.
        save_directory (`str`): folder, created if need be.
        safe_serialization (`bool`, *optional*, defaults to `True`): `False` is for LoRAs alone.
        selected_adapters (`list[str]`, *optional*): default: all.
        args, kwargs: all other arguments of PEFT's method.

    Raises:
        `ValueError`: a SPON adapter as a pickle; nothing is written then.
    """
    names = model.peft_config if selected_adapters is None else selected_adapters
    if any(isinstance(model.peft_config.get(name), SponConfig) for name in names):
        check_no_pickle(safe_serialization)
    type(model).save_pretrained(model, save_directory, safe_serialization, selected_adapters, *args, **kwargs)
    if Path(save_directory, "README.md").exists():  # PEFT's, where only adapters in subfolders are saved
        without_local_base(save_directory)


def save_injected(model: PreTrainedModel, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> Any:
    """`save_pretrained` of a transformers model, refusing pickles of a SPON adapter that it has."""
    if spon_layers(model):
        check_no_pickle(safe_serialization)
        kwargs = kwargs if safe_serialization else {"safe_serialization": False, **kwargs}
    return type(model).save_pretrained(model, *args, **kwargs)


def check_no_pickle(safe_serialization: bool) -> None:
    """Raises `ValueError` unless safetensors are asked for."""
    if not safe_serialization:
        raise ValueError(
            "safe_serialization=False writes pickles; SPON adapters are saved as safetensors only. Leave it out. "
            "Nothing was written."
        )


def load_adapter(model: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """
    `PeftModel.load_adapter` of a model with SPON adapters.

    What is loaded over an adapter that is there (Trainer resumes so) is checked as in `PeftModel.from_pretrained`;
    what cannot be loaded leaves the model as it was.

    Args:
        model (`PeftModel`): the model.
        model_id (`str`): folder or Hub id.
        adapter_name (`str`): new, or one of the model's.
        args, kwargs: all other arguments of PEFT's method.

    Raises:
        `ValueError`: naming the file that is missing, damaged, or of something else.
    """
    return load_loras_along(_load_checked, model, model_id, adapter_name, *args, **kwargs)


def _load_checked(model: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    plain, known = type(model).load_adapter, model.peft_config.get(adapter_name)
    is_made_for_this = is_new(model, adapter_name)
    if known is not None and not isinstance(known, SponConfig):
        return plain(model, model_id, adapter_name, *args, **kwargs)  # a LoRA beneath
    try:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if folder.is_dir() and (problem := find_file_problem(folder)):
            raise ValueError(problem)
        if known is not None:
            if known.checksums is None:  # it was not made for this load
                known.checksums = checksums_beside(model_id, known, adapter_name, kwargs)
            known._sizes_are_fixed = not kwargs.get("ignore_mismatched_sizes")
        with errors_named(model, model_id, adapter_name):
            return plain(model, model_id, adapter_name, *args, **kwargs)
    except BaseException:
        if is_made_for_this:
            undo_load(model, adapter_name)
        raise
    finally:
        if known is not None:
            known.checksums, known._sizes_are_fixed = None, False


def checksums_beside(
    model_id: str | os.PathLike, known: SponConfig, adapter_name: str, kwargs: dict[str, Any]
) -> dict[str, str] | None:
    """The checksums of the tensors in a folder or on the Hub, None for an old file; read where PEFT does not look.

    Raises:
        `ValueError`: there is no configuration, or it is damaged, or of an adapter that computes something else.
    """
    where = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "subfolder") if key in kwargs}
    saved = SponConfig.from_pretrained(model_id, **where)
    if not isinstance(saved, SponConfig):
        raise ValueError(f"{model_id} holds a {saved.peft_type} adapter, and {adapter_name!r} is SPON; name another.")
    for name in ("criterion", "criterion_kwargs", "anchor_space"):
        if getattr(saved, name) != getattr(known, name):
            raise ValueError(
                f"{CONFIG_NAME}: {name} is {getattr(saved, name)!r}, and adapter {adapter_name!r} has "
                f"{getattr(known, name)!r} here. Load the file under another name."
            )
    return saved.checksums


@contextmanager
def errors_named(model: PeftModel, model_id: str | os.PathLike, adapter_name: str) -> Iterator[None]:
    """What PEFT and safetensors raise without the file's name, as `ValueError`s with it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{SAFETENSORS_WEIGHTS_NAME} of {model_id} is damaged or incomplete ({error}); download or save it again."
        ) from None
    except KeyError as error:
        key = str(error.args[0])
        if plain_name(key) not in module_keys(model, adapter_name):
            raise
        raise ValueError(
            f"{SAFETENSORS_WEIGHTS_NAME} of {model_id} has no '{key}', which modules_to_save in {CONFIG_NAME} "
            "promises: the file is incomplete. Save or download the adapter again."
        ) from None
