# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` before, between and after: what is saved has the names of a plain model, and loads."""

import pytest
import torch
from models import MODELS, inputs, logits
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_spon import SponConfig, calibrate, evaluate
from peft_spon.sites import spon_layers


DATA = [inputs("llama", rows=4, tokens=16)]


@pytest.fixture(autouse=True)
def _without_compiling():
    """Names and values do not depend on it, and it takes a minute per test."""
    with torch.compiler.set_stance("force_eager"):
        yield


def whole(model):
    return torch.compile(model, backend="eager")


def inside(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def blocks(model):
    layers = model.get_base_model().model.layers if isinstance(model, PeftModel) else model.model.layers
    for index, block in enumerate(layers):
        layers[index] = torch.compile(block, backend="eager")
    return model


def in_place(model):
    model.compile(backend="eager")
    return model


WAYS = [whole, inside, blocks, in_place]


def config(**kwargs):
    torch.manual_seed(5)
    return SponConfig(**{"init_weights": False, "task_type": "CAUSAL_LM", "criterion": "weighted", **kwargs})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_wrapping_a_compiled_base(way, tmp_path):
    plain = get_peft_model(MODELS["llama"](), config(modules_to_save=["lm_head"])).eval()
    model = get_peft_model(way(MODELS["llama"]()), config(modules_to_save=["lm_head"])).eval()
    for one in (plain, model):
        calibrate(one, DATA, progress=False)
    want = logits(plain, "llama")
    assert torch.equal(logits(model, "llama"), want)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert evaluate(model, DATA) == evaluate(plain, DATA)

    model.save_pretrained(tmp_path / "adapter")
    for base in (MODELS["llama"](), way(MODELS["llama"]())):
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), "llama"), want)

    merged = model.merge_and_unload()
    want = logits(merged, "llama")
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), "llama"), want)


@pytest.mark.slow
def test_what_was_compiled_stays_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))

        def forward(self, x):
            return self.second(self.first(x))

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def adapted(compiled):
        torch.manual_seed(7)
        net = Net()
        if compiled == "part":
            net.second = torch.compile(net.second, backend=backend, fullgraph=True)
        if compiled == "whole":
            net = torch.compile(net, backend=backend, fullgraph=True)
        return get_peft_model(net, SponConfig(target_modules="all-linear", init_weights=False)).eval()

    x = torch.randn(3, 8)
    with torch.compiler.set_stance("default"), torch.no_grad():
        want = adapted("nothing")(x)
        assert not graphs
        for number, compiled in enumerate(["part", "whole"], start=1):
            assert torch.equal(adapted(compiled)(x), want)
            assert len(graphs) == number


@pytest.mark.parametrize("way", [whole, blocks, in_place])
def test_compiling_after_wrapping(way, tmp_path):
    model = get_peft_model(MODELS["llama"](), config()).eval()
    calibrate(model, DATA, progress=False)
    want = logits(model, "llama")
    compiled = way(model)
    assert torch.equal(logits(compiled, "llama"), want)
    compiled.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "adapter"), "llama"), want)
    compiled.load_adapter(tmp_path / "adapter", "again")
    compiled.set_adapter("again")
    assert torch.equal(logits(compiled, "llama"), want)


def test_compiling_after_merging(tmp_path):
    merged = get_peft_model(MODELS["llama"](), config()).merge_and_unload()
    want = logits(merged, "llama")
    whole(merged).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), "llama"), want)
    with pytest.raises(ValueError, match="wrapped by torch.compile.*compile in place"):
        blocks(merged).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), "llama"), want)


@pytest.mark.parametrize("way", [whole, blocks])
def test_injecting_into_a_compiled_model(way):
    model = inject_adapter_in_model(config(), way(MODELS["llama"]())).eval()
    plain = inject_adapter_in_model(config(), MODELS["llama"]()).eval()
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    assert list(spon_layers(model)) == list(spon_layers(plain))


def test_over_a_compiled_lora_model():
    def lora():
        torch.manual_seed(6)
        return get_peft_model(MODELS["llama"](), LoraConfig(target_modules="all-linear", init_lora_weights=False))

    model = get_peft_model(whole(lora()), config()).eval()
    plain = get_peft_model(lora(), config()).eval()
    assert list(model.peft_config) == list(plain.peft_config) == ["task", "default"]
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))


def test_files_with_the_names_of_a_compiled_model_still_load(tmp_path):
    """As they were written from compiled bases before."""
    model = get_peft_model(MODELS["llama"](), config()).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    names = {key: key.replace("base_model.model.", "base_model.model._orig_mod.") for key in load_file(file)}
    save_file({names[key]: tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    for base in (MODELS["llama"](), whole(MODELS["llama"]())):
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
