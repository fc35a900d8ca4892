# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Models, adapters and folders by the names that a command line has for them."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from ..config import SponConfig
from ..lora import load_with_lora, named_loras
from ..merged import METHOD
from ..sites import spon_layers


Dtype = Literal["auto", "float32", "bfloat16", "float16", "checkpoint"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "checkpoint": "auto"}


def pick_device(device: str) -> str:
    """The device of a name; `"auto"`: the accelerator, if there is one."""
    if device != "auto":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def pick_dtype(dtype: str, device: str) -> Any:
    """The dtype of a name; `"auto"`: float32 on a CPU, the checkpoint's elsewhere."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "checkpoint"
    return DTYPES[dtype]


def base_and_adapter(model: str, adapter: str | None) -> tuple[str, str | None]:
    """Names of base and adapter; `model` may itself be an adapter, whose configuration names the base.

    Raises:
        `OSError`: there is no such folder. `ValueError`: an adapter that does not name its base.
    """
    for name in (model, adapter):
        if name is not None and not Path(name).exists() and not may_be_on_hub(name):
            raise FileNotFoundError(f"There is no folder {name!r}, and it is no model's name on the Hub (owner/name).")
    if adapter is not None or find_adapter_config_file(model) is None:
        return model, adapter
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise ValueError(f"{model} is an adapter that does not name its base model: --model BASE --adapter {model}.")
    if not Path(base).exists() and not may_be_on_hub(base):
        raise FileNotFoundError(
            f"{model} is an adapter of {base!r}, which is not here: --model BASE --adapter {model}."
        )
    return base, model


def may_be_on_hub(name: str) -> bool:
    """Whether a name is one that models on the Hub have."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def load_plain(name: str, dtype: str = "auto", device: str = "auto", **kwargs: Any) -> nn.Module:
    """A causal language model in evaluation mode; a merged folder is sparse."""
    device = pick_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=pick_dtype(dtype, device), **kwargs)
    except OSError as error:
        if Path(name).exists():
            raise
        raise FileNotFoundError(f"There is no folder {name!r}, and from the Hub: {error}") from error
    return model.to(device).eval()


def load_dense(model: str, adapter: str | None, dtype: str, device: str) -> nn.Module:
    """The dense base model of an adapter or of a merged folder."""
    base, _ = base_and_adapter(model, adapter)
    config = AutoConfig.from_pretrained(base)
    if is_merged(config):
        del config.quantization_config
    return load_plain(base, dtype, device, config=config)


def load_sparse(
    model: str, adapter: str | None = None, dtype: str = "auto", device: str = "auto", is_trainable: bool = False
) -> nn.Module:
    """A model with the adapter that is named, or that `model` is, or a merged model: whatever S it has; else plain."""
    base_name, adapter = base_and_adapter(model, adapter)
    base = load_plain(base_name, dtype, device)
    if adapter is None:
        return base
    if not isinstance(config := PeftConfig.from_pretrained(adapter), SponConfig):
        raise ValueError(f"{adapter} is a {config.peft_type} adapter; give a SPON adapter.")
    if loras := named_loras(adapter):
        return load_with_lora(base, adapter, adapter_name=list(loras), trainable="anchors" if is_trainable else None)
    return PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable)


def load_measured(model: str, adapter: str | None, dtype: str, device: str) -> nn.Module:
    """As [`load_sparse`]. Raises `ValueError` for a dense model."""
    loaded = load_sparse(model, adapter, dtype, device)
    if not spon_layers(loaded) and not is_merged(loaded.config):
        raise ValueError(f"{model} is a dense model; make an adapter (peft-spon train), and give that as --model.")
    return loaded


def with_adapter(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """The model, with a new SPON adapter if it has none.

    Raises:
        `ValueError`: the adapter that is there and `fields` (of [`SponConfig`]) do not agree, or a merged model.
    """
    if is_merged(model.config):
        raise ValueError("This is a merged model, whose S and anchors are part of it; give its base or its adapter.")
    given = {name: value for name, value in fields.items() if value is not None}
    if not spon_layers(model):
        return get_peft_model(model, SponConfig(task_type="CAUSAL_LM", **given))
    config = next(config for config in model.peft_config.values() if isinstance(config, SponConfig))
    if (sparsity := given.pop("sparsity", None)) is not None:
        model.set_sparsity(sparsity)
    for name, value in given.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {value!r}, but the adapter has {getattr(config, name)!r}, which stays; leave it out."
            )
    return model


def set_dial(model: nn.Module, sparsity: float) -> None:
    """Turn an adapter's dial. Raises `ValueError` for a merged model, which has none."""
    if is_merged(model.config):
        raise ValueError("The sparsity of a merged model is fixed; merge its adapter anew, or leave --sparsity out.")
    model.set_sparsity(sparsity)


def load_tokenizer(model: str, adapter: str | None = None) -> Any:
    """The tokenizer of the base model."""
    return AutoTokenizer.from_pretrained(base_and_adapter(model, adapter)[0])


def is_merged(config: Any) -> bool:
    """Whether this is the configuration of a merged SPON model."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == METHOD


def check_new(path: str | os.PathLike, force: bool, resume: bool = False, is_folder: bool = True) -> Path:
    """A path to write to. Raises `ValueError` if something is there that would be lost, or of the other kind."""
    path = Path(path)
    if is_folder and path.is_file():
        raise ValueError(f"{path} is a file, and a folder is to be written; give another --out.")
    if not is_folder and path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write, such as {path / 'result'}.")
    is_taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if is_taken and not force and not resume:
        raise ValueError(
            f"{path} exists already; give another --out, or --force to write over it. Nothing was written."
        )
    return path
