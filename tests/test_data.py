# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from models import MODELS, VOCAB
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, calibrate, evaluate
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


# ---- whatever SponTrainer takes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Of a token per word, opening texts with <s>, with a chat template that takes tools."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool['name'] + ' ' }}{% endfor %}"
        "{% for m in messages %}{{ ('w10 ' if m['role'] == 'user' else 'w11 ') + m['content'] }} </s> {% endfor %}"
        "{{ ending or '' }}"
    )
    return tokenizer


def talk(question, answer=None, keys=("role", "content")):
    turns = [("user", question), ("assistant", answer)]
    return [dict(zip(keys, turn, strict=True)) for turn in turns if turn[1] is not None]


TOOLS = [{"name": "w90", "description": "w", "parameters": {}}]
ROWS = {
    "text": [{"text": "w3 w4 w5"}, {"text": "w6 w7 </s>"}],
    "prompt and completion": [{"prompt": "w3 w4 ", "completion": "w5"}, {"prompt": "w6 ", "completion": "w7 w8 </s>"}],
    "messages": [{"messages": talk("w3 w4", "w5")}, {"messages": talk("w6", "w7 w8")}],
    "messages with tools": [{"messages": talk("w3", "w5"), "tools": TOOLS}],
    "messages with tools as text": [{"messages": talk("w3", "w5"), "tools": '[{"name": "w90"}]'}],
    "template options": [{"messages": talk("w3", "w5"), "chat_template_kwargs": {"ending": "w96"}}],
    "ShareGPT": [{"conversations": talk("w3 w4", "w5", ("from", "value"))}],
    "conversational prompt and completion": [
        {"prompt": talk("w3 w4"), "completion": [{"role": "assistant", "content": "w5 w6"}]},
    ],
    "tokenised": [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}],
    "a text besides": [{"prompt": "w3 ", "completion": "w4", "text": "w9 w9"}],
}


def trained_on(rows, tokenizer, tmp_path):
    """The tokens that SponTrainer has made of the rows, in their order."""
    args = SponTrainingConfig(
        str(tmp_path), max_length=None, use_cpu=True, report_to=[], disable_tqdm=True, shuffle_dataset=False
    )
    model = get_peft_model(MODELS["llama"](), SponConfig(task_type="CAUSAL_LM"))
    trainer = SponTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [token for ids in trainer.train_dataset["input_ids"] for token in ids]


@pytest.mark.parametrize("kind", ROWS)
def test_the_tokens_that_the_trainer_sees(kind, tokenizer, tmp_path):
    rows = ROWS[kind]
    wanted = trained_on(rows, tokenizer, tmp_path)
    if kind == "a text besides":  # TRL closes the text that it does not use, and not the completion
        wanted.append(tokenizer.eos_token_id)
    assert len(wanted) > 3
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for data in (rows, Dataset.from_list(rows), columns, Dataset.from_list(rows)[:]):
        assert joined(iter_batches(data, tokenizer, batch_size=1, max_length=64)) == wanted
    assert joined(iter_batches(rows[0], tokenizer)) == wanted[: len(joined(iter_batches(rows[:1], tokenizer)))]


def test_a_column_that_was_asked_for_comes_first(tokenizer):
    rows = [{"prompt": "w3 ", "completion": "w4", "answer": "w9 w9"}]
    assert joined(iter_batches(rows, tokenizer, text_column="answer")) == [1, 9, 9, 2]


@pytest.mark.parametrize(
    "data",
    [
        [[3, 4, 5], [6, 7]],
        ((3, 4, 5), (6, 7)),
        [np.array([3, 4, 5]), np.array([6, 7])],
        [torch.tensor([3, 4, 5]), torch.tensor([6, 7])],
        {"input_ids": [[3, 4, 5], [6, 7]]},
        {"input_ids": [[3, 4, 5], [0, 6, 7]], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
        {"input_ids": np.array([[3, 4, 5], [6, 7, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])},
        BatchEncoding({"input_ids": [[3, 4, 5], [6, 7]]}),
        [BatchEncoding({"input_ids": [3, 4, 5]}), BatchEncoding({"input_ids": [6, 7]})],
        [{"input_ids": [[3, 4, 5]]}, {"input_ids": [[6, 7]]}],
        {"input_ids": [3, 4, 5, 6, 7]},
        Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7]]}).with_format("torch"),
        Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7]]}).with_format("numpy"),
        Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7]]}).to_iterable_dataset(),
    ],
)
def test_token_ids_however_they_come(data):
    assert joined(iter_batches(data)) == [3, 4, 5, 6, 7]


