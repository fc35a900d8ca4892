# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA beneath SPON, y = (W + B A)(S(x) + anchor) + b, whichever came first: train, switch, save, load, merge."""

import copy
import itertools
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as tf
from lora_models import ROUTES, lora_config, spon_config, spon_then_lora, trained
from models import MODELS, VOCAB, calibrated, inputs, logits
from peft import IA3Config, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from peft_spon import (
    SponConfig,
    add_lora,
    calibrate,
    dense_mode,
    load_with_lora,
    save_lora,
    set_trainable,
    without_anchors,
    without_lora,
)
from peft_spon.sites import spon_layers
from peft_spon.sparse_linear import SparseMixin


CAUSAL = ["llama", "gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "opt"))]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.detach().abs().max().item())


# ---- the function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["input", "output"])
def test_the_layer_computes_the_formula(route, space):
    model = route(anchor_space=space)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    lora, linear = layer.base_layer, layer.get_base_layer()
    assert isinstance(lora, LoraLayer)
    name = lora.active_adapters[0]
    weight = linear.weight + lora.lora_B[name].weight @ lora.lora_A[name].weight * lora.scaling[name]
    x = torch.randn(3, 5, layer.in_features)
    sparse = (1 + layer.spon_gain["default"]) * x * (layer.score(x, "default") > layer.spon_threshold["default"])
    anchor = layer.spon_anchor["default"]
    wanted = (sparse + anchor) @ weight.T if space == "input" else sparse @ weight.T + anchor
    close(layer(x), wanted)


@pytest.mark.parametrize("family", CAUSAL)
def test_each_can_be_switched_off(family, route):
    model = route(family)
    dense = logits(MODELS[family](), family)
    both = logits(model, family)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), dense)
    with dense_mode(model), without_lora(model):
        assert torch.equal(logits(model, family), dense)
    with dense_mode(model):
        lora_only = logits(model, family)
    with without_lora(model):
        spon_only = logits(model, family)
    with without_anchors(model):
        no_anchors = logits(model, family)
    found = [dense, both, lora_only, spon_only, no_anchors]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(found, 2))
    assert torch.equal(logits(model, family), both)
    # With LoRA off it is the SPON model alone.
    model.delete_adapter("task")
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert torch.equal(logits(model, family), spon_only)


def test_the_names_do_not_clash_and_the_plain_lora_stays_what_it_was():
    torch.manual_seed(0)
    lora = get_peft_model(MODELS["llama"](), lora_config(modules_to_save=["lm_head"])).eval()
    lora.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    wanted = logits(lora, "llama")
    model = get_peft_model(lora, spon_config())
    assert sorted(model.peft_config) == ["default", "task"]
    assert model.active_adapters == ["default"]
    with dense_mode(model):
        assert torch.equal(logits(model.eval(), "llama"), wanted)
    named = get_peft_model(get_peft_model(MODELS["llama"](), lora_config(), "style"), spon_config(), "anchors")
    assert sorted(named.peft_config) == ["anchors", "style"]


def test_injected_lora_is_taken_over_as_well(tmp_path):
    base = inject_adapter_in_model(lora_config(), MODELS["llama"](), "lo")
    model = get_peft_model(base, spon_config(), "sp").eval()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "lo").eval()
    with dense_mode(model):
        assert torch.equal(logits(plain, "llama"), logits(model, "llama"))


def test_a_failed_get_peft_model_leaves_the_lora_model_as_it_was():
    lora = get_peft_model(MODELS["llama"](), lora_config()).eval()
    wanted = logits(lora, "llama")
    keys = set(lora.state_dict())
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(lora, spon_config(target_modules=["nothing"]))
    assert set(lora.state_dict()) == keys
    assert sorted(lora.peft_config) == ["default"]
    assert torch.equal(logits(lora, "llama"), wanted)
    lora.set_adapter("default")
    lora.merge_and_unload()


