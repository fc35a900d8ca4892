# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: written aside, then moved into place."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open


PREFIX = ".spon-saving-"


@contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[Path]:
    """
    `with written_aside(folder) as aside:` a new folder inside `folder`, for files to be moved from there into place.

    It is this process's own and goes at the end. What killed processes of this machine have left there goes, too;
    anything else of such a name (a file, a link, the folder of a process that is still saving) is left alone.

    Args:
        folder (`str`): where the files will be, created if need be.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{PREFIX}*"):
        if is_of_a_dead_process(left_over):
            shutil.rmtree(left_over, ignore_errors=True)  # another process may be removing it as well
    aside = tempfile.mkdtemp(prefix=f"{PREFIX}{host()}-{os.getpid()}-", dir=folder)
    try:
        yield Path(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def host() -> str:
    """This machine's name: process ids mean nothing on another one that shares the folder."""
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def is_of_a_dead_process(path: Path) -> bool:
    """True for a folder of [`written_aside`] whose process, on this machine, is no more."""
    found = re.fullmatch(rf"{re.escape(PREFIX + host())}-(\d+)-\w+", path.name)
    if found is None or path.is_symlink() or not path.is_dir():
        return False
    return not psutil.pid_exists(int(found[1]))


def move_into_place(
    aside: Path, folder: str | os.PathLike, last: str, is_stale: Callable[[str], bool] = lambda name: False
) -> None:
    """
    Move all files of `aside` into `folder`. The old `last` goes first and the new one comes last, so that a folder
    in which this was interrupted has none, and does not load.

    Args:
        aside (`Path`): where the files were written, on the same file system.
        folder (`str`): where they shall be; of two processes that do this at once, the later one's files stay.
        last (`str`): the file by which a loader knows the folder, such as `"config.json"`.
        is_stale (`Callable`, *optional*): of a name in `folder`: whether it goes, where no new file is called so.
    """
    folder = Path(folder)
    (folder / last).unlink(missing_ok=True)
    new = [path.relative_to(aside) for path in aside.rglob("*") if path.is_file()]
    for path in folder.iterdir():
        if is_stale(path.name) and Path(path.name) not in new:
            path.unlink(missing_ok=True)
    # Weights first: what is small is moved quickly once they are there.
    for name in sorted(new, key=lambda name: (name.name == last, name.suffix != ".safetensors", str(name))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)


def header_problem(path: str | os.PathLike) -> str | None:
    """What is wrong with a file that is no safetensors file, or is cut off; its tensors are not read. Or None."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"{path} is damaged or incomplete ({error})"
