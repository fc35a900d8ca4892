# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A LoRA that is part of the repair: trained with the anchors towards the dense model without it."""

import pytest
import torch
from lora_models import ROUTES, lora_config, snapshot, spon_config
from models import MODELS, calibrated, inputs, logits
from peft import LoraConfig, PeftModel, get_peft_model
from test_checkpoints import Killed
from test_lora_training import rows, state, trainer_of
from transformers import AutoModelForCausalLM, TrainerCallback

from peft_spon import (
    SponConfig,
    SponTrainer,
    SponTrainingConfig,
    add_lora,
    dense_mode,
    evaluate,
    load_with_lora,
    save_lora,
    set_trainable,
    without_anchors,
    without_lora,
)
from peft_spon.lora import active_lora, add_repair_lora, repair_parameters, trainable_choice
from peft_spon.repair import REPAIR_LORA


FAMILIES = ("llama", "gpt2")


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def shaken(model):
    """With a repair LoRA that does something."""
    with torch.no_grad():
        for parameter in repair_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def repaired(family="llama", task=False):
    torch.manual_seed(3)
    model = calibrated(get_peft_model(MODELS[family](), spon_config(task_type="CAUSAL_LM")))
    if task:
        add_lora(model, lora_config())
    add_repair_lora(model, 4)
    return shaken(model).eval()


def sparse(task=False):
    """As users have it before a training: no repair LoRA, anchors at zero."""
    torch.manual_seed(0)
    config = SponConfig(sparsity=0.6, criterion="weighted", task_type="CAUSAL_LM")
    model = calibrated(get_peft_model(MODELS["llama"](), config))
    return add_lora(model, lora_config(), trainable="anchors") if task else model


# ---- which models are with it, which without ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_and_plain_sparsity_are_without_it(family):
    model = repaired(family)
    plain = calibrated_again(model, family)
    with dense_mode(model):
        assert torch.equal(logits(model, family), logits(MODELS[family](), family))
    with without_anchors(model), without_anchors(plain):
        assert torch.equal(logits(model, family), logits(plain, family))
    with model.disable_adapter():
        assert torch.equal(logits(model, family), logits(MODELS[family](), family))
    assert not torch.allclose(logits(model, family), logits(plain, family), atol=1e-3), "and it does something"
    assert active_lora(model) == [REPAIR_LORA]


def calibrated_again(model, family):
    """The same SPON adapter without the repair LoRA."""
    torch.manual_seed(3)
    plain = calibrated(get_peft_model(MODELS[family](), spon_config(task_type="CAUSAL_LM")))
    for (name, value), (_, wanted) in zip(anchors(plain), anchors(model), strict=True):
        assert torch.equal(value, wanted), name
    return plain


def anchors(model):
    return [(name, p) for name, p in model.named_parameters() if "spon_anchor" in name or "spon_gain" in name]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_lora_stays_in_the_dense_model(family):
    model = repaired(family, task=True)
    assert active_lora(model) == ["task", REPAIR_LORA]
    torch.manual_seed(3)
    plain = add_lora(calibrated(get_peft_model(MODELS[family](), spon_config())), lora_config()).eval()
    with dense_mode(model), dense_mode(plain):
        assert torch.equal(logits(model, family), logits(plain, family))
        with without_lora(model):
            assert torch.equal(logits(model, family), logits(MODELS[family](), family))
        assert torch.equal(logits(model, family), logits(plain, family))
    with without_lora(model):
        assert active_lora(model) == [REPAIR_LORA]
        spon_alone = logits(model, family)
    assert active_lora(model) == ["task", REPAIR_LORA]
    assert not torch.equal(logits(model, family), spon_alone)
    model.delete_adapter("task")
    assert torch.equal(logits(model, family), spon_alone)


