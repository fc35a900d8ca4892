# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""merge_adapter, unmerge_adapter, merge_and_unload: the same function, S active, every bit back."""

import copy
import pickle
import warnings

import pytest
import torch
from models import MODELS, VOCAB, inputs
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spon import CRITERIA, SponConfig, SponModel, calibrate, dense_mode, set_sparsity
from peft_spon.sites import spon_layers
from peft_spon.sparse_linear import SparseConv1D, SparseLinear, SparseMixin


class Opaque(nn.Module):
    """A linear layer without a weight attribute, as some quantised ones are."""

    def __init__(self, inner):
        super().__init__()
        self.packed, self.offset = inner.weight, inner.bias
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.offset)


def layer_of(kind):
    if kind == "conv1d":
        layer = Conv1D(12, 8)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        return layer
    layer = nn.Linear(8, 12, bias=kind != "no bias")
    return Opaque(layer) if kind == "opaque" else layer


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lin = layer_of(kind)

    def forward(self, x):
        return self.lin(x)


def adapted(net, adapter="default", **fields):
    torch.manual_seed(3)
    config = SponConfig(
        target_modules=["lin"], init_weights=False, **{"criterion": "weighted", "sparsity": 0.5, **fields}
    )
    return get_peft_model(net, config, adapter).eval()


def bits(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "opaque"])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(kind, criterion, space, calibrated):
    torch.manual_seed(0)
    net = Net(kind)
    before = bits(net)
    model = adapted(net, criterion=criterion, anchor_space=space)
    x = torch.randn(4, 6, 8)
    if calibrated and CRITERIA[criterion].selects == "threshold":
        for layer in spon_layers(model).values():
            layer.set_quantiles("default", layer.score(x, "default").flatten().quantile(torch.linspace(0, 1, 257)))
    wanted = model(x)

    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    if kind in ("linear", "no bias", "conv1d"):
        assert not torch.equal(model.lin.base_layer.bias, before.get("lin.bias", torch.zeros(12)))
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted)
    if kind == "no bias":
        assert model.lin.base_layer.bias is None
    after = bits(model.lin.base_layer)
    assert after.keys() == {key.removeprefix("lin.") for key in before}
    assert all(torch.equal(after[key.removeprefix("lin.")], value) for key, value in before.items())

    merged = model.merge_and_unload()
    assert isinstance(merged, Net)
    assert isinstance(merged.lin, SparseMixin)
    assert isinstance(merged.lin, {"conv1d": Conv1D, "opaque": Opaque}.get(kind, nn.Linear))
    torch.testing.assert_close(merged(x), wanted, rtol=1e-5, atol=1e-5)
    untouched = merged.state_dict()
    assert all(torch.equal(untouched[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("space", ["input", "output"])
def test_half_precision_differs_by_one_rounding(dtype, space):
    torch.manual_seed(0)
    model = adapted(Net("linear").to(dtype), anchor_space=space, sparsity=0.5)
    x = torch.randn(64, 8).to(dtype)
    layer = model.lin
    # The exact answer for the rounded weights and inputs, with the mask that S makes of this x.
    scale = (1 + layer.spon_gain["default"]).to(dtype)
    inner = (layer.sparsify(x, "default") * scale).double()
    anchor = layer.spon_anchor["default"].double()
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    shift = weight @ anchor if space == "input" else anchor
    exact = inner @ weight.T + bias + shift
    for merged in (model.merge_adapter, lambda: None):
        merged()
        error = (model(x).double() - exact).abs()
        # One rounding of b', one of y.
        bound = torch.finfo(dtype).eps * (exact.abs() + (bias + shift).abs() + inner.abs() @ weight.abs().T)
        assert (error <= bound).all()
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert merged.lin.spon_shift.dtype == torch.float32
    assert ((merged(x).double() - exact).abs() <= bound).all()


def test_merged_models_keep_their_class_and_their_answer(family):
    net = MODELS[family]()
    plain = type(net)
    model = get_peft_model(net, SponConfig(init_weights=False, sparsity=0.6)).eval()
    batch = inputs(family)
    with torch.no_grad():
        wanted = model(**batch)[0]
        model.merge_adapter()
        torch.testing.assert_close(model(**batch)[0], wanted, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
        assert type(merged) is plain
        assert not any("spon" in type(m).__module__ and not isinstance(m, SparseMixin) for m in merged.modules())
        torch.testing.assert_close(merged(**batch)[0], wanted, rtol=1e-4, atol=1e-4)
    sparse = [m for m in merged.modules() if isinstance(m, SparseMixin)]
    assert sparse
    assert all(isinstance(m, (SparseLinear, SparseConv1D)) for m in sparse)


def test_several_adapters_merge_in_order_and_one_by_one():
    torch.manual_seed(0)
    model = adapted(Net("linear"), "a", anchor_space="input")
    model.add_adapter(
        "b", SponConfig(target_modules=["lin"], init_weights=False, anchor_space="output", sparsity=0.25)
    )
    x = torch.randn(5, 8)
    model.base_model.set_adapter(["a", "b"])
    both = model(x)
    model.base_model.set_adapter("b")
    alone = model(x)

    model.merge_adapter(adapter_names=["a", "b"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(adapter_names=["b"])
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["b"])
    torch.testing.assert_close(model(x), alone)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["a"] * 5)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["a", "b"])
    torch.testing.assert_close(merged(x), both)
    torch.testing.assert_close(model.merge_and_unload()(x), alone)


def test_merge_twice_warns_and_changes_nothing():
    model = adapted(Net("linear"))
    x = torch.randn(3, 8)
    wanted = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


@pytest.mark.parametrize("prefill", ["dense", 0.5])
def test_tokens_that_prefill_leaves_dense_get_no_anchor(prefill):
    torch.manual_seed(0)
    net = Net("linear")
    model = adapted(net, prefill=prefill)
    x = torch.randn(2, 6, 8)
    wanted, one = model(x), model(x[:, :1])
    with dense_mode(model):
        dense = model(x)
    assert torch.equal(wanted[:, :3], dense[:, :3])
    model.merge_adapter()
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x[:, :1]), one)
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), wanted)
    torch.testing.assert_close(merged(x[:, :1]), one)


