# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What SponTrainer does before and after the steps is little, is announced, and shows how far it is."""

import pytest
from datasets import Dataset
from distributed_worker import texts
from models import MODELS
from peft import get_peft_model
from test_trainer import make

import peft_spon.comparison
import peft_spon.statistics
import peft_spon.trainer
from peft_spon import SponConfig
from peft_spon.comparison import COMPARED_STEPS, COMPARED_TOKENS, Comparison
from peft_spon.sites import spon_layers


LENGTH = 32


def rows(count):
    return Dataset.from_dict(
        {"input_ids": [[3 + (i * j) % 90 for j in range(1, LENGTH + 1)] for i in range(1, count + 1)]}
    )


def count_tokens(trainer):
    """How many tokens run through the model inside and outside the steps, in a list of two."""
    seen, inside = [0, 0], [False]
    step = trainer.training_step

    def training_step(*args, **kwargs):
        inside[0] = True
        try:
            return step(*args, **kwargs)
        finally:
            inside[0] = False

    def count(module, args):
        seen[not inside[0]] += args[0].shape[0] * args[0].shape[1]

    trainer.training_step = training_step
    next(iter(spon_layers(trainer.model).values())).register_forward_pre_hook(count)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}], ids=str
)
@pytest.mark.parametrize("held_out", [True, False])
def test_the_kl_is_measured_on_the_rows_of_two_steps_and_the_teacher_runs_once(
    tmp_path,
    tokenizer,
    options,
    held_out,
):
    options = {"per_device_train_batch_size": 8, "relative_learning_rate": False, "learning_rate": 1e-6, **options}
    options |= {"max_length": LENGTH, "max_steps": 3, "per_device_eval_batch_size": 64}
    model = get_peft_model(MODELS["llama"](), SponConfig(criterion="topk"))
    trainer = make(tmp_path, tokenizer, model, data=rows(64), eval_data=rows(48), **options)
    trainer.eval_dataset = trainer.eval_dataset if held_out else None
    seen = count_tokens(trainer)
    assert trainer.train().metrics["kl_after"] > 0
    inside, outside = seen
    step = 8 * LENGTH
    assert inside >= 3 * step * 2
    # Once a look at the head. Before the first step teacher and student, on the data to train on and on that held out;
    # after the last one the student.
    look = options["per_device_train_batch_size"] * LENGTH
    assert outside == look + COMPARED_STEPS * step * (2 + 2 * held_out + 1)
    assert outside <= 0.1 * 100 * step * 3, "forwards of teacher and student, and a backward, are a step"


def test_long_rows_are_measured_on_few(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(peft_spon.comparison, "COMPARED_TOKENS", 3 * LENGTH)
    model = get_peft_model(MODELS["llama"](), SponConfig(criterion="topk"))
    options = {"per_device_train_batch_size": 1, "relative_learning_rate": False, "learning_rate": 1e-6}
    trainer = make(tmp_path, tokenizer, model, data=rows(16), max_length=LENGTH, **options)
    seen = count_tokens(trainer)
    Comparison(trainer, trainer.train_dataset).mean_kl("KL")
    assert seen[1] == LENGTH + 3 * LENGTH * 2
    assert COMPARED_TOKENS == 8192


class Bar:
    """Stands in for tqdm and remembers."""

    made = []

    def __init__(self, desc, total, unit, disable, **kwargs):
        self.desc, self.total, self.disable, self.n = desc, total, disable, 0
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self, count=1):
        self.n += count


@pytest.mark.parametrize("quiet", [True, False])
def test_everything_beside_the_steps_shows_how_far_it_is(tmp_path, tokenizer, monkeypatch, quiet):
    monkeypatch.setattr(Bar, "made", [])
    for module in (peft_spon.statistics, peft_spon.comparison):
        monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(peft_spon.trainer, "SCALE_TOKENS", 4 * LENGTH)
    options = {"calibration_tokens": 16 * LENGTH, "max_length": LENGTH, "disable_tqdm": quiet, "max_steps": 1}
    make(tmp_path, tokenizer, data=rows(16), eval_data=rows(16), **options).train()
    wanted = ["calibrating", "measuring what S removes", "KL before training"]
    wanted += ["KL on held-out data before training", "KL on held-out data after training"]
    assert [bar.desc for bar in Bar.made] == wanted
    assert all(bar.n == bar.total > 0 for bar in Bar.made), "the time left is known, and ends at 0"
    # None is tqdm's own choice: shown on a terminal.
    assert {bar.disable for bar in Bar.made} == {True if quiet else None}


def test_workers_that_stay_do_not_mix_the_data_sets_up(tmp_path, tokenizer):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 1}
    trainer = make(tmp_path, tokenizer, eval_data=texts(7), **options)
    Comparison(trainer, trainer.train_dataset).mean_kl("KL")
    assert len(trainer.get_eval_dataloader().dataset) == 7