@torch.no_grad()
def test_it_stays_active_beside_whatever_lora_is():
    model = repaired(task=True)
    both = logits(model, "llama")
    add_lora(model, lora_config(), "other")
    assert active_lora(model) == ["other", REPAIR_LORA]
    model.set_adapter("task")
    assert active_lora(model) == ["task", REPAIR_LORA]
    assert torch.equal(logits(model, "llama"), both)
    model.set_adapter("default")
    assert active_lora(model) == ["task", REPAIR_LORA]
    model.delete_adapter("other")
    model.delete_adapter(REPAIR_LORA)
    assert active_lora(model) == ["task"]
    with pytest.raises(ValueError, match="acts on every row"):
        repaired(task=True)(**inputs("llama"), adapter_names=["task", "__base__", "task"])


def test_it_is_trained_with_the_anchors():
    model = repaired(task=True)
    for choice, kinds in (
        ("anchors", {"spon", REPAIR_LORA}),
        ("lora", {"task"}),
        ("both", {"spon", "task", REPAIR_LORA}),
    ):
        set_trainable(model, choice)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        found = {next(k for k in (REPAIR_LORA, "task", "spon") if f".{k}." in n or f".{k}_" in n) for n in names}
        assert found == kinds
    alone = repaired()
    with pytest.raises(ValueError, match="only LoRA of the model is that of SPON's repair"):
        set_trainable(alone, "lora")


def test_evaluate_shows_it_in_the_row_of_the_anchors():
    model = repaired()
    batch = inputs("llama", rows=4, tokens=16)
    result = evaluate(model, [batch])
    with torch.no_grad():
        plain = evaluate(calibrated_again(model, "llama"), [batch])
    assert result.dense == plain.dense
    assert result.sparse == plain.sparse
    assert result.anchored.kl != pytest.approx(plain.anchored.kl, rel=1e-3)
    only = get_peft_model(MODELS["llama"](), SponConfig(criterion="topk", anchor_modules=[], gain=False))
    add_repair_lora(only, 2)
    assert evaluate(shaken(only), [batch]).anchored is not None


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", [False, True])
def test_the_teacher_is_the_dense_model_without_it_and_it_helps(task, tmp_path, tokenizer):
    kl, model = {}, None
    for rank in (0, 4):
        model = sparse(task)
        before = {name.replace("base_layer.", ""): value for name, value in state(model).items()}
        with torch.no_grad(), dense_mode(model):
            dense = logits(model.eval(), "llama")
        alike = {"max_steps": 40, "recalibrations": 0}  # the same thresholds with it and without
        trainer = trainer_of("spon", model, tmp_path, tokenizer, repair_lora=rank, **alike)
        kl[rank] = trainer.train().metrics["kl_after"]
        after = {name.replace("base_layer.", ""): value for name, value in state(trainer.model).items()}
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert changed
        assert all("spon_" in name for name in changed), "neither the base nor a task's LoRA"
        with torch.no_grad(), dense_mode(trainer.model):
            assert torch.equal(logits(trainer.model.eval(), "llama"), dense)
    assert active_lora(model) == [*(["task"] if task else []), REPAIR_LORA]
    assert all(p.abs().sum() > 0 for p in repair_parameters(model))
    assert kl[4] < 0.97 * kl[0], kl
    assert trainable_choice(model) == "anchors"


@pytest.mark.slow
def test_a_checkpoint_resumes_it_exactly(tmp_path, tokenizer):
    def start(folder):
        torch.manual_seed(0)
        return trainer_of("spon", sparse(), folder, tokenizer, save_strategy="steps", save_steps=2, repair_lora=4)

    straight = start(tmp_path / "straight")
    straight.train()
    killed = start(tmp_path / "killed")
    killed.add_callback(KillAt(4))
    with pytest.raises(Killed):
        killed.train()
    resumed = start(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    wanted = state(straight.model)
    assert any(REPAIR_LORA in key for key in wanted)
    for key, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, wanted[key]), key


