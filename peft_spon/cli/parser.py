# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags and YAML files from the signatures and docstrings of the commands."""

import argparse
import inspect
import re
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docstring_parser import DocstringStyle
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser

from .._version import __version__
from . import fit, measure, ship, tasks
from .demo import demo
from .sample import sample


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "sample": sample,
    "calibrate": fit.calibrate,
    "allocate": fit.allocate,
    "train": fit.train,
    "evaluate": measure.evaluate,
    "harness": tasks.harness,
    "compare": measure.compare,
    "report": measure.report,
    "merge": ship.merge,
    "bench": measure.bench,
    "push": ship.push,
    "serve": ship.serve,
    "env": ship.env,
}

ABOUT = """\
Make the activations of a language model sparse, and repair the damage with trained anchors (SPON).

  peft-spon demo                                           the whole job on a small model, with a table at the end
  peft-spon train --model MODEL --data TEXT --out ADAPTER  calibrate, spread the sparsity, train the anchors
  peft-spon evaluate --model ADAPTER --data HELD_OUT       dense, sparse, and sparse with anchors"""


def parse(argv: Sequence[str] | None) -> tuple[str, dict[str, Any], dict[str, bool]]:
    """
    Returns:
        `tuple`: the command's name, its arguments, and what all commands have: `json`, `debug`.

    Raises:
        `SystemExit`: after printing help (0) or what is wrong with the arguments (2).
    """
    # As printed: line breaks in the descriptions are ours, as those of a signature are not.
    parser = ArgumentParser(
        prog="peft-spon",
        version=__version__,
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, function in COMMANDS.items():
        subcommand = command_parser(function)
        subcommands.add_subcommand(name, subcommand, help=subcommand.description.split("\n")[0])
    found = parser.parse_args(argv)
    values = dict(found[found.command].as_dict())
    for name, value in values.items():
        if isinstance(value, Path):  # of a file of settings, where no shell has done it
            values[name] = value.expanduser()
    options = {name: values.pop(name) for name in ("json", "debug")}
    values.pop("config")
    if "command" in inspect.signature(COMMANDS[found.command]).parameters:
        values["command"] = shlex.join(["peft-spon", *(sys.argv[1:] if argv is None else argv)])
    return found.command, values, options


def command_parser(function: Callable[..., Any]) -> ArgumentParser:
    """A parser with one flag per parameter of a function, whose docstring says what it is."""
    about = parse_docstring(function.__doc__, DocstringStyle.GOOGLE)
    text, _, examples = inspect.getdoc(function).partition("\n\nArgs:")[0].partition("\n\nExamples:\n")
    parser = ArgumentParser(
        description=text,
        epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples), '  ')}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with these settings, a_b: for --a-b; flags win")
    helps = {entry.arg_name: " ".join(entry.description.split()) for entry in about.params}
    types = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:  # `command`: what was called, see [`parse`]
            continue
        add_flag(parser, name, types[name], parameter.default, helps[name])
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")
    parser.add_argument("--debug", action="store_true", help="show warnings, and where an error comes from")
    return parser


def add_flag(parser: ArgumentParser, name: str, kind: Any, default: Any, text: str) -> None:
    """`--a-b` for a parameter `a_b` of a type."""
    flag = f"--{name.replace('_', '-')}"
    is_required = default is inspect.Parameter.empty
    settings: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%")}
    if is_required:
        settings["required"] = True
    else:
        settings["default"] = list(default) if isinstance(default, tuple) else default
    if default not in (inspect.Parameter.empty, None, "", True, False):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        settings["help"] = f"{settings['help'].removesuffix('.')} (default: {shown})."
    if kind is bool:
        parser.add_argument(flag, **settings, action=ActionYesNo(no_prefix="no-") if default else "store_true")
    elif items := item_type(kind):
        parser.add_argument(flag, **settings, type=items, nargs="+", metavar=metavar(name))
    else:
        parser.add_argument(flag, **settings, type=kind, metavar=metavar(name, kind))


def item_type(kind: Any) -> Any:
    """`X` of `list[X]` and of `list[X] | None`; None for another type."""
    lists = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is list]
    return typing.get_args(lists[0])[0] if lists else None


def metavar(name: str, kind: Any = None) -> str:
    """What stands for the value in a usage line."""
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    return re.sub(r".*_", "", name).upper()
