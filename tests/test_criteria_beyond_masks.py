# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""R-Sparse and LaRoSA, whose S is no mask, and a criterion from outside the package: the whole life of an adapter."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import MODELS, inputs, logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_spon import (
    CRITERIA,
    Criterion,
    SponConfig,
    add_lora,
    calibrate,
    evaluate,
    load_with_lora,
    register_criterion,
)
from peft_spon.criteria import LaRoSA, RSparse, Sparsifier, Spec
from peft_spon.sites import spon_layers


def data():
    return [inputs("llama", rows=8, tokens=24)]


def adapted(criterion, base=None, **kwargs):
    config = SponConfig(criterion=criterion, sparsity=0.5, init_weights=False, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(MODELS["llama"]() if base is None else base, config).eval()
    calibrate(model, data())
    return model


# ---- the formulas, against plain references -----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(32, 64), (64, 32), (40, 40)])
def test_rsparse_is_the_kept_columns_and_the_truncated_svd_of_the_rest(sizes):
    n_in, n_out = sizes
    weight, x = torch.randn(n_out, n_in), torch.randn(3, 5, n_in)
    criterion = RSparse(rank=3)
    state = criterion.prepare(weight)
    sparsifier = Sparsifier(criterion, n_in, n_out, sparsity=0.5)

    u, s, vh = torch.linalg.svd(weight)
    low_rank = u[:, :3] @ s[:3].diag() @ vh[:3]
    k = round((0.5 - 3 * (n_in + n_out) / (n_in * n_out)) * n_in)  # what the rank leaves of half the weights
    best = (x.abs() * weight.norm(dim=0)).topk(k, dim=-1).indices
    kept = torch.zeros_like(x).scatter(-1, best, x.gather(-1, best))
    wanted = kept @ weight.T + (x - kept) @ low_rank.T
    torch.testing.assert_close(sparsifier(x, state) @ weight.T, wanted, rtol=1e-4, atol=1e-4)

    folded, (a, b) = criterion.fold(weight, state)
    torch.testing.assert_close(kept @ folded.T + (x - kept) @ b.T @ a.T, wanted, rtol=1e-4, atol=1e-4)


def test_the_rank_of_rsparse_is_paid_from_the_budget():
    paid = Sparsifier(RSparse(rank=4), 64, 64, 0.5)
    assert paid.zeroed_share == 0.5 + 4 * 128 / 64**2
    assert paid.unread(paid.zeroed_share) == 0.5
    assert Sparsifier(RSparse(rank=4, channel_share=0.8), 64, 64, 0.5).zeroed_share == pytest.approx(1 - 0.8 * 0.5)
    assert Sparsifier(RSparse(rank=0), 64, 64, 0.5).zeroed_share == 0.5
    assert RSparse(rank=16).state(64, 32)["directions"].shape == (64, 4), "at most an eighth of the smaller side"
    for wrong in ({"rank": -1}, {"rank": 2.5}, {"channel_share": 0.0}, {"channel_share": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            RSparse(**wrong)


def test_larosa_keeps_the_largest_components_along_the_principal_directions():
    x = torch.randn(500, 16) @ torch.randn(16, 16)
    moments = x.double().T @ x.double() / len(x)
    criterion, weight = LaRoSA(), torch.randn(24, 16)
    state = criterion.prepare(weight, moments)
    directions = torch.linalg.svd(x.double()).Vh  # principal directions, the other way round and up to sign
    z = x @ directions.float().T
    best = z.abs().topk(8, dim=-1).indices
    wanted = torch.zeros_like(z).scatter(-1, best, z.gather(-1, best)) @ directions.float()
    sparsifier = Sparsifier(criterion, 16, 24, 0.5, calibrated=True)
    torch.testing.assert_close(sparsifier(x, state), wanted, rtol=1e-3, atol=1e-3)

    folded, low_rank = criterion.fold(weight, state)
    z = criterion.encode(x, state)
    assert low_rank is None
    torch.testing.assert_close(z * sparsifier.keep(z, state) @ folded.T, wanted @ weight.T, rtol=1e-3, atol=1e-2)
    # What is lost is never more than with plain top-k on average: the basis concentrates the energy.
    plain = Sparsifier(LaRoSA(max_width=8), 16, 24, 0.5, calibrated=True)
    assert (x - sparsifier(x, state)).square().sum() < (x - plain(x, {})).square().sum()


def test_larosa_layers_that_read_the_same_input_share_one_rotation():
    layers = spon_layers(adapted("larosa"))
    rotation = {
        name.rpartition(".")[2]: layers[name].sparsifier_state("default")["rotation"]
        for name in layers
        if ".0." in name
    }
    assert rotation["q_proj"] is rotation["k_proj"] is rotation["v_proj"]
    assert rotation["gate_proj"] is rotation["up_proj"]
    assert rotation["o_proj"] is not rotation["q_proj"]
    for matrix in rotation.values():
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)))


def test_larosa_leaves_wide_inputs_in_their_basis():
    model = adapted("larosa", criterion_kwargs={"max_width": 32})
    for name, layer in spon_layers(model).items():
        assert ("rotation" in layer.sparsifier_state("default")) == ("down_proj" not in name)


