# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""PEFT's own contract, on every model family: what a LoRA user does must work the same with SPON."""

import collections
import copy
import json
import math
import os

import peft
import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from models import GENERATE, MODELS, SMALL, VOCAB, build, inputs, logits
from packaging.version import Version
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_spon import CRITERIA, SponConfig, SponLayer, calibrate
from peft_spon.sites import spon_layers


def random_config(**kwargs):
    """Anchors that are not zero, so that losing one shows, and a criterion with state of its own."""
    return SponConfig(**{"init_weights": False, "criterion": "weighted", "gain": True, "sparsity": 0.4, **kwargs})


def calibrated(family, **kwargs):
    model = get_peft_model(MODELS[family](), random_config(**kwargs)).eval()
    calibrate(model, [inputs(family, rows=4, tokens=16)])
    return model


def test_default_targets_are_the_linear_layers_of_the_blocks(family):
    base = MODELS[family]()
    linears = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    outside = {n for n in linears if not any(part.isdigit() for part in n.split("."))}
    model = get_peft_model(base, SponConfig())
    assert set(spon_layers(model)) == linears - outside
    assert any("lm_head" in n or "decoder" in n for n in outside) or family == "t5"


def test_only_anchors_and_gains_are_trainable(family, capsys):
    model = get_peft_model(MODELS[family](), SponConfig())
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("spon_anchor" in n or "spon_gain" in n for n in trainable)
    wanted = sum(layer.in_features + layer.out_features for layer in spon_layers(model).values())
    model.print_trainable_parameters()
    assert f"trainable params: {wanted:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_give_equal_logits(family, tmp_path, low_cpu_mem_usage):
    model = calibrated(family)
    model.save_pretrained(tmp_path)
    assert not [f for f in os.listdir(tmp_path) if f.endswith((".bin", ".pt", ".pkl"))]
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(MODELS[family](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("space", ["input", "output"])
def test_every_criterion_survives_saving(criterion, space, tmp_path):
    model = calibrated("llama", criterion=criterion, anchor_space=space, sparsity_pattern={"down_proj": 0.7})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


# transformers 5.24.0 came before the PEFT it asks for: its adapter methods then refuse every adapter, LoRA too.
needs_own_adapter_methods = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"the installed transformers wants peft>={MIN_PEFT_VERSION} for its own adapter methods",
)


@needs_own_adapter_methods
def test_transformers_own_adapter_methods(family, tmp_path):
    model = calibrated(family)
    model.save_pretrained(tmp_path)
    plain = MODELS[family]()
    dense = logits(plain, family)
    plain.load_adapter(str(tmp_path), adapter_name="spon-a")
    assert torch.equal(logits(plain, family), logits(model, family))
    plain.disable_adapters()
    assert torch.equal(logits(plain, family), dense)
    plain.enable_adapters()
    plain.add_adapter(random_config(sparsity=0.1), adapter_name="second")
    plain.set_adapter("second")
    assert not torch.equal(logits(plain, family), logits(model, family))
    plain.delete_adapter("second")
    plain.set_adapter("spon-a")
    assert torch.equal(logits(plain, family), logits(model, family))


@needs_own_adapter_methods
def test_calibrate_through_transformers_add_adapter(llama, tmp_path):
    llama.add_adapter(random_config())
    calibrate(llama, [inputs("llama", rows=4, tokens=16)])
    llama.save_pretrained(tmp_path)
    loaded = MODELS["llama"]()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, "llama"), logits(llama, "llama"))


def test_auto_class(tmp_path, llama):
    llama.save_pretrained(tmp_path / "base")
    base = type(llama).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, random_config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_disable_is_the_dense_model_bit_for_bit(family):
    dense = logits(MODELS[family](), family)
    model = calibrated(family)
    assert not torch.equal(logits(model, family), dense)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), dense)
    assert not torch.equal(logits(model, family), dense)


