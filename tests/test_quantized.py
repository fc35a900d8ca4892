# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised base models: bitsandbytes 4 and 8 bit, torchao int8. Skipped where these are not installed."""

import pytest
import tokenizers
import torch
import transformers as tf
from models import SPECIAL, VOCAB, build
from peft import LoraConfig, PeftModel, get_peft_model

from peft_spon import SponConfig, add_lora, calibrate, load_with_lora, without_lora
from peft_spon.base_layer import through_weight
from peft_spon.modes import differentiable
from peft_spon.sites import spon_layers
from peft_spon.sparse_linear import SparseMixin


def four_bit():
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    # Without double quantisation, bitsandbytes 0.50 mixes up its scales in state_dict() on CPUs with AVX-512 BF16.
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )


def eight_bit():
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    return tf.BitsAndBytesConfig(load_in_8bit=True)


def torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


# Kind of quantisation, and how near the logits come: 8 bit quantises the inputs of each layer with the anchor or
# without; 4 bit computes in bf16 on some CPUs and is requantised there when saved, and thresholds amplify that.
KINDS = {"4bit": (four_bit, 2e-1), "8bit": (eight_bit, 2e-1), "torchao": (torchao, 1e-5)}


@pytest.fixture(params=sorted(KINDS))
def quantized(request, tmp_path):
    """A function that loads the same quantised model again and again, and the tolerance of merging."""
    make, tolerance = KINDS[request.param]
    make()
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **SPECIAL
    )
    build(tf.LlamaForCausalLM, config).save_pretrained(tmp_path / "base")

    def load():
        return tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=make(), dtype=torch.float32, device_map="cpu"
        ).eval()

    return load, tolerance


IDS = torch.arange(3, 35).reshape(2, 16)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def adapted(load, **fields):
    torch.manual_seed(3)
    return get_peft_model(
        load(), SponConfig(**{"init_weights": False, "criterion": "weighted", "sparsity": 0.5, **fields})
    )


def test_a_training_step_moves_the_anchors(quantized):
    model = adapted(quantized[0], init_weights=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    anchors = [p for n, p in model.named_parameters() if "spon_anchor" in n]
    assert anchors
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in anchors)


def test_the_trainer_moves_every_anchor(quantized, tmp_path):
    pytest.importorskip("trl", reason="pip install 'peft_spon[train]'")
    from datasets import Dataset

    from peft_spon import SponTrainer, SponTrainingConfig

    if isinstance(quantized[0]().config.quantization_config, tf.TorchAoConfig) and tf.__version__ < "5":
        pytest.skip("transformers 4 refuses to train on torchao")
    rows = torch.randint(3, VOCAB, (8, 16)).tolist()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    trainer = SponTrainer(
        adapted(quantized[0], init_weights=True),
        SponTrainingConfig(
            str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2"),
    )
    trainer.train()
    for name, layer in spon_layers(trainer.model).items():
        assert layer.spon_anchor["default"].abs().min() > 0, name


@pytest.mark.parametrize("space", ["input", "output"])
def test_calibrate_save_load_and_merge(quantized, space, tmp_path):
    load, tolerance = quantized
    model = adapted(load, anchor_space=space)
    result = calibrate(model, [{"input_ids": IDS}], progress=False)
    assert len(result.layers) == len(spon_layers(model))
    wanted = logits(model)
    dense = logits(load())

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")

    def near(found, target=wanted):
        return ((found - target).norm() / target.norm()).item() < tolerance

    assert not near(dense), "what is compared must tell the sparse model from the dense one"
    assert near(logits(again))
    with model.disable_adapter():
        assert near(logits(model), dense)

    before = {name: layer.get_base_layer().bias for name, layer in spon_layers(model).items()}
    model.merge_adapter()
    assert near(logits(model))
    assert all(layer.get_base_layer().bias is before[name] for name, layer in spon_layers(model).items())
    model.unmerge_adapter()
    assert near(logits(model))

    quantized_class = type(next(iter(spon_layers(model).values())).get_base_layer())
    merged = model.merge_and_unload()
    assert near(logits(merged))
    layers = [layer for layer in merged.modules() if isinstance(layer, SparseMixin)]
    assert layers
    assert all(isinstance(layer, quantized_class) and layer.spon_shift.dtype == torch.float32 for layer in layers)
    with pytest.raises(ValueError, match=r"quantised.*Keep the adapter"):
        merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_lora_beneath_on_a_quantised_base(quantized, tmp_path):
    load, tolerance = quantized
    model = add_lora(adapted(load), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with differentiable(model):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora_" in name and grad.isfinite().all() and grad.abs().max() > 0 for name, grad in grads.items())
    wanted = logits(model)
    model.save_pretrained(tmp_path / "both")
    again = logits(load_with_lora(load(), tmp_path / "both"))
    assert ((again - wanted).norm() / wanted.norm()).item() < tolerance
    with without_lora(model):
        assert not torch.allclose(logits(model), wanted)


def test_gains_are_not_folded_into_quantised_weights(quantized):
    model = adapted(quantized[0])
    if type(spon_layers(model)["model.layers.0.mlp.up_proj"].get_base_layer().weight) is torch.nn.Parameter:
        pytest.skip("a plain weight")
    with pytest.raises(ValueError, match="fold_gain"):
        model.merge_and_unload(fold_gain=True)
    assert spon_layers(model)


@torch.no_grad()
def test_the_shift_is_what_the_layer_makes_of_the_anchor(quantized):
    for name, layer in spon_layers(adapted(quantized[0])).items():
        base = layer.get_base_layer().eval()
        vector = torch.randn(layer.in_features)
        found = through_weight(base, vector)
        probed = base(torch.stack([vector, torch.zeros_like(vector)]))
        error = (found - (probed[0] - probed[1])).norm() / found.norm()
        assert error < 2e-2, f"{name}: {error}"
