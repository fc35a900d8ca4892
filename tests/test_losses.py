# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The chunked loss is the naive one: values, gradients, memory."""

import copy

import pytest
import torch
import transformers as tf
from models import MODELS, SMALL, SPECIAL, VOCAB, build
from peft import get_peft_model
from torch.nn import functional as F

from peft_spon import SponConfig, dense_mode
from peft_spon.distillation import SelfDistillation
from peft_spon.layer import spon_layers
from peft_spon.losses import OutputHead, compare_hidden, compare_logits, forward_kl, matmul_fp32


def test_forward_kl_is_the_definition():
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    p, q = F.softmax(teacher.double(), -1), F.softmax(student.double(), -1)
    torch.testing.assert_close(
        forward_kl(student, teacher).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6
    )
    hot = forward_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(hot, forward_kl(student / 2, teacher / 2))
    assert torch.equal(forward_kl(student, student), torch.zeros(5))
    assert forward_kl(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 7 * 53, 1 << 20])
def test_chunks_give_the_value_and_gradient_of_full_logits(temperature, softcap, bias, scale, chunk):
    hidden, vocabulary, tokens = 16, 53, 23
    head = OutputHead(torch.randn(vocabulary, hidden), torch.randn(vocabulary) if bias else None, scale, softcap)
    teacher = torch.randn(tokens, hidden)
    student = (teacher + 0.3 * torch.randn(tokens, hidden)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    weights = torch.rand(tokens)

    def logits(h):
        z = scale * F.linear(h, head.weight, head.bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    wanted = compare_logits(logits(student), logits(teacher), labels, temperature)
    (wanted_gradient,) = torch.autograd.grad((wanted.kl * weights).sum(), student)
    found = compare_hidden(student, teacher, labels, head, temperature, chunk_elements=chunk)
    (gradient,) = torch.autograd.grad((found.kl * weights).sum(), student)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.student_nll, wanted.student_nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.teacher_nll, wanted.teacher_nll, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.agree, wanted.agree)
    assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_that_both_models_forbid_add_nothing(temperature):
    hidden, vocabulary, forbidden = 8, 11, [0, 7]
    weight, bias = torch.randn(vocabulary, hidden), torch.randn(vocabulary)
    banned = bias.clone()
    banned[forbidden] = -torch.inf
    allowed = [i for i in range(vocabulary) if i not in forbidden]
    teacher, labels = torch.randn(5, hidden), torch.tensor([1, 2, 3, 4, 5])
    student = torch.randn(5, hidden, requires_grad=True)
    position = torch.tensor([allowed.index(int(label)) for label in labels])
    logits = [F.linear(h, weight[allowed], bias[allowed]) for h in (student, teacher)]
    wanted = compare_logits(*logits, position, temperature)
    (wanted_gradient,) = torch.autograd.grad(wanted.kl.sum(), student)
    full = compare_logits(F.linear(student, weight, banned), F.linear(teacher, weight, banned), labels, temperature)
    lean = compare_hidden(student, teacher, labels, OutputHead(weight, banned), temperature)
    for found in (full, lean):
        (gradient,) = torch.autograd.grad(found.kl.sum(), student)
        torch.testing.assert_close(found.kl, wanted.kl)
        torch.testing.assert_close(found.student_nll, wanted.student_nll)
        torch.testing.assert_close(gradient, wanted_gradient)
    broken = teacher.clone()
    broken[0, 0] = torch.nan
    assert compare_hidden(student, broken, labels, OutputHead(weight, banned), temperature).kl.isnan().tolist()[0]


def test_a_head_that_forbids_a_token_is_seen_through():
    model = get_peft_model(phi(), SponConfig(init_weights=False))
    with torch.no_grad():
        model.get_output_embeddings().bias[5] = -torch.inf
    found, gradient = loss_and_gradients(model, lean=True)
    assert found["kl"].isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_no_tokens_give_no_loss_and_no_error():
    head = OutputHead(torch.randn(5, 4))
    student = torch.randn(0, 4, requires_grad=True)
    result = compare_hidden(student, torch.randn(0, 4), torch.zeros(0, dtype=torch.long), head)
    result.kl.sum().backward()
    assert student.grad.shape == (0, 4)


def test_bf16_logits_are_not_rounded():
    """KL of two nearly equal distributions drowns in logits rounded to bf16."""
    weight = (torch.randn(20000, 64) * 0.1).bfloat16()
    teacher = torch.randn(32, 64).bfloat16()
    student = (teacher + 0.02 * torch.randn(32, 64)).bfloat16()
    labels = torch.zeros(32, dtype=torch.long)
    log_t, log_s = (torch.log_softmax(h.double() @ weight.double().t(), dim=-1) for h in (teacher, student))
    exact = (log_t.exp() * (log_t - log_s)).sum(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compare_hidden(student, teacher, labels, OutputHead(weight)).kl.double()
    rounded = compare_logits(student @ weight.t(), teacher @ weight.t(), labels).kl
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=2e-6)  # fp32's own rounding of log-probabilities
    # Of the mean: by how much single tokens are off depends on the order in which a processor sums.
    assert (rounded - exact).abs().mean() > 4 * (found - exact).abs().mean(), "the danger this guards against is real"
    a = torch.randn(3, 20000).bfloat16()
    torch.testing.assert_close(matmul_fp32(a, weight), a.float() @ weight.float(), rtol=1e-4, atol=1e-4)


def test_the_logits_of_all_tokens_never_exist():
    """No tensor of the forward or the backward is as large as a quarter of the logits."""
    tokens, vocabulary, hidden = 256, 4096, 8
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    head = OutputHead(torch.randn(vocabulary, hidden))
    student = torch.randn(tokens, hidden, requires_grad=True)
    with Watch():
        result = compare_hidden(
            student, torch.randn(tokens, hidden), torch.zeros(tokens, dtype=torch.long), head, chunk_elements=1 << 16
        )
        result.kl.sum().backward()
    assert 0 < largest <= tokens * vocabulary / 4


def gemma2():
    config = tf.Gemma2Config(
        **SMALL,
        **SPECIAL,
        intermediate_size=64,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        query_pre_attn_scalar=8,
    )
    return build(tf.Gemma2ForCausalLM, config)


def granite():
    config = tf.GraniteConfig(**SMALL, **SPECIAL, intermediate_size=64, num_key_value_heads=2, logits_scaling=7.0)
    return build(tf.GraniteForCausalLM, config)


def cohere():
    config = tf.CohereConfig(**SMALL, **SPECIAL, intermediate_size=64, num_key_value_heads=2, logit_scale=0.0625)
    return build(tf.CohereForCausalLM, config)


def phi():
    model = build(tf.PhiForCausalLM, tf.PhiConfig(**SMALL, **SPECIAL, intermediate_size=64, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


CAUSAL = {key: MODELS[key] for key in ("llama", "qwen3", "gemma", "gpt2", "opt")}
CAUSAL |= {"gemma2": gemma2, "granite": granite, "cohere": cohere, "phi": phi}


def ragged_batch():
    ids = torch.randint(3, VOCAB, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask}, labels


def activate_noise(model, alpha):
    """NEFTune as Trainer switches it on: an attribute of the embedding, and a hook that reads it in training mode."""
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = alpha

    def add_noise(module, args, output):
        return output + alpha * 0.05 * torch.zeros_like(output).uniform_(-1, 1) if module.training else output

    return embedding.register_forward_hook(add_noise)


def loss_and_gradients(model, lean, temperature=1.0):
    inputs, labels = ragged_batch()
    inner = model.get_base_model()
    distillation = SelfDistillation(inner, temperature, lean=lean)
    with distillation:
        outputs = model(**inputs, distill_labels=labels)
    assert distillation.lean == lean, "the model should be one whose head we can look in front of"
    anchors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(outputs["kl"].mean(), anchors)
    return outputs, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_every_family_gets_the_naive_loss_and_gradients(name):
    model = get_peft_model(CAUSAL[name](), SponConfig(sparsity=0.5, gain=True, init_weights=False))
    torch.manual_seed(3)
    wanted, wanted_gradient = loss_and_gradients(model, lean=False)
    torch.manual_seed(3)
    found, gradient = loss_and_gradients(model, lean=True)
    assert wanted["kl"].numel() == 5 + 5 + 8
    for key in ("kl", "student_nll", "teacher_nll"):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=2e-6)
    assert torch.equal(found["agree"], wanted["agree"])
    assert wanted_gradient.norm() > 0
    assert (gradient - wanted_gradient).norm() <= 1e-5 * wanted_gradient.norm()


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_under_autocast_the_loss_stays_lean_and_its_logits_exact(name):
    model = get_peft_model(CAUSAL[name](), SponConfig(sparsity=0.5, init_weights=False))
    inner, (inputs, labels) = model.get_base_model(), ragged_batch()
    exact = SelfDistillation(inner, 1.0)
    with exact:
        model(**inputs, distill_labels=labels)
    seen = []
    distillation = SelfDistillation(inner, 1.0)
    with distillation, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs, distill_labels=labels)
        hook = inner.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: seen.append(args[0]), prepend=True
        )
        found = model(**inputs, distill_labels=labels)
        hook.remove()
    assert distillation.lean
    assert distillation.scale == pytest.approx(exact.scale, rel=1e-6), "not estimated from rounded logits"
    # The same from logits of all tokens, made in fp32 of the hidden states that autocast made.
    counted = labels[:, 1:] != -100
    head, softcap = inner.get_output_embeddings(), getattr(inner.config, "final_logit_softcapping", None)
    assert head.weight.dtype == torch.float32
    logits = [F.linear(h[:, :-1][counted].float(), head.weight, head.bias) * exact.scale for h in seen]
    teacher, student = [z if softcap is None else softcap * torch.tanh(z / softcap) for z in logits]
    wanted = compare_logits(student, teacher, labels[:, 1:][counted])
    torch.testing.assert_close(found["kl"], wanted.kl, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found["student_nll"], wanted.student_nll, rtol=1e-5, atol=2e-6)
    assert "forward" not in vars(head)


