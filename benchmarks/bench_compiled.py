# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Does torch.compile make decoding faster, of the dense model and of a prepared sparse one?

    python benchmarks/bench_compiled.py --model FOLDER --threads 1 --cpu-time
    python benchmarks/bench_compiled.py --preset llama-3.2-1b
    python benchmarks/bench_compiled.py --preset deep --cpu-time --host    # what torch asks of a model at every step

Milliseconds of a decode step (one sequence, a static cache of 128 tokens) of the stock model and of an adapter at 50
and 70 %, and merged at 50 %, each as it is and compiled. They take turns; medians. Compiling takes a minute or two per
model. With `--host` compiled code computes nothing and gives back its first outputs: what is left is what torch asks
before it runs compiled code, which a GPU waits for.
"""

import argparse
import copy
import statistics
import time

import torch
import transformers as tf
from bench_generate import DTYPES, PRESETS, base_model, merged, sparse_model


PROMPT = 16


class Steps:
    """Greedy decode steps of a model; `turn` turns its dial before them."""

    def __init__(self, model: tf.PreTrainedModel, backend, turn=lambda: None):
        self.model, self.turn = model, turn
        self.step = torch.compile(model.forward, dynamic=False, backend=backend) if backend else model
        self.cache = tf.StaticCache(config=model.config, max_cache_len=128)

    @torch.no_grad()
    def times(self, prompt: torch.Tensor, count: int, now) -> list[float]:
        """Seconds of each of `count` steps after the prompt."""
        self.turn()
        self.cache.reset()
        more = {"past_key_values": self.cache, "use_cache": True}
        token = self.model(input_ids=prompt, position_ids=torch.arange(PROMPT)[None], **more).logits[:, -1:].argmax(-1)
        found = []
        for place in range(PROMPT, PROMPT + count):
            begun = now()
            out = self.step(input_ids=token, position_ids=torch.tensor([[place]]), **more)
            token = out.logits[:, -1:].argmax(-1)
            found.append(now() - begun)
        return found


def no_work(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
    """A backend of torch.compile: what the graph gave the first time."""
    outputs = []

    def run(*inputs):
        if not outputs:
            outputs.extend(graph(*inputs))
        return outputs

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, default="llama-3.2-1b")
    which.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--tokens", type=int, default=16, help="steps of a turn, the first two not counted")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--host", action="store_true", help="the host's part alone: compiled code computes nothing")
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines: CPU time, one thread only")
    arguments = parser.parse_args()
    arguments.device, arguments.adapter = "cpu", None  # what bench_generate's functions ask for
    now = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)

    stock = base_model(arguments)
    prompt = torch.randint(3, stock.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    model = sparse_model(copy.deepcopy(stock), arguments, prompt)
    print(model.prepare_for_decode())
    inner = model.base_model.model
    cases, first = {}, arguments.sparsities[0]
    model.set_sparsity(first)
    shipped = merged(model)
    for name, backend in (("", None), (", compiled", no_work if arguments.host else "inductor")):
        cases[f"stock{name}"] = Steps(stock, backend)
        for sparsity in arguments.sparsities:
            turn = lambda sparsity=sparsity: model.set_sparsity(sparsity)  # noqa: E731
            cases[f"{sparsity:.0%}{name}"] = Steps(inner, backend, turn)
        cases[f"{first:.0%} merged{name}"] = Steps(shipped, backend)
    found = {name: [] for name in cases}
    for turn in range(arguments.rounds + 1):
        for name, case in cases.items():
            times = case.times(prompt, arguments.tokens, now)
            found[name] += times[2:] if turn else []
    print(f"{torch.get_num_threads()} threads\n                       ms per step  vs stock")
    for name, times in found.items():
        median = statistics.median(times)
        print(f"{name:20} {median * 1e3:13.2f} {statistics.median(found['stock']) / median:9.2f}")


if __name__ == "__main__":
    main()
