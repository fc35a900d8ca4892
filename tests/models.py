# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny randomly initialised models of the families that the contract is checked on; inputs; edits of files."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from peft_spon import calibrate, kernels


VOCAB = 97
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
compiled = pytest.mark.skipif(
    not kernels.active_kernel().name.startswith("c-"), reason=f"no C kernel: {kernels.active_kernel().origin}"
)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(model_cls, config):
    torch.manual_seed(1)
    model = model_cls(config).eval()
    for parameter in model.parameters():  # larger than the usual init, so that every layer matters to the output
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model


def llama():
    config = tf.LlamaConfig(**SMALL, **SPECIAL, intermediate_size=64, num_key_value_heads=2)
    return build(tf.LlamaForCausalLM, config)


def qwen3():
    config = tf.Qwen3Config(**SMALL, **SPECIAL, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return build(tf.Qwen3ForCausalLM, config)


def qwen2_with_biases():
    """Its q, k and v have biases, which are 0 when a model is made; wide enough for the attention of servers."""
    sizes = {**SMALL, "hidden_size": 128, "intermediate_size": 160, "num_key_value_heads": 2}
    model = build(tf.Qwen2ForCausalLM, tf.Qwen2Config(**sizes, **SPECIAL))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def gemma():
    config = tf.GemmaConfig(**SMALL, **SPECIAL, intermediate_size=64, num_key_value_heads=1, head_dim=8)
    return build(tf.GemmaForCausalLM, config)


def gpt2():
    config = tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    return build(tf.GPT2LMHeadModel, config)


def opt():
    config = tf.OPTConfig(**SMALL, **SPECIAL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)
    return build(tf.OPTForCausalLM, config)


def bert():
    config = tf.BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    return build(tf.BertForMaskedLM, config)


def t5():
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **SPECIAL
    )
    return build(tf.T5ForConditionalGeneration, config)


MODELS = {"llama": llama, "qwen3": qwen3, "gemma": gemma, "gpt2": gpt2, "opt": opt, "bert": bert, "t5": t5}
GENERATE = {"llama", "qwen3", "gemma", "gpt2", "opt", "t5"}


def inputs(family, rows=3, tokens=7):
    """A batch for a family; the same every time."""
    generator = torch.Generator().manual_seed(2)
    batch = {"input_ids": torch.randint(3, VOCAB, (rows, tokens), generator=generator)}
    if family == "t5":
        batch["labels"] = torch.randint(3, VOCAB, (rows, 5), generator=generator)
    return batch


@torch.no_grad()
def logits(model, family, **kwargs):
    return model(**inputs(family), **kwargs).logits


def calibrated(model):
    """In eval mode, calibrated on tokens from the generator of the process."""
    calibrate(model, [{"input_ids": torch.randint(3, VOCAB, (4, 16))}], progress=False)
    return model.eval()


def by_formula(model):
    """The same weights whatever the versions of torch and transformers: for fixtures."""
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.ndim > 1:
            values = torch.arange(parameter.numel(), dtype=torch.float64).mul(1.7 + index).sin()
            parameter.data.copy_(values.reshape(parameter.shape))
    return model


def word_tokenizer():
    """A token per word w3, w4, ...: of the models' vocabulary."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def edit_tensors(path, change):
    """`change` gets the tensors of a safetensors file, by name, and may do anything to them."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def edit_json(path, change=lambda values: None, **fields):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps({**values, **fields}))
