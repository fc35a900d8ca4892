# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: the Triton kernel on one, CUDA graphs, and a model prepared there. Elsewhere it skips."""

import copy

import pytest
import torch
from models import MODELS, calibrated
from peft import get_peft_model

from peft_spon import SponConfig, kernels, prepare_for_decode
from peft_spon.int8 import Int8Weight
from peft_spon.kernels import reference
from peft_spon.sites import sites


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# The last: a program has more inputs than a list.
SHAPES = [(300, 200), (576, 1536), (1536, 576), (2048, 5632), (16384, 2048)]


@pytest.mark.parametrize("relative", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2, 8, 11])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_kernel(dtype, rows, relative):
    """Against fp64; what no token of the eight that share a reading needs is NaN; the same bits at every run."""
    for n_in, n_out in SHAPES:
        x = torch.randn(rows, n_in, device="cuda").to(dtype)
        weight_t = torch.randn(n_in, n_out, device="cuda").to(dtype)
        column_scale, gain = torch.rand(2, n_in, device="cuda") + 0.5
        bias, tau = torch.randn(n_out, device="cuda"), torch.tensor([1.2], device="cuda")
        z = reference.select(x, tau, column_scale, gain, relative)
        expected = z.double() @ weight_t.double() + bias.double()
        weight_t[(z == 0).all(0)] = float("nan")
        found = kernels.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative)
        for y in (found, kernels.sparse_gemv(z, weight_t, bias)):
            assert (y.double() - expected).norm() <= LIMITS[dtype] * expected.norm()
        assert torch.equal(found, kernels.threshold_gemv(x, weight_t, tau, column_scale, gain, bias, relative))


@pytest.mark.parametrize("rows", [1, 2, 8, 11])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_weights_of_8_bits(dtype, rows):
    for n_in, n_out in SHAPES:
        x, tau = torch.randn(rows, n_in, device="cuda").to(dtype), torch.tensor([1.2], device="cuda")
        weight_t = torch.randint(-127, 128, (n_in, n_out), dtype=torch.int8, device="cuda")
        scale, bias = torch.rand(n_out, device="cuda") / 64, torch.randn(n_out, device="cuda")
        z = reference.select(x, tau)
        expected = z.double() @ (weight_t * scale.double()) + bias.double()
        found = kernels.threshold_gemv(x, weight_t, tau, bias=bias, weight_scale=scale)
        for y in (found, kernels.sparse_gemv(z, weight_t, bias, scale), kernels.int8_linear(z, weight_t, scale, bias)):
            assert y.dtype == dtype
            assert (y.double() - expected).norm() <= LIMITS[dtype] * expected.norm()


@pytest.mark.parametrize("criterion", ["weighted", "magnitude"])
def test_a_model_prepared_in_8_bits(criterion):
    """Decode steps, a prompt, and a CUDA graph's static cache, against the model whose weights are rounded alike."""
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, criterion=criterion, prefill="sparse"))
    model = calibrated(model).to("cuda")
    rounded = copy.deepcopy(model)
    for site in sites(rounded).values():
        copied = Int8Weight(site.plain_layer())
        site.plain_layer().weight.data = (copied.weight_t * copied.weight_scale).t()
    summary = prepare_for_decode(model, weight_dtype=torch.int8)
    assert not summary.left
    prompt = torch.randint(3, 64, (1, 12), device="cuda")
    with torch.no_grad():
        # Norms of columns, and with them what `weighted` keeps, are those of the weights as they are.
        if criterion == "magnitude":
            assert torch.allclose(model(prompt).logits, rounded(prompt).logits, atol=2e-4)
    wanted = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = model.generate(input_ids=prompt, **wanted)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(input_ids=prompt, **wanted, **static), said)
    if criterion == "magnitude":
        assert torch.equal(rounded.generate(input_ids=prompt, **wanted), said)


def test_a_cuda_graph_sees_new_inputs():
    x, weight_t = torch.randn(1, 1024, device="cuda"), torch.randn(1024, 2048, device="cuda")
    tau = torch.tensor([0.7], device="cuda")
    kernels.threshold_gemv(x, weight_t, tau, relative=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.threshold_gemv(x, weight_t, tau, relative=2)
    x.copy_(torch.randn(1, 1024))
    graph.replay()
    assert torch.equal(y, kernels.threshold_gemv(x, weight_t, tau, relative=2))


@pytest.mark.parametrize("criterion", ["weighted", "magnitude", "robust"])
def test_a_prepared_model_says_the_same(criterion):
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, criterion=criterion, prefill="sparse"))
    model = calibrated(model).to("cuda")
    prompt = torch.randint(3, 64, (1, 12), device="cuda")
    wanted = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(input_ids=prompt, **wanted)
    assert prepare_for_decode(model).kernels["cuda:0"].name == "triton"
    assert torch.equal(model.generate(input_ids=prompt, **wanted), before)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(input_ids=prompt, **wanted, **static), before)


@pytest.mark.slow
def test_a_compiled_step_says_the_same():
    """As transformers compiles it for a static cache, with CUDA graphs; no call of the kernel came before."""
    model = calibrated(get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, prefill="sparse"))).to("cuda")
    prompt = torch.randint(3, 64, (1, 12), device="cuda")
    wanted = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(input_ids=prompt, **wanted)
    prepare_for_decode(model)
    assert torch.equal(model.generate(input_ids=prompt, **wanted, cache_implementation="static"), before)


def test_streams_have_counters_of_their_own(monkeypatch):
    from peft_spon.kernels import cuda

    monkeypatch.setattr(cuda, "_slots", {})
    streams = [torch.cuda.Stream() for _ in range(3)]
    slots = []
    for stream in (*streams, *streams):
        with torch.cuda.stream(stream):
            slots.append(cuda._slot(0))
    assert slots == [0, 1, 2, 0, 1, 2]
    monkeypatch.setattr(cuda, "SLOTS", 3)
    with pytest.raises(RuntimeError, match="has run on 3 streams of cuda:0"):
        cuda._slot(0)
