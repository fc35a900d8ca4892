# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that is on every machine with Python: the source of its standard library, split by file.

One file in ten is held out, chosen by a hash of its path inside the library, so the split is the same on every
machine and across Python versions. The library's own test packages are extra training text only: many
distributions leave them out, so nothing is measured on them.
"""

import hashlib
import sysconfig
from pathlib import Path


TEST_PACKAGES = {"test", "tests", "idle_test"}


def is_held_out(relative_path: str) -> bool:
    """True for the one file in ten, by hash of its path in the library, that training never sees."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 10 == 0


def stdlib_texts(split: str, test_packages: bool = False) -> dict[str, str]:
    """Source files of the running Python's standard library.

    Args:
        split (`str`): `"train"` or `"held_out"`.
        test_packages (`bool`, *optional*, defaults to `False`): take the library's test packages instead of the
            library itself.

    Returns:
        `dict[str, str]`: path inside the library to source text, in the order of the paths.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"Unknown split {split!r}; use 'train' or 'held_out'.")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        if bool(TEST_PACKAGES & set(relative.parts[:-1])) != test_packages:
            continue
        if is_held_out(relative.as_posix()) != (split == "held_out"):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            texts[relative.as_posix()] = text
    return texts
