# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""The whole job on a real model: make it sparse, spread the sparsity, train the anchors, save, load, generate.

    python examples/quickstart.py                  # the embedded 5 M Llama, about 3 minutes on 2 cores
    python examples/quickstart.py --short          # the same with few steps, for a first look
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M \
        --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1

Prints perplexity (with its standard error), KL to the dense model, top-1 agreement and realised sparsity on held-out
text, with S active on every token and in all linear layers of the transformer blocks.
"""

import argparse
import itertools
import logging
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from stdlib_data import stdlib_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, allocate, calibrate, evaluate


HERE = Path(__file__).resolve().parent
TINY_LLAMA = HERE / "tiny_llama"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset", help="Hub id of a text data set, or a text file; default: Python's own source")
    parser.add_argument("--dataset-config", help="configuration of the data set, if it has several")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=150, help="training steps of batch x block tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=256, help="tokens per block in training and evaluation")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="held-out tokens to evaluate on")
    parser.add_argument("--lr", type=float, default=SponTrainingConfig.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="where the adapter is saved")
    parser.add_argument("--short", action="store_true", help="few steps and little text, to see that all works")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # the new process of step 7
    args = parser.parse_args()
    if args.short:
        args.steps, args.eval_tokens = 20, 16384
    return args


def load_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts, each in a fixed random order."""
    if args.dataset is None:
        splits = [list(stdlib_texts(split).values()) for split in ("train", "held_out")]
    elif Path(args.dataset).is_file():
        texts = pieces(Path(args.dataset).read_text(encoding="utf-8", errors="ignore"))
        splits = [texts[: len(texts) * 9 // 10], texts[len(texts) * 9 // 10 :]]
    else:
        data = load_dataset(args.dataset, args.dataset_config)
        held_out = data["validation"] if "validation" in data else data["test"]
        splits = [list(data["train"][args.text_column]), list(held_out[args.text_column])]
    for texts in splits:
        random.Random(0).shuffle(texts)
    return splits[0], splits[1]


def pieces(text: str, longest: int = 4000) -> list[str]:
    """The paragraphs of a text, long ones cut at white space (if there is any): at least 20 pieces of any text."""
    if len(text.strip()) < 1000:
        sys.exit(f"--dataset holds {len(text.strip())} characters of text; give a file with 1,000 or more.")
    size = min(longest, len(text) // 20)
    cut = re.compile(rf".{{1,{size}}}(?=\s|$)|.{{1,{size}}}", re.DOTALL)
    parts = [part for paragraph in re.split(r"\n\s*\n", text) for part in cut.findall(paragraph)]
    return [part for part in parts if part.strip()]


def load_base(name: str) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()


@torch.no_grad()
def logits_on(model: torch.nn.Module, tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    return model(input_ids=ids).logits.float().cpu()


def generate(model: torch.nn.Module, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def heading(text: str) -> None:
    print(f"\n## {text}", flush=True)


def main() -> None:
    args = parse_args()
    begun = time.time()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt = "def __init__(self, name, value):\n" if args.dataset is None else "The history of"
    if args.check:
        model = PeftModel.from_pretrained(load_base(args.model), args.out)
        torch.save(logits_on(model, tokenizer, prompt), args.out / "check.pt")
        return

    heading(f"1. Load {Path(args.model).name} and its text")
    train_texts, held_out = load_texts(args)
    base = load_base(args.model)
    print(
        f"{base.num_parameters() / 1e6:.1f} M parameters; {len(train_texts)} training texts, {len(held_out)} held out"
    )
    size = {"batch_size": 8, "max_length": args.block}

    heading(f"2. Sparsify to {args.sparsity:.0%} and calibrate")
    model = get_peft_model(base, SponConfig(sparsity=args.sparsity, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    print(calibrate(model, train_texts, tokenizer, max_tokens=8192, **size))

    heading("3. Plain magnitude sparsity, for comparison: what there is to repair")
    model.add_adapter("magnitude", SponConfig(sparsity=args.sparsity, criterion="magnitude", anchor_modules=[]))
    calibrate(model, train_texts, tokenizer, adapter_name="magnitude", max_tokens=65536, **size)
    model.set_adapter("magnitude")
    magnitude = evaluate(model, held_out, tokenizer, max_tokens=args.eval_tokens, **size)
    print(magnitude)
    model.delete_adapter("magnitude")
    model.set_adapter("default")

    heading("4. Spread the sparsity: more where it costs little, less where it costs much")
    uniform = evaluate(model, held_out, tokenizer, max_tokens=args.eval_tokens, **size).sparse
    print(allocate(model, train_texts, tokenizer, max_length=args.block))

    heading(f"5. Train the anchors: {args.steps} steps of {args.batch} x {args.block} tokens")
    # At least four characters go to a token: enough text for the steps, and no more, is tokenised.
    lengths = itertools.accumulate(len(text) for text in train_texts)
    count = sum(1 for length in lengths if length < 8 * args.steps * args.batch * args.block) + 1
    rows = Dataset.from_dict({"text": train_texts[:count]})
    trainer = SponTrainer(
        model=model,
        args=SponTrainingConfig(
            output_dir=str(args.out / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            max_length=args.block,
            packing=True,
            packing_strategy="wrapped",
            logging_steps=max(1, args.steps // 5),
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            seed=args.seed,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()

    heading("6. Dense, sparse, sparse with anchors, on held-out text")
    result = evaluate(model, held_out, tokenizer, max_tokens=args.eval_tokens, **size)
    print(result)
    print(
        f"KL to dense: magnitude sparsity {magnitude.sparse.kl:.4f}, weighted {uniform.kl:.4f}, allocated "
        f"{result.sparse.kl:.4f}, with anchors {result.anchored.kl:.4f}."
    )
    damage = magnitude.sparse.perplexity - magnitude.dense.perplexity
    removed = (magnitude.sparse.perplexity - result.anchored.perplexity) / damage
    print(
        f"Perplexity: dense {result.dense.perplexity:.3f}, magnitude sparsity {magnitude.sparse.perplexity:.3f}, ours "
        f"{result.anchored.perplexity:.3f}: {removed:.0%} of magnitude's damage is gone."
    )

    heading("7. Save, and load into a fresh base in a new process")
    model.save_pretrained(args.out)
    files = {path.name: path.stat().st_size for path in sorted(args.out.glob("adapter*"))}
    print(f"saved {args.out}: " + ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in files.items()))
    here = logits_on(model, tokenizer, prompt)
    command = [sys.executable, __file__, "--check", "--model", args.model, "--out", str(args.out)]
    subprocess.run(command + (["--dataset", args.dataset] if args.dataset else []), check=True)
    there = torch.load(args.out / "check.pt", weights_only=True)
    print(f"logits of the new process equal ours: {torch.equal(here, there)}")
    if not torch.equal(here, there):
        sys.exit(f"The reloaded model differs by up to {(here - there).abs().max():.2e}.")

    heading("8. Generate")
    print(f"[sparse + anchors]\n{generate(model, tokenizer, prompt)}")
    with model.disable_adapter():
        print(f"\n[dense]\n{generate(model, tokenizer, prompt)}")
    print(f"\nDone in {time.time() - begun:.0f} s. The adapter is in {args.out}.")


if __name__ == "__main__":
    main()