# ---- the wrong order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["get_peft_model", "inject", "transformers"])
def test_lora_around_spon_says_so(how):
    if how == "transformers":
        model = MODELS["llama"]()
        inject_adapter_in_model(spon_config(), model, "sp")
        inject_adapter_in_model(lora_config(), model, "lo")
    else:
        spon = get_peft_model(MODELS["llama"](), spon_config())
        if how == "get_peft_model":
            model = get_peft_model(spon, lora_config())
        else:
            model = spon
            inject_adapter_in_model(lora_config(), spon.get_base_model(), "lo")
    for found in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"where it sees the inputs before S.*peft_spon.add_lora\(model"):
            logits(found, "llama")


def test_copies_and_pickles_still_work(route):
    model = route()
    wanted = logits(model, "llama")
    assert torch.equal(logits(copy.deepcopy(model), "llama"), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), "llama"), wanted)
    layer = next(iter(spon_layers(model).values()))
    assert copy.deepcopy(layer).place.parent is None, "a copy of a layer does not drag the model along"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add_lora(MODELS["llama"](), lora_config()), "no PeftModel with a SPON adapter"),
        (
            lambda: add_lora(get_peft_model(MODELS["llama"](), lora_config()), lora_config()),
            "no PeftModel with a SPON",
        ),
        (lambda: add_lora(spon_then_lora(), lora_config()), "an adapter 'task' already"),
        (lambda: add_lora(spon_then_lora(), lora_config(bias="all"), "two"), "bias='none'"),
        (lambda: add_lora(spon_then_lora(), lora_config(trainable_token_indices=[3]), "two"), "modules_to_save="),
        (lambda: add_lora(spon_then_lora(), IA3Config(), "two"), "SPON combines with LoRA only"),
        (lambda: add_lora(spon_then_lora(), lora_config(target_modules=["nothing"]), "two"), "not found"),
        (lambda: add_lora(spon_then_lora(), lora_config(), "two", trainable="all"), "trainable is 'all'"),
        (lambda: add_lora(spon_then_lora().merge_and_unload(), lora_config()), "merged SPON model"),
        (lambda: get_peft_model(spon_then_lora(), spon_config()), "has the SPON adapters"),
        (lambda: get_peft_model(get_peft_model(MODELS["llama"](), lora_config(bias="all")), spon_config()), "bias="),
        (lambda: set_trainable(get_peft_model(MODELS["llama"](), spon_config()), "lora"), "has no LoRA"),
        (lambda: set_trainable(get_peft_model(MODELS["llama"](), lora_config()), "lora"), "has no SPON adapter"),
        (lambda: save_lora(spon_then_lora(), "/nowhere", "two"), "There is no LoRA 'two'"),
    ],
)
def test_errors_say_what_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_failed_add_lora_leaves_the_model_as_it_was():
    model = spon_then_lora()
    wanted, keys = logits(model, "llama"), set(model.state_dict())
    with pytest.raises(ValueError, match="not found"):
        add_lora(model, lora_config(target_modules=["nothing"]), "two")
    assert set(model.state_dict()) == keys
    assert sorted(model.peft_config) == ["default", "task"]
    assert torch.equal(logits(model, "llama"), wanted)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        add_lora(model, lora_config(), "two")


# ---- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora", "anchors", "both"])
def test_set_trainable(route, what):
    model = route(lora=lora_config(modules_to_save=["lm_head"]))
    set_trainable(model, what)
    wanted = {"lora": {"lora", "head"}, "anchors": {"anchors"}, "both": {"lora", "head", "anchors"}}[what]
    kinds, names = trained(model)
    assert kinds == wanted
    assert not any("base_layer.weight" in name or "original_module" in name for name in names)
    # It holds when adapters are added and switched.
    add_lora(model, lora_config(target_modules=["q_proj"]), "two", trainable=what)
    model.set_adapter("task")
    model.set_adapter("default")
    assert trained(model)[0] == wanted
    model.train()
    batch = inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)[1]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_kinds_of_lora(fields, tmp_path):
    for make in ROUTES.values():
        model = make(lora=lora_config(**fields))
        wanted = logits(model, "llama")
        model.save_pretrained(tmp_path)
        again = load_with_lora(MODELS["llama"](), tmp_path)
        assert torch.equal(logits(again.eval(), "llama"), wanted)
        close(logits(copy.deepcopy(model).merge_and_unload(), "llama"), wanted)