def test_unload_gives_the_base_back(family):
    dense = logits(MODELS[family](), family)
    base = calibrated(family).unload()
    assert torch.equal(logits(base, family), dense)
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())


def test_several_adapters_switch_and_delete(family):
    model = calibrated(family)
    first = logits(model, family)
    model.add_adapter("other", random_config(sparsity=0.2, criterion="topk", anchor_space="input"))
    assert torch.equal(logits(model, family), first), "adding an adapter must not activate it"
    model.set_adapter("other")
    second = logits(model, family)
    assert not torch.equal(first, second)
    for layer in spon_layers(model).values():
        assert not layer.spon_anchor["default"].requires_grad
        assert layer.spon_anchor["other"].requires_grad
    model.set_adapter("default")
    assert torch.equal(logits(model, family), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model, family), first)
    assert not any(".other" in key for key in model.state_dict())
    assert all(set(layer.spon_settings) == {"default"} for layer in spon_layers(model).values())


def test_state_dict_keys_are_canonical(llama):
    model = calibrated("llama")
    keys = get_peft_model_state_dict(model).keys()
    parts = {key.rpartition(".")[2] for key in keys}
    assert parts == {"spon_anchor", "spon_gain", "spon_threshold", "spon_quantiles", "spon_column_scale"}
    names = {key.removeprefix("base_model.model.").rpartition(".")[0] for key in keys}
    assert names == set(spon_layers(model))


def test_one_batch_with_several_adapters(family):
    model = calibrated(family)
    model.add_adapter("other", random_config(sparsity=0.2, criterion="topk", anchor_space="input"))
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, family)
    with model.disable_adapter():
        alone["__base__"] = logits(model, family)
    names = ["other", "__base__", "default"]
    if family == "opt":  # flattens batch and tokens before its MLP, where rows can no longer be told apart
        with pytest.raises(ValueError, match="but got 3 and 21 respectively"):
            logits(model, family, adapter_names=names)
        return
    mixed = logits(model, family, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): wrong. The adapters are \['default', 'other'\]"):
        logits(model, family, adapter_names=["wrong"] * 3)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_adapter_names_with_beam_search(family):
    model = calibrated(family)
    model.add_adapter("other", random_config(sparsity=0.2, criterion="topk"))
    ids = inputs(family)["input_ids"]
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(input_ids=ids, adapter_names=["other", "default", "__base__"], **options)
    model.set_adapter("other")
    alone = model.generate(input_ids=ids[:1], **{**options, "attention_mask": torch.ones_like(ids[:1])})
    width = min(mixed.shape[1], alone.shape[1])
    assert torch.equal(mixed[0, :width], alone[0, :width])


@pytest.mark.parametrize("family", sorted(GENERATE))
@pytest.mark.parametrize("prefill", ["sparse", "dense", 0.5])
def test_generate(family, prefill):
    model = calibrated(family, prefill=prefill)
    ids = inputs(family)["input_ids"]
    name, layer = list(spon_layers(model).items())[-1]  # in the decoder, where there is an encoder
    seen = []
    handle = layer.get_base_layer().register_forward_pre_hook(lambda module, args: seen.append(args[0] == 0))
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert out.shape[0] == ids.shape[0]
    assert out.max() < VOCAB
    tokens = ids.shape[1]
    first, *steps = [zeros.view(ids.shape[0], -1, layer.in_features).float().mean(dim=(0, 2)) for zeros in seen]
    assert len(steps) == 3
    assert all(share > 0.2 for step in steps for share in step), f"decoding is sparse in {name}"
    if family != "t5" and len(first) == tokens and family != "opt":
        dense = {"sparse": 0, "dense": tokens, 0.5: math.ceil(tokens / 2)}[prefill]
        assert (first[:dense] < 0.1).all()
        assert (first[dense:] > 0.2).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    def gradients(checkpointing):
        torch.manual_seed(3)
        model = get_peft_model(MODELS[family](), random_config()).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs(family)).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    for (name, plain), saved in zip(gradients(False).items(), gradients(True).values(), strict=True):
        assert plain is not None, name
        torch.testing.assert_close(plain, saved)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(family, dtype, tmp_path):
    model = get_peft_model(MODELS[family]().to(dtype), random_config()).eval()
    calibrate(model, [inputs(family, rows=4, tokens=16)])
    for layer in spon_layers(model).values():
        assert layer.spon_anchor["default"].dtype == torch.float32
        assert layer.spon_threshold["default"].dtype == torch.float32
    y = logits(model, family)
    assert y.dtype == dtype
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        base = MODELS[family]().to(dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded, family), y)
        for a, b in zip(spon_layers(loaded).values(), spon_layers(model).values(), strict=True):
            assert torch.equal(a.spon_threshold["default"], b.spon_threshold["default"])
            assert torch.equal(a.spon_anchor["default"], b.spon_anchor["default"])


