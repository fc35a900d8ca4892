# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a merged folder in vLLM, and of its dense base, at several numbers of running requests.

    python benchmarks/bench_vllm.py FOLDER --requests 1 2 8

An engine per process. `--random DIR` writes two folders to measure first: a dense Llama with
random weights (4 blocks of TinyLlama-1.1B's shapes), and the same, merged at 50 % (`magnitude`, anchors and gains).
Milliseconds of CPU time per decode step: with one thread that is what an idle core takes.
"""

import argparse
import os
import time


os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def random_folders(root, sparsity):
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_spon import SponConfig, calibrate

    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=2000, max_position_embeddings=512))
    base.save_pretrained(f"{root}/dense")
    model = get_peft_model(base, SponConfig(sparsity=sparsity, criterion="magnitude", init_weights=False))
    calibrate(model, [{"input_ids": torch.randint(3, 2000, (2, 64))}], progress=False)
    model.merge_and_unload().save_pretrained(f"{root}/merged")


def measure(folder, requests, tokens, dtype, compiled):
    from vllm import LLM, SamplingParams

    engine = {"max_model_len": 256, "max_num_seqs": max(requests), "enforce_eager": not compiled, "seed": 0}
    llm = LLM(folder, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, **engine)
    for count in requests:
        prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8]} for i in range(count)]

        def seconds(length, prompts=prompts):
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            start = time.process_time()
            llm.generate(prompts, sampling, use_tqdm=False)
            return time.process_time() - start

        seconds(4)
        steps = min(seconds(tokens + 1) - seconds(1) for _ in range(3)) / tokens
        print(f"{folder}: {count} requests, {dtype}: {1000 * steps:.2f} ms per step", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a merged folder, or a dense model's")
    parser.add_argument("--random", metavar="DIR", help="write DIR/dense and DIR/merged, and measure nothing")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of DIR/merged")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default, which compiles the model first")
    args = parser.parse_args()
    if args.random:
        random_folders(args.random, args.sparsity)
    else:
        measure(args.folder, args.requests, args.tokens, args.dtype, args.compiled)


if __name__ == "__main__":
    main()