def test_several_loras_over_one_spon(tmp_path):
    model = spon_then_lora()
    first = logits(model, "llama")
    add_lora(model, lora_config(r=2, target_modules=["q_proj", "down_proj"]), "other")
    second = logits(model, "llama")
    assert not torch.allclose(first, second)
    model.set_adapter("task")
    assert torch.equal(logits(model, "llama"), first)
    assert model.active_adapters == ["default"], "SPON stays active"
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model, "llama"), second)
    mixed = logits(model, "llama", adapter_names=["other", "task", "__base__"])
    with without_lora(model):
        none = logits(model, "llama")
    for row, alone in enumerate((second, first, none)):
        close(mixed[row], alone[row])
    with pytest.raises(ValueError, match="not both"):
        logits(model, "llama", adapter_names=["other", "default", "__base__"])
    model.save_pretrained(tmp_path)
    again = load_with_lora(MODELS["llama"](), tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(again, "llama"), second)
    model.delete_adapter("other")
    assert torch.equal(logits(model, "llama"), first)


def test_a_second_spon_adapter_over_the_same_lora():
    model = spon_then_lora(lora=lora_config(modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["task"].weight.data.add_(0.1)
    first = logits(model, "llama")
    model.add_adapter("dense", SponConfig(sparsity=0.0))
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("dense")
    with dense_mode(model):
        dense = logits(model, "llama")
    assert torch.equal(logits(model, "llama"), dense), "LoRA and its head stay active"
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), first)
    model.delete_adapter("dense")
    assert torch.equal(logits(model, "llama"), first)


def test_recalibration_after_lora_is_one_call():
    model = spon_then_lora()
    before = [layer.spon_threshold["default"].clone() for layer in spon_layers(model).values()]
    result = calibrate(model, [{"input_ids": torch.randint(3, VOCAB, (8, 16))}], progress=False)
    after = [layer.spon_threshold["default"] for layer in spon_layers(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(abs(layer.realised - 0.5) < 0.005 for layer in result.layers)


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_two_canonical_folders(family, route, tmp_path):
    model = route(family)
    both = logits(model, family)
    with dense_mode(model):
        lora_only = logits(model, family)
    with without_lora(model):
        spon_only = logits(model, family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "task/adapter_config.json").read_text())["peft_type"] == "LORA"

    spon = PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()
    assert torch.equal(logits(spon, family), spon_only)
    lora = PeftModel.from_pretrained(MODELS[family](), tmp_path / "task").eval()
    assert torch.equal(logits(lora, family), lora_only)
    # As PEFT alone would have written it.
    lora.save_pretrained(tmp_path / "plain")
    written, plain = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("task", "plain"))
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[key], plain[key]) for key in plain)

    for again in (
        load_with_lora(MODELS[family](), tmp_path),
        load_with_lora(MODELS[family](), tmp_path, tmp_path / "task"),
        PeftModel.from_pretrained(PeftModel.from_pretrained(MODELS[family](), tmp_path / "task"), tmp_path),
    ):
        assert torch.equal(logits(again.eval(), family), both)
        assert not any(p.requires_grad for p in again.parameters())


