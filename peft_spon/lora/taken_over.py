# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""SPON over a LoRA model: `get_peft_model` takes the LoRA over, and can give it back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .._peft import set_auxiliary_adapter
from ..config import SponConfig
from .adapters import active_lora, beneath, free_name, is_plain_lora
from .checks import check_lora, check_modules_to_save, check_other_methods


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
