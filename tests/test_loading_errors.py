# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Bad files and bad targets: an error that says what, which value and the remedy, and the model as it was."""

import pytest
import torch
from models import MODELS, calibrated, edit_json, edit_tensors, inputs, logits
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from peft_spon import SponConfig, calibrate
from peft_spon.sites import spon_layers


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, criterion="weighted", gain=True))
    calibrate(model, [inputs("llama", rows=4, tokens=16)])
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    # Without the checksums of this version, as files of older ones are.
    edit_json(folder / "adapter_config.json", checksums=None, **changes)


KEY = "base_model.model.model.layers.0.mlp.down_proj."


def check_refused(folder, message, family="llama", error=ValueError):
    base = MODELS[family]()
    dense = logits(base, family)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())
    assert torch.equal(logits(base, family), dense)


def test_missing_threshold(saved):
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t.pop(KEY + "spon_threshold"))
    check_refused(saved, r"no 'spon_threshold' of layer 'model.layers.0.mlp.down_proj'.*calibrate\(\)")


def test_missing_anchor(saved):
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t.pop(KEY + "spon_anchor"))
    check_refused(saved, "no 'spon_anchor' of layer 'model.layers.0.mlp.down_proj'.*onto the model it was trained for")


def test_shape_of_another_model(saved):
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t.update({KEY + "spon_anchor": torch.zeros(7)}))
    check_refused(
        saved, r"'spon_anchor' of layer 'model.layers.0.mlp.down_proj' has shape \(7,\), the model needs \(32,\)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["spon_threshold", "spon_quantiles", "spon_column_scale", "spon_anchor", "spon_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(saved, part, value):
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t[KEY + part].fill_(value))
    check_refused(saved, f"'{part}' of layer 'model.layers.0.mlp.down_proj' holds NaN or infinity")


def test_newer_version(saved):
    edit_config(saved, peft_spon_version="99.1.0")
    check_refused(saved, "saved by peft_spon 99.1.0, newer than the installed .*pip install -U peft_spon")


def test_unknown_criterion(saved):
    edit_config(saved, criterion="entropy")
    check_refused(saved, "criterion is 'entropy'; use one of")


def test_failed_load_of_a_second_adapter_leaves_the_first(saved):
    model = get_peft_model(
        MODELS["llama"](), SponConfig(init_weights=False, criterion="weighted", sparsity=0.3)
    ).eval()
    before = logits(model, "llama")
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t.pop(KEY + "spon_threshold"))
    with pytest.raises(ValueError, match="no 'spon_threshold'"):
        model.load_adapter(str(saved), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, "llama"), before)


def test_pickle_only_adapter_is_refused(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    torch.save(tensors, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    check_refused(saved, "safetensors")


def test_failed_load_takes_modules_to_save_out_again(tmp_path):
    model = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path / "adapter_model.safetensors", lambda t: t.pop(KEY + "spon_anchor"))
    check_refused(tmp_path, "no 'spon_anchor'")
    base = MODELS["llama"]()
    with pytest.raises(ValueError, match="no 'spon_anchor'"):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(("files", "refused"), [({"adapter_model.bin"}, True), ({"adapter_model.safetensors"}, False)])
def test_pickle_only_adapter_on_the_hub_is_refused(saved, monkeypatch, files, refused):
    config_file = saved / "adapter_config.json"
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *args, **kwargs: str(config_file))
    monkeypatch.setattr("peft_spon.config.has_file", lambda repo, name, **kwargs: name in files)
    if refused:
        with pytest.raises(ValueError, match="user/spon holds its weights as adapter_model.bin.*safetensors only"):
            SponConfig.from_pretrained("user/spon")
    else:
        assert SponConfig.from_pretrained("user/spon").calibrated


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_modules": ["nothing"]}, "Target modules .*nothing.* not found"),
        ({"sparsity_pattern": {"dwn_proj": 0.5}}, "sparsity_pattern has 'dwn_proj', which no targeted layer matches"),
        ({"anchor_modules": ["dwn_proj"]}, "anchor_modules has 'dwn_proj', which none of the targeted layers matches"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*Embedding"),
    ],
)
def test_bad_targets_leave_the_model_alone(llama, kwargs, message):
    dense = logits(llama, "llama")
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(llama, SponConfig(**kwargs))
    assert torch.equal(logits(llama, "llama"), dense)
    assert not any(isinstance(m, BaseTunerLayer) for m in llama.modules())
    assert all(p.requires_grad for p in llama.parameters())


