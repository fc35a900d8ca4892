# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear layers as a server has them: several of the checkpoint's fused into one, and of each perhaps only a share.

Nothing here knows a server: [`serving.vllm`] tells these functions what it has.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import make_criterion
from ..criteria import Sparsifier, State
from ..decode import why_not
from ..merged import SponMergedConfig
from ..merged_loading import read_entry, state_problem
from ..sparse_linear import REPAIR, SparseMixin, make_sparse


def read_config(values: dict[str, Any]) -> SponMergedConfig:
    """
    A checkpoint's `quantization_config`, checked as far as it can be before the weights come.

    Raises:
        `ValueError`: damaged, of a newer version, an unknown criterion, a `prefill` that servers cannot follow.
    """
    config = SponMergedConfig(**values)
    for name, entry in config.layers.items():
        try:
            make_criterion(entry["criterion"], entry["criterion_kwargs"])
        except ValueError as error:
            raise ValueError(f"config.json: layer '{name}': {error}") from None
        if entry["prefill"] not in ("sparse", 0):
            raise ValueError(
                f"config.json: layer '{name}' has prefill={entry['prefill']!r}, and vLLM does not tell a layer which "
                "tokens are the prompt's: requests share a batch, prompts come in chunks and from the cache. Merge "
                "the adapter with SponConfig(prefill='sparse'), or generate with transformers."
            )
    return config


def unclaimed(names: Iterable[str], claimed: Iterable[str]) -> list[str]:
    """Layers of the checkpoint of whose kind the server has none. Their kind, since a process may have a few of the
    repeated blocks: names but for their numbers."""
    kinds = {kind(name) for name in claimed}
    return [name for name in names if kind(name) not in kinds]


def kind(name: str) -> tuple[str, ...]:
    return tuple("N" if part.isdigit() else part for part in name.split("."))


def share(vector: torch.Tensor, size: int, rank: int, ranks: int) -> torch.Tensor:
    """The entries of a vector (n,) that a rank has, `size` many; where there are not so many shares, ranks next to
    each other have the same one (heads of keys and values).

    Raises:
        `ValueError`: n cannot be shared so.
    """
    pieces, rest = divmod(len(vector), size)
    if rest or pieces == 0 or ranks % pieces:
        raise ValueError(f"{len(vector)} entries cannot be shared by {ranks} processes with {size} each.")
    index = rank // (ranks // pieces)
    return vector[index * size : (index + 1) * size]


@dataclass
class Gathered:
    """S of a layer whose input is spread over processes, where the scores of an entry depend on others.

    Attributes:
        sparsifier (`Sparsifier`), state (`dict`): S.
        rank, ranks (`int`): which share of the input this process has.
    """

    sparsifier: Sparsifier
    state: State
    rank: int
    ranks: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """This process's share of S(x), shape (..., in / ranks), of the whole x (..., in)."""
        return self.sparsifier(x, self.state).chunk(self.ranks, dim=-1)[self.rank]


@dataclass
class Part:
    """
    One linear layer of the checkpoint, as a process has it.

    Attributes:
        layer (`nn.Module`): a merged layer, or a dense one.
        gathered ([`Gathered`], *optional*): S, where it is not in the layer.
        name (`str`): in the checkpoint.
    """

    layer: nn.Module
    gathered: Gathered | None = None
    name: str = ""

    def kept(self, x: torch.Tensor) -> torch.Tensor | None:
        """1 where S keeps an entry of the layer's input, or of the whole input, else 0; None without S."""
        if not isinstance(self.layer, SparseMixin):
            return None
        s = self.gathered or Gathered(self.layer.sparsifier(), self.layer.sparsifier_state(), 0, 1)
        return s.sparsifier.keep(s.sparsifier.criterion.encode(x, s.state), s.state)


def dense_part(weight: torch.Tensor, bias: torch.Tensor | None) -> Part:
    """Rows of a fused layer that are not sparse."""
    return Part(linear(weight, bias))


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").eval()
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def sparse_part(
    name: str,
    entry: dict[str, Any],
    own: dict[str, torch.Tensor],
    shape: tuple[int, int],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rank: int = 0,
    ranks: int = 1,
) -> Part:
    """
    A merged layer, as one process has it.

    Args:
        name (`str`), entry (`dict`): of the layer in the checkpoint.
        own (`dict`): what SPON adds, whole and as it is in the files.
        shape (`tuple[int, int]`): (out, in) of the whole layer.
        weight (`torch.Tensor`): this process's rows, or, with a spread input, columns.
        bias (`torch.Tensor`, *optional*): to be added by this process.
        rank, ranks (`int`, *optional*): of this process.

    Raises:
        `ValueError`: what was loaded is not what was saved, or cannot be spread.
    """
    if (problem := state_problem(name, own, entry)) is not None:
        raise ValueError(problem)
    n_out, n_in = shape
    settings, _ = read_entry(name, entry, n_in, n_out)
    sparsifier, gathered = settings.sparsifier, None
    tensors = {key: value.to(weight.device) for key, value in own.items()}
    state = {key.removeprefix("spon_"): value for key, value in tensors.items() if key not in REPAIR}
    if weight.shape[1] < n_in:  # the input is spread over processes, and what they compute will be summed
        zeros = sparsifier.zeroed_share
        if not is_local(sparsifier, state):
            gathered = Gathered(sparsifier, state, rank, ranks)
            sparsifier = replace(sparsifier, sparsity=0.0)
        sparsifier = replace(sparsifier, n_in=weight.shape[1])
        for key, value in tensors.items():
            if key != "spon_shift" and value.shape == (n_in,):
                tensors[key] = share(value, weight.shape[1], rank, ranks)
        if rank > 0:
            tensors.pop("spon_shift", None)
    elif "spon_shift" in tensors:
        tensors["spon_shift"] = share(tensors["spon_shift"], len(weight), rank, ranks)
    layer = make_sparse(linear(weight, bias), replace(settings, sparsifier=sparsifier), tensors)
    if why_not(layer, Counter()) is None:
        layer.prepare_decode()
        if gathered is not None:
            layer.zeros = zeros  # what it gets, though it has no S
    return Part(layer, gathered, name)


def is_local(sparsifier: Sparsifier, state: State) -> bool:
    """Whether an entry is kept or not whatever the others of its token are."""
    criterion = sparsifier.criterion
    is_fused = sparsifier.uses_threshold and criterion.is_mask and criterion.is_fused
    return sparsifier.sparsity == 0 or (is_fused and not criterion.threshold_gemv(state).get("relative"))
