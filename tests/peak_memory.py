# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all tensors that are alive at a time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """
    `with PeakMemory(model) as memory:` has the peak of what operators give in the block, and of the model's weights.

    Attributes:
        peak (`int`): bytes.
    """

    def __init__(self, model):
        super().__init__()
        self.alive = {}
        self.now = self.peak = 0
        self.saw([*model.parameters(), *model.buffers()])

    def saw(self, tensors):
        for storage in {id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}.values():
            key = id(storage)
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.went, key)
        self.peak = max(self.peak, self.now)

    def went(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.saw([leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result
