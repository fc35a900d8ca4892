# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits: products, copies, and prepare_for_decode(torch.int8), against models of rounded weights."""

import copy
import functools
import math
import pickle

import pytest
import torch
from models import compiled, inputs, logits
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from test_decode import CHANGES, KINDS, adapter_model, calls, model_of, step_differences, tokens  # noqa: F401
from test_kernels import DTYPES, LIMIT, exact, reload  # noqa: F401
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spon import add_lora, dense_mode, evaluate, kernels, prepare_for_decode, restore_from_decode
from peft_spon.int8 import Int8Weight
from peft_spon.kernels import cpu, reference
from peft_spon.sites import sites


products = pytest.mark.parametrize(
    "product",
    [
        pytest.param(cpu.sparse_gemv, marks=compiled),
        pytest.param(cpu.dense_gemv, marks=compiled),
        reference.sparse_gemv,
        reference.masked_linear,
    ],
)


def operands(rows, n_in, n_out, dtype):
    z = torch.randn(rows, n_in) * (torch.rand(rows, n_in) >= 0.6)
    weight_t = torch.randint(-127, 128, (n_in, n_out), dtype=torch.int8)
    return z.to(dtype), weight_t, torch.randn(n_out), torch.rand(n_out) / 64


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


def to_8_bits(weight):
    """(out, in) in fp32, by the definition."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round() * scale


def rounded(model):
    """The same model with rounded weights, where no LoRA that is not merged is around them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites(model).values():
            layer, base = site.plain_layer(), getattr(site, "base_layer", None)
            if not isinstance(base, LoraLayer) or base.merged:
                turned = isinstance(layer, Conv1D)
                weight = to_8_bits(layer.weight.t() if turned else layer.weight)
                layer.weight.copy_(weight.t() if turned else weight)
    return model


# ---- products ----------------------------------------------------------------------------------------------------


@products
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"), [(1, 64, 64), (1, 301, 200), (2, 1000, 696), (3, 77, 333), (8, 50, 1056), (11, 40, 128)]
)
def test_products(product, dtype, rows, n_in, n_out):
    torch.manual_seed(0)
    z, weight_t, bias, scale = operands(rows, n_in, n_out, dtype)
    expected = exact(z, weight_t.double() * scale.double(), bias)
    y = product(z, weight_t, bias, scale)
    assert (y.shape, y.dtype) == ((rows, n_out), dtype)
    limit = 1.1 * LIMIT[dtype]  # of few outputs: the rounding of y itself
    assert error(y, expected) <= limit
    assert error(product(z, weight_t, None, scale), exact(z, weight_t.double() * scale.double())) <= limit


@compiled
def test_bits_depend_on_nothing_but_the_row():
    torch.manual_seed(0)
    z, weight_t, bias, scale = operands(8, 301, 1100, torch.bfloat16)
    alone = torch.stack([kernels.sparse_gemv(row, weight_t, bias, scale) for row in z])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.sparse_gemv(z, weight_t, bias, scale), alone)
            assert torch.equal(kernels.dense_gemv(z, weight_t, bias, scale), alone)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("instructions", cpu.INSTRUCTION_SETS)