def test_the_dial_turns_while_merged():
    model = adapted(Net("linear"))
    model.merge_adapter()
    x = torch.randn(3, 8)
    set_sparsity(model.base_model, 0.25)
    wanted = model(x)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted)


def test_disabling_a_merged_adapter_gives_the_dense_model():
    torch.manual_seed(0)
    net = Net("no bias")
    x = torch.randn(3, 8)
    dense = net(x)
    model = adapted(net)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), dense)


def test_safe_merge_refuses_what_is_not_finite_and_merges_nothing():
    net = nn.Sequential()
    net.a, net.b = nn.Linear(8, 8), nn.Linear(8, 8)
    model = get_peft_model(net, SponConfig(target_modules=["a", "b"], init_weights=False)).eval()
    x = torch.randn(2, 8)
    model.base_model.model.b.spon_anchor["default"].data[3] = torch.inf
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="adapter default seems to be broken"):
            call(safe_merge=True)
        assert not any(layer.merged for layer in spon_layers(model).values())
    assert isinstance(model.base_model, SponModel)
    model.base_model.model.b.spon_anchor["default"].data[3] = 0
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gain_stays_a_scale_unless_folded(kind):
    torch.manual_seed(0)
    net = Net(kind)
    weight = net.lin.weight.detach().clone()
    model = adapted(net)
    x = torch.randn(3, 8)
    wanted = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.lin.weight, weight)
    assert merged.lin.spon_input_scale is not None
    folded = model.merge_and_unload(fold_gain=True)
    assert folded.lin.spon_input_scale is None
    assert not torch.equal(folded.lin.weight, weight)
    torch.testing.assert_close(folded(x), wanted)


def test_folding_into_opaque_weights_is_refused_and_nothing_changes():
    model = adapted(Net("opaque"))
    x = torch.randn(3, 8)
    wanted = model(x)
    with pytest.raises(ValueError, match="fold_gain"):
        model.merge_and_unload(fold_gain=True)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "opaque"])
def test_merged_layers_are_copied_pickled_and_cast(kind):
    torch.manual_seed(0)
    merged = adapted(Net(kind)).merge_and_unload()
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(merged)(x), merged(x))
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), merged(x))
    assert merged.lin.spon_shift.dtype == torch.float32
    merged.to(torch.bfloat16)
    assert merged.lin.spon_shift.dtype == torch.float32
    if kind != "opaque":
        assert merged(x.bfloat16()).dtype == torch.bfloat16


def test_spon_over_a_merged_model_is_refused():
    merged = adapted(Net("linear")).merge_and_unload()
    with pytest.raises(TypeError, match="merged SPON layer already"):
        get_peft_model(merged, SponConfig(target_modules=["lin"]))


def test_lora_on_a_merged_model_trains_and_leaves_the_shift():
    merged = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).merge_and_unload()
    model = get_peft_model(merged, LoraConfig(target_modules="all-linear"))
    ids = torch.randint(3, VOCAB, (2, 6))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


def test_base_weights_of_a_merged_model_can_be_trained():
    merged = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).merge_and_unload().train()
    merged.requires_grad_(True)
    ids = torch.randint(3, VOCAB, (2, 6))
    merged(input_ids=ids, labels=ids).loss.backward()
    grads = [layer.weight.grad for layer in merged.modules() if isinstance(layer, SparseMixin)]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_lora_inside_is_merged_first_and_the_anchor_passes_the_new_weight():
    torch.manual_seed(0)
    net = get_peft_model(Net("linear"), LoraConfig(target_modules=["lin"], init_lora_weights=False)).get_base_model()
    model = adapted(net, anchor_space="input")
    x = torch.randn(3, 8)
    wanted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted)
    merged = model.merge_and_unload()
    assert type(merged.lin) is SparseLinear
    torch.testing.assert_close(merged(x), wanted)


def test_calibrating_a_merged_adapter_is_refused():
    model = get_peft_model(MODELS["llama"](), SponConfig())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        calibrate(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], progress=False)
    assert all(layer.merged for layer in spon_layers(model).values())


@pytest.mark.slow
def test_compiled_merged_model_gives_the_same_answer():
    merged = adapted(Net("linear")).merge_and_unload()
    x = torch.randn(3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(merged, fullgraph=True)
        torch.testing.assert_close(compiled(x), merged(x))