def test_model_without_blocks_needs_named_targets():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"Sequential has no list of transformer blocks.*target_modules=\['0', '1'\]"):
        get_peft_model(net, SponConfig())
    assert type(net[0]) is torch.nn.Linear


def test_loading_over_an_adapter_with_other_settings_is_refused_and_loses_nothing(saved):
    for change in ({}, {"gain": False}, {"sparsity": 0.2}):
        model = get_peft_model(
            MODELS["llama"](), SponConfig(**{"init_weights": False, "criterion": "weighted", **change})
        ).eval()
        if change == {"sparsity": 0.2}:
            calibrate(model, [inputs("llama", rows=4, tokens=16)])
        before = logits(model, "llama")
        with pytest.raises(ValueError, match="has no place here|is not that of sparsity 0.2"):
            model.load_adapter(str(saved), "default")
        assert torch.equal(logits(model, "llama"), before)
    model.set_sparsity(0.5)
    model.load_adapter(str(saved), "default")
    loaded = PeftModel.from_pretrained(MODELS["llama"](), saved).eval()
    assert torch.equal(logits(model, "llama"), logits(loaded, "llama"))


def test_a_saved_adapters_config_alone_does_not_zero_everything(saved):
    model = get_peft_model(MODELS["llama"](), SponConfig.from_pretrained(saved))
    with pytest.raises(ValueError, match="said to be calibrated but has no thresholds"):
        logits(model, "llama")


def test_one_config_object_serves_several_models_and_adapters(tmp_path):
    config = SponConfig(init_weights=False)
    first = get_peft_model(MODELS["llama"](), config)
    calibrate(first, [inputs("llama", rows=4, tokens=16)])
    assert not config.calibrated
    assert config.target_modules == first.peft_config["default"].target_modules  # resolved in it, as LoRA does
    assert logits(get_peft_model(MODELS["llama"](), config).eval(), "llama").isfinite().all()
    first.add_adapter("b", config)
    first.base_model.set_sparsity(0.2, adapter_name="b")
    assert first.peft_config["default"].sparsity == 0.5
    first.eval().save_pretrained(tmp_path)
    wanted = logits(first, "llama")
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval(), "llama"), wanted)
    PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "b")


def test_modules_to_save_as_a_set(tmp_path):
    model = get_peft_model(MODELS["llama"](), SponConfig(modules_to_save={"lm_head", "norm", "embed_tokens"}))
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval(), "llama"), logits(model.eval(), "llama")
    )


def two_adapters():
    """Of which the one that is to go has run; its layers stay for the other."""
    model = calibrated(get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)))
    model.add_adapter("other", SponConfig())
    logits(model, "llama")
    model.delete_adapter("default")
    return model


def test_a_name_used_again_is_a_new_adapter_to_the_check_for_thresholds():
    model = two_adapters()
    model.add_adapter("default", SponConfig(calibrated=True))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="'default' is said to be calibrated but has no thresholds"):
        logits(model, "llama")


def test_a_name_used_again_is_a_new_adapter_to_the_undoing_of_a_failed_load(saved):
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t.pop(KEY + "spon_anchor"))
    model = two_adapters()
    with pytest.raises(ValueError, match="no 'spon_anchor'"):
        model.load_adapter(saved, "default")
    assert list(model.peft_config) == ["other"]
    assert all(set(layer.spon_settings) == {"other"} for layer in spon_layers(model).values())
