# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny model's anchors in one process or in several, and writes what came out: see test_distributed.py.

`distributed_worker.py FOLDER OPTIONS [FOLDER OPTIONS ...]`: one training after another; starting takes longest.

accelerate offers FSDP on accelerators only. `fsdp_on_cpu` lets the test run it over gloo.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from models import MODELS, VOCAB, word_tokenizer
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig
from peft_spon.divergence import trained_parameters
from peft_spon.sites import spon_layers


def fsdp_on_cpu() -> None:
    plain_init = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        fsdp_plugin = fsdp_plugin or vars(self).get("fsdp_plugin")
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


class KillAt(TrainerCallback):
    """Kills the process, as the system does when memory runs out, at the end of a step, before it is logged."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def texts(count: int = 48, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in rows]})


def train(out: Path, options: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    evaluate_first = options.pop("evaluate_first", False)
    resume = options.pop("resume", None)
    model = get_peft_model(
        MODELS["llama"](), SponConfig(sparsity=0.6, criterion="weighted", gain=True, task_type="CAUSAL_LM")
    )
    args = SponTrainingConfig(
        output_dir=str(out),
        **{
            "max_steps": 4,
            "optim": "sgd",
            # A last-bit difference of an activation can move it to another bin of a histogram.
            "recalibrations": 0,
            "learning_rate": 300.0,
            "gain_learning_rate": 10.0,
            "per_device_train_batch_size": 8 // world,
            "per_device_eval_batch_size": 8 // world,
            "max_length": 16,
            "report_to": [],
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            **options,
        },
    )
    trainer = SponTrainer(
        model, args, train_dataset=texts(48, 0), eval_dataset=texts(21, 1), processing_class=word_tokenizer()
    )
    if "SPON_TEST_KILL_AT" in os.environ:
        trainer.add_callback(KillAt(int(os.environ["SPON_TEST_KILL_AT"])))
    if evaluate_first:
        trainer.evaluate()
    output = trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained_parameters(trainer.model)]
    report = {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "type": str(trainer.accelerator.distributed_type),
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "checksum": [p.detach().double().sum().item() for p in whole],
        "layers": len(spon_layers(trainer.model)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "kl": [entry["kl"] for entry in trainer.state.log_history if "kl" in entry],
        "eval": {key: metrics[key] for key in ("eval_loss", "eval_kl", "eval_perplexity", "eval_top1_agreement")},
        "compared": {key: output.metrics[key] for key in ("kl_before", "kl_after")},
    }
    (out / f"report-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ:
        fsdp_on_cpu()
    for folder, options in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        train(Path(folder), json.loads(options))
    if dist.is_initialized():
        dist.barrier()
        # Not through the interpreter's shutdown: gloo's threads sometimes abort there, after all work is done.
        os._exit(0)
