# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `peft-spon`: the only part of the package that parses arguments or prints."""

import contextlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from transformers.utils import logging as transformers_logging

from .output import jsonable


OK, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*): the arguments; default: the process's.

    Returns:
        `int`: exit code: 0, or 1 if the command failed, or 2 if it was not called as its help says.
    """
    try:
        from .parser import COMMANDS, parse
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("jsonargparse", "docstring_parser", "yaml"):
            raise
        print("peft-spon needs jsonargparse: pip install 'peft_spon[cli]'", file=sys.stderr)
        return FAILED
    try:
        name, arguments, options = parse(argv)
    except SystemExit as stop:  # --help, --version, or wrong usage, already printed
        return stop.code if isinstance(stop.code, int) else USAGE
    # What libraries print goes where progress goes: standard output is the result's.
    stdout = sys.stderr if options["json"] else sys.stdout
    try:
        with contextlib.redirect_stdout(stdout), contextlib.nullcontext() if options["debug"] else quiet_libraries():
            result = COMMANDS[name](**arguments)
    except KeyboardInterrupt:
        print("peft-spon: interrupted", file=sys.stderr)
        return FAILED
    except Exception as error:
        if options["debug"]:
            traceback.print_exc()
        else:
            kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"peft-spon {name}: error: {kind}{text}", file=sys.stderr)
        return FAILED
    if options["json"]:
        print(json.dumps(jsonable(result), indent=1))
    return OK


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """`with quiet_libraries():` without the warnings and notes of libraries, which are for developers."""
    levels = {logging.getLogger("httpx"): logging.WARNING, logging.getLogger("lm_eval"): logging.ERROR}
    before, verbosity = {logger: logger.level for logger in levels}, transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    for logger, level in levels.items():
        logger.setLevel(level)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def run() -> None:
    """What the installed script `peft-spon` calls."""
    sys.exit(main())
