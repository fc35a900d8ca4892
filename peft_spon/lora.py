# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA together with SPON: y = (W + B A) (S(x) + anchor) + b.

LoRA lies beneath, SPON outermost, whichever came first: LoRA sees the sparse input, so that both merge exactly. (LoRA
outside would see the raw x, and W S(x) + B A x is no linear layer with a sparse input.) `get_peft_model` of SPON over
a LoRA model takes that model's LoRA over; [`add_lora`] slides a LoRA beneath the SPON that is there. In the resulting
`PeftModel` both adapters have their names, SPON's by default `"default"` and LoRA's `"task"`.
"""

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from packaging.version import Version
from peft import (
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    cast_adapter_dtype,
    delete_adapter,
    set_requires_grad,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, load_peft_weights
from peft.utils.other import _set_adapter as set_auxiliary_adapter
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from .cards import lora_card
from .checksums import fields_checksum, tensors_checksum
from .config import SponConfig, SponPeftType
from .files import move_into_place, written_aside
from .layer import SponLayer, outer_modules, spon_layers
from .modes import switched_off
from .sparse_linear import SparseMixin
from .weights import is_linear


LORA_NAME = "task"
# Before that, Trainer restores only the adapters that a checkpoint has in subfolders; SponTrainer restores all.
RESUMES_ALL = Version("5.23.0.dev0")
TRAINABLE = ("lora", "anchors", "both")
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
# Beginnings of `init_lora_weights` that put a part of W into the LoRA and take it out of W.
MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraBeneathSponConfig(LoraConfig):
    """A `LoraConfig` inside a SPON model, made by `beneath`; saved as the plain `LoraConfig` it is."""

    def __post_init__(self):
        raise ValueError(
            f"{CONFIG_NAME} has peft_type={SponPeftType.LORA.value!r}, which no file has: it was edited. Save or "
            "download the adapter again."
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": PeftType.LORA}


class LoraBeneathSpon(LoraModel):
    """How the tensors of a LoRA inside a SPON model are called in files: as in a model without SPON."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return super()._remove_adapter_name_from_key(key.replace(".base_layer.lora_", ".lora_"), adapter_name)


def beneath(config: LoraConfig) -> LoraBeneathSponConfig:
    """The same configuration, as of a LoRA that lies beneath SPON."""
    config = copy.copy(config)
    config.__class__ = LoraBeneathSponConfig
    config.peft_type = SponPeftType.LORA
    return config


def lora_names(configs: dict[str, PeftConfig]) -> list[str]:
    """Names of the LoRA adapters beneath SPON."""
    return [name for name, config in configs.items() if isinstance(config, LoraBeneathSponConfig)]


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """All LoRA layers, beneath SPON layers or where SPON has no layer."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_lora(model: nn.Module) -> list[str]:
    """Names of the LoRA adapters that take part in the forward."""
    layers = [layer for layer in lora_layers(model) if layer.r]
    return list(layers[0].active_adapters) if layers else []


# ---- SPON over a LoRA model --------------------------------------------------------------------------------------


class TakenOver:
    """A LoRA model on which SPON was put: what its adapters were called, so that all can be given back."""

    def __init__(self, inner: nn.Module, new_names: dict[str, str]):
        self.inner, self.new_names = inner, new_names
        self.before = dict(inner.peft_config)

    def take(self) -> None:
        """Rename, in the layers and in the `peft_config` that the old `PeftModel` shares, so that it saves right."""
        for old, new in self.new_names.items():
            rename_adapter(self.inner, old, new)
        self._set({self.new_names[name]: beneath(config) for name, config in self.before.items()})

    def give_back(self) -> None:
        """Everything as it was before `take`."""
        for old, new in self.new_names.items():
            rename_adapter(self.inner, new, old)
        self._set(self.before)

    def _set(self, configs: dict[str, PeftConfig]) -> None:
        shared = self.inner.peft_config
        shared.clear()
        shared.update(configs)


@contextmanager
def lora_taken_over(
    model: nn.Module, spon_name: str, spon_config: PeftConfig
) -> Iterator[tuple[nn.Module, TakenOver | None]]:
    """
    The model to put SPON on, LoRA layers in it: without the `PeftModel` around it, where that has LoRA adapters.

    A LoRA adapter of SPON's own name (both are `"default"` by default) is called `"task"` from here on. If the body
    raises, all is as it was. Gives the inner model, and how to give it back later (None: there is no LoRA).

    Args:
        model (`torch.nn.Module`): what the user hands to `get_peft_model`.
        spon_name (`str`): name of the SPON adapter that is about to be added.
        spon_config (`SponConfig`): its configuration.

    Raises:
        `ValueError`: the model has a SPON adapter already, or a LoRA that trains biases.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if isinstance(model, PeftModel) and any(isinstance(config, SponConfig) for config in configs.values()):
        raise ValueError(
            f"The model has the SPON adapters {sorted(configs)} already; add another one with model.add_adapter("
            f"'name', config), or take the model without them: model.unload()."
        )
    inner = model_inside(model)
    check_other_methods(inner, configs)
    if not any(is_plain_lora(config) for config in configs.values()):
        yield model, None
        return
    for name, config in configs.items():
        check_lora(config, name)
        check_modules_to_save(inner, spon_config, config)
    taken = TakenOver(inner, {name: free_name(configs) if name == spon_name else name for name in configs})
    taken.take()
    active = active_lora(inner)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield inner, taken
        set_auxiliary(inner, [spon_name, *active])
    except BaseException:
        taken.give_back()
        raise


