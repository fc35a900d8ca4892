# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a saved adapter before its tensors go into a model."""

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from .checksums import tensors_checksum
from .criteria import Spec
from .layer import SponLayer, plain_name


NOT_CALIBRATED = Spec(())


def own_checksum(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Checksum of SPON's tensors in an adapter's state dict; None if a process holds only parts of them."""
    own = {plain_name(key): value for key, value in state_dict.items() if ".spon_" in key}
    if any(isinstance(value, DTensor) or value.is_meta for value in own.values()):
        return None
    return tensors_checksum(own)


def find_problem(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with a state dict about to be loaded into an adapter: missing, misshaped, not finite. Or None."""
    for module_name, layer in model.named_modules():
        if not isinstance(layer, SponLayer) or adapter_name not in layer.spon_settings:
            continue
        specs = layer.sparsifier(adapter_name).specs()
        for part in layer.tensor_names:
            held = getattr(layer, part)
            if adapter_name not in held:
                continue
            where = f"'{part}' of layer '{plain_name(module_name)}'"
            key = f"{module_name}.{part}.{adapter_name}"
            if key not in state_dict:
                remedy = (
                    "calibrate() the adapter again and save it"
                    if specs.get(part.removeprefix("spon_"), NOT_CALIBRATED).from_data
                    else "load the adapter onto the model it was trained for"
                )
                return (
                    f"{SAFETENSORS_WEIGHTS_NAME}: The saved adapter has no {where}: the file is incomplete or of "
                    f"another model; {remedy}."
                )
            found, wanted = tuple(state_dict[key].shape), tuple(held[adapter_name].shape)
            if found != wanted:
                return (
                    f"{SAFETENSORS_WEIGHTS_NAME}: The saved adapter's {where} has shape {found}, the model needs "
                    f"{wanted}; load it onto the model it was trained for."
                )
            if not torch.isfinite(state_dict[key]).all():
                return (
                    f"{SAFETENSORS_WEIGHTS_NAME}: The saved adapter's {where} holds NaN or infinity; save it again "
                    "from a healthy model."
                )
    return None


def find_other_settings(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> str | None:
    """Whether tensors, whole as they are, come from an adapter with other settings than the model's has. Or None.

    PEFT loads over an existing adapter without reading the configuration beside the file.
    """
    expected = set()
    for module_name, layer in model.named_modules():
        if not isinstance(layer, SponLayer) or adapter_name not in layer.spon_settings:
            continue
        for part in layer.tensor_names:
            if adapter_name in getattr(layer, part):
                expected.add(f"{module_name}.{part}.{adapter_name}")
        sparsifier = layer.sparsifier(adapter_name)
        sparsity = sparsifier.sparsity
        found = {name: state_dict[f"{module_name}.spon_{name}.{adapter_name}"] for name in sparsifier.specs()}
        _, wanted = sparsifier.at(sparsity, found)
        if any(not torch.allclose(found[name], wanted[name], rtol=1e-4) for name in found):
            return (
                f"{SAFETENSORS_WEIGHTS_NAME}: The threshold of layer '{plain_name(module_name)}' is not that of "
                f"sparsity {sparsity}, as adapter {adapter_name!r} has it here; load the file under another name, or "
                "set_sparsity() to what it was saved with first."
            )
    unexpected = sorted(key for key in state_dict if ".spon_" in key and key not in expected)
    if unexpected:
        return (
            f"{SAFETENSORS_WEIGHTS_NAME}: The saved adapter has {preview(unexpected)}, for which adapter "
            f"{adapter_name!r} has no place here: it has other settings (calibrated, anchor_modules, gain, targets). "
            "Load the file under another name."
        )
    return None


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model again, and the SPON layers that had only this one: undo of a failed load."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SponLayer) and adapter_name in layer.spon_settings:
            if len(layer.spon_settings) > 1:
                layer.delete_adapter(adapter_name)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
        elif isinstance(layer, AuxiliaryTrainingWrapper) and adapter_name in layer._adapters:
            layer.delete_adapter(adapter_name, new_active_adapters=None)
            if not layer._adapters:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.original_module)
    configs: dict[str, PeftConfig] = model.peft_config
    configs.pop(adapter_name, None)


def preview(names: list[str]) -> str:
    """The first few names, for error messages."""
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
