# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a language model feeds its output head: from it logits are made in chunks, never for all tokens together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .losses import OutputHead
from .modes import evaluation_mode
from .sparse_linear import SparseMixin


class BeforeHead:
    """
    Runs a language model up to its output head.

    What goes into the head is caught on its way; the model's own logits of the last token serve to check that we know
    what the model does after its head (scale, soft cap). A model that does something else gives all its logits.

    Args:
        model (`torch.nn.Module`): the model to call, without PEFT's wrapper.
        lean (`bool`, *optional*, defaults to `True`): `False`: always all logits.

    Attributes:
        forward (`Callable`): what is called; default: the model's own forward.
        scale (`float`, *optional*): what the model multiplies its logits by; None: not looked at yet.
    """

    def __init__(self, model: nn.Module, lean: bool = True):
        self.model = model
        self.forward = model.forward
        self.lean = lean
        self.scale: float | None = None

    def look(self, args: tuple, kwargs: dict) -> str | None:
        """Before the first `run`, with its inputs: whether we can be lean, and if not (then it is said once) why."""
        if not self.lean or self.scale is not None:
            return None
        problem = self._inspect(args, kwargs)
        self.lean = problem is None
        return problem

    def problem(self) -> str | None:
        """What about the head itself is in the way, or None."""
        return head_problem(self.model)

    def run(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the model feeds its head, shape (batch, tokens, hidden), or without `lean` its logits."""
        if not self.lean:
            outputs = self.forward(*args, **kwargs)
            if "logits" not in outputs:
                raise ValueError(
                    f"{type(self.model).__name__} gives no logits, so there is no KL; take a model with a head, for "
                    "example a ...ForCausalLM."
                )
            return outputs.logits
        caught, _ = self._catch(args, kwargs)
        if len(caught) != 1:
            raise RuntimeError(f"The output head ran {len(caught)} times in one forward.")
        return caught[0]

    def _catch(self, args: tuple, kwargs: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What went into the head, once a call, and the model's logits of the last token: (batch, 1, vocabulary)."""
        caught = []

        def keep_last(module: nn.Module, head_args: tuple) -> tuple:
            caught.append(head_args[0])
            return (head_args[0][:, -1:], *head_args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep_last)
        try:
            logits = self.forward(*args, **kwargs).logits
        finally:
            handle.remove()
        return caught, logits

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """What makes logits of what `run` gives when it is lean."""
        with gathered_head(self.model.get_output_embeddings()) as (weight, bias):
            yield OutputHead(weight, bias, self.scale, softcap_of(self.model))

    @torch.no_grad()
    def _inspect(self, args: tuple, kwargs: dict) -> str | None:
        """Find the scale of the logits and check what we compute against the model; or say what is in the way."""
        if problem := self.problem():
            return problem
        with evaluation_mode(self.model), without_autocast(self.model.get_output_embeddings()):
            caught, wanted = self._catch(args, kwargs)
        if len(caught) != 1:
            return f"the output head of {type(self.model).__name__} runs {len(caught)} times in a forward"
        hidden = caught[0]
        with gathered_head(self.model.get_output_embeddings()) as (weight, bias):
            raw = OutputHead(weight, bias).logits(hidden[:, -1])
            softcap = softcap_of(self.model)
            wanted = wanted[:, -1].float()
            if raw.shape != wanted.shape:
                return f"{type(self.model).__name__} changes its logits' shape behind the output head"
            uncapped = wanted if softcap is None else softcap * (wanted / softcap).clamp(-0.999999, 0.999999).atanh()
            allowed = ~(raw.isneginf() & wanted.isneginf())  # a bias of -inf forbids a token
            scale = float((raw * uncapped)[allowed].sum() / raw[allowed].square().sum().clamp_min(1e-30))
            # bf16 keeps 3 digits of a logit.
            tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
            scale = 1.0 if abs(scale - 1) < 1e-3 else scale
            ours = OutputHead(weight, bias, scale, softcap).logits(hidden[:, -1])
        ours, wanted = ours[allowed], wanted[allowed]
        if not (ours - wanted).abs().max() <= tolerance * wanted.abs().max():
            return f"{type(self.model).__name__} changes its logits behind the output head in a way not known here"
        self.scale = scale
        return None


def head_problem(model: nn.Module) -> str | None:
    """Why logits cannot be made from what a model feeds its output head, or None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return f"{type(model).__name__} has no output head (get_output_embeddings)"
    weight = getattr(head, "weight", None)
    is_plain = isinstance(head, nn.Linear) and not isinstance(head, SparseMixin)
    if not is_plain or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return f"its output head, {type(head).__name__}, is no plain linear layer"
    if weight.device.type == "meta":
        return "its output head is offloaded"
    return None


def softcap_of(model: nn.Module) -> float | None:
    """Where the model caps its logits, c tanh(z / c) (Gemma 2 and 3), or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@contextmanager
def gathered_head(head: nn.Linear):
    """Weight and bias of the output head, whole and detached, where FSDP2 or ZeRO-3 shard them."""
    if hasattr(head.weight, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(head.parameters())):
            yield head.weight.detach(), None if head.bias is None else head.bias.detach()
        return
    weight, bias = (value.full_tensor() if isinstance(value, DTensor) else value for value in (head.weight, head.bias))
    yield weight.detach(), None if bias is None else bias.detach()


@contextmanager
def without_autocast(head: nn.Linear):
    """`with without_autocast(head):` the head computes in the dtype of its weight: autocast would round its logits."""
    device = head.weight.device.type

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            return before(hidden.to(head.weight.dtype))

    before, own = head.forward, vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