def test_it_is_trained_on_whether_it_is_asked_for_or_not(tmp_path, tokenizer):
    model = repaired()
    before = [p.clone() for p in repair_parameters(model)]
    trainer = trainer_of("spon", model, tmp_path, tokenizer, max_steps=2)
    trainer.train()
    assert not any(torch.equal(*pair) for pair in zip(before, repair_parameters(model), strict=True))
    groups = trainer.optimizer.param_groups
    (own,) = [
        group for group in groups if {id(p) for p in group["params"]} & {id(p) for p in repair_parameters(model)}
    ]
    assert len(own["params"]) == len(before)
    assert own["initial_lr"] == 1e-3
    with pytest.raises(ValueError, match="repair LoRA of rank 4, and rank 8 is asked for"):
        trainer_of("spon", model, tmp_path, tokenizer, repair_lora=8)


def test_a_name_and_a_config_are_all_it_takes(tmp_path, tokenizer):
    """A model that SponTrainer makes itself; and a LoRA of one's own kind as the repair."""
    arguments = SponTrainingConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, repair_lora=4, report_to=[], use_cpu=True
    )
    trainer = SponTrainer(MODELS["llama"](), arguments, train_dataset=rows(), processing_class=tokenizer)
    trainer.train()
    assert all(p.abs().sum() > 0 for p in repair_parameters(trainer.model))
    own = sparse()
    add_lora(own, LoraConfig(r=2, target_modules=["down_proj"], use_dora=True), REPAIR_LORA)
    trainer_of("spon", own, tmp_path, tokenizer, max_steps=3).train()
    with torch.no_grad(), dense_mode(own):
        assert torch.equal(logits(own.eval(), "llama"), logits(MODELS["llama"](), "llama"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("repair_lora", -1), ("repair_lora", True), ("repair_lora", 2.5), ("repair_lora_learning_rate", -1.0)],
)
def test_settings_that_cannot_be_are_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        SponTrainingConfig(str(tmp_path), **{field: value})


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [False, True])
def test_it_is_saved_and_loaded_along(family, task, tmp_path):
    model = repaired(family, task)
    wanted = logits(model, family)
    model.save_pretrained(tmp_path)
    again = load_with_lora(MODELS[family](), tmp_path).eval()
    assert torch.equal(logits(again, family), wanted)
    assert active_lora(again) == active_lora(model)
    assert not any(p.requires_grad for p in repair_parameters(again))
    with dense_mode(again), dense_mode(model):
        assert torch.equal(logits(again, family), logits(model, family))
    card = (tmp_path / "README.md").read_text()
    assert "from peft_spon import load_with_lora" in card
    assert f'model = load_with_lora(base, "{tmp_path.name}")' in card
    # It is a plain LoRA in its folder.
    plain = PeftModel.from_pretrained(MODELS[family](), tmp_path / REPAIR_LORA)
    assert {name for name, _ in plain.named_parameters() if "lora_" in name}
    trained = load_with_lora(MODELS[family](), tmp_path, trainable="anchors")
    assert all(p.requires_grad for p in repair_parameters(trained))
    if task:
        save_lora(model, tmp_path / "alone")
        from_elsewhere = load_with_lora(MODELS[family](), tmp_path, tmp_path / "alone").eval()
        assert torch.equal(logits(from_elsewhere, family), wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [False, True])
def test_it_merges_into_the_weights(family, task, tmp_path):
    model = repaired(family, task)
    wanted = logits(model, family)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, family), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="repair LoRA is merged"), dense_mode(model):
        pass
    model.unmerge_adapter()
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(logits(merged, family), wanted, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, family), logits(merged, family))


def test_a_failed_attempt_leaves_the_model_alone():
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    before = snapshot(model)
    with pytest.raises(ValueError, match="r` should be a positive"):
        add_repair_lora(model, -3)
    assert snapshot(model) == before


def test_routes_of_a_task_lora_do_not_matter():
    """LoRA first or SPON first: the repair LoRA is put beside the task's."""
    for make in ROUTES.values():
        model = make()
        add_repair_lora(model, 2)
        names = set(active_lora(model))
        assert names == {"task", REPAIR_LORA}
