# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Every bit of a merged model's weights is checked when it is loaded, in any dtype and on any device."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import SMALL, SPECIAL, build, edit_json, edit_tensors, inputs, logits
from safetensors.torch import load_file
from test_merged_checkpoints import auto_class, merged_model

from peft_spon.checksums import is_same_weight, weight_hashes


MODEL = "model.safetensors"
OLD = Path(__file__).parent / "fixtures" / "merged-0.2.0"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(folder, **kwargs):
    return tf.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a merged model, and its logits."""
    folder = tmp_path_factory.mktemp("merged")
    merged = merged_model()
    merged.save_pretrained(folder / "float32")
    for dtype in DTYPES[1:]:
        load(folder / "float32", dtype=dtype).save_pretrained(folder / str(dtype).removeprefix("torch."))
    return folder, logits(merged, "llama")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved[0] / "float32", tmp_path / "float32"))


def flip(tensors, name, index, bit):
    tensors[name].reshape(-1).view(torch.int32)[index] ^= 1 << bit


@pytest.mark.parametrize(
    ("name", "index", "bit"),
    [
        ("model.layers.0.mlp.down_proj.weight", 5, 0),
        ("model.layers.1.self_attn.v_proj.weight", 77, 31),
        ("model.layers.1.input_layernorm.weight", 3, 22),
        ("model.embed_tokens.weight", -1, 1),
        ("lm_head.weight", 1001, 12),
        ("model.layers.0.mlp.up_proj.spon_shift", 2, 0),
    ],
)
def test_one_flipped_bit_is_refused(folder, name, index, bit):
    edit_tensors(folder / MODEL, lambda tensors: flip(tensors, name, index, bit))
    with pytest.raises(ValueError, match=name.replace(".spon_shift", "'.*spon_shift")):
        load(folder)


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_a_changed_range_of_any_parameter_is_refused(family, tmp_path):
    merged_model(family).save_pretrained(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / MODEL)
    for name in [name for name in whole if "spon_" not in name][::7]:
        shutil.copytree(tmp_path / "whole", tmp_path / "changed")
        edit_tensors(tmp_path / "changed" / MODEL, lambda tensors, name=name: tensors[name].view(-1)[3:9].sub_(1))
        with pytest.raises(ValueError, match="is not the one that was saved"):
            auto_class(family).from_pretrained(tmp_path / "changed")
        shutil.rmtree(tmp_path / "changed")


@pytest.mark.slow
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_checked_in_whatever_dtype_it_is_loaded(saved, stored, loaded, tmp_path):
    source = saved[0] / str(stored).removeprefix("torch.")
    model = load(source, dtype=loaded)
    assert model.dtype == loaded
    wanted = load_file(source / MODEL)["model.layers.1.mlp.up_proj.weight"].to(loaded)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, wanted)
    shutil.copytree(source, tmp_path / "damaged")
    edit_tensors(tmp_path / "damaged" / MODEL, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 4:6].mul_(1.5))
    with pytest.raises(ValueError, match="weight 'model.layers.1.mlp.up_proj.weight' is not the one that was saved"):
        load(tmp_path / "damaged", dtype=loaded)


def test_the_config_of_a_sibling_in_another_dtype_does_not_switch_the_check_off(saved, folder):
    shutil.copy(saved[0] / "bfloat16" / "config.json", folder)
    with pytest.raises(ValueError, match="not those that were saved|is not the one that was saved"):
        load(folder, dtype=torch.float32)
    edit_tensors(folder / MODEL, lambda tensors: tensors["model.layers.0.mlp.gate_proj.weight"][0, :9].zero_())
    for dtype in ("auto", *DTYPES):
        with pytest.raises(ValueError, match="not those that were saved|is not the one that was saved"):
            load(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"num_hidden_layers": 5}, r"weight 'model\.layers\.2\..*' is in the model but was not saved \(27 such\)"),
        ({"num_hidden_layers": 1}, "has no linear layer"),
        ({"attention_bias": True}, r"weight 'model\.layers\.0\.self_attn\.q_proj\.bias' is in the model but was not"),
    ],
    ids=str,
)
def test_settings_that_build_another_model_are_refused(folder, edits, message):
    edit_json(folder / "config.json", **edits)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_fewer_layers_are_refused_where_the_last_ones_are_dense(tmp_path):
    merged_model(layers_to_transform=[0]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"layers\.1\..*' was saved but is not in the model \(9 such\)"):
        load(tmp_path)


def test_tying_a_head_is_refused_or_not_done(saved, folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    if tf.__version__.startswith("4."):
        with pytest.raises(ValueError, match="weight 'lm_head.weight' is not the one that was saved"):
            load(folder)
    else:  # sees that they differ, and does not tie them
        assert torch.equal(logits(load(folder), "llama"), saved[1])


def test_untying_a_head_is_refused(tmp_path):
    config = tf.LlamaConfig(**SMALL, **SPECIAL, intermediate_size=64, tie_word_embeddings=True)
    merged_model(base=build(tf.LlamaForCausalLM, config)).save_pretrained(tmp_path)
    load(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"weight 'lm_head\.weight' is not the one that was saved"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["drop", "empty", "one", "wrong", "number", "class"])
def test_hashes_cannot_be_left_out(folder, change):
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(config):
        found = config["quantization_config"]
        if change == "drop":
            del found["hashes"]
        elif change == "empty":
            found["hashes"] = {}
        elif change == "one":
            del found["hashes"][name]
        elif change == "class":
            del found["model_class"]
        else:
            found["hashes"][name] = 7 if change == "number" else {"dtype": "load", "shape": [], "hashes": {}}

    edit_json(folder / "config.json", edit)
    with pytest.raises(ValueError, match="config.json: (quantization_config|weight)"):
        load(folder)


def test_another_class_may_have_a_new_head_but_no_new_blocks(folder):
    with torch.no_grad():
        body = tf.AutoModel.from_pretrained(folder)
        ids = inputs("llama")["input_ids"]
        classifier = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert torch.equal(classifier.model(ids)[0], body(ids)[0])
    edit_json(folder / "config.json", num_hidden_layers=3)
    for kind in (tf.AutoModel, tf.AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"layers\.2\..*' is in the model but was not saved"):
            kind.from_pretrained(folder)


MAPS = {
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
    "mostly disk": {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"},
}


@pytest.mark.slow
@pytest.mark.parametrize("device_map", sorted(MAPS))
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_offloaded_weights_are_checked(device_map, shards, tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path / "a", max_shard_size=shards)
    where = {**MAPS[device_map], "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    kwargs = {"device_map": where, "offload_folder": tmp_path / "offload"}
    again = load(tmp_path / "a", **kwargs)
    assert any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(logits(again, "llama"), logits(merged, "llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    path = next(path for path in (tmp_path / "a").glob("*.safetensors") if name in load_file(path))
    edit_tensors(path, lambda tensors: tensors[name][5, 6:36].zero_())
    with pytest.raises(ValueError, match=name):
        load(tmp_path / "a", **kwargs)


def test_an_offloaded_model_is_saved_with_its_hashes(tmp_path):
    merged = merged_model()
    merged.save_pretrained(tmp_path / "a")
    where = {**MAPS["disk"], "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    load(tmp_path / "a", device_map=where, offload_folder=tmp_path / "offload").save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b"), "llama"), logits(merged, "llama"))
    edit_tensors(tmp_path / "b" / MODEL, lambda t: flip(t, "model.layers.1.mlp.down_proj.weight", 9, 3))
    with pytest.raises(ValueError, match="is not the one that was saved"):
        load(tmp_path / "b")


def test_a_model_of_an_older_version_loads_and_is_checked_as_it_was(tmp_path):
    expected = load_file(OLD / "expected.safetensors")
    with torch.no_grad():
        found = load(OLD)(expected["input_ids"]).logits
        torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
        assert load(OLD, dtype=torch.bfloat16)(expected["input_ids"]).logits.isfinite().all()
    shutil.copytree(OLD, tmp_path / "old")
    edit_tensors(tmp_path / "old" / MODEL, lambda tensors: tensors["lm_head.weight"].zero_())
    with pytest.raises(ValueError, match="weight 'lm_head.weight' is not the one that was saved"):
        load(tmp_path / "old")
    load(OLD).save_pretrained(tmp_path / "again")
    edit_tensors(tmp_path / "again" / MODEL, lambda tensors: tensors["lm_head.weight"][1, 2:4].zero_())
    with pytest.raises(ValueError, match="weight 'lm_head.weight' is not the one that was saved"):
        load(tmp_path / "again")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_named_with_the_remedy(folder, size):
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[:size])
    if tf.__version__.startswith("4."):
        pytest.skip("transformers 4 opens the file before it asks us")
    with pytest.raises(ValueError, match=f"{folder / MODEL} is damaged or incomplete .*save or download the model"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.float64, *DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("loaded", [torch.float64, *DTYPES, torch.int32], ids=str)
def test_hashes_hold_across_dtypes(stored, loaded):
    if stored.is_floating_point != loaded.is_floating_point:
        return
    torch.manual_seed(0)
    values = torch.randn(3, 5).mul(9).to(stored)
    saved = weight_hashes(values)
    assert is_same_weight(values.to(loaded), saved)
    assert is_same_weight(values.T.contiguous().T.to(loaded), saved)
    other = values.to(loaded)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[other.element_size()]
    other.view(bits)[1, 2] ^= 1
    assert not is_same_weight(other, saved)
    values[0, 0] = torch.nan if stored.is_floating_point else 0
    assert is_same_weight(values, weight_hashes(values))