def test_teacher_and_student_see_the_same_noise():
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.0)).train()
    inner, (inputs, labels) = model.get_base_model(), ragged_batch()
    handle = activate_noise(inner, 5.0)
    nll = []
    with SelfDistillation(inner, 1.0):
        for _ in range(2):
            found = model(**inputs, distill_labels=labels)
            assert torch.equal(found["teacher_nll"], found["student_nll"])
            nll.append(found["teacher_nll"])
        assert not torch.allclose(*nll), "and new noise in each batch"
        model.eval()
        quiet = model(**inputs, distill_labels=labels)["teacher_nll"]
    handle.remove()
    del inner.get_input_embeddings().neftune_noise_alpha
    assert not torch.allclose(quiet, nll[0])
    with SelfDistillation(inner, 1.0):
        torch.testing.assert_close(model.train()(**inputs, distill_labels=labels)["teacher_nll"], quiet)


def test_the_naive_loss_is_what_it_says():
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, init_weights=False))
    torch.manual_seed(3)
    found, _ = loss_and_gradients(model, lean=True)
    torch.manual_seed(3)
    inputs, labels = ragged_batch()
    with torch.no_grad():
        student = model(**inputs).logits
        with dense_mode(model):
            teacher = model(**inputs).logits
    counted = labels[:, 1:] != -100
    wanted = forward_kl(student[:, :-1][counted], teacher[:, :-1][counted])
    torch.testing.assert_close(found["kl"].detach(), wanted)
    nll = F.cross_entropy(student[:, :-1][counted], labels[:, 1:][counted], reduction="none")
    torch.testing.assert_close(found["student_nll"], nll)


