# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles sparse_gemv.c. Standard library only: the build hook of the wheel loads this file by its path."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


SOURCE = Path(__file__).with_name("sparse_gemv.c")
FLAGS = ("-O3", "-shared", "-fPIC")


def library_name() -> str:
    """File name of the compiled library: a library of other source, flags or machine has another one."""
    key = SOURCE.read_bytes() + " ".join((*FLAGS, sys.platform, platform.machine())).encode()
    return f"sparse_gemv-{hashlib.sha256(key).hexdigest()[:16]}.so"


def compile_into(folder: Path) -> Path:
    """Compiles into `folder`, written aside and moved into place, so that several processes may do it at once.

    Raises:
        OSError: no compiler, or a folder that cannot be written.
        subprocess.SubprocessError: the compiler stopped with an error, or took more than two minutes.
    """
    target = folder / library_name()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = Path(aside) / target.name
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
        made.replace(target)
    return target
