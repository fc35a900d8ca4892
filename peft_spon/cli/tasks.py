# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `harness`: scores on tasks of lm-evaluation-harness.

Parameters are the flags, docstrings the help, and what is returned is the JSON; see `parser.py`.
"""

from pathlib import Path
from typing import Any

from .. import study
from ..evaluation.measurements import about, versions
from ..sites import resolve_sites
from .models import Dtype, check_new, load_measured, load_tokenizer, set_dial
from .output import jsonable


def harness(
    model: str,
    tasks: list[str],
    adapter: str | None = None,
    sparsity: float | None = None,
    out: Path | None = None,
    states: list[str] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    include_path: Path | None = None,
    every_token: bool = True,
    chat_template: bool = False,
    prepare: bool = False,
    options: dict[str, Any] | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    force: bool = False,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Scores of lm-evaluation-harness, of the dense model, the sparse one, and the sparse one with anchors.

    A dense model by mistake is an error, and the realised sparsity stands beside the scores; of tasks that generate,
    the length of an answer and the time it takes, too (--batch-size 1 for the time a user waits).

    Examples:
        peft-spon harness --model ADAPTER --tasks gsm8k arc_easy --limit 100 --out results.json
        peft-spon harness --model MERGED --tasks gsm8k --batch-size 1 --chat-template --json > result.json
        peft-spon harness --model ADAPTER --tasks my_task --include-path my-tasks/ --states sparse anchored

    Args:
        model: folder or Hub name of an adapter, or of a merged model; or of the base of --adapter.
        tasks: names of tasks of lm_eval, or task files (.yaml), with spaces or commas between them.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        sparsity: turn the dial of the adapter to this.
        out: JSON file for the result.
        states: which of dense, sparse, anchored. Default all there are.
        num_fewshot: examples in front of each question. Default each task's own number.
        limit: only the first so many documents of each task, or that share of them if below 1.
        batch_size: rows at a time.
        max_length: tokens of the longest input. Default the model's.
        include_path: folder with task files of your own.
        every_token: sparsify every token; --no-every-token leaves tokens dense as the adapter's prefill says.
        chat_template: put the tokenizer's chat template around each question.
        prepare: prepare the model for decoding, so that an answer takes the time of the sparse kernels.
        options: other arguments of lm_eval.simple_evaluate, and metadata for the tasks, as YAML or JSON.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        force: write over --out.
    """
    from ..evaluation.harness import harness as run_tasks

    if out is not None:
        check_new(out, force, is_folder=False)
    loaded = load_measured(model, adapter, dtype, device)
    if sparsity is not None:
        set_dial(loaded, sparsity)
    if prepare:
        print(loaded.prepare_for_decode())
    result = run_tasks(
        loaded,
        load_tokenizer(model, adapter),
        [task for part in tasks for task in part.split(",") if task],
        states=states,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        include_path=include_path,
        every_token=every_token,
        **{"apply_chat_template": chat_template, **(options or {})},
    )
    print(result)
    found = {**result.to_dict(), "command": command, "versions": versions()}
    found["model"] = about(loaded, *resolve_sites(loaded, None))
    if out is not None:
        study.write_json(jsonable(found), out)
        print(f"The result is in {out}.")
    return found
