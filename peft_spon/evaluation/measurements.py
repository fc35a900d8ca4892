# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a report holds beside the scores: where the damage is, how S acts along the text, speed, samples.

Everything is measured on the same text as the scores, with S on every token.
"""

import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from .._version import __version__
from ..cards import public_name
from ..data import Batch, check_arguments, check_tokenizer, count_tokens, iter_batches
from ..decode import prepare_for_decode, restore_from_decode
from ..modes import dense_mode, evaluation_mode, every_token_sparse
from ..sampling import continue_prompts, prompt_tokens
from ..sites import Site, resolve_sites, sites
from ..statistics import run
from .inside import TOGETHER, LayerWatch, block_drift
from .metrics import evaluate, running
from .report import finite, report_of
from .speed import Speed, measure_speed


# Tokens on which layers and blocks are looked at: enough for shares, little beside the scores.
LAYER_TOKENS = 4096
BLOCK_TOKENS = 2048
# Sequences at a time: the largest batch whose union is measured.
ROWS = max(TOGETHER)
SAMPLE_PROMPT, SAMPLE_TOKENS = 48, 64
SPEED_PROMPT, SPEED_TOKENS, SPEED_ROUNDS = 64, 32, 3
CURVES = ("loss", "kl", "eval_kl", "perplexity", "eval_perplexity", "top1_agreement", "eval_top1_agreement")


@torch.no_grad()
def measure_report(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any = None,
    *,
    adapter_name: str | None = None,
    training: str | os.PathLike | list[dict[str, Any]] | None = None,
    prompts: list[str] | None = None,
    samples: int = 3,
    speed: bool = True,
    command: str | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    max_tokens: int | None = 8192,
    text_column: str = "text",
    progress: bool | None = None,
) -> dict[str, Any]:
    """
    All that a report shows, as one dictionary that `json.dump` takes; [`write_report`] makes the page of it.

    Args:
        model (`torch.nn.Module`): a causal language model with a SPON adapter, or a merged one.
        data (`Iterable`): held-out texts, rows of a data set, or batches, see [`data.iter_batches`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for texts and for samples.
        adapter_name (`str`, *optional*): an active adapter; default: the first active one.
        training (`str` or `list`, *optional*): the trainer's `state.log_history`, a `trainer_state.json`, or a
            checkpoint with one.
        prompts (`list[str]`, *optional*): what the samples continue; default: beginnings of the data's rows.
        samples (`int`, *optional*, defaults to 3): how many of the data's rows; 0: no samples.
        speed (`bool`, *optional*, defaults to `True`): measure tokens per second, dense and prepared for decoding;
            the model is left as it was.
        command (`str`, *optional*): what the page says that it was made by.
        batch_size, max_length, max_tokens, text_column, progress: as in [`evaluate`].

    Returns:
        `dict`: see docs/report.md.

    Raises:
        `ValueError`: as [`evaluate`]; an encoder-decoder; data without token ids; a training without log.
        `TypeError`: an argument of another kind, as when two are swapped.
    """
    check_arguments(model, data, tokenizer, "measure_report")
    if model.config.is_encoder_decoder:
        raise ValueError(
            "measure_report is for causal language models; for an encoder-decoder write evaluate(...).to_html(path)."
        )
    log = None if training is None else training_log(training)
    if prompts:
        if tokenizer is None:
            raise ValueError("prompts are texts, and no tokenizer was given; pass tokenizer=...")
        check_tokenizer(tokenizer)
    batches = list(
        iter_batches(
            data,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            max_tokens=max_tokens,
            text_column=text_column,
        )
    )
    ids = equal_rows(batches)
    name, layers = resolve_sites(model, adapter_name)
    result = evaluate(model, batches, adapter_name=name, max_tokens=sum(map(count_tokens, batches)), progress=progress)
    report = report_of(result)
    ways = [way for way in ("dense", "sparse", "anchored") if report["scores"][way] is not None]
    if prompts:
        starts = [prompt_tokens(prompt, tokenizer) for prompt in prompts]
    else:
        starts = [row[: min(SAMPLE_PROMPT, len(row) // 2)].tolist() for row in ids[:samples]] if tokenizer else []

    watched = ids[: max(1, LAYER_TOKENS // ids.shape[1])]
    walked = ids[: max(1, BLOCK_TOKENS // ids.shape[1])]
    steps = -(-len(watched) // ROWS) + len(walked) + (len(ways) if starts else 0) + (1 if speed else 0)
    bar = tqdm(desc="measuring", total=steps, unit=" steps", disable=None if progress is None else not progress)
    with evaluation_mode(model), torch.compiler.set_stance("force_eager"), bar:
        seen = LayerWatch(layers, name)
        with every_token_sparse(model), seen:
            for rows in watched.split(ROWS):
                seen.shape = rows.shape
                run(model, {"input_ids": rows})
                bar.update()
        report["blocks"] = block_drift(model, list(layers), walked, ways, bar)
        report["samples"] = continued(model, tokenizer, starts, ways, bar) if starts else []
        if speed:
            report["speed"] = decoding_speed(model, ids[:1, :SPEED_PROMPT])
            bar.update()
    for layer in report["layers"]:
        layer.update(seen.of(layer["name"]))
    report["active"], report["union"] = seen.active(), seen.union()
    report["training"] = log or []
    report["model"] = about(model, name, layers)
    report["data"] |= {"rows": len(ids), "row_tokens": ids.shape[1], "layer_tokens": watched.numel()}
    report["command"] = command
    report["versions"] = versions()
    return finite(report)


def equal_rows(batches: list[Batch]) -> torch.Tensor:
    """Rows of real tokens, all of one length, int64 of shape (rows, tokens), of the length that leaves most tokens.

    In a random order, so that neighbours are seldom of one text.
    """
    rows = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(
                f"The data has batches of {sorted(batch)}; a report needs token ids (input_ids), or texts."
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        rows += [row[is_token] for row, is_token in zip(ids, mask, strict=True)]
    lengths = sorted(map(len, rows), reverse=True)
    length = max((length * (i + 1), length) for i, length in enumerate(lengths))[1]
    rows = [row[:length] for row in rows if len(row) >= length]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.stack(rows)[order].cpu()


def training_log(training: str | os.PathLike | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curves of a training: step and what was logged there.

    Raises:
        `ValueError`: a file or folder that has no log.
    """
    if isinstance(training, (str, os.PathLike)):
        path = Path(training)
        path = path / "trainer_state.json" if path.is_dir() else path
        try:
            training = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"'{path}' is no trainer_state.json with a log_history; give a checkpoint's folder, its file, or "
                "trainer.state.log_history."
            ) from None
    found = [{"step": entry["step"]} | {key: entry[key] for key in CURVES if key in entry} for entry in training]
    return [entry for entry in found if len(entry) > 1]


