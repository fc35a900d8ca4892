# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A merged model saved and loaded by transformers: the same bits, and the dense base for who has no peft_spon."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as tf
from models import GENERATE, MODELS, SMALL, SPECIAL, VOCAB, build, inputs, logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peft_spon import CRITERIA, SponConfig, calibrate
from peft_spon.sparse_linear import SparseLinear, SparseMixin


def merged_model(family="llama", base=None, **fields):
    torch.manual_seed(3)
    config = SponConfig(**{"init_weights": False, "criterion": "weighted", "sparsity": 0.5, **fields})
    model = get_peft_model(base or MODELS[family](), config).eval()
    calibrate(model, [{"input_ids": torch.randint(3, VOCAB, (4, 16)), **extra(family)}], progress=False)
    return model.merge_and_unload()


def extra(family):
    return {"labels": torch.randint(3, VOCAB, (4, 5))} if family == "t5" else {}


def auto_class(family):
    return {"bert": tf.AutoModelForMaskedLM, "t5": tf.AutoModelForSeq2SeqLM}.get(family, tf.AutoModelForCausalLM)


@pytest.mark.slow
def test_save_and_load_give_the_same_bits(family, tmp_path):
    merged = merged_model(family)
    wanted = logits(merged, family)
    merged.save_pretrained(tmp_path / "a")
    again = auto_class(family).from_pretrained(tmp_path / "a")
    assert type(again) is type(merged)
    assert torch.equal(logits(again, family), wanted)
    again.save_pretrained(tmp_path / "b")
    third = auto_class(family).from_pretrained(tmp_path / "b")
    assert torch.equal(logits(third, family), wanted)
    first, second = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if family in GENERATE:
        prompt = inputs(family)["input_ids"]
        answers = [model.generate(prompt, max_new_tokens=4, do_sample=False) for model in (merged, again)]
        assert torch.equal(*answers)


DIALS = [{"gain": False}, {"prefill": 0.5}, {"anchor_space": "input"}]


@pytest.mark.slow
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("fields", [{}, *(pytest.param(dial, marks=pytest.mark.slow) for dial in DIALS)], ids=str)
def test_every_criterion_and_dial_comes_back(criterion, fields, tmp_path):
    merged = merged_model(criterion=criterion, **fields)
    merged.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))


def test_uncalibrated_and_partly_anchored_models_come_back(tmp_path):
    fields = {"anchor_modules": ["down_proj"], "exclude_modules": ["q_proj"], "sparsity_pattern": {"up_proj": 0.0}}
    fields["criterion"] = "weighted"  # has state of its own
    merged = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, **fields)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
    assert type(again.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_sharded(tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), logits(merged, "llama"))
    # A second save, in one file, leaves no shard of the first behind.
    merged.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), logits(merged, "llama"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(device_map, tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(again.to("cpu"), "llama"), logits(merged, "llama"))  # auto is a GPU where there is one


def test_a_base_with_accelerate_hooks_stays_sparse_after_merging(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    from accelerate import dispatch_model

    base = dispatch_model(base, device_map, main_device="cpu", force_hooks=True)
    model = get_peft_model(base, SponConfig(init_weights=False)).eval()
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    wanted = logits(model, "llama")
    torch.testing.assert_close(logits(model.merge_and_unload(), "llama"), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path)
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    layers = [layer for layer in half.modules() if isinstance(layer, SparseMixin)]
    assert {layer.weight.dtype for layer in layers} == {dtype}
    buffers = [tensor for layer in layers for tensor in layer.own_tensors().values()]
    assert {buffer.dtype for buffer in buffers} == {torch.float32}
    wanted = [layer.spon_threshold for layer in merged.modules() if isinstance(layer, SparseMixin)]
    assert all(torch.equal(a.spon_threshold, b) for a, b in zip(layers, wanted, strict=True))
    half.save_pretrained(tmp_path / "half")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again, "llama"), logits(half, "llama"))