# ---- from outside the package -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Centred(Criterion):
    """|x_i - c_i| above a threshold, c the root mean square of channel i: state from data, a threshold, a dial."""

    name: ClassVar[str] = "test-centred"
    strength: float = 0.1

    def state(self, n_in, n_out):
        return {"centre": Spec((n_in,), from_data=True)}

    def prepare(self, weight, moments=None):
        return {} if moments is None else {"centre": self.strength * moments.diagonal().sqrt().float()}

    def score(self, z, state):
        centre = state["centre"] if "centre" in state else 0.0
        return (z.detach().float() - centre).abs()


@pytest.fixture(autouse=True)
def _registered():
    register_criterion(Centred)
    yield
    del CRITERIA["test-centred"]  # the tests of other files go through all criteria


def test_registering_is_checked():
    assert CRITERIA["test-centred"] is Centred
    assert register_criterion(Centred) is Centred, "again, as in a notebook"
    with pytest.raises(TypeError, match="no criterion"):
        register_criterion(dict)
    with pytest.raises(ValueError, match="name is None"):
        register_criterion(type("Nameless", (Criterion,), {"name": None}))
    with pytest.raises(ValueError, match="'magnitude' is .*Magnitude already"):
        register_criterion(type("Other", (Criterion,), {"name": "magnitude"}))
    with pytest.raises(ValueError, match="selects is 'best'"):
        register_criterion(type("Best", (Criterion,), {"name": "best", "selects": "best"}))
    with pytest.raises(ValueError, match="import that package"):
        SponConfig(criterion="of-another-package")


def test_the_criterion_of_the_documentation_works():
    text = (Path(__file__).parents[1] / "docs/criteria.md").read_text(encoding="utf-8")
    space = {"__name__": "docs"}
    try:
        exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], space)
        power = get_peft_model(MODELS["llama"](), space["config"]).eval()
        topk = get_peft_model(MODELS["llama"](), SponConfig(criterion="topk")).eval()
        assert torch.equal(logits(power, "llama"), logits(topk, "llama"))  # powers do not change the order
        result = calibrate(power, data())
        assert all(layer.threshold > 0 and abs(layer.realised - 0.5) < 0.01 for layer in result.layers)
    finally:
        CRITERIA.pop("power", None)


# ---- the life of an adapter ---------------------------------------------------------------------------------------

EVERY = ["rsparse", "larosa", "test-centred"]


@pytest.mark.parametrize("criterion", EVERY)
@pytest.mark.parametrize("space", ["input", "output"])
def test_the_layer_computes_its_formula(criterion, space):
    model = adapted(criterion, anchor_space=space)
    x = torch.randn(2, 5, 32)
    layer = next(iter(spon_layers(model).values()))
    s = layer.sparsifier("default")(x, layer.sparsifier_state("default")) * (1 + layer.spon_gain["default"])
    anchor = layer.spon_anchor["default"]
    wanted = layer.base_layer(s + anchor) if space == "input" else layer.base_layer(s) + anchor
    torch.testing.assert_close(layer(x), wanted)
    assert not torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("criterion", EVERY)
def test_adapters_load_with_the_same_logits(criterion, tmp_path):
    model = adapted(criterion, sparsity_pattern={"down_proj": 0.7})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    loaded.set_sparsity(0.3)
    model.set_sparsity(0.3)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


@pytest.mark.slow
@pytest.mark.parametrize("criterion", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_folders_load_with_the_same_logits(criterion, dtype, tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    model = adapted(criterion, AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype))
    for layer in spon_layers(model).values():
        assert all(tensor.dtype == torch.float32 for tensor in layer.sparsifier_state("default").values())
    wanted = logits(model, "llama")
    merged = model.merge_and_unload()
    if dtype == torch.float32:
        torch.testing.assert_close(logits(merged, "llama"), wanted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))


@pytest.mark.parametrize("criterion", EVERY)
def test_lora_beneath_is_kept_and_merged(criterion, tmp_path):
    model = adapted(criterion)
    add_lora(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_with_lora(MODELS["llama"](), tmp_path).eval(), "llama"), wanted)
    torch.testing.assert_close(logits(model.merge_and_unload(), "llama"), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("criterion", EVERY)
def test_anchors_learn_and_the_realised_sparsity_is_the_wanted_one(criterion):
    model = adapted(criterion)
    result = evaluate(model, data())
    assert abs(result.anchored.sparsity - 0.5) < 0.06
    model.train()
    loss = model(**data()[0], labels=data()[0]["input_ids"]).loss
    loss.backward()
    for layer in spon_layers(model).values():
        assert layer.spon_anchor["default"].grad.abs().sum() > 0
        assert layer.spon_gain["default"].grad.abs().sum() > 0


def test_a_criterion_with_moments_and_thresholds_reads_the_data_twice():
    model = get_peft_model(MODELS["llama"](), SponConfig(criterion="test-centred"))
    with pytest.raises(ValueError, match="reads the data twice"):
        calibrate(model, iter(data()))
    assert not model.peft_config["default"].calibrated
    calibrate(model, data())
    layer = next(iter(spon_layers(model).values()))
    assert set(layer.sparsifier_state("default")) == {"centre", "threshold", "quantiles"}
