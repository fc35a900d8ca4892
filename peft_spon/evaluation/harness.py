# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-evaluation-harness on a live model: dense, sparse and sparse with anchors, on the same tasks.

To be imported by its own name, as it needs lm_eval: `from peft_spon.evaluation.harness import harness`.
"""

import copy
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import describe
from ..modes import attribute, dense_mode, evaluation_mode, every_token_sparse, without_anchors
from ..prefill import layers_with_prefill
from ..sites import Site, resolve_sites
from ..sparse_linear import Prompt
from ..statistics import Zeros, run
from .metrics import modes_of, running, which_tokens
from .task_scores import LABELS, HarnessResult, TaskScores


try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError("The harness needs lm_eval: pip install 'peft_spon[harness]'") from error

# Tokens on which it is checked that S is active.
CHECKED_TOKENS = 128


class _Seen(Zeros):
    """What S does while one task runs."""

    def __init__(self, layers: dict[str, Site], adapter_name: str | None):
        super().__init__(layers, adapter_name)
        self.tokens = self.sparse = 0
        self.answers: list[int] = []
        self.seconds = 0.0

    def see(self, name: str, layer: Site, x: torch.Tensor, is_new: bool) -> None:
        super().see(name, layer, x, is_new)
        has_s = torch.zeros(*x.shape[:-1], 1, dtype=torch.bool, device=x.device)
        has_s[..., layer.first_sparse_token(x, self.adapter_name) :, :] = True
        has_s = self.tokens_of(has_s)
        self.tokens += has_s.numel()
        self.sparse += int(has_s.sum())


class _LiveModel(HFLM):
    """lm_eval's view of a model that runs in one way, task after task, with an eye on S."""

    is_set_up = False

    def __init__(self, model: nn.Module, tokenizer: Any, mode: str, seen: Callable[[], _Seen], **settings: Any):
        # A copy, as a tokenizer without a padding token is given one.
        super().__init__(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), **settings)
        self.mode, self.new_seen, self.tasks = mode, seen, {}
        self.is_checked = mode == "dense"
        self.is_set_up = True

    @property
    def model(self) -> nn.Module | None:
        """None until all is set up: lm_eval would tie its weights anew, which breaks an adapted output head."""
        return self._model if self.is_set_up else None

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        answers = self._by_task(super().generate_until, requests, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.tasks[request.task_name].answers.append(len(self.tok_encode(answer, add_special_tokens=False)))
        return answers

    def _by_task(self, method: Callable[..., list], requests: list, disable_tqdm: bool) -> list:
        """lm_eval hands over the requests of all tasks at once."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name, []).append(place)
        found = [None] * len(requests)
        for task, where in places.items():
            self.seen = self.tasks.setdefault(task, self.new_seen())
            for place, answer in zip(where, method([requests[i] for i in where], disable_tqdm), strict=True):
                found[place] = answer
        return found

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list:
        self.inputs = {hash(tuple((c + t)[-(self.max_length + 1) :][:-1])) for _, c, t in requests}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        mask = self._mask(inps)
        if self.mode == "dense" or mask is None:
            return super()._model_call(inps)
        self._check(inps[:1])
        self.seen.start_batch({"attention_mask": mask})
        with self.seen:
            logits = super()._model_call(inps)
        if not self.seen.sparse:
            raise ValueError(
                "S was on no token: a log-likelihood is of a prompt, and the adapter's prefill leaves prompts dense, "
                "so this would be the dense model's score. Use every_token=True."
            )
        return logits

    def _mask(self, inps: torch.Tensor) -> torch.Tensor | None:
        """Which tokens are no padding: lm_eval puts zeros behind the rows, which may be tokens, too.

        None for rows of no request: the search for a batch size.
        """
        lengths = []
        for row in inps.tolist():
            least = max((i + 1 for i, token in enumerate(row) if token), default=1)
            lengths.append(next((n for n in range(least, len(row) + 1) if hash(tuple(row[:n])) in self.inputs), None))
        if None in lengths:
            return None
        return torch.arange(inps.shape[1], device=inps.device) < torch.tensor(lengths, device=inps.device)[:, None]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        begun = time.perf_counter()
        found = super()._model_generate(context, max_length, stop, **kwargs)
        self.seen.seconds += time.perf_counter() - begun
        if self.mode != "dense":
            self._count(context.shape[1], found, kwargs["attention_mask"])
        return found

    def _count(self, length: int, found: torch.Tensor, mask: torch.Tensor) -> None:
        """What S did to the tokens that `generate` read, in a forward of its own: to watch it would take its time.

        found (rows, tokens): prompts of `length` with what was generated, mask (rows, length) of the prompts.
        """
        for row, is_token in zip(found, mask.bool(), strict=True):
            answer = row[length:-1]  # its last token is read by none
            ids = torch.cat([row[:length][is_token], answer[answer != self.tokenizer.pad_token_id]])[None]
            self._check(ids)
            # Where `prefill` leaves tokens dense, padding counts.
            padding = int((~is_token).sum())
            prompt = Prompt(length, cached=padding, tokens=ids.shape[1])
            batch = {"input_ids": ids}
            self.seen.start_batch(batch)
            with torch.no_grad(), attribute(layers_with_prefill(self.model), "prompt", prompt), self.seen:
                run(self.model, batch)

    def _check(self, ids: torch.Tensor) -> None:
        """Raises `ValueError` if S makes no difference to the logits, as lm_eval gets them. Looks once."""
        if self.is_checked:
            return
        ids = ids[:, :CHECKED_TOKENS]
        with without_anchors(self.model), every_token_sparse(self.model):
            sparse = super()._model_call(ids)
        with dense_mode(self.model):
            dense = super()._model_call(ids)
        if torch.equal(sparse, dense):
            raise ValueError(
                "S is not active: the logits are the dense model's, to the last bit, so the scores would be, too. "
                "Leave the block that switches it off, or turn its sparsity up from 0 (set_sparsity)."
            )
        self.is_checked = True


def harness(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    states: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    include_path: str | os.PathLike | None = None,
    adapter_name: str | None = None,
    every_token: bool = True,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> HarnessResult:
    """
    Scores of lm-evaluation-harness, of the dense model, the sparse one and the sparse one with anchors.

    Every run checks that S is active: a dense model by mistake is an error, never a score.

    Args:
        model (`torch.nn.Module`): a causal language model with a SPON adapter, or a merged one.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        tasks (`str` or `Sequence[str]`): lm_eval's names, or paths of task files (`.yaml`).
        states (`Sequence[str]`, *optional*): of "dense", "sparse", "anchored"; default: all there are.
        num_fewshot (`int`, *optional*): examples in front of each question; default: the task's own number.
        limit (`float`, *optional*): only the first so many documents of each task, or that share of them if below 1.
        batch_size (`int` or `str`, *optional*, defaults to 8): rows at a time, or "auto". 1 for the time to an answer.
        max_length (`int`, *optional*): tokens of the longest input; default: the model's.
        include_path (`str`, *optional*): folder with task files of your own.
        adapter_name (`str`, *optional*): an active adapter; default: the first active one.
        every_token (`bool`, *optional*, defaults to `True`): sparsify every token; `False`: as the adapter's
            `prefill` says.
        metadata (`dict`, *optional*): of the tasks, for example `{"max_seq_lengths": [4096]}` for ruler.
        **options: further arguments of `lm_eval.simple_evaluate`, such as `apply_chat_template`, `gen_kwargs`.

    Returns:
        [`HarnessResult`]

    Raises:
        `ValueError`: no active SPON adapter; S makes no difference, or is on no token; an unknown task or state; an
            encoder-decoder.
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    order = "The order is harness(model, tokenizer, tasks)."
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {describe(model)}, not a torch.nn.Module. {order}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is {describe(tokenizer)}, not a tokenizer of transformers. {order}")
    name, layers = resolve_sites(model, adapter_name)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"The harness is for causal language models; this is a {type(model).__name__}.")
    known = modes_of(model, name, layers)
    for state in states or ():
        if state not in known:
            raise ValueError(f"There is no state {state!r}; this model has {list(known)}.")
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    # The tokenizer: for tasks that cut their texts to a number of tokens, as ruler's.
    manager = _task_manager(tasks, include_path, {"tokenizer": tokenizer.name_or_path, **(metadata or {})})
    found = dict.fromkeys(LABELS)
    # As in `evaluate`: hooks on a compiled model's layers are seen by none of its graphs.
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
        for mode in states or known:
            live = _LiveModel(
                model, tokenizer, mode, lambda: _Seen(layers, name), batch_size=batch_size, max_length=max_length
            )
            settings = {"num_fewshot": num_fewshot, "limit": limit, "task_manager": manager, "log_samples": False}
            with running(model, mode, every_token):
                given = simple_evaluate(model=live, tasks=tasks, **{**settings, **options})
            found[mode] = _scores(given, live)
    return HarnessResult(
        **found,
        sparse_tokens=which_tokens(name, layers, every_token),
        sparse_layers=len(layers),
        batch_size=batch_size,
        limit=limit,
        lm_eval=packages.version("lm_eval"),
    )


