# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file that needs no other, made of one dictionary (docs/report.md)."""

import base64
import json
import math
import os
import re
from collections.abc import Callable
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
from .charts import Line, line_chart


if TYPE_CHECKING:
    from .metrics import EvaluationResult


SCHEMA = 1
# How the ways of running the model are called, in the page and as classes of its style sheet.
WAYS = {"dense": "dense", "sparse": "sparse", "anchored": "repaired"}
# A heat map with more columns shows no numbers, and not the number of every block.
MOST_NUMBERS = 8
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
    makers = (compared, layers_shown, along_the_text, together, speed, training, samples, all_layers, origin)
    sections = [section for make in makers if (section := make(report)) is not None]
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


# ---- what the page is made of: dictionaries that the template draws ------------------------------------------------


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


def ways_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of the ways of running the model that there are."""
    return {way: report["scores"][way] for way in WAYS if report["scores"].get(way)}


def subtitle(report: dict[str, Any]) -> str:
    about, data = report.get("model", {}), report.get("data", {})
    parts = []
    if about:
        parts.append(f"{about['parameters'] / 1e6:,.1f} M parameters")
        parts.append(
            f"{percent(about['sparsity'])} sparse by “{about['criterion']}” in {about['sparse_layers']} layers"
        )
        parts.append("merged" if about["adapter"] is None else f"adapter “{about['adapter']}”")
    else:
        parts.append(f"{len(report.get('layers', []))} sparse layers")
    parts.append(f"{data.get('tokens', 0):,} predicted tokens of held-out text, {data.get('sparse_tokens', '')}")
    return "; ".join(parts) + "."


def cards(report: dict[str, Any]) -> list[dict[str, str]]:
    ways = ways_of(report)
    last = list(ways)[-1]
    score, sparse = ways[last], ways["sparse"]
    is_repaired = last == "anchored"

    def before(text: str) -> str:
        return f"without repair {text}" if is_repaired else "no repair"

    low, high = score["ratio_interval"]
    found = [
        {
            "name": "KL to dense",
            "value": number(score["kl"]),
            "note": f"nats per token; {before(number(sparse['kl']))}",
        },
        {
            "name": "Top-1 as dense",
            "value": percent(score["top1_agreement"]),
            "note": before(percent(sparse["top1_agreement"])),
        },
        {
            "name": "Perplexity",
            "value": number(score["perplexity"], 2),
            "note": f"dense {number(ways['dense']['perplexity'], 2)}; × {number(score['perplexity_ratio'])}, "
            f"95\u00a0%: {number(low)} to {number(high)}",
        },
        {
            "name": "Realised sparsity",
            "value": percent(score["sparsity"]),
            "note": f"asked for {percent(report['model']['sparsity'])}"
            if "model" in report
            else "of the weights unread",
        },
    ]
    if timed := report.get("speed"):
        dense, prepared = (timed[way]["tokens_per_second"] for way in ("dense", "prepared"))
        found.append(
            {
                "name": "Tokens per second",
                "value": number(prepared, 1),
                "note": f"dense {number(dense, 1)}; × {number(prepared / dense, 2)}",
            }
        )
    return found


def compared(report: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of the scores."""
    ways = ways_of(report)

    def bars(title: str, key: str, written: Callable[[float | None], str], is_share: bool = False) -> dict[str, Any]:
        values = {way: score[key] for way, score in ways.items()}
        largest = 1.0 if is_share else max((value for value in values.values() if value is not None), default=0) or 1.0
        rows = [
            {
                "name": WAYS[way],
                "style": WAYS[way],
                "text": written(value),
                "size": round(100 * min(1.0, max(0.0, value / largest)), 1) if value is not None else 100,
            }
            for way, value in values.items()
        ]
        return {"kind": "bars", "title": title, "rows": rows}

    followed = {
        way: score["continuations"] for way, score in ways.items() if score.get("continuations") and way != "dense"
    }
    lines = [
        [WAYS[way], number(score["common_prefix"], 1), percent(score["token_agreement"]), str(score["prompts"])]
        for way, score in followed.items()
    ]
    head = ["", "tokens until the first other one", "places that agree", "prompts"]
    return section(
        "Dense, sparse, repaired",
        "The same text in every way of running the model. Judge by the KL and the agreement: a perplexity can fall "
        "while the model still says something else than the dense one.",
        bars("KL to dense, nats per token (less is better)", "kl", number),
        bars("Top-1 agreement with dense (more is better)", "top1_agreement", percent, is_share=True),
        bars("Perplexity (less is better)", "perplexity", lambda value: number(value, 2)),
        table("Greedy continuations beside the dense model's", head, lines) if lines else None,
    )


