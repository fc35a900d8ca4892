# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`prefill`: position in the text decides which tokens are dense, however `generate` cuts it into pieces."""

import copy
import math
import pickle

import pytest
import torch
import transformers as tf
from models import MODELS, VOCAB, build
from peft import PeftModel, get_peft_model

from peft_spon import SponConfig
from peft_spon.layer import SponLayer
from peft_spon.sparse_linear import Prompt, SparseMixin, first_sparse_token


PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8]])  # prompt lookup finds something in it
LENGTH = PROMPT.shape[1]


def sparse_model(family, prefill, way="adapter", task_type=None):
    torch.manual_seed(0)
    base = MODELS[family]()
    base.generation_config.eos_token_id = None
    model = get_peft_model(base, SponConfig(prefill=prefill, init_weights=False, task_type=task_type)).eval()
    if way == "merged":
        model.merge_adapter()
    return model.merge_and_unload() if way == "unloaded" else model


def draft(model):
    torch.manual_seed(7)
    other = build(type(model.get_base_model() if isinstance(model, PeftModel) else model), model.config)
    other.generation_config.eos_token_id = None
    return other


WAYS = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": draft(model)},
    "itself": lambda model: {"assistant_model": model.get_base_model() if isinstance(model, PeftModel) else model},
    "chunks of 4": lambda model: {"prefill_chunk_size": 4},
    "chunks of 1": lambda model: {"prefill_chunk_size": 1},
    "no cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
}


def generate(model, ids=PROMPT, tokens=14, **kwargs):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **kwargs
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefill", ["sparse", "dense", 0.5])
def test_the_same_greedy_tokens_in_whatever_pieces_they_come(family, prefill):
    model = sparse_model(family, prefill)
    plain = generate(model)
    for name, way in WAYS.items():
        assert torch.equal(generate(model, **way(model)), plain), name
    assert torch.equal(generate(model), plain)
    assert all(module.prompt is None for module in model.modules() if isinstance(module, SponLayer))
    assert not model.get_base_model()._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize(("way", "task_type"), [("adapter", "CAUSAL_LM"), ("merged", None), ("unloaded", None)])
def test_merged_models_do_the_same(way, task_type):
    model = sparse_model("llama", 0.5, way, task_type)
    plain = generate(model)
    assert torch.equal(plain, generate(sparse_model("llama", 0.5)))
    for name, options in WAYS.items():
        assert torch.equal(generate(model, **options(model)), plain), name


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["dense", 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_the_leading_tokens_of_the_prompt_are_dense_and_no_others(prefill, way):
    model = sparse_model("llama", prefill)
    layer = [module for module in model.modules() if isinstance(module, SponLayer)][-1]
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append((args[0][0] == 0).float().mean(-1)))
    options = WAYS[way](model)
    if way == "itself":
        options = {"assistant_model": draft(model)}  # else the draft's own calls are among what is seen
    generate(model, **options)
    dense = {"dense": LENGTH, 0.5: math.ceil(0.5 * LENGTH)}[prefill]
    start = 0
    if way == "no cache":
        seen = seen[-1:]
    for zeros in seen:
        if start < dense:
            assert (zeros[: dense - start] < 0.1).all()
        assert (zeros[max(dense - start, 0) :] > 0.2).all()
        start += len(zeros)
    assert start >= LENGTH + 12


def test_saved_merged_models_do_the_same(tmp_path):
    merged = sparse_model("llama", "dense", "unloaded")
    plain = generate(merged)
    merged.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.generation_config.eos_token_id = None
    assert any(isinstance(module, SparseMixin) for module in loaded.modules())
    assert torch.equal(generate(loaded), plain)
    assert torch.equal(generate(loaded, prompt_lookup_num_tokens=3), plain)


def test_copies_and_pickles_have_their_own():
    model = sparse_model("llama", "dense")
    plain = generate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            parameter.data.zero_()
        assert torch.equal(generate(other, prompt_lookup_num_tokens=3), plain)
        model = other


