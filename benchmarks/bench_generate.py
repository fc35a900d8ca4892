# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast does a sparse model generate, and against what?

    python benchmarks/bench_generate.py --preset llama-3.2-1b      # random weights: 0.97 B of them in sparse layers
    python benchmarks/bench_generate.py --model FOLDER             # any model folder; with its SPON adapter: --adapter
    python benchmarks/bench_generate.py --int8                     # and the same with copies of the weights in 8 bits

For every batch size, milliseconds per decode step of `generate`: `stock` is the model as transformers runs it, `own
dense` the same with our kernel reading every weight of the sparse layers (on a GPU: cuBLAS, on the weights as we store
them), and a row per sparsity the prepared adapter with anchors and gains (S on every token). The models take turns;
medians. Thresholds come from a calibration on tokens that the model generated itself; `zeros` is what was realised in
decoding. `limit` is what reading less could give at best: all bytes of weights that a step reads, over those that are
left. On a GPU (`--device cuda`) a step is the replay of a CUDA graph with a static cache, since Python alone takes
longer than the GPU does; with `--static` it is that of `generate(cache_implementation="static")`, which transformers
compiles there (a minute for each model and sparsity; `own dense` is left out).
"""

import argparse
import copy
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from bench_layer import read_bandwidth
from peft import PeftModel, get_peft_model

from peft_spon import SponConfig, calibrate, kernels, prepare_for_decode
from peft_spon.evaluation.speed import Speed, measure_speed
from peft_spon.sites import resolve_sites, sites
from peft_spon.statistics import Zeros
from peft_spon.transposed import transpose_weight


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The shapes of the layers alone: the vocabulary is small, so that one sees them and not the head.
PRESETS = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 4096,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 4096,
    },
    "deep": {  # as many layers as an 8 B model, none of which takes long: what is around them
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


def base_model(arguments) -> tf.PreTrainedModel:
    dtype = DTYPES[arguments.dtype]
    if arguments.model:
        model = tf.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        torch.manual_seed(0)
        config = tf.LlamaConfig(**PRESETS[arguments.preset], bos_token_id=1, eos_token_id=2, pad_token_id=0)
        with torch.device(arguments.device):
            model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(arguments.device).eval()


@torch.no_grad()
def sparse_model(base: tf.PreTrainedModel, arguments, prompt: torch.Tensor) -> PeftModel:
    """An adapter with anchors and gains, calibrated on what the model says after the prompt."""
    if arguments.adapter:
        return PeftModel.from_pretrained(base, arguments.adapter).eval()
    config = SponConfig(criterion=arguments.criterion, sparsity=arguments.sparsities[0], prefill="sparse")
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "spon_" in name:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    for _ in range(1 if arguments.model else 3):  # random weights: what it says changes with its own sparsity
        said = model.generate(input_ids=prompt, max_new_tokens=64, do_sample=True, pad_token_id=0, eos_token_id=None)
        calibrate(model, [{"input_ids": said}], progress=False)
    return model


@torch.no_grad()
def realised(model: PeftModel, prompt: torch.Tensor) -> float:
    """Share of the weights of the sparse layers that decode steps did not read."""
    name, found = resolve_sites(model, None)
    cache = tf.DynamicCache()
    token = model(input_ids=prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    with Zeros(found, name) as zeros:
        for _ in range(24):
            batch = {"input_ids": token}
            zeros.start_batch(batch)
            token = model(**batch, past_key_values=cache).logits[:, -1:].argmax(-1)
    return zeros.overall()


def merged(model: PeftModel) -> tf.PreTrainedModel:
    """What users ship: the model with the adapter merged, prepared."""
    found = copy.deepcopy(model).merge_and_unload()
    prepare_for_decode(found)
    return found


def measure_static(models: dict[str, Callable], prompts: torch.Tensor, tokens: int, rounds: int) -> dict[str, Speed]:
    """As `measure_speed`, of the compiled steps of `generate`; the first turn, which compiles, is not counted."""

    def now() -> float:
        if prompts.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return measure_speed(models, prompts, tokens, rounds, now, cache_implementation="static")


def own_dense(base: tf.PreTrainedModel, model: PeftModel) -> tf.PreTrainedModel:
    """The base model on what the prepared model reads, all of it read at every step."""
    shared = {id(p): p for p in base.parameters()}
    dense = copy.deepcopy(base, shared)
    for name, site in sites(model).items():
        layer = dense.get_submodule(name)
        if site.decode_dtype == torch.int8:
            read = site.int8_weight()
            tensors = {"weight_t": read.weight_t, "weight_scale": read.weight_scale, "bias": layer.bias}
            layer.forward = functools.partial(kernels.int8_linear, sparsity=0.0, **tensors)
        else:
            layer.weight = site.plain_layer().weight
            transpose_weight(layer, lambda plain: plain)
    return dense


def in_int8(model: PeftModel) -> PeftModel:
    """The prepared model once more, on copies of its weights in 8 bits."""
    other = copy.deepcopy(model)
    other.prepare_for_decode(torch.int8)
    return other


@torch.no_grad()
def decode_graph(model: torch.nn.Module, prompts: torch.Tensor, steps: int) -> Callable[[], None]:
    """A function that runs a decode step on a GPU, at most `steps` times: a CUDA graph with a static cache."""
    cache = tf.StaticCache(config=model.config, max_cache_len=prompts.shape[1] + steps + 4)
    token = model(input_ids=prompts, past_key_values=cache).logits[:, -1:].argmax(-1)
    position = torch.full((1, 1), prompts.shape[1], device=prompts.device).expand(len(prompts), 1)

    def step() -> None:
        model(input_ids=token, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    # What the graph reads must stay: the model's dial may be turned and its constants made anew.
    held = cache, token, position, [getattr(module, "decoder", None) for module in model.modules()]
    return lambda held=held: graph.replay()


def measure_graphs(models: dict[str, Callable], prompts: torch.Tensor, tokens: int, rounds: int) -> dict[str, Speed]:
    """As `measure_speed`, of CUDA graphs. Each keeps what its model's dial was when it was made."""
    turns = 10 * rounds + 1
    steps = {name: decode_graph(model(), prompts, turns * tokens) for name, model in models.items()}
    times = {name: [] for name in models}
    for turn in range(turns):
        for name, step in steps.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(tokens):
                step()
            after.record()
            after.synchronize()
            if turn:
                times[name].append(before.elapsed_time(after) / tokens / 1e3)
    return {name: Speed(statistics.median(t), float("nan"), len(prompts)) for name, t in times.items()}