def layers_shown(report: dict[str, Any]) -> dict[str, Any] | None:
    """Heat maps, and the drift of the hidden states."""
    layers = report.get("layers", [])

    def drift(layer: dict[str, Any]) -> float | None:
        here = layer.get("threshold_here")
        return layer["threshold"] / here - 1 if here else None

    maps = [
        heat_map(
            layers,
            "Realised sparsity",
            "Share of each layer's weights that a token does not read.",
            lambda layer: layer["sparsity"],
        ),
        heat_map(
            layers,
            "Threshold drift",
            "The stored threshold against the one that would give the wanted sparsity on this text, in the sparse "
            "model. Above zero, the layer zeroes more than was asked.",
            drift,
            signed_percent,
            is_signed=True,
        ),
        heat_map(
            layers,
            "What S removes",
            "Size of W (x − S(x)) relative to W x: the error that zeroing makes in the layer itself.",
            lambda layer: layer.get("removed"),
        ),
        heat_map(
            layers, "Norms of the anchors", "L2 norm of each anchor.", lambda layer: layer.get("anchor_norm"), short
        ),
        heat_map(
            layers,
            "Size of the gains",
            "Root mean square of each layer's gains.",
            lambda layer: layer.get("gain_rms"),
            percent,
        ),
    ]
    blocks = list(enumerate(report.get("blocks", [])))
    lines = [
        Line(WAYS[way], WAYS[way], [(i, block[way]) for i, block in blocks if block.get(way) is not None])
        for way in ("sparse", "anchored")
    ]
    drifted = chart(
        "Drift of the hidden states",
        "How far the hidden states behind each block are from the dense model's (at 0): |h − h dense| relative to "
        "|h dense|, mean over tokens.",
        lines,
        "block",
        x_ticks=[i for i, _ in blocks] if len(blocks) <= 12 else None,
    )
    return section(
        "Where in the network",
        "Rows are kinds of layers, columns are blocks, block 0 reads the text first.",
        drifted,
        *maps,
    )


def along_the_text(report: dict[str, Any]) -> dict[str, Any] | None:
    """Neurons that are active over sequence length, and scores by position."""
    names = {
        "ever": ("at any token so far", "dense"),
        "now": ("at a token", "repaired"),
        "always": ("at every token so far", "sparse"),
    }
    head = ["positions", "tokens", "KL", "top-1 as dense", "perplexity (dense)"]
    rows = [
        [
            f"{row['first']:,} to {row['last']:,}",
            f"{row['tokens']:,}",
            number(row["kl"]),
            percent(row["top1_agreement"]),
            f"{number(row['perplexity'], 2)} ({number(row['dense_perplexity'], 2)})",
        ]
        for row in report.get("positions", [])
    ]
    return section(
        "Along the text",
        "",
        chart(
            "Neurons active over sequence length",
            "Share of the layers' inputs that S keeps, by the number of tokens read.",
            lines_of(report.get("active"), names),
            "tokens",
            is_log=True,
        ),
        table("Scores by position in the text", head, rows, is_wide=False) if rows else None,
    )


def together(report: dict[str, Any]) -> dict[str, Any] | None:
    """Union sparsity."""
    names = {
        "windows": ("consecutive tokens (speculative window)", "repaired"),
        "batches": ("different sequences (batch)", "sparse"),
        "independent": ("if tokens were independent", "dense"),
    }
    return section(
        "Several tokens at a time",
        "A batch, or a window of speculative decoding, reads a weight if any of its tokens needs it. What is left to "
        "skip was counted on this text.",
        chart(
            "Union sparsity",
            "Share of the weights that none of the tokens needs.",
            lines_of(report.get("union"), names),
            "tokens at a time",
            is_log=True,
        ),
    )


