# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What `get_peft_model` finds in the model that it is given: earlier SPON layers, compiled modules."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftConfig, PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import SponConfig
from .layer import SponLayer
from .lora import OverLora, model_inside
from .sites import spon_layers


def compile_in_place(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `torch.compile`, which change all names below them, also in files.

    What they wrap stays compiled, as `module.compile()` does it.
    """
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if "_orig_mod" in module._modules:
                setattr(parent, child, compile_in_place(module))
    if "_orig_mod" not in model._modules:
        return model
    inner = model._orig_mod
    inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)
    return inner


@contextmanager
def earlier_spon_taken_out(model: nn.Module, only: str | None) -> Iterator[None]:
    """
    Take SPON adapters out of a model on which `get_peft_model` is called again: their layers would go on acting.

    Such a call is a notebook's cell that is run again, on the base model that it has changed before. If the body
    raises, the layers are back. A `PeftModel` with SPON is left alone, see [`lora.taken_over.lora_taken_over`].

    Args:
        model (`torch.nn.Module`): what the user hands to `get_peft_model`.
        only (`str`, *optional*): take out the adapter of this name and leave the others; default: all.
    """
    inner = model_inside(model)
    layers = list(spon_layers(inner).values())
    configs: dict[str, PeftConfig] = getattr(inner, "peft_config", {})
    held = {name for layer in layers for name in layer.spon_settings}
    held |= {name for name, config in configs.items() if isinstance(config, SponConfig)}
    gone = held if only is None else held & {only}
    is_spon_model = isinstance(model, PeftModel) and isinstance(model.base_model, OverLora)
    if is_spon_model or not layers or (only is not None and not gone):
        yield
        return
    places, before, merged = [], dict(configs), [(layer, list(layer.merged_adapters)) for layer in layers]
    for parent in list(inner.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, SponLayer) and set(module.spon_settings) <= gone:
                places.append((parent, child, module, module.base_layer))
            elif isinstance(module, AuxiliaryTrainingWrapper) and module._adapters and module._adapters <= gone:
                places.append((parent, child, module, module.original_module))
    for layer in layers:
        layer.unmerge()
    for parent, child, _, plain in places:
        setattr(parent, child, plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        for name in gone:
            configs.pop(name, None)
            for layer in spon_layers(inner).values():
                layer.delete_adapter(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield
    except BaseException:
        for parent, child, module, _ in places:
            setattr(parent, child, module)
        for layer, names in merged:
            if names:
                layer.merge(adapter_names=names)
        configs.clear()
        configs.update(before)
        raise
    warnings.warn(
        f"The model held SPON layers of an earlier call (adapters {sorted(gone)}); they were taken out, and what is "
        "new is there alone. Save an adapter before you put another one on the same model, or use "
        "model.add_adapter('name', config) to have several.",
        stacklevel=3,
    )