def test_after_loading_it_is_an_ordinary_model(tmp_path):
    merged_model().save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    half = copy.deepcopy(model).half()
    assert logits(half, "llama").dtype == torch.float16
    assert logits(half.float(), "llama").dtype == torch.float32
    lora = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.gradient_checkpointing_enable()
    lora.enable_input_require_grads()
    lora.train()
    batch = inputs("llama")
    lora(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in lora.named_parameters() if "lora_" in n)
    model = lora.unload()
    model.requires_grad_(True)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    model.eval()
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path / "trained")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, "llama"), wanted)


def test_tied_heads_stay_tied(tmp_path):
    config = tf.LlamaConfig(**SMALL, **SPECIAL, intermediate_size=64, tie_word_embeddings=True)
    merged = merged_model(base=build(tf.LlamaForCausalLM, config))
    merged.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))


def test_with_and_without_a_head(tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path / "headed")
    ids = inputs("llama")["input_ids"]
    body = tf.AutoModel.from_pretrained(tmp_path / "headed")
    with torch.no_grad():
        wanted = merged.model(ids)[0]
        assert torch.equal(body(ids)[0], wanted)
        body.save_pretrained(tmp_path / "body")
        assert torch.equal(tf.AutoModel.from_pretrained(tmp_path / "body")(ids)[0], wanted)
        headed = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "body")  # its head is new
        assert torch.equal(headed.model(ids)[0], wanted)
        classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "headed")
        assert torch.equal(classifier.model(ids)[0], wanted)


@pytest.mark.slow
def test_a_program_without_peft_spon_gets_exactly_the_dense_base(tmp_path):
    for family in ("llama", "gpt2"):
        base = MODELS[family]()
        wanted = logits(base, family)
        weights = {key: value.clone() for key, value in base.state_dict().items()}
        merged_model(family, base).save_pretrained(tmp_path / family)
        stored = load_file(tmp_path / family / "model.safetensors")
        assert all(torch.equal(stored[key], weights[key]) for key in stored if "spon_" not in key)
        assert any(key.endswith("spon_shift") for key in stored)
        torch.save({"batch": inputs(family), "wanted": wanted}, tmp_path / f"{family}.pt")
    code = """
        import sys, torch, transformers
        for family in ("llama", "gpt2"):
            model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{family}")
            saved = torch.load(f"{sys.argv[1]}/{family}.pt")
            with torch.no_grad():
                assert torch.equal(model(**saved["batch"]).logits, saved["wanted"]), family
        assert not any(name.startswith("peft") for name in sys.modules if "spon" in name)
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spon" in done.stderr, "transformers says that it does not know the method"


def test_folders_that_would_load_as_something_else_are_refused(tmp_path):
    adapter = get_peft_model(MODELS["llama"](), SponConfig())
    adapter.save_pretrained(tmp_path)
    merged = adapter.merge_and_unload()
    with pytest.raises(ValueError, match="holds an adapter"):
        merged.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors only"):
        merged.save_pretrained(tmp_path / "b", safe_serialization=False)


def test_merged_config_object_and_copies_are_of_plain_classes():
    merged = merged_model()
    assert type(merged) is tf.LlamaForCausalLM
    for other in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(logits(other, "llama"), logits(merged, "llama"))
        assert other.save_pretrained.args[0] is other, "a copy saves itself, not its original"


def test_unknown_newer_fields_are_dropped_with_one_warning_and_newer_versions_refused(tmp_path, caplog):
    merged = merged_model()
    merged.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["something_new"] = 1
    path.write_text(json.dumps(config))
    tf.utils.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    tf.utils.logging.disable_propagation()
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
    assert sum("something_new" in record.message for record in caplog.records) == 1
    config["quantization_config"]["peft_spon_version"] = "99.0.0"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pip install -U peft_spon"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layers_say_what_they_are():
    merged = merged_model()
    assert "criterion=weighted, sparsity=0.5" in repr(merged.model.layers[0].mlp.up_proj)
    assert isinstance(merged.model.layers[0].mlp.up_proj, SparseLinear)
