# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands for what goes out: `merge`, `push`; and `env`.

Parameters are the flags, docstrings the help, and what is returned is the JSON; see `parser.py`.
"""

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig

from ..cards import adapter_card, merged_card
from ..config import SponConfig
from ..environment import environment, environment_text
from ..merged import SponMergedConfig
from ..sites import sites
from .models import (
    Dtype,
    check_new,
    is_merged,
    load_measured,
    load_tokenizer,
    set_dial,
)


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


def serve(folder: Path, arguments: str = "") -> dict[str, Any]:
    """Check a merged folder, every bit of it, and start vLLM's server on it.

    Examples:
        peft-spon serve --folder merged
        peft-spon serve --folder merged --arguments=--port=8001

    Args:
        folder: what peft-spon merge, or save_pretrained of a merged model, wrote.
        arguments: those of `vllm serve`, in one string.
    """
    from ..serving import serve as serve_folder

    status = serve_folder(folder, shlex.split(arguments))
    if status:
        raise OSError(f"vLLM ended with exit status {status}; what it printed says why.")
    return {"folder": folder}


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
    kinds = (".json", ".safetensors", ".md", ".txt", ".model", ".jinja", ".html")  # the card links the report's page
    return [path for path in files if path.suffix in kinds]


def env() -> dict[str, Any]:
    """Versions, devices, kernels and known incompatibilities, to paste into an issue.

    Examples:
        peft-spon env
        peft-spon env --json
    """
    found = environment()
    print(environment_text(found))
    return found
