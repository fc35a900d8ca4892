# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded model: really trained, small enough to ship, and worth making sparse."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, allocate, calibrate, evaluate


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY_LLAMA = EXAMPLES / "tiny_llama"
sys.path.insert(0, str(EXAMPLES))

from stdlib_data import is_held_out, stdlib_texts  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts():
    return {split: stdlib_texts(split) for split in ("train", "held_out")}


SIZE = {"batch_size": 8, "max_length": 256}


def test_files(base, tokenizer):
    assert sum(f.stat().st_size for f in TINY_LLAMA.glob("*.safetensors")) < 12e6
    assert not [*TINY_LLAMA.glob("*.bin"), *TINY_LLAMA.glob("*.pt")]
    assert 4.5e6 < base.num_parameters() < 5.5e6
    assert len(tokenizer) == 2048
    text = "def f(x):\n    return x + 1  # \u00e9\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    record = json.loads((TINY_LLAMA / "training.json").read_text())
    assert f"{record['held_out_perplexity']:.2f}" in (TINY_LLAMA / "README.md").read_text()


@pytest.mark.slow
def test_split_is_by_file_and_the_same_everywhere(texts):
    train, held_out = texts["train"], texts["held_out"]
    assert not set(train) & set(held_out)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
    assert not any(is_held_out(name) for name in train)
    assert is_held_out("doctest.py")
    assert not is_held_out("json/decoder.py")
    assert not any("site-packages" in name or name.startswith("test/") for name in train)


@pytest.mark.slow
def test_it_has_learned_python(base, tokenizer, texts):
    model = get_peft_model(base, SponConfig(sparsity=0.5, anchor_modules=[]))
    result = evaluate(model, list(texts["held_out"].values()), tokenizer, max_tokens=8192, **SIZE)
    assert result.dense.perplexity < 14, "an untrained model stands at 2048"


@pytest.mark.slow
def test_sparsity_hurts_weighted_hurts_less_and_anchors_repair(base, tokenizer, texts, tmp_path):
    model = get_peft_model(base, SponConfig(sparsity=0.6, criterion="magnitude", anchor_modules=[]))
    train = list(texts["train"].values())
    calibrate(model, train, tokenizer, max_tokens=8192, **SIZE)
    held_out = {"data": list(texts["held_out"].values()), "tokenizer": tokenizer, "max_tokens": 4096, **SIZE}
    magnitude = evaluate(model, **held_out)
    model = get_peft_model(model.unload(), SponConfig(sparsity=0.6, criterion="weighted"))
    calibrate(model, train, tokenizer, max_tokens=8192, **SIZE)
    args = SponTrainingConfig(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        max_length=128,
        packing=True,
        packing_strategy="wrapped",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"text": text} for text in train[::10]]
    SponTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    ours = evaluate(model, **held_out)
    assert ours.dense == magnitude.dense
    assert magnitude.sparse.perplexity > ours.sparse.perplexity > ours.anchored.perplexity > ours.dense.perplexity
    assert ours.anchored.kl < 0.85 * ours.sparse.kl
    assert 0.58 < ours.anchored.sparsity < 0.62


@pytest.mark.slow
def test_allocation_takes_half_of_the_kl_away_for_nothing(base, tokenizer, texts):
    """Little data, and still: thresholds of 4,096 tokens hit the total, and 1,024 tokens tell the layers apart."""
    model = get_peft_model(base, SponConfig(sparsity=0.6, anchor_modules=[]))
    calibrate(model, list(texts["train"].values()), tokenizer, max_tokens=4096, **SIZE)
    kl, realised = {}, {}
    for method in ("uniform", "kl"):
        allocate(model, list(texts["train"].values()), tokenizer, method=method, max_length=256, max_tokens=1024)
        result = evaluate(model, list(texts["held_out"].values()), tokenizer, max_tokens=2048, **SIZE)
        kl[method], realised[method] = result.sparse.kl, result.sparse.sparsity
    assert kl["kl"] < 0.5 * kl["uniform"]
    assert realised["kl"] == pytest.approx(realised["uniform"], abs=0.005)
    assert realised["uniform"] == pytest.approx(0.6, abs=0.01)
