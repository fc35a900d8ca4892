# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts by name: files, saved data sets, data sets of the Hub, and what every machine with Python has."""

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import main_column


STDLIB = "python-stdlib"
TEST_PACKAGES = {"test", "tests", "idle_test"}
# Kinds of files that `datasets` reads, by their endings; all others are text.
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TEXT_FILES = (".txt", ".md", ".rst", ".py", *TABLES)
HELD_OUT_SPLITS = ("validation", "test", "held_out", "eval", "dev")
ENCODING = "utf-8-sig"  # some programs put a mark at the beginning
# Characters of a text that is tokenised at once, and of one that stands between those of other sources.
LONGEST, LONGEST_PIECE = 100_000, 4000


def read_data(
    source: str | Sequence[str], held_out: bool = False, text_column: str = "text", shuffled: bool = False
) -> Iterable[Any]:
    """
    Everything a source has for one purpose: all of a file; of a data set with splits, the split for that purpose.

    Args:
        source (`str` or `list[str]`): a text file; a `.jsonl`, `.csv` or `.parquet` file with a column of texts; a
            folder of such files, or one that `datasets`' `save_to_disk` wrote; `"name"` or `"name:configuration"` of a
            data set on the Hub; `"python-stdlib"`, the source of Python's standard library, split by file; or several
            of them, see [`Mixed`].
        held_out (`bool`, *optional*, defaults to `False`): of a data set with splits, the validation or test split
            instead of the training split.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.
        shuffled (`bool`, *optional*, defaults to `False`): each source in a fixed random order, long texts in pieces:
            what looks at the first tokens only, as a calibration does, sees of all that there is.

    Returns:
        `Iterable`: texts, or the rows of a `datasets.Dataset`.

    Raises:
        `OSError`: there is no such file. `ValueError`: nothing to read in it.
        `ImportError`: the source needs `datasets`.
    """
    parts = [_read(one, held_out) for one in ([source] if isinstance(source, str) else source)]
    if shuffled:
        parts = [in_random_order(part) for part in parts]
    return parts[0] if len(parts) == 1 else Mixed(parts, text_column)


def in_random_order(items: Any) -> Any:
    """Rows of a data set, or texts in pieces, in an order that is random and always the same."""
    if not isinstance(items, list):
        return items.shuffle(seed=0)
    parts = [part for item in items for part in (cut(item, LONGEST_PIECE) if isinstance(item, str) else [item])]
    random.Random(0).shuffle(parts)
    return parts


@dataclass(frozen=True)
class Mixed:
    """
    The items of several sources in turn: what looks at the first tokens only, as a calibration does, sees as much of
    each. Where one ends, the others go on. Long texts come in pieces.

    Attributes:
        parts (`list`): the sources.
        text_column (`str`): of their rows.
    """

    parts: Sequence[Iterable[Any]]
    text_column: str = "text"

    def __iter__(self) -> Iterator[Any]:
        waiting = {i: self.pieces(part) for i, part in enumerate(self.parts)}
        given = [0] * len(self.parts)
        while waiting:
            least = min(waiting, key=given.__getitem__)
            item = next(waiting[least], None)
            if item is None:
                del waiting[least]
                continue
            given[least] += self.characters(item)
            yield item

    def pieces(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items; of a long text, as such or in its column, pieces."""
        for item in items:
            is_row = isinstance(item, Mapping) and main_column(item, self.text_column) == self.text_column
            text = item[self.text_column] if is_row else item
            if isinstance(text, str) and len(text) > LONGEST_PIECE:
                yield from cut(text, LONGEST_PIECE)
            else:
                yield item

    def characters(self, item: Any) -> int:
        """Of a text or row, or so: a token has about four."""
        if not isinstance(item, Mapping):
            return len(item)
        column = main_column(item, self.text_column)
        text = item.get(self.text_column if column == "input_ids" else column)
        if column == "prompt":
            text = f"{text}{item['completion']}"
        if column == "input_ids" and not isinstance(text, str):
            return 4 * len(item[column])
        return len(text if isinstance(text, str) else str(text))


def read_divided(
    source: str | Sequence[str], test_source: str | Sequence[str] | None = None, text_column: str = "text"
) -> tuple[list[str], list[str]]:
    """
    Texts to fit on and texts to measure on that have none in common, each in a fixed random order.

    Args:
        source (`str` or `list[str]`): as in [`read_data`]; of what has no splits the last tenth is held out.
        test_source (`str` or `list[str]`, *optional*): the texts to measure on; default: what `source` holds out.
        text_column (`str`, *optional*, defaults to `"text"`): column with the texts.

    Returns:
        `tuple[list[str], list[str]]`: training and held-out texts. A text that is in both counts as held out.

    Raises:
        `ValueError`: too little text, or no column of texts.
    """
    if test_source is not None:
        # Each source by itself: in pieces of another length, a text of both would not be known again.
        train, held_out = (
            [
                text
                for one in ([s] if isinstance(s, str) else s)
                for text in _texts(read_data(one, is_test), text_column)
            ]
            for s, is_test in ((source, False), (test_source, True))
        )
    elif isinstance(source, str) and _has_splits(source):
        train, held_out = (_texts(read_data(source, part), text_column) for part in (False, True))
    else:
        train, held_out = [], []
        for one in [source] if isinstance(source, str) else source:
            texts = pieces("\n\n".join(_texts(read_data(one), text_column)), one)
            train += texts[: len(texts) * 9 // 10]
            held_out += texts[len(texts) * 9 // 10 :]
    known = set(held_out)
    train = [text for text in train if text not in known and text.strip()]
    held_out = [text for text in held_out if text.strip()]
    if not train or not held_out:
        raise ValueError(f"{source} and {test_source or 'its held-out part'} have no texts apart from each other.")
    for texts in (train, held_out):
        random.Random(0).shuffle(texts)
    return train, held_out


def pieces(text: str, name: str = "The file", longest: int = LONGEST_PIECE) -> list[str]:
    """The paragraphs of a text, long ones cut at white space (if there is any): at least 20 pieces of any text."""
    if len(text.strip()) < 1000:
        raise ValueError(f"{name} holds {len(text.strip())} characters of text; give a file with 1,000 or more.")
    size = min(longest, len(text) // 20)
    parts = [part for paragraph in re.split(r"\n\s*\n", text) for part in cut(paragraph, size)]
    return [part for part in parts if part.strip()]


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters, cut at white space where there is any."""
    return re.findall(rf".{{1,{size}}}(?=\s|$)|.{{1,{size}}}", text, re.DOTALL)


def _read(source: str, held_out: bool) -> Iterable[Any]:
    if source == STDLIB:
        return list(stdlib_texts("held_out" if held_out else "train").values())
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, held_out)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) or path.suffix.lower() in TEXT_FILES:
        raise FileNotFoundError(
            f"There is no file or folder {source!r}, and it is no data set's name on the Hub (owner/name, or "
            f"owner/name:configuration); {STDLIB!r} is the source of Python's standard library."
        )
    return _split_of(_datasets().load_dataset(*source.split(":")), held_out, source)


