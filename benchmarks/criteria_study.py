# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare criteria: what does each cost in quality at the same sparsity, before and after training anchors and gains?

    python benchmarks/criteria_study.py                          # docs/criteria.md's table: half an hour and more
    python benchmarks/criteria_study.py --criteria weighted larosa --sparsity 0.6

S on every token, in all linear layers of the transformer blocks, in fp32. Calibrated and trained (default recipe) on
the training files of Python's standard library, evaluated on the held-out ones. Every row sees the same tokens.
Results are added to a file as they come; a study that was stopped goes on where it was. Prints a Markdown table.
"""

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, calibrate, evaluate


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from recipe_study import BLOCK, blocks, load_texts  # noqa: E402


BATCH = 4
CRITERIA = ["magnitude", "weighted", "topk", "wina", "rsparse", "larosa"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--model", default=str(EXAMPLES / "tiny_llama"), help="folder or Hub id of a causal LM")
    parser.add_argument("--steps", type=int, default=60, help=f"training steps of {BATCH} x {BLOCK} tokens")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/criteria_study.json"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    study = {
        "model": Path(args.model).name,
        "steps": args.steps,
        "tokens_per_step": BATCH * BLOCK,
        "calibration_tokens": args.calibration_tokens,
        "eval_tokens": args.eval_tokens,
        "seed": args.seed,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    found = json.loads(args.out.read_text()) if args.out.exists() else {"study": study, "rows": []}
    if found["study"] != study:
        sys.exit(f"{args.out} holds a study of another setup, {found['study']}; give another file as --out.")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    train_texts, held_out_texts = load_texts(Namespace(train=None))
    calibration = batches(blocks(train_texts, tokenizer, args.calibration_tokens, BLOCK))
    held_out = batches(blocks(held_out_texts, tokenizer, args.eval_tokens, BLOCK))
    rows = blocks(train_texts, tokenizer, args.steps * BATCH * BLOCK, BLOCK).tolist()

    def measure(criterion: str, sparsity: float) -> list[dict]:
        """The untrained and the trained row of a criterion, and the dense one."""
        set_seed(args.seed)
        config = SponConfig(sparsity=sparsity, criterion=criterion, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), config)
        minutes = Minutes()
        calibrate(model, calibration, progress=False)
        calibrating = minutes()
        SponTrainer(
            model,
            SponTrainingConfig(
                "out/criteria_study",
                max_steps=args.steps,
                per_device_train_batch_size=BATCH,
                max_length=BLOCK,
                save_strategy="no",
                report_to=[],
                gradient_checkpointing=False,
                disable_tqdm=True,
                logging_steps=args.steps,
                seed=args.seed,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=tokenizer,
        ).train()
        training = minutes()
        result = evaluate(model, held_out, progress=False)
        key = {"criterion": criterion, "sparsity": sparsity}
        return [
            {"criterion": "dense", "sparsity": 0.0, "trained": False, **renamed(result.dense), "minutes": 0.0},
            {**key, "trained": False, **renamed(result.sparse), "minutes": calibrating},
            {**key, "trained": True, **renamed(result.anchored), "minutes": round(calibrating + training, 2)},
        ]

    def done(criterion: str, sparsity: float) -> bool:
        return any(row["criterion"] == criterion and row["sparsity"] == sparsity for row in found["rows"])

    for sparsity in args.sparsity:
        for criterion in args.criteria:
            if done(criterion, sparsity):
                continue
            new = [row for row in measure(criterion, sparsity) if not done(row["criterion"], row["sparsity"])]
            found["rows"] += new
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(new), flush=True)
    print(table(found["rows"]))


class Minutes:
    """CPU time of this process since the call before, in minutes."""

    def __init__(self):
        self.begun = time.process_time()

    def __call__(self) -> float:
        before, self.begun = self.begun, time.process_time()
        return round((self.begun - before) / 60, 2)


def batches(ids: torch.Tensor) -> list[dict]:
    """Ids, shape (blocks, length), in batches of 8."""
    return [{"input_ids": rows} for rows in ids.split(8)]


def renamed(scores) -> dict:
    """Scores with the realised sparsity apart from the wanted one."""
    scores = asdict(scores)
    return {"realised": scores.pop("sparsity"), **scores}


def table(rows: list[dict]) -> str:
    """Markdown, one line per row."""
    lines = [
        "| sparsity | criterion | anchors and gains | realised | perplexity | KL | top-1 as dense | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["sparsity"], row["trained"])):
        trained = "" if row["criterion"] == "dense" else "trained" if row["trained"] else "none"
        lines.append(
            f"| {row['sparsity']:.0%} | {row['criterion']} | {trained} | {row['realised']:.1%} "
            f"| {row['perplexity']:.3f} ± {row['standard_error']:.3f} | {row['kl']:.4f} "
            f"| {row['top1_agreement']:.1%} | {row['minutes']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
