# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Copies the pages, and the files that they link to, to build/pages, from which the site is built.

They keep their places there, so that the same relative links work on GitHub, in an editor and on the site. Comments of
docs/api.md, which GitHub does not show, become what mkdocstrings replaces: `<!-- docstring: NAME -->`, or, without its
members, `<!-- docstring alone: NAME -->`.
"""

import re
import shutil
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def gather(target: Path) -> None:
    """Write all pages and what they link to into `target`, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    left, done = list(PAGES), set()
    while left:
        name = left.pop()
        done.add(name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".md"):
            shutil.copy(ROOT / name, target / name)
            continue
        text = (ROOT / name).read_text()
        links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", text)
        paths = [(ROOT / name).parent.joinpath(link).resolve() for link in links]
        left += {str(path.relative_to(ROOT)) for path in paths if path.is_file()} - done
        text = re.sub(r"<!-- docstring: (\S+) -->", r"::: \1\n", text)
        text = re.sub(r"<!-- docstring alone: (\S+) -->", r"::: \1\n    options:\n      members: false\n", text)
        (target / name).write_text(text)


if __name__ == "__main__":
    gather(ROOT / "build" / "pages")
