# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from datasets import Dataset

from peft_spon.data import iter_batches


class Words:
    """A tokenizer of one id per word."""

    eos_token_id = 0

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(word) for word in text.split()]}


TEXTS = ["1 2 3", "4 5", "6 7 8 9"]
STREAM = [1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 0]


def joined(batches):
    return [token for batch in batches for token in batch["input_ids"].flatten().tolist()]


@pytest.mark.parametrize(
    "data", [TEXTS, tuple(TEXTS), iter(TEXTS), [{"text": t} for t in TEXTS], Dataset.from_dict({"text": TEXTS})]
)
def test_texts_are_joined_cut_and_nothing_is_lost(data):
    out = list(iter_batches(data, Words(), batch_size=2, max_length=4))
    assert [tuple(b["input_ids"].shape) for b in out] == [(2, 4), (1, 4)]
    assert joined(out) == STREAM
    out = list(iter_batches(TEXTS, Words(), batch_size=2, max_length=5))
    assert [tuple(b["input_ids"].shape) for b in out] == [(2, 5), (1, 2)]
    assert joined(out) == STREAM


def test_texts_open_as_the_tokenizer_opens_them():
    class Opening(Words):
        bos_token_id = 99

        def __call__(self, text, add_special_tokens=True, **kwargs):
            return {"input_ids": [99] * add_special_tokens + super().__call__(text)["input_ids"]}

    assert joined(iter_batches(["1 2", "3"], Opening(), batch_size=1, max_length=4)) == [99, 1, 2, 0, 99, 3, 0]


def test_padding_of_tokenised_rows_is_left_out():
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 0, 0], [0, 3, 4, 5]], "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1]]}
    )
    assert joined(iter_batches(rows, batch_size=1, max_length=5)) == [1, 2, 3, 4, 5]


def test_tokenised_rows_and_ready_batches():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6, 7]]})
    assert joined(iter_batches(rows, batch_size=1, max_length=4)) == [1, 2, 3, 4, 5, 6, 7]
    ready = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3), "name": "x"}]
    (batch,) = iter_batches(ready)
    assert set(batch) == {"input_ids", "attention_mask"}
    (batch,) = iter_batches(ready[0])
    assert batch["input_ids"].shape == (2, 3)
    (batch,) = iter_batches(torch.ones(2, 3, dtype=torch.long))
    assert batch["input_ids"].shape == (2, 3)


@pytest.mark.parametrize(("limit", "wanted"), [(4, 4), (8, 8), (9, 8), (1, 4), (100, 12)])
def test_max_tokens(limit, wanted):
    out = list(iter_batches(TEXTS, Words(), batch_size=1, max_length=4, max_tokens=limit))
    assert len(joined(out)) == wanted


def test_mistakes():
    with pytest.raises(TypeError, match="one string"):
        next(iter_batches("text", Words()))
    with pytest.raises(ValueError, match="no tokenizer was given"):
        next(iter_batches(TEXTS))
    with pytest.raises(ValueError, match=r"columns \['content'\], but neither 'input_ids' nor 'text'"):
        next(iter_batches([{"content": "1 2"}], Words()))
    assert joined(iter_batches([{"content": "1 2"}], Words(), text_column="content")) == [1, 2, 0]
    with pytest.raises(ValueError, match="of type int"):
        next(iter_batches([3], Words()))
