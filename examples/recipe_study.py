# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""Compare training recipes: how much of the damage of `magnitude` sparsity does each one remove?

    python examples/recipe_study.py                              # the default and the published recipe, 3 seeds
    python examples/recipe_study.py --study variants --seeds 0 --steps 100 --sparsity 0.6
    python examples/recipe_study.py --model FOLDER --train FILE --held-out FILE --separator '<|endoftext|>'

Every recipe of a table sees the same number of training tokens, has the same sparsity in all linear layers of the
transformer blocks, S active on every token, and the same held-out text. Results are added to a file as they come; a
study that was stopped goes on where it was. The table printed at the end is that of docs/recipe.md.
"""

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from stdlib_data import stdlib_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, allocate, calibrate, evaluate
from peft_spon.data import iter_batches


TINY_LLAMA = Path(__file__).resolve().parent / "tiny_llama"
BLOCK = 256

# Name: (SponConfig fields, SponTrainingConfig fields) that differ from the default.
VARIANTS = {
    "default": ({}, {}),
    "every layer alike": ({}, {}),
    "greedy allocation": ({}, {}),
    "no gain": ({"gain": False}, {}),
    "no recalibration": ({}, {"recalibrations": 0}),
    "no gain, no recalibration": ({"gain": False}, {"recalibrations": 0}),
    "input-side anchors": ({"anchor_space": "input"}, {}),
    "weighted": ({"criterion": "weighted"}, {}),
    "relative": ({"criterion": "relative"}, {}),
    "topk": ({"criterion": "topk"}, {}),
    "wina": ({"criterion": "wina"}, {}),
    "robust": ({"criterion": "robust"}, {}),
    "absolute learning rate 2e-2": ({}, {"relative_learning_rate": False, "learning_rate": 2e-2}),
    "absolute learning rate 1e-3": (
        {},
        {"relative_learning_rate": False, "learning_rate": 1e-3, "gain_learning_rate": 1e-3},
    ),
    "learning rates / 3": ({}, {"learning_rate": 0.067, "gain_learning_rate": 0.0033}),
    "learning rates x 3": ({}, {"learning_rate": 0.6, "gain_learning_rate": 0.03}),
    "cosine schedule": ({}, {"lr_scheduler_type": "cosine"}),
    "no warm-up": ({}, {"warmup_share": 0.0}),
    "temperature 2": ({}, {"temperature": 2.0}),
    "repair LoRA": ({}, {"repair_lora": 16}),
    "repair LoRA, rate 3e-3": ({}, {"repair_lora": 16, "repair_lora_learning_rate": 3e-3}),
    "repair LoRA, rate 1e-2": ({}, {"repair_lora": 16, "repair_lora_learning_rate": 1e-2}),
}
# How the sparsity is spread over the layers before the training; by default "kl".
METHODS = {"every layer alike": "uniform", "greedy allocation": "greedy"}
STUDIES = {"main": ["default", "published"], "variants": list(VARIANTS)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="main", choices=sorted(STUDIES))
    parser.add_argument("--recipes", nargs="+", help="names of recipes, instead of a study's")
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or Hub id of a causal language model")
    parser.add_argument("--train", help="text file to train on; default: the standard library's training files")
    parser.add_argument("--held-out", help="text file to evaluate on")
    parser.add_argument("--separator", default="\n\n", help="what separates the texts in these files")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="steps of 4 x 256 tokens (published: of 8 x 128)")
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("out/recipe_study.jsonl"))
    return parser.parse_args()


def load_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts, each in a fixed random order."""
    if args.train is None:
        splits = [list(stdlib_texts(split).values()) for split in ("train", "held_out")]
    else:
        files = [Path(name).read_text() for name in (args.train, args.held_out)]
        splits = [[text.strip() for text in file.split(args.separator) if text.strip()] for file in files]
    for texts in splits:
        random.Random(0).shuffle(texts)
    return splits[0], splits[1]


def blocks(texts: list[str], tokenizer, tokens: int, length: int) -> torch.Tensor:
    """Token ids, shape (blocks, length), of the first texts, joined."""
    batches = iter_batches(texts, tokenizer, batch_size=1, max_length=length, max_tokens=tokens)
    return torch.cat([batch["input_ids"] for batch in batches if batch["input_ids"].shape[1] == length])


def magnitude(base, sparsity: float, train: list[dict], held_out: list[dict]) -> dict:
    """Perplexity of plain `magnitude` sparsity, with thresholds from dense and from sparse activations."""
    found = {}
    for on_sparse in (False, True):
        config = SponConfig(sparsity=sparsity, criterion="magnitude", anchor_modules=[], gain=False)
        model = get_peft_model(copy.deepcopy(base), config)
        calibrate(model, train[:32], on_sparse=on_sparse, progress=False)
        result = evaluate(model, held_out, progress=False)
        name = "refitted" if on_sparse else "magnitude"
        found[name] = result.sparse.perplexity
        found[f"{name}_sparsity"] = result.sparse.sparsity
        found[f"{name}_kl"], found[f"{name}_top1"] = result.sparse.kl, result.sparse.top1_agreement
    return {"recipe": "none", "seed": 0, "dense": result.dense.perplexity, **found}


