# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Criteria, sparsities and allocations compared under one protocol, before and after training anchors and gains.

S on every token, in all linear layers of the transformer blocks; calibration and training on the first texts,
measuring on texts that are not among them; every case sees the same tokens, and what is reported is the realised
sparsity.
"""

import copy
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PrinterCallback, set_seed

from .allocation import allocate
from .budget import METHODS
from .calibration import calibrate
from .checksums import fields_checksum
from .config import SponConfig
from .criteria import CRITERIA
from .data import check_arguments, check_sizes, iter_batches
from .environment import environment
from .evaluation import Scores, evaluate
from .files import written_aside


MEASURED = ("realised", "kl", "top1_agreement", "perplexity", "standard_error", "perplexity_ratio")
# Rows of a batch in calibration and evaluation.
ROWS = 8
# In the figure: what an allocation's points look like.
MARKERS = {"uniform": "o", "kl": "^", "greedy": "s"}


@dataclass(frozen=True)
class Protocol:
    """
    What all cases of a study have in common.

    Args:
        steps (`int`, *optional*, defaults to 60): training steps of a repaired case; 0: nothing is trained.
        batch (`int`, *optional*, defaults to 4): blocks per training step.
        block (`int`, *optional*, defaults to 256): tokens per block, in everything.
        calibration_tokens (`int`, *optional*, defaults to 65536): on which thresholds are found.
        allocation_tokens (`int`, *optional*, defaults to 4096): on which an allocation is found.
        eval_tokens (`int`, *optional*, defaults to 32768): held-out tokens that are measured on.

    Raises:
        `ValueError`: a size that is no whole number above 0.
    """

    steps: int = 60
    batch: int = 4
    block: int = 256
    calibration_tokens: int = 65536
    allocation_tokens: int = 4096
    eval_tokens: int = 32768

    def __post_init__(self):
        check_sizes(**{name: value for name, value in asdict(self).items() if name != "steps" or value != 0})


@dataclass(frozen=True)
class Case:
    """One model of a study: criterion, wanted sparsity, how it is spread over the layers, seed of the training."""

    criterion: str
    sparsity: float
    allocation: str = "uniform"
    seed: int = 0


def cases(
    criteria: Iterable[str],
    sparsities: Iterable[float],
    allocations: Iterable[str] = ("uniform",),
    seeds: Iterable[int] = (0,),
) -> list[Case]:
    """All combinations, most telling first: whole sparsities, one after the other.

    Raises:
        `ValueError`: an unknown criterion or allocation, a sparsity outside (0, 1).
    """
    criteria, allocations, sparsities = list(criteria), list(allocations), list(sparsities)
    for what, values, known in (("criterion", criteria, CRITERIA), ("allocation", allocations, METHODS)):
        for value in values:
            if value not in known:
                raise ValueError(f"There is no {what} {value!r}; use one of {', '.join(known)}.")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity is {sparsity!r}; use a number between 0 and 1, for example 0.5.")
    return [Case(c, s, a, seed) for seed in seeds for s in sparsities for a in allocations for c in criteria]


def compare(
    base: nn.Module,
    train_texts: list[str],
    held_out_texts: list[str],
    tokenizer: Any,
    grid: list[Case],
    path: str | os.PathLike,
    protocol: Protocol | None = None,
    *,
    model_name: str | None = None,
    started: Callable[[Case, int, int], None] | None = None,
    finished: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """
    Measure every case that a file does not have yet, and add it to the file.

    Args:
        base (`torch.nn.Module`): a dense causal language model; it stays as it is, each case works on a copy.
        train_texts, held_out_texts (`list[str]`): to fit on, and to measure on; without a text in common.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        grid (`list[Case]`): what to compare, see [`cases`].
        path (`str`): JSON file, written after each case; one that is there is gone on with.
        protocol ([`Protocol`], *optional*): sizes and steps.
        model_name (`str`, *optional*): what the file calls the model; default: the last part of its path.
        started (`Callable`, *optional*): called before a case with it, the number of cases done, and of all.
        finished (`Callable`, *optional*): called with the new rows.

    Returns:
        `dict`: what the file holds: `study`, the protocol and versions, and `rows`, each with `criterion`, `sparsity`
        (wanted), `allocation`, `seed`, `repaired`, `realised`, `kl`, `top1_agreement`, `perplexity`,
        `standard_error`, `perplexity_ratio`, `minutes` (CPU time of calibration and allocation; and of training).

    Raises:
        `ValueError`: texts in common, too little text, a file of another study.
        `ImportError`: training needs TRL.
    """
    check_arguments(base, train_texts, tokenizer, "compare")
    protocol = Protocol() if protocol is None else protocol
    if common := set(train_texts) & set(held_out_texts):
        raise ValueError(f"{len(common)} texts are both fitted on and measured on; leave them out of one.")
    name = model_name or Path(base.config._name_or_path).name or type(base).__name__
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    data = fields_checksum({"train": train_texts, "held_out": held_out_texts})[:12]
    study = {"model": name, "dtype": dtype, "data": data, **asdict(protocol)}
    found = read_study(path, study)
    wanted = [case for case in grid if not rows_of(found, case)]
    length = protocol.block
    trained = protocol.steps * protocol.batch * length
    train = _blocks(
        train_texts, tokenizer, max(trained, protocol.calibration_tokens, protocol.allocation_tokens), length
    )
    held_out = _blocks(held_out_texts, tokenizer, protocol.eval_tokens, length)
    for case in wanted:
        if started is not None:
            started(case, len(grid) - len(wanted) + wanted.index(case), len(grid))
        rows = measure(base, train, held_out, tokenizer, case, protocol)
        new = [
            row
            for row in rows
            if row["criterion"] != "dense" or not any(r["criterion"] == "dense" for r in found["rows"])
        ]
        found["rows"] += new
        found["environment"] = environment()
        write_json(found, path)
        if finished is not None:
            finished(new)
    return found


def read_study(path: str | os.PathLike, study: dict[str, Any]) -> dict[str, Any]:
    """The rows that a file has of this study, or an empty one.

    Raises:
        `ValueError`: the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        return {"study": study, "rows": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there = found["study"]
        found["rows"] = list(found["rows"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of a study; give another name.") from None
    if {"data": study.get("data"), **there} != study:  # older files do not tell
        differing = sorted(key for key in {*study, *there} if study.get(key) != there.get(key))
        raise ValueError(
            f"{path} holds a study with another protocol or other data "
            f"({', '.join(f'{k} {there.get(k)!r}' for k in differing)} there, "
            f"{', '.join(f'{k} {study.get(k)!r}' for k in differing)} here); give another name."
        )
    return found


def rows_of(found: dict[str, Any], case: Case) -> list[dict[str, Any]]:
    """The rows of a case."""
    return [row for row in found["rows"] if all(row.get(key) == value for key, value in asdict(case).items())]


def measure(
    base: nn.Module, train: torch.Tensor, held_out: torch.Tensor, tokenizer: Any, case: Case, protocol: Protocol
) -> list[dict[str, Any]]:
    """
    The rows of one case: dense, plain, and, if there are training steps, repaired.

    Args:
        base (`torch.nn.Module`): the dense model, which stays as it is.
        train, held_out (`torch.Tensor`): token ids, int64, shape (blocks, block).
    """
    set_seed(case.seed)
    config = SponConfig(sparsity=case.sparsity, criterion=case.criterion, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    minutes = _Minutes()
    size = {"max_tokens": protocol.calibration_tokens, "max_length": protocol.block}
    calibrate(model, _batches(train), progress=False, **size)
    rows = [{"input_ids": row[None]} for row in train]
    allocate(
        model, rows, method=case.allocation, max_tokens=protocol.allocation_tokens, seed=case.seed, progress=False
    )
    fitting = minutes()
    plain = evaluate(model, _batches(held_out), progress=False)  # before training, which fits thresholds anew
    key = asdict(case)
    dense = {**key, "criterion": "dense", "sparsity": 0.0, "allocation": "uniform", "repaired": False, "minutes": 0.0}
    found = [{**dense, **_measured(plain.dense)}]
    found.append({**key, "repaired": False, **_measured(plain.sparse), "minutes": fitting})
    if protocol.steps:
        minutes()  # from here on
        train_anchors(model, train[: protocol.steps * protocol.batch], tokenizer, case.seed, protocol)
        both = round(fitting + minutes(), 2)
        repaired = evaluate(model, _batches(held_out), progress=False).anchored
        found.append({**key, "repaired": True, **_measured(repaired), "minutes": both})
    return found


def train_anchors(model: nn.Module, ids: torch.Tensor, tokenizer: Any, seed: int, protocol: Protocol) -> None:
    """The default recipe, on these blocks in a random order."""
    from datasets import Dataset

    from .trainer import SponTrainer
    from .trainer_config import SponTrainingConfig

    rows = ids.tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SponTrainingConfig(
            folder,
            max_steps=protocol.steps,
            per_device_train_batch_size=protocol.batch,
            max_length=protocol.block,
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=next(model.parameters()).device.type == "cpu",
            seed=seed,
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = SponTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def study_table(found: dict[str, Any]) -> str:
    """The rows of a study as Markdown, means over seeds."""
    columns = ["sparsity", "criterion", "allocation", "anchors and gains", "realised", "KL", "top-1 as dense"]
    columns += ["perplexity", "CPU minutes"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in means_over_seeds(found):
        repaired = "" if row["criterion"] == "dense" else "trained" if row["repaired"] else "none"
        lines.append(
            f"| {row['sparsity']:.0%} | {row['criterion']} | {row['allocation']} | {repaired} | {row['realised']:.1%} "
            f"| {row['kl']:.4f} | {row['top1_agreement']:.1%} | {row['perplexity']:.3f} ± {row['standard_error']:.3f} "
            f"| {row['minutes']:.2f} |"
        )
    return "\n".join(lines)


def means_over_seeds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per criterion, sparsity, allocation and repair, in an order to read; `seeds`: how many there were."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        key = (row["sparsity"], row["repaired"], row["allocation"] != "uniform", row["allocation"], row["criterion"])
        groups.setdefault(key, []).append(row)
    known = {name: index for index, name in enumerate(dict.fromkeys(row["criterion"] for row in found["rows"]))}
    means = []
    for key in sorted(groups, key=lambda key: (*key[:4], known[key[4]])):
        rows = groups[key]
        mean = {name: statistics.fmean(row[name] for row in rows) for name in (*MEASURED, "minutes")}
        means.append({**rows[0], **mean, "seeds": len(rows)})
    return means


def draw_study(found: dict[str, Any], path: str | os.PathLike) -> None:
    """
    KL and perplexity against realised sparsity, as a figure.

    Args:
        found (`dict`): what [`compare`] gives.
        path (`str`): `.png`, `.svg` or `.pdf`.

    Raises:
        `ImportError`: matplotlib is not installed. `ValueError`: no sparse row.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise ImportError("A figure needs matplotlib: pip install 'peft_spon[plot]'") from error
    rows = means_over_seeds(found)
    dense = [row for row in rows if row["criterion"] == "dense"]
    sparse = [row for row in rows if row["criterion"] != "dense"]
    if not sparse:
        raise ValueError("The study has no row yet.")
    criteria, allocations = (list(dict.fromkeys(row[key] for row in sparse)) for key in ("criterion", "allocation"))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, measure_, label in (
        (axes[0], "kl", "KL to the dense model (nats per token)"),
        (axes[1], "perplexity", "perplexity"),
    ):
        for row in dense if measure_ == "perplexity" else []:
            ax.axhline(row["perplexity"], color="black", linewidth=0.8)
        for case in itertools.product(criteria, allocations, (False, True)):
            line = [row for row in sparse if (row["criterion"], row["allocation"], row["repaired"]) == case]
            line.sort(key=lambda row: row["realised"])
            values = [row[measure_] if math.isfinite(row[measure_]) else math.nan for row in line]
            criterion, allocation, repaired = case
            style = {"color": _color(criteria.index(criterion)), "linestyle": "-" if repaired else ":"}
            ax.plot([row["realised"] for row in line], values, marker=MARKERS[allocation], markersize=4, **style)
        ax.set(xlabel="realised sparsity", ylabel=label, yscale="log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}%")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
    # Color, marker and line are one dial each: a legend of all their combinations would not fit.
    keys = [Line2D([], [], color=_color(index), linewidth=3, label=name) for index, name in enumerate(criteria)]
    for allocation in allocations:
        label = "every layer alike" if allocation == "uniform" else f"allocated ({allocation})"
        keys.append(Line2D([], [], color="gray", marker=MARKERS[allocation], linestyle="", label=label))
    for repaired in dict.fromkeys(row["repaired"] for row in sparse):
        label = "anchors and gains" if repaired else "not trained"
        keys.append(Line2D([], [], color="gray", linestyle="-" if repaired else ":", label=label))
    keys += [Line2D([], [], color="black", linewidth=0.8, label="dense")] if dense else []
    figure.legend(handles=keys, loc="outside right upper", fontsize=8)
    study = found["study"]
    figure.suptitle(f"{study['model']}, {study['eval_tokens']:,} held-out tokens, S on every token", fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _color(index: int) -> str:
    """Of the criterion with that number, in the figure: matplotlib's cycle of ten."""
    return f"C{index % 10}"


def write_json(found: Any, path: str | os.PathLike) -> None:
    """A JSON file that is whole at any moment."""
    path = Path(path)
    with written_aside(path.parent) as aside:
        (aside / path.name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(aside / path.name, path)


class _Minutes:
    """CPU time of this process since the call before, in minutes."""

    def __init__(self):
        self.begun = time.process_time()

    def __call__(self) -> float:
        before, self.begun = self.begun, time.process_time()
        return round((self.begun - before) / 60, 2)


def _blocks(texts: list[str], tokenizer: Any, tokens: int, length: int) -> torch.Tensor:
    """Token ids, shape (blocks, length), of the first texts, joined."""
    batches = iter_batches(texts, tokenizer, batch_size=1, max_length=length, max_tokens=tokens)
    found = [batch["input_ids"] for batch in batches if batch["input_ids"].shape[1] == length]
    if len(found) < tokens // length:
        raise ValueError(
            f"The texts have {len(found) * length:,} tokens in blocks of {length}, but {tokens:,} are asked for."
        )
    return torch.cat(found)


def _batches(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": rows} for rows in ids.split(ROWS)]


def _measured(scores: Scores) -> dict[str, float]:
    """Scores with the realised sparsity apart from the wanted one."""
    values = {**asdict(scores), "realised": scores.sparsity}
    return {name: values[name] for name in MEASURED}
