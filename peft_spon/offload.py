# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights accelerate keeps on the CPU or on disk (`device_map`, `cpu_offload`, `disk_offload`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


def align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of accelerate that bring a module's tensors to where it computes."""
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hooks let a module compute, wherever its weights are kept; None without such hooks."""
    devices = [hook.execution_device for hook in align_hooks(module) if hook.execution_device is not None]
    return torch.device(devices[-1]) if devices else None


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """`with onloaded(layer):` the weights of a layer are there, also those that are kept elsewhere."""
    hook = vars(layer).get("_hf_hook")
    if hook is None or not any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


class StaysLoaded:
    """A container of tensors that accelerate's hooks leave in memory, on the device where its layer computes.

    Offloaded, they would come back in the container's forward; it has none, its tensors are read by the layer. They
    are a few thousandths of the model.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # a hook is about to be attached, and may leave nothing but shapes
            vars(self)["_before_hook"] = {**self._parameters, **self._buffers}
        super().__setattr__(name, value)
        if name == "_hf_hook":
            self._keep(vars(self).pop("_before_hook", {}))

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        for hook in align_hooks(self):
            if not hook.offload:
                continue
            hook.offload = False  # there is nothing to bring back, nor to restore when the hook is removed
            for key, tensor in tensors.items():
                if key in self._parameters:
                    tensor.data = tensor.data.to(hook.execution_device)
                    self._parameters[key] = tensor
                else:
                    self._buffers[key] = tensor.to(hook.execution_device)
