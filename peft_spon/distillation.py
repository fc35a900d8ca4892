# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense teacher and sparse student in one forward of one model, compared in front of its output head."""

import functools
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers.utils import logging

from .losses import OutputHead, compare_hidden, compare_logits
from .modes import attribute, dense_mode, evaluation_mode


logger = logging.get_logger(__name__)


class SelfDistillation:
    """
    Stands in for the `forward` of a causal language model and gives it a second way to be called.

    Inside a `with` block, `model(**inputs, distill_labels=labels)` runs the model with SPON off (the teacher: no
    gradient, no dropout, NEFTune's noise the same as the student's), then with SPON on, and returns the per-token
    [`losses.Distillation`] as a dict; without that argument nothing changes.
    It must be one call: wrappers that shard or synchronise (DDP, FSDP2, ZeRO-3) only see what happens inside their own
    forward.

    The logits of all tokens are not made. What goes into the output head is caught on its way and compared in chunks;
    the model's own logits of the last token serve to check that we know what the model does after its head
    (scale, soft cap). A model that does something else is trained on plain logits, and that is said once.

    Args:
        model (`torch.nn.Module`): the model to call, without PEFT's wrapper.
        temperature (`float`): divides the logits of both in the KL.
        lean (`bool`, *optional*, defaults to `True`): `False`: always plain logits.
    """

    def __init__(self, model: nn.Module, temperature: float, lean: bool = True):
        self.model = model
        self.temperature = temperature
        self.lean = lean
        self.scale: float | None = None  # what the model multiplies its logits by; None: not looked at yet
        self.kept_teacher: list[torch.Tensor] | None = None  # see one_teacher
        functools.update_wrapper(self, model.forward, updated=())

    def __enter__(self) -> None:
        """Take the place of the model's forward, for as long as the `with` block lasts."""
        self.replaced = vars(self.model).get("forward")  # where another library has put its own over the class's
        self.forward = self.model.forward
        self.model.forward = self

    def __exit__(self, *_: Any) -> None:
        if self.replaced is None:
            del self.model.forward
        else:
            self.model.forward = self.replaced

    @torch.compiler.disable(recursive=False)  # what it calls is compiled
    def __call__(self, *args: Any, distill_labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if distill_labels is None:
            return self.forward(*args, **kwargs)
        # The prediction at position t is for the label at t + 1.
        counted = distill_labels[:, 1:] != -100
        labels = distill_labels[:, 1:][counted]
        self._decide(args, kwargs)
        if self.kept_teacher:
            teacher = self.kept_teacher[0]
        else:
            teacher = self._teacher(args, kwargs, counted)
            if self.kept_teacher is not None:
                self.kept_teacher.append(teacher)
        student = predictions(self._run(args, kwargs), counted)
        teacher, labels = teacher.to(student.device), labels.to(student.device)
        if not self.lean:
            result = compare_logits(student, teacher, labels, self.temperature)
        else:
            with gathered_head(self.model.get_output_embeddings()) as (weight, bias):
                head = OutputHead(weight, bias, self.scale, softcap_of(self.model))
                result = compare_hidden(student, teacher, labels, head, self.temperature)
        return vars(result)

    def outputs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        What the model gives for these inputs, as it is now, with its gradient: hidden states in front of its head,
        shape (batch, tokens, hidden), or, where `lean` is False then, its logits.
        """
        with self:
            self._decide((), inputs)
            return self._run((), inputs)

    def _decide(self, args: tuple, kwargs: dict) -> None:
        """Look at the model's head once: is what lies in front of it enough?"""
        if self.lean and self.scale is None:
            problem = self._inspect(args, kwargs)
            if problem:
                self.lean = False
                logger.warning(f"The distillation loss holds the logits of all tokens, in fp32: {problem}.")

    @contextmanager
    def one_teacher(self, kept: list[torch.Tensor]):
        """`with distillation.one_teacher(kept):` the calls inside are for one batch, with one list: what the teacher
        gave is put there by the first, and those after it, also in later blocks, do not run the teacher again."""
        self.kept_teacher = kept
        try:
            yield
        finally:
            self.kept_teacher = None

    def _teacher(self, args: tuple, kwargs: dict, counted: torch.Tensor) -> torch.Tensor:
        noisy = [embedding for embedding in noisy_embedding(self.model) if embedding.training]
        with torch.no_grad(), dense_mode(self.model), evaluation_mode(self.model), noise_ahead(noisy):
            return predictions(self._run(args, kwargs), counted)

    def _run(self, args: tuple, kwargs: dict) -> torch.Tensor:
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

    @torch.no_grad()
    def _inspect(self, args: tuple, kwargs: dict) -> str | None:
        """Find the scale of the logits and check what we compute against the model; or say what is in the way."""
        problem = head_problem(self.model)
        if problem:
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


def predictions(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Of values (batch, tokens, ...) those that predict a counted label (batch, tokens - 1): (counted, ...)."""
    return values[:, :-1][counted.to(values.device)]


def head_problem(model: nn.Module) -> str | None:
    """Why the loss cannot look in front of the output head of a model, or None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return f"{type(model).__name__} has no output head (get_output_embeddings)"
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return f"its output head, {type(head).__name__}, is no plain linear layer"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its output head is trained"
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


def noisy_embedding(model: nn.Module) -> list[nn.Module]:
    """The input embedding where NEFTune adds noise to it, which it does in training mode only; else nothing."""
    embedding = model.get_input_embeddings()
    return [embedding] if "neftune_noise_alpha" in vars(embedding) else []


@contextmanager
def noise_ahead(embeddings: list[nn.Module]):
    """`with noise_ahead(noisy_embedding(model)):` the noise on the embeddings is what the next forward will draw."""
    if not embeddings:
        yield
        return
    device = next(embeddings[0].parameters()).device
    devices = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**devices), attribute(embeddings, "training", True):
        yield


@contextmanager
def without_dropout(model: nn.Module):
    """`with without_dropout(model):` all dropout probabilities are 0, in layers and in attributes of other modules.

    For training: unlike `evaluation_mode` it leaves gradient checkpointing on, whose recomputation must draw nothing.
    """
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