def test_autocast(family):
    model = calibrated(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model, family)).all()


def test_modules_to_save(tmp_path):
    base = MODELS["llama"]()
    model = get_peft_model(base, random_config(modules_to_save=["lm_head"])).eval()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trainable)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def bert_for(task):
    kind = {
        "SEQ_CLS": tf.BertForSequenceClassification,
        "TOKEN_CLS": tf.BertForTokenClassification,
        "QUESTION_ANS": tf.BertForQuestionAnswering,
        "FEATURE_EXTRACTION": tf.BertModel,
        "CAUSAL_LM": tf.BertLMHeadModel,
    }
    config = tf.BertConfig(**SMALL, intermediate_size=64, num_labels=2, is_decoder=task == "CAUSAL_LM")
    return MODELS["t5"]() if task == "SEQ_2_SEQ_LM" else build(kind[task], config)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(MODEL_TYPE_TO_PEFT_MODEL_MAPPING))
def test_every_task_type_trains_and_saves_what_it_does_with_lora(task, tmp_path):
    family = "t5" if task == "SEQ_2_SEQ_LM" else "bert"

    def run(model):
        return model(**inputs(family))[0] if task != "FEATURE_EXTRACTION" else model(**inputs(family)).pooler_output

    lora = get_peft_model(bert_for(task), LoraConfig(task_type=task))
    model = get_peft_model(bert_for(task), random_config(task_type=task)).eval()
    wanted = {name for name, p in lora.named_parameters() if p.requires_grad and "lora_" not in name}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "spon_" not in name} == wanted
    assert model.peft_config["default"].modules_to_save == lora.peft_config["default"].modules_to_save
    run(model).square().sum().backward()
    for name in wanted:
        assert trainable[name].grad.abs().sum() > 0
        trainable[name].data.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert_for(task), tmp_path).eval()
    assert torch.equal(run(loaded), run(model))
    loaded.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(bert_for(task), tmp_path).eval()), run(model))
    model.add_adapter("other", random_config(task_type=task))
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_all_linear_leaves_the_head_to_be_trained(task, tmp_path):
    model = get_peft_model(bert_for(task), random_config(task_type=task, target_modules="all-linear")).eval()
    assert not {name for name in spon_layers(model) if "classifier" in name or "qa_outputs" in name}
    assert "bert.encoder.layer.0.output.dense" in spon_layers(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert_for(task), tmp_path).eval()
    assert torch.equal(loaded(**inputs("bert"))[0], model(**inputs("bert"))[0])


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_one_configuration_for_several_models_with_a_head(task):
    config = random_config(task_type=task)
    heads = []
    for _ in range(3):
        model = get_peft_model(bert_for(task), config)
        heads.append({n for n, p in model.named_parameters() if p.requires_grad and "spon_" not in n})
        assert len(model.peft_config["default"].modules_to_save) <= 4
    assert heads[0]
    assert heads[0] == heads[1] == heads[2]


