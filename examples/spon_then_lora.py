# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""I have a SPON-sparse model; fine-tune it for my task, and merge everything for serving.

    python examples/spon_then_lora.py                       # tiny Llama, Python's reference manual: about 6 minutes
    python examples/spon_then_lora.py --spon FOLDER         # with a SPON adapter that you have already
    python examples/spon_then_lora.py --trainable lora      # the anchors stay as they are
    python examples/spon_then_lora.py --distil-again        # and anchors once more, on the task

Distils anchors on general text, slides a LoRA beneath, fine-tunes both with TRL's SFTTrainer while S is active, and
merges. `--distil-again` distils the anchors once more before that, from the dense model with the LoRA: worth a try
where that model is the better one at the task, see the table that is printed and docs/lora.md.
"""

import argparse
import math
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
from transformers import AutoModelForCausalLM, set_seed

from peft_spon import SponConfig, add_lora, calibrate, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--spon", help="folder or Hub id of a SPON adapter for the model, instead of training one")
    parser.add_argument("--trainable", default="both", choices=["lora", "both"])
    parser.add_argument("--distil-again", action="store_true", help="anchors once more, on the task")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("out/spon_then_lora"))
    args = parser.parse_args()
    quiet()
    set_seed(0)
    tokenizer = load_tokenizer(args.model)
    train, held_out = (blocks(texts, tokenizer) for texts in task_texts(args))
    test = [{"input_ids": rows} for rows in torch.tensor(held_out["input_ids"][:128]).split(8)]
    calibration = [{"input_ids": rows} for rows in torch.tensor(train["input_ids"][:256]).split(8)]

    def report(stage: str) -> None:
        result = evaluate(model, test, progress=False)
        dense, sparse = (math.log(scores.perplexity) for scores in (result.dense, result.anchored))
        print(f"{stage:<40} dense {dense:.3f}   sparse {sparse:.3f}", flush=True)

    print(f"Task loss in nats per token, held-out text, {args.sparsity:.0%} of all inputs zeroed:")
    # 1. A sparse model, repaired on general text.
    if args.spon:
        model = PeftModel.from_pretrained(load_base(args.model), args.spon)
    else:
        model = get_peft_model(load_base(args.model), SponConfig(sparsity=args.sparsity, task_type="CAUSAL_LM"))
        train_anchors(model, tokenizer, blocks(general_texts(), tokenizer, args.steps * 1024 + 65536), args.steps)
    report("SPON")

    # 2. A LoRA beneath; thresholds fitted to the task; TRL trains it on the sparse model.
    add_lora(model, lora_config(args.rank), trainable=args.trainable)
    calibrate(model, calibration, on_sparse=True, progress=False)
    train_lora(model, tokenizer, train, args.lora_steps)
    report(f"fine-tuned sparse ({args.trainable})")

    # 3. Anchors again, from the dense model with what the LoRA has learned.
    if args.distil_again:
        train_anchors(model, tokenizer, train, args.steps)
        report("anchors distilled again on the task")

    model.save_pretrained(args.out)
    ids = test[0]["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        merged = model.merge_and_unload()
        merged.save_pretrained(args.out / "merged")
        served = AutoModelForCausalLM.from_pretrained(args.out / "merged").to(ids.device)
        # Merging rounds differently, and an input entry at a threshold may fall on its other side.
        difference = ((served(ids).logits - wanted).norm() / wanted.norm()).item()
    print(f"\nadapters in {args.out} and {args.out / 'task'}, merged model in {args.out / 'merged'}")
    print(f"the merged model, loaded by transformers: logits within {difference:.0e} (relative norm)")


if __name__ == "__main__":
    main()
