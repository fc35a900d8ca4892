# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense teacher and sparse student in one forward of one model, compared in front of its output head."""

import functools
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.utils import logging

from .head import BeforeHead, head_problem
from .losses import compare_hidden, compare_logits
from .modes import attribute, dense_mode, evaluation_mode


logger = logging.get_logger(__name__)


class SelfDistillation(BeforeHead):
    """
    Stands in for the `forward` of a causal language model and gives it a second way to be called.

    Inside a `with` block, `model(**inputs, distill_labels=labels)` runs the model with SPON off (the teacher: no
    gradient, no dropout, NEFTune's noise the same as the student's), then with SPON on, and returns the per-token
    [`losses.Distillation`] as a dict; without that argument nothing changes.
    It must be one call: wrappers that shard or synchronise (DDP, FSDP2, ZeRO-3) only see what happens inside their own
    forward.

    The logits of all tokens are not made: what goes into the output head, see [`head.BeforeHead`], is compared in
    chunks. A model that does something unknown after its head is trained on plain logits, and that is said once.

    Args:
        model (`torch.nn.Module`): the model to call, without PEFT's wrapper.
        temperature (`float`): divides the logits of both in the KL.
        lean (`bool`, *optional*, defaults to `True`): `False`: always plain logits.
    """

    def __init__(self, model: nn.Module, temperature: float, lean: bool = True):
        super().__init__(model, lean)
        self.temperature = temperature
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
        self._look(args, kwargs)
        if self.kept_teacher:
            teacher = self.kept_teacher[0]
        else:
            teacher = self._teacher(args, kwargs, counted)
            if self.kept_teacher is not None:
                self.kept_teacher.append(teacher)
        student = predictions(self.run(args, kwargs), counted)
        teacher, labels = teacher.to(student.device), labels.to(student.device)
        if not self.lean:
            result = compare_logits(student, teacher, labels, self.temperature)
        else:
            with self.head() as head:
                result = compare_hidden(student, teacher, labels, head, self.temperature)
        return vars(result)

    def problem(self) -> str | None:
        """Also a head that is trained is in the way: the loss has no gradient for it."""
        problem = head_problem(self.model)
        is_trained = problem is None and any(p.requires_grad for p in self.model.get_output_embeddings().parameters())
        return "its output head is trained" if is_trained else problem

    def outputs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        What the model gives for these inputs, as it is now, with its gradient: hidden states in front of its head,
        shape (batch, tokens, hidden), or, where `lean` is False then, its logits.
        """
        with self:
            self._look((), inputs)
            return self.run((), inputs)

    def _look(self, args: tuple, kwargs: dict) -> None:
        """Look at the model's head once: is what lies in front of it enough?"""
        if problem := self.look(args, kwargs):
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
            return predictions(self.run(args, kwargs), counted)


def predictions(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Of values (batch, tokens, ...) those that predict a counted label (batch, tokens - 1): (counted, ...)."""
    return values[:, :-1][counted.to(values.device)]


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
