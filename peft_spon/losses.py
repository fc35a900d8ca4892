# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What anchors are trained on: the distance between the dense and the sparse model's next-token distributions."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


# Largest fp32 buffer of the chunked loss, in elements: 32 MB. Several are alive at a time.
CHUNK_ELEMENTS = 1 << 23


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(teacher || student) of the softmax distributions, per token (SPON, arXiv 2512.12744, section 3).

    Computed in fp32 whatever the dtype of the logits: SPON's KL is small, and bf16 logits would drown it. A token that
    the teacher forbids (a logit of -inf) adds nothing, as 0 log 0 = 0.

    Args:
        student_logits, teacher_logits (`torch.Tensor`): shape (tokens, vocabulary).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits; the KL is not rescaled by it.

    Returns:
        `torch.Tensor`: fp32, shape (tokens,), in nats.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return _kl(student, teacher)


def _kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The same from log-probabilities."""
    p = teacher.exp()
    return (p * (teacher - student)).masked_fill(p == 0, 0).sum(-1)


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where that overflows."""
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class Distillation:
    """Per-token outcome of comparing student and teacher; every field has shape (tokens,).

    Attributes:
        kl: KL(teacher || student) in nats, fp32; the only one that carries a gradient.
        student_nll, teacher_nll: negative log-likelihood of the labels at temperature 1, fp32, in nats.
        agree: whether both put the same token first.
    """

    kl: torch.Tensor
    student_nll: torch.Tensor
    teacher_nll: torch.Tensor
    agree: torch.Tensor


def compare_logits(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> Distillation:
    """Compare full logits, shape (tokens, vocabulary), for labels of shape (tokens,): the plain, memory-hungry way."""
    log_p = [F.log_softmax(logits.float(), dim=-1) for logits in (student, teacher)]
    with torch.no_grad():
        nll = [-values.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for values in log_p]
        agree = student.argmax(-1) == teacher.argmax(-1)
    kl = _kl(*log_p) if temperature == 1 else forward_kl(*log_p, temperature)
    return Distillation(kl, *nll, agree)


def sums_by_row(outcome: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """
    What is summed of each row of a batch: tokens, KL, student's and teacher's NLL, agreement.

    Args:
        outcome (`dict`): the fields of a [`Distillation`].
        labels (`torch.Tensor`): shape (rows, tokens), -100: not counted; the first of a row is never predicted.

    Returns:
        `torch.Tensor`: fp32, shape (rows, 5).
    """
    kl = outcome["kl"].detach()
    columns = [torch.ones_like(kl), kl, outcome["student_nll"], outcome["teacher_nll"], outcome["agree"]]
    values = torch.stack([column.float() for column in columns], dim=1)
    row = (labels[:, 1:] != -100).nonzero()[:, 0].to(values.device)
    return values.new_zeros(labels.shape[0], len(columns)).index_add_(0, row, values)


def means(sums: torch.Tensor) -> dict[str, float]:
    """Metrics per token, from the sums, shape (5,), of [`sums_by_row`] over rows; none without tokens."""
    tokens, kl, student_nll, teacher_nll, agree = sums.tolist()
    if tokens == 0:
        return {}
    return {
        "kl": kl / tokens,
        "perplexity": perplexity(student_nll / tokens),
        "dense_perplexity": perplexity(teacher_nll / tokens),
        "top1_agreement": agree / tokens,
    }


@dataclass(frozen=True)
class OutputHead:
    """From hidden states to logits: `softcap * tanh(scale * (W h + b) / softcap)`, in fp32; W and b are frozen.

    Attributes:
        weight: shape (vocabulary, hidden).
        bias: shape (vocabulary,), or None.
        scale: what the model multiplies its logits by.
        softcap: where the model caps its logits (Gemma 2), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits, shape (tokens, vocabulary), of hidden states of shape (tokens, hidden)."""
        logits = matmul_fp32(hidden, self.weight.t())
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the hidden states, fp32; overwrites both arguments."""
        if self.softcap is not None:
            grad_logits *= logits.div_(self.softcap).square_().neg_().add_(1)
        return matmul_fp32(grad_logits.to(self.weight.dtype), self.weight).mul_(self.scale)


def compare_hidden(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    head: OutputHead,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Distillation:
    """
    As [`compare_logits`], exact over the whole vocabulary, but from the hidden states in front of the output head.

    Runs over chunks of tokens, so the logits of all tokens never exist together. The head is frozen, so the student's
    gradient, (softmax(student) - softmax(teacher)) W, is known in the forward already: three products with the head
    instead of the five of recomputation, and no logits kept for the backward.

    Args:
        student, teacher (`torch.Tensor`): hidden states, shape (tokens, hidden); the student's may carry a gradient.
        labels (`torch.Tensor`): token ids, shape (tokens,).
        head ([`OutputHead`]): what makes logits of them.
        temperature (`float`, *optional*, defaults to 1.0): divides both logits; the KL is not rescaled by it.
        chunk_elements (`int`, *optional*): tokens x vocabulary of one chunk.

    Returns:
        [`Distillation`]
    """
    return Distillation(*_ChunkedForwardKL.apply(student, teacher, labels, head, temperature, chunk_elements))


class _ChunkedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, head, temperature, chunk_elements):
        tokens = student.shape[0]
        kl, student_nll, teacher_nll = (student.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        agree = student.new_empty(tokens, dtype=torch.bool)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        size = max(1, chunk_elements // head.weight.shape[0])
        for first in range(0, tokens, size):
            rows = slice(first, first + size)
            t, s = head.logits(teacher[rows]), head.logits(student[rows])
            agree[rows] = s.argmax(-1) == t.argmax(-1)
            at_label = labels[rows].unsqueeze(-1)
            teacher_lse, student_lse = t.logsumexp(-1, keepdim=True), s.logsumexp(-1, keepdim=True)
            teacher_nll[rows] = (teacher_lse - t.gather(-1, at_label)).squeeze(-1)
            student_nll[rows] = (student_lse - s.gather(-1, at_label)).squeeze(-1)
            if temperature == 1:
                log_t, log_s = t.sub_(teacher_lse), s - student_lse
            else:
                log_t, log_s = F.log_softmax(t / temperature, dim=-1), F.log_softmax(s / temperature, dim=-1)
            p_t = log_t.exp()
            kl[rows] = log_t.sub_(log_s).masked_fill_(p_t == 0, 0).mul_(p_t).sum(-1)
            if gradient is not None:
                grad_logits = log_s.exp_().sub_(p_t).div_(temperature)
                gradient[rows] = head.backward(grad_logits, s)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(student_nll, teacher_nll, agree)
        return kl, student_nll, teacher_nll, agree

    @staticmethod
    def backward(ctx, grad_kl, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_kl.unsqueeze(-1).to(gradient.dtype), None, None, None, None, None


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of matrices with an fp32 result that was never rounded to a smaller dtype, autocast or not."""
    with torch.autocast(a.device.type, enabled=False):
        if b.dtype == torch.float32:
            return a.float() @ b
        if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8
            return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        # No mixed-dtype product here: convert b in slices of its longer side, the vocabulary.
        if b.shape[0] <= b.shape[1]:
            return torch.cat([a.float() @ columns.float() for columns in b.split(8192, dim=1)], dim=1)
        result = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
        for columns, rows in zip(a.split(8192, dim=1), b.split(8192), strict=True):
            result.addmm_(columns.float(), rows.float())
        return result
