# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A LoRA alone, saved at the top of a folder or repository, as PEFT loads it onto the plain base."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..cards import lora_card
from ..files import move_into_place, written_aside
from .adapters import LORA_NAME, lora_names
from .checks import expect


def save_lora(
    model: PeftModel,
    save_directory: str | os.PathLike,
    adapter_name: str = LORA_NAME,
    *,
    repo_id: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Save a LoRA alone, at the top of a folder: what PEFT loads onto the plain base, with or without peft_spon.

    Writes the LoRA's weights, configuration and card, and uploads these three, whatever else lies in the folder. While
    it writes over an earlier LoRA, the folder holds no configuration, so that a mixture never loads.

    Args:
        model (`PeftModel`): a model with SPON and LoRA.
        save_directory (`str`): folder, created if need be.
        adapter_name (`str`, *optional*, defaults to `"task"`): which LoRA.
        repo_id (`str`, *optional*): also push the LoRA to this repository on the Hub.
        kwargs: of `HfApi.create_repo`, for `repo_id`: `private`, `token`.

    Raises:
        `ValueError`: there is no LoRA of that name; the folder or the repository holds a model or another kind of
            adapter, which the LoRA would overwrite. Nothing is written then.
        `TypeError`: arguments in another order.
    """
    call = "save_lora(model, save_directory)"
    expect(call, "model", model, PeftModel, "the PeftModel with SPON and LoRA")
    expect(call, "save_directory", save_directory, (str, os.PathLike), "a folder")
    if adapter_name not in lora_names(model.peft_config):
        raise ValueError(f"There is no LoRA {adapter_name!r}; the model has {lora_names(model.peft_config)}.")
    folder, find_there = Path(save_directory), partial(_from_hub, repo_id, kwargs.get("token"))
    check_room(str(folder), lambda name: folder / name if (folder / name).is_file() else None)
    if repo_id is not None:
        check_room(repo_id, find_there)
    config, spon = model.peft_config[adapter_name], model.peft_config[model.active_adapters[0]]
    with tempfile.TemporaryDirectory() as elsewhere:
        model.save_pretrained(elsewhere, selected_adapters=[adapter_name])
        written = Path(elsewhere, "" if adapter_name == "default" else adapter_name)
        with written_aside(folder) as aside:
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                shutil.copyfile(written / name, aside / name)
            move_into_place(aside, folder, CONFIG_NAME)
        lora_card(folder, config, spon, repo_id)
        if repo_id is None:
            return
        # PEFT's empty card, if it is here, makes room for ours; one that somebody has written on the Hub stays.
        for path in written.iterdir():
            if path.name not in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                path.unlink()
        card = find_there("README.md")
        if card is not None:
            shutil.copyfile(card, written / "README.md")
        lora_card(written, config, spon, repo_id)
        api = HfApi(token=kwargs.get("token"))
        api.create_repo(repo_id, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=repo_id, folder_path=written)


def _from_hub(repo_id: str, token: str | bool | None, name: str) -> Path | None:
    """A file of a repository, or None if there is none, or no such repository yet."""
    try:
        return Path(hf_hub_download(repo_id, name, token=token))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None


def check_room(where: str, find: Callable[[str], Path | None]) -> None:
    """Raises `ValueError` if a LoRA's files would overwrite or hide what is there.

    Args:
        where (`str`): folder or repository, for the error message.
        find (`Callable`): gives the path of one of its files, or None.
    """
    if find("config.json") is not None:
        raise ValueError(f"{where} holds a model (config.json); save the LoRA into a folder of its own.")
    path = find(CONFIG_NAME)
    if path is None:
        return
    try:
        kind = json.loads(path.read_bytes())["peft_type"]
    except (ValueError, KeyError, TypeError):
        kind = "unreadable"
    if kind != PeftType.LORA.value:
        raise ValueError(
            f"{where} holds an adapter of another kind ({CONFIG_NAME}: {kind}), which the LoRA would overwrite; save "
            "the LoRA into a folder of its own."
        )
