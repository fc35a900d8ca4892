# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Which layers become sparse by default, and names that match nothing."""

import pytest
import torch
import transformers as tf
from models import MODELS, SMALL, VOCAB, build, inputs
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_spon import SponConfig, calibrate
from peft_spon.sites import spon_layers
from peft_spon.targets import default_targets, read_not_called


TEXT = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**TOWER, "image_size": 16, "patch_size": 4}


def gemma3():
    vision = {**VISION, "model_type": "siglip_vision_model"}
    tokens = {"image_token_index": 96, "boi_token_index": 94, "eoi_token_index": 95}
    config = tf.Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return build(tf.Gemma3ForConditionalGeneration, config)


def llava():
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=vision, image_token_index=96)
    return build(tf.LlavaForConditionalGeneration, config)


def qwen2_audio():
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = tf.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={**audio, "model_type": "qwen2_audio_encoder"},
        audio_token_index=96,
    )
    return build(tf.Qwen2AudioForConditionalGeneration, config)


def git():
    """No part of its own for the text: the picture's encoder lies inside the language model."""
    config = tf.GitConfig(**SMALL, intermediate_size=64, vision_config=VISION, bos_token_id=1, eos_token_id=2)
    return build(tf.GitForCausalLM, config)


# The language model, and what else there is.
MULTIMODAL = {
    gemma3: ("model.language_model.", "model.vision_tower."),
    llava: ("model.language_model.", "model.vision_tower."),
    qwen2_audio: ("model.language_model.", "model.audio_tower."),
    git: ("git.encoder.", "git.image_encoder."),
}


def text(rows=4, tokens=16):
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", MULTIMODAL)
def test_of_a_multimodal_model_the_language_model_is_sparse(make):
    base = make()
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    language, tower = ({name for name in linears if part in name} for part in MULTIMODAL[make])
    model = get_peft_model(base, SponConfig())
    assert set(spon_layers(model)) == language
    assert tower
    calibrate(model, [text()], progress=False)


