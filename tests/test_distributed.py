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
from models import MODELS
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file

import peft_spon  # noqa: F401  registers SPON


HERE = Path(__file__).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(folder, processes=1, options=None, env=None):
    """Anchors and reports of a run of distributed_worker.py."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command = [*launcher, str(HERE / "distributed_worker.py"), str(folder), json.dumps(options or {})]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env={**os.environ, **settings, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(processes)]
    assert [report["processes"] for report in reports] == [processes] * processes
    for report in reports[1:]:
        assert report["checksum"] == reports[0]["checksum"], "the ranks' anchors drifted apart"
    return load_file(folder / "adapter_model.safetensors"), reports[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"))


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


def test_ddp_after_an_evaluation_with_accumulation(tmp_path, one):
    """evaluate() before train() and gradient accumulation both change numbers in silence when handled naively."""
    found = run(
        tmp_path,
        2,
        {"evaluate_first": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    assert found[1]["wrapped"] == "DistributedDataParallel"
    assert_same(found, one)


def test_ddp_with_reentrant_checkpointing(tmp_path, one):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert_same(run(tmp_path, 2, options), one)


def test_fsdp2_with_checkpointing(tmp_path, one):
    found = run(tmp_path, 2, {"fsdp": True, "gradient_checkpointing": True}, FSDP2)
    assert "FSDP" in found[1]["type"]
    assert found[1]["sharded"] > 2 * found[1]["layers"]
    assert_same(found, one)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path)
    assert loaded.peft_config["default"].calibrated


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="older ones load an adapter on the first process only"
)
def test_fsdp2_resumes_to_the_same_anchors(tmp_path):
    adam = {
        "fsdp": True,
        "optim": "adamw_torch",
        "learning_rate": 0.2,
        "gain_learning_rate": 0.02,
        "recalibrations": 1,
    }
    straight, report = run(tmp_path, 2, {**adam, "save_strategy": "steps", "save_steps": 2}, FSDP2)
    resumed, again = run(tmp_path / "b", 2, {**adam, "resume": str(tmp_path / "checkpoint-2")}, FSDP2)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert again["losses"] == report["losses"], "the log goes on from the checkpoint's"
    assert again["compared"] == report["compared"], "and before is before the first run, not before the resumed one"
