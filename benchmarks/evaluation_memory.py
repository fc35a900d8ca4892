# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of `evaluate`, against a forward without logits and one with them, at a large vocabulary.

    python benchmarks/evaluation_memory.py

Each way runs in its own process; memory is the peak resident size above what it was before the model was made (on a
GPU: the allocator's peak). The model has random weights and the shape of Gemma 3 270M, but fewer blocks.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_spon import SponConfig, dense_mode, evaluate


WAYS = ("without logits", "with logits", "evaluate")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, float]:
    """One way; on a CPU `ru_maxrss` only grows, so nothing larger may have happened before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.randn(8, 8, device=device) @ torch.randn(8, 8, device=device)
    first = memory(device)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2048,
        num_hidden_layers=args.blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).eval()
    # Made in place: the usual initialisation holds the tied embedding twice for a moment, which would be the peak.
    base.to_empty(device=device).tie_weights()
    for parameter in base.parameters():
        parameter.normal_(0, 0.02)
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)
    model = get_peft_model(base, SponConfig(criterion="topk"))
    ids = torch.randint(args.vocabulary, (args.rows, args.tokens), device=device)
    begun = time.perf_counter()
    if args.way == "evaluate":
        evaluate(model, [ids], progress=False)
    else:
        with dense_mode(model):
            model(input_ids=ids, logits_to_keep=1 if args.way == "without logits" else 0)
    return {"gib": (memory(device) - first) / 2**30, "seconds": time.perf_counter() - begun}


def memory(device: str) -> int:
    """Peak bytes so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args)))
        return
    print(
        f"{args.rows} x {args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, fp32, with weights"
    )
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = found[way]["gib"] / found[WAYS[0]]["gib"]
        print(f"{way:15} {found[way]['gib']:6.2f} GiB ({ratio:.2f} x)  {found[way]['seconds']:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
