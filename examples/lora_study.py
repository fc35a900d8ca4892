# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""LoRA and SPON together: which order of training gives the best sparse model for a task? The table of docs/lora.md.

    python examples/lora_study.py                                  # Python's reference manual; an hour on one core
    python examples/lora_study.py --task FILE --separator '<|endoftext|>'

The table says how many steps of 4 x 256 tokens each row was trained: a LoRA on the dense or on the sparse model
(300), anchors by distillation (150, on the task, or on the base's own kind of text before there is a task), both
together on the task's own loss. Held-out text of the task, S active on every token and in all linear layers of the
transformer blocks. Results are added to a file as they come; a study that was stopped goes on where it was.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from lora_task import (
    add_arguments,
    blocks,
    general_texts,
    load_base,
    load_tokenizer,
    lora_config,
    quiet,
    task_texts,
    train_anchors,
    train_lora,
)
from peft import PeftModel, get_peft_model
from transformers import set_seed

from peft_spon import SponConfig, add_lora, calibrate, evaluate, load_with_lora, set_trainable


CALIBRATION_TOKENS = 65536


class Study:
    """The data, and the steps that the recipes are made of."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = load_tokenizer(args.model)
        train, held_out = task_texts(args)
        self.task = blocks(train, self.tokenizer)
        rows = torch.tensor(blocks(held_out, self.tokenizer, args.eval_tokens)["input_ids"])
        self.held_out = [{"input_ids": batch} for batch in rows.split(8)]
        wanted = args.steps * 1024 + CALIBRATION_TOKENS
        self.general = blocks(general_texts(), self.tokenizer, wanted)

    def base(self):
        return load_base(self.args.model)

    def spon(self, model, sparsity: float, anchors: bool = True):
        fields = {} if anchors else {"anchor_modules": [], "gain": False}
        return get_peft_model(model, SponConfig(sparsity=sparsity, task_type="CAUSAL_LM", **fields))

    def calibrate(self, model, data):
        rows = torch.tensor(data["input_ids"][: CALIBRATION_TOKENS // 256])
        calibrate(model, [{"input_ids": batch} for batch in rows.split(8)], on_sparse=True, progress=False)

    def distil(self, model, data, seed):
        train_anchors(model, self.tokenizer, data, self.args.steps, seed)

    def fine_tune(self, model, seed, steps: int | None = None):
        train_lora(model, self.tokenizer, self.task, steps or self.args.lora_steps, seed, self.args.rate)

    def loss(self, model) -> dict[str, float]:
        """Task loss in nats per token: of the model as it is, and of the dense model with its LoRA."""
        result = evaluate(model, self.held_out, progress=False)
        found = result.anchored or result.sparse
        return {
            "loss": math.log(found.perplexity),
            "dense": math.log(result.dense.perplexity),
            "sparsity": found.sparsity,
        }

    # ---- stages that several recipes share: trained once, saved, loaded anew ---------------------------------------

    def once(self, name: str, make) -> Path:
        """The folder of a stage's adapters."""
        folder = self.args.out.parent / "lora_study" / f"{self.args.steps}-{self.args.lora_steps}-{name}"
        if not (folder / "adapter_config.json").exists():
            make().save_pretrained(folder)
        return folder

    def lora_on_dense(self, seed: int):
        def make():
            lora = get_peft_model(self.base(), lora_config(self.args.rank))
            self.fine_tune(lora, seed)
            return lora

        return PeftModel.from_pretrained(self.base(), self.once(f"lora-{seed}", make))

    def repaired(self, sparsity: float, seed: int):
        def make():
            model = self.spon(self.base(), sparsity)
            self.distil(model, self.general, seed)
            return model

        folder = self.once(f"spon-{sparsity}-{seed}", make)
        return PeftModel.from_pretrained(self.base(), folder, is_trainable=True)

    def repaired_then_tuned(self, sparsity: float, seed: int):
        def make():
            model = add_lora(self.repaired(sparsity, seed), lora_config(self.args.rank))
            self.calibrate(model, self.task)
            self.fine_tune(model, seed)
            return model

        return load_with_lora(self.base(), self.once(f"tuned-{sparsity}-{seed}", make), trainable="anchors")


# ---- the recipes: each gives a model with SPON ---------------------------------------------------------------------


def untrained(study: Study, sparsity: float, seed: int):
    """No LoRA, no anchors: what the base makes of the task."""
    model = study.spon(study.base(), sparsity, anchors=False)
    study.calibrate(model, study.task)
    return model


def lora_dense(study: Study, sparsity: float, seed: int):
    """LoRA trained on the dense model, then made sparse."""
    model = study.spon(study.lora_on_dense(seed), sparsity, anchors=False)
    study.calibrate(model, study.task)
    return model


def lora_dense_anchors(study: Study, sparsity: float, seed: int):
    """LoRA trained on the dense model, made sparse, anchors distilled on the task (examples/lora_then_spon.py)."""
    model = study.spon(study.lora_on_dense(seed), sparsity)
    study.distil(model, study.task, seed)
    return model


def lora_sparse(study: Study, sparsity: float, seed: int):
    """Made sparse, LoRA trained on the sparse model; no anchors."""
    model = add_lora(study.spon(study.base(), sparsity, anchors=False), lora_config(study.args.rank))
    study.calibrate(model, study.task)
    study.fine_tune(model, seed)
    return model


def anchors_lora_sparse(study: Study, sparsity: float, seed: int):
    """Anchors distilled on general text, then LoRA trained on the sparse model (examples/spon_then_lora.py)."""
    return study.repaired_then_tuned(sparsity, seed)


def both(study: Study, sparsity: float, seed: int):
    """The same, but anchors and gains are fine-tuned together with the LoRA, on the task's own loss."""
    model = add_lora(study.repaired(sparsity, seed), lora_config(study.args.rank), trainable="both")
    study.calibrate(model, study.task)
    study.fine_tune(model, seed)
    return model


def distil_tune_distil(study: Study, sparsity: float, seed: int):
    """Anchors, LoRA trained sparse, then anchors again on the task, teacher the dense model with that LoRA."""
    model = study.repaired_then_tuned(sparsity, seed)
    study.distil(model, study.task, seed)
    return model


def lora_dense_sparse(study: Study, sparsity: float, seed: int, anchors: bool = False):
    """LoRA trained on the dense model, made sparse, LoRA trained on; no anchors."""
    model = study.spon(study.lora_on_dense(seed), sparsity, anchors)
    study.calibrate(model, study.task)
    set_trainable(model, "both" if anchors else "lora")
    study.fine_tune(model, seed + 1, study.args.steps)
    return model


def lora_dense_both(study: Study, sparsity: float, seed: int):
    """The same, but anchors and gains are trained with the LoRA, on the task's own loss."""
    return lora_dense_sparse(study, sparsity, seed, anchors=True)


# Name: (recipe, its training; {a}: steps of the anchors, {l}: of the LoRA).
RECIPES = {
    "no LoRA, no anchors": (untrained, "none"),
    "LoRA trained dense, no anchors": (lora_dense, "{l} dense"),
    "LoRA trained dense, then anchors": (lora_dense_anchors, "{l} dense, {a} anchors"),
    "LoRA trained sparse, no anchors": (lora_sparse, "{l} sparse"),
    "anchors, then LoRA trained sparse": (anchors_lora_sparse, "{a} anchors, {l} sparse"),
    "anchors, then LoRA and anchors together": (both, "{a} anchors, {l} both sparse"),
    "anchors, LoRA trained sparse, anchors again": (distil_tune_distil, "{a} anchors, {l} sparse, {a} anchors"),
    "LoRA trained dense, then sparse, no anchors": (lora_dense_sparse, "{l} dense, {a} sparse"),
    "LoRA trained dense, then LoRA and anchors together": (lora_dense_both, "{l} dense, {a} both sparse"),
}


def table(results: list[dict], args: argparse.Namespace) -> str:
    """Markdown: one line per recipe; means of the task loss over seeds, half their range, and perplexity."""
    lines = ["| model | steps | " + " | ".join(f"{s:.0%}: loss (perplexity)" for s in args.sparsity) + " |"]
    lines.append("|---" * (len(args.sparsity) + 2) + "|")

    def cell(recipe: str, sparsity: float, key: str) -> str:
        found = [r[key] for r in results if r["recipe"] == recipe and r["sparsity_wanted"] == sparsity]
        if not found:
            return ""
        mean = sum(found) / len(found)
        spread = f" ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else ""
        return f"{mean:.3f}{spread} ({math.exp(mean):.2f})"

    rows = [
        ("dense, no LoRA", "no LoRA, no anchors", "dense"),
        ("dense, LoRA", "LoRA trained dense, no anchors", "dense"),
    ]
    rows += [(f"sparse: {recipe}", recipe, "loss") for recipe in RECIPES]
    for label, recipe, key in rows:
        steps = RECIPES[recipe][1].format(a=args.steps, l=args.lora_steps)
        cells = [label, steps, *(cell(recipe, s, key) for s in args.sparsity)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the LoRA")
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("out/lora_study.jsonl"))
    args = parser.parse_args()
    quiet()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    study, results = Study(args), []
    task = args.task.name if args.task else "reference manual"
    for seed in args.seeds:
        for sparsity in args.sparsity:
            for recipe in args.recipes:
                key = {
                    "task": task,
                    "recipe": recipe,
                    "sparsity_wanted": sparsity,
                    "seed": seed,
                    "steps": args.steps,
                    "lora_steps": args.lora_steps,
                }
                found = next((r for r in done if all(r.get(k) == v for k, v in key.items())), None)
                if found is None:
                    set_seed(seed)
                    begun = time.time()
                    found = {
                        **key,
                        **study.loss(RECIPES[recipe][0](study, sparsity, seed)),
                        "seconds": round(time.time() - begun),
                    }
                    with args.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                    print(json.dumps(found), flush=True)
                results.append(found)
    print(f"\n{Path(args.model).name}, task: {task}\n")
    print(table(results, args))


if __name__ == "__main__":
    main()
