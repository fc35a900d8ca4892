# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""The whole job on a real model: make it sparse, see the damage, repair it with anchors, save, load, generate.

    python examples/quickstart.py                  # the embedded 5 M Llama, about 3 minutes on 2 cores
    python examples/quickstart.py --short          # the same with few steps, for a first look
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M \
        --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1

Prints KL to the dense model, top-1 agreement, perplexity (with its standard error) and realised sparsity on held-out
text, with S active on every token and in all linear layers of the transformer blocks. The job itself is in
`peft_spon/cli/demo.py`; `peft-spon demo` is the same command, from anywhere.
"""

import argparse
from pathlib import Path

from peft_spon.cli import quiet_libraries
from peft_spon.cli.demo import TINY_LLAMA, demo
from peft_spon.texts import STDLIB


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset", default=STDLIB, help="Hub id of a text data set, or a text file")
    parser.add_argument("--dataset-config", help="configuration of the data set, if it has several")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=150, help="training steps of batch x block tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=256, help="tokens per block in training and evaluation")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="held-out tokens to evaluate on")
    parser.add_argument("--lr", type=float, help="learning rate of the anchors; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="where the adapter is saved")
    parser.add_argument("--short", action="store_true", help="few steps and little text, to see that all works")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    with quiet_libraries():
        demo(
            model=args.model,
            data=f"{args.dataset}:{args.dataset_config}" if args.dataset_config else args.dataset,
            out=args.out,
            sparsity=args.sparsity,
            steps=args.steps,
            batch_size=args.batch,
            max_length=args.block,
            eval_tokens=args.eval_tokens,
            learning_rate=args.lr,
            text_column=args.text_column,
            seed=args.seed,
            short=args.short,
            force=True,
        )
