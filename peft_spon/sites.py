# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a model is sparse: its layers with adapters and its merged layers, by their names in the plain model."""

import copy
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import SponConfig
from .layer import SponLayer
from .sparse_linear import SparseMixin


Site = SponLayer | SparseMixin


def sites(model: nn.Module) -> dict[str, Site]:
    """Name in the plain base model to every sparse layer, with adapters or merged, in the model's order.

    Raises:
        `ValueError`: there is none.
    """
    found = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, (SponLayer, SparseMixin))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer: no SPON adapter, and none was merged into it. Add one: "
            "get_peft_model(model, SponConfig(sparsity=0.5))."
        )
    return found


def spon_layers(model: nn.Module) -> dict[str, SponLayer]:
    """Name in the plain base model to SPON layer, in the model's order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, SponLayer)}


def outer_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Named modules from the outside in, without what lies inside tuner layers and modules_to_save wrappers."""
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        yield full, child
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from outer_modules(child, f"{full}.")


def plain_name(name: str) -> str:
    """The name a module has in the plain model, without the prefixes of PEFT's and torch.compile's wrappers."""
    return name.replace("_orig_mod.", "").removeprefix("base_model.model.")


def resolve_adapter(
    model: nn.Module, adapter_name: str | None, must_be_active: bool = False, may_be_merged: bool = False
) -> str:
    """The given adapter's name, or the first active one.

    Raises:
        `ValueError`: the model has no SPON layers, no SPON adapter of that name, it is not active but must be, or
            adapters are merged but must not be.
    """
    layers = list(spon_layers(model).values())
    if not may_be_merged and any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged, so S and anchors cannot be told apart; call unmerge_adapter() first.")
    known = sorted({name for layer in layers for name in layer.spon_settings})
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no SPON adapter; add one: get_peft_model(model, SponConfig(sparsity=0.5))."
        )
    if adapter_name is None:
        adapter_name = next((n for layer in layers for n in layer.active_adapters if n in layer.spon_settings), None)
        if adapter_name is None:
            raise ValueError(f"No SPON adapter is active; call set_adapter() with one of {known}.")
    if adapter_name not in known:
        raise ValueError(f"There is no SPON adapter {adapter_name!r}; the model has {known}.")
    if must_be_active and any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapters are disabled, so the model is dense; leave the disable_adapter() block first.")
    if must_be_active and not any(adapter_name in layer.active_adapters for layer in layers):
        raise ValueError(f"Adapter {adapter_name!r} is not active; call model.set_adapter({adapter_name!r}) first.")
    return adapter_name


def adapter_config(model: nn.Module, adapter_name: str) -> SponConfig:
    """The configuration of an adapter, in a PeftModel as in a transformers model with `add_adapter`, to work with it:
    from here on a load over it that fails leaves it there."""
    for layer in spon_layers(model).values():
        if adapter_name in layer.spon_settings:
            layer.adapters_run.add(adapter_name)
    return model.peft_config[adapter_name]


def change_config(model: nn.Module, adapter_name: str, **fields: Any) -> None:
    """Set fields of an adapter's configuration, in a copy that takes its place: the user's object may serve others."""
    config = copy.copy(adapter_config(model, adapter_name))
    for name, value in fields.items():
        setattr(config, name, value)
    model.peft_config[adapter_name] = config


def is_new(model: nn.Module, adapter_name: str) -> bool:
    """Whether a SPON adapter was just put into a model and holds no work yet."""
    return not any(adapter_name in layer.adapters_run for layer in spon_layers(model).values())


def resolve_sites(model: nn.Module, adapter_name: str | None) -> tuple[str | None, dict[str, Site]]:
    """The sparse layers that take part in a forward: of the given or the first active adapter, and merged ones.

    Returns:
        `tuple`: the adapter's name, `None` in a merged model; and its layers by name.

    Raises:
        `ValueError`: as [`sites`] and [`resolve_adapter`]; a merged model, which has no adapter, but one is named.
    """
    found = sites(model)
    if adapter_name is None and not any(isinstance(site, SponLayer) for site in found.values()):
        return None, found
    name = resolve_adapter(model, adapter_name, must_be_active=True)
    return name, {k: site for k, site in found.items() if isinstance(site, SponLayer) and name in site.spon_settings}
