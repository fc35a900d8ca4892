# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands that measure: `evaluate`, `compare`, `report`, `bench`.

Parameters are the flags, docstrings the help, and what is returned is the JSON; see `parser.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import calibration, study
from ..data import check_sizes
from ..environment import environment
from ..evaluation import measure_report, metrics, report_of, write_report
from ..evaluation.measurements import about, versions
from ..evaluation.speed import check_turns, decode_sparsity, measure_speed
from ..sites import resolve_sites, spon_layers
from ..texts import read_data, read_divided
from .models import (
    Dtype,
    check_new,
    is_merged,
    load_dense,
    load_measured,
    load_plain,
    load_sparse,
    load_tokenizer,
    set_dial,
    with_adapter,
)
from .output import jsonable


def evaluate(
    model: str,
    data: list[str],
    adapter: str | None = None,
    sparsity: float | None = None,
    out: Path | None = None,
    html: Path | None = None,
    max_tokens: int | None = 32768,
    max_length: int = 512,
    batch_size: int = 8,
    continuations: int = 0,
    layers: bool = False,
    text_column: str = "text",
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
    *,
    command: str = "",
) -> dict[str, Any]:
    """What sparsity costs and what anchors bring back: dense, sparse, sparse with anchors, on the same text.

    Examples:
        peft-spon evaluate --model ADAPTER --data held-out.txt
        peft-spon evaluate --model MERGED --data python-stdlib --json > result.json
        peft-spon evaluate --model ADAPTER --data held-out.txt --sparsity 0.7 --continuations 32 --html result.html

    Args:
        model: folder or Hub name of an adapter, or of a merged model; or of the base of --adapter.
        data: held-out texts, see calibrate --help; of data with splits, the validation or test split.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: turn the dial of the adapter to this.
        out: JSON file for the result; peft-spon report --result draws a page of it.
        html: page of the result.
        max_tokens: tokens to measure on.
        max_length: tokens per block.
        batch_size: blocks at a time.
        continuations: also compare the greedy continuations of so many prompts.
        layers: also print the realised sparsity of every layer.
        text_column: column with the texts, for data with columns.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        force: write over --out and --html.
    """
    for path in (out, html):
        if path is not None:
            check_new(path, force, is_folder=False)
    loaded = load_measured(model, adapter, dtype, device)
    if sparsity is not None:
        set_dial(loaded, sparsity)
    result = metrics.evaluate(
        loaded,
        read_data(data, held_out=True, text_column=text_column),
        load_tokenizer(model, adapter),
        continuations=continuations,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        text_column=text_column,
    )
    print(result)
    if layers:
        print(result.layer_table())
    found = {**report_of(result), "command": command, "versions": versions()}
    found["model"] = about(loaded, *resolve_sites(loaded, None))
    if out is not None:
        study.write_json(jsonable(found), out)
        print(f"The result is in {out}.")
    if html is not None:
        write_report(found, html)
        print(f"The page is {html}.")
    return found


def compare(
    model: str,
    data: list[str],
    out: Path,
    test_data: list[str] | None = None,
    criteria: list[str] = ("magnitude", "weighted", "robust", "topk", "wina", "rsparse", "larosa"),
    sparsities: list[float] = (0.5,),
    allocations: list[str] = ("uniform", "kl"),
    seeds: list[int] = (0,),
    repair: bool = True,
    steps: int = 60,
    batch_size: int = 4,
    max_length: int = 256,
    calibration_tokens: int = 65536,
    allocation_tokens: int = 4096,
    eval_tokens: int = 32768,
    figure: Path | None = None,
    text_column: str = "text",
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Compare criteria, sparsities and allocations under one protocol, before and after training anchors.

    S is on every token, in all linear layers of the blocks; what is fitted on and what is measured on have no text in
    common. The file is written after each case; the same command goes on where it was, and a larger grid adds to it.

    Examples:
        peft-spon compare --model MODEL --data python-stdlib --out study.json --figure study.png
        peft-spon compare --model MODEL --data train.txt --test-data test.txt --criteria weighted magnitude \\
            --sparsities 0.4 0.5 0.6 --allocations uniform --out study.json

    Args:
        model: folder or Hub name of a dense causal language model.
        data: texts to fit on, see calibrate --help.
        out: JSON file for the result.
        test_data: texts to measure on. Default what --data holds out, a split of its own or its last tenth.
        criteria: names of criteria.
        sparsities: shares, of all layers together.
        allocations: how a sparsity is spread over the layers, of uniform, kl, greedy.
        seeds: of the training.
        repair: also train anchors and gains; --no-repair leaves that out.
        steps: training steps of --batch-size times --max-length tokens.
        batch_size: blocks per step.
        max_length: tokens per block.
        calibration_tokens: tokens on which thresholds are found.
        allocation_tokens: tokens on which an allocation is found.
        eval_tokens: tokens to measure on.
        figure: also draw KL and perplexity against realised sparsity, into a .png, .svg or .pdf.
        text_column: column with the texts, for data with columns.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
    """
    from tqdm.auto import tqdm

    if repair:
        import datasets

        datasets.disable_progress_bars()  # a dozen for each case
    protocol = study.Protocol(
        steps if repair else 0, batch_size, max_length, calibration_tokens, allocation_tokens, eval_tokens
    )
    grid = study.cases(criteria, sparsities, allocations, seeds)
    train_texts, held_out = read_divided(one_or_all(data), one_or_all(test_data), text_column)
    base = load_plain(model, dtype, device)
    if is_merged(base.config):
        raise ValueError(f"{model} is a merged SPON model; compare starts from a dense one.")
    with tqdm(desc="comparing", total=len(grid), unit=" cases", disable=None) as bar:

        def started(case: study.Case, done: int, total: int) -> None:
            if done > bar.n:  # of an earlier call: they say nothing about the time left
                bar.n = bar.initial = done
            bar.set_postfix_str(f"{case.criterion} at {case.sparsity:.0%}, {case.allocation}, seed {case.seed}")

        def finished(rows: list[dict[str, Any]]) -> None:
            bar.update()
            for row in rows:
                tqdm.write(json.dumps(jsonable(row)), file=sys.stderr)

        found = study.compare(
            base,
            train_texts,
            held_out,
            load_tokenizer(model),
            grid,
            out,
            protocol,
            model_name=Path(model).name,
            started=started,
            finished=finished,
        )
    print(study.study_table(found))
    if figure is not None:
        study.draw_study(found, figure)
        print(f"The figure is {figure}.")
    return found


def one_or_all(sources: list[str] | None) -> str | list[str] | None:
    """One source by itself: it may have splits of its own."""
    return sources[0] if sources is not None and len(sources) == 1 else sources


def report(
    out: Path,
    model: str | None = None,
    data: list[str] | None = None,
    adapter: str | None = None,
    result: Path | None = None,
    training: Path | None = None,
    prompts: list[str] | None = None,
    samples: int = 3,
    speed: bool = True,
    max_tokens: int | None = 8192,
    max_length: int = 512,
    batch_size: int = 8,
    text_column: str = "text",
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Measure all that a report shows, and write it as one HTML page, with the numbers in a JSON file beside it.

    Examples:
        peft-spon report --model ADAPTER --data held-out.txt --training OUT/checkpoints/checkpoint-150 \\
            --out report.html
        peft-spon report --result report.json --out again.html

    Args:
        out: the page, .html; its numbers are put beside it, .json.
        model: folder or Hub name of an adapter, or of a merged model; or of the base of --adapter.
        data: held-out texts, see calibrate --help.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        result: the JSON of an earlier report or evaluate, to be drawn again without measuring.
        training: a checkpoint or trainer_state.json, for the curves of the training.
        prompts: what the sample continuations begin with. Default beginnings of the data.
        samples: how many sample continuations.
        speed: measure tokens per second; --no-speed leaves that out.
        max_tokens: tokens to measure on.
        max_length: tokens per block.
        batch_size: blocks at a time.
        text_column: column with the texts, for data with columns.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        force: write over --out.
    """
    check_new(out, force, is_folder=False)
    numbers = out.with_suffix(".json")
    if numbers == out:
        raise ValueError(f"{out} is where the numbers are put; name the page, such as {out.with_suffix('.html')}.")
    if (result is None) == (model is None or data is None):
        raise ValueError("Give --model and --data to measure, or --result with the JSON of an earlier report.")
    if result is not None:
        given = {"model": model, "data": data, "adapter": adapter, "training": training, "prompts": prompts}
        if unused := [f"--{name}" for name, value in given.items() if value is not None]:
            raise ValueError(f"--result draws what was measured before; leave out {', '.join(unused)}.")
        found = read_result(result)
    else:
        check_new(numbers, force, is_folder=False)
        loaded = load_measured(model, adapter, dtype, device)
        found = measure_report(
            loaded,
            read_data(data, held_out=True, text_column=text_column),
            load_tokenizer(model, adapter),
            training=training,
            prompts=prompts,
            samples=samples,
            speed=speed,
            command=command,
            max_tokens=max_tokens,
            max_length=max_length,
            batch_size=batch_size,
            text_column=text_column,
        )
        study.write_json(found, numbers)
    write_report(found, out)
    print(f"The report is {out}.")
    return found


def read_result(path: Path) -> dict[str, Any]:
    """What `report` or `evaluate` wrote. Raises `ValueError` for another kind of file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is no JSON file; give the one that report or evaluate --out wrote.") from None


def bench(
    model: str,
    adapter: str | None = None,
    sparsity: float | None = None,
    rows: int = 1,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    rounds: int = 5,
    int8: bool = False,
    threads: int | None = None,
    dtype: Dtype = "checkpoint",
    device: str = "auto",
) -> dict[str, Any]:
    """How fast it generates: the dense model, and the sparse one prepared for decoding, taking turns.

    Both are in memory. A dense model is made sparse first, with thresholds from what it says itself.

    Examples:
        peft-spon bench --model ADAPTER
        peft-spon bench --model meta-llama/Llama-3.2-1B --sparsity 0.6 --int8 --threads 2 --json

    Args:
        model: folder or Hub name of a dense model, an adapter or a merged model.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: of a dense model that is made sparse (default 0.5), or the adapter's dial.
        rows: sequences at a time.
        prompt_tokens: tokens of the prompts, which are random.
        new_tokens: tokens to generate in a turn.
        rounds: turns of each model.
        int8: the sparse layers read copies of their weights in 8 bits.
        threads: threads of a CPU. Default torch's own choice.
        dtype: of the models.
        device: where to compute; auto is the accelerator, if there is one.
    """
    check_turns(rows, prompt_tokens, new_tokens, rounds)
    if threads is not None:
        check_sizes(threads=threads)
        torch.set_num_threads(threads)
    dense = load_dense(model, adapter, dtype, device)
    sparse = load_sparse(model, adapter, dtype, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = dense.config.get_text_config().vocab_size
    prompts = torch.randint(0, vocabulary, (rows, prompt_tokens), generator=generator).to(dense.device)
    if not is_merged(sparse.config):
        is_new = not spon_layers(sparse)
        sparse = with_adapter(sparse, {"sparsity": sparsity}).eval()
        if is_new:
            said = dense.generate(
                input_ids=prompts, max_new_tokens=64, do_sample=True, pad_token_id=0, eos_token_id=None
            )
            calibration.calibrate(sparse, [{"input_ids": said}], progress=False)
    elif sparsity is not None:
        set_dial(sparse, sparsity)
    summary = sparse.prepare_for_decode(torch.int8 if int8 else None)
    print(summary)
    realised = decode_sparsity(sparse, prompts)
    speeds = measure_speed({"dense": lambda: dense, "sparse": lambda: sparse}, prompts, new_tokens, rounds)
    times_as_fast = speeds["dense"].token / speeds["sparse"].token
    for name, speed in speeds.items():
        print(f"{name:<7} {speed.token * 1e3:8.2f} ms per token {rows / speed.token:8.1f} tokens per second")
    print(
        f"{times_as_fast:.2f} times as fast; {realised:.1%} of the weights of {len(resolve_sites(sparse, None)[1])} "
        f"sparse layers not needed; {torch.get_num_threads()} threads, {rows} sequences at a time"
    )
    return {
        "times_as_fast": times_as_fast,
        "realised_sparsity": realised,
        **{name: {**vars(speed), "tokens_per_second": rows / speed.token} for name, speed in speeds.items()},
        "prepared": len(summary.prepared),
        "left": summary.left,
        "int8": summary.weight_dtype is torch.int8,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
