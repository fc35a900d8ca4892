# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A decode step of one layer: y = W (scale * S(x)) + b', b' = b + shift + W inner, reading W where S(x) is not 0."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .criteria import Sparsifier, State
from .int8 import Int8Weight, version_of
from .kernels import DTYPES, MOST_ROWS, bind_threshold_gemv, make_ready, skips, sparse_gemv, threshold_gemv
from .repair import add
from .transposed import Wrap, can_transpose, lay_out, restore_weight, transpose_weight


class Running(NamedTuple):
    """What a layer computes at the moment.

    Attributes:
        names (`tuple`): the adapters in use, by order; of a merged layer none.
        merged (`tuple`): those of them that are merged.
        beneath (`tuple`): the state of a LoRA beneath: merged, off, in use, scaling.
        sparsifier (`Sparsifier`): S.
    """

    names: tuple[str | None, ...]
    merged: tuple[str, ...]
    beneath: tuple[Any, ...]
    sparsifier: Sparsifier


class Decoder:
    """
    The constants of a layer's decode step, and the tensors that they were made of.

    Args:
        running ([`Running`]): what they are for.
        core (`nn.Module`): the layer that holds W.
        int8 ([`Int8Weight`], *optional*): the copy of W that is read; None: the layer's own weight, transposed.
        scale (`torch.Tensor`, *optional*): 1 + gain, fp32, (in,).
        bias (`torch.Tensor`, *optional*): b', fp32, (out,).
        around (`Callable`, *optional*): x to W x + b with what is around W, such as a LoRA that is not merged; the
            bias is without b then.
        state (`dict`): the tensors of S.
        made_of (`list`): modules whose own tensors, and places for some, all that was made of.

    Attributes:
        constants (`tuple`, *optional*): what [`settled_step`] takes; with S in the kernel and no LoRA beneath.
    """

    def __init__(
        self,
        running: Running,
        core: nn.Module,
        int8: Int8Weight | None,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        around: Callable[[torch.Tensor], torch.Tensor] | None,
        state: State,
        made_of: list[nn.Module],
    ):
        sparsifier = running.sparsifier
        self.running, self.around, self.state = running, around, state
        self.scale, self.bias = scale, bias
        self.weight, self.weight_scale = core.weight, None if int8 is None else int8.weight_scale
        self.device, self.dtype, self.address = core.weight.device, core.weight.dtype, core.weight.data_ptr()
        if around is None:
            self.weight_t = core.weight_t.detach() if int8 is None else int8.weight_t
        (int8 or core).zeros = sparsifier.zeroed_share
        make_ready(self.device)
        self.n_in, self.fused = sparsifier.n_in, None
        is_served = self.dtype in DTYPES and sparsifier.sparsity > 0
        if is_served and around is None and sparsifier.uses_threshold and sparsifier.criterion.is_fused:
            others = {"gain": scale, "bias": bias, "weight_scale": self.weight_scale}
            scores = sparsifier.criterion.threshold_gemv(state)
            self.fused = bind_threshold_gemv(self.weight_t, state["threshold"], self.dtype, **others, **scores)
        # S in the kernel costs nothing on a CPU, so there it pays even where every weight is read.
        pays = self.fused is not None and self.device.type == "cpu"
        rows = [n for n in range(1, MOST_ROWS + 1) if pays or skips(n, sparsifier.zeroed_share)]
        self.most_entries = len(rows) * sparsifier.n_in if is_served else 0
        self.constants = None
        if self.fused is not None and not running.beneath:
            scores = {"column_scale": None, "relative": 0, **sparsifier.criterion.threshold_gemv(state)}
            served = self.most_entries, self.dtype, None if int8 is None else self.weight_t
            selection = state["threshold"], scores["column_scale"], scores["relative"]
            self.constants = *served, self.weight_scale, *selection, scale, bias
        self.tensors = [
            (held, name, tensor, version_of(tensor))
            for module in made_of
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]

    def __reduce__(self):
        return type(None), ()  # a copy of the layer makes its own

    def is_fresh(self) -> bool:
        """Whether the tensors are the ones that the constants were made of, with the values of then."""
        if self.weight.data_ptr() != self.address:
            return False
        for held, name, tensor, version in self.tensors:
            if held.get(name) is not tensor or version_of(tensor) != version:
                return False
        return True

    def serves(self, x: torch.Tensor) -> bool:
        """Whether x, (..., in), has so few rows that leaving out weights pays, and fits the layer."""
        fits = x.dtype is self.dtype and x.device == self.device and x.shape[-1] == self.n_in
        return fits and 0 < x.numel() <= self.most_entries

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y, shape (..., out), of x (..., in)."""
        return self.general(x, self.state) if self.fused is None else self.fused(x)

    def general(self, x: torch.Tensor, state: State, weight_t: torch.Tensor | None = None) -> torch.Tensor:
        """The same with this state and W^T: torch.compile is shown those of now, not those of then."""
        sparsifier, others = self.running.sparsifier, {"bias": self.bias, "weight_scale": self.weight_scale}
        if self.around is None and weight_t is None:
            weight_t = self.weight_t
        if self.fused is not None:
            scores = sparsifier.criterion.threshold_gemv(state)
            return threshold_gemv(x, weight_t, state["threshold"], gain=self.scale, **others, **scores)
        z = sparsifier(x, state)
        if self.scale is not None:
            z = z * self.scale.to(z.dtype)
        if self.around is None:
            return sparse_gemv(z, weight_t, **others)
        y = self.around(z)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Decoding:
    """Mixin of the sparse layers: what [`prepare_for_decode`] makes of them. In front of their other classes."""

    decoder: Decoder | None = None
    # The decoder's constants, while nothing has been set here since it was found to be right. All that torch.compile
    # sees of a step: it asks at every step whether what it has read is as it was, and to ask that of the decoders of
    # 200 layers took longer than the step on a GPU.
    settled: tuple | None = None
    is_prepared = False
    decode_dtype: torch.dtype | None = None  # int8: prepared to read a copy of W in 8 bits
    _int8: Int8Weight | None = None
    wrap: Wrap = staticmethod(lambda dense: dense)

    # What the layers say of themselves.

    def plain_layer(self) -> nn.Module:
        """The linear layer that holds W."""
        raise NotImplementedError

    def merged_into_weight(self) -> tuple[str, ...]:
        """Names of the adapters beneath that are merged into W."""
        return ()

    def running_now(self) -> Running | None:
        """What the layer computes now; None where that is nothing that a decoder computes."""
        raise NotImplementedError

    def make_decoder(self, running: Running) -> Decoder:
        """Its constants."""
        raise NotImplementedError

    def weight_t_now(self) -> torch.Tensor:
        """W^T, shape (in, out), of a layer that has no LoRA beneath."""
        raise NotImplementedError

    def is_sparse_from_the_first(self, name: str | None) -> bool:
        """Whether S acts on every token, wherever in the prompt it is."""
        return self._every_token or self.settings(name).prefill in ("sparse", 0)

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever is set here may be what the decoder was made for: the adapters in use, a switch, a dial.

        So lists and dicts that say what a layer computes are replaced, never changed in place.
        """
        is_new = vars(self).get(name, self) is not value
        super().__setattr__(name, value)
        if is_new:
            vars(self)["settled"] = None

    def decode_step(self, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output where x is the input of a decode step that the decoder serves, else None."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.jit.is_tracing():
            return None
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and self.settled is not None:
            copy_t = self.settled[2]
            return settled_step(self.settled, self.weight_t_now() if copy_t is None else copy_t, x)
        if (decoder := self.right_decoder(is_compiling)) is None or not decoder.serves(x):
            return None
        first = decoder.running.names[0]
        if self.first_sparse_token(x, first) != 0:
            return None
        if is_compiling:
            weight_t = self.plain_layer().weight_t if self.decode_dtype is None else None
            return decoder.general(x, self.sparsifier_state(first), weight_t)
        return decoder(x)

    def right_decoder(self, is_compiling: bool) -> Decoder | None:
        """The decoder of what the layer computes now, made where there is none; compiled code makes none."""
        decoder = self.decoder
        if not is_compiling and decoder is not None and decoder.constants is not None:
            # Both of one decoder: another thread may be about to put a new one there.
            if self.settled is decoder.constants and decoder.is_fresh():
                return decoder
        if (running := self.running_now()) is None:
            return None
        core = self.plain_layer()
        is_right = decoder is not None and decoder.running == running and decoder.weight is core.weight
        if is_compiling:
            return decoder if is_right else None
        if not (is_right and decoder.is_fresh()):
            if self.decode_dtype is None:  # another weight or layer may have been put there
                if can_transpose(core, self.wrap):
                    transpose_weight(core, self.wrap)
                else:
                    lay_out(core)
            decoder = self.decoder = self.make_decoder(running)
        self.settle(decoder)
        return decoder

    def settle(self, decoder: Decoder) -> None:
        """Note that a decoder is right."""
        if decoder.constants is not None and self.is_sparse_from_the_first(decoder.running.names[0]):
            vars(self)["settled"] = decoder.constants
            # Looked at once more: a switch that another thread has set meanwhile would be forgotten.
            still = self.running_now() == decoder.running
            if not (still and self.is_sparse_from_the_first(decoder.running.names[0])):
                vars(self)["settled"] = None

    def int8_weight(self) -> Int8Weight | None:
        """The copy of W in 8 bits, where the layer is prepared so, made anew where W has changed.

        torch.compile sees the copy that is there (None after W was merged into or the layer was copied).
        """
        if self.decode_dtype is not None and not torch.compiler.is_compiling():
            core, merged = self.plain_layer(), self.merged_into_weight()
            if self._int8 is None or not self._int8.is_of(core, merged):
                self._int8 = Int8Weight(core, merged)
        return self._int8

    def int8_linear(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """W x + b with that copy; None: not prepared so, or what only the layer itself can do."""
        if self.decode_dtype is None or torch.is_autocast_enabled(x.device.type):
            return None
        weight = self.plain_layer().weight
        if (torch.is_grad_enabled() and weight.requires_grad) or x.dtype != weight.dtype or x.device != weight.device:
            return None
        int8 = self.int8_weight()
        return None if int8 is None else partial(int8, bias=self.plain_layer().bias)

    def prepare_decode(self, weight_dtype: torch.dtype | None = None) -> None:
        """Lay the weight out for decoding, or copy it in 8 bits, and make the constants."""
        if not self.is_prepared:
            if weight_dtype is None:
                transpose_weight(self.plain_layer(), self.wrap)
            self.is_prepared, self.decode_dtype = True, weight_dtype
        if (running := self.running_now()) is not None:
            self.decoder = self.make_decoder(running)
            self.settle(self.decoder)

    def restore_decode(self) -> None:
        """Undo [`Decoding.prepare_decode`]."""
        if self.is_prepared and self.decode_dtype is None:
            restore_weight(self.plain_layer(), self.wrap)
        self.is_prepared, self.decode_dtype, self._int8, self.decoder = False, None, None, None

    def train(self, mode: bool = True):
        """Training undoes the preparation: it changes what the constants are made of, and reads W by rows."""
        if mode:
            self.restore_decode()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.decoder = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any):
        self.decoder = None  # another device, another dtype
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "settled": None}  # a copy of the layer makes its own


def settled_step(constants: tuple, weight_t: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """
    A decode step with S in the kernel, of nothing but its constants.

    Args:
        constants (`tuple`): `Decoder.constants`.
        weight_t (`torch.Tensor`): W^T, shape (in, out), dtype of x, or int8.
        x (`torch.Tensor`): the layer's input, shape (..., in).

    Returns:
        `torch.Tensor`: y, shape (..., out), dtype of x; None: x has another dtype, device or width, or too many rows.
    """
    most_entries, dtype, _, weight_scale, tau, column_scale, relative, gain, bias = constants
    fits = x.dtype is dtype and x.device == weight_t.device and x.shape[-1] == weight_t.shape[0]
    if not fits or not 0 < x.numel() <= most_entries:
        return None
    return threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative, weight_scale)


def constant_bias(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of biases (out,) in fp32, None where there is none."""
    total = None
    for part in parts:
        total = add(total, None if part is None else part.detach().float())
    return total
