# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`get_peft_model` on a model that holds adapters already: a notebook's cell run again, another method's model."""

import warnings

import pytest
import torch
from models import MODELS, inputs, logits
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import AuxiliaryTrainingWrapper
from test_peft_contract import needs_own_adapter_methods

from peft_spon import SponConfig, SponLayer, calibrate, load_with_lora
from peft_spon.sites import spon_layers


DATA = [inputs("llama", rows=4, tokens=16)]
# Settings of the cell's first and second run.
RUNS = {
    "without gains": ({}, {"gain": False}),
    "fewer targets": ({}, {"target_modules": r".*layers\.1.*(gate|v)_proj|.*h\.1\.mlp\.c_fc"}),
    "other anchors": ({"anchor_space": "input"}, {"anchor_modules": []}),
    "no thresholds": ({}, {"criterion": "topk", "sparsity": 0.3}),
    "head no longer trained": ({"modules_to_save": ["lm_head"]}, {}),
    "another head": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "the same": ({}, {}),
}


def trained(model):
    """Everything that is trained moved away from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def first_run(base, name="default", **kwargs):
    model = get_peft_model(base, SponConfig(**kwargs), name).eval()
    calibrate(model, DATA, progress=False)
    return trained(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_cell_run_again_gives_the_new_adapter_alone(family, run, name, tmp_path):
    first, second = RUNS[run]
    base = MODELS[family]()
    first_run(base, **first)
    with pytest.warns(UserWarning, match=r"held SPON layers of an earlier call \(adapters \['default'\]\)"):
        model = get_peft_model(base, SponConfig(**second), name).eval()
    fresh = get_peft_model(MODELS[family](), SponConfig(**second), name).eval()
    assert torch.equal(logits(model, family), logits(fresh, family))
    assert model.get_nb_trainable_parameters() == fresh.get_nb_trainable_parameters()
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert list(model.peft_config) == list(fresh.peft_config) == [name]
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(MODELS[family](), folder).eval()
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert torch.equal(logits(model.unload(), family), logits(MODELS[family](), family))


@pytest.mark.parametrize("state", ["merged", "disabled", "two adapters", "deleted"])
def test_whatever_the_old_adapter_was_in(state, llama):
    old = first_run(llama, anchor_space="input")
    if state == "merged":
        old.merge_adapter()
    elif state == "disabled":
        old.base_model.disable_adapter_layers()
    elif state == "two adapters":
        old.add_adapter("other", SponConfig(sparsity=0.8, modules_to_save=["lm_head"]))
        old.set_adapter("other")
    else:
        old.delete_adapter("default")
    model = get_peft_model(llama, SponConfig(sparsity=0.6)).eval()
    fresh = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6)).eval()
    assert torch.equal(logits(model, "llama"), logits(fresh, "llama"))
    assert list(model.state_dict()) == list(fresh.state_dict())


def test_loading_on_a_base_that_was_used_before(llama, tmp_path):
    good = first_run(MODELS["llama"](), gain=False)
    good.save_pretrained(tmp_path)
    first_run(llama)
    loaded = PeftModel.from_pretrained(llama, tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(good, "llama"))


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_call_that_fails_changes_nothing(merged, llama):
    old = first_run(llama, modules_to_save=["lm_head"])
    if merged:
        old.merge_adapter()
    want, keys = logits(old, "llama"), list(old.state_dict())
    with pytest.raises(ValueError, match="anchor_modules has 'nowhere'"):
        get_peft_model(llama, SponConfig(anchor_modules=["nowhere"]))
    assert torch.equal(logits(old, "llama"), want)
    assert list(old.state_dict()) == keys
    assert list(old.peft_config) == ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["base", "LoRA model"])
@pytest.mark.parametrize("lora_name", ["default", "mine"])
def test_lora_beneath_stays(given, lora_name, tmp_path):
    def lora_model():
        torch.manual_seed(5)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(MODELS["llama"](), config, lora_name).eval()

    second = SponConfig(gain=False, criterion="magnitude")  # which reads no weights, the LoRA's neither
    lora = lora_model()
    first_run(lora)
    with pytest.warns(UserWarning, match=r"earlier call \(adapters \['default'\]\)"):
        model = get_peft_model(lora if given == "LoRA model" else lora.get_base_model(), second).eval()
    fresh = get_peft_model(lora_model(), second).eval()
    with torch.no_grad():  # the first run trained the LoRA, too
        for (name, ours), theirs in zip(fresh.named_parameters(), model.parameters(), strict=True):
            if "lora_" in name:
                ours.copy_(theirs)
    assert torch.equal(logits(model, "llama"), logits(fresh, "llama"))
    assert list(model.peft_config) == list(fresh.peft_config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }
    model.save_pretrained(tmp_path)
    loaded = load_with_lora(MODELS["llama"](), tmp_path, adapter_name="task" if lora_name == "default" else lora_name)
    assert torch.equal(logits(loaded.eval(), "llama"), logits(model, "llama"))


def test_a_spon_model_is_still_refused(llama):
    model = first_run(llama)
    want = logits(model, "llama")
    with pytest.raises(ValueError, match="has the SPON adapters"):
        get_peft_model(model, SponConfig())
    assert torch.equal(logits(model, "llama"), want)


def test_injecting_adds_and_replaces_what_has_the_name(llama):
    inject_adapter_in_model(SponConfig(init_weights=False), llama, "a")
    inject_adapter_in_model(SponConfig(init_weights=False, sparsity=0.2), llama, "b")
    assert all(set(layer.spon_settings) == {"a", "b"} for layer in spon_layers(llama).values())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter")
        inject_adapter_in_model(SponConfig(gain=False, target_modules=["down_proj"]), llama, "a")
    for name, layer in spon_layers(llama).items():
        assert set(layer.spon_settings) == ({"a", "b"} if name.endswith("down_proj") else {"b"})
        assert "a" not in layer.spon_gain
    fresh = MODELS["llama"]()
    inject_adapter_in_model(SponConfig(gain=False, target_modules=["down_proj"]), fresh, "a")
    assert torch.equal(logits(llama, "llama"), logits(fresh, "llama"))


@needs_own_adapter_methods
def test_transformers_own_adapters(llama):
    llama.add_adapter(SponConfig(init_weights=False, sparsity=0.2), "a")
    llama.add_adapter(SponConfig(init_weights=False, modules_to_save=["lm_head"]), "b")
    assert all(set(layer.spon_settings) == {"a", "b"} for layer in spon_layers(llama).values())
    model = get_peft_model(llama, SponConfig(sparsity=0.6)).eval()
    fresh = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6)).eval()
    assert torch.equal(logits(model, "llama"), logits(fresh, "llama"))
    assert not any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    assert sum(isinstance(module, SponLayer) for module in model.modules()) == 14


OTHERS = {
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VERA": lambda: VeraConfig(target_modules=["v_proj"]),
    "ADALORA": lambda: AdaLoraConfig(target_modules=["v_proj"], total_step=10),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": lambda: AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM"),
}
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT")


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("given", ["its PeftModel", "the base inside"])
def test_over_another_method_is_refused_with_the_remedy(method, given, llama):
    other = get_peft_model(llama, OTHERS[method]()).eval()
    want, modules = logits(other, "llama"), [type(module) for module in other.modules()]
    if given == "its PeftModel" or method not in PROMPTS:  # which leave the base as it is, or only know themselves
        with pytest.raises(ValueError, match=f"is of type {method}.*SPON"):
            get_peft_model(other if given == "its PeftModel" else llama, SponConfig())
        assert [type(module) for module in other.modules()] == modules
        assert torch.equal(logits(other, "llama"), want)
    if method in PROMPTS[:2]:
        base = other.get_base_model()
    elif method == "ADAPTION_PROMPT":
        return
    else:
        base = other.merge_and_unload()
    assert len(spon_layers(get_peft_model(base, SponConfig()))) == 14


@needs_own_adapter_methods
@pytest.mark.parametrize("method", ["IA3", "LN_TUNING"])
def test_another_method_through_transformers_or_injected(method, llama):
    inject_adapter_in_model(OTHERS[method](), llama)
    with pytest.raises(ValueError, match=f"is of type {method}; SPON combines with LoRA only. Merge it first"):
        inject_adapter_in_model(SponConfig(), llama, "spon")
    model = MODELS["llama"]()
    model.add_adapter(OTHERS[method](), "other")
    with pytest.raises(ValueError, match=f"'other' is of type {method}"):
        model.add_adapter(SponConfig(), "spon")
    assert not spon_layers(model)
    assert not spon_layers(llama)


def test_layers_of_another_method_without_its_configuration(llama):
    get_peft_model(llama, OTHERS["IA3"]())
    del llama.peft_config
    with pytest.raises(ValueError, match="is a peft.tuners.ia3.layer.Linear layer; SPON combines with LoRA only"):
        get_peft_model(llama, SponConfig())


def test_beside_another_method(llama):
    """PEFT's own check, on which this relies."""
    model = get_peft_model(llama, OTHERS["IA3"]())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("spon", SponConfig())
