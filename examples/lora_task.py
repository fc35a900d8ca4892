# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What the LoRA examples share: a base model, a task to fine-tune it to, and TRL's trainer for the LoRA.

The default task is on every machine with Python: the reference manual that `help()` shows, English prose in
reStructuredText, for the embedded tiny Llama, which has mostly read code. `--task FILE` takes any text file.
"""

import argparse
import ast
import random
import sysconfig
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from stdlib_data import stdlib_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from peft_spon import SponTrainer, SponTrainingConfig
from peft_spon.data import iter_batches


TINY_LLAMA = Path(__file__).resolve().parent / "tiny_llama"
BLOCK, BATCH = 256, 4
QUIET = {
    "per_device_train_batch_size": BATCH,
    "max_length": BLOCK,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "bf16": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or Hub id of a causal language model")
    parser.add_argument("--task", type=Path, help="text file to fine-tune on; default: Python's reference manual")
    parser.add_argument("--separator", default="\n\n\n", help="what separates the texts in that file")
    parser.add_argument("--steps", type=int, default=150, help="steps of 4 x 256 tokens for the anchors")
    parser.add_argument("--lora-steps", type=int, default=300, help="steps of 4 x 256 tokens for the LoRA")
    parser.add_argument("--rank", type=int, default=16)


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_base(name: str) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return base.to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(name)


def task_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Texts to fine-tune on and held-out ones, every tenth, in a fixed random order."""
    if args.task is None:
        source = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py").read_text()
        texts = list(ast.literal_eval(source[source.index("{") :]).values())
    else:
        texts = [text.strip() for text in args.task.read_text().split(args.separator) if text.strip()]
    random.Random(0).shuffle(texts)
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def general_texts() -> list[str]:
    """What the tiny Llama was trained on: for anchors that are distilled before there is a task."""
    texts = list(stdlib_texts("train").values())
    random.Random(0).shuffle(texts)
    return texts


def blocks(texts: list[str], tokenizer, tokens: int | None = None) -> Dataset:
    """Rows of 256 token ids of the joined texts."""
    batches = iter_batches(texts, tokenizer, batch_size=1, max_length=BLOCK, max_tokens=tokens)
    rows = [batch["input_ids"][0].tolist() for batch in batches if batch["input_ids"].shape[1] == BLOCK]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def train_lora(model, tokenizer, rows: Dataset, steps: int, seed: int = 0, rate: float = 2e-3) -> None:
    """TRL's own trainer, on whatever requires a gradient; S stays active if the model has SPON."""
    settings = SFTConfig(
        "out/lora",
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="linear",
        seed=seed,
        logging_steps=steps,
        **QUIET,
    )
    SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()


def train_anchors(model, tokenizer, rows: Dataset, steps: int, seed: int = 0) -> None:
    """Distillation: teacher is the same model, with its LoRA if it has one, and SPON off."""
    common = {"seed": seed, "logging_steps": steps}
    settings = SponTrainingConfig("out/spon", max_steps=steps, **common, **QUIET)
    SponTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()