def test_loaded_models_can_be_trained_further(tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    for what in ("lora", "anchors", "both"):
        model = load_with_lora(MODELS["llama"](), tmp_path, trainable=what)
        assert trained(model)[0] == ({what} if what != "both" else {"lora", "anchors"})


def test_modules_to_save_go_with_their_adapter(tmp_path):
    model = spon_then_lora(lora=lora_config(modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["task"].weight.data.add_(0.1)
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(load_with_lora(MODELS["llama"](), tmp_path).eval(), "llama"), wanted)


def test_a_failed_load_leaves_the_base_as_it_was(tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = MODELS["llama"]()
    wanted = logits(base, "llama")
    with pytest.raises(ValueError, match="damaged"):
        load_with_lora(base, tmp_path)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert torch.equal(logits(base, "llama"), wanted)


def test_save_lora_alone(tmp_path):
    model = spon_then_lora()
    save_lora(model, tmp_path / "lora")
    names = sorted(path.name for path in (tmp_path / "lora").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "load_with_lora" in (tmp_path / "lora/README.md").read_text()
    lora = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "lora").eval()
    with dense_mode(model):
        assert torch.equal(logits(lora, "llama"), logits(model, "llama"))


@pytest.mark.slow
def test_a_process_without_peft_spon_loads_the_lora(tmp_path):
    torch.manual_seed(0)
    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model = add_lora(calibrated(get_peft_model(base, spon_config())), lora_config(use_dora=True))
    model.save_pretrained(tmp_path / "saved")
    with dense_mode(model):
        torch.save({"batch": inputs("llama"), "wanted": logits(model, "llama")}, tmp_path / "wanted.pt")
    code = """
        import sys, torch, transformers, peft
        base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
        model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/saved/task").eval()
        saved = torch.load(sys.argv[1] + "/wanted.pt")
        with torch.no_grad():
            assert torch.equal(model(**saved["batch"]).logits, saved["wanted"])
        assert "peft_spon" not in sys.modules
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("family", CAUSAL)
def test_merging_in_every_order_gives_the_same_function(family, space, route):
    model = route(family, anchor_space=space)
    wanted = logits(model, family)
    orders = [
        [None],
        [["default"], ["task"]],
        [["task"], ["default"]],
        [["default", "task"]],
        [["task", "default"]],
        [["default"]],
        [["task"]],
    ]
    for order in orders:
        for names in order:
            model.merge_adapter(adapter_names=names)
            close(logits(model, family), wanted)
        merged = copy.deepcopy(model).merge_and_unload()
        close(logits(merged, family), wanted)
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        assert type(merged) is type(model.get_base_model())
        model.unmerge_adapter()
        close(logits(model, family), wanted)
    model.merge_adapter()
    unmerged = copy.deepcopy(model)
    unmerged.unmerge_adapter()
    close(logits(unmerged, family), wanted)


def test_merged_models_are_saved_and_loaded(route, tmp_path):
    model = route()
    wanted = logits(model, "llama")
    merged = model.merge_and_unload()
    close(logits(merged, "llama"), wanted)
    merged.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
    assert sum(isinstance(module, SparseMixin) for module in again.modules()) == 14


def test_merged_adapters_follow_the_lora_beneath():
    model = spon_then_lora(anchor_space="input")
    add_lora(model, lora_config(), "other")
    second = logits(model, "llama")
    model.set_adapter("task")
    first = logits(model, "llama")
    model.merge_adapter(adapter_names=["default"])
    close(logits(model, "llama"), first)
    model.set_adapter("other")
    close(logits(model, "llama"), second)
    for parameter in (p for name, p in model.named_parameters() if ".other." in name):
        parameter.data.mul_(0.5)
    changed = logits(model, "llama")
    model.unmerge_adapter()
    close(logits(model, "llama"), changed)
    assert not torch.allclose(changed, second)


def test_merging_one_kind_only_drops_the_other():
    model = spon_then_lora()
    with without_lora(model):
        spon_only = logits(model, "llama")
    close(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["default"]), "llama"), spon_only)
    with dense_mode(model):
        lora_only = logits(model, "llama")
    close(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["task"]), "llama"), lora_only)
    base = copy.deepcopy(model).unload()
    assert torch.equal(logits(base, "llama"), logits(MODELS["llama"](), "llama"))


def test_safe_merge_finds_a_broken_lora_and_merges_nothing():
    model = spon_then_lora()
    wanted = logits(model, "llama")
    layer = spon_layers(model)["model.layers.1.mlp.down_proj"].base_layer
    held = layer.lora_B["task"].weight.data[0, 0].item()
    layer.lora_B["task"].weight.data[0, 0] = torch.nan
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="seems to be broken"):
            call(safe_merge=True)
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    layer.lora_B["task"].weight.data[0, 0] = held
    close(logits(model, "llama"), wanted)


def test_half_precision_bases_keep_fp32_adapters():
    model = calibrated(get_peft_model(MODELS["llama"]().bfloat16(), spon_config()))
    add_lora(model, lora_config())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name or "spon_" in name} == {torch.float32}
    assert logits(model, "llama").dtype == torch.bfloat16
    assert not any(module.training for module in model.modules()), "LoRA's dropout is off, as the model's"
