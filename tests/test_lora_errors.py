# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls that LoRA beneath SPON refuses or that fail halfway: what they say, and that they leave nothing behind."""

import pytest
import torch
from lora_models import lora_config, shake_heads, snapshot, spon_config, spon_then_lora
from models import MODELS, calibrated, edit_tensors, logits
from peft import PeftModel, get_peft_model

from peft_spon import SponConfig, add_lora, load_with_lora


@pytest.mark.parametrize("lora", [None, {"modules_to_save": ["lm_head"]}], ids=["first", "second"])
def test_add_lora_that_fails_halfway_is_undone(lora, tmp_path):
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    if lora is not None:
        shake_heads(add_lora(model, lora_config(**lora), "other", trainable="both"))
    before, wanted = snapshot(model), logits(model, "llama")
    bad = lora_config(target_modules=["q_proj", "input_layernorm"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="not supported"):
        add_lora(model, bad)
    assert snapshot(model) == before
    assert torch.equal(logits(model, "llama"), wanted)
    # The corrected call gives a LoRA that is what its folder says.
    add_lora(model, lora_config(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    again = load_with_lora(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_both_kinds_cannot_train_the_same_head():
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config(modules_to_save=["lm_head"])))
    shake_heads(model)
    before, wanted = snapshot(model), logits(model, "llama")
    with pytest.raises(ValueError, match=r"\['lm_head'\] in the SPON adapter and in the LoRA.*one of them"):
        add_lora(model, lora_config(modules_to_save=["lm_head"]))
    assert snapshot(model) == before
    assert torch.equal(logits(model, "llama"), wanted)

    lora = shake_heads(get_peft_model(MODELS["llama"](), lora_config(modules_to_save=["lm_head"]))).eval()
    before, wanted = snapshot(lora), logits(lora, "llama")
    with pytest.raises(ValueError, match="leave task_type out of the SponConfig"):
        get_peft_model(lora, spon_config(modules_to_save=["lm_head"]))
    assert snapshot(lora) == before
    assert torch.equal(logits(lora, "llama"), wanted)


def test_a_failed_load_of_spon_gives_the_lora_back(tmp_path):
    calibrated(get_peft_model(MODELS["llama"](), spon_config())).save_pretrained(tmp_path / "spon")
    path = tmp_path / "spon/adapter_model.safetensors"
    edit_tensors(path, lambda t: t.pop(next(key for key in t if "threshold" in key)))
    torch.manual_seed(0)
    lora = get_peft_model(MODELS["llama"](), lora_config()).eval()
    before, wanted = snapshot(lora), logits(lora, "llama")
    with pytest.raises(ValueError, match="incomplete"):
        PeftModel.from_pretrained(lora, tmp_path / "spon")
    assert snapshot(lora) == before
    lora.set_adapter("default")
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "lora").eval()
    assert torch.equal(logits(lora, "llama"), wanted)
    assert torch.equal(logits(again, "llama"), wanted)


def test_the_old_handle_of_a_lora_still_saves_it(tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(MODELS["llama"](), lora_config()).eval()
    wanted = logits(lora, "llama")
    get_peft_model(lora, spon_config())
    lora.save_pretrained(tmp_path, selected_adapters=["task"])
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "task").eval()
    assert torch.equal(logits(again, "llama"), wanted)


def test_an_adapter_without_thresholds_is_found_out_after_one_with_them():
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    model.add_adapter("ref", SponConfig(sparsity=0.5, calibrated=True))  # as read from a saved adapter's folder
    logits(model, "llama")
    model.set_adapter("ref")
    with pytest.raises(ValueError, match="'ref' is said to be calibrated but has no thresholds"):
        logits(model, "llama")


def test_load_with_lora_wants_a_plain_base(tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    wanted = logits(model, "llama")
    with pytest.raises(ValueError, match="onto a plain base"):
        load_with_lora(model, tmp_path)
    assert torch.equal(logits(model, "llama"), wanted)


def test_a_lora_with_biases_is_refused_before_it_touches_the_base(tmp_path):
    lora = get_peft_model(MODELS["gpt2"](), lora_config(bias="all"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            parameter.add_(1.0 if name.endswith(".bias") else 0.0)
    lora.save_pretrained(tmp_path / "lora")
    get_peft_model(MODELS["gpt2"](), spon_config()).save_pretrained(tmp_path / "spon")
    base = MODELS["gpt2"]().eval()
    wanted = logits(base, "gpt2")
    with pytest.raises(ValueError, match="bias='all'"):
        load_with_lora(base, tmp_path / "spon", tmp_path / "lora")
    assert torch.equal(logits(base, "gpt2"), wanted)


def test_a_lora_that_chooses_its_tokens_is_refused():
    model = get_peft_model(MODELS["llama"](), spon_config())
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        add_lora(model, lora_config(alora_invocation_tokens=[5, 6]))
