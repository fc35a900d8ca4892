# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What the page of a report is made of: numbers as text, and dictionaries that its template draws."""

import re
from collections.abc import Callable
from typing import Any

from .charts import Line, line_chart


# A heat map with more columns shows no numbers, and not the number of every block.
MOST_NUMBERS = 8


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    return "–" if value is None else f"{value:#.3g}".removesuffix(".")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def signed_percent(value: float) -> str:
    return "0.0%" if abs(value) < 5e-4 else f"{value:+.1%}".replace("-", "−")


def whole_percent(value: float) -> str:
    return f"{value:.0%}"


def plain(value: float) -> str:
    return f"{value:g}"


def section(title: str, text: str, *parts: dict[str, Any] | None) -> dict[str, Any] | None:
    """A part of the page, or None where it has nothing to show."""
    shown = [part for part in parts if part is not None]
    return {"id": re.sub(r"\W+", "-", title.lower()), "title": title, "text": text, "parts": shown} if shown else None


def lines_of(columns: dict[str, Any] | None, names: dict[str, tuple[str, str]]) -> list[Line]:
    """Lines over `columns["tokens"]`, one for each other column; `names`: column to name and style of the line."""
    if not columns:
        return []
    return [
        Line(name, style, [(x, y) for x, y in zip(columns["tokens"], columns[key], strict=True) if y is not None])
        for key, (name, style) in names.items()
    ]


def table(caption: str, head: list[str], rows: list[list[str]], is_wide: bool = True) -> dict[str, Any]:
    return {"kind": "table", "caption": caption, "head": head, "rows": rows, "is_wide": is_wide}


def chart(
    title: str,
    text: str,
    lines: list[Line],
    x_label: str,
    written: Callable[[float], str] = whole_percent,
    **options: Any,
) -> dict[str, Any] | None:
    """A line chart, its legend, and the table of its values."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = sorted({x for line in lines for x, _ in line.points})
    values = [dict(line.points) for line in lines]
    exact = percent if written is whole_percent else short
    rows = [[f"{x:,.0f}", *(exact(value[x]) if x in value else "" for value in values)] for x in xs]
    ends = "; ".join(f"{line.name} from {exact(line.points[0][1])} to {exact(line.points[-1][1])}" for line in lines)
    return {
        "kind": "chart",
        "title": title,
        "text": text,
        "svg": line_chart(f"Line chart, {title}: {ends}.", lines, x_label, written, **options),
        "legend": [{"name": line.name, "style": line.style} for line in lines],
        "table": table(title, [x_label, *(line.name for line in lines)], rows),
    }


def heat_map(
    layers: list[dict[str, Any]],
    title: str,
    text: str,
    value: Callable[[dict[str, Any]], float | None],
    written: Callable[[float], str] = percent,
    is_signed: bool = False,
) -> dict[str, Any] | None:
    """Rows are kinds of layers, columns are blocks; several layers of one kind in a block (experts) are averaged."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for layer in layers:
        if (known := value(layer)) is not None:
            found.setdefault((layer["kind"], layer["block"]), []).append(known)
    if not found:
        return None
    means = {key: sum(values) / len(values) for key, values in found.items()}
    blocks = sorted({block for _, block in means}, key=lambda block: (block is None, block or 0))
    low, high = min(means.values()), max(means.values())
    largest = max(abs(low), abs(high))

    def cell(kind: str, block: int | None) -> dict[str, Any]:
        if (kind, block) not in means:
            return {"text": "", "title": "", "strength": 0, "sign": ""}
        mean = means[kind, block]
        # A spread that is next to nothing shows no colours.
        scale = largest if is_signed else max(high - low, 0.02 * largest)
        strength = (abs(mean) if is_signed else mean - low) / scale if scale else 0.0
        sign = "minus" if is_signed and mean < 0 else "plus"
        return {
            "text": written(mean).removesuffix("%"),
            "title": f"{kind}, block {block}: {written(mean)}",
            "sign": sign,
            "strength": round(100 * strength),
        }

    kinds = dict.fromkeys(layer["kind"] for layer in layers if any(kind == layer["kind"] for kind, _ in means))
    step = 1 if len(blocks) <= MOST_NUMBERS else -(-len(blocks) // MOST_NUMBERS)
    return {
        "kind": "heat",
        "title": title,
        "text": text,
        "blocks": [
            {"name": "other" if b is None else str(b), "is_shown": i % step == 0} for i, b in enumerate(blocks)
        ],
        "rows": [{"kind": kind, "cells": [cell(kind, block) for block in blocks]} for kind in kinds],
        "has_numbers": len(blocks) <= MOST_NUMBERS,
        "is_signed": is_signed,
        "low": written(-largest if is_signed else low),
        "high": written(largest if is_signed else high),
    }
