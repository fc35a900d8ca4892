# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs no other, made of one dictionary (docs/report.md)."""

import base64
import json
import math
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from .._version import __version__
from ..cards import show_results
from ..files import written_aside
from .drawing import number, percent
from .sections import SECTIONS, WAYS, cards, subtitle, ways_of


if TYPE_CHECKING:
    from .scores import EvaluationResult


SCHEMA = 1
PAPER = "https://arxiv.org/abs/2512.12744"


def report_of(result: "EvaluationResult") -> dict[str, Any]:
    """What [`evaluate`] knows, as the dictionary of a report."""
    scores = {way: getattr(result, way) for way in WAYS}
    where = places(list(result.layer_sparsity))
    return finite(
        {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "scores": {way: None if score is None else asdict(score) for way, score in scores.items()},
            "positions": [asdict(row) for row in result.by_position],
            "layers": [
                {"name": name, "block": where[name][0], "kind": where[name][1], "sparsity": share}
                for name, share in result.layer_sparsity.items()
            ],
            "data": {"tokens": result.tokens, "sparse_tokens": result.sparse_tokens},
            "versions": {"peft_spon": __version__},
        }
    )


def write_report(report: dict[str, Any], path: str | os.PathLike) -> None:
    """
    Write the page of a report. A model card of ours in the same folder then shows the results and links the page.

    Args:
        report (`dict`): from [`measure_report`] or [`report_of`], or read from a JSON file.
        path (`str`): of the HTML file; folders are made.

    Raises:
        `ValueError`: a dictionary that is no report, or one of a newer version.
    """
    text = page(report)
    path = Path(path)
    with written_aside(path.parent) as aside:
        (aside / "page").write_text(text, encoding="utf-8")
        os.replace(aside / "page", path)
    show_results(path.parent, f"{results_text(report)}\n\nMore of it: [the whole report]({quote(path.name)}).")


def results_text(report: dict[str, Any]) -> str:
    """The scores as Markdown, and what was measured how: for a model card."""
    lines = [
        "| | KL to dense | top-1 as dense | perplexity | x dense (95 %) | sparsity |",
        "|---|---|---|---|---|---|",
    ]
    for way, score in ways_of(report).items():
        low, high = score["ratio_interval"]
        ratio = f"{number(score['perplexity_ratio'])} ({number(low)} to {number(high)})" if way != "dense" else ""
        cells = [
            WAYS[way],
            number(score["kl"], 4),
            percent(score["top1_agreement"]),
            number(score["perplexity"]),
            ratio,
            percent(score["sparsity"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    data = report["data"]
    tokens = re.sub(r"[^\w ='.]", "", str(data["sparse_tokens"]))  # of a file, it may be anything
    lines += [
        "",
        f"Measured with `peft_spon.evaluate` on {data['tokens']:,} tokens, {tokens}: KL(dense to sparse) "
        "in nats per token over the whole vocabulary; share of tokens whose most likely next token is the dense "
        "model's; perplexity, and its ratio to the dense model's on the same tokens; share of the sparse layers' "
        "weights that a token does not read.",
    ]
    if timed := report.get("speed"):
        dense, prepared = (number(timed[way]["tokens_per_second"], 1) for way in ("dense", "prepared"))
        lines += ["", f"Decoding, one sequence: {prepared} tokens per second prepared, {dense} dense."]
    return "\n".join(lines)


def page(report: dict[str, Any]) -> str:
    """The HTML of a report."""
    if not isinstance(report, dict) or not isinstance(report.get("schema"), int) or "scores" not in report:
        raise ValueError("This is no report; make one with measure_report(model, data, tokenizer).")
    if report["schema"] > SCHEMA:
        raise ValueError(
            f"The report has the schema {report['schema']}, and peft_spon {__version__} knows {SCHEMA}; install a "
            "newer peft_spon to draw it."
        )
    report = printable(finite(report))
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    data = base64.b64encode(json.dumps(report, ensure_ascii=False, allow_nan=False).encode()).decode()
    about = report.get("model", {})
    return template().render(
        title=about.get("name", "Sparse model"),
        subtitle=subtitle(report),
        cards=cards(report),
        sections=sections,
        created=report.get("created", "").replace("T", " ").replace("+00:00", " UTC"),
        version=report.get("versions", {}).get("peft_spon", __version__),
        paper=PAPER,
        data=data,
    )


@cache
def template() -> Template:
    """The page."""
    environment = Environment(
        loader=PackageLoader("peft_spon.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


# ---- values ------------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(value: Any) -> Any:
    """The same with a mark for each character of a text that HTML does not allow."""
    if isinstance(value, dict):
        return {printable(key): printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [printable(part) for part in value]
    return (
        re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)
        if (isinstance(value, str))
        else value
    )


def places(names: list[str]) -> dict[str, tuple[int | None, str]]:
    """Block index and kind of layers, by their names: "model.layers.3.mlp.up_proj" is the "up_proj" of block 3.

    A kind is as short as keeps it apart from others; further numbers (experts) are a `*`.
    """
    found: dict[str, tuple[str, int | None, tuple[str, ...]]] = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        rest = parts if first is None else parts[first + 1 :]
        kind = tuple("*" if part.isdigit() else part for part in rest)
        found[name] = (
            ".".join(parts[:first]) if first is not None else "",
            None if first is None else int(parts[first]),
            kind,
        )
    kinds = {(stack, kind) for stack, _, kind in found.values()}
    whole = {key: (*key[0].split("."), *key[1]) for key in kinds}
    size = next(n for n in range(1, 100) if len({kind[-n:] for kind in whole.values()}) == len(kinds))
    return {name: (block, ".".join(whole[stack, kind][-size:])) for name, (stack, block, kind) in found.items()}
