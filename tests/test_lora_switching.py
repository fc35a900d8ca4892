# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA beneath SPON switched on and off: rows of a batch, blocks inside blocks, what is trainable."""

import pytest
import torch
from lora_models import lora_config, spon_config, spon_then_lora, trained
from models import MODELS, inputs, logits

from peft_spon import add_lora, dense_mode, load_with_lora, set_trainable, without_lora


def test_rows_that_all_want_no_lora_are_as_rows_among_others(route):
    model = route()
    batch = inputs("llama")
    count = len(batch["input_ids"])
    with torch.no_grad():
        alone = model(**batch, adapter_names=["__base__"] * count).logits
        mixed = model(**batch, adapter_names=["task"] + ["__base__"] * (count - 1)).logits
        with without_lora(model):
            wanted = model(**batch).logits
    torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1:], wanted[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["lora", "anchors", "both"])
def test_a_choice_survives_disable_adapter(route, what):
    model = route()
    set_trainable(model, what)
    chosen = trained(model)
    with model.disable_adapter():
        pass
    assert trained(model) == chosen
    model.set_adapter("task", inference_mode=True)
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("task")
    assert trained(model) == chosen


def test_a_choice_holds_for_layers_of_a_second_spon_adapter():
    model = spon_then_lora(target_modules=["down_proj"])
    model.add_adapter("wide", spon_config())
    model.set_adapter("wide")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "spon_" in name)


def test_blocks_inside_blocks(route):
    model = route()
    for block in (without_lora, dense_mode):
        with block(model):
            wanted = logits(model, "llama")
            with model.disable_adapter():
                pass
            assert torch.equal(logits(model, "llama"), wanted)
            with block(model):
                pass
            assert torch.equal(logits(model, "llama"), wanted)
        assert not torch.equal(logits(model, "llama"), wanted)


def test_a_merged_lora_cannot_be_left_out():
    model = spon_then_lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), without_lora(model):
        pass


def test_anchors_can_be_trained_again_when_the_lora_is_gone():
    model = spon_then_lora()  # the LoRA was to be trained, the anchors not
    model.delete_adapter("task")
    assert any(p.requires_grad for name, p in model.named_parameters() if "spon_anchor" in name)


def test_several_loras_are_loaded_together(tmp_path):
    model = spon_then_lora()
    add_lora(model, lora_config(target_modules=["q_proj"]), "other")
    model.save_pretrained(tmp_path)
    again = load_with_lora(MODELS["llama"](), tmp_path, adapter_name=["other", "task"]).eval()
    for name in ("other", "task"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    folders = [tmp_path / "task", tmp_path / "other"]
    listed = load_with_lora(MODELS["llama"](), tmp_path, folders, ["task", "style"]).eval()
    listed.set_adapter("style")
    model.set_adapter("other")
    assert torch.equal(logits(listed, "llama"), logits(model, "llama"))
    with pytest.raises(ValueError, match="one name for each"):
        load_with_lora(MODELS["llama"](), tmp_path, folders, "task")