def test_anchor_modules_limit_the_anchors_not_the_sparsity(llama):
    model = get_peft_model(llama, random_config(anchor_modules=["down_proj"]))
    for name, layer in spon_layers(model).items():
        assert ("default" in layer.spon_anchor) == name.endswith("down_proj")
        assert layer.sparsifier("default").sparsity == 0.4
    model.delete_adapter("default")
    assert all(not layer.spon_settings for layer in spon_layers(model).values())


def test_layers_to_transform_and_exclude_hold_for_default_targets(family):
    model = get_peft_model(MODELS[family](), SponConfig(layers_to_transform=[1]))
    names = set(spon_layers(model))
    assert names
    assert all(".1." in name for name in names)
    one = sorted(names)[0].rpartition(".")[2]
    model = get_peft_model(MODELS[family](), SponConfig(layers_to_transform=[1], exclude_modules=[one]))
    assert set(spon_layers(model)) == {name for name in names if not name.endswith(f".{one}")}


def test_config_can_be_used_for_two_models_of_a_kind(llama):
    config = SponConfig()
    first = get_peft_model(llama, config)
    second = get_peft_model(MODELS["llama"](), config)
    assert set(spon_layers(first)) == set(spon_layers(second))


def test_all_linear_and_regular_expression_targets(llama):
    everything = get_peft_model(copy.deepcopy(llama), SponConfig(target_modules="all-linear"))
    assert set(spon_layers(everything)) == set(spon_layers(get_peft_model(copy.deepcopy(llama), SponConfig())))
    some = get_peft_model(llama, SponConfig(target_modules=r".*\.1\.mlp\.down_proj"))
    assert set(spon_layers(some)) == {"model.layers.1.mlp.down_proj"}


def test_saved_config_states_everything_that_changes_numbers(tmp_path):
    model = calibrated("llama", sparsity_pattern={"q_proj": 0.9}, prefill=0.5)
    model.set_sparsity(0.3)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["sparsity"] == 0.3
    assert saved["sparsity_pattern"] == {}
    assert saved["calibrated"] is True
    assert saved["prefill"] == 0.5
    assert saved["peft_spon_version"]
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


@pytest.mark.slow
def test_compiled_model(llama):
    model = calibrated("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, "llama"), logits(model, "llama"))


def test_repr_and_status_name_the_layers(llama):
    model = get_peft_model(llama, SponConfig())
    assert "spon.SponLinear" in repr(model)
    status = model.get_model_status()
    assert status.adapter_model_type == "SponModel"
    assert status.num_adapter_layers == len(spon_layers(model))
    assert all(isinstance(layer, SponLayer) for layer in spon_layers(model).values())


# ---- as with LoRA: the configuration object, what is trained, dtypes, wording, metadata of the card ----------------


def lora_and_spon(**kwargs):
    """The two configurations that must behave alike."""
    return LoraConfig(target_modules=["q_proj", "down_proj"], **kwargs), random_config(**kwargs)


KINDS = pytest.mark.parametrize("kind", [0, 1], ids=["lora", "spon"])


@KINDS
def test_the_users_configuration_is_the_one_in_the_model(kind, tmp_path):
    config = lora_and_spon(task_type="CAUSAL_LM")[kind]
    model = get_peft_model(MODELS["llama"](), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"] is config
    given = type(config).from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path, config=given)
    assert loaded.peft_config["default"] is given
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path, config=given)
    assert again.peft_config["default"] is given
    assert torch.equal(logits(again, "llama"), logits(model.eval(), "llama"))
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("criterion", ["weighted", "larosa", "topk"])
def test_adapters_of_one_configuration_share_nothing_that_is_written(criterion):
    config = random_config(criterion=criterion, init_weights=True)
    wanted = copy.deepcopy(config)
    first, other = (get_peft_model(MODELS["llama"](), config).eval() for _ in range(2))
    assert first.peft_config["default"] is other.peft_config["default"] is config
    first.add_adapter("b", config)
    before = logits(other, "llama")
    calibrate(first, [inputs("llama", rows=4, tokens=16)])
    first.set_sparsity(0.7, {"down_proj": 0.6})
    changed = first.peft_config["default"]
    assert (changed.sparsity, changed.sparsity_pattern) == (0.7, {"down_proj": 0.6})
    assert changed.calibrated == (criterion != "topk")
    first.add_adapter("late", config)
    later = get_peft_model(MODELS["llama"](), config).eval()  # the same cell of a notebook, once more
    for untouched in (config, first.peft_config["b"], first.peft_config["late"], later.peft_config["default"]):
        assert (untouched.sparsity, untouched.sparsity_pattern, untouched.calibrated) == (0.4, {}, wanted.calibrated)
    assert torch.equal(logits(other, "llama"), before)
    assert torch.equal(logits(later, "llama"), before)
    for name in ("b", "late"):
        first.set_adapter(name)
        assert torch.equal(logits(first, "llama"), before)
        first.set_sparsity(0.2)
    assert changed.sparsity == first.peft_config["default"].sparsity == 0.7


