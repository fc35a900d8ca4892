# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG, in colours that the page's style sheet gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup


WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 42
# Above so many points a line has no dots.
MOST_DOTS = 40


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, its class in the style sheet, and its points (x, y)."""

    name: str
    style: str
    points: list[tuple[float, float]]


def line_chart(
    label: str,
    lines: list[Line],
    x_label: str,
    written: Callable[[float], str],
    is_log: bool = False,
    x_ticks: list[float] | None = None,
) -> Markup:
    """
    An `<svg>` of some lines.

    Args:
        label (`str`): what a screen reader says in its place.
        lines (`list[Line]`): each with a point or more, of finite numbers.
        x_label (`str`): under the x axis.
        written (`Callable`): a value of y as text.
        is_log (`bool`, *optional*, defaults to `False`): a logarithmic x axis; x is above 0 then.
        x_ticks (`list`, *optional*): where the x axis is marked; default: round numbers, or powers of two.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_marks = ticks(min(0.0, *ys), max(0.0, *ys))
    if x_ticks is None:
        powers = [2.0**i for i in range(int(math.log2(max(xs))) + 1)] if is_log else []
        x_ticks = powers if is_log else [x for x in ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs)]
        x_ticks = x_ticks[:: -(-len(x_ticks) // 7)]

    def across(x: float) -> float:
        scale = math.log if is_log else float
        low, high = scale(min(xs)), scale(max(xs))
        return LEFT + (WIDTH - LEFT - RIGHT) * ((scale(x) - low) / (high - low) if high > low else 0.5)

    def up(y: float) -> float:
        low, high = y_marks[0], y_marks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label})
    for y in y_marks:
        place = f"{up(y):.1f}"
        put(svg, "line", {"x1": str(LEFT), "x2": str(WIDTH - RIGHT), "y1": place, "y2": place, "class": "grid"})
        put(svg, "text", {"x": str(LEFT - 6), "y": f"{up(y) + 4:.1f}", "text-anchor": "end"}, written(y))
    for x in x_ticks:
        place = {"x": f"{across(x):.1f}", "y": str(HEIGHT - BOTTOM + 17), "text-anchor": "middle"}
        put(svg, "text", place, f"{x:,.0f}")
    middle = {"x": str((LEFT + WIDTH - RIGHT) // 2), "y": str(HEIGHT - 6), "text-anchor": "middle"}
    put(svg, "text", middle, x_label)
    for line in lines:
        places = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in line.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        put(svg, "path", {"d": path, "class": f"line {line.style}"})
        if len(places) <= MOST_DOTS:
            for (x, y), (cx, cy) in zip(line.points, places, strict=True):
                dot = put(svg, "circle", {"cx": cx, "cy": cy, "r": "3", "class": f"dot {line.style}"})
                put(dot, "title", {}, f"{line.name}, {x_label} {x:,.0f}: {written(y)}")
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def put(parent: ElementTree.Element, tag: str, attributes: dict[str, str], text: str = "") -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, evenly spaced, from at most `low` to at least `high`."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