def model_inside(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel` that has tuner layers; any other as it is."""
    # Not get_base_model(): it looks up the active adapter, which may have got another name or be gone.
    return (
        model.base_model.model if isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner) else model
    )


def is_plain_lora(config: PeftConfig) -> bool:
    """True for LoRA itself, not for other methods, some of whose configurations are subclasses of LoRA's."""
    return config.peft_type in (PeftType.LORA, SponPeftType.LORA)


def check_other_methods(model: nn.Module, configs: dict[str, PeftConfig]) -> None:
    """Raises `ValueError` if the model has adapters of methods with which SPON does not combine."""
    for name, config in configs.items():
        if isinstance(config, SponConfig) or is_plain_lora(config):
            continue
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"Adapter {name!r} is of type {config.peft_type.value}: a prompt that is learned for the dense model, "
                "and that no weights can take up. SPON does not combine with it; put SPON on the base model without "
                "it: get_peft_model(model.get_base_model(), SponConfig(...)), or load the base again."
            )
        check_lora(config, name)
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, (SponLayer, LoraLayer)):
            raise ValueError(
                f"'{name}' is a {type(layer).__module__}.{type(layer).__name__} layer; SPON combines with LoRA only. "
                "Take the other adapters out of the model first: merge_and_unload() or unload() of their PeftModel."
            )


def check_lora(config: PeftConfig, name: str) -> None:
    """Raises `ValueError` for what cannot lie beneath SPON."""
    if isinstance(config, SponConfig):
        raise ValueError(f"What is given as the LoRA {name!r} is a SPON adapter; give a LoRA there.")
    if not is_plain_lora(config):
        raise ValueError(
            f"Adapter {name!r} is of type {config.peft_type.value}; SPON combines with LoRA only. Merge it first: "
            "base = model.merge_and_unload() of its PeftModel, then get_peft_model(base, SponConfig(...))."
        )
    if config.bias != "none":
        raise ValueError(
            f"The LoRA adapter {name!r} has bias={config.bias!r}, but the biases belong to the base model, and SPON "
            "merges into them; use bias='none'."
        )
    if config.trainable_token_indices:
        raise ValueError(
            f"The LoRA adapter {name!r} has trainable_token_indices, which PEFT 0.21 cannot save beside an adapter "
            "without them; use modules_to_save=['embed_tokens'] for new tokens."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The LoRA adapter {name!r} has alora_invocation_tokens, which choose the tokens it acts on; SPON does "
            "not pass them on. Use a LoRA that acts on all tokens."
        )
    if config.arrow_config is not None and not config.arrow_config.task_adapter_names:
        raise ValueError(
            f"The LoRA adapter {name!r} is an Arrow router, which routes between LoRAs that are in the model: "
            "peft.create_arrow_model(base, folders, arrow_config) first, and SPON over what that gives."
        )
    if config.layer_replication:
        raise ValueError(
            f"The LoRA adapter {name!r} has layer_replication={config.layer_replication}, which rebuilds the base's "
            "list of blocks; SPON's layers belong to the base as it is. Save a base model with the repeated blocks, "
            "and put SPON and a LoRA without layer_replication onto that."
        )


def check_modules_to_save(model: nn.Module, spon: PeftConfig, lora: PeftConfig) -> None:
    """Raises `ValueError` if both adapters would train a copy of the same module: PEFT runs one at a time."""
    both = set(spon.modules_to_save or []) & set(lora.modules_to_save or [])
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if both & names:
        raise ValueError(
            f"modules_to_save has {sorted(both & names)} in the SPON adapter and in the LoRA, and only one copy can "
            "run; leave it out of one of them. (PEFT adds the classifier by itself where task_type is 'SEQ_CLS' or "
            "'TOKEN_CLS': leave task_type out of the SponConfig; the LoRA's classifier stays active.)"
        )
    wanted = tuple(lora.modules_to_save or [])
    sparse = [name for name in spon_layers(model) if name.endswith(wanted)]
    if sparse:
        raise ValueError(
            f"modules_to_save of the LoRA has '{sparse[0]}', which SPON makes sparse, so that its weights must stay; "
            "leave it out, or name it in exclude_modules of the SponConfig."
        )


def free_name(taken: dict[str, Any]) -> str:
    """`"task"`, or `"task2"`, ... where that is taken."""
    return next(name for name in [LORA_NAME, *(f"{LORA_NAME}{i}" for i in range(2, 1000))] if name not in taken)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name in all layers of a model. PEFT has no method for that."""
    if old == new:
        return
    for module in model.modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for held in (*own.values(), *module._modules.values()):
            if isinstance(held, (dict, nn.ModuleDict, nn.ParameterDict)) and old in held:
                held[new] = held.pop(old)
        for kind in ("_active_adapter", "merged_adapters"):
            names = getattr(module, kind)
            renamed = [new if name == old else name for name in ([names] if isinstance(names, str) else names)]
            setattr(module, kind, renamed)
        if isinstance(module, AuxiliaryTrainingWrapper) and old in module._adapters:
            module._adapters = {new if name == old else name for name in module._adapters}


def set_auxiliary(model: nn.Module, names: list[str], inference_mode: bool = False) -> None:
    """Make the `modules_to_save` of all these adapters active; what is trained stays as `set_trainable` chose it."""
    set_auxiliary_adapter(model, names, inference_mode=inference_mode)
    choice = trainable_choice(model)
    if choice is not None and not inference_mode and active_lora(model):
        apply_trainable(model, choice)


def trainable_choice(model: nn.Module) -> str | None:
    """What `set_trainable` chose; None: there was no choice."""
    return next((layer.trainable_choice for layer in model.modules() if isinstance(layer, SponLayer)), None)


# ---- LoRA beneath a SPON model -----------------------------------------------------------------------------------


def add_lora(
    model: PeftModel, config: LoraConfig, adapter_name: str = LORA_NAME, *, trainable: str = "lora"
) -> PeftModel:
    """
    Put a LoRA beneath the SPON of a model, in place: y = (W + B A) (S(x) + anchor) + b.

    The new LoRA becomes the active one; further ones stay, and `model.set_adapter(name)` switches between them.
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
        set_auxiliary(inner, [*model.base_model.active_adapters, adapter_name])
        set_trainable(model, trainable)
    return model


def wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """What holds the `modules_to_save` of adapters."""
    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


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


def expect(call: str, argument: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raises `TypeError` for an argument of another kind, as when the order is mixed up."""
    if not isinstance(value, kind):
        shown = f" {value!r}" if isinstance(value, (str, os.PathLike, int, float)) else ""
        raise TypeError(f"{call}: {argument} must be {what}, not {type(value).__name__}{shown}.")


def check_trainable(what: str) -> None:
    """Raises `ValueError` for an unknown choice."""
    if what not in TRAINABLE:
        raise ValueError(f"trainable is {what!r}; use one of {', '.join(TRAINABLE)}.")


def set_trainable(model: nn.Module, what: str) -> None:
    """
    Choose what training moves: the active LoRA, the active SPON adapter's anchors and gains, or both.

    Args:
        model (`torch.nn.Module`): a model with SPON and LoRA.
        what (`str`): `"lora"`, `"anchors"` or `"both"`. Holds until the next call, also when adapters are switched.

    Raises:
        `ValueError`: an unknown choice, or a model without SPON or without LoRA.
        `TypeError`: arguments in another order.
    """
    expect("set_trainable(model, what)", "model", model, nn.Module, "a model with SPON and LoRA")
    layers = apply_trainable(model, what)
    if what != "lora" and "default" in layers[0].active_adapters and Version(transformers.__version__) < RESUMES_ALL:
        warnings.warn(
            f"transformers {transformers.__version__} resumes a checkpoint of a SPON adapter named 'default' beside a "
            "LoRA without its anchors. Upgrade to 5.23, or name it: get_peft_model(base, config, 'anchors').",
            stacklevel=2,
        )


def apply_trainable(model: nn.Module, what: str) -> list[SponLayer]:
    """`set_trainable` without its warning; gives the SPON layers."""
    check_trainable(what)
    layers = list(spon_layers(model).values())
    lora = active_lora(model)
    if not layers or not lora:
        raise ValueError(
            f"{type(model).__name__} has {'no LoRA' if layers else 'no SPON adapter'}; set_trainable chooses between "
            "the two. See add_lora."
        )
    set_requires_grad(model, layers[0].active_adapters, what in ("anchors", "both"))
    set_requires_grad(model, lora, what in ("lora", "both"))
    for layer in layers:
        layer.trainable_choice = what
    return layers


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """`with without_lora(model):` LoRA off, SPON as it is. (`dense_mode` is the other way round.)"""
    expect("without_lora(model)", "model", model, nn.Module, "a model with SPON and LoRA")
    names = set(active_lora(model))
    layers = lora_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights; call model.unmerge_adapter() first.")
    with switched_off([*layers, *(wrapper for wrapper in wrappers(model) if wrapper._adapters & names)]):
        yield


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
    if lora_names(model.peft_config):
        return
    for layer in spon_layers(model).values():
        if layer.trainable_choice == "lora":
            set_requires_grad(layer, layer.active_adapters, True)
        layer.trainable_choice = None


def check_biases(layers: list[LoraLayer], adapter_names: list[str] | None) -> None:
    """Raises `ValueError` if a bias of these LoRA adapters (None: the active ones) has none of the base to merge into.

    PEFT would raise when the layer's weight is merged already.
    """
    for layer in layers:
        for name in layer.active_adapters if adapter_names is None else adapter_names:
            if layer.lora_bias.get(name) and getattr(layer.get_base_layer(), "bias", None) is None:
                raise ValueError(
                    f"The LoRA {name!r} has lora_bias=True, and the base has layers without a bias to merge it into. "
                    "Leave it unmerged, or train one without lora_bias."
                )


def check_finite(layers: list[LoraLayer]) -> None:
    """Raises `ValueError` if something in the active LoRA adapters of these layers is NaN or infinite."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if any(f".{adapter}." in name for adapter in layer.active_adapters) and not parameter.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(layer.active_adapters)} seems to be "
                    "broken. Nothing was merged."
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


# ---- files -------------------------------------------------------------------------------------------------------


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
    adapter_name: str | list[str] = LORA_NAME,
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
        adapter_name (`str` or `list[str]`, *optional*, defaults to `"task"`): name of the LoRA. Of several, each from
            its folder, the first is active.
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
    expect(call, "adapter_name", adapter_name, (str, list), "the LoRA's name")
    if trainable is not None:
        check_trainable(trainable)
    if isinstance(model, PeftModel) or spon_layers(model) or lora_layers(model):
        raise ValueError(
            "The model has adapters already, and this loads onto a plain base. Give it the base. Another LoRA "
            "beneath SPON: add_lora(model, LoraConfig.from_pretrained(folder), n); model.load_adapter(folder, n)."
        )
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    given = list(lora) if isinstance(lora, list) else [lora]
    folders = [spon] * len(names) if lora is None else given
    if len(folders) != len(names):
        raise ValueError(f"lora has {len(folders)} entries and adapter_name {names}; give one name for each.")
    places = [{"subfolder": name} if lora is None else {} for name in names]
    hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    named, move = named_loras(spon, **hub), False
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
        if trainable is not None:
            set_trainable(loaded, trainable)
    return loaded


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
