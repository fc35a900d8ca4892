# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""One function per command: its parameters are the flags, its docstring the help, what it returns the JSON."""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from transformers import AutoConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .. import allocation, calibration
from ..cards import adapter_card, merged_card
from ..config import SponConfig
from ..environment import environment, environment_text
from ..evaluation import measure_report, metrics, report_of, study, write_report
from ..evaluation.measurements import about, versions
from ..evaluation.speed import decode_sparsity, measure_speed
from ..merged import SponMergedConfig
from ..sites import resolve_sites, sites, spon_layers
from ..texts import read_data, read_divided
from .models import (
    base_and_adapter,
    check_new,
    is_merged,
    load_dense,
    load_measured,
    load_plain,
    load_sparse,
    load_tokenizer,
    pick_device,
    set_dial,
    with_adapter,
)
from .output import jsonable


Dtype = Literal["auto", "float32", "bfloat16", "float16", "checkpoint"]


def calibrate(
    model: str,
    data: list[str],
    out: Path,
    adapter: str | None = None,
    sparsity: float | None = None,
    criterion: str | None = None,
    on_sparse: bool = False,
    max_tokens: int = 65536,
    max_length: int = 512,
    batch_size: int = 8,
    text_column: str = "text",
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Make a model sparse: find every layer's threshold, and save an adapter that holds them.

    Examples:
        peft-spon calibrate --model HuggingFaceTB/SmolLM2-135M --data python-stdlib --sparsity 0.5 --out smol-sparse
        peft-spon calibrate --model FOLDER --data a.txt b.jsonl --criterion magnitude --out magnitude-sparse
        peft-spon calibrate --model ADAPTER --data texts/ --on-sparse --out refitted

    Args:
        model: folder or Hub name of a causal language model, or of an adapter (its base is then found by itself).
        data: text files, .jsonl, .csv or .parquet files, folders, a saved data set, a data set's name on the Hub
            (owner/name or owner/name:configuration), or python-stdlib, the source of Python's standard library.
        out: folder for the adapter.
        adapter: folder or Hub name of an adapter to calibrate anew, beside its base as --model.
        sparsity: share of every layer's input that S zeroes. Default 0.5, or the adapter's own.
        criterion: what makes an entry important (weighted, magnitude, relative, topk, wina, rsparse, larosa). Default
            weighted, or the adapter's own.
        on_sparse: a second pass, on the sparse model, that fits the thresholds to what it sees.
        max_tokens: tokens to look at.
        max_length: tokens per block.
        batch_size: blocks at a time.
        text_column: column with the texts, for data with columns.
        dtype: of the model; auto is float32 on a CPU, and the checkpoint's elsewhere.
        device: where to compute; auto is the accelerator, if there is one.
        force: write over what is in --out.
    """
    check_new(out, force)
    loaded = with_adapter(
        load_sparse(model, adapter, dtype, device, is_trainable=True), {"sparsity": sparsity, "criterion": criterion}
    )
    tokenizer = load_tokenizer(model, adapter)
    result = calibration.calibrate(
        loaded,
        read_data(data),
        tokenizer,
        on_sparse=on_sparse,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_size=batch_size,
        text_column=text_column,
    )
    loaded.save_pretrained(out)
    print(result)
    print(f"The adapter is in {out}.")
    return {"out": out, "calibration": result}


def allocate(
    model: str,
    data: list[str],
    out: Path,
    adapter: str | None = None,
    sparsity: float | None = None,
    criterion: str | None = None,
    method: Literal["kl", "greedy", "uniform"] = "kl",
    budget: Literal["weights", "bytes"] = "weights",
    max_tokens: int | None = None,
    max_length: int = 512,
    text_column: str = "text",
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Spread a sparsity budget over the layers: more where it costs little, less where it costs much.

    Examples:
        peft-spon allocate --model ADAPTER --data python-stdlib --sparsity 0.6 --out allocated
        peft-spon allocate --model MODEL --data texts.txt --method greedy --out allocated --resume

    Args:
        model: folder or Hub name of a causal language model, or of an adapter.
        data: texts, see calibrate --help.
        out: folder for the adapter.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: of all layers together. Default 0.5, or the adapter's own.
        criterion: see calibrate --help; of a new adapter, which is calibrated first.
        method: kl needs one forward and backward of the dense model; greedy is TEAL's; uniform makes all alike.
        budget: what is counted, weights or the bytes that are read.
        max_tokens: tokens to look at. Default 4096 for kl, 1024 for greedy.
        max_length: tokens per block.
        text_column: column with the texts, for data with columns.
        seed: of what kl samples.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        resume: go on with what an interrupted call has found (in --out).
        force: write over what is in --out.
    """
    check_new(out, force, resume)
    loaded = with_adapter(
        load_sparse(model, adapter, dtype, device, is_trainable=True), {"sparsity": sparsity, "criterion": criterion}
    )
    out.mkdir(parents=True, exist_ok=True)
    state = out / "allocation-state.json"
    if not resume:
        state.unlink(missing_ok=True)
    result = allocation.allocate(
        loaded,
        read_data(data),
        load_tokenizer(model, adapter),
        method=method,
        budget=budget,
        max_tokens=max_tokens,
        max_length=max_length,
        text_column=text_column,
        seed=seed,
        state_file=state,
    )
    loaded.save_pretrained(out)
    state.unlink(missing_ok=True)
    print(result)
    print(f"The adapter is in {out}.")
    return {"out": out, "allocation": result}


def train(
    model: str,
    data: list[str],
    out: Path,
    eval_data: list[str] | None = None,
    adapter: str | None = None,
    sparsity: float | None = None,
    criterion: str | None = None,
    allocation: Literal["kl", "greedy", "uniform"] = "kl",
    steps: int = 150,
    batch_size: int = 4,
    max_length: int = 256,
    learning_rate: float | None = None,
    save_steps: int | None = None,
    training: dict[str, Any] | None = None,
    text_column: str = "text",
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Make a model sparse, spread the sparsity over its layers, and train anchors and gains against the dense model.

    Examples:
        peft-spon train --model MODEL --data python-stdlib --sparsity 0.6 --out adapter
        peft-spon train --model MODEL --data Salesforce/wikitext:wikitext-2-raw-v1 --steps 500 --out adapter
        peft-spon train --config train.yaml --resume      # go on where a killed training was

    Args:
        model: folder or Hub name of a causal language model, or of an adapter to go on from.
        data: texts to train on, see calibrate --help.
        out: folder for the adapter and the checkpoints.
        eval_data: held-out texts; the KL before and after training is then theirs.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: of all layers together. Default 0.5, or the adapter's own.
        criterion: see calibrate --help.
        allocation: how the sparsity of a new adapter is spread, see allocate --help.
        steps: training steps of --batch-size times --max-length tokens.
        batch_size: blocks per step.
        max_length: tokens per block.
        learning_rate: peak rate of the anchors. Default the recipe's.
        save_steps: steps between checkpoints. Default a tenth of all.
        training: any other fields of SponTrainingConfig, as YAML or JSON.
        text_column: column with the texts, for data with columns.
        seed: of the order of the data, and of what kl samples.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        resume: go on from the last checkpoint in --out.
        force: write over what is in --out.
    """
    from datasets import Dataset

    from ..trainer import SponTrainer
    from ..trainer_config import SponTrainingConfig

    check_new(out, force, resume)
    checkpoints = out / "checkpoints"
    start = checkpoints / "start"  # the adapter as it is before the first step
    arguments = SponTrainingConfig(
        str(checkpoints),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "max_length": max_length,
            "packing": True,
            "packing_strategy": "wrapped",
            "dataset_text_field": text_column,
            "logging_steps": max(1, steps // 20),
            "save_steps": save_steps or max(1, steps // 10),
            "save_total_limit": 2,
            "gradient_checkpointing": False,
            "report_to": [],
            "seed": seed,
            "disable_tqdm": not sys.stderr.isatty(),
            "use_cpu": pick_device(device) == "cpu",
            **({} if learning_rate is None else {"learning_rate": learning_rate}),
            **(training or {}),
        },
    )
    tokenizer = load_tokenizer(model, adapter)
    set_seed(seed)
    is_begun = resume and (start / "adapter_config.json").exists()
    if is_begun:
        base, _ = base_and_adapter(model, adapter)
        loaded = load_sparse(base, str(start), dtype, device, is_trainable=True)
    else:
        before = load_sparse(model, adapter, dtype, device, is_trainable=True)
        is_new = not spon_layers(before)
        loaded = with_adapter(before, {"sparsity": sparsity, "criterion": criterion})
    rows = as_dataset(read_data(data), text_column, 16 * steps * batch_size * max_length)
    if not is_begun:
        if is_new and allocation != "uniform":
            print(spread(loaded, rows, tokenizer, allocation, arguments))
        loaded.save_pretrained(start)
    held_out = None if eval_data is None else as_dataset(read_data(eval_data, held_out=True), text_column)
    assert isinstance(rows, Dataset)
    trainer = SponTrainer(
        model=loaded, args=arguments, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer
    )
    has_checkpoint = resume and checkpoints.is_dir() and get_last_checkpoint(str(checkpoints)) is not None
    begun = time.time()
    output = trainer.train(resume_from_checkpoint=True if has_checkpoint else None)
    trainer.model.save_pretrained(out)
    before, after = output.metrics.get("kl_before"), output.metrics.get("kl_after")
    if before is not None:
        kind = "training" if held_out is None else "held-out"
        print(f"KL to the dense model on {kind} text: {before:.4f} before, {after:.4f} after training.")
    print(f"The adapter is in {out}; {time.time() - begun:.0f} s of training.")
    log = trainer.state.log_history
    return {"out": out, "kl_before": before, "kl_after": after, "steps": trainer.state.global_step, "log": log}


def spread(model: Any, rows: Any, tokenizer: Any, method: str, arguments: Any) -> Any:
    """The allocation of a new adapter, from the training data."""
    return allocation.allocate(
        model,
        rows,
        tokenizer,
        method=method,
        max_length=arguments.max_length,
        calibration_tokens=arguments.calibration_tokens,
        text_column=arguments.dataset_text_field,
        seed=arguments.seed,
    )


def as_dataset(data: Any, text_column: str, characters: int | None = None) -> Any:
    """A `datasets.Dataset`; of texts, the first with so many characters: all are tokenised before the first step."""
    from datasets import Dataset

    if isinstance(data, Dataset):
        return data
    rows, seen = [], 0
    for row in data:
        rows.append({text_column: row} if isinstance(row, str) else row)
        seen += len(rows[-1].get(text_column) or "")
        if characters is not None and seen > characters:
            break
    return Dataset.from_list(rows)


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
            check_new(path, force)
    loaded = load_measured(model, adapter, dtype, device)
    if sparsity is not None:
        set_dial(loaded, sparsity)
    result = metrics.evaluate(
        loaded,
        read_data(data, held_out=True),
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
    criteria: list[str] = ("magnitude", "weighted", "topk", "wina", "rsparse", "larosa"),
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
            bar.n = bar.initial = max(bar.n, done)
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
    check_new(out, force)
    if (result is None) == (model is None or data is None):
        raise ValueError("Give --model and --data to measure, or --result with the JSON of an earlier report.")
    if result is not None:
        found = json.loads(result.read_text(encoding="utf-8"))
    else:
        numbers = check_new(out.with_suffix(".json"), force)
        loaded = load_measured(model, adapter, dtype, device)
        found = measure_report(
            loaded,
            read_data(data, held_out=True),
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


def merge(
    model: str,
    out: Path,
    adapter: str | None = None,
    sparsity: float | None = None,
    fold_gain: bool = False,
    dtype: Dtype = "checkpoint",
    device: str = "cpu",
    force: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base: a folder that transformers loads, sparse where peft_spon is imported.

    Examples:
        peft-spon merge --model ADAPTER --out merged
        peft-spon merge --model BASE --adapter user/llama-spon --sparsity 0.6 --out merged

    Args:
        model: folder or Hub name of an adapter; or of the base of --adapter.
        out: folder for the merged model and its tokenizer.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: turn the dial to this before.
        fold_gain: multiply the gains into the weights, which are then no longer the base's.
        dtype: of the merged model.
        device: where to compute.
        force: write over what is in --out.
    """
    check_new(out, force)
    loaded = load_measured(model, adapter, dtype, device)
    if is_merged(loaded.config):
        raise ValueError(f"{model} is merged already; nothing was written.")
    if sparsity is not None:
        set_dial(loaded, sparsity)
    merged = loaded.merge_and_unload(fold_gain=fold_gain)
    merged.save_pretrained(out)
    load_tokenizer(model, adapter).save_pretrained(out)
    layers = len(sites(merged))
    print(f"The merged model is in {out}: {type(merged).__name__} with {layers} sparse layers.")
    return {"out": out, "model_class": type(merged).__name__, "sparse_layers": layers}


def bench(
    model: str,
    adapter: str | None = None,
    sparsity: float | None = None,
    rows: int = 1,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    dtype: Dtype = "checkpoint",
    device: str = "auto",
) -> dict[str, Any]:
    """How fast it generates: the dense model, and the sparse one prepared for decoding, taking turns.

    Both are in memory. A dense model is made sparse first, with thresholds from what it says itself.

    Examples:
        peft-spon bench --model ADAPTER
        peft-spon bench --model meta-llama/Llama-3.2-1B --sparsity 0.6 --threads 2 --json

    Args:
        model: folder or Hub name of a dense model, an adapter or a merged model.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: of a dense model that is made sparse (default 0.5), or the adapter's dial.
        rows: sequences at a time.
        prompt_tokens: tokens of the prompts, which are random.
        new_tokens: tokens to generate in a turn.
        rounds: turns of each model.
        threads: threads of a CPU. Default torch's own choice.
        dtype: of the models.
        device: where to compute; auto is the accelerator, if there is one.
    """
    if threads is not None:
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
    summary = sparse.prepare_for_decode()
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
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def push(
    folder: Path, to: str, private: bool = False, message: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Upload a saved adapter or merged model to the Hub, with a card that loads it by its name there.

    Examples:
        peft-spon push --folder adapter --to user/llama-spon
        peft-spon push --folder merged --to user/llama-spon-merged --private

    Args:
        folder: what peft-spon train or merge, or save_pretrained, wrote.
        to: owner/name on the Hub; you are logged in by `hf auth login` or HF_TOKEN.
        private: make a new repository private.
        message: of the commit.
        force: add to a repository that has files already.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    with tempfile.TemporaryDirectory() as aside:
        card = Path(aside, "README.md")
        if (folder / "README.md").exists():
            shutil.copy(folder / "README.md", card)
        if (folder / "adapter_config.json").exists():
            config = PeftConfig.from_pretrained(folder)
            if not isinstance(config, SponConfig):
                raise ValueError(f"{folder} holds a {config.peft_type} adapter, not SPON; nothing was uploaded.")
            adapter_card(aside, config, config.auto_mapping, to)
        elif (folder / "config.json").exists() and is_merged(config := AutoConfig.from_pretrained(folder)):
            config.quantization_config = SponMergedConfig(**config.quantization_config)
            merged_card(aside, config, to)
        else:
            raise ValueError(f"{folder} holds neither a SPON adapter nor a merged model; nothing was uploaded.")
        api = HfApi()
        if api.repo_exists(to) and not force:
            files = [name for name in api.list_repo_files(to) if name not in (".gitattributes", "README.md")]
            if files:
                raise ValueError(f"{to} has {files[0]} and more already; --force adds to it. Nothing was uploaded.")
        api.create_repo(to, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id=to,
            operations=[
                CommitOperationAdd(path.relative_to(folder).as_posix(), path)
                for path in uploaded(folder)
                if path != folder / "README.md"
            ]
            + [CommitOperationAdd("README.md", card)],
            commit_message=message or f"Upload {folder.name}",
        )
    print(f"{folder} is at {done.commit_url}.")
    return {"to": to, "url": str(done.commit_url)}


def uploaded(folder: Path) -> list[Path]:
    """The files of an adapter, of what lies beneath it, or of a merged model: no checkpoints."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    loras = [path.parent for path in sorted(folder.glob("*/adapter_config.json"))]
    files += [path for lora in loras for path in sorted(lora.iterdir()) if path.is_file()]
    return [path for path in files if path.suffix in (".json", ".safetensors", ".md", ".txt", ".model", ".jinja")]


def env() -> dict[str, Any]:
    """Versions, devices, kernels and known incompatibilities, to paste into an issue.

    Examples:
        peft-spon env
        peft-spon env --json
    """
    found = environment()
    print(environment_text(found))
    return found
