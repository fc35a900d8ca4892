# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`nn.DataParallel`, which plain Trainer takes where it finds several GPUs: replicas compute what the model does."""

import pytest
import torch
from models import MODELS, inputs, logits
from peft import LoraConfig, get_peft_model

from peft_spon import SponConfig, add_lora, calibrate, dense_mode, without_anchors


def replicate(model):
    """What `torch.nn.parallel.replicate` does, on one device."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else replicas[index[child]])
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter.clone())
        for key, buffer in module._buffers.items():
            setattr(replica, key, None if buffer is None else buffer.clone())
    return replicas[0]


def calibrated(family="llama", **kwargs):
    model = get_peft_model(
        MODELS[family](), SponConfig(**{"init_weights": False, "criterion": "weighted", **kwargs})
    ).eval()
    calibrate(model, [inputs(family, rows=4, tokens=16)], progress=False)
    return model


def with_lora():
    model = calibrated()
    add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def merged():
    model = calibrated()
    model.merge_adapter()
    return model


STATES = {
    "default": calibrated,
    "input-side": lambda: calibrated(anchor_space="input", prefill=0.5),
    "top-k": lambda: calibrated(criterion="topk"),
    "head": lambda: calibrated(modules_to_save=["lm_head"]),
    "LoRA beneath": with_lora,
    "merged": merged,
    "unloaded": lambda: calibrated().merge_and_unload(),
}


@pytest.mark.parametrize("state", STATES)
def test_replicas_compute_what_the_model_computes(state):
    model = STATES[state]()
    want = logits(model, "llama")
    for replica in (replicate(model), replicate(model)):
        assert torch.equal(logits(replica, "llama"), want)
    assert torch.equal(logits(model, "llama"), want)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families(family):
    model = calibrated(family)
    assert torch.equal(logits(replicate(model), family), logits(model, family))


@pytest.mark.parametrize("block", [dense_mode, without_anchors])
def test_blocks_around_and_inside_a_replica(block):
    model = calibrated()
    want = logits(model, "llama")
    with block(model):
        inside = logits(model, "llama")
        replica = replicate(model)
    assert torch.equal(logits(replica, "llama"), inside)
    one, other = replicate(model), replicate(model)
    with block(one):
        assert torch.equal(logits(one, "llama"), inside)
        assert torch.equal(logits(other, "llama"), want)
        with block(other):
            assert torch.equal(logits(other, "llama"), inside)
    assert torch.equal(logits(one, "llama"), want)
    assert torch.equal(logits(other, "llama"), want)


def test_gradients_reach_the_anchors_and_gains():
    model = calibrated().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = inputs("llama")
    wanted = torch.autograd.grad(model(**batch).logits.square().mean(), trained)
    for found, want in zip(
        torch.autograd.grad(replicate(model)(**batch).logits.square().mean(), trained), wanted, strict=True
    ):
        assert torch.equal(found, want)
        assert found.abs().sum() > 0


def test_a_layer_around_is_still_noticed():
    model = calibrated().get_base_model()
    around = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for one in (around, replicate(around)):
        with pytest.raises(ValueError, match="A Linear layer was put around the SPON layer 'q_proj'"):
            logits(one, "llama")


def test_a_model_that_was_moved_after_merging():
    """Another device has what was merged, too. ("meta" is the one that every machine has.)"""
    model = calibrated(anchor_space="input", prefill=0.5)
    model.merge_adapter()
    model.to("meta")
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    assert layer(torch.empty(2, 4, layer.in_features, device="meta")).device.type == "meta"
