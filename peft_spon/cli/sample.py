# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `sample`: text that the dense model writes itself, to train on.

Parameters are the flags, docstrings the help, and what is returned is the JSON; see `parser.py`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data import CONVERSATIONS, check_sizes
from ..sampling import sample_texts
from ..texts import ENCODING, TABLES, read_data
from .models import Dtype, check_new, load_dense, load_tokenizer


def sample(
    model: str,
    out: Path,
    adapter: str | None = None,
    texts: int = 256,
    max_length: int | None = None,
    prompts: list[str] | None = None,
    chat: bool = False,
    temperature: float = 1.0,
    batch_size: int = 32,
    text_column: str = "text",
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Texts drawn from the dense model, to calibrate, allocate and train on: alone, or mixed with texts that you have.

    For example peft-spon train --data texts.txt own.jsonl ... takes as much of each.

    Examples:
        peft-spon sample --model MODEL --texts 256 --out own.jsonl
        peft-spon sample --model MODEL --prompts questions.txt --chat --out answers.jsonl
        peft-spon sample --model MODEL --prompts conversations.jsonl --out answers.jsonl --resume

    Args:
        model: folder or Hub name of a causal language model, or of an adapter, whose base is then sampled.
        out: file for the texts and their tokens, .jsonl: it is written to as they come.
        adapter: folder or Hub name of an adapter, beside its base as --model.
        texts: how many.
        max_length: tokens of a text at most, its prompt included, which is half of them at most. Default 512, or as
            many as the model has positions.
        prompts: what the texts begin with, taken in turn: text files with a prompt a line, or data with a column
            (--text-column, or prompt) of texts or one of messages, which the model answers. Default nothing, the
            beginning-of-text token.
        chat: the prompts are questions of a user, and the texts the model's answers by its chat template.
        temperature: divides the logits.
        batch_size: texts at a time; more cost hardly more time.
        text_column: column with the prompts, for data with columns.
        seed: of the sampling.
        dtype: of the model, see calibrate --help.
        device: where to compute; auto is the accelerator, if there is one.
        resume: go on after the texts that --out holds.
        force: write over --out.
    """
    check_sizes(texts=texts)
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out is {out}; samples are rows of JSON, so name a file that ends in .jsonl.")
    if chat and prompts is None:
        raise ValueError("--chat makes questions of prompts, and there are none; give --prompts.")
    if any(Path(one).resolve() == out.resolve() for one in prompts or []):
        raise ValueError(f"--out is {out}, which is one of --prompts; name another file.")
    check_new(out, force, resume, is_folder=False)
    started = None if prompts is None else [p for one in prompts for p in read_prompts(one, chat, text_column)]
    loaded, tokenizer = load_dense(model, adapter, dtype, device), load_tokenizer(model, adapter)
    # What --force writes over is there until all texts are.
    path = out if resume or not out.exists() else out.with_suffix(".new.jsonl")
    if path != out:
        path.unlink(missing_ok=True)
    found = sample_texts(
        loaded,
        tokenizer,
        texts,
        tokens=max_length,
        prompts=started,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        path=path,
    )
    path.replace(out)
    tokens = sum(map(len, found["input_ids"]))
    print(f"{len(found)} texts of {tokens:,} tokens in all are in {out}.")
    return {"out": out, "texts": len(found), "tokens": tokens}


def read_prompts(source: str, chat: bool, text_column: str) -> Iterator[Any]:
    """The prompts of a source: the lines of a text, the column of a row, the messages before the last answer."""
    path = Path(source)
    is_text = path.is_file() and path.suffix.lower() not in TABLES
    for item in [path.read_text(encoding=ENCODING, errors="ignore")] if is_text else read_data(source):
        found = item.split("\n") if isinstance(item, str) else [prompt_of(item, text_column)]
        for prompt in found:
            if not prompt or (isinstance(prompt, str) and not prompt.strip()):
                continue
            yield [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def prompt_of(row: Mapping[str, Any], text_column: str) -> Any:
    """A text, or messages that end where the model is to speak; empty or None where a row has none."""
    known = (*CONVERSATIONS, text_column, "prompt") if text_column == "text" else (text_column,)
    columns = [name for name in known if name in row]
    if not columns:
        raise ValueError(
            f"The data has the columns {sorted(row)}, but no texts in {text_column!r}; name their column."
        )
    prompt = next((row[name] for name in columns if row[name]), None)
    if isinstance(prompt, list) and prompt[-1].get("role", prompt[-1].get("from")) in ("assistant", "gpt"):
        return prompt[:-1]
    return prompt
