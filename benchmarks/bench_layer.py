# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast is one sparse linear layer, and against what?

    python benchmarks/bench_layer.py                 # six shapes, three dtypes, 50 / 70 / 90 %, one thread and all
    python benchmarks/bench_layer.py --quick         # three shapes, fewer repetitions
    python benchmarks/bench_layer.py --rows 1 2 4 8 --shapes 2048x5632    # where batches stop paying
    python benchmarks/bench_layer.py --overhead      # a 64 x 64 layer: what is not the product

For every case, in microseconds per call: `F.linear` on the weight as torch stores it, our kernel reading everything
(`dense`), our kernel with S inside the call (`sparse`; x to y, threshold and selection included), and the pure-torch
`embedding_bag` path. The variants take turns call by call, each call on another copy of the weight, copies together
larger than the last-level cache, and medians are reported. `limit` is what skipping could give at best,
1 / (1 - sparsity) for one row. On a CUDA device (`--device cuda`), times are those of a CUDA graph of many calls.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_spon import SponConfig, kernels, prepare_for_decode
from peft_spon.kernels import cpu, reference
from peft_spon.sites import sites


SHAPES = ["2048x2048", "2048x5632", "5632x2048", "4096x4096", "4096x14336", "14336x4096"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ["F.linear", "dense", "sparse", "embedding_bag"]


def read_bandwidth(threads: int, now=time.perf_counter, repeats: int = 5) -> float | None:
    """Bytes per second at which this machine reads 512 MB, or None without the C kernel."""
    library = cpu._load()[0]
    if library is None:
        return None
    memory = torch.ones(2**27)
    best = float("inf")
    for _ in range(repeats):
        start = now()
        library.read(memory.data_ptr(), memory.numel(), threads)
        best = min(best, now() - start)
    return memory.nbytes / best


def last_level_cache() -> int:
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes), default=2**25)


def interleaved(variants: dict, copies: int, repeats: int, budget: float, now=time.perf_counter) -> dict[str, float]:
    """Median seconds of each variant; a variant is called with the number of the weight to use."""
    times, number, end = {name: [] for name in variants}, 0, time.perf_counter() + budget
    for repeat in range(repeats + 1):  # the first round is not counted
        for name, call in variants.items():
            number += 1
            start = now()
            call(number % copies)
            if repeat:
                times[name].append(now() - start)
        if repeat >= 3 and time.perf_counter() > end:
            break
    return {name: statistics.median(t) for name, t in times.items()}


def graphed(variants: dict, copies: int, repeats: int, budget: float, now) -> dict[str, float]:
    """The same on a GPU: seconds per call of a CUDA graph that calls each copy of the weight once."""
    graphs = {}
    for name, call in variants.items():
        call(0)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for number in range(copies):
                call(number)

    def replay(graph):
        graph.replay()
        torch.cuda.synchronize()

    calls = {name: lambda _, graph=graph: replay(graph) for name, graph in graphs.items()}
    return {name: t / copies for name, t in interleaved(calls, 1, repeats, budget, now).items()}


