# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file brings into a model: SPON's tensors and declared modules, whole, whichever way it is loaded.

The model is afterwards as it was where something is refused.
"""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import MODELS, VOCAB, calibrated, edit_json, edit_tensors, logits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.nn.modules import module as torch_module
from transformers import Trainer, TrainingArguments

from peft_spon import SponConfig, add_lora


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def adapter(family="llama", seed=0, **fields):
    torch.manual_seed(seed)
    model = get_peft_model(
        MODELS[family](), SponConfig(**{"init_weights": False, "criterion": "weighted", **fields})
    ).eval()
    return calibrated(model) if family == "llama" else model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of an adapter, and of one with a head and norms of its own."""
    folder = tmp_path_factory.mktemp("saved")
    adapter().save_pretrained(folder / "plain")
    with_modules = adapter(modules_to_save=["lm_head", "norm"])
    with torch.no_grad():
        for name, parameter in with_modules.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.25)
    with_modules.save_pretrained(folder / "modules")
    return folder


@pytest.fixture
def folder(saved, tmp_path, request):
    return Path(shutil.copytree(saved / getattr(request, "param", "plain"), tmp_path / "adapter"))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_as_it_was(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- ways to load --------------------------------------------------------------------------------------------------


def load_new(folder):
    """Onto a plain base: nothing of SPON is left, and everything can be trained as before."""
    base = MODELS["llama"]()
    before = snapshot(base)

    def check():
        check_as_it_was(base, before)
        assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
        assert all(parameter.requires_grad for parameter in base.parameters())

    return lambda: PeftModel.from_pretrained(base, folder), check


def load_into(make, load):
    def way(folder):
        config = SponConfig.from_pretrained(folder)
        model = make(config.modules_to_save)
        before = snapshot(model)
        names = list(model.peft_config)

        def check():
            check_as_it_was(model, before)
            assert list(model.peft_config) == names

        return lambda: load(model, folder), check

    return way


def other(modules):
    model = adapter(seed=1, modules_to_save=modules)
    logits(model, "llama")
    return model


def set_state(model, folder):
    return set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


WAYS = {
    "from_pretrained": load_new,
    "load_adapter, second": load_into(lambda modules: other(None), lambda m, folder: m.load_adapter(folder, "second")),
    "load_adapter, over": load_into(other, lambda model, folder: model.load_adapter(str(folder), "default")),
    "set_peft_model_state_dict": load_into(other, set_state),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "key",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.base_layer.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.base_layer.bias",
    ],
)
def test_a_tensor_of_the_base_is_refused(folder, way, key):
    base = dict(MODELS["llama"]().named_parameters())
    shape = base.get(key.replace(".base_layer", ""), torch.zeros(8, 32)).shape
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.update({PREFIX + key: torch.zeros(shape)}))
    load, check = WAYS[way](folder)
    with pytest.raises(ValueError, match=f"{WEIGHTS} also holds .*{key}: neither SPON's nor of a module in modules_"):
        load()
    check()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_without_prefix_or_with_a_wrapper_of_torch_compile_it_is_refused_as_well(folder, way):
    for key in ("lm_head.weight", "_orig_mod.lm_head.weight", "base_model.model._orig_mod.lm_head.weight"):
        edit_tensors(folder / WEIGHTS, lambda tensors, key=key: tensors.update({key: torch.zeros(VOCAB, 32)}))
        load, check = WAYS[way](folder)
        with pytest.raises(ValueError, match="neither SPON's nor of a module"):
            load()
        check()
        edit_tensors(folder / WEIGHTS, lambda tensors, key=key: tensors.pop(key))


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_is_the_bases_own_does_no_harm(folder, way):
    base = MODELS["llama"]()
    edit_tensors(
        folder / WEIGHTS, lambda tensors: tensors.update({PREFIX + "lm_head.weight": base.lm_head.weight.detach()})
    )
    WAYS[way](folder)[0]()


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"set_peft_model_state_dict"}))
@pytest.mark.parametrize("folder", ["modules"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[PREFIX + "lm_head.weight"].fill_(torch.nan), "'lm_head.weight' in modules_to_save holds NaN"),
        (
            lambda t: t[PREFIX + "model.norm.weight"][3].fill_(torch.inf),
            "'model.norm.weight' in modules_to_save",
        ),
        (lambda t: t[PREFIX + "lm_head.weight"][5].neg_(), "do not belong together: the tensors of modules_to_save"),
        (lambda t: t[PREFIX + "model.norm.weight"].add_(1e-6), "do not belong together: the tensors of modules"),
        (
            lambda t: t.pop(PREFIX + "lm_head.weight"),
            f"{WEIGHTS} of .* has no '.*lm_head.weight', which modules_to",
        ),
    ],
)
def test_damage_in_modules_to_save_is_refused(folder, way, change, message):
    edit_tensors(folder / WEIGHTS, change)
    load, check = WAYS[way](folder)
    with pytest.raises(ValueError, match=message):
        load()
    check()


