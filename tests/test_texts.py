# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts by name: files of any shape, folders, saved data sets; and parts that have nothing in common."""

import json

import pytest
from datasets import Dataset, DatasetDict

from peft_spon.texts import STDLIB, is_held_out, read_data, read_divided, stdlib_texts


LINES = [f"line {i} of a story" for i in range(400)]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES).encode(),  # no blank line
        " ".join(LINES).encode(),  # no line at all
        "".join(LINES).replace(" ", "").encode(),  # no white space
        "\r\n\r\n".join(LINES).encode(),
        "\n \n".join(LINES).encode(),
        ("\n".join(LINES) + "\u00e9").encode("latin-1"),
        "\n\n".join(LINES[:60]).encode(),
    ],
)
def test_any_text_file_is_divided_and_nothing_is_lost(tmp_path, content):
    (tmp_path / "story.txt").write_bytes(content)
    train, held_out = read_divided(str(tmp_path / "story.txt"))
    assert 4 < len(train) / len(held_out) < 10
    assert max(map(len, train + held_out)) <= 4000
    words = content.decode("utf-8", errors="ignore").split()
    assert sum(len("".join(text.split())) for text in train + held_out) == sum(map(len, words)), "nothing is lost"
    assert not set(train) & set(held_out)


def test_a_file_without_text_is_refused(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("\n\nOnce.\n" + " " * 2000)
    with pytest.raises(ValueError, match="holds 5 characters of text; give a file with 1,000 or more"):
        read_divided(str(path))
    path.write_text(" \n")
    with pytest.raises(ValueError, match="story.txt holds no text"):
        read_data(str(path))


def test_a_whole_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo three\n")
    assert read_data(str(tmp_path / "a.txt")) == ["one\n\ntwo three\n"]
    long = "word " * 50_000
    (tmp_path / "b.txt").write_text(long)
    parts = read_data(str(tmp_path / "b.txt"))
    assert "".join(parts) == long
    assert max(map(len, parts)) <= 100_000


def test_tables_folders_and_several_sources(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "more.csv").write_text("text\nc\nd\n")
    (tmp_path / "plain.md").write_text("e")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    texts = ["c", "d", "e", "a", "b"]  # by the names of the files
    assert [row if isinstance(row, str) else row["text"] for row in read_data(str(tmp_path))] == texts
    sources = [str(tmp_path / "plain.md"), str(tmp_path / "rows.jsonl")]
    assert list(read_data(sources)) == ["e", *rows]
    assert list(read_data(str(tmp_path / "rows.jsonl"))) == rows


def test_several_sources_begin_with_as_much_of_each(tmp_path):
    """What looks at the first tokens only, such as a calibration, sees all of them."""
    own = [{"input_ids": list(range(125)), "text": "x" * 500} for _ in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    (tmp_path / "long.txt").write_text(long := "word " * 30_000)
    (tmp_path / "short.txt").write_text("end " * 400)
    found = read_data([str(tmp_path / name) for name in ("long.txt", "own.jsonl", "short.txt")])
    assert [item for item in found if isinstance(item, dict)] == own
    texts = [item for item in found if isinstance(item, str)]
    assert "".join(text for text in texts if "word" in text) == long
    assert max(map(len, texts)) <= 4000
    seen = {"word": 0, "own": 0, "end": 0}
    for item in found:
        kind = "own" if isinstance(item, dict) else item.split()[0]
        seen[kind] += 500 if kind == "own" else len(item)
        if seen["own"] < 20_000:
            assert abs(seen["word"] - seen["own"]) <= 4000
            assert seen["end"] == 1600 or abs(seen["end"] - seen["own"]) <= 4000
    assert seen == {"word": 150_000, "own": 20_000, "end": 1600}
    assert list(found) == list(found)  # as often as one likes


def test_shuffled_data_begins_with_all_of_it(tmp_path):
    """The first tokens of a long file are one chapter; of a data set, one kind of rows."""
    book = [f"chapter{i // 1000} word{i}" for i in range(20_000)]
    (tmp_path / "book.txt").write_text(" ".join(book))
    found = read_data(str(tmp_path / "book.txt"), shuffled=True)
    assert sorted(" ".join(found).split()) == sorted(" ".join(book).split())  # nothing is lost
    assert len({text.split()[2] for text in found[:12]}) >= 7, "twelve of 95 pieces are of many chapters"
    assert found == read_data(str(tmp_path / "book.txt"), shuffled=True)
    rows = [{"text": f"row {i}"} for i in range(1000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(read_data(str(tmp_path / "rows.jsonl"), shuffled=True))
    assert found != rows
    assert sorted(found, key=str) == sorted(rows, key=str)
    mixed = list(read_data([str(tmp_path / "book.txt"), str(tmp_path / "rows.jsonl")], shuffled=True))
    assert [item for item in mixed if isinstance(item, dict)] == found


def test_long_texts_in_columns_and_completions_count_as_long_as_they_are(tmp_path):
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "book " * 20_000}))
    (tmp_path / "asked.jsonl").write_text("\n".join(100 * [json.dumps({"prompt": "why", "completion": "so " * 300})]))
    (tmp_path / "text.txt").write_text("word " * 20_000)
    kinds = ("book", "why", "word")
    seen = dict.fromkeys(kinds, 0)
    for item in read_data([str(tmp_path / name) for name in ("book.jsonl", "asked.jsonl", "text.txt")]):
        if sum(seen.values()) > 60_000:
            break
        kind = "why" if isinstance(item, dict) else item.split()[0]
        seen[kind] += len(item["prompt"] + item["completion"]) if isinstance(item, dict) else len(item)
    assert all(abs(seen[kind] - 20_000) <= 4000 for kind in kinds), seen


def test_what_is_held_out_is_known_again_among_several_sources(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(6000)))
    both, one = [str(tmp_path / "a"), str(tmp_path / "b")], [str(tmp_path / "a")]
    train, held_out = read_divided(both, one)
    assert held_out == [(tmp_path / "a").read_text()]
    assert train == [(tmp_path / "b").read_text()]