def test_modules_to_save_that_peft_adds_stand_in_the_users_configuration():
    config = random_config(task_type="TOKEN_CLS")
    model = get_peft_model(bert_for("TOKEN_CLS"), config)
    assert model.peft_config["default"] is config
    assert config.modules_to_save == ["classifier", "score"]


def trained_adapters(model):
    return {
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
        for name, held in getattr(module, part).items()
        if any(p.requires_grad for p in (held.parameters() if isinstance(held, nn.Module) else [held]))
    }


@pytest.mark.slow
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_second_adapter_is_trained_as_with_lora(first, second, low_cpu_mem_usage, tmp_path):
    found = []
    for config in lora_and_spon():
        get_peft_model(MODELS["llama"](), config).save_pretrained(tmp_path / "saved")
        model = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "saved", is_trainable=first)
        steps = []
        model.load_adapter(tmp_path / "saved", "b", is_trainable=second, low_cpu_mem_usage=low_cpu_mem_usage)
        steps.append((trained_adapters(model), model.active_adapters, model.training))
        model.set_adapter("b")
        steps.append((trained_adapters(model), model.active_adapters))
        model.add_adapter("c", lora_and_spon()[len(found)])
        steps.append((trained_adapters(model), model.active_adapters))
        model.set_adapter("default", inference_mode=True)
        steps.append((trained_adapters(model), model.active_adapters))
        found.append(steps)
    assert found[1] == found[0]
    assert found[1][1] == ({"b"}, ["b"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", ["weighted", "larosa"])
def test_adapters_in_the_models_dtype(dtype, criterion, tmp_path):
    def dtypes(model, marks, name="default"):
        return {t.dtype for key, t in model.state_dict().items() if any(f".{mark}" in key for mark in marks)}

    def check(models, wanted):
        lora, model = models
        assert dtypes(model, ["spon_anchor", "spon_gain"]) == dtypes(lora, ["lora_"]) == {wanted}
        states = {f"spon_{part}" for layer in spon_layers(model).values() for part in layer.state_names}
        assert dtypes(model, states) == {torch.float32}

    def base():
        return MODELS["llama"]().to(dtype)

    configs = lora_and_spon()[0], random_config(criterion=criterion)
    models = [get_peft_model(base(), config, autocast_adapter_dtype=False).eval() for config in configs]
    calibrate(models[1], [inputs("llama", rows=4, tokens=16)])
    check(models, dtype)
    for model, config in zip(models, configs, strict=True):
        model.add_adapter("b", config, autocast_adapter_dtype=False)
    check(models, dtype)
    assert all(p.requires_grad for n, p in models[1].named_parameters() if n.endswith("spon_anchor.default"))
    for low_cpu_mem_usage in (False, True):
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = []
        for kind, model in enumerate(models):
            model.save_pretrained(tmp_path / str(kind), selected_adapters=["default"])
            loaded.append(PeftModel.from_pretrained(base(), tmp_path / str(kind), **options).eval())
        check(loaded, dtype)
        assert torch.equal(logits(loaded[1], "llama"), logits(models[1], "llama"))
        loaded[1].load_adapter(tmp_path / "1", "c", autocast_adapter_dtype=False)
        check(loaded, dtype)
    check([model.float() for model in loaded], torch.float32)
    y = logits(models[1], "llama")
    models[1].train()(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in models[1].named_parameters() if n.endswith("spon_anchor.default"))
    models[1].eval().merge_adapter()
    torch.testing.assert_close(logits(models[1], "llama"), y, atol=0.3, rtol=0.05)
    models[1].unmerge_adapter()
    merged = models[1].merge_and_unload()
    assert dtypes(merged, ["spon_input_scale"]) <= {torch.float32}
    torch.testing.assert_close(logits(merged, "llama"), y, atol=0.3, rtol=0.05)


def test_by_default_adapters_stay_fp32_when_the_model_is_cast(llama):
    model = get_peft_model(llama, random_config()).to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "spon_" in n} == {torch.float32}


class Names(collections.UserList):
    def __init__(self, names=("default",) * 3):
        super().__init__(names)


def misuse(model, how):
    ids = inputs("llama")["input_ids"]
    if how == "training":
        model.train()
    if how == "merged":
        model.merge_adapter()
    names = {"unknown": ["x", "default", "__base__"], "length": ["default"]}.get(how, ["default"] * 3)
    if how == "no list":
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, adapter_names=Names(), num_beams=2, max_new_tokens=2)
    return model(ids, adapter_names=names)