def train(base, tokenizer, recipe: str, sparsity: float, seed: int, texts: list[str], held_out, args) -> dict:
    """Train one recipe and measure it."""
    set_seed(seed)
    length, batch = (128, 8) if recipe == "published" else (BLOCK, 4)
    rows = blocks(texts, tokenizer, args.steps * length * batch + 65536, length)
    common = {
        "max_steps": args.steps,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "save_strategy": "no",
        "report_to": [],
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": args.steps,
        "seed": seed,
    }
    if recipe == "published":
        config, training = SponConfig.published(sparsity=sparsity), SponTrainingConfig.published("out/study", **common)
    else:
        fields, dials = VARIANTS[recipe]
        config = SponConfig(sparsity=sparsity, **fields)
        training = SponTrainingConfig("out/study", **{**common, **dials})
    model = get_peft_model(copy.deepcopy(base), config)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    if recipe != "published":  # its thresholds are those of the dense model
        allocate(model, data, method=METHODS.get(recipe, "kl"), max_length=length, progress=False)
    trainer = SponTrainer(
        model,
        training,
        train_dataset=data,
        processing_class=tokenizer,
    )
    begun = time.time()
    trainer.train()
    seconds = time.time() - begun
    result = evaluate(model, held_out, progress=False)
    return {
        "recipe": recipe,
        "seed": seed,
        "tokens": args.steps * length * batch,
        "sparse": result.sparse.perplexity,
        "anchored": result.anchored.perplexity,
        "sparse_kl": result.sparse.kl,
        "kl": result.anchored.kl,
        "top1": result.anchored.top1_agreement,
        "realised": result.anchored.sparsity,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds),
    }


def table(results: list[dict], recipes: list[str], sparsities: list[float]) -> str:
    """Markdown: one line per sparsity and recipe, means over seeds with the range of the share."""
    lines = [
        "| sparsity | recipe | realised | KL with anchors and gains off, on | top-1 as dense | perplexity "
        "| share of the damage removed | of refitted's | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in sparsities:
        plain = next(r for r in results if r["sparsity"] == sparsity and r["recipe"] == "none")
        lines.append(f"| {sparsity:.0%} | dense | 0.0 % | | | {plain['dense']:.3f} | | | |")
        for name, label in (("magnitude", "magnitude"), ("refitted", "magnitude, refitted thresholds")):
            realised, kl, top1 = (plain[f"{name}_{what}"] for what in ("sparsity", "kl", "top1"))
            row = f"| {sparsity:.0%} | {label} | {realised:.1%} | {kl:.3f} | {top1:.1%} | {plain[name]:.3f} | | | |"
            lines.append(row)
        for recipe in recipes:
            runs = [r for r in results if r["sparsity"] == sparsity and r["recipe"] == recipe]
            if not runs:
                continue
            shares = [share(r["anchored"], plain, "magnitude") for r in runs]
            against = statistics.mean(share(r["anchored"], plain, "refitted") for r in runs)
            spread = "" if len(runs) == 1 else f" ({min(shares):.1%} to {max(shares):.1%})"
            lines.append(
                f"| {sparsity:.0%} | {recipe} | {statistics.mean(r['realised'] for r in runs):.1%} "
                f"| {statistics.mean(r['sparse_kl'] for r in runs):.3f}, {statistics.mean(r['kl'] for r in runs):.3f} "
                f"| {statistics.mean(r['top1'] for r in runs):.1%} "
                f"| {statistics.mean(r['anchored'] for r in runs):.3f} | {statistics.mean(shares):.1%}{spread} "
                f"| {against:.1%} | {len(runs)} |"
            )
    return "\n".join(lines)


def share(perplexity: float, plain: dict, against: str) -> float:
    """Part of the perplexity damage of plain magnitude sparsity that is gone."""
    return (plain[against] - perplexity) / (plain[against] - plain["dense"])


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipes = args.recipes or STUDIES[args.study]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    texts, held_out_texts = load_texts(args)
    calibration = [{"input_ids": rows} for rows in blocks(texts, tokenizer, 65536, BLOCK).split(8)]
    held_out = [{"input_ids": rows} for rows in blocks(held_out_texts, tokenizer, args.eval_tokens, BLOCK).split(8)]

    key = {"model": Path(args.model).name, "steps": args.steps}
    plan = [("none", sparsity, 0) for sparsity in args.sparsity]
    plan += [(recipe, sparsity, seed) for seed in args.seeds for sparsity in args.sparsity for recipe in recipes]
    results = []
    for recipe, sparsity, seed in plan:
        wanted = {**key, "sparsity": sparsity, "recipe": recipe, "seed": seed}
        found = next((r for r in done if all(r.get(k) == v for k, v in wanted.items())), None)
        if found is None:
            if recipe == "none":
                found = magnitude(base, sparsity, calibration, held_out)
            else:
                found = train(base, tokenizer, recipe, sparsity, seed, texts, held_out, args)
            found = {**key, "sparsity": sparsity, **found}
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
        results.append(found)
    print(f"\n{key['model']}, {args.steps} steps, {args.eval_tokens} held-out tokens\n")
    print(table(results, recipes, args.sparsity))


if __name__ == "__main__":
    main()
