# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole job on a real model: make it sparse, see the damage, repair it with anchors, save, load, generate."""

import copy
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, set_seed

from ..allocation import allocate
from ..calibration import calibrate
from ..config import SponConfig
from ..data import check_sizes
from ..evaluation import evaluate
from ..evaluation.speed import measure_speed
from ..texts import STDLIB, read_divided
from .fit import as_dataset
from .models import check_new, load_plain, pick_device


TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama"
SMALL_ON_HUB = "HuggingFaceTB/SmolLM2-135M"
CHECK = "import sys; from peft_spon.cli.demo import save_logits; save_logits(*sys.argv[1:])"


def demo(
    model: str | None = None,
    data: str = STDLIB,
    out: Path = Path("out/demo"),
    sparsity: float = 0.6,
    steps: int = 150,
    batch_size: int = 4,
    max_length: int = 256,
    eval_tokens: int = 32768,
    learning_rate: float | None = None,
    text_column: str = "text",
    seed: int = 0,
    short: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """The whole job on a small model: sparsify, see the damage, train anchors, save, load, generate.

    Prints KL to the dense model, top-1 agreement, perplexity and realised sparsity on held-out text, S on every token
    and in all linear layers of the transformer blocks. In a clone of the repository the model is the 5 M Llama that
    comes with it (3 minutes on 2 cores), elsewhere SmolLM2-135M from the Hub.

    Examples:
        peft-spon demo --short
        peft-spon demo --model HuggingFaceTB/SmolLM2-135M --data Salesforce/wikitext:wikitext-2-raw-v1
        peft-spon demo --data novel.txt --sparsity 0.5 --out out/novel

    Args:
        model: folder or Hub name of a causal language model.
        data: a text file, a folder of them, a saved data set, a data set's name on the Hub (owner/name or
            owner/name:configuration), or python-stdlib, the source of Python's standard library. A part is held out.
        out: folder for the adapter.
        sparsity: share of the layers' inputs that S zeroes, of all layers together.
        steps: training steps of --batch-size times --max-length tokens.
        batch_size: blocks per step.
        max_length: tokens per block in training and evaluation.
        eval_tokens: held-out tokens to measure on.
        learning_rate: peak rate of the anchors. Default the recipe's.
        text_column: column with the texts, for data with columns.
        seed: of the training.
        short: 20 steps and 16384 held-out tokens, to see that all works.
        force: write over what is in --out.
    """
    from ..trainer import SponTrainer
    from ..trainer_config import SponTrainingConfig

    check_sizes(steps=steps, batch_size=batch_size, max_length=max_length)
    check_new(out, force)
    if short:
        steps, eval_tokens = 20, 16384
    model = model or small_model()
    begun = time.time()
    set_seed(seed)
    prompt = "def __init__(self, name, value):\n" if data == STDLIB else "The history of"

    heading(f"1. Load {Path(model).name} and its text")
    train_texts, held_out = read_divided(data, text_column=text_column)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = load_base(model)
    print(
        f"{base.num_parameters() / 1e6:.1f} M parameters; {len(train_texts)} training texts, {len(held_out)} held out"
    )
    size = {"batch_size": 8, "max_length": max_length}

    heading(f"2. Sparsify to {sparsity:.0%} and calibrate")
    spon = get_peft_model(base, SponConfig(sparsity=sparsity, task_type="CAUSAL_LM"))
    spon.print_trainable_parameters()
    print(calibrate(spon, train_texts, tokenizer, max_tokens=8192, **size))

    heading("3. Plain magnitude sparsity, every layer alike: what there is to repair")
    # Fitted to the sparse model, or it would zero more than was asked for, and look worse than it is.
    allocate(spon, train_texts, tokenizer, method="uniform", max_length=max_length)
    magnitude = evaluate(spon, held_out, tokenizer, max_tokens=eval_tokens, **size)
    print(magnitude)

    heading("4. Spread the sparsity: more where it costs little, less where it costs much")
    print(allocate(spon, train_texts, tokenizer, max_length=max_length))

    heading(f"5. Train the anchors: {steps} steps of {batch_size} x {max_length} tokens")
    # At least four characters go to a token: enough text for the steps, and no more, is tokenised.
    lengths = itertools.accumulate(len(text) for text in train_texts)
    count = sum(1 for length in lengths if length < 8 * steps * batch_size * max_length) + 1
    rows = as_dataset(train_texts[:count], "text")
    trainer = SponTrainer(
        model=spon,
        args=SponTrainingConfig(
            output_dir=str(out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            packing=True,
            packing_strategy="wrapped",
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            seed=seed,
            disable_tqdm=not sys.stderr.isatty(),
            **({} if learning_rate is None else {"learning_rate": learning_rate}),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()

    heading("6. Dense, sparse, sparse with anchors, on held-out text")
    result = evaluate(spon, held_out, tokenizer, max_tokens=eval_tokens, **size)
    print(result)
    print(
        f"KL to dense: magnitude sparsity {magnitude.sparse.kl:.4f}, ours without anchors "
        f"{result.sparse.kl:.4f}, with anchors {result.anchored.kl:.4f}."
    )
    damage = magnitude.sparse.perplexity - magnitude.dense.perplexity
    removed = (magnitude.sparse.perplexity - result.anchored.perplexity) / damage
    print(
        f"Perplexity: dense {result.dense.perplexity:.3f}, magnitude sparsity {magnitude.sparse.perplexity:.3f}, ours "
        f"{result.anchored.perplexity:.3f}: {removed:.0%} of magnitude's damage is gone."
    )

    heading("7. Save, and load into a fresh base in a new process")
    spon.save_pretrained(out)
    files = {path.name: path.stat().st_size for path in sorted(out.glob("adapter*"))}
    print(f"saved {out}: " + ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in files.items()))
    here = logits_on(spon, tokenizer, prompt)
    check = out / "check.pt"
    subprocess.run([sys.executable, "-c", CHECK, model, str(out), prompt, str(check)], check=True)
    there = torch.load(check, weights_only=True)
    check.unlink()
    print(f"logits of the new process equal ours: {torch.equal(here, there)}")
    if not torch.equal(here, there):
        raise RuntimeError(f"The reloaded model differs by up to {(here - there).abs().max():.2e}.")

    heading("8. Generate")
    print(f"[sparse + anchors]\n{generate(spon, tokenizer, prompt)}")
    with spon.disable_adapter():
        print(f"\n[dense]\n{generate(spon, tokenizer, prompt)}")

    heading("9. Speed of decoding, one sequence")
    dense = copy.deepcopy(spon).unload()
    print(spon.prepare_for_decode())
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(spon.device)
    speeds = measure_speed({"dense": lambda: dense, "sparse": lambda: spon}, ids)
    dense_speed, sparse_speed = speeds["dense"].tokens_per_second, speeds["sparse"].tokens_per_second
    print(
        f"{dense_speed:.1f} tokens per second dense, {sparse_speed:.1f} sparse with anchors "
        f"({sparse_speed / dense_speed:.2f} times as fast) on {torch.get_num_threads()} threads, "
        f"{str(spon.dtype).removeprefix('torch.')}. What is around the layers (Python, attention) gets no faster, and "
        "in a small model that is most of the time."
    )
    print(f"\nDone in {time.time() - begun:.0f} s. The adapter is in {out}.")
    found = {"magnitude": magnitude, "evaluation": result, "speed": speeds}
    return {"out": out, "model": model, **found}


def small_model() -> str:
    """The Llama of the repository, where this is run or imported in a clone of it, or else a model on the Hub."""
    clones = Path.cwd(), TINY_LLAMA.parents[1]
    folders = [clone / "examples" / "tiny_llama" for clone in clones]
    return next((str(folder) for folder in folders if (folder / "config.json").exists()), SMALL_ON_HUB)


def heading(text: str) -> None:
    print(f"\n## {text}", flush=True)


def load_base(name: str) -> nn.Module:
    """fp32 on a CPU, bf16 elsewhere."""
    device = pick_device("auto")
    return load_plain(name, "float32" if device == "cpu" else "bfloat16", device)


def save_logits(model: str, adapter: str, prompt: str, path: str) -> None:
    """What the adapter, loaded onto a fresh base, gives for a prompt, into a file."""
    loaded = PeftModel.from_pretrained(load_base(model), adapter)
    torch.save(logits_on(loaded, AutoTokenizer.from_pretrained(model), prompt), path)


@torch.no_grad()
def logits_on(model: nn.Module, tokenizer: Any, text: str) -> torch.Tensor:
    """Logits of a text, fp32 on the CPU, shape (1, tokens, vocabulary)."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    return model(input_ids=ids).logits.float().cpu()


def generate(model: nn.Module, tokenizer: Any, prompt: str) -> str:
    """The prompt and what the model says after it."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])
