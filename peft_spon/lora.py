# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA together with SPON: y = (W + B A) (S(x) + anchor) + b.

LoRA lies beneath, SPON outermost, whichever came first: LoRA sees the sparse input, so that both merge exactly. (LoRA
outside would see the raw x, and W S(x) + B A x is no linear layer with a sparse input.) `get_peft_model` of SPON over
a LoRA model takes that model's LoRA over; [`add_lora`] slides a LoRA beneath the SPON that is there. In the resulting
`PeftModel` both adapters have their names, SPON's by default `"default"` and LoRA's `"task"`.

A LoRA named `"spon-repair"` is a part of SPON's repair: `SponTrainer` trains it with the anchors so that the sparse
model predicts what the dense one *without* it does. It stays active beside whatever other LoRA is.
"""

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from packaging.version import Version
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._peft import cast_adapter_dtype, delete_adapter, set_adapter, set_auxiliary_adapter, set_requires_grad
from .base_layer import is_linear
from .cards import lora_card
from .config import SponConfig, SponPeftType
from .files import move_into_place, written_aside
from .layer import SponLayer
from .modes import only_active, switched_off
from .repair import REPAIR_LORA
from .sites import outer_modules, plain_name, spon_layers
from .sparse_linear import SparseMixin


LORA_NAME = "task"
# Before that, Trainer restores only the adapters that a checkpoint has in subfolders; SponTrainer restores all.
RESUMES_ALL = Version("5.23.0.dev0")
TRAINABLE = ("lora", "anchors", "both")
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


def task_loras(names: list[str]) -> list[str]:
    """Of some LoRAs those that are no part of SPON's repair."""
    return [name for name in names if name != REPAIR_LORA]


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
        set_auxiliary_adapter(inner, [spon_name, *active])
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


# ---- LoRA beneath a SPON model -----------------------------------------------------------------------------------


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


def repair_lora(names: list[str]) -> list[str]:
    """Of some LoRAs the one that is part of SPON's repair, if it is among them."""
    return [name for name in names if name == REPAIR_LORA]


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


def repair_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the repair LoRA."""
    return [
        parameter
        for layer in lora_layers(model)
        for name, parameter in layer.named_parameters()
        if f".{REPAIR_LORA}." in f".{name}."
    ]


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
    Choose what training moves: the active LoRA, the active SPON adapter's anchors and gains (with its repair LoRA, if
    there is one), or both.

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
    if what == "lora" and not task_loras(lora):
        raise ValueError(
            "The only LoRA of the model is that of SPON's repair, which is trained with the anchors; use 'anchors', "
            "or add_lora() one for your task."
        )
    set_requires_grad(model, [*layers[0].active_adapters, *repair_lora(lora)], what in ("anchors", "both"))
    if task_loras(lora):
        set_requires_grad(model, task_loras(lora), what in ("lora", "both"))
    tuner = over_lora(model)
    if tuner is not None:
        tuner.trainable_choice = what
    return layers


def over_lora(model: nn.Module) -> "OverLora | None":
    """The SponModel in a model; None where transformers' `add_adapter` has put SPON in."""
    return next((module for module in model.modules() if isinstance(module, OverLora)), None)


def trainable_choice(model: nn.Module) -> str | None:
    """What `set_trainable` chose; None: there was no choice."""
    tuner = over_lora(model)
    return None if tuner is None else tuner.trainable_choice


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """`with without_lora(model):` LoRA off, SPON and its repair LoRA as they are. (`dense_mode`: the other way round.)

    Raises:
        `ValueError`: LoRA is merged into the weights.
    """
    expect("without_lora(model)", "model", model, nn.Module, "a model with SPON and LoRA")
    names = set(task_loras(active_lora(model)))
    layers = lora_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is merged into the weights; call model.unmerge_adapter() first.")
    off = [wrapper for wrapper in wrappers(model) if wrapper._adapters & names]
    if repair_lora(active_lora(model)):
        with switched_off(off), only_active(layers, lambda name: name == REPAIR_LORA):
            yield
    else:
        with switched_off([*layers, *off]):
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


# ---- what a SponModel does for the LoRA beneath ------------------------------------------------------------------


