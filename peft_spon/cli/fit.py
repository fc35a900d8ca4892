# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands that make adapters: `calibrate`, `allocate`, `train`.

Parameters are the flags, docstrings the help, and what is returned is the JSON; see `parser.py`.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .. import allocation, calibration
from ..data import check_sizes, tokens_of
from ..sites import spon_layers
from ..texts import read_data
from .models import (
    Dtype,
    base_and_adapter,
    check_new,
    load_sparse,
    load_tokenizer,
    pick_device,
    with_adapter,
)


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
        peft-spon calibrate --model FOLDER --data a.txt b.jsonl --criterion weighted --out weighted-sparse
        peft-spon calibrate --model ADAPTER --data texts/ --on-sparse --out refitted

    Args:
        model: folder or Hub name of a causal language model, or of an adapter (its base is then found by itself).
        data: text files, .jsonl, .csv or .parquet files, folders, a saved data set, a data set's name on the Hub
            (owner/name or owner/name:configuration), or python-stdlib, the source of Python's standard library. Of
            several, as much of each is looked at.
        out: folder for the adapter.
        adapter: folder or Hub name of an adapter to calibrate anew, beside its base as --model.
        sparsity: share of every layer's input that S zeroes. Default 0.5, or the adapter's own.
        criterion: what makes an entry important (magnitude, weighted, robust, relative, topk, wina, rsparse, larosa).
            Default magnitude, or the adapter's own.
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
        read_data(data, text_column=text_column, shuffled=True),
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
        budget: what is counted, weights or (kl only) the bytes that are read.
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
        read_data(data, text_column=text_column, shuffled=True),
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
        force: write over what is in --out; checkpoints of an earlier training are removed.
    """
    from ..trainer import SponTrainer
    from ..trainer_config import SponTrainingConfig

    check_sizes(steps=steps, batch_size=batch_size, max_length=max_length)
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
    if len(data) > 1 and (arguments.assistant_only_loss or arguments.completion_only_loss):
        raise ValueError(
            "--data names several sources, which are mixed as tokens: no part of a text can be left out of the loss. "
            "Name one source, or leave assistant_only_loss and completion_only_loss out."
        )
    tokenizer = load_tokenizer(model, adapter)
    set_seed(seed)
    is_begun = resume and (start / "adapter_config.json").exists()
    if is_begun:
        base, _ = base_and_adapter(model, adapter)
        loaded = load_sparse(base, str(start), dtype, device, is_trainable=True)
    else:
        before = load_sparse(model, adapter, dtype, device, is_trainable=True)
        if not resume:  # with what an earlier training has left there, --resume would go on
            for left in (start, *checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                shutil.rmtree(left, ignore_errors=True)
        is_new = not spon_layers(before)
        loaded = with_adapter(before, {"sparsity": sparsity, "criterion": criterion})
    rows = rows_of(data, tokenizer, text_column, tokens_of_training(arguments))
    if not is_begun:
        if is_new:
            print(spread(loaded, rows, tokenizer, allocation, arguments))
        loaded.save_pretrained(start)
    held_out = None if eval_data is None else rows_of(eval_data, tokenizer, text_column, held_out=True)
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


def tokens_of_training(arguments: Any) -> int | None:
    """Tokens that all steps together see, and at least those of the calibration; None where epochs are counted."""
    if arguments.max_steps <= 0:
        return None
    blocks = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return max(arguments.max_steps * blocks * (arguments.max_length or 1024), arguments.calibration_tokens)


def rows_of(
    sources: list[str], tokenizer: Any, text_column: str, tokens: int | None = None, held_out: bool = False
) -> Any:
    """
    Rows to train on, a `datasets.Dataset`: of a data set all; of texts, which are all tokenised before the first step,
    enough for so many tokens; of several sources just so many tokens, in turn, or the steps would see more of the
    larger one.
    """
    from datasets import Dataset

    data = read_data(sources, held_out, text_column, shuffled=not held_out)
    if isinstance(data, Dataset):
        return data
    if len(sources) == 1:
        return as_dataset(data, text_column, None if tokens is None else 16 * tokens)
    rows, seen = [], 0
    for row in data:
        rows.append({"input_ids": tokens_of(row, tokenizer, text_column)})
        seen += len(rows[-1]["input_ids"])
        if tokens is not None and seen >= tokens:
            break
    return Dataset.from_list(rows)


def as_dataset(data: Any, text_column: str, characters: int | None = None) -> Any:
    """A `datasets.Dataset` of texts, the first with so many characters."""
    from datasets import Dataset

    rows, seen = [], 0
    for row in data:
        rows.append({text_column: row} if isinstance(row, str) else row)
        seen += len(rows[-1].get(text_column) or "")
        if characters is not None and seen > characters:
            break
    return Dataset.from_list(rows)