def test_of_a_later_turn_all_that_was_said_is_the_prompt():
    model = sparse_model("llama", "dense")
    cache = tf.DynamicCache(config=model.config)
    first = generate(model, past_key_values=cache, tokens=3)
    longer = torch.cat([first, torch.tensor([[11]])], dim=1)
    layer = [module for module in model.modules() if isinstance(module, SponLayer)][-1]
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append((args[0][0] == 0).float().mean(-1)))
    generate(model, longer, past_key_values=cache, tokens=3)
    assert [len(zeros) for zeros in seen] == [2, 1, 1]  # the last token that was decoded, and the new one
    assert (seen[0] < 0.1).all()
    assert seen[1] > 0.2
    assert seen[2] > 0.2


def test_a_batch_with_padding_and_beams():
    model = sparse_model("llama", 0.5)
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    ids[0, :2] = 0
    mask = (ids != 0).long()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**options, prefill_chunk_size=4), model.generate(**options))


@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "use_cache"])
def test_encoder_decoders_refuse(way):
    model = sparse_model("t5", "dense")
    option = {way: 3 if way != "use_cache" else False}
    with pytest.raises(ValueError, match=rf"T5.*{way}.*prefill='dense'.*prefill=\"sparse\""):
        generate(model, **option)
    assert generate(model).shape[1] == 15
    assert generate(sparse_model("t5", "sparse"), **option).shape[1] == 15


def test_models_with_a_cache_of_their_own_refuse():
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, eos_token_id=None)
    model = get_peft_model(build(tf.MambaForCausalLM, config), SponConfig(prefill="dense", criterion="topk")).eval()
    assert generate(model).shape[1] == LENGTH + 14
    with pytest.raises(ValueError, match="Mamba.*prefill_chunk_size=4"):
        generate(model, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="Mamba.*prefill_chunk_size=4"):
        model.generate(PROMPT, tf.GenerationConfig(max_new_tokens=2, prefill_chunk_size=4))


def test_continuous_batching_refuses(llama):
    if not hasattr(llama, "init_continuous_batching"):
        pytest.skip("this version of transformers has no continuous batching")
    model = get_peft_model(llama, SponConfig(prefill="dense"))
    with pytest.raises(ValueError, match=r"continuous batching .*prefill='dense'"):
        llama.generate_batch([[5, 6, 7]], generation_config=tf.GenerationConfig(max_new_tokens=2))
    model.add_adapter("other", SponConfig())
    model.delete_adapter("default")
    llama.init_continuous_batching(tf.GenerationConfig(eos_token_id=2))


def test_models_with_the_default_prefill_are_not_touched(llama):
    get_peft_model(llama, SponConfig())
    assert "generate" not in vars(llama)


def test_position_of_the_first_sparse_token():
    x = torch.zeros(2, 6, 3)
    assert first_sparse_token(x, "sparse", Prompt(6, 0, 6)) == 0
    assert [first_sparse_token(x, "dense", prompt) for prompt in (None, Prompt(9))] == [6, 6]
    assert [first_sparse_token(x, 0.5, prompt) for prompt in (None, Prompt(9))] == [3, 3]
    assert [first_sparse_token(x, "dense", Prompt(9, cached, 6)) for cached in (0, 3, 5, 9)] == [6, 6, 4, 0]
    assert [first_sparse_token(x, 0.5, Prompt(9, cached, 6)) for cached in (0, 3, 5, 9)] == [5, 2, 0, 0]
    assert first_sparse_token(x[:, :1], "dense", Prompt(9, 8, 1)) == 1, "the last token of a prompt in chunks"
    assert first_sparse_token(x[:, :1], "dense", Prompt(1, 0, 1)) == 0
    rows = x.flatten(0, 1)  # batch and tokens in one, as in OPT's MLP
    assert [first_sparse_token(rows, "dense", Prompt(9, cached, 6)) for cached in (0, 9)] == [12, 0]
    assert first_sparse_token(x[0, 0], "dense") == 0


@pytest.mark.parametrize("way", ["adapter", "merged", "unloaded"])
@pytest.mark.parametrize("prefill", ["dense", 0.5])
def test_every_token_is_sparse_in_training(way, prefill):
    model, always = (sparse_model("llama", p, way) for p in (prefill, "sparse"))
    with torch.no_grad():
        wanted = always(PROMPT).logits
        assert not torch.equal(model(PROMPT).logits, wanted)
        assert torch.equal(model.train()(PROMPT).logits, wanted)