def _task_manager(tasks: list[str], include_path: Any, metadata: dict[str, Any]) -> TaskManager:
    """Knows where tasks are. To look through lm_eval's own takes ten seconds, and is done only if one is wanted."""
    manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
    if not all(task in manager.all_subtasks or Path(task).is_file() for task in tasks):
        manager = TaskManager(include_path=include_path, metadata=metadata)
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            raise ValueError(
                f"lm_eval has no task {task!r}: `lm_eval ls tasks` lists them; include_path adds a folder of yours."
            )
    return manager


def _scores(given: dict[str, Any], live: _LiveModel) -> dict[str, TaskScores]:
    """What lm_eval found, with what was seen of each task."""
    found = {}
    for task, values in {**given["results"], **given.get("groups", {})}.items():
        numbers = {
            key.removesuffix(",none"): v for key, v in values.items() if "," in key and isinstance(v, float | int)
        }
        errors = {key.replace("_stderr", "", 1): v for key, v in numbers.items() if "_stderr" in key}
        scores = {key: v for key, v in numbers.items() if "_stderr" not in key}
        about = given["n-samples"].get(task, {}).get("effective"), given["n-shot"].get(task)
        seen, rest = live.tasks.get(task), {}
        if seen is not None:
            is_dense = live.mode == "dense"
            rest["sparsity"] = 0.0 if is_dense else seen.overall()
            rest["sparse_tokens"] = 0.0 if is_dense else seen.sparse / max(seen.tokens, 1)
            if not is_dense and not rest["sparsity"]:
                raise ValueError(f"S zeroed nothing in the task {task!r}; the scores would be the dense model's.")
            if seen.answers:
                rest["answer_tokens"] = sum(seen.answers) / len(seen.answers)
                rest["answer_seconds"] = seen.seconds / len(seen.answers)
        found[task] = TaskScores(scores, errors, *about, **rest)
    return found
