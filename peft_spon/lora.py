# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA together with SPON: y = (W + B A) (S(x) + anchor) + b.

LoRA lies beneath, SPON outermost, whichever came first: LoRA sees the sparse input, so that both merge exactly. (LoRA
outside would see the raw x, and W S(x) + B A x is no linear layer with a sparse input.) `get_peft_model` of SPON over
a LoRA model takes that model's LoRA over; [`add_lora`] slides a LoRA beneath the SPON that is there. In the resulting
`PeftModel` both adapters have their names, SPON's by default `"default"` and LoRA's `"task"`.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from packaging.version import Version
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    cast_adapter_dtype,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from peft.utils.other import _set_adapter as set_auxiliary_adapter
from torch import nn
from transformers import PreTrainedModel

from .cards import lora_card
from .config import SponConfig, SponPeftType
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


class LoraBeneathSponConfig(LoraConfig):
    """A `LoraConfig` inside a SPON model; saved as the plain `LoraConfig` it is."""

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
    if not any(is_plain_lora(config) for config in configs.values()):
        yield model, None
        return
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
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


def is_plain_lora(config: PeftConfig) -> bool:
    """True for LoRA itself, not for other methods, some of whose configurations are subclasses of LoRA's."""
    return config.peft_type == PeftType.LORA


def check_lora(config: PeftConfig, name: str) -> None:
    """Raises `ValueError` for what cannot lie beneath SPON."""
    if not is_plain_lora(config):
        raise ValueError(
            f"Adapter {name!r} is of type {config.peft_type}; SPON combines with LoRA only. Merge it first: "
            "model.merge_and_unload()."
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
            beneath SPON, targets that are not in the model.
    """
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
    with undone_on_error(model, inner, adapter_name):
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
def undone_on_error(model: PeftModel, inner: nn.Module, adapter_name: str) -> Iterator[None]:
    """`with undone_on_error(...):` a LoRA that cannot be added leaves nothing behind."""
    lora, choices = active_lora(inner), [(layer, layer.trainable_choice) for layer in spon_layers(inner).values()]
    active = [(wrapper, list(wrapper.active_adapters)) for wrapper in wrappers(inner)]
    trained = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    try:
        yield
    except BaseException:
        model.peft_config.pop(adapter_name, None)
        take_out(inner, adapter_name)
        if lora:
            set_adapter(inner, lora, layer_cls=LoraLayer)
        for wrapper, names in active:
            set_auxiliary_adapter(wrapper, names)
        for layer, choice in choices:
            layer.trainable_choice = choice
        for parameter, required in trained:
            parameter.requires_grad_(required)
        raise


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
    """
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


def check_finite(layers: list[LoraLayer]) -> None:
    """Raises `ValueError` if something in the active LoRA adapters of these layers is NaN or infinite."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if any(f".{adapter}." in name for adapter in layer.active_adapters) and not parameter.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(layer.active_adapters)} seems to be "
                    "broken. Nothing was merged."
                )


# ---- files -------------------------------------------------------------------------------------------------------


def load_loras_along(
    load: Callable, model: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`load(model, checkpoint, "default")`, and with it all LoRAs of a checkpoint that Trainer has written.

    That is all that its `load_best_model_at_end` calls: the best anchors would end up over the last LoRA. Any other
    folder is loaded by `load` alone.
    """
    configs = model.peft_config
    is_checkpoint = Path(model_id, "trainer_state.json").exists()
    if not is_checkpoint or adapter_name not in configs or adapter_name in lora_names(configs):
        return load(model, model_id, adapter_name, *args, **kwargs)

    def place(name: str) -> Path:
        inside = Path(model_id, name)
        return inside if (inside / CONFIG_NAME).exists() else Path(model_id)

    result = load(model, place(adapter_name), adapter_name, *args, **kwargs)
    for name in lora_names(configs):
        if place(name) != place(adapter_name):
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
        `ValueError`: a model that has adapters already, as many folders as names are not given, a LoRA that cannot
            lie beneath SPON.
    """
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
    for folder, name, place in zip(folders, names, places, strict=True):
        check_lora(PeftConfig.from_pretrained(folder, **place, **hub), name)  # before anything goes into the model
    with_lora = PeftModel.from_pretrained(model, folders[0], names[0], **places[0], **kwargs)
    try:
        for folder, name, place in zip(folders[1:], names[1:], places[1:], strict=True):
            with_lora.load_adapter(folder, name, **place, **kwargs)
        loaded = PeftModel.from_pretrained(with_lora, spon, **kwargs)
    except BaseException:
        with_lora.unload()
        raise
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

    Args:
        model (`PeftModel`): a model with SPON and LoRA.
        save_directory (`str`): folder, created if need be.
        adapter_name (`str`, *optional*, defaults to `"task"`): which LoRA.
        repo_id (`str`, *optional*): also push the folder to this repository on the Hub.
        kwargs: of `HfApi.create_repo`, for `repo_id`: `private`, `token`.

    Raises:
        `ValueError`: there is no LoRA of that name.
    """
    if adapter_name not in lora_names(model.peft_config):
        raise ValueError(f"There is no LoRA {adapter_name!r}; the model has {lora_names(model.peft_config)}.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".spon-saving-", dir=folder) as aside:
        model.save_pretrained(aside, selected_adapters=[adapter_name])
        written = Path(aside, "" if adapter_name == "default" else adapter_name)
        for path in sorted(written.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            if path.is_file() and path.suffix != ".md":
                os.replace(path, folder / path.name)
    spon = model.peft_config[model.active_adapters[0]]
    lora_card(folder, model.peft_config[adapter_name], spon, repo_id)
    if repo_id is not None:
        api = HfApi(token=kwargs.get("token"))
        api.create_repo(repo_id, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