def about(model: nn.Module, adapter_name: str | None, layers: dict[str, Site]) -> dict[str, Any]:
    """What was measured."""
    name = model.config._name_or_path
    parameter = next(model.parameters())
    sparsifiers = [layer.sparsifier(adapter_name) for layer in layers.values()]
    weights = [s.n_in * s.n_out for s in sparsifiers]
    return {
        "name": public_name(name, Path(name).name or type(model).__name__),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "adapter": adapter_name,
        "criterion": ", ".join(dict.fromkeys(s.criterion.name for s in sparsifiers)),
        "sparsity": sum(s.sparsity * w for s, w in zip(sparsifiers, weights, strict=True)) / sum(weights),
        "prefill": next(iter(layers.values())).settings(adapter_name).prefill,
        "sparse_layers": len(layers),
    }


def versions() -> dict[str, str]:
    """Versions of what computes, and where."""
    return {
        "peft_spon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


# ---- layers ------------------------------------------------------------------------------------------------------


def continued(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], ways: list[str], bar: tqdm
) -> list[dict[str, str]]:
    """Greedy continuations of the prompts, as texts, in each way of running the model."""
    found = [{"prompt": tokenizer.decode(prompt)} for prompt in prompts]
    for way in ways:
        with running(model, way):
            for entry, prompt in zip(found, prompts, strict=True):
                whole = continue_prompts(model, [prompt], len(prompt) + SAMPLE_TOKENS, None, do_sample=False)[0]
                entry[way] = tokenizer.decode(whole[len(prompt) :])
        bar.update()
    return found


def decoding_speed(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Tokens per second of one sequence, dense and prepared for decoding, taking turns; the model is left as it was.

    The dense model has its weights as they lie without preparation.
    """
    was_prepared = [layer.decode_dtype for layer in sites(model).values() if layer.is_prepared]
    prepare = partial(prepare_for_decode, model, was_prepared[0] if was_prepared else None)
    with warnings.catch_warnings(), ExitStack() as stack, ExitStack() as turn:
        warnings.simplefilter("ignore")  # of layers that are not served: the report names them
        stack.callback(prepare if was_prepared else partial(restore_from_decode, model))

        def dense() -> nn.Module:
            restore_from_decode(model)
            turn.enter_context(dense_mode(model))
            return model

        def prepared() -> nn.Module:
            turn.close()
            prepare()
            return model

        models = {"dense": dense, "prepared": prepared}
        times = measure_speed(models, ids.to(next(model.parameters()).device), SPEED_TOKENS, SPEED_ROUNDS)
        summary = prepare()

    def entry(speed: Speed) -> dict[str, float]:
        return {"tokens_per_second": speed.tokens_per_second, "prompt_seconds": speed.prompt}

    return {
        **{name: entry(speed) for name, speed in times.items()},
        "prepared_layers": len(summary.prepared),
        "layers": len(summary.prepared) + len(summary.left),
        "left": dict(Counter(summary.left.values())),
        "kernels": {device: kernel.name for device, kernel in summary.kernels.items()},
        "int8": summary.weight_dtype is torch.int8,
        "prompt_tokens": ids.shape[1],
        "new_tokens": SPEED_TOKENS,
        "rounds": SPEED_ROUNDS,
    }
