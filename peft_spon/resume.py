# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a training is resumed from: never one that a killed training left half-written."""

import json
import math
import re
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


def whole_checkpoint_for_all(wanted: str | bool, output_dir: str, is_main: bool) -> str | bool:
    """As [`last_whole_checkpoint`], which the main process alone calls; all get the same answer."""
    found = [wanted, None]
    if is_main:
        try:
            found[0] = last_whole_checkpoint(wanted, output_dir)
        except ValueError as error:
            found[1] = str(error)
    found = broadcast_object_list(found)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


def last_whole_checkpoint(wanted: str | bool, output_dir: str) -> str:
    """
    The checkpoint to resume from. Half-written ones are renamed, since Trainer would count them as checkpoints.

    Args:
        wanted (`str` or `True`): a checkpoint's folder, or the last one in `output_dir`.
        output_dir (`str`): where the checkpoints of the training are.

    Returns:
        `str`: the wanted folder, or if a killed training left it half-written the last whole one before it.

    Raises:
        `ValueError`: there is none.
    """
    folder = Path(output_dir) if wanted is True else Path(wanted).parent
    number = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    if wanted is True:
        newest = math.inf
    elif Path(wanted).is_dir() and (match := number.fullmatch(Path(wanted).name)):
        newest = int(match[1])
    else:
        return wanted
    found = {path: number.fullmatch(path.name) for path in folder.glob("*") if path.is_dir()}
    steps = {int(match[1]): path for path, match in found.items() if match and int(match[1]) <= newest}
    for step, path in sorted(steps.items(), reverse=True):
        if is_whole(path):
            return wanted if step == newest else str(path)
        aside = path.with_name(f"incomplete-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning(
            f"The checkpoint '{path}' is half-written ({TRAINER_STATE_NAME}, which is written last, is missing or cut "
            f"off): the training was killed while saving it. It is called '{aside.name}' now, and the one before it "
            "is resumed."
        )
    if not steps:
        return wanted  # Trainer says that there is no checkpoint
    raise ValueError(
        f"'{folder}' has no whole checkpoint: the training was killed while saving its first one. Begin anew: train() "
        "without resume_from_checkpoint."
    )


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to the end."""
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
