# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A LoRA beneath the SPON that is there: put in, and taken out again."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._peft import cast_adapter_dtype, delete_adapter, set_adapter, set_auxiliary_adapter
from ..base_layer import is_linear
from ..config import SponConfig
from ..repair import REPAIR_LORA
from ..sites import outer_modules, spon_layers
from ..sparse_linear import SparseMixin
from .adapters import LORA_NAME, LoraBeneathSpon, active_lora, beneath, lora_layers, repair_lora, wrappers
from .checks import check_lora, check_modules_to_save, expect
from .trained import apply_trainable, check_trainable, set_trainable


# Beginnings of `init_lora_weights` that put a part of W into the LoRA and take it out of W.
MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_lora(
    model: PeftModel, config: LoraConfig, adapter_name: str = LORA_NAME, *, trainable: str = "lora"
) -> PeftModel:
    """
    Put a LoRA beneath the SPON of a model, in place: y = (W + B A) (S(x) + anchor) + b.

    The new LoRA becomes the active one; further ones stay, and `model.set_adapter(name)` switches between them. One
    named `"spon-repair"` is a part of SPON's repair: it is trained with the anchors, and active beside another LoRA.
    `model.save_pretrained(folder)` writes the SPON adapter into `folder` and each LoRA into `folder/name`, both as if
    the other were not there: either loads alone onto the plain base, and PEFT without peft_spon loads the LoRA.

    Args:
        model (`PeftModel`): a model with a SPON adapter.
        config (`LoraConfig`): of the LoRA: DoRA, rsLoRA, `modules_to_save`, ... as PEFT has them.
        adapter_name (`str`, *optional*, defaults to `"task"`): its name.
        trainable (`str`, *optional*, defaults to `"lora"`): what is trained from here on, see [`set_trainable`].

    Returns:
        `PeftModel`: the same object.

    Raises:
        `ValueError`: no `PeftModel` with SPON, merged adapters, a name that is taken, a configuration that cannot lie
            beneath SPON, targets that are not in the model. The model is as it was then.
        `TypeError`: arguments in another order.
    """
    expect("add_lora(model, config)", "model", model, nn.Module, "the PeftModel with SPON")
    expect("add_lora(model, config)", "config", config, PeftConfig, "a LoraConfig")
    expect("add_lora(model, config, adapter_name)", "adapter_name", adapter_name, str, "a name")
    check_trainable(trainable)
    if any(isinstance(module, SparseMixin) for module in model.modules()):
        raise ValueError(
            "The model is a merged SPON model, where a LoRA would see the inputs before S; load the base and the SPON "
            "adapter instead, and merge when all is trained."
        )
    if not isinstance(model, PeftModel) or not spon_layers(model):
        raise ValueError(
            f"{type(model).__name__} is no PeftModel with a SPON adapter; get_peft_model(model, SponConfig(...)) "
            "first, or PEFT's own get_peft_model(model, lora_config) for LoRA alone."
        )
    check_lora(config, adapter_name)
    if adapter_name in model.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already ({sorted(model.peft_config)}); name another.")
    inner = model.get_base_model()
    layers = [module for module in inner.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged; call model.unmerge_adapter() before another one is added.")
    for spon in model.peft_config.values():
        if isinstance(spon, SponConfig):
            check_modules_to_save(inner, spon, config)
    # PEFT fills in what it finds; the user's object stays as it is.
    config = copy.copy(config)
    config.base_model_name_or_path = vars(inner).get("name_or_path") or config.base_model_name_or_path
    active = active_lora(inner)
    with restored_on_error(model, moves_weights(config)):
        with spon_taken_out(inner), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            if config.target_modules == "all-linear" and any(True for _ in wrappers(inner)):
                # PEFT would also put LoRA on the copies inside the modules_to_save of other adapters.
                head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
                config.target_modules = {
                    name for name, module in outer_modules(inner) if is_linear(module) and module is not head
                }
            inject_adapter_in_model(config, inner, adapter_name)
        model.peft_config[adapter_name] = beneath(config)
        cast_adapter_dtype(inner, adapter_name)
        for layer in lora_layers(inner):
            layer.train(inner.training)
        names = [*active, adapter_name] if adapter_name == REPAIR_LORA else [adapter_name, *repair_lora(active)]
        set_adapter(inner, names, layer_cls=LoraLayer)
        set_auxiliary_adapter(inner, [*model.base_model.active_adapters, *names])
        if adapter_name == REPAIR_LORA:
            apply_trainable(model, "anchors" if trainable == "lora" else trainable)
        else:
            set_trainable(model, trainable)
    return model


def add_repair_lora(model: PeftModel, rank: int) -> None:
    """
    Put a LoRA that is part of the repair beneath all SPON layers, or leave the one that is there.

    It changes nothing until it is trained (B is zero), by `SponTrainer`, with the anchors.

    Args:
        model (`PeftModel`): a model with a SPON adapter.
        rank (`int`): of the LoRA, and its alpha.

    Raises:
        `ValueError`: there is one of another rank; and as [`add_lora`].
    """
    there = model.peft_config.get(REPAIR_LORA)
    if there is not None and there.r != rank:
        raise ValueError(
            f"The model has a repair LoRA of rank {there.r}, and rank {rank} is asked for; use its rank, or take it "
            f"out first: model.delete_adapter({REPAIR_LORA!r})."
        )
    if there is None:
        spon, layers = model.peft_config[model.base_model.active_adapters[0]], spon_layers(model)
        is_transposed = all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())  # of GPT-2
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(layers),
            task_type=spon.task_type,
            fan_in_fan_out=is_transposed,
        )
        add_lora(model, config, REPAIR_LORA)


