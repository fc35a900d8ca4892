# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a report's page, each from the dictionary that `measure_report` made; None where that has nothing."""

import os
from collections.abc import Callable
from typing import Any

from .charts import Line
from .drawing import chart, heat_map, lines_of, number, percent, plain, section, short, signed_percent, table


# How the ways of running the model are called, in the page and as classes of its style sheet.
WAYS = {"dense": "dense", "sparse": "sparse", "anchored": "repaired"}


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
    kernels += ", copies of the weights in 8 bits" if timed.get("int8") else ""
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


# In the order of the page.
SECTIONS = (compared, layers_shown, along_the_text, together, speed, training, samples, all_layers, origin)