def measure(n_in: int, n_out: int, dtype: torch.dtype, arguments, cache: int):
    """Yields one record per sparsity and number of rows."""
    device, itemsize = torch.device(arguments.device), dtype.itemsize
    copies = max(3, -(-2 * cache // (n_in * n_out * itemsize)))
    if device.type == "cpu":
        copies = min(copies, max(3, int(2e9) // (2 * n_in * n_out * itemsize)))
    # W^T as the kernels want it and W as torch stores it: the same bytes, since values do not change the time.
    memory = [(torch.randn(n_in * n_out, device=device) * 0.02).to(dtype) for _ in range(copies)]
    transposed = [m.view(n_in, n_out) for m in memory]
    stored = [m.view(n_out, n_in) for m in memory]
    bias = torch.randn(n_out, device=device)
    plain_bias = bias.to(dtype)
    for rows in arguments.rows:
        x = torch.randn(rows, n_in, device=device)
        for sparsity in arguments.sparsities:
            x_, (norms, gain) = x.to(dtype), torch.ones(2, n_in, device=device)
            scores = x.abs()
            if arguments.relative:
                scores = scores / reference.power_mean(scores, arguments.relative)
            tau = scores.flatten().kthvalue(max(1, round(sparsity * x.numel()))).values

            def sparse(i, x_=x_, tau=tau, norms=norms, gain=gain):
                return kernels.threshold_gemv(x_, transposed[i], tau, norms, gain, bias, arguments.relative)

            def bag(i, x_=x_, tau=tau, norms=norms, gain=gain):
                return cpu.bag(reference.select(x_, tau, norms, gain, arguments.relative), transposed[i], bias)

            variants = {
                "F.linear": lambda i, x_=x_: F.linear(x_, stored[i], plain_bias),
                "dense": lambda i, x_=x_: kernels.dense_gemv(x_, transposed[i], bias),
                "sparse": sparse,
                "embedding_bag": bag,
            }
            if device.type != "cpu":
                everything = torch.full_like(tau, -1)
                variants["dense"] = lambda i, x_=x_, norms=norms, gain=gain, all_of_it=everything: (
                    kernels.threshold_gemv(x_, transposed[i], all_of_it, norms, gain, bias, arguments.relative)
                )
                del variants["embedding_bag"]
            clock = interleaved if device.type == "cpu" else graphed
            seconds = clock(variants, copies, arguments.repeats, arguments.seconds, arguments.now)
            z = reference.select(x_, tau, relative=arguments.relative)
            expected = z[:1].double() @ transposed[0].double() + bias.double()
            union = (z != 0).any(0).double().mean().item()
            yield {
                "rows": rows,
                "sparsity": round((z == 0).double().mean().item(), 4),
                "limit": 1 / union,
                "microseconds": {name: t * 1e6 for name, t in seconds.items()},
                "GB/s": {
                    name: n_in * n_out * itemsize / t / 1e9 * (union if name in ("sparse", "embedding_bag") else 1)
                    for name, t in seconds.items()
                },
                "sparse vs F.linear": seconds["F.linear"] / seconds["sparse"],
                "sparse vs dense": seconds["dense"] / seconds["sparse"] if "dense" in seconds else None,
                "embedding_bag vs F.linear": seconds["F.linear"] / seconds["embedding_bag"]
                if "embedding_bag" in seconds
                else None,
                "relative error": ((sparse(0)[:1].double() - expected).norm() / expected.norm()).item(),
            }


def overhead(now, repeats: int = 200) -> dict[str, dict[str, float]]:
    """Microseconds of a call of a 64 x 64 layer: criterion to what the layer is to the median."""
    found, x = {}, torch.randn(1, 1, 64)
    for criterion in ("magnitude", "relative", "weighted", "robust", "topk"):
        layers = {"nn.Linear": nn.Linear(64, 64, bias=False)}
        for name in ("adapter", "prepared", "merged", "merged and prepared"):
            config = SponConfig(criterion=criterion, sparsity=0.5, target_modules=["0"], prefill="sparse")
            model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config).eval()
            if criterion != "topk":
                model.base_model.model[0].set_quantiles("default", torch.linspace(0, 2, 257))
            model = model.merge_and_unload() if name.startswith("merged") else model
            if name.endswith("prepared"):
                prepare_for_decode(model)
            layers[name] = next(iter(sites(model).values()))
        hundred = {name: lambda _, layer=layer: [layer(x) for _ in range(100)] for name, layer in layers.items()}
        seconds = interleaved(hundred, 1, repeats, 20.0, now)
        found[criterion] = {name: round(t * 1e4, 1) for name, t in seconds.items()}
    return found


def show(record: dict):
    def number(value, digits=2):
        return "     -" if value is None else f"{value:6.{digits}f}"

    times = " ".join(number(record["microseconds"].get(name), 0).rjust(8) for name in VARIANTS)
    rates = " ".join(number(record["GB/s"].get(name), 0)[-4:] for name in VARIANTS)
    print(
        f"{record['shape']:>11} {record['dtype']} {record['threads']}T {record['rows']:2d} {record['sparsity']:5.1%} "
        f"{times} {rates} {number(record['sparse vs F.linear'])} {number(record['sparse vs dense'])} "
        f"{number(record['limit'])} {number(record['embedding_bag vs F.linear'])} {record['relative error']:8.1e}",
        flush=True,
    )


def plot(records: list[dict], path: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    single = [r for r in records if r["rows"] == 1]
    for ax, against in zip(axes, ("sparse vs F.linear", "sparse vs dense"), strict=True):
        for key in sorted({(r["shape"], r["dtype"], r["threads"]) for r in single}):
            line = [r for r in single if (r["shape"], r["dtype"], r["threads"]) == key and r[against]]
            if line:
                ax.plot(
                    [r["sparsity"] for r in line], [r[against] for r in line], "o-", label="{} {} {}T".format(*key)
                )
        limit = sorted((r["sparsity"], r["limit"]) for r in single)
        ax.plot(*zip(*limit, strict=True), "k:", label="1 / (1 - sparsity)")
        ax.set(title=against, xlabel="sparsity", yscale="log")
    axes[1].legend(fontsize=5, ncol=2)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="in x out, e.g. 4096x14336")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="batch sizes, rows of independent masks")
    parser.add_argument("--threads", nargs="+", type=int, help="default: one and all of them")
    parser.add_argument("--repeats", type=int, help="calls of each variant and case (default 25, quick 9)")
    parser.add_argument("--seconds", type=float, help="most time per case (default 10, quick 2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--relative", type=int, choices=[0, 1, 2], default=0, help="2: scores as of `weighted`")
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines: CPU time, one thread only")
    parser.add_argument("--quick", action="store_true", help="three shapes, 50 and 70 %%, fewer repetitions")
    parser.add_argument("--overhead", action="store_true", help="only that of a 64 x 64 layer, one thread")
    parser.add_argument("--json", help="write all records there")
    parser.add_argument("--plot", help="draw ratios there (needs matplotlib)")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (9 if arguments.quick else 25)
    arguments.seconds = arguments.seconds or (2.0 if arguments.quick else 10.0)
    if arguments.quick and arguments.sparsities == [0.5, 0.7, 0.9]:
        arguments.sparsities = [0.5, 0.7]
    shapes = arguments.shapes or (SHAPES[::3] + ["4096x14336"] if arguments.quick else SHAPES)
    on_cpu = arguments.device == "cpu"
    threads = arguments.threads or (sorted({1, torch.get_num_threads()}) if on_cpu else [1])
    arguments.now = time.perf_counter
    if arguments.cpu_time:
        arguments.now, threads = time.thread_time, [1]
    if arguments.overhead:
        torch.set_num_threads(1)
        with torch.no_grad():
            print("microseconds per call of a 64 x 64 layer, one thread")
            for criterion, times in overhead(arguments.now).items():
                print(f"{criterion:>10}: " + ", ".join(f"{name} {t}" for name, t in times.items()))
        return
    cache = last_level_cache() if on_cpu else torch.cuda.get_device_properties(arguments.device).L2_cache_size

    kernel = kernels.active_kernel(arguments.device)
    head = {
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "kernel": kernel._asdict(),
        "last-level cache": cache,
        "read bandwidth GB/s": {n: (read_bandwidth(n, arguments.now) or 0) / 1e9 for n in threads} if on_cpu else None,
    }
    print(f"{kernel.name} ({kernel.origin}), torch {torch.__version__}, last-level cache {cache / 2**20:.0f} MB")
    if on_cpu:
        print("reads", ", ".join(f"{v:.1f} GB/s ({n} threads)" for n, v in head["read bandwidth GB/s"].items()))
    names = " ".join(name.rjust(8)[:8] for name in VARIANTS)
    print(f"{'in x out':>11} type  T  B zeros {names}  GB/s of the four    /lin /dense  limit bag/lin    error")
    records = []
    with torch.no_grad():
        for count in threads:
            torch.set_num_threads(count)
            for shape in shapes:
                n_in, n_out = map(int, shape.split("x"))
                for dtype in arguments.dtypes:
                    for record in measure(n_in, n_out, DTYPES[dtype], arguments, cache):
                        records.append({"shape": shape, "dtype": dtype, "threads": count, **record})
                        show(records[-1])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**head, "records": records}, indent=1))
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()