@contextmanager
def restored_on_error(model: nn.Module, with_weights: bool = False) -> Iterator[None]:
    """`with restored_on_error(model):` if the body raises, the model is as it was.

    That is its modules, what is trained, modes, names of adapters, hooks and settings; with `with_weights`, for what
    changes W, the values of its parameters, too.
    """
    settings = getattr(model, "config", None)
    things = [*model.modules(), *([settings] if isinstance(settings, PretrainedConfig) else [])]
    before = [(thing, dict(vars(thing))) for thing in things]
    # Others may hold these very objects, as handles of hooks do: they are restored in place.
    containers = [value for _, own in before for value in own.values() if isinstance(value, (dict, list, set))]
    contents = [copy.copy(value) for value in containers]
    parameters = list(model.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    # On the CPU, since the accelerator may have no room for them.
    plain = [p for p in parameters if with_weights and p.is_floating_point() and not p.is_meta]
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in plain]
    try:
        yield
    except BaseException:
        for thing, own in before:
            vars(thing).clear()
            vars(thing).update(own)
        for container, content in zip(containers, contents, strict=True):
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, required in zip(parameters, trained, strict=True):
            parameter.requires_grad_(required)
        for parameter, value in values:
            parameter.data = value.to(parameter.device)
        raise


def moves_weights(config: LoraConfig) -> bool:
    """True for a LoRA that changes the base's W when it is put into the model."""
    init = config.init_lora_weights
    return config.kasa_config is not None or (isinstance(init, str) and init.startswith(MOVES_WEIGHTS))


@contextmanager
def spon_taken_out(model: nn.Module) -> Iterator[None]:
    """`with spon_taken_out(model):` the SPON layers are not in the model; what takes their place ends up beneath."""
    places = []
    for name, layer in spon_layers(model).items():
        parent, _, child = name.rpartition(".")
        places.append((model.get_submodule(parent), child, layer))
    for parent, child, layer in places:
        setattr(parent, child, layer.base_layer)
    try:
        yield
    finally:
        for parent, child, layer in places:
            layer.base_layer = getattr(parent, child)
            setattr(parent, child, layer)


def delete_lora(model: nn.Module, adapter_name: str) -> None:
    """Delete a LoRA beneath SPON; layers that had only this one go, and what they wrap takes their place.

    Raises:
        `ValueError`: it is merged.
    """
    layers = lora_layers(model)
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"The LoRA {adapter_name!r} is merged; call unmerge_adapter() first.")
    del model.peft_config[adapter_name]
    delete_adapter(model, adapter_name, prefix=LoraBeneathSpon.prefix, layer_cls=LoraLayer)
    take_out(model, adapter_name)


def take_out(model: nn.Module, adapter_name: str) -> None:
    """Take a LoRA out of all layers; those that had only this one are unwrapped."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, LoraLayer):
            if adapter_name in module.r:
                module.delete_adapter(adapter_name)
            if not module.r:
                setattr(model.get_submodule(parent), child, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            module.delete_adapter(adapter_name, new_active_adapters=None)
            if not module._adapters:
                setattr(model.get_submodule(parent), child, module.original_module)