class Doubting(tf.LlamaForCausalLM):
    """Does something to its logits that nobody can know."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.abs().sqrt()
        return out


@pytest.mark.parametrize("why", ["unknown logits", "trained head", "no head"])
def test_models_it_cannot_see_into_are_trained_on_plain_logits_and_that_is_said_once(why, caplog, monkeypatch):
    base = MODELS["llama"]()
    if why == "unknown logits":
        base.__class__ = Doubting
    model = get_peft_model(base, SponConfig(init_weights=False))
    if why == "trained head":
        base.lm_head.weight.requires_grad_(True)
    if why == "no head":
        monkeypatch.setattr(base, "get_output_embeddings", lambda: None)
    inputs, labels = ragged_batch()
    distillation = SelfDistillation(base, 1.0)
    for _ in range(2):
        with distillation:
            found = model(**inputs, distill_labels=labels)
    assert not distillation.lean
    said = [record.message for record in caplog.records if "logits of all tokens" in record.message]
    assert len(said) == 1, said
    with SelfDistillation(base, 1.0, lean=False):
        wanted = model(**inputs, distill_labels=labels)
    assert torch.equal(found["kl"], wanted["kl"])
    found["kl"].sum().backward()


def test_the_models_own_forward_is_back_afterwards():
    model = get_peft_model(MODELS["llama"](), SponConfig())
    inner = model.get_base_model()
    inputs, labels = ragged_batch()
    before = model(**inputs).logits
    with SelfDistillation(inner, 1.0):
        model(**inputs, distill_labels=labels)
        assert torch.equal(model(**inputs).logits, before), "without labels nothing changes"
        with pytest.raises(IndexError):
            model(**inputs, distill_labels=labels[:2])
    assert "forward" not in vars(inner)
    assert not any(layer.disable_adapters for layer in spon_layers(model).values())
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, before)


def test_teacher_is_dense_and_without_dropout():
    base = MODELS["gpt2"]()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model = get_peft_model(base, SponConfig(sparsity=0.9)).train()
    inputs, labels = ragged_batch()
    with SelfDistillation(base, 1.0):
        outputs = model(**inputs, distill_labels=labels)
    assert model.training
    with torch.no_grad(), dense_mode(model.eval()):
        logits = model(**inputs).logits[:, :-1][labels[:, 1:] != -100]
    wanted = F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != -100], reduction="none")
    torch.testing.assert_close(outputs["teacher_nll"], wanted)
    assert not torch.allclose(outputs["student_nll"], wanted)
