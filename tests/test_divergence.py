# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Trainings that diverge stop, whenever it happens, with anchors and thresholds of one good moment."""

import json
import math

import pytest
import torch
from distributed_worker import texts
from models import MODELS, logits
from peft import PeftModel, get_peft_model
from test_trainer import make
from transformers import TrainerCallback

from peft_spon import SponConfig
from peft_spon.sites import spon_layers
from peft_spon.trainer import TrainingDiverged


class At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def first_layer(trainer):
    return next(iter(spon_layers(trainer.model).values()))


def poison(trainer, value=math.nan):
    first_layer(trainer).spon_anchor["default"].data.fill_(value)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [4, 2])
def test_an_update_that_breaks_an_anchor_is_never_saved(tmp_path, tokenizer, value, step):
    trainer = make(tmp_path, tokenizer, save_strategy="steps", save_steps=1)
    trainer.add_callback(At("on_pre_optimizer_step", step - 1, lambda: poison(trainer, value)))
    with pytest.raises(TrainingDiverged, match=f"anchors are NaN or infinite after step {step}.*last-good"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in range(1, step)]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "last-good").eval()
    assert torch.equal(logits(loaded, "llama"), logits(trainer.model.eval(), "llama"))


def test_what_breaks_after_the_last_update_is_noticed_too(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    trainer.add_callback(At("on_train_end", 4, lambda: poison(trainer)))
    with pytest.raises(TrainingDiverged, match="held-out data is nan after the last step"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow), 15])
def test_short_runs_stop_as_well(tmp_path, tokenizer, steps):
    config = SponConfig(criterion="weighted", task_type="CAUSAL_LM")  # with which rates this high diverge
    trainer = make(tmp_path, tokenizer, peft_config=config, max_steps=steps, learning_rate=150.0 / steps)
    with pytest.raises(
        TrainingDiverged, match=r"The KL diverges: .* on held-out data after the last step, .* at the st"
    ):
        trainer.train()
    assert all(not layer.spon_anchor["default"].any() for layer in spon_layers(trainer.model).values())


@pytest.mark.slow
def test_anchors_and_thresholds_go_back_to_one_moment(tmp_path, tokenizer):
    """The best stretch ends at step 20; the thresholds are fitted anew at step 30, and the training breaks at 35."""
    trainer = make(tmp_path, tokenizer, max_steps=60, recalibrations=1)
    seen = {}

    def held():
        return {
            name: [
                value["default"].clone() for value in (layer.spon_anchor, layer.spon_threshold, layer.spon_quantiles)
            ]
            for name, layer in spon_layers(trainer.model).items()
        }

    trainer.add_callback(At("on_step_begin", 19, lambda: seen.update(good=held())))
    trainer.add_callback(At("on_step_end", 30, lambda: seen.update(later=held())))
    trainer.add_callback(At("on_step_end", 35, lambda: poison(trainer)))
    with pytest.raises(TrainingDiverged, match="KL is nan at step 36"):
        trainer.train()
    found = held()
    for name, values in found.items():
        assert all(torch.equal(a, b) for a, b in zip(values, seen["good"][name], strict=True)), name
    assert any(not torch.equal(values[1], seen["later"][name][1]) for name, values in found.items())
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "last-good")
    for name, layer in spon_layers(loaded).items():
        assert torch.equal(layer.spon_threshold["default"], found[name][1])
        layer.set_sparsity("default", 0.5)
        assert torch.equal(layer.spon_threshold["default"], found[name][1]), "threshold and table belong together"


@pytest.mark.slow
def test_the_mark_is_part_of_the_checkpoint(tmp_path, tokenizer):
    """Anchors that got much worse just before a checkpoint do not get a new, higher mark by being resumed."""
    options = {"save_strategy": "steps", "save_steps": 10, "learning_rate": 1e-6, "gain_learning_rate": 1e-6}
    straight = make(tmp_path, tokenizer, max_steps=10, **options)
    straight.add_callback(At("on_step_end", 10, lambda: poison(straight, 20.0)))
    with pytest.raises(TrainingDiverged, match="after the last step"):
        straight.train()
    assert not first_layer(straight).spon_anchor["default"].isclose(torch.tensor(20.0)).any()
    resumed = make(tmp_path, tokenizer, max_steps=60, **options)
    marks = []
    resumed.add_callback(At("on_step_begin", 10, lambda: marks.append(resumed._watch.to_dict())))
    with pytest.raises(TrainingDiverged, match=r"over the last 20 steps.*The anchors that train\(\) began with"):
        resumed.train(resume_from_checkpoint=True)
    saved = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert marks == [saved["stateful_callbacks"]["SponDivergenceWatch"]["attributes"]]
    assert marks[0]["start"] == straight._watch.start
    assert marks[0]["steps"] == 10
    assert resumed.state.global_step < 25


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_before_a_resumed_training_is_before_its_first_step(tmp_path, tokenizer, held_out):
    def trained(resume=None):
        trainer = make(tmp_path, tokenizer, save_strategy="steps", save_steps=2, learning_rate=0.2)
        trainer.eval_dataset = trainer.eval_dataset if held_out else None
        return trainer.train(resume_from_checkpoint=resume).metrics

    straight, resumed = trained(), trained(str(tmp_path / "checkpoint-2"))
    assert resumed["kl_before"] == straight["kl_before"]
    assert resumed["kl_after"] == pytest.approx(straight["kl_after"], rel=1e-6)
    assert resumed["kl_after"] != pytest.approx(resumed["kl_before"], rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_without_a_mark_gets_one(tmp_path, tokenizer):
    make(tmp_path, tokenizer, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["SponDivergenceWatch"]
    path.write_text(json.dumps(state))
    resumed = make(tmp_path, tokenizer)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert 0 < resumed._watch.start < math.inf


def test_a_broken_dense_model_is_found_before_the_first_step(tmp_path, tokenizer):
    base = MODELS["llama"]()
    base.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match=r"KL is nan before the first step: logits are NaN.*dtype"):
        make(tmp_path, tokenizer, get_peft_model(base, SponConfig(criterion="topk"))).train()


@pytest.mark.slow
def test_no_alarm_on_a_training_that_does_well(tmp_path, tokenizer):
    for steps in (8, 21):
        options = {"max_steps": steps, "per_device_train_batch_size": 48}
        metrics = make(tmp_path, tokenizer, eval_data=texts(), **options).train().metrics
        assert metrics["kl_after"] < metrics["kl_before"]
