# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Text of the dense model's own, to train on."""

import json

import pytest
import torch
from models import MODELS, calibrated, word_tokenizer
from peft import get_peft_model
from test_trainer import make as make_trainer

import peft_spon.sampling
from peft_spon import SponConfig, add_lora, calibrate, dense_mode, evaluate, sample_texts


FAMILIES = ("llama", "gpt2", "opt")


@pytest.fixture
def words():
    return word_tokenizer()


def sparse(family="llama"):
    torch.manual_seed(3)
    return calibrated(get_peft_model(MODELS[family](), SponConfig(sparsity=0.7, init_weights=False)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [None, ["w5 w6", "w7", "w8 w9 w10 w11"]])
def test_texts_are_those_of_the_plain_model(family, prompts, words):
    model, options = sparse(family), {"tokens": 12, "prompts": prompts, "batch_size": 4}
    before = torch.get_rng_state()
    texts = sample_texts(model, words, 6, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert texts["input_ids"] == sample_texts(MODELS[family](), words, 6, **options)["input_ids"]
    assert texts["input_ids"] != sample_texts(model, words, 6, seed=1, **options)["input_ids"]
    starts = [[1]] if prompts is None else [words(prompt)["input_ids"] for prompt in prompts]
    for i, ids in enumerate(texts["input_ids"]):
        start = starts[i % len(starts)]
        assert ids[: len(start)] == start
        assert len(start) < len(ids) <= 12
        assert 2 not in ids[:-1], "the end of the text is its end"
        assert texts["text"][i] == words.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(temperature, words):
    model = sparse()
    model.generation_config.top_k, model.generation_config.temperature = 3, 0.1  # not these
    count = 4000
    texts = sample_texts(
        model, words, count, tokens=4, prompts=["w5 w6 w7"], temperature=temperature, batch_size=count
    )
    drawn = torch.tensor([ids[2] for ids in texts["input_ids"]])
    start = words("w5 w6 w7")["input_ids"][:2]  # cut at half of the tokens
    with torch.no_grad(), dense_mode(model):
        wanted = (model(input_ids=torch.tensor([start])).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=len(wanted)) / count
    error = (wanted * (1 - wanted) / count).sqrt()
    assert ((found - wanted).abs() <= 5 * error + 1e-3).all()
    assert (wanted > 0.002).sum() > 3, "more tokens than top_k would leave"


@pytest.mark.parametrize("is_sparse", [True, False])
def test_rules_of_the_models_settings_do_not_count(is_sparse, words):
    model = sparse() if is_sparse else MODELS["llama"]()
    options = {"tokens": 20, "prompts": ["w5 w6"]}
    wanted = sample_texts(model, words, 4, **options)["input_ids"]
    settings = model.generation_config
    settings.repetition_penalty, settings.suppress_tokens = 3.0, list(range(3, 60))
    settings.min_new_tokens, settings.no_repeat_ngram_size = 15, 1
    assert sample_texts(model, words, 4, **options)["input_ids"] == wanted
    assert model.generation_config is settings
    assert settings.repetition_penalty == 3.0


def test_a_task_lora_is_part_of_the_dense_model(words):
    from lora_models import lora_config

    model = sparse()
    without = sample_texts(model, words, 4, tokens=12)["input_ids"]
    add_lora(model, lora_config()).eval()
    assert sample_texts(model, words, 4, tokens=12)["input_ids"] != without


def test_a_stopped_run_goes_on(words, tmp_path, monkeypatch):
    model, path = sparse(), tmp_path / "own.jsonl"
    options = {"tokens": 10, "batch_size": 2}
    wanted = sample_texts(model, words, 8, **options)
    drawn = []
    continue_prompts = peft_spon.sampling.continue_prompts

    def counted(model, prompts, *args, **kwargs):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.extend(prompts)
        return continue_prompts(model, prompts, *args, **kwargs)

    monkeypatch.setattr(peft_spon.sampling, "continue_prompts", counted)
    with pytest.raises(KeyboardInterrupt):
        sample_texts(model, words, 8, path=path, **options)
    with path.open("a") as file:
        file.write('{"text": "cut o')  # killed while writing
    monkeypatch.setattr(peft_spon.sampling, "continue_prompts", continue_prompts)
    found = sample_texts(model, words, 8, path=path, **options)
    assert found["input_ids"] == wanted["input_ids"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["input_ids"] for line in lines] == wanted["input_ids"]
    begun = {"path": tmp_path / "begun.jsonl", **options}
    sample_texts(model, words, 2, prompts=["w7 w8"], **begun)
    with pytest.raises(ValueError, match=r"holds texts that follow other prompts; name another file"):
        sample_texts(model, words, 4, prompts=["w7"], **begun)  # with which the others begin
    monkeypatch.setattr(peft_spon.sampling, "continue_prompts", None)  # nothing is drawn again
    assert sample_texts(model, words, 5, path=path, **options)["text"] == wanted["text"][:5]
    with pytest.raises(ValueError, match=r"made with temperature=1.0, and now it is 0.7; name another file"):
        sample_texts(model, words, 8, path=path, temperature=0.7, **options)
    with pytest.raises(ValueError, match=r"holds texts that follow other prompts; name another file"):
        sample_texts(model, words, 8, path=path, prompts=["w7"], **options)
    (tmp_path / "novel.txt").write_text("Once upon a time\n")
    with pytest.raises(ValueError, match="novel.txt' is no file of sample_texts"):
        sample_texts(model, words, 8, path=tmp_path / "novel.txt", **options)
    assert (tmp_path / "novel.txt").read_text() == "Once upon a time\n"


def test_they_are_what_everything_else_takes(words, tmp_path):
    model = sparse()
    texts = sample_texts(model, words, 24, tokens=16, path=tmp_path / "new" / "own.jsonl")
    count = sum(map(len, texts["input_ids"]))
    assert calibrate(model, texts, progress=False).tokens == pytest.approx(count, abs=1)
    assert evaluate(model, texts, progress=False).tokens > 0
    trainer = make_trainer(tmp_path, words, model, data=texts, max_steps=3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert any(batch["input_ids"][0].tolist()[: len(ids)] == ids for ids in texts["input_ids"])
    assert trainer.train().metrics["kl_after"] > 0


def test_conversations_are_answered(words):
    words.chat_template = (
        "{% for message in messages %}{{ 'w3 ' + message['content'] + ' w4 ' }}{% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    texts = sample_texts(sparse(), words, 2, tokens=20, prompts=[[{"role": "user", "content": "w50 w51"}]])
    assert all(ids[:5] == [3, 50, 51, 4, 9] for ids in texts["input_ids"])


def test_conversations_that_are_too_long_are_left_out(words, caplog):
    words.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}w9"
    long, short = ([{"role": "user", "content": " ".join(["w50"] * count)}] for count in (10, 3))
    texts = sample_texts(sparse(), words, 2, tokens=20, prompts=[long, short])
    assert all(ids[:4] == [50, 50, 50, 9] for ids in texts["input_ids"])
    assert "1 of 2 prompts are conversations of more than 10 tokens, half of tokens, and were left out" in caplog.text
    with pytest.raises(
        ValueError, match="1 of 1 prompts are conversations of more than 10 tokens, half of tokens; use"
    ):
        sample_texts(sparse(), words, 2, tokens=20, prompts=[long])


def test_a_text_ends_where_the_models_positions_do(words):
    model = sparse()
    positions = model.config.max_position_embeddings = 24
    assert max(map(len, sample_texts(model, words, 2)["input_ids"])) <= positions
    with pytest.raises(ValueError, match=f"tokens is {positions + 1}, but the model has {positions} positions"):
        sample_texts(model, words, 2, tokens=positions + 1)


def test_what_cannot_be_is_refused(words):
    model = sparse()
    for options, problem in (
        ({"n": 0}, "n is 0; use a whole number above 0, for example 256"),
        ({"tokens": 1}, "tokens is 1.*use 2 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; use a number above 0"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [""]}, "A prompt is empty"),
    ):
        with pytest.raises(ValueError, match=problem):
            sample_texts(model, words, **{"n": 2, **options})
    with pytest.raises(TypeError, match=r"A prompt is of type int \(5\)"):
        sample_texts(model, words, 2, prompts=[5])
    with pytest.raises(TypeError, match=r"The order is sample_texts\(model, tokenizer, n\)"):
        sample_texts(words, model, 2)
    with pytest.raises(TypeError, match="tokenizer is None"):
        sample_texts(model, None, 2)
    with pytest.raises(ValueError, match="is no causal language model"):
        sample_texts(get_peft_model(MODELS["t5"](), SponConfig()), words, 2)
    words.bos_token = words.eos_token = None
    with pytest.raises(ValueError, match="neither a beginning- nor an end-of-text token to start from"):
        sample_texts(model, words, 2)
