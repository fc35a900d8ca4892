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
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from .._version import __version__
from ..cards import public_name
from ..criteria import threshold_at
from ..data import Batch, check_arguments, check_tokenizer, count_tokens, iter_batches
from ..decode import prepare_for_decode, restore_from_decode
from ..layer import SponLayer
from ..modes import attribute, dense_mode, evaluation_mode, every_token_sparse
from ..sampling import continue_prompts, prompt_tokens
from ..sites import Site, plain_name, resolve_sites, sites
from ..statistics import Observer, ScoreHistogram, bin_counts, run
from .metrics import evaluate, running
from .report import finite, report_of
from .speed import Speed, measure_speed


# Tokens on which layers and blocks are looked at: enough for shares, little beside the scores.
LAYER_TOKENS = 4096
BLOCK_TOKENS = 2048
# How many tokens a batch, or a window of speculative decoding, reads the weights for.
TOGETHER = (1, 2, 4, 8)
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
        seen = _Layers(layers, name)
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


class _Layers(Observer):
    """What S does in every layer, in the sparse model with anchors."""

    shape: torch.Size  # of the model's input: rows, tokens

    def __init__(self, layers: dict[str, Site], adapter_name: str | None):
        super().__init__(layers, adapter_name)
        self.histograms: dict[str, ScoreHistogram] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self.along: dict[str, torch.Tensor] = {}
        self.together: dict[str, torch.Tensor] = {}
        self.rows: Counter[str] = Counter()

    def see(self, name: str, layer: Site, x: torch.Tensor, is_new: bool) -> None:
        sparsifier, state = layer.sparsifier(self.adapter_name), layer.sparsifier_state(self.adapter_name)
        z = sparsifier.criterion.encode(x, state)
        if sparsifier.uses_threshold:
            if name not in self.histograms:
                self.histograms[name] = ScoreHistogram(x.device)
            self.histograms[name].add(bin_counts(sparsifier.criterion.score(z, state)))
        self.squares[name] = self.squares.get(name, 0) + removal(layer, x, sparsifier(x, state))
        # An expert sees some of the tokens: it has neither their order nor their rows.
        if x.shape[:-1].numel() == self.shape.numel():
            kept = sparsifier.keep(z, state).bool().view(*self.shape, -1)
            self.along[name] = self.along.get(name, 0) + kept_along(kept) * len(kept)
            self.rows[name] += len(kept)
            self.together[name] = self.together.get(name, 0) + kept_together(kept)

    def of(self, name: str) -> dict[str, Any]:
        """One layer's entries in the report."""
        layer = self.layers[name]
        sparsifier, state = layer.sparsifier(self.adapter_name), layer.sparsifier_state(self.adapter_name)
        found = {"wanted": sparsifier.sparsity, "weights": sparsifier.n_in * sparsifier.n_out}
        if name in self.histograms and sparsifier.sparsity > 0:
            found["threshold"] = float(state["threshold"])
            found["threshold_here"] = float(threshold_at(self.histograms[name].quantiles(), sparsifier.zeroed_share))
        if name in self.squares:
            whole, removed = self.squares[name].sqrt().tolist()
            found |= {"removed": removed / whole} if whole > 0 else {}
        if isinstance(layer, SponLayer) and layer.has_repair(self.adapter_name):
            found["anchor_norm"] = float(layer.spon_anchor[self.adapter_name].detach().float().norm())
            if self.adapter_name in layer.spon_gain:
                found["gain_rms"] = float(layer.spon_gain[self.adapter_name].detach().float().square().mean().sqrt())
        return found

    def _mean(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Over layers, weighted by their weights."""
        sizes = {name: self.layers[name].sparsifier(self.adapter_name) for name in values}
        weights = {name: s.n_in * s.n_out for name, s in sizes.items()}
        return sum(values[name] * weights[name] for name in values) / sum(weights.values())

    def active(self) -> dict[str, list[float]]:
        """Share of the entries that are kept, along the text."""
        if not self.along:
            return {}
        now, always, ever = self._mean({name: total / self.rows[name] for name, total in self.along.items()})
        tokens = lengths(len(now))
        begins = [0, *tokens[:-1]]
        return {
            "tokens": tokens,
            "now": [float(now[begin:end].mean()) for begin, end in zip(begins, tokens, strict=True)],
            "always": [float(always[end - 1]) for end in tokens],
            "ever": [float(ever[end - 1]) for end in tokens],
        }

    def union(self) -> dict[str, list[float | None]]:
        """Share of the weights that a batch or a window does not read; None where there are too few rows or tokens."""
        if not self.together:
            return {}
        unread: dict[str, torch.Tensor] = {}
        for name, (kept, looked_at) in self.together.items():
            zeroed = 1 - kept / looked_at
            independent = zeroed[0, 0] ** torch.tensor(TOGETHER)
            # What a criterion reads beside W is read once for all.
            unread[name] = self.layers[name].sparsifier(self.adapter_name).unread(torch.stack([*zeroed, independent]))
        return {
            "tokens": list(TOGETHER),
            **dict(zip(("windows", "batches", "independent"), self._mean(unread).tolist(), strict=True)),
        }


def removal(layer: Site, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Squares, summed over tokens and features, of W x and of W (x - S(x)); fp64, shape (2,)."""

    def dense(value: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, SponLayer):
            return layer.base_layer(value)
        with attribute([layer], "_dense", True):
            return layer.forward(value)  # a call would show the observer its own question

    bias = dense(torch.zeros_like(x[..., :1, :]))
    parts = (dense(x) - bias, dense(x - kept) - bias)
    return torch.stack([part.float().square().sum(dtype=torch.float64) for part in parts]).cpu()


def kept_along(kept: torch.Tensor) -> torch.Tensor:
    """Shares of the entries of a layer's input, by position: kept there; at every token so far; at any token so far.

    Args:
        kept (`torch.Tensor`): bool, shape (rows, tokens, in).

    Returns:
        `torch.Tensor`: fp64, shape (3, tokens), mean over rows and entries.
    """
    always, ever, shares = torch.ones_like(kept[:, 0]), torch.zeros_like(kept[:, 0]), []
    for now in kept.unbind(1):
        always, ever = always & now, ever | now
        shares.append(torch.stack([part.float().mean() for part in (now, always, ever)]))
    return torch.stack(shares, 1).double().cpu()


def kept_together(kept: torch.Tensor) -> torch.Tensor:
    """Entries that at least one of n tokens keeps, for n of `TOGETHER`, and how many entries were looked at.

    Args:
        kept (`torch.Tensor`): bool, shape (rows, tokens, in).

    Returns:
        `torch.Tensor`: fp64, shape (2, 2, len(TOGETHER)): kept and looked at, by consecutive tokens of a row and by
            rows at the same position.
    """
    rows, tokens, width = kept.shape
    found = torch.zeros(2, 2, len(TOGETHER), dtype=torch.float64)
    for i, count in enumerate(TOGETHER):
        windows = kept[:, : tokens // count * count].reshape(rows, -1, count, width).any(2)
        batches = kept[: rows // count * count].reshape(-1, count, tokens, width).any(1)
        for j, union in enumerate((windows, batches)):
            found[:, j, i] = torch.tensor([float(union.sum(dtype=torch.float64)), union.numel()])
    return found


def lengths(tokens: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the whole."""
    found = {size for i in range(tokens.bit_length()) for size in (1 << i, 3 << i)} | {tokens}
    return sorted(size for size in found if size <= tokens)


# ---- blocks ------------------------------------------------------------------------------------------------------


def block_drift(
    model: nn.Module, names: list[str], ids: torch.Tensor, ways: list[str], bar: tqdm
) -> list[dict[str, Any]]:
    """How far the hidden states behind each block are from the dense model's: the mean over tokens of
    |h - h_dense| / |h_dense|, in each way of running the model but the dense one."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    blocks = {name: modules[name] for name in dict.fromkeys(map(block_name, names)) if name}
    states: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return hook

    sums = {name: dict.fromkeys(ways[1:], 0.0) for name in blocks}
    with ExitStack() as stack:
        for name, module in blocks.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        for row in ids.split(1):
            dense: dict[str, torch.Tensor] = {}
            for way in ways:
                with running(model, way):
                    run(model, {"input_ids": row})
                if way == "dense":
                    dense = {name: state.float() for name, state in states.items()}
                    continue
                for name, state in states.items():
                    share = (state.float() - dense[name]).norm(dim=-1) / dense[name].norm(dim=-1).clamp_min(1e-12)
                    sums[name][way] += float(share.mean()) / len(ids)
            states.clear()
            bar.update()
    return [{"name": name, **shares} for name, shares in sums.items()]


def block_name(name: str) -> str:
    """Of a layer's name the part up to the first number: "model.layers.3"; empty without one."""
    parts = name.split(".")
    first = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:first])


# ---- text and time -----------------------------------------------------------------------------------------------


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
    was_prepared = any(layer.is_prepared for layer in sites(model).values())
    with warnings.catch_warnings(), ExitStack() as stack, ExitStack() as turn:
        warnings.simplefilter("ignore")  # of layers that are not served: the report names them
        stack.callback(prepare_for_decode if was_prepared else restore_from_decode, model)

        def dense() -> nn.Module:
            restore_from_decode(model)
            turn.enter_context(dense_mode(model))
            return model

        def prepared() -> nn.Module:
            turn.close()
            prepare_for_decode(model)
            return model

        models = {"dense": dense, "prepared": prepared}
        times = measure_speed(models, ids.to(next(model.parameters()).device), SPEED_TOKENS, SPEED_ROUNDS)
        summary = prepare_for_decode(model)

    def entry(speed: Speed) -> dict[str, float]:
        return {"tokens_per_second": speed.tokens_per_second, "prompt_seconds": speed.prompt}

    return {
        **{name: entry(speed) for name, speed in times.items()},
        "prepared_layers": len(summary.prepared),
        "layers": len(summary.prepared) + len(summary.left),
        "left": dict(Counter(summary.left.values())),
        "kernels": {device: kernel.name for device, kernel in summary.kernels.items()},
        "prompt_tokens": ids.shape[1],
        "new_tokens": SPEED_TOKENS,
        "rounds": SPEED_ROUNDS,
    }
