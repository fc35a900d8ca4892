# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Heads and other modules_to_save of a LoRA and of the SPON above it."""

import pytest
import torch
from lora_models import lora_config, shake_heads, snapshot, spon_config, spon_then_lora
from models import MODELS, calibrated, inputs, logits
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from peft_spon import add_lora, load_with_lora, without_lora
from peft_spon.sites import spon_layers


def test_all_linear_leaves_the_heads_of_other_adapters_alone(tmp_path):
    model = shake_heads(calibrated(get_peft_model(MODELS["llama"](), spon_config(modules_to_save=["lm_head"]))))
    add_lora(model, lora_config())
    assert not any("lm_head" in name for name, m in model.named_modules() if isinstance(m, LoraLayer))
    assert sum(isinstance(m, LoraLayer) for m in model.modules()) == len(spon_layers(model))
    model.save_pretrained(tmp_path)
    again = load_with_lora(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_spon_does_not_go_onto_a_head_that_lora_trains():
    lora = get_peft_model(MODELS["llama"](), lora_config(modules_to_save=["lm_head"]))
    with pytest.raises(TypeError, match="'lm_head': The layer is in the modules_to_save"):
        get_peft_model(lora, spon_config(target_modules=["lm_head", "q_proj"]))
    assert sorted(lora.peft_config) == ["default"]
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config(target_modules=["lm_head", "q_proj"])))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'lm_head', which SPON makes sparse"):
        add_lora(model, lora_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert snapshot(model) == before


@pytest.mark.parametrize("owner", ["spon", "lora"])
def test_adapter_names_with_a_head_of_the_other_kind(owner):
    head = {"modules_to_save": ["lm_head"]}
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config(**(head if owner == "spon" else {}))))
    shake_heads(add_lora(model, lora_config(**(head if owner == "lora" else {}))))
    together = logits(model, "llama")
    batch = inputs("llama")
    rows_of = len(batch["input_ids"])
    for name in ("task", "default"):
        with torch.no_grad():
            found = model(**batch, adapter_names=[name] * rows_of).logits
        torch.testing.assert_close(found, together, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), without_lora(model):
        spon_alone = model(**batch).logits
    with torch.no_grad():
        all_base = model(**batch, adapter_names=["__base__"] * rows_of).logits
        mixed = model(**batch, adapter_names=["task", *["__base__"] * (rows_of - 1)]).logits
    torch.testing.assert_close(all_base, spon_alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1:], spon_alone[1:], rtol=1e-5, atol=1e-5)


def test_rows_that_all_want_no_spon_have_the_dense_head():
    model = shake_heads(calibrated(get_peft_model(MODELS["llama"](), spon_config(modules_to_save=["lm_head"]))))
    batch = inputs("llama")
    with torch.no_grad():
        found = model(**batch, adapter_names=["__base__"] * len(batch["input_ids"])).logits
    assert torch.equal(found, logits(MODELS["llama"](), "llama"))


def test_anchors_are_swapped_without_the_lora(tmp_path):
    """Only a Trainer checkpoint brings its LoRA along; a folder is loaded as PEFT does, before and after saving."""
    model = spon_then_lora()
    model.save_pretrained(tmp_path / "first")
    lora = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    moved = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    model.load_adapter(tmp_path / "first", "default")
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(p, moved[name])
            assert not torch.equal(p, lora[name])


def test_merging_spon_alone_leaves_the_head_of_the_lora_out():
    model = shake_heads(spon_then_lora(lora=lora_config(modules_to_save=["lm_head"])))
    with without_lora(model):
        wanted = logits(model, "llama")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["default"]), "llama"), wanted)


def test_merged_models_whose_lora_came_through_transformers_are_saved(tmp_path):
    torch.manual_seed(0)
    base = MODELS["llama"]()
    base.add_adapter(lora_config(), "task")
    merged = calibrated(get_peft_model(base, spon_config())).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