@pytest.mark.parametrize("make", MULTIMODAL)
def test_a_tower_that_is_named_is_sparse_and_loads(make, tmp_path):
    """As in adapters that were saved when towers were default targets: their targets are all there by name."""
    base = make()
    ends = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    config = SponConfig(target_modules=sorted(ends), init_weights=False)
    if make is gemma3:  # reads the weight of the last layer of its vision tower
        with pytest.raises(
            ValueError, match="exclude_modules=.'model.vision_tower.head.attention.out_proj'."
        ) as error:
            get_peft_model(base, config)
        config.exclude_modules = [str(error.value).split("'")[1]]
    model = get_peft_model(base, config).eval()
    assert any(MULTIMODAL[make][1] in f"{name}." for name in spon_layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert spon_layers(loaded).keys() == spon_layers(model).keys()
    assert torch.equal(loaded(input_ids=text()).logits, model(input_ids=text()).logits)


def two_towers():
    part = dict(TOWER)
    return tf.CLIPModel(tf.CLIPConfig(text_config=part, vision_config=VISION))


def speech():
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = tf.WhisperConfig(d_model=32, encoder_layers=2, decoder_layers=2, **sizes)
    return tf.WhisperForConditionalGeneration(config)


def picture_to_text():
    decoder = tf.BertConfig(**SMALL, intermediate_size=64, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    return tf.VisionEncoderDecoderModel(config)


@pytest.mark.parametrize("make", [two_towers, speech, picture_to_text, MODELS["t5"], MODELS["bert"]])
def test_other_models_are_sparse_in_all_their_blocks(make):
    base = make()
    inside = {
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    assert set(spon_layers(get_peft_model(base, SponConfig()))) == inside


# ---- layers that are never called --------------------------------------------------------------------------------


def mamba():
    return build(
        tf.MambaForCausalLM, tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
    )


def jamba():
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    layout = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3}
    return build(tf.JambaForCausalLM, tf.JambaConfig(**SMALL, **sizes, **layout, use_mamba_kernels=False))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.down(torch.relu(nn.functional.linear(x, self.up.weight, self.up.bias)))


class Blocks(nn.Module):
    """Reads `up.weight`, and torch's attention that of its `out_proj`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


# Older versions of transformers call Jamba's.
NEVER_CALLED = {mamba: ["dt_proj"], jamba: ["dt_proj"], Blocks: ["up", "out_proj"]}


@pytest.mark.parametrize("make", NEVER_CALLED)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_layers_that_are_never_called_are_no_default_targets(make, targets):
    model = get_peft_model(make(), SponConfig(target_modules=targets, criterion="topk"))
    layers = spon_layers(model)
    calls = set()
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: calls.add(name))
    with torch.no_grad():
        model(input_ids=text())
    assert calls == set(layers)
    skipped = {n for n, m in make().named_modules() if isinstance(m, nn.Linear)} - set(layers) - {"lm_head"}
    assert {name.rpartition(".")[2] for name in skipped} == set(NEVER_CALLED[make]) or (make is jamba and not skipped)
    calibrate(model, [text()], progress=False)


@pytest.mark.parametrize("make", [mamba, Blocks])
def test_naming_one_is_an_error_that_says_so(make):
    name = NEVER_CALLED[make][0]
    with pytest.raises(ValueError, match=rf"{name}.*which the model never calls.*exclude_modules=\['{name}'\]"):
        get_peft_model(make(), SponConfig(target_modules=[name]))
    with pytest.raises(ValueError, match="which the model never calls"):
        get_peft_model(make(), SponConfig(target_modules=rf".*\.{name}"))


def test_an_adapter_saved_with_one_loads(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("peft_spon.targets.never_called", lambda model, names: [])  # as in 0.2
        model = get_peft_model(mamba(), SponConfig(criterion="topk", init_weights=False)).eval()
    assert any("dt_proj" in name for name in spon_layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mamba(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=text()).logits, model(input_ids=text()).logits)


def test_without_source_calibration_names_the_layer():
    scope = {"nn": nn, "torch": torch}
    exec(  # a class whose source Python does not have
        "class Reads(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.used, self.read = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 8)\n"
        "    def forward(self, input_ids):\n"
        "        return self.used(self.embed(input_ids)) @ self.read.weight\n",
        scope,
    )
    assert read_not_called(scope["Reads"]) == frozenset()
    model = get_peft_model(scope["Reads"](), SponConfig(target_modules=["used", "read"], criterion="topk"))
    with pytest.raises(ValueError, match="layer 'read'. It was never called .*only its weight is read"):
        calibrate(model, [text()], progress=False)


# ---- names that match nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, r"\['vproj'\] of target_modules not found in the model; .*v_proj\."),
        ({"target_modules": ["vproj"]}, r"\['vproj'\] of target_modules not found in the model; .*v_proj\."),
        ({"exclude_modules": ["dwn_proj"]}, "exclude_modules has 'dwn_proj', which no module matches; .*down_proj"),
        ({"exclude_modules": ["down_proj", "x"]}, "exclude_modules has 'x'"),
        ({"exclude_modules": r".*vision.*"}, "exclude_modules has '.*vision.*', which no module matches"),
        ({"exclude_modules": ["mlp"]}, r"'mlp', which is no layer .*exclude_modules=r'.*model.layers.0.mlp"),
        ({"target_modules": "all-linear", "exclude_modules": ["x"]}, "exclude_modules has 'x'"),
        ({"target_modules": "all-linear", "sparsity_pattern": {"x": 0.1}}, "sparsity_pattern has 'x'"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform has 2, but no targeted layer is in a block of that"),
        ({"modules_to_save": ["lm_head", "hed"]}, "modules_to_save has 'hed', which no module of LlamaForCausalLM"),
    ],
)
def test_names_that_match_nothing(llama, setting, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama, SponConfig(**setting))
    assert not spon_layers(llama)
    model = get_peft_model(llama, SponConfig())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", SponConfig(**setting))


@pytest.mark.parametrize(
    "setting",
    [
        {"exclude_modules": ["lm_head"]},  # no target anyway
        {"exclude_modules": ["lm_head", "embed_tokens", "down_proj"], "target_modules": "all-linear"},
        {"exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": 1},
        {"modules_to_save": ["lm_head"]},
        {"task_type": "CAUSAL_LM"},
    ],
)
def test_names_that_match_something(llama, setting):
    assert spon_layers(get_peft_model(llama, SponConfig(**setting)))


def test_names_over_a_lora(llama):
    lora = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "up_proj"]))
    model = get_peft_model(lora, SponConfig(target_modules=["q_proj", "k_proj"], exclude_modules=["up_proj"]))
    assert {name.rpartition(".")[2] for name in spon_layers(model)} == {"q_proj", "k_proj"}


def test_what_was_saved_loads_where_a_name_matches_nothing(llama, tmp_path):
    """As adapters of 0.2 may: the name was without effect then, too."""
    model = get_peft_model(llama, SponConfig(target_modules=["q_proj"], init_weights=False)).eval()
    model.peft_config["default"].target_modules = {"q_proj", "vproj"}
    model.peft_config["default"].exclude_modules = {"x"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(loaded(**inputs("llama")).logits, model(**inputs("llama")).logits)


class HeadAmongTheBlocks(nn.Module):
    """As some models with a head for each of several tokens have it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 9)}) for name in ("proj", "head"))

    def get_output_embeddings(self):
        return self.layers[1].head


def test_embeddings_and_heads_are_no_default_targets(family):
    model = MODELS[family]()
    heads = {model.get_output_embeddings(), model.get_input_embeddings()}
    layers = spon_layers(get_peft_model(model, SponConfig()))
    assert layers
    assert not heads & {layer.base_layer for layer in layers.values()}


def test_a_head_among_the_blocks_is_no_default_target():
    assert default_targets(SponConfig(), HeadAmongTheBlocks()) == {"proj"}