def _has_splits(source: str) -> bool:
    return source == STDLIB or not Path(source).exists() or Path(source, "dataset_dict.json").exists()


def _read_file(path: Path) -> Iterable[Any]:
    if is_empty(path):
        raise ValueError(f"{path} holds no text.")
    kind = path.suffix.lower()
    if kind in TABLES:
        return _datasets().load_dataset(TABLES[kind], data_files=str(path), split="train")
    return cut(path.read_text(encoding=ENCODING, errors="ignore"), LONGEST)


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing but white space."""
    with path.open(encoding=ENCODING, errors="ignore") as file:
        return not any(line.strip() for line in file)


def _read_folder(folder: Path, held_out: bool) -> Iterable[Any]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _split_of(_datasets().load_from_disk(str(folder)), held_out, str(folder))
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in TEXT_FILES]
    files = [path for path in found if not is_empty(path)]  # such as __init__.py
    if found and not files:
        raise ValueError(f"The files of the folder {folder} hold no text.")
    if not files:
        raise ValueError(f"The folder {folder} has neither a saved data set nor files ending in {TEXT_FILES}.")
    return [row for path in files for row in _read_file(path)]


def _split_of(data: Any, held_out: bool, name: str) -> Any:
    """The split for a purpose, or all of a data set without splits."""
    if not isinstance(data, dict):
        return data
    wanted = HELD_OUT_SPLITS if held_out else ("train",)
    found = next((split for split in wanted if split in data), None)
    if found is None and len(data) > 1:
        raise ValueError(f"{name} has the splits {sorted(data)}, but none of {', '.join(wanted)}.")
    return data[found or next(iter(data))]


def _texts(rows: Iterable[Any], text_column: str) -> list[str]:
    texts = []
    for row in rows:
        text = row if isinstance(row, str) else row.get(text_column)
        if not isinstance(text, str):
            raise ValueError(
                f"The data has the columns {sorted(row)}, but no texts in {text_column!r}; name their column."
            )
        texts.append(text)
    return texts


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("This data needs the library datasets: pip install 'peft_spon[eval]'") from error
    return datasets


def is_held_out(relative_path: str) -> bool:
    """True for the one file in ten, by hash of its path in the library, that training never sees."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 10 == 0


def stdlib_texts(split: str, test_packages: bool = False) -> dict[str, str]:
    """Source files of the running Python's standard library, split by file.

    One file in ten is held out, chosen by a hash of its path inside the library, so the split is the same on every
    machine and across Python versions. The library's own test packages are extra training text only: many
    distributions leave them out, so nothing is measured on them.

    Args:
        split (`str`): `"train"` or `"held_out"`.
        test_packages (`bool`, *optional*, defaults to `False`): take the library's test packages instead of the
            library itself.

    Returns:
        `dict[str, str]`: path inside the library to source text, in the order of the paths.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"Unknown split {split!r}; use 'train' or 'held_out'.")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        if bool(TEST_PACKAGES & set(relative.parts[:-1])) != test_packages:
            continue
        if is_held_out(relative.as_posix()) != (split == "held_out"):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if text.strip():
            texts[relative.as_posix()] = text
    return texts
