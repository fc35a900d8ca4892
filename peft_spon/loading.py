# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a saved adapter before its tensors go into a model."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from .checksums import tensors_checksum
from .config import SponConfig
from .criteria import Spec
from .files import header_problem
from .layer import SponLayer
from .sites import plain_name, spon_layers


NOT_CALIBRATED = Spec(())


def own_checksum(state_dict: dict[str, torch.Tensor]) -> str | None:
    """Checksum of SPON's tensors in an adapter's state dict; None if a process holds only parts of them."""
    return whole_checksum({plain_name(key): value for key, value in state_dict.items() if ".spon_" in key})


def modules_checksum(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> str | None:
    """Checksum of the `modules_to_save` of an adapter in a state dict with the model's names; None as above."""
    names = module_keys(model, adapter_name)
    return whole_checksum({name: state_dict[key] for name, key in names.items() if key in state_dict})


def whole_checksum(tensors: dict[str, torch.Tensor]) -> str | None:
    if any(isinstance(value, DTensor) or value.is_meta for value in tensors.values()):
        return None
    return tensors_checksum(tensors)


def module_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Of the tensors in the `modules_to_save` of an adapter: name in the plain model to name in this model."""
    keys = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")  # as PEFT
            for own, held in module.adapter_state_dict_load_map(adapter_name).items():
                keys[f"{plain_name(name)}.{own}"] = f"{name}.{held}"
    return keys


def own_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """Names in the model of an adapter's SPON tensors."""
    return {
        f"{name}.{part}.{adapter_name}"
        for name, layer in model.named_modules()
        if isinstance(layer, SponLayer) and adapter_name in layer.spon_settings
        for part in layer.tensor_names
        if adapter_name in getattr(layer, part)
    }


def checked(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    remapped: dict[str, torch.Tensor],
    checksums: dict[str, str],
    sizes: bool,
) -> dict[str, torch.Tensor]:
    """
    What of an adapter's file may go into the model: SPON's tensors and those of its `modules_to_save`.

    Args:
        model (`torch.nn.Module`): the model, with the adapter.
        adapter_name (`str`): its name there.
        state_dict (`dict`): the tensors with the file's names.
        remapped (`dict`): the same with the model's.
        checksums (`dict`): those in the file's configuration; what a file of an older version lacks is not compared.
        sizes (`bool`): also compare the shapes in `modules_to_save`.

    Raises:
        `ValueError`: something is missing, damaged, of another adapter, or belongs to the base model.
    """
    problem = find_problem(model, adapter_name, remapped) or find_module_problem(model, adapter_name, remapped, sizes)
    found = {"tensors": own_checksum(state_dict), "modules": modules_checksum(model, adapter_name, remapped)}
    others = [name for name, value in found.items() if value is not None and checksums.get(name, value) != value]
    if problem is None and others:
        problem = (
            f"{SAFETENSORS_WEIGHTS_NAME} and {CONFIG_NAME} do not belong together: the tensors"
            f"{' of modules_to_save' if others == ['modules'] else ''} are not those that were saved with this "
            "configuration. Save or download the adapter again."
        )
    problem = problem or find_other_settings(model, adapter_name, remapped)
    if problem:
        raise ValueError(problem)
    return without_base_tensors(model, adapter_name, remapped, checksums.get("embeddings"))


def without_base_tensors(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], embeddings: str | None
) -> dict[str, torch.Tensor]:
    """The state dict without tensors of the base model that are the same there.

    Embeddings may be others where the configuration says that they were saved with the adapter, as PEFT does when the
    vocabulary was resized.

    Raises:
        `ValueError`: a tensor that is neither the adapter's nor the base model's own.
    """
    wanted = {plain_name(key) for key in (*own_keys(model, adapter_name), *module_keys(model, adapter_name).values())}
    extra = {key: value for key, value in state_dict.items() if plain_name(key) not in wanted}
    if not extra:
        return state_dict
    if embeddings is not None and whole_checksum({plain_name(key): extra[key] for key in extra}) == embeddings:
        return state_dict
    base = {plain_name(key): value for key, value in model.state_dict().items()}
    foreign = [key for key, value in extra.items() if not is_equal(base.get(plain_name(key)), value)]
    if foreign:
        raise ValueError(
            f"{SAFETENSORS_WEIGHTS_NAME} also holds {preview(foreign)}: neither SPON's nor of a module in "
            "modules_to_save, and it would overwrite the base model for good. Nothing was loaded. Save the adapter "
            "again, with such modules named in modules_to_save, or take the tensors out of the file."
        )
    return {key: value for key, value in state_dict.items() if key not in extra}


def is_equal(held: torch.Tensor | None, value: torch.Tensor) -> bool:
    """Whether a model's tensor is the same, bit for bit, as one in a file."""
    if held is None or held.is_meta or isinstance(held, DTensor) or held.dtype != value.dtype:
        return False
    return torch.equal(held, value.to(held.device))


def find_module_problem(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], sizes: bool
) -> str | None:
    """What is wrong with the `modules_to_save` in a state dict about to be loaded: not finite, misshaped. Or None."""
    held = model.state_dict()
    for name, key in module_keys(model, adapter_name).items():
        value = state_dict[key]
        if sizes and key in held and value.shape != held[key].shape:
            return (
                f"{SAFETENSORS_WEIGHTS_NAME}: '{name}' in modules_to_save has shape {tuple(value.shape)}, the model "
                f"needs {tuple(held[key].shape)}; load it onto the model it was trained for."
            )
        if value.is_floating_point() and not value.isfinite().all():
            return (
                f"{SAFETENSORS_WEIGHTS_NAME}: '{name}' in modules_to_save holds NaN or infinity; save it again from a "
                "healthy model."
            )
    return None


def find_file_problem(folder: Path) -> str | None:
    """What is wrong with the weights in a folder on this machine: none there, cut off, no safetensors. Or None."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            return None
        return f"'{folder}' has no {SAFETENSORS_WEIGHTS_NAME}: its saving or download was interrupted. Do it again."
    problem = header_problem(weights)
    return problem and f"{problem}; save the adapter again."


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
    expected = own_keys(model, adapter_name)
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


def undo_load(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that was made for a failed load out again, and all be as before."""
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SponConfig):
        return
    remove_adapter(model, adapter_name)
    if isinstance(model, PeftModel) and not spon_layers(model):
        model.base_model.give_back()


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
