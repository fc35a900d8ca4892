# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation: their code blocks, commands, links and headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass
class Block:
    """A fenced block; `line` is where its code begins, `reason` why it is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def read(page):
    return (ROOT / page).read_text()


def blocks(page, language=None):
    text = read(page)
    found = [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["reason"])
        for m in FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page):
    """The text without its fenced blocks, which leave an empty line."""
    return FENCE.sub("\n", read(page))


def commands(page):
    """Argument lists of all commands of the shell blocks, and of the code in the prose that has arguments."""
    lines = []
    for block in blocks(page, "bash"):
        if block.reason is None:
            lines += block.code.replace("\\\n", " ").splitlines()
    for code in INLINE.findall(prose(page)):
        if re.match(r"(\w+=\S+ )*(python|peft-spon|make|pip|vllm|accelerate) ", code):
            lines.append(code)
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


def without_settings(words):
    """A command without the `NAME=value` in front of it."""
    first = next(i for i, word in enumerate(words) if "=" not in word)
    return words[first:]


def anchors(page):
    """The names that GitHub gives a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        count = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{count}" if count else name)
    return found


def links(page):
    """Targets of links and pictures, those to other places in the world left out."""
    text = INLINE.sub("", prose(page))
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", t)]
