# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own: greedy tokens and log-probabilities of prompts, as JSON.

python tests/vllm_worker.py '{"folder": ..., "out": ..., "prompts": [[5, 6], [7]], "tokens": 16, "at_once": [20, 1]}'
"""

import json
import os
import sys


os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING", OMP_NUM_THREADS="1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(job):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "seed": 0, "max_num_seqs": 20}
    llm = LLM(job["folder"], **(settings | job.get("engine", {})))
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    lora = LoRARequest("lora", 1, job["lora"]) if "lora" in job else None
    ways = []
    for at_once in job.get("at_once", [len(job["prompts"])]):
        answers = []
        for start in range(0, len(job["prompts"]), at_once):
            prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"][start : start + at_once]]
            answers += [
                result.outputs[0] for result in llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
            ]
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            for answer in answers
        ]
        ways.append({"tokens": tokens, "logprobs": logprobs})
    with open(job["out"], "w") as file:
        json.dump({"answers": ways}, file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