def test_every_instruction_set_of_this_machine(reload, instructions):  # noqa: F811
    try:
        reload(PEFT_SPON_CPU_KERNEL=instructions)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    every = torch.arange(-128, 128).to(torch.int8)[None].contiguous()
    one = torch.ones(1, 1)
    assert torch.equal(kernels.sparse_gemv(one, every, None, torch.ones(256)), every.float())
    for rows in (1, 3):
        z, weight_t, bias, scale = operands(rows, 301, 700, torch.bfloat16)
        y = kernels.sparse_gemv(z, weight_t, bias, scale)
        assert error(y, exact(z, weight_t.double() * scale.double(), bias)) <= LIMIT[torch.bfloat16]
        tau = torch.tensor(0.5)
        y = kernels.threshold_gemv(z, weight_t, tau, bias=bias, weight_scale=scale)
        assert torch.equal(y, kernels.sparse_gemv(reference.select(z, tau), weight_t, bias, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(dtype):
    torch.manual_seed(0)
    z, weight_t, bias, scale = operands(40, 96, 1056, dtype)
    wide = weight_t.double() * scale.double()
    for rows in (1, 2, 8, 9, 40):
        for sparsity in (0.0, 0.5):
            y = kernels.int8_linear(z[:rows], weight_t, scale, bias, sparsity)
            assert error(y, exact(z[:rows], wide, bias)) <= LIMIT[dtype]
    for rows in (1, 40):
        x = z[:rows].float().requires_grad_()
        trained = bias.clone().requires_grad_()
        kernels.int8_linear(x, weight_t, scale, trained).sum().backward()
        assert torch.allclose(x.grad, wide.sum(1).float().expand_as(x), atol=1e-4)
        alone = bias.clone().requires_grad_()
        kernels.int8_linear(x.detach(), weight_t, scale, alone).sum().backward()
        assert torch.equal(trained.grad, torch.full_like(bias, rows))
        assert torch.equal(alone.grad, trained.grad)


def test_which_devices_read_8_bits():
    assert kernels.reads_int8(torch.device("cpu")) == kernels.active_kernel().name.startswith("c-")
    assert not kernels.reads_int8(torch.device("mps"))


def test_ops_are_well_registered():
    z, weight_t, bias, scale = operands(2, 48, 40, torch.bfloat16)
    torch.library.opcheck(torch.ops.peft_spon.sparse_gemv.default, (z, weight_t, bias, scale))
    arguments = (z, weight_t, torch.tensor(0.5), torch.rand(48), torch.rand(48), bias, 1, scale)
    torch.library.opcheck(torch.ops.peft_spon.threshold_gemv.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, w, b, s: (z, w, b, None), "weight_t int8 with a weight_scale"),
        (lambda z, w, b, s: (z, w.to(z.dtype), b, s), "weight_scale is of weights of int8, not torch.float32"),
        (lambda z, w, b, s: (z.double(), w, b, s), "weight_scale is of weights of int8"),
        (lambda z, w, b, s: (z, w, b, s[:5]), r"shape \(40,\)"),
        (lambda z, w, b, s: (z, w, b, s.half()), "must be a contiguous fp32 tensor"),
        (lambda z, w, b, s: (z, w, b, s.to("meta")), "on cpu"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.sparse_gemv(*change(*operands(1, 48, 40, torch.float32)))


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_copy_is_the_nearest_of_255_values(kind, dtype):
    torch.manual_seed(0)
    layer = (nn.Linear(70, 1500) if kind is nn.Linear else Conv1D(1500, 70)).to(dtype)
    with torch.no_grad():
        (layer.weight if kind is nn.Linear else layer.weight.t())[7] = 0
    before = layer.weight.detach().clone()
    read = Int8Weight(layer)
    assert torch.equal(layer.weight, before)
    assert (read.weight_t.shape, read.weight_t.dtype, read.weight_scale.shape) == ((70, 1500), torch.int8, (1500,))
    weight = before.float() if kind is nn.Linear else before.float().t()
    largest = weight.abs().amax(1)
    assert torch.allclose(read.weight_scale[8:] * 127, largest[8:])
    assert ((read.weight_t * read.weight_scale).t() - weight).abs().le(0.5001 * read.weight_scale[:, None]).all()
    assert not read.weight_t[:, 7].any()
    assert read.weight_t.abs().amax(0)[8:].eq(127).all()


def test_a_copy_knows_whether_it_is_of_the_layer():
    layer = nn.Linear(8, 8)
    read = Int8Weight(layer)
    assert read.is_of(layer)
    assert not read.is_of(nn.Linear(8, 8))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not read.is_of(layer)
    read = Int8Weight(layer)
    layer.weight.data = layer.weight.data.clone()
    assert not read.is_of(layer)
    read = Int8Weight(layer)
    assert not read.is_of(layer, ("lora",))
    layer.weight = nn.Parameter(layer.weight.data)
    assert not read.is_of(layer)
    assert copy.deepcopy(read) is None


@pytest.mark.parametrize(("n_in", "n_out"), [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_a_copy_of_next_to_nothing(n_in, n_out):
    layer = nn.Linear(1, n_out)
    layer.weight = nn.Parameter(torch.ones(n_out, n_in))
    read = Int8Weight(layer)
    assert read.weight_t.shape == (n_in, n_out)
    assert torch.allclose(read(torch.ones(3, n_in), layer.bias), torch.full((3, n_out), float(n_in)) + layer.bias)


# ---- prepared models ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["magnitude", "weighted", "topk"])
def test_layers_compute_with_rounded_weights(criterion, kind, calls):  # noqa: F811
    model = model_of(kind, criterion=criterion)
    prepared = copy.deepcopy(model)
    summary = prepare_for_decode(prepared, torch.int8)
    assert summary.prepared == list(sites(model))
    assert "copies of them in 8 bits" in str(summary)
    assert step_differences(rounded(model), prepared) < 2e-6
    assert len(calls) == len(sites(model))
    assert step_differences(rounded(model), prepared, rows=20) < 2e-6
    assert 1e-3 < step_differences(model, prepared) < 3e-2


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generate_and_the_way_back(family, kind, calls):  # noqa: F811
    model = model_of(kind, family)
    wanted, weights = logits(model, family), [site.plain_layer().weight for site in sites(model).values()]
    before = [(id(w), w.data_ptr(), w.clone()) for w in weights]
    model.prepare_for_decode(torch.int8)
    assert tokens(model, family).tolist() == tokens(rounded(model), family).tolist()
    assert calls
    assert [(id(w), w.data_ptr()) for w in weights] == [(i, p) for i, p, _ in before]
    model.restore_from_decode()
    assert torch.equal(logits(model, family), wanted)
    assert all(torch.equal(w, v) for w, (_, _, v) in zip(weights, before, strict=True))
    assert all(site._int8 is None for site in sites(model).values())


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_dense_model_with_its_own_weights(kind):
    model = model_of(kind)
    with dense_mode(model):
        wanted = logits(model, "llama")
    model.prepare_for_decode(torch.int8)
    with dense_mode(model):
        assert torch.equal(logits(model, "llama"), wanted)
    if kind == "adapter":
        with model.disable_adapter():
            assert torch.equal(logits(model, "llama"), wanted)
        for site in sites(model).values():
            site.set_adapter([])
        assert torch.equal(logits(model, "llama"), wanted)


@compiled
def test_anchors_in_front_of_w():
    model = adapter_model(anchor_space="input")
    prepared = copy.deepcopy(model)
    prepared.prepare_for_decode(torch.int8)
    for rows in (1, 20):
        assert step_differences(rounded(model), prepared, rows) < 2e-6


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_it_are_followed(change, calls):  # noqa: F811
    plain, prepared = adapter_model(), adapter_model()
    prepared.prepare_for_decode(torch.int8)
    tokens(prepared)
    calls.clear()
    if change == "optimizer":  # its gradients are those of what is computed
        plain = rounded(plain)
    for model in (plain, prepared):
        torch.manual_seed(8)
        CHANGES[change](model)
    if change == "copied":
        prepared = copy.deepcopy(prepared)
    wanted = plain if change == "off" else rounded(plain)
    for rows in (1, 20):
        assert step_differences(wanted, prepared, rows) < 1e-5
    assert tokens(prepared).tolist() == tokens(wanted).tolist()
    assert bool(calls) == (change != "off")


@compiled
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_one_preparation_follows_another(kind):
    model = model_of(kind)
    as_they_are, in_int8 = copy.deepcopy(model), rounded(model)
    model.prepare_for_decode(torch.int8)
    assert step_differences(in_int8, model) < 2e-6
    model.prepare_for_decode()
    assert step_differences(as_they_are, model) < 2e-6
    assert sites(model)["model.layers.0.mlp.up_proj"].plain_layer().weight.stride(0) == 1
    model.prepare_for_decode(torch.int8)
    assert step_differences(in_int8, model) < 2e-6
    assert sites(model)["model.layers.0.mlp.up_proj"].plain_layer().weight.is_contiguous()
    model.train()
    model.eval()
    assert step_differences(as_they_are, model) == 0
    restore_from_decode(model)


@compiled
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_files_do_not_differ(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "before")
    model.prepare_for_decode(torch.int8)
    tokens(model)
    model.save_pretrained(tmp_path / "after")
    files = list((tmp_path / "before").glob("*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


@compiled
def test_pickled():
    model = model_of("merged")
    model.prepare_for_decode(torch.int8)
    assert step_differences(rounded(model), pickle.loads(pickle.dumps(model))) < 2e-6


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype, calls):  # noqa: F811
    model = model_of("merged").to(dtype)
    prepared = copy.deepcopy(model)
    prepared.prepare_for_decode(torch.int8)
    assert tokens(prepared).shape == tokens(model).shape
    assert calls
    for a, b in zip(sites(model).values(), sites(prepared).values(), strict=True):
        x = torch.randn(1, 1, a.in_features).to(dtype)
        kept = a.sparsifier()(x, a.sparsifier_state()).double() * a.spon_input_scale.double()
        wanted = kept @ to_8_bits(a.weight).double().T + a.spon_shift.double()
        with torch.no_grad():
            got = b(x).double()
        assert (got - wanted).norm() <= 1.01 * (wanted.to(dtype) - wanted).norm()


@compiled
def test_an_evaluation_sees_the_rounding():
    """Against the dense model with its own weights, so that a sparsity of 0 shows what 8 bits alone cost."""
    model = adapter_model()
    model.set_sparsity(0.0)
    data = [inputs("llama", rows=4, tokens=16)]
    measure = functools.partial(evaluate, model, data, progress=False)
    assert measure().sparse.kl < 1e-9
    model.prepare_for_decode(torch.int8)
    assert 1e-9 < measure().sparse.kl < 1e-3


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_compiled(kind):
    torch._dynamo.reset()
    model = model_of(kind)
    inner, token = model.base_model.model if kind == "adapter" else model, torch.tensor([[5]])
    model.prepare_for_decode(torch.int8)
    graph = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (token, torch.randint(0, 50, (1, 20))):
            wanted = inner(ids, use_cache=False).logits
            assert torch.allclose(graph(ids, use_cache=False).logits, wanted, atol=1e-4)
        if kind == "adapter":
            model.set_sparsity(0.8)
            wanted = inner(token, use_cache=False).logits
            assert torch.allclose(graph(token, use_cache=False).logits, wanted, atol=1e-4)


@compiled
@pytest.mark.slow
def test_compiled_after_changes():
    """A graph never runs an old copy: what is merged later or copied is computed with the layer's own weights."""
    torch._dynamo.reset()
    model, ids = adapter_model(), torch.randint(0, 50, (1, 20))
    add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), "lora")
    model.eval()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="4 as before: a LoRA beneath is not merged"):
        model.prepare_for_decode(torch.int8)
    assert sum(site._int8 is not None for site in sites(model).values()) == 10
    graph = torch.compile(model.base_model.model, backend="aot_eager")
    with torch.no_grad():
        graph(ids, use_cache=False)
        model.merge_adapter()
        plain.merge_adapter()
        wanted = plain.base_model.model(ids, use_cache=False).logits
        assert torch.allclose(graph(ids, use_cache=False).logits, wanted, atol=1e-4)
        again = torch.compile(copy.deepcopy(model).base_model.model, backend="aot_eager")
        assert torch.allclose(again(ids, use_cache=False).logits, wanted, atol=1e-4)


@compiled
def test_a_lora_that_is_merged_again():
    model = adapter_model()
    add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), "lora")
    model.eval()
    model.merge_adapter()
    plain = copy.deepcopy(model)
    model.prepare_for_decode(torch.int8)
    for rows in (1, 20):
        assert step_differences(rounded(plain), model, rows) < 1e-5
    for both in (plain, model):
        both.unmerge_adapter()
        for layer in both.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(3.0)
        both.merge_adapter()
    for rows in (1, 20):
        assert step_differences(rounded(plain), model, rows) < 1e-5
    for both in (plain, model):
        for layer in both.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(False)  # the next forward takes it out of W
    for rows in (20, 1):
        assert step_differences(plain, model, rows) < 3e-2


@compiled
def test_rows_with_adapters_of_their_own():
    model = adapter_model()
    prepared = copy.deepcopy(model)
    prepared.prepare_for_decode(torch.int8)
    for a, b, own in zip(*(sites(m).values() for m in (rounded(model), prepared, model)), strict=True):
        x, names = torch.randn(3, 5, a.sparsifier("default").n_in), ["default", "__base__", "default"]
        with torch.no_grad():
            y, wanted = b(x, adapter_names=names), a(x, adapter_names=names)
            assert torch.allclose(y[[0, 2]], wanted[[0, 2]], atol=1e-5)
            assert torch.equal(y[1], own(x, adapter_names=names)[1])


@compiled
def test_gradients_without_training_mode():
    model = model_of("merged")
    for parameter in model.parameters():
        parameter.requires_grad_()
    prepared = copy.deepcopy(model)
    prepared.prepare_for_decode(torch.int8)
    batch = inputs("llama")
    for both in (model, prepared):
        both(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, a), b in zip(model.named_parameters(), prepared.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@compiled
def test_inference_mode_leaves_nothing_behind():
    model, batch = adapter_model(), inputs("llama")
    model.prepare_for_decode(torch.int8)
    with torch.no_grad():
        sites(model)["model.layers.0.mlp.up_proj"].plain_layer().weight.mul_(1.1)
    with torch.inference_mode():
        model(**batch)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "spon_anchor" in name)


@compiled
def test_what_only_the_layer_itself_can_do():
    """Autocast, and inputs of another dtype, which it refuses."""
    model = model_of("merged")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(model, "llama")
        model.prepare_for_decode(torch.int8)
        assert torch.equal(logits(model, "llama"), wanted)
    with pytest.raises(RuntimeError, match="dtype"):
        sites(model)["model.layers.0.mlp.up_proj"](torch.randn(9, 32, dtype=torch.bfloat16))


def test_what_is_left(reload):  # noqa: F811
    model = adapter_model()
    with pytest.raises(ValueError, match=r"weight_dtype is torch\.float16; use torch\.int8, or None"):
        model.prepare_for_decode(torch.float16)
    broken = copy.deepcopy(model)
    layer = sites(broken)["model.layers.0.mlp.up_proj"].plain_layer()
    layer.weight.data[3, 4] = math.inf
    if kernels.active_kernel().name.startswith("c-"):
        with pytest.warns(UserWarning, match="1 as before: some of its weights are not finite"):
            summary = broken.prepare_for_decode(torch.int8)
        assert list(summary.left) == ["model.layers.0.mlp.up_proj"]
    reload(PEFT_SPON_CPU_KERNEL="torch")
    with pytest.warns(UserWarning, match=r"weights of 8 bits need the C kernel or Triton's.*embedding_bag"):
        summary = model.prepare_for_decode(torch.int8)
    assert (summary.prepared, summary.weight_dtype) == ([], None)
