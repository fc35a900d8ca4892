# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes save into one folder, and strangers' files lie there: nobody loses anything, nobody stops."""

import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from models import MODELS, logits
from peft import PeftModel, get_peft_model
from test_merged_checkpoints import merged_model

from peft_spon import SponConfig
from peft_spon.files import host, move_into_place, written_aside


def adapter():
    torch.manual_seed(0)
    return get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).eval()


def load_adapter(folder):
    return PeftModel.from_pretrained(MODELS["llama"](), folder).eval()


KINDS = {
    "adapter": (adapter, load_adapter),
    "merged": (merged_model, tf.AutoModelForCausalLM.from_pretrained),
}


def names(folder):
    return {path.name for path in folder.iterdir()}


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_are_left_alone_and_left_overs_go(kind, tmp_path):
    make, load = KINDS[kind]
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    pid = dead_pid()
    left_over = f".spon-saving-{host()}-{pid}-abc"
    strangers = {".spon-saving-file", ".spon-saving-older-version", f".spon-saving-{host()}-{pid}-link"}
    strangers |= {f".spon-saving-{host()}-{os.getpid()}-live", f".spon-saving-another.machine-{pid}-abc"}
    strangers |= {f".spon-saving-{host()}-{pid}-file"}
    for name in strangers - {f".spon-saving-{host()}-{pid}-link"} | {left_over}:
        if name.endswith("file"):
            (folder / name).touch()
        else:
            (folder / name / "inside").mkdir(parents=True)
    (folder / f".spon-saving-{host()}-{pid}-link").symlink_to(elsewhere)
    model = make()
    model.save_pretrained(folder)
    assert strangers < names(folder)
    assert left_over not in names(folder)
    assert {name for name in names(folder) if name.startswith(".spon-")} == strangers
    assert (elsewhere / "precious").exists()
    assert torch.equal(logits(load(folder), "llama"), logits(model, "llama"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_save_into_one_folder(kind, tmp_path):
    make, load = KINDS[kind]
    model, children = make(), []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                for _ in range(4):
                    model.save_pretrained(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert not any(name.startswith(".spon-") for name in names(tmp_path))
    assert torch.equal(logits(load(tmp_path), "llama"), logits(model, "llama"))


def test_two_at_once_in_one_process(tmp_path):
    with written_aside(tmp_path) as first, written_aside(tmp_path) as second:
        assert first != second
        assert first.is_dir()
        for aside in (first, second):
            (aside / "config.json").write_text(aside.name)
            move_into_place(aside, tmp_path, "config.json")
        assert (tmp_path / "config.json").read_text() == second.name
    assert names(tmp_path) == {"config.json"}


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def save():
        with written_aside(tmp_path) as aside:
            (aside / "config.json").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save()
    assert names(tmp_path) == {"config.json"}
    assert (tmp_path / "config.json").read_text() == "old"
