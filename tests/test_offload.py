# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate keeps on the CPU or on disk compute what a plain model computes."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import MODELS, inputs, logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_spon import SponConfig, add_lora, calibrate, dense_mode, evaluate, load_with_lora
from peft_spon.sites import spon_layers


DATA = [inputs("llama", rows=4, tokens=16)]
CONFIGS = {
    "default": {},
    "paper": {"criterion": "magnitude", "anchor_space": "input", "gain": False},
    "topk": {"criterion": "wina", "anchor_modules": ["down_proj"]},
}
# "cpu" is where these tests compute; "disk" is what comes and goes.
MAPS = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "disk",
    },
    "gpt2": {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.h.0": "disk",
        "transformer.h.1": "cpu",
        "transformer.ln_f": "disk",
        "lm_head": "cpu",
    },
}
INSIDE = {family: {f"base_model.model.{name}": where for name, where in MAPS[family].items()} for family in MAPS}


def adapted(base, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(base, SponConfig(**{"init_weights": False, "criterion": "weighted", **kwargs})).eval()


def calibrated(base, **kwargs):
    model = adapted(base, **kwargs)
    calibrate(model, DATA, progress=False)
    return model


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model),
    "cpu_offload with buffers": lambda model, folder: cpu_offload(model, offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder / "off"),
    "whole blocks": lambda model, folder: cpu_offload(model, preload_module_classes=["LlamaDecoderLayer"]),
    "whole SPON layers": lambda model, folder: cpu_offload(model, preload_module_classes=["SponLinear"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_offloaded_after_wrapping(way, config, tmp_path):
    model = calibrated(MODELS["llama"](), **CONFIGS[config])
    want = logits(model, "llama")
    WAYS[way](model, tmp_path)
    assert torch.equal(logits(model, "llama"), want)
    assert all(layer.get_base_layer().weight.is_meta for layer in spon_layers(model).values()), "not offloaded"
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, "llama"), want)


@pytest.mark.parametrize("way", ["cpu_offload", "cpu_offload with buffers", "disk_offload"])
@pytest.mark.parametrize("config", CONFIGS)
def test_offloaded_before_wrapping(way, config, tmp_path):
    want = logits(calibrated(MODELS["llama"](), **CONFIGS[config]), "llama")
    model = calibrated(WAYS[way](MODELS["llama"](), tmp_path), **CONFIGS[config])
    assert torch.equal(logits(model, "llama"), want)


@pytest.mark.parametrize("family", MAPS)
@pytest.mark.parametrize("way", ["before", "after", "loaded", "loaded, automatic"])
def test_device_map_with_disk(family, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT drops the leading slash of where it writes its own copy of what is on disk
    plain = calibrated(MODELS[family]())
    want = logits(plain, family)
    plain.save_pretrained(tmp_path / "spon")
    MODELS[family]().save_pretrained(tmp_path / "base")
    where = {"offload_folder": str(tmp_path / "off")}

    def load(**kwargs):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **kwargs).eval()

    if way == "before":
        model = calibrated(load(device_map=dict(MAPS[family]), **where))
    elif way == "after":
        model = dispatch_model(plain, device_map=dict(INSIDE[family]), offload_dir=str(tmp_path / "off"))
    elif way == "loaded":
        model = load(device_map=dict(MAPS[family]), **where)
        model = PeftModel.from_pretrained(
            model, tmp_path / "spon", device_map=dict(INSIDE[family]), offload_folder=str(tmp_path / "off2")
        )
    else:
        if family == "gpt2":
            pytest.skip("PEFT does not find tied heads on disk, LoRA's neither")
        limit = {"max_memory": {"cpu": "60KB"}, "device_map": "auto"}
        model = load(**limit, **where)
        assert "disk" in model.hf_device_map.values()
        model = PeftModel.from_pretrained(model, tmp_path / "spon", offload_folder=str(tmp_path / "off2"), **limit)
    assert any(parameter.is_meta for parameter in model.parameters()), "not offloaded"
    assert torch.equal(logits(model, family), want)


def test_everything_else_on_an_offloaded_model(tmp_path):
    plain, model = adapted(MODELS["llama"]()), cpu_offload(adapted(MODELS["llama"]()))
    for one in (plain, model):
        calibrate(one, DATA, on_sparse=True, progress=False)
        one.set_sparsity(0.7)
    want = logits(plain, "llama")
    assert torch.equal(logits(model, "llama"), want)
    assert evaluate(model, DATA) == evaluate(plain, DATA)
    with dense_mode(plain), dense_mode(model):
        assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), want)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), want)


@pytest.mark.parametrize("way", ["cpu_offload", "cpu_offload with buffers", "disk_offload"])
@pytest.mark.parametrize("space", ["input", "output"])
def test_merging_an_offloaded_model(way, space, tmp_path):
    plain = calibrated(MODELS["gpt2"](), anchor_space=space)
    model = WAYS[way](calibrated(MODELS["gpt2"](), anchor_space=space), tmp_path)
    want = logits(plain, "gpt2")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "gpt2"), want)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "gpt2"), want)
    merged = model.merge_and_unload()
    assert any(parameter.is_meta for parameter in merged.parameters())
    assert torch.equal(logits(merged, "gpt2"), logits(plain.merge_and_unload(), "gpt2"))


def test_saving_a_merged_model_that_is_on_disk(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    where = {"device_map": dict(MAPS["llama"]), "offload_folder": str(tmp_path / "off")}
    merged = calibrated(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **where)).merge_and_unload()
    want = logits(merged, "llama")
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), "llama"), want)
    where["offload_folder"] = str(tmp_path / "off2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **where).eval()
    assert torch.equal(logits(loaded, "llama"), want)


def test_lora_beneath(tmp_path):
    model = calibrated(MODELS["llama"]())
    add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    want = logits(model, "llama")
    model.save_pretrained(tmp_path / "both")
    cpu_offload(model)
    assert torch.equal(logits(model, "llama"), want)
    calibrate(model, DATA, progress=False)
    loaded = load_with_lora(MODELS["llama"](), tmp_path / "both").eval()
    calibrate(loaded, DATA, progress=False)
    assert torch.equal(logits(model, "llama"), logits(loaded, "llama"))
