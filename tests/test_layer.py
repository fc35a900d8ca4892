# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_spon import SponConfig, dense_mode, every_token_sparse, without_anchors
from peft_spon.base_layer import prepared_state
from peft_spon.criteria import CRITERIA, Criterion


MASKS = sorted(name for name, c in CRITERIA.items() if c.decode is Criterion.decode)


class Net(nn.Module):
    def __init__(self, kind="linear", bias=True):
        super().__init__()
        self.lin = Conv1D(6, 8) if kind == "conv1d" else nn.Linear(8, 6, bias=bias)
        nn.init.normal_(self.lin.weight)

    def forward(self, x):
        return self.lin(x)


def adapted(net=None, **kwargs):
    config = SponConfig(**{"target_modules": ["lin"], "init_weights": False, "criterion": "weighted", **kwargs})
    return get_peft_model(net or Net(), config).eval()


def expected(layer, x, criterion, sparsity):
    """The formula of the paper, written out."""
    weight = layer.base_layer.weight if isinstance(layer.base_layer, nn.Linear) else layer.base_layer.weight.T
    s = x.abs() * (weight.norm(dim=0) if criterion in ("wina", "weighted", "robust") else 1)
    k = round((1 - sparsity) * x.shape[-1])
    kept = torch.zeros_like(x).scatter(-1, s.topk(k, -1).indices, 1)
    alpha = layer.spon_anchor["default"]
    gain = layer.spon_gain["default"] if "default" in layer.spon_gain else 0
    if layer.spon_settings["default"].anchor_space == "input":
        return F.linear((1 + gain) * x * kept + alpha, weight, layer.base_layer.bias)
    return F.linear((1 + gain) * x * kept, weight, layer.base_layer.bias) + alpha


@pytest.mark.parametrize("criterion", MASKS)
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_uncalibrated_forward_is_the_formula_with_per_token_top_k(criterion, space, gain, kind):
    model = adapted(Net(kind), criterion=criterion, anchor_space=space, gain=gain, sparsity=0.5)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), expected(model.lin, x, criterion, 0.5))


def test_threshold_forward_is_the_formula():
    model = adapted(criterion="magnitude", anchor_space="input", gain=False, sparsity=0.5)
    table = torch.linspace(0, 2, 257)
    model.lin.set_quantiles("default", table)
    assert model.lin.spon_threshold["default"].item() == 1.0
    x = torch.randn(2, 5, 8)
    wanted = F.linear(x * (x.abs() > 1.0) + model.lin.spon_anchor["default"], model.lin.weight, model.lin.bias)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_sparsity_zero_and_zero_anchors_is_the_base_bit_for_bit(criterion, space, calibrated):
    net = Net()
    x = torch.randn(2, 5, 8)
    x[0, 0, :4] = 0.0
    wanted = net(x)
    config = SponConfig(target_modules=["lin"], sparsity=0.0, criterion=criterion, anchor_space=space, gain=True)
    model = get_peft_model(net, config)
    if calibrated and CRITERIA[criterion].selects == "threshold":
        model.lin.set_quantiles("default", torch.linspace(0, 2, 257))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("prefill", "first_sparse"), [("sparse", 0), ("dense", 8), (0.0, 0), (0.5, 4), (0.3, 3), (1.0, 8)]
)
@pytest.mark.parametrize("space", ["input", "output"])
def test_prefill_leaves_leading_tokens_dense_and_decoding_sparse(prefill, first_sparse, space):
    model = adapted(prefill=prefill, anchor_space=space)
    x = torch.randn(2, 8, 8)
    with dense_mode(model):
        dense = model(x)
    with every_token_sparse(model):
        sparse = model(x)
    y = model(x)
    assert torch.equal(y[:, :first_sparse], dense[:, :first_sparse])
    torch.testing.assert_close(y[:, first_sparse:], sparse[:, first_sparse:])
    torch.testing.assert_close(model(x[:, :1]), sparse[:, :1])
    torch.testing.assert_close(model.train()(x), sparse)


def test_contexts_restore_what_was_set():
    model = adapted()
    x = torch.randn(3, 8)
    y = model(x)
    with pytest.raises(RuntimeError, match="stop"), dense_mode(model), without_anchors(model):
        raise RuntimeError("stop")
    assert torch.equal(model(x), y)
    assert all(p.requires_grad for n, p in model.named_parameters() if "spon_" in n)