def plot(records: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 4))
    for name in dict.fromkeys(r["model"] for r in records):
        line = [r for r in records if r["model"] == name]
        rows = [r["rows"] for r in line]
        ax.plot(rows, [r["vs stock"] for r in line], "o-", label=f"{name} vs stock dense")
        ax.plot(rows, [r["vs own dense"] for r in line], "s:", label=f"{name} vs own dense")
    ax.axhline(1, color="k", lw=0.5)
    ax.set(xlabel="sequences at a time", ylabel="times as fast", xscale="log")
    ax.set_xticks(rows, rows)
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, default="llama-3.2-1b")
    which.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--adapter", help="folder of a SPON adapter of that model, calibrated")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--int8", action="store_true", help="also with copies of the weights in 8 bits")
    parser.add_argument("--merged", action="store_true", help="also merged, at the first sparsity")
    parser.add_argument("--static", action="store_true", help="on a GPU: compiled steps, as transformers makes them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines: CPU time, one thread only")
    parser.add_argument("--json", help="write all records there")
    parser.add_argument("--plot", help="draw ratios over batch sizes there (needs matplotlib)")
    arguments = parser.parse_args()
    now = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)

    stock = base_model(arguments)
    vocabulary, generator = stock.config.vocab_size, torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (max(arguments.rows), arguments.prompt), generator=generator)
    prompts = prompts.to(arguments.device)
    model = sparse_model(copy.deepcopy(stock), arguments, prompts[:1])
    print(summary := model.prepare_for_decode())
    dense, sparse = {} if arguments.static else {"own dense": own_dense(stock, model)}, {"": model}
    if arguments.int8:
        sparse[" int8"] = in_int8(model)
        if dense:
            dense["own dense int8"] = own_dense(stock, sparse[" int8"])
    inside = sum(site.plain_layer().weight.nbytes for site in sites(model).values())
    embedding = stock.get_input_embeddings().weight
    is_tied = stock.get_output_embeddings().weight is embedding
    outside = sum(p.nbytes for p in stock.parameters()) - inside - (0 if is_tied else embedding.nbytes)
    bandwidth = (read_bandwidth(arguments.threads, now) or 0) / 1e9 if arguments.device == "cpu" else None
    print(f"{inside / 1e6:.0f} MB in sparse layers, {outside / 1e6:.0f} MB in others, {arguments.dtype}, ", end="")
    print(f"{arguments.threads} threads" + (f", memory read at {bandwidth:.1f} GB/s" if bandwidth else ""))

    def at(model: PeftModel, sparsity: float):
        def turned():
            model.set_sparsity(sparsity)
            return model

        return turned

    measure = functools.partial(measure_speed, now=now) if arguments.device == "cpu" else measure_graphs
    if arguments.static:
        measure = measure_static
    names = {f"{s:.0%}{kind}": (at(model, s), s) for kind, model in sparse.items() for s in arguments.sparsities}
    if arguments.merged:
        model.set_sparsity(first := arguments.sparsities[0])
        names[f"{first:.0%} merged"] = ((lambda found: lambda: found)(merged(model)), first)
    records = []
    print("rows              ms/token  tokens/s  GB/s   zeros  vs stock  vs own dense  limit   prompt ms")
    for rows in arguments.rows:
        models = {"stock": lambda: stock, **{name: lambda model=model: model for name, model in dense.items()}}
        models |= {name: ready for name, (ready, _) in names.items()}
        speeds = measure(models, prompts[:rows], arguments.tokens, arguments.rounds)
        for name, speed in speeds.items():
            ready, sparsity = names.get(name, (None, 0.0))
            zeros = realised(ready(), prompts[:rows]) if ready else 0.0
            width = 1 / DTYPES[arguments.dtype].itemsize if name.endswith("int8") else 1.0
            read = inside * width * (1 - zeros**rows) + outside
            record = {
                "model": name,
                "rows": rows,
                "sparsity": sparsity,
                "realised": zeros,
                "milliseconds": speed.token * 1e3,
                "prompt milliseconds": speed.prompt * 1e3,
                "GB/s": read / speed.token / 1e9,
                "vs stock": speeds["stock"].token / speed.token,
                "vs own dense": speeds["own dense"].token / speed.token if dense else float("nan"),
                "limit": (inside + outside) / read,
            }
            records.append(record)
            print(
                f"{rows:4d} {name:>14} {speed.token * 1e3:8.2f} {speed.tokens_per_second:9.1f} {record['GB/s']:5.1f} "
                f"{zeros:7.1%} {record['vs stock']:9.2f} {record['vs own dense']:13.2f} {record['limit']:6.2f} "
                f"{speed.prompt * 1e3:11.1f}",
                flush=True,
            )
    head = {
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "kernel": kernels.active_kernel(arguments.device)._asdict(),
        "prepared": str(summary),
        "read bandwidth GB/s": bandwidth,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**head, "records": records}, indent=1))
    if arguments.plot:
        plot([r for r in records if r["sparsity"]], arguments.plot)


if __name__ == "__main__":
    main()