def test_a_tokenizers_output(tokenizer):
    texts = ["w3 w4 w5", "w6"]
    wanted = [1, 3, 4, 5, 1, 6]
    assert joined(iter_batches(tokenizer(texts))) == wanted
    assert joined(iter_batches(tokenizer(texts, padding=True))) == wanted
    assert joined(iter_batches(tokenizer(texts, padding=True, return_tensors="np"))) == wanted
    (batch,) = iter_batches(tokenizer(texts, padding=True, return_tensors="pt"))
    assert batch["attention_mask"].sum() == len(wanted)
    assert joined(iter_batches(tokenizer(texts[0]))) == wanted[:4]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DatasetDict({"train": Dataset.from_dict({"text": ["w3"]})}), ValueError, r"DatasetDict .*data\['train'\]"),
        ({"train": ["w3"], "test": ["w4"]}, ValueError, r"with the keys \['train', 'test'\]. Give one of its splits"),
        ({"contents": ["w3"]}, ValueError, r"\['contents'\].*text_column"),
        (Path("texts.txt"), TypeError, "data is the path 'texts.txt'; read the file first, .*data_files='texts.txt'"),
        (Dataset.from_dict({"text": ["w3"]}).to_pandas(), TypeError, "of type DataFrame; .*Dataset.from_pandas"),
        (3, TypeError, r"data is of type int \(3\); give a list of strings"),
        (None, TypeError, "data is of type NoneType"),
        ([[0.5, 1.5]], ValueError, "of type list; give strings, lists of token ids, rows, or batches"),
        ([["w3", "w4"]], ValueError, "of type list; give strings"),
        ([{"content": "w3"}], ValueError, r"columns \['content'\], but neither 'input_ids' nor 'text', nor"),
        ([{"text": 3}], ValueError, r"of type int \(3\)"),
        ([{"text": None}], ValueError, "of type NoneType"),
    ],
)  # fmt: skip
def test_other_data_is_told_what_to_do(data, error, message, tokenizer):
    with pytest.raises(error, match=message):
        next(iter_batches(data, tokenizer))


@pytest.mark.parametrize("function", [calibrate, evaluate])
def test_swapped_arguments(function, llama, tokenizer):
    model, name = get_peft_model(llama, SponConfig()), function.__name__
    texts = ["w3 w4"]
    order = rf"The order is {name}\(model, data, tokenizer\)"
    with pytest.raises(TypeError, match=f"model is of type list, not a torch.nn.Module. {order}"):
        function(texts, model, tokenizer)
    with pytest.raises(TypeError, match=rf"model is of type str \('llama'\), not a torch.nn.Module. {order}"):
        function("llama", texts, tokenizer)
    with pytest.raises(TypeError, match=f"data is of type PeftModel; .*{order}"):
        function(model, model, tokenizer)
    with pytest.raises(TypeError, match=f"tokenizer is of type list, which cannot be called with a text. {order}"):
        function(model, tokenizer, texts)
    with pytest.raises(TypeError, match=r"load it first: AutoTokenizer.from_pretrained\('gpt2'\)"):
        function(model, texts, "gpt2")
    with pytest.raises(TypeError, match="data is of type PreTrainedTokenizerFast|data is of type TokenizersBackend"):
        function(model, tokenizer)


@pytest.mark.parametrize("function", [calibrate, evaluate])
@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_tokens"])
@pytest.mark.parametrize("value", [0, -1, "1k", 1e5, True])
def test_sizes_that_are_no_numbers_above_0(function, name, value, llama):
    model = get_peft_model(llama, SponConfig())
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; use a whole number above 0, for example \d+"):
        function(model, [[3, 4, 5]], **{name: value})
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_training_set_without_text(llama, tokenizer, tmp_path):
    args = SponTrainingConfig(str(tmp_path), use_cpu=True, report_to=[])
    good, bad = Dataset.from_dict({"text": ["w3 w4"]}), Dataset.from_dict({"content": ["w3 w4"]})
    message = r"columns \['content'\], but neither 'input_ids' nor 'text'.*dataset_text_field of SponTrainingConfig"
    for data in ({"train_dataset": bad}, {"train_dataset": good, "eval_dataset": {"held_out": bad}}):
        with pytest.raises(ValueError, match=message):
            SponTrainer(model=llama, args=args, processing_class=tokenizer, **data)
    with pytest.raises(ValueError, match=r"train_dataset is a DatasetDict with the keys \['train'\]; give one"):
        SponTrainer(model=llama, args=args, processing_class=tokenizer, train_dataset=DatasetDict({"train": good}))
    args = SponTrainingConfig(str(tmp_path), use_cpu=True, report_to=[], dataset_text_field="content")
    SponTrainer(model=llama, args=args, processing_class=tokenizer, train_dataset=bad)