def speed(report: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens per second."""
    timed = report.get("speed")
    if not timed:
        return None
    rows = [
        [name, number(timed[way]["tokens_per_second"], 1), f"{1e3 / timed[way]['tokens_per_second']:.2f} ms",
         f"{1e3 * timed[way]['prompt_seconds']:.1f} ms"]
        for way, name in (("dense", "dense"), ("prepared", "prepared"))
    ]  # fmt: skip
    kernels = ", ".join(f"{device}: {name}" for device, name in timed["kernels"].items()) or "no sparse kernel"
    left = "".join(f" {count} as before: {reason}." for reason, count in timed["left"].items())
    return section(
        "Speed",
        f"Greedy generate of {timed['new_tokens']} tokens after {timed['prompt_tokens']}, one sequence, medians of "
        f"{timed['rounds']} turns. {timed['prepared_layers']} of {timed['layers']} layers skip weights after "
        f"prepare_for_decode ({kernels})."
        f"{left}",
        table("Speed of decoding", ["", "tokens per second", "per token", "first token"], rows),
    )


def training(report: dict[str, Any]) -> dict[str, Any] | None:
    """Training curves."""
    log = report.get("training") or []

    def lines(key: str) -> list[Line]:
        kinds = {key: ("training", "sparse"), f"eval_{key}": ("held out", "repaired")}
        return [
            Line(name, style, [(entry["step"], entry[k]) for entry in log if entry.get(k) is not None])
            for k, (name, style) in kinds.items()
        ]

    return section(
        "Training",
        "",
        chart("KL to dense, nats per token", "", lines("kl"), "step", plain),
        chart("Top-1 agreement with dense", "", lines("top1_agreement"), "step"),
    )


def samples(report: dict[str, Any]) -> dict[str, Any] | None:
    """Continuations side by side, each cut where it leaves the dense one."""
    shown = []
    for sample in report.get("samples") or []:
        texts = []
        for way, name in WAYS.items():
            if way in sample:
                same = 0 if way == "dense" else len(os.path.commonprefix([sample[way], sample["dense"]]))
                same = len(sample[way]) if way == "dense" else same
                texts.append({"name": name, "style": name, "same": sample[way][:same], "other": sample[way][same:]})
        shown.append({"prompt": sample["prompt"], "texts": texts})
    return section(
        "Samples",
        "Greedy continuations of the same prompts; what is marked differs from the dense model's.",
        {"kind": "samples", "samples": shown} if shown else None,
    )


def all_layers(report: dict[str, Any]) -> dict[str, Any] | None:
    """The table of everything that the heat maps show."""
    columns = {
        "wanted": ("wanted", percent),
        "sparsity": ("realised", percent),
        "threshold": ("threshold", short),
        "threshold_here": ("fitting here", short),
        "removed": ("removed", percent),
        "anchor_norm": ("anchor", short),
        "gain_rms": ("gains", short),
    }
    layers = report.get("layers", [])
    known = {key: entry for key, entry in columns.items() if any(key in layer for layer in layers)}
    rows = [[layer["name"], *(written(layer.get(key)) for key, (_, written) in known.items())] for layer in layers]
    head = ["layer", *(name for name, _ in known.values())]
    return section(
        "All layers", "", {"kind": "folded", "table": table("Every sparse layer", head, rows)} if layers else None
    )


def origin(report: dict[str, Any]) -> dict[str, Any] | None:
    """Command, versions, how it was measured."""
    about, data = report.get("model", {}), report.get("data", {})
    facts = {
        "tokens scored": f"{data.get('tokens', 0):,}",
        "rows": f"{data['rows']:,} of {data['row_tokens']:,} tokens" if "rows" in data else None,
        "tokens for layers": f"{data['layer_tokens']:,}" if "layer_tokens" in data else None,
        "dtype, device": f"{about['dtype']}, {about['device']}" if about else None,
        "prefill": str(about["prefill"]) if about else None,
    }
    facts |= report.get("versions", {})
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    command = report.get("command")
    return section(
        "How this was made",
        "",
        {"kind": "command", "text": command} if command else None,
        table("Settings and versions", ["", ""], rows),
    )
