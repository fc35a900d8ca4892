# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo, CPU) train the anchors that one process does: DDP and FSDP2.

`accelerate launch --cpu --num_processes 2` starts one process in silence, so torchrun starts them and the reports say
how many there were. Not covered, for want of a GPU: NCCL, FSDP1, mixed precision under FSDP, DeepSpeed.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from distributed_worker import train
from models import MODELS
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file

import peft_spon  # noqa: F401  registers SPON


# One process of pytest-xdist for all, so that fixtures are made once (--dist loadgroup).
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

HERE = Path(__file__).parent
CAN_RESUME = Version(accelerate.__version__) >= Version("1.15")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(folder, processes, trainings, env=None):
    """Anchors and reports of trainings of distributed_worker.py, one after the other, by name; folders are theirs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nproc_per_node", str(processes), "--master_port", str(port)]
    jobs = [word for name, options in trainings.items() for word in (str(folder / name), json.dumps(options))]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*launcher, str(HERE / "distributed_worker.py"), *jobs]
    done = subprocess.run(command, env={**os.environ, **settings, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return outcomes(folder, processes, trainings)


def outcomes(folder, processes, trainings):
    found = {}
    for name in trainings:
        reports = [json.loads((folder / name / f"report-{rank}.json").read_text()) for rank in range(processes)]
        assert [report["processes"] for report in reports] == [processes] * processes
        for report in reports[1:]:
            assert report["checksum"] == reports[0]["checksum"], "the ranks' anchors drifted apart"
        found[name] = load_file(folder / name / "adapter_model.safetensors"), reports[0]
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same in one process, which is this one."""
    folder = tmp_path_factory.mktemp("one")
    train(folder / "plain", {})
    return outcomes(folder, 1, ["plain"])["plain"]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    accumulation = {"evaluate_first": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return run(tmp_path_factory.mktemp("ddp"), 2, {"accumulation": accumulation, "reentrant": reentrant})


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    trainings = {"checkpointing": {"gradient_checkpointing": True}}
    if CAN_RESUME:
        adam = {"optim": "adamw_torch", "learning_rate": 0.2, "gain_learning_rate": 0.02, "recalibrations": 1}
        trainings["straight"] = {**adam, "save_strategy": "steps", "save_steps": 2}
        trainings["resumed"] = {**adam, "resume": str(folder / "straight" / "checkpoint-2")}
    return folder, run(folder, 2, trainings, FSDP2)


def assert_same(found, wanted):
    (anchors, report), (wanted_anchors, wanted_report) = found, wanted
    assert anchors.keys() == wanted_anchors.keys()
    moved = max(value.abs().max() for key, value in wanted_anchors.items() if "spon_anchor" in key)
    assert moved > 0.02, "a run that trains nothing proves nothing"
    for key, value in wanted_anchors.items():
        torch.testing.assert_close(anchors[key], value, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    for key in ("losses", "kl"):
        assert report[key] == pytest.approx(wanted_report[key], abs=1e-6)
    for key in ("eval", "compared"):
        assert report[key] == pytest.approx(wanted_report[key], rel=1e-5)


def test_ddp_after_an_evaluation_with_accumulation(ddp, one):
    """evaluate() before train() and gradient accumulation both change numbers in silence when handled naively."""
    assert ddp["accumulation"][1]["wrapped"] == "DistributedDataParallel"
    assert_same(ddp["accumulation"], one)


def test_ddp_with_reentrant_checkpointing(ddp, one):
    assert ddp["reentrant"][1]["wrapped"] == "DistributedDataParallel"
    assert_same(ddp["reentrant"], one)


def test_fsdp2_with_checkpointing(fsdp2, one):
    folder, found = fsdp2
    report = found["checkpointing"][1]
    assert "FSDP" in report["type"]
    assert report["sharded"] > 2 * report["layers"]
    assert_same(found["checkpointing"], one)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), folder / "checkpointing")
    assert loaded.peft_config["default"].calibrated


@pytest.mark.skipif(not CAN_RESUME, reason="accelerate before 1.15 loads an adapter on the first process only")
def test_fsdp2_resumes_to_the_same_anchors(fsdp2):
    (straight, report), (resumed, again) = (fsdp2[1][name] for name in ("straight", "resumed"))
    assert all("FSDP" in each["type"] and each["sharded"] for each in (report, again))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert again["losses"] == report["losses"], "the log goes on from the checkpoint's"
    assert again["compared"] == report["compared"], "and before is before the first run, not before the resumed one"
