# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["peft_spon[train]"]
# ///
"""I have a LoRA model; make it sparse and repair it.

    python examples/lora_then_spon.py                       # tiny Llama, Python's reference manual: about 5 minutes
    python examples/lora_then_spon.py --lora FOLDER         # with a LoRA that you have already
    python examples/lora_then_spon.py --model HuggingFaceTB/SmolLM2-135M --task my_texts.txt

Fine-tunes a LoRA on the dense model, puts SPON over it, distils anchors (teacher: the dense model with the LoRA, so
that what it has learned is kept), fine-tunes LoRA and anchors together on the sparse model (`--both-steps 0`: not),
saves both adapters, loads them back, merges, and checks that all give the same.
"""

import argparse
import math
from pathlib import Path

import torch
from lora_task import (
    add_arguments,
    blocks,
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

from peft_spon import SponConfig, calibrate, evaluate, load_with_lora, set_trainable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lora", help="folder or Hub id of a LoRA for the model, instead of training one")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--both-steps", type=int, default=150, help="steps for LoRA and anchors together")
    parser.add_argument("--out", type=Path, default=Path("out/lora_then_spon"))
    args = parser.parse_args()
    quiet()
    set_seed(0)
    tokenizer = load_tokenizer(args.model)
    train, held_out = (blocks(texts, tokenizer) for texts in task_texts(args))
    test = [{"input_ids": rows} for rows in torch.tensor(held_out["input_ids"][:128]).split(8)]

    # 1. A LoRA, as PEFT and TRL make it.
    if args.lora:
        lora = PeftModel.from_pretrained(load_base(args.model), args.lora)
    else:
        lora = get_peft_model(load_base(args.model), lora_config(args.rank))
        train_lora(lora, tokenizer, train, args.lora_steps)

    # 2. SPON over it: the LoRA, now called "task", lies beneath.
    model = get_peft_model(lora, SponConfig(sparsity=args.sparsity, task_type="CAUSAL_LM"))
    calibrate(model, [{"input_ids": rows} for rows in torch.tensor(train["input_ids"][:256]).split(8)])
    train_anchors(model, tokenizer, train, args.steps)
    result = evaluate(model, test)
    print(f"\nPerplexity on held-out text of the task, LoRA everywhere, {args.sparsity:.0%} of all inputs zeroed:")
    print(result)
    dense, repaired = math.log(result.dense.perplexity), math.log(result.anchored.perplexity)
    print(f"Task loss in nats per token: dense {dense:.3f}, sparse with anchors {repaired:.3f}.")

    # 3. The task's own loss, on the sparse model: LoRA and anchors learn together.
    if args.both_steps:
        set_trainable(model, "both")
        train_lora(model, tokenizer, train, args.both_steps, seed=1)
        tuned = math.log(evaluate(model, test).anchored.perplexity)
        print(f"LoRA and anchors fine-tuned together on the sparse model: {tuned:.3f}.")

    # 4. Two folders: out/ loads as a SPON adapter, out/task as a LoRA, each alone or both together.
    model.save_pretrained(args.out)
    again = load_with_lora(load_base(args.model), args.out).eval()
    ids = test[0]["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        same = torch.equal(again(ids).logits, wanted)
        # 5. For serving: LoRA into W, anchors into b, S stays active.
        merged = again.merge_and_unload()
        # Merging rounds differently, and an input entry at a threshold may fall on its other side.
        difference = ((merged(ids).logits - wanted).norm() / wanted.norm()).item()
    merged.save_pretrained(args.out / "merged")
    print(f"\nsaved in {args.out}; loaded back: {'equal' if same else 'DIFFERENT'} logits")
    print(f"merged in {args.out / 'merged'}: {type(merged).__name__}, logits within {difference:.0e} (relative norm)")


if __name__ == "__main__":
    main()
