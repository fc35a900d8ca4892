# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a result or a report of an error depends on: versions, devices, kernels, and what does not go together."""

import os
import platform
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ._version import __version__
from .kernels import active_kernel


PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "trl", "datasets")
OPTIONAL = ("bitsandbytes", "torchao", "triton", "deepspeed", "jsonargparse", "matplotlib")

# Versions that are installed together and do not work together, and what then happens.
INCOMPATIBLE = [
    (
        {"transformers": "==5.24.0", "peft": "<0.22"},
        "transformers' own add_adapter and load_adapter refuse every adapter (they ask for PEFT 0.22); use "
        "get_peft_model and PeftModel.from_pretrained, or another version of transformers",
    ),
    (
        {"accelerate": "<1.15"},
        "a training under FSDP2 cannot be resumed; pip install 'accelerate>=1.15' if you need that",
    ),
    (
        {"bitsandbytes": "==0.50.*"},
        "on CPUs with AVX-512 BF16, 4-bit weights cannot be trained through, and without double quantisation "
        "state_dict() damages them",
    ),
]


def environment() -> dict[str, Any]:
    """
    Returns:
        `dict`, ready for JSON: `python`, `platform`, `threads`, `packages` (name to version, None where it is not
        installed), `devices`, `kernels` (per device and dtype: name and origin), `problems` (sentences).
    """
    packages = {"peft_spon": __version__, **{name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}}
    devices = [{"name": "cpu", "what": f"{processor()}, {os.cpu_count()} logical CPUs"}]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        for index in range(torch.accelerator.device_count()):
            devices.append({"name": f"{kind}:{index}", "what": accelerator_name(kind, index)})
    kernels = {}
    for device in {device["name"].split(":")[0]: None for device in devices}:
        for dtype in (torch.float32, torch.bfloat16):
            kernel = active_kernel(device, dtype)
            origin = kernel.origin.replace(os.path.expanduser("~"), "~")  # pasted where anybody reads it
            kernels[f"{device} {str(dtype).removeprefix('torch.')}"] = {"name": kernel.name, "origin": origin}
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": packages,
        "devices": devices,
        "kernels": kernels,
        "problems": problems(packages),
    }


def environment_text(found: dict[str, Any]) -> str:
    """What [`environment`] gives, as lines to paste into an issue."""
    lines = [f"{name:<13} {version or 'not installed'}" for name, version in found["packages"].items()]
    lines += [f"{'python':<13} {found['python']}", f"{'platform':<13} {found['platform']}"]
    lines += [f"{'threads':<13} {found['threads']}"]
    lines += [f"{'device':<13} {device['name']}: {device['what']}" for device in found["devices"]]
    lines += [
        f"{'kernel':<13} {where}: {kernel['name']} ({kernel['origin']})" for where, kernel in found["kernels"].items()
    ]
    lines += [f"{'problem':<13} {problem}" for problem in found["problems"] or ["none known"]]
    return "\n".join(lines)


def problems(packages: dict[str, str | None]) -> list[str]:
    """What is installed and does not work, or not together.

    Args:
        packages (`dict[str, str | None]`): name to version, None where it is not installed.
    """
    found = []
    for name, wanted in wanted_versions().items():
        version = packages.get(name)
        if version is not None and not wanted.contains(version, prereleases=True):
            found.append(
                f"{name} {version}: peft_spon {__version__} needs {name}{wanted}; pip install '{name}{wanted}'"
            )
    for versions, consequence in INCOMPATIBLE:
        installed = {name: packages.get(name) for name in versions}
        if all(v and SpecifierSet(versions[name]).contains(v, prereleases=True) for name, v in installed.items()):
            found.append(
                " with ".join(f"{name} {version}" for name, version in installed.items()) + f": {consequence}"
            )
    return found


def wanted_versions() -> dict[str, SpecifierSet]:
    """Versions of other packages that this one declares, those of its extras, too; none where it is not installed."""
    try:
        lines = metadata.requires("peft_spon") or []
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def version_of(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return str(Version(metadata.version(package)))
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def accelerator_name(kind: str, index: int) -> str:
    """Name and memory of an accelerator."""
    if kind != "cuda":
        return kind
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
