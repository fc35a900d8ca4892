# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A process killed while it saves: the folder loads as what it was, as the new model, or not at all."""

import builtins
import itertools
import os
import signal
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as tf
from models import MODELS, calibrated, logits
from peft import PeftModel, get_peft_model
from test_merged_checkpoints import merged_model

from peft_spon import SponConfig


def forked(action):
    """Run an action in a forked process; True if it got to the end, False if it was killed."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), "it failed by itself"
        return code == 0
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)  # an error must not go on as a second test run


def killed_at(count, action):
    """Run an action in a forked process that is killed at its count-th file operation; True if it got to the end."""
    calls = itertools.count(1)

    def counted(plain):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return call

    def run():
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        builtins.open = counted(open)
        safetensors.torch.serialize_file = counted(safetensors.torch.serialize_file)
        action()

    return forked(run)


def outcome(load, folder, allowed):
    """Which of the allowed models a folder loads as, or `"refused"`."""
    try:
        found = logits(load(folder), "llama")
    except (OSError, ValueError):
        return "refused"
    same = [name for name, wanted in allowed.items() if torch.equal(found, wanted)]
    assert same, "it loads as something else"
    return same[0]


def kill_everywhere(tmp_path, load, save_old, save_new, allowed):
    """The outcomes of a saving that is killed at every file operation in turn, and last not at all."""
    outcomes = []
    for count in range(1, 300):
        folder = tmp_path / str(count)
        if "old" in allowed:
            save_old(folder)
        finished = killed_at(count, lambda folder=folder: save_new(folder))
        outcomes.append(outcome(load, folder, allowed))
        if finished:
            break
    assert finished
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index), "old, then nothing, then new"
    assert set(outcomes) == {*allowed, "refused"}
    return outcomes


def check_left_overs_go(tmp_path, save_new):
    """What a killed run left aside goes with the next save."""
    left = [folder for folder in tmp_path.iterdir() if list(folder.glob(".spon-*"))]
    assert left
    save_new(left[0])
    assert not list(left[0].glob(".spon-*"))


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "dense", "merged"])
def test_killed_while_saving_a_merged_model(before, tmp_path):
    old = {"nothing": None, "dense": MODELS["llama"](), "merged": merged_model(sparsity=0.3)}[before]
    model = merged_model(sparsity=0.7)
    allowed = {"new": logits(model, "llama")} | ({} if old is None else {"old": logits(old, "llama")})

    def save_new(folder):
        model.save_pretrained(folder, max_shard_size="40KB")

    def save_old(folder):
        old.save_pretrained(folder, max_shard_size="30KB")

    assert len(kill_everywhere(tmp_path, tf.AutoModelForCausalLM.from_pretrained, save_old, save_new, allowed)) > 8
    check_left_overs_go(tmp_path, save_new)


def adapter(seed):
    torch.manual_seed(seed)
    return calibrated(get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.3 + 0.2 * seed, init_weights=False)))


def load_adapter(folder):
    return PeftModel.from_pretrained(MODELS["llama"](), folder).eval()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "another", "its dial elsewhere"])
def test_killed_while_saving_an_adapter(before, tmp_path):
    model, old = adapter(1), None if before == "nothing" else adapter(0 if before == "another" else 1)
    if before == "its dial elsewhere":
        old.set_sparsity(0.2)
    allowed = {"new": logits(model, "llama")} | ({} if old is None else {"old": logits(old, "llama")})
    save_old = None if old is None else old.save_pretrained
    assert len(kill_everywhere(tmp_path, load_adapter, save_old, model.save_pretrained, allowed)) > 8
    check_left_overs_go(tmp_path, model.save_pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["missing", "zeros"])
@pytest.mark.parametrize("before", ["nothing", "another"])
def test_killed_inside_the_writing_of_the_weights(before, tail, tmp_path):
    """Older releases of safetensors write in place, newer ones aside; in place, any part of the file can be there."""
    model, old = adapter(1), adapter(0)
    allowed = {"new": logits(model, "llama"), "old": logits(old, "llama")}
    plain = safetensors.torch.serialize_file

    def torn(part):
        def write(tensors, path, metadata):
            with tempfile.TemporaryDirectory() as elsewhere:
                plain(tensors, os.path.join(elsewhere, "whole"), metadata)
                data = Path(elsewhere, "whole").read_bytes()
            there = data[: int(part * len(data))]
            Path(path).write_bytes(there if tail == "missing" else there.ljust(len(data), b"\0"))
            os.kill(os.getpid(), signal.SIGKILL)

        return write

    for part in (0, 0.01, 0.2, 0.5, 0.9, 0.999):
        folder = tmp_path / str(part)
        if before == "another":
            old.save_pretrained(folder)

        def save(folder=folder, part=part):
            safetensors.torch.serialize_file = torn(part)
            model.save_pretrained(folder)

        assert not forked(save)
        assert (folder / "adapter_model.safetensors").exists()
        assert outcome(load_adapter, folder, allowed) == "refused"
