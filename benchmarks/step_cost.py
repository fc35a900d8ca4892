# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training step costs: SPON's (teacher, student, backward) against a LoRA SFT step plus one forward.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --model HuggingFaceTB/SmolLM2-135M --batch 2 --length 1024

Medians of interleaved steps on the same model and batch. LoRA is of rank 8 on all linear layers.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_spon import SponConfig, calibrate
from peft_spon.distillation import SelfDistillation


TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny_llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LLAMA))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    ids = torch.randint(3, base.config.vocab_size, (args.batch, args.length), device=device)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(copy.deepcopy(base), lora).train()

    def lora_step() -> None:
        lora(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        lora.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        base(input_ids=ids, use_cache=False)

    def spon_step(**fields):
        model = get_peft_model(copy.deepcopy(base), SponConfig(sparsity=0.6, **fields))
        calibrate(model, [ids], progress=False)
        model.train()
        distillation = SelfDistillation(model.get_base_model(), 1.0)

        def step() -> None:
            with distillation:
                model(input_ids=ids, distill_labels=ids, use_cache=False)["kl"].mean().backward()
            model.zero_grad()

        return step

    ways = {
        "LoRA step": lora_step,
        "forward": forward,
        "SPON step": spon_step(),
        "SPON step, no gain": spon_step(gain=False),
    }
    seconds = {name: [] for name in ways}
    for round_number in range(args.rounds + 2):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number > 1:
                seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    yardstick = median["LoRA step"] + median["forward"]
    for name, value in median.items():
        print(f"{name:20} {value * 1000:8.1f} ms   {value / yardstick:5.2f} x (LoRA step + forward)")


if __name__ == "__main__":
    main()