@pytest.mark.parametrize("folder", ["modules"], indirect=True)
def test_a_module_of_another_shape_is_refused_unless_that_is_wanted(folder):
    edit_tensors(folder / WEIGHTS, lambda t: t.update({PREFIX + "lm_head.weight": t[PREFIX + "lm_head.weight"][:50]}))
    for way in ("load_adapter, over", "from_pretrained"):
        load, check = WAYS[way](folder)
        with pytest.raises(ValueError, match=r"has shape \(50, 32\), the model needs \(97, 32\)"):
            load()
        check()
    edit_json(folder / CONFIG, checksums=None)
    with pytest.warns(UserWarning, match="lm_head"):
        model = PeftModel.from_pretrained(MODELS["llama"](), folder, ignore_mismatched_sizes=True)
    assert model.get_output_embeddings().weight.shape == (VOCAB, 32)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["modules"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_whole_files_load(folder, way):
    model = WAYS[way](folder)[0]()
    wanted = PeftModel.from_pretrained(MODELS["llama"](), folder)
    state = get_peft_model_state_dict(wanted)
    assert state[PREFIX + "lm_head.weight"].abs().sum() > 0
    assert all(torch.equal(value, load_file(folder / WEIGHTS)[name]) for name, value in state.items())
    assert isinstance(model, (PeftModel, tuple))


@pytest.mark.parametrize("folder", ["modules"], indirect=True)
def test_files_of_older_versions_have_no_checksum_of_modules_and_load(folder):
    edit_json(folder / CONFIG, lambda config: config["checksums"].pop("modules"))
    edit_tensors(folder / WEIGHTS, lambda t: t[PREFIX + "lm_head.weight"].mul_(2))
    for way in ("from_pretrained", "load_adapter, over"):
        WAYS[way](folder)[0]()
    edit_json(folder / CONFIG, checksums=None)
    WAYS["load_adapter, over"](folder)[0]()


# ---- over an adapter that is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("has_run", [True, False])
def test_one_flipped_bit_over_an_existing_adapter_is_refused(folder, has_run):
    edit_tensors(
        folder / WEIGHTS, lambda t: t[min(k for k in t if k.endswith("anchor"))].view(torch.int32)[3].bitwise_xor_(1)
    )
    model = adapter(seed=1)
    if has_run:
        logits(model, "llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{WEIGHTS} and {CONFIG} do not belong together"):
        model.load_adapter(folder, "default")
    check_as_it_was(model, before)
    with pytest.raises(ValueError, match="do not belong together"):
        model.load_adapter(folder, "default")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG} is damaged"),
        (lambda f: (f / CONFIG).unlink(), f"Can't find '{CONFIG}'"),
        (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), f"{WEIGHTS} is damaged or incomplete"),
        (lambda f: edit_json(f / CONFIG, sparsity=0.1), f"{CONFIG} is not as it was saved"),
        (lambda f: to_pickle(f), "a pickle, and SPON adapters load from safetensors only"),
        (lambda f: save_lora_there(f), "holds a .*LORA adapter, and 'default' is SPON"),
        (
            lambda f: adapter(criterion="magnitude").save_pretrained(f),
            "criterion is 'magnitude', and adapter",
        ),
    ],
)
def test_what_else_is_refused_over_an_existing_adapter(folder, change, message):
    change(folder)
    model = other(None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "default")
    check_as_it_was(model, before)


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def save_lora_there(folder):
    get_peft_model(MODELS["llama"](), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def train(model, out, **kwargs):
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 67).reshape(8, 8)]
    fields = {"per_device_train_batch_size": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "max_steps": 4}
    arguments = TrainingArguments(out, **fields, save_strategy="steps", learning_rate=0.01, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(**kwargs)
    return trainer


@pytest.mark.slow
def test_resuming_from_a_damaged_checkpoint_is_refused(tmp_path):
    train(adapter(), tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    train(adapter(), tmp_path / "out", resume_from_checkpoint=str(checkpoint))
    edit_tensors(checkpoint / WEIGHTS, lambda t: t[min(k for k in t if k.endswith("anchor"))].neg_())
    with pytest.raises(ValueError, match="do not belong together"):
        train(adapter(), tmp_path / "out", resume_from_checkpoint=str(checkpoint))


# ---- saving --------------------------------------------------------------------------------------------------------


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_pickles_are_refused_when_saving_and_nothing_changes(family, tmp_path):
    model = adapter(family)
    model.save_pretrained(tmp_path / "kept")
    before = files(tmp_path)
    for call in (
        lambda: model.save_pretrained(tmp_path / "new", safe_serialization=False),
        lambda: model.save_pretrained(tmp_path / "new", False),
        lambda: model.save_pretrained(tmp_path / "kept", safe_serialization=False),
    ):
        with pytest.raises(ValueError, match="safe_serialization=False writes pickles"):
            call()
        assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}


def test_pickles_are_refused_after_loading_adding_copying_and_pickling(folder, tmp_path):
    loaded = PeftModel.from_pretrained(MODELS["llama"](), folder)
    loaded.add_adapter("second", SponConfig())
    for model in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        with pytest.raises(ValueError, match="writes pickles"):
            model.save_pretrained(tmp_path / "new", safe_serialization=False)
        with pytest.raises(ValueError, match="writes pickles"):
            model.save_pretrained(tmp_path / "new", safe_serialization=False, selected_adapters=["second"])
        assert not (tmp_path / "new").exists()
        assert model.save_pretrained.args[0] is model


def test_a_lora_beneath_may_be_a_pickle(tmp_path):
    model = add_lora(adapter(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, safe_serialization=False, selected_adapters=["task"])
    assert (tmp_path / "task" / "adapter_model.bin").exists()


def test_transformers_own_adapters_refuse_pickles(tmp_path):
    model = MODELS["llama"]()
    model.add_adapter(SponConfig(init_weights=False))
    with pytest.raises(ValueError, match="writes pickles"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new")
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "new")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_the_base_keeps_no_trace():
    hooks = len(torch_module._global_module_registration_hooks)
    base = MODELS["llama"]()
    model = get_peft_model(base, SponConfig())
    assert model.unload() is base
    assert not {"save_pretrained", "load_adapter"} & vars(base).keys()
    base.add_adapter(SponConfig())
    with pytest.raises(ValueError, match="nothing"):
        get_peft_model(MODELS["gpt2"](), SponConfig(target_modules=["nothing"]))
    assert len(torch_module._global_module_registration_hooks) == hooks


def test_a_resized_vocabulary_is_saved_and_loaded_with_the_adapter(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "base")

    def resized():
        base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(VOCAB + 7)  # the new rows are random
        return base

    model = get_peft_model(resized(), SponConfig(init_weights=False)).eval()
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    edit_tensors(tmp_path / "adapter" / WEIGHTS, lambda t: t[PREFIX + "lm_head.weight"][3:5].neg_())
    base = resized()
    before = snapshot(base)
    with pytest.raises(ValueError, match="lm_head.weight.*neither SPON's nor"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    check_as_it_was(base, before)


# ---- damaged files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"{CONFIG} is damaged"),
        (b'{"sparsity": 0.5, "cri', f"{CONFIG} is damaged"),
        (b'{"criterion": "\xff\xfe"}', f"{CONFIG} is damaged"),
        (b"[" * 100_000, f"{CONFIG} is damaged"),
        (b"[1, 2]", f"{CONFIG} holds no settings"),
        (b"7", f"{CONFIG} (is damaged|holds no settings)"),
        (b"null", f"{CONFIG} (is damaged|holds no settings)"),
    ],
    ids=lambda content: str(content)[:12],
)
def test_garbled_configurations_are_named(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SponConfig.from_pretrained(folder)


def test_a_missing_weights_file_is_named_and_the_model_as_it_was(folder):
    (folder / WEIGHTS).unlink()
    for way in ("from_pretrained", "load_adapter, second", "load_adapter, over"):
        load, check = WAYS[way](folder)
        with pytest.raises(ValueError, match=f"has no {WEIGHTS}: its saving or download was interrupted"):
            load()
        check()


def test_a_lora_beneath_is_given_back_after_a_failed_load(folder):
    edit_tensors(folder / WEIGHTS, lambda t: t.update({PREFIX + "lm_head.weight": torch.zeros(VOCAB, 32)}))
    torch.manual_seed(0)
    lora = get_peft_model(MODELS["llama"](), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = snapshot(lora)
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match="neither SPON's nor"):
        PeftModel.from_pretrained(lora, folder)
    check_as_it_was(lora, before)
    assert trained == {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert list(lora.peft_config) == ["default"]