class OverLora:
    """
    Of a SPON tuner: PEFT's methods also serve the LoRA that lies beneath, where there is one.

    Attributes:
        trainable_choice (`str`, *optional*): what [`set_trainable`] chose.
        taken_over ([`TakenOver`], *optional*): the LoRA model on which SPON was put.
    """

    trainable_choice: str | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        with lora_taken_over(model, adapter_name, config) as (inner, taken):
            super().__init__(inner, peft_config, adapter_name, *args, **kwargs)
        self.taken_over, self.trained_before = taken, trained

    def give_back(self) -> None:
        """Once all SPON layers are out again: the model as it was, its LoRA and what of it is trained included."""
        if self.taken_over:
            self.taken_over.give_back()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained_before)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the active adapters. With LoRA beneath: those of the kind that is named; the other kind stays as it is.

        Args:
            adapter_name (`str` or `list[str]`): SPON adapters, LoRA adapters, or both.
            inference_mode (`bool`, *optional*, defaults to `False`): freeze them.
        """
        wanted = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        named = [name for name in wanted if name in lora_names(self.peft_config)]
        spon = [name for name in wanted if name not in named]
        active = active_lora(self.model)
        # The LoRA of the repair is a kind of its own: it stays as SPON does.
        lora = [*(task_loras(named) or task_loras(active)), *(repair_lora(named) or repair_lora(active))]
        lora = lora if named else []
        if lora:
            set_adapter(self.model, lora, inference_mode=inference_mode, layer_cls=LoraLayer)
        if spon or not lora:
            super().set_adapter(adapter_name if not lora else spon, inference_mode)
        if lora or active:
            self._set_auxiliary([*self.active_adapters, *(lora or active)], inference_mode)

    def _set_auxiliary(self, names: list[str], inference_mode: bool = False) -> None:
        # The modules_to_save of all these adapters; what is trained stays as `set_trainable` chose it.
        set_auxiliary_adapter(self.model, names, inference_mode=inference_mode)
        if not inference_mode:
            self._keep_choice()

    def _keep_choice(self) -> None:
        if self.trainable_choice is not None and active_lora(self.model):
            apply_trainable(self.model, self.trainable_choice)

    def enable_adapter_layers(self) -> None:
        """As PEFT's; what is trained stays as `set_trainable` chose it."""
        super().enable_adapter_layers()
        self._keep_choice()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a SPON adapter, or a LoRA beneath; with the last LoRA its layers go, too.

        Args:
            adapter_name (`str`): its name.

        Raises:
            `ValueError`: unknown, or merged.
        """
        if adapter_name not in lora_names(self.peft_config):
            active = active_lora(self.model)
            super().delete_adapter(adapter_name)
        else:
            delete_lora(self.model, adapter_name)
            active = active_lora(self.model)
            if not task_loras(lora_names(self.peft_config)):
                if self.trainable_choice == "lora":
                    set_requires_grad(self.model, [*self.active_adapters, *repair_lora(active)], True)
                self.trainable_choice = None
        if active:
            self._set_auxiliary([*self.active_adapters, *active])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, refusing first what could only be merged by half."""
        check_biases(lora_layers(self.model), adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As PEFT's, refusing first what could only be merged by half."""
        layers = lora_layers(self.model)
        check_biases(layers, adapter_names)
        if safe_merge:
            check_finite(layers)
        if adapter_names is not None and layers:
            self._set_auxiliary(adapter_names)  # the modules_to_save of what is merged, not of the rest
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """Let `model(..., adapter_names=[...])` and `generate` choose one adapter per sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if repair_lora(active_lora(self.model)):
            raise ValueError(
                "adapter_names chooses one adapter per row, and the repair LoRA of this model acts on every row beside"
                " it. Leave adapter_names out, or merge what is to run: model.merge_and_unload()."
            )
        # Errors begin with PEFT's words for the same misuse of LoRA.
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. The adapters are "
                f"{sorted(self.peft_config)}; '__base__' stands for the model without them: without SPON, or, beside "
                "names of LoRAs, without LoRA."
            )
        lora = set(lora_names(self.peft_config))
        if set(adapter_names) != {"__base__"}:  # rows that all want no LoRA, as in a batch where others want one
            lora &= set(adapter_names)
        if lora and set(adapter_names) - lora - {"__base__"}:
            raise ValueError(
                f"adapter_names is {adapter_names}: name LoRA adapters ({sorted(lora)}), or SPON adapters, not both; "
                "the other kind stays as it is."
            )
        kind = LoraLayer if lora else SponLayer
        of_kind = lora or set(self.peft_config) - set(lora_names(self.peft_config))
        chosen = set(adapter_names) & of_kind or of_kind  # all rows "__base__": whatever is active is off
        beams = kwargs.get("num_beams") or 1
        if beams > 1 and not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = self.model.get_encoder() if self.get_model_config(self.model).get("is_encoder_decoder") else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = []
        for module in self.modules():
            is_wrapper = isinstance(module, AuxiliaryTrainingWrapper) and module._adapters & chosen
            if isinstance(module, kind) or is_wrapper:
                # Beam search repeats the rows that the decoder sees; the encoder ran before that.
                names = list(adapter_names) if module in in_encoder else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_can_be_reference(model: nn.Module, source: str, name: str) -> None:
    """Raises `ValueError` if a copy of an adapter could not be a reference: the LoRA beneath belongs to both."""
    parameters = [p for layer in lora_layers(model) for key, p in layer.named_parameters() if "lora_" in key]
    if any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"Adapter {name!r} would be a copy of {source!r} (as TRL's preference trainers add it for a reference), "
            "but the LoRA beneath SPON, which is trained, would be part of both. Give the trainer a ref_model of its "
            "own, load_with_lora(base, folder).get_base_model(); where it takes none (GRPO), use beta=0.0, or freeze "
            'the LoRA: set_trainable(model, "anchors").'
        )


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


# ---- a LoRA alone ------------------------------------------------------------------------------------------------


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