def test_a_saved_data_set_gives_the_split_for_the_purpose(tmp_path):
    splits = {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(3)]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    splits["train"].save_to_disk(tmp_path / "one")
    assert read_data(str(tmp_path / "splits"))["text"][0] == "train 0"
    assert read_data(str(tmp_path / "splits"), held_out=True)["text"][0] == "test 0"
    assert read_data(str(tmp_path / "one"), held_out=True)["text"][0] == "train 0"
    train, held_out = read_divided(str(tmp_path / "splits"))
    assert sorted(train) == splits["train"]["text"][:]
    assert sorted(held_out) == splits["test"]["text"][:]


def test_a_text_of_both_parts_is_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": str(i)}) for i in range(4)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": str(i)}) for i in range(3, 6)))
    train, held_out = read_divided(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), text_column="body")
    assert sorted(train) == ["0", "1", "2"]
    assert sorted(held_out) == ["3", "4", "5"]
    with pytest.raises(ValueError, match=r"columns \['body'\], but no texts in 'text'"):
        read_divided(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="no texts apart from each other"):
        read_divided(str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"), text_column="body")


@pytest.mark.slow
def test_the_standard_library_is_split_by_file():
    train, held_out = read_data(STDLIB), read_data(STDLIB, held_out=True)
    assert train == list(stdlib_texts("train").values())
    assert 5 < len(train) / len(held_out) < 20
    assert all(is_held_out(name) for name in stdlib_texts("held_out"))


@pytest.mark.parametrize("name", ["nowhere", "no/where.txt", "./no/where", "a b/c"])
def test_what_is_neither_a_file_nor_a_name_is_refused_without_asking_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_data(name)


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match="neither a saved data set nor files"):
        read_data(str(tmp_path))


def test_empty_files_of_a_folder_are_passed_over(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "blank.txt").write_text(" \n")
    (tmp_path / "package" / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="The files of the folder .* hold no text"):
        read_data(str(tmp_path))
    (tmp_path / "package" / "a.py").write_text("print()")
    assert read_data(str(tmp_path)) == ["print()"]
    with pytest.raises(ValueError, match=r"none.jsonl holds no text"):
        read_data(str(tmp_path / "package" / "none.jsonl"))


def test_endings_in_capitals_and_the_mark_of_utf_8(tmp_path):
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "B.JSONL").write_text('{"text": "b"}\n')
    assert list(read_data(str(tmp_path / "B.JSONL"))) == [{"text": "b"}]
    assert read_data(str(tmp_path)) == ["a", {"text": "b"}]