def test_without_anchors_is_plain_sparsity():
    model = adapted(gain=True)
    x = torch.randn(3, 8)
    with without_anchors(model):
        plain = model(x)
    torch.testing.assert_close(plain, F.linear(model.lin.sparsify(x, "default"), model.lin.weight, model.lin.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calibrated_state_and_anchors_stay_fp32(dtype):
    model = adapted(Net().to(dtype), gain=True)
    model.lin.set_quantiles("default", torch.linspace(0, 2, 257) / 3)
    tau = model.lin.spon_threshold["default"].clone()
    anchor, gain = (held["default"].detach().clone() for held in (model.lin.spon_anchor, model.lin.spon_gain))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.to(torch.float32).to(dtype)
    assert torch.equal(model.lin.spon_anchor["default"], anchor), "and every bit of them"
    assert torch.equal(model.lin.spon_gain["default"], gain)
    assert optimizer.param_groups[0]["params"][0] is model.lin.spon_anchor["default"]
    assert torch.equal(model.lin.spon_threshold["default"], tau)
    assert model.lin.spon_quantiles["default"].dtype == torch.float32
    assert model.lin.spon_column_scale["default"].dtype == torch.float32
    x = torch.randn(2, 8, dtype=dtype)
    wanted = model(x)
    assert wanted.dtype == dtype
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)


def test_gradient_reaches_kept_inputs_and_anchors_only():
    model = adapted(criterion="topk", anchor_space="input", gain=True)
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    assert torch.equal(x.grad == 0, model.lin.sparsify(x, "default") == 0)
    assert model.lin.spon_anchor["default"].grad.abs().sum() > 0
    assert model.lin.spon_gain["default"].grad.abs().sum() > 0
    assert model.lin.base_layer.weight.grad is None


@pytest.mark.parametrize("criterion", ["magnitude", "relative", "weighted", "robust", "topk"])
def test_nan_input_propagates(criterion):
    model = adapted(criterion=criterion)
    if criterion != "topk":
        model.lin.set_quantiles("default", torch.linspace(0, 2, 257))
    x = torch.randn(2, 8)
    x[0, 3] = float("nan")
    assert model(x)[0].isnan().all()
    assert not model(x)[1].isnan().any()


class Opaque(nn.Module):
    """A linear callable without a plain weight, as quantised layers are."""

    def __init__(self, inner):
        super().__init__()
        self.qweight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        self.offset = nn.Parameter(inner.bias.detach().clone(), requires_grad=False)
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x):
        return F.linear(x, self.qweight, self.offset)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_column_norms_of_any_linear_callable(order):
    criterion = CRITERIA["wina"](norm=order)
    linear = nn.Linear(700, 9)  # more inputs than one probing chunk
    wanted = linear.weight.norm(p=order, dim=0)
    torch.testing.assert_close(prepared_state(linear, criterion)["column_scale"], wanted)
    torch.testing.assert_close(prepared_state(Opaque(linear), criterion)["column_scale"], wanted)
    conv = Conv1D(9, 700)
    torch.testing.assert_close(prepared_state(conv, criterion)["column_scale"], conv.weight.norm(p=order, dim=1))


def test_layer_without_a_weight_is_wrapped_as_a_callable():
    net = Net()
    model, plain = adapted(copy.deepcopy(net)), net
    plain.lin = Opaque(plain.lin)
    opaque = adapted(plain)
    opaque.lin.spon_anchor["default"].data.copy_(model.lin.spon_anchor["default"].data)
    opaque.lin.spon_gain["default"].data.copy_(model.lin.spon_gain["default"].data)
    x = torch.randn(3, 8)
    torch.testing.assert_close(opaque(x), model(x))


def test_not_a_linear_layer_is_refused_and_the_model_left_alone():
    class WithConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.conv = nn.Conv1d(8, 8, 1)

    net = WithConv()
    with pytest.raises(TypeError, match="Target 'conv'.*Conv1d"):
        get_peft_model(net, SponConfig(target_modules=["lin", "conv"]))
    assert type(net.lin) is nn.Linear
    assert net.lin.weight.requires_grad


def test_copy_and_pickle():
    model = adapted(gain=True)
    model.lin.set_quantiles("default", torch.linspace(0, 2, 257))
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_two_active_adapters_use_the_first_s_and_both_gains_and_anchors():
    model = adapted(anchor_space="input")
    model.add_adapter(
        "b", SponConfig(target_modules=["lin"], init_weights=False, sparsity=0.25, anchor_space="output")
    )
    model.base_model.set_adapter(["default", "b"])
    x = torch.randn(3, 8)
    layer = model.lin
    # In the order of the adapters: a's anchor passes b's gain.
    inner = layer.sparsify(x, "default") * (1 + layer.spon_gain["default"]) + layer.spon_anchor["default"]
    wanted = layer.base_layer(inner * (1 + layer.spon_gain["b"])) + layer.spon_anchor["b"]
    torch.testing.assert_close(model(x), wanted)


def test_compile_gives_one_graph_and_the_same_answer():
    model = adapted(gain=True)
    model.lin.set_quantiles("default", torch.linspace(0, 2, 257))
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
