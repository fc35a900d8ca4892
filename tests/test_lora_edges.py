# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA beneath SPON where things go wrong or meet: errors halfway, heads of both kinds, blocks inside blocks."""

import pytest
import torch
from models import MODELS, inputs, logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from test_lora import calibrated, lora_config, lora_then_spon, route, spon_config, spon_then_lora, trained  # noqa: F401
from test_lora_training import rows, sparse_model, state, trainer_of
from test_trainer import tokenizer  # noqa: F401  (a fixture)
from transformers import TrainerCallback

from peft_spon import SponConfig, add_lora, dense_mode, load_with_lora, set_trainable, without_lora
from peft_spon.lora import trainable_choice
from peft_spon.sites import spon_layers


def shake_heads(model):
    """Heads of `modules_to_save` that differ from the base's."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                for i, copy in enumerate(module.modules_to_save.values()):
                    copy.weight.add_(torch.randn_like(copy.weight), alpha=0.1 + i)
    return model


def snapshot(model):
    """All that a failed call must leave alone."""
    return (
        [(name, type(module).__name__) for name, module in model.named_modules()],
        sorted(model.peft_config),
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [list(m.active_adapters) for m in model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))],
        trainable_choice(model),
    )


# ---- errors leave nothing behind -----------------------------------------------------------------------------------


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
    tensors = load_file(path)
    del tensors[next(key for key in tensors if "threshold" in key)]
    save_file(tensors, path)
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


# ---- heads ---------------------------------------------------------------------------------------------------------


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


# ---- switches ------------------------------------------------------------------------------------------------------


def test_rows_that_all_want_no_lora_are_as_rows_among_others(route):  # noqa: F811
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
def test_a_choice_survives_disable_adapter(route, what):  # noqa: F811
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


def test_blocks_inside_blocks(route):  # noqa: F811
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


# ---- training ------------------------------------------------------------------------------------------------------


class Compares(TrainerCallback):
    """A user's look at the dense model in the middle of a training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=torch.tensor(rows()["input_ids"][:1]))


def test_a_look_at_the_dense_model_does_not_move_the_teacher(tmp_path, tokenizer):  # noqa: F811
    model = sparse_model("lora")
    trainer = trainer_of("spon", model, tmp_path, tokenizer)
    trainer.add_callback(Compares())
    before = state(model)
    trainer.train()
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("spon_" in name for name in changed)
    # What was chosen before the distillation holds again after it.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}


def test_a_lora_model_without_spon_is_told_what_to_do(tmp_path, tokenizer):  # noqa: F811
    lora = get_peft_model(MODELS["llama"](), lora_config())
    with pytest.raises(ValueError, match=r"adapters \['default'\], but no SPON.*get_peft_model\(model, SponConfig"):
        trainer_of("spon", lora, tmp_path, tokenizer)


@pytest.mark.parametrize(("spon", "lora"), [("default", "task"), ("anchors", "default")])
def test_the_best_checkpoint_is_that_of_both(spon, lora, tmp_path, tokenizer):  # noqa: F811
    torch.manual_seed(0)
    model = calibrated(get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5), spon))
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"), lora, trainable="both")
    trainer = trainer_of(
        "sft",
        model,
        tmp_path,
        tokenizer,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the last is not the best
        eval_dataset=rows(8, seed=1),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