@pytest.mark.parametrize("how", ["training", "merged", "unknown", "length", "no list"])
def test_misuse_of_adapter_names_is_refused_in_the_words_of_peft(how):
    lora, spon = (get_peft_model(MODELS["llama"](), config).eval() for config in lora_and_spon())
    with pytest.raises((ValueError, TypeError)) as wanted:
        misuse(lora, how)
    with pytest.raises(type(wanted.value)) as found:
        misuse(spon, how)
    assert str(found.value).startswith(str(wanted.value).removesuffix("."))


def card_metadata(folder):
    data = ModelCard.load(folder / "README.md").data
    return data.base_model, data.library_name, data.pipeline_tag, set(data.tags) - {"lora", "spon"}


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_card_names_the_base_model_where_pefts_own_does(task_type, tmp_path):
    def base(name):
        model = MODELS["llama"]()
        model.name_or_path = model.config._name_or_path = name
        return model

    found = []
    for kind, config in enumerate(lora_and_spon(task_type=task_type)):
        model = get_peft_model(base("organisation/base"), config)
        model.add_adapter("b", lora_and_spon(task_type=task_type)[kind])
        folder = tmp_path / str(kind)
        model.save_pretrained(folder)
        model.save_pretrained(folder / "only-b", selected_adapters=["b"])
        loaded = PeftModel.from_pretrained(base("organisation/other"), folder)
        loaded.save_pretrained(folder / "again")
        found.append([card_metadata(folder / part) for part in ("", "only-b", "again")])
    ours = [(*card[:3], card[3] - {"activation-sparsity"}) for card in found[1]]
    assert ours == found[0]
    assert card_metadata(tmp_path / "1" / "b")[0] == "organisation/base"
    assert "base_model:adapter:organisation/base" in card_metadata(tmp_path / "1" / "b")[3]


@pytest.mark.parametrize("selected", [["default"], ["b"], ["default", "b"]])
def test_no_card_names_a_path_of_this_machine(selected, llama, tmp_path):
    llama.name_or_path = llama.config._name_or_path = "/home/user/base"
    model = get_peft_model(llama, random_config())
    model.add_adapter("b", random_config())
    model.save_pretrained(tmp_path, selected_adapters=selected)
    cards = list(tmp_path.rglob("README.md"))
    assert cards
    assert all("/home/user" not in card.read_text() for card in cards)
