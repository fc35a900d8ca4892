# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory and time of the distillation loss and its backward: full logits against chunks.

    python benchmarks/loss_memory.py

Each way runs in its own process; memory is the peak resident size above what the inputs and the head took (on a GPU:
the allocator's peak).
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from peft_spon.losses import OutputHead, compare_hidden, compare_logits


def run(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradient of one way; on a CPU `ru_maxrss` only grows, so nothing larger may have happened before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = OutputHead(torch.randn(args.vocabulary, args.hidden, device=device) * 0.02)
    teacher = torch.randn(args.tokens, args.hidden, device=device)
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    labels = torch.randint(args.vocabulary, (args.tokens,), device=device)
    first = memory(device)
    seconds = []
    for _ in range(args.repeat):
        student.grad = None
        begun = time.perf_counter()
        if args.way == "chunked":
            result = compare_hidden(student, teacher, labels, head)
        else:
            with torch.no_grad():
                teacher_logits = teacher @ head.weight.t()
            result = compare_logits(student @ head.weight.t(), teacher_logits, labels)
        loss = result.kl.mean()
        loss.backward()
        norm = student.grad.norm().item()
        seconds.append(time.perf_counter() - begun)
        del result
    return {
        "gib": (memory(device) - first) / 2**30,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "kl": loss.item(),
        "gradient": norm,
    }


def memory(device: str) -> int:
    """Peak bytes so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=("full", "chunked"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args)))
        return
    print(f"{args.tokens} tokens x {args.vocabulary} vocabulary, hidden {args.hidden}, fp32, forward and backward")
    results = {}
    for way in ("full", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{way:8} {{gib:6.2f}} GiB  {{seconds:6.2f}} s  kl {{kl:.6f}}  |gradient| {{gradient:.6e}}".format(
                **results[way]
            )
        )
    full, chunked = results["full"], results["chunked"]
    print(
        f"chunked takes 1/{full['gib'] / chunked['gib']:.0f} of the memory and "
        f"{chunked['seconds'] / full['seconds']:.2f} of the time"
    )


if __name__ == "__main__":
    main()
