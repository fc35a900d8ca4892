# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A training killed while it writes a checkpoint is resumed from the last whole one, to the same anchors."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_killed_saving import forked
from test_trainer import make
from transformers.trainer_utils import get_last_checkpoint

from peft_spon.sites import spon_layers


class Killed(BaseException):
    pass


def kill_while_saving(trainer, what, step):
    """At `step`, stop as a kill would: the first bytes of one of the checkpoint's files are written, and no more."""
    plain = getattr(trainer, what)

    def save(*args, **kwargs):
        folder = Path(trainer.args.output_dir, f"checkpoint-{step}")
        if trainer.state.global_step != step:
            return plain(*args, **kwargs)
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(b"\x08")
        raise Killed

    setattr(trainer, what, save)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """Folder of a training that nothing has stopped, and its anchors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(folder, tokenizer, **OPTIONS)
    trainer.train()
    return folder, [layer.spon_anchor["default"].detach() for layer in spon_layers(trainer.model).values()]


@pytest.fixture
def straight(finished):
    return finished[1]


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the folder of a training that nothing has stopped."""
    return Path(shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="module", params=["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def killed(request, tmp_path_factory, tokenizer):
    """Folder of a training that was killed while it saved the checkpoint of step 4."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("killed")
    trainer = make(folder, tokenizer, **OPTIONS)
    kill_while_saving(trainer, request.param, 4)
    with pytest.raises(Killed):
        trainer.train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the last", pytest.param("by name", marks=pytest.mark.slow)])
def test_the_last_whole_checkpoint_is_resumed(tmp_path, tokenizer, straight, caplog, killed, how):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4"), "what scripts ask for"
    resumed = make(tmp_path, tokenizer, **{**OPTIONS, "save_total_limit": 1, "save_steps": 3})
    resumed.train(resume_from_checkpoint=True if how == "the last" else str(tmp_path / "checkpoint-4"))
    for layer, wanted in zip(spon_layers(resumed.model).values(), straight, strict=True):
        assert torch.equal(layer.spon_anchor["default"], wanted)
    (said,) = [record.message for record in caplog.records if "half-written" in record.message]
    assert "checkpoint-4" in said
    assert "the one before it is resumed" in said
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-6", "incomplete-checkpoint-4"]


@pytest.mark.slow
def test_a_state_that_is_cut_off_is_not_whole(folder, tokenizer, straight):
    for step in (4, 6):
        cut(folder / f"checkpoint-{step}" / "trainer_state.json")
    resumed = make(folder, tokenizer, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    for layer, wanted in zip(spon_layers(resumed.model).values(), straight, strict=True):
        assert torch.equal(layer.spon_anchor["default"], wanted)


def test_an_overwritten_checkpoint_is_no_mixture_of_two_runs(folder, tokenizer):
    again = make(folder, tokenizer, **OPTIONS)
    kill_while_saving(again, "_save_optimizer_and_scheduler", 6)
    with pytest.raises(Killed):
        again.train()
    assert not (folder / "checkpoint-6" / "trainer_state.json").exists()


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_that_is_said(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)
    kill_while_saving(trainer, "_save_rng_state", 2)
    with pytest.raises(Killed):
        trainer.train()
    with pytest.raises(ValueError, match="no whole checkpoint.*Begin anew"):
        make(tmp_path, tokenizer, **OPTIONS).train(resume_from_checkpoint=True)
    make(tmp_path, tokenizer, **OPTIONS).train()
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()


@pytest.mark.slow
def test_whole_checkpoints_and_other_folders_are_left_alone(folder, tokenizer):
    before = sorted(path.name for path in folder.iterdir())
    resumed = make(folder, tokenizer, **OPTIONS)
    (folder / "checkpoint-old").mkdir()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 6
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "checkpoint-old"])
    with pytest.raises((ValueError, OSError)):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


@pytest.mark.slow
def test_a_process_killed_while_saving_resumes_to_the_same_anchors(tmp_path, tokenizer, straight):
    def train():
        trainer = make(tmp_path, tokenizer, **OPTIONS)
        plain = trainer._save_rng_state
        trainer._save_rng_state = lambda folder: (
            os.kill(os.getpid(), signal.SIGKILL) if trainer.state.global_step == 4 else plain(folder)
        )
        trainer.train()

    assert not forked(train)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    resumed = make(tmp_path, tokenizer, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    for layer, wanted in zip(spon_layers(resumed.model).values(), straight, strict=True):
        assert torch.equal(layer.spon_anchor["default"], wanted)
