# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a SPON layer keeps things in: containers that never leave fp32, and its place in the model."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._peft import BufferDict
from .offload import StaysLoaded


class Fp32BufferDict(StaysLoaded, BufferDict):
    """Persistent buffers keyed by adapter name that follow the device of the module but never leave fp32."""

    def __init__(self):
        super().__init__(persistent=True)

    def _apply(self, fn: Callable, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self


class Fp32ParameterDict(StaysLoaded, nn.ParameterDict):
    """Parameters keyed by adapter name that follow the device of the module; what is fp32 stays so.

    With `autocast_adapter_dtype=False` they are in the model's dtype, and follow that.
    """

    def _apply(self, fn: Callable, recurse: bool = True):
        before = {name: parameter.data for name, parameter in self.items()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old.dtype == torch.float32 != self[name].dtype:
                self[name].data = old.to(self[name].device)
        return self


class Place:
    """Where a SPON layer is in its model: the attribute `name` of `parent`.

    To notice a LoRA layer that was put around it. Copies of a whole model have theirs; a layer copied or pickled alone
    has none.
    """

    def __init__(self, parent: nn.Module | None = None, name: str = ""):
        self.parent, self.name = parent, name

    def taken_by(self, layer: nn.Module) -> nn.Module | None:
        """The tuner layer of another kind that is there instead of the SPON layer, or None."""
        there = layer if self.parent is None else self.parent._modules.get(self.name, layer)
        # A SPON layer is there where this one is a replica of it (nn.DataParallel).
        is_other = there is not layer and isinstance(there, BaseTunerLayer) and not isinstance(there, type(layer))
        return there if is_other else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Place":
        return Place(memo.get(id(self.parent)), self.name)

    def __reduce__(self):
        return Place, ()
