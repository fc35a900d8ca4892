# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Older files load; damaged, edited and mixed up files never load as something else in silence.

Hundreds of mutations of saved adapters and merged models: each gives an error, or the very same logits. Left to
transformers and PEFT are the keys by which they find us (`peft_type`, `quant_method`), the plain model's own settings,
and files that are no JSON at all, where their error does not name the file.
"""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import MODELS, by_formula, calibrated, edit_json, edit_tensors, logits
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_spon import SponConfig


FIXTURES = Path(__file__).parent / "fixtures"
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("adapter-*")), ids=lambda folder: folder.name)
def test_adapters_of_every_released_format_load(folder):
    expected = load_file(folder / "expected.safetensors")
    model = PeftModel.from_pretrained(by_formula(MODELS["llama"]()), folder).eval()
    with torch.no_grad():
        found = model(expected["input_ids"]).logits
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_spon_version"] in folder.name


def trained(seed):
    torch.manual_seed(seed)
    fields = {"sparsity": 0.4 + 0.1 * seed, "modules_to_save": ["lm_head"], "prefill": "sparse", "init_weights": False}
    fields["criterion"] = "weighted"  # has state of its own
    return calibrated(get_peft_model(MODELS["llama"](), SponConfig(**fields)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of two adapters and of two merged models, with the logits of the first of each."""
    folder = tmp_path_factory.mktemp("saved")
    wanted = {}
    for seed, name in enumerate("ab"):
        model = trained(seed)
        wanted[f"adapter-{name}"] = logits(model, "llama")
        model.save_pretrained(folder / f"adapter-{name}")
        merged = model.merge_and_unload()
        wanted[f"merged-{name}"] = logits(merged, "llama")
        merged.save_pretrained(folder / f"merged-{name}")
    return folder, wanted


def load(kind, folder):
    if kind == "adapter":
        return PeftModel.from_pretrained(MODELS["llama"](), folder).eval()
    return tf.AutoModelForCausalLM.from_pretrained(folder)


# ---- mutations: each changes a folder, or says that it has nothing to change -------------------------------------


def change_header(path, rng):
    """Truncate the file, or flip a bit of its header."""
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.3:
        data = data[: rng.choice([0, 4, header // 2, header, len(data) - 1, len(data) - rng.randrange(1, 500)])]
    else:
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_tensor(path, rng, own_only=False):
    """Remove, rename, reshape, retype, add, exchange or poison a tensor."""
    tensors = load_file(path)
    names = [name for name in tensors if "spon_" in name or not own_only]
    name = rng.choice(sorted(names))
    tensor = tensors[name]
    action = rng.choice(["remove", "rename", "reshape", "retype", "add", "nan", "inf", "exchange", "zero"])
    if action in ("remove", "rename", "exchange"):
        del tensors[name]
    if action == "rename":
        tensors[rng.choice([name + "x", name.replace("0", "7"), "x." + name, name.replace("spon_", "spam_")])] = tensor
    if action == "reshape":
        shapes = [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor.unsqueeze(0)]
        tensors[name] = rng.choice(shapes).contiguous()
    if action == "retype":
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.int32, torch.float64]))
    if action == "add":
        of_base = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.base_layer.weight"]
        added = rng.choice([name.replace("spon_anchor", "spon_another") + ".more", *of_base])
        tensors[f"base_model.model.{added}" if added in of_base else added] = tensor.clone()
    if action in ("nan", "inf", "zero"):
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}[
            action
        ]
        if action == "zero":
            tensors[name].zero_()
    if action == "exchange":
        other = rng.choice(sorted(key for key, value in tensors.items() if value.shape == tensor.shape) or [None])
        tensors[name] = tensor if other is None else tensors[other].clone()
        if other is not None:
            tensors[other] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


WRONG = [None, 0, 1, -1, 0.999, "", "x", [], {}, True, False, 1e9, "topk", "magnitude", "dense", "input", ["up_proj"]]
FOUND_BY = {"peft_type", "quant_method", "auto_mapping"}  # what PEFT and transformers find us by


def change_json(path, rng, inside=()):
    """Remove a field, or give it another value."""
    config = json.loads(path.read_text())
    part = config
    for key in inside:
        part = part[key]
    if "layers" in part and rng.random() < 0.6:
        part = part["layers"]
        if rng.random() < 0.8:
            part = part[rng.choice(sorted(part))]
    key = rng.choice(sorted(set(part) - FOUND_BY))
    action = rng.random()
    if action < 0.3:
        del part[key]
    elif action < 0.4:
        part[key + "x"] = part.pop(key)
    else:
        part[key] = copy.deepcopy(rng.choice(WRONG))
    path.write_text(json.dumps(config))


def swap(source, folder, name, rng):
    """A file of the other adapter or model."""
    shutil.copy(source.with_name(source.name.replace("-a", "-b")) / name, folder / name)


MUTATIONS = {
    "adapter": {
        "header": lambda folder, source, rng: change_header(folder / ADAPTER, rng),
        "tensor": lambda folder, source, rng: change_tensor(folder / ADAPTER, rng),
        "json": lambda folder, source, rng: change_json(folder / "adapter_config.json", rng),
        "swap": lambda folder, source, rng: swap(source, folder, rng.choice([ADAPTER, "adapter_config.json"]), rng),
    },
    "merged": {
        "header": lambda folder, source, rng: change_header(folder / MODEL, rng),
        "tensor": lambda folder, source, rng: change_tensor(folder / MODEL, rng),
        "own tensor": lambda folder, source, rng: change_tensor(folder / MODEL, rng, own_only=True),
        "json": lambda folder, source, rng: change_json(folder / "config.json", rng, ["quantization_config"]),
        "swap": lambda folder, source, rng: swap(source, folder, rng.choice([MODEL, "config.json"]), rng),
    },
}
COUNTS = {"header": 80, "tensor": 120, "own tensor": 80, "json": 120, "swap": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in MUTATIONS for what in MUTATIONS[kind]])
def test_mutated_files_give_an_error_or_the_same_logits(kind, what, saved, tmp_path):
    saved_folder, wanted = saved
    source = saved_folder / f"{kind}-a"
    outcomes = {"refused": 0, "same": 0}
    for seed in range(COUNTS[what]):
        folder = tmp_path / "mutated"
        shutil.copytree(source, folder)
        MUTATIONS[kind][what](folder, source, random.Random(f"{kind} {what} {seed}"))
        try:
            model = load(kind, folder)
        except (ValueError, OSError, RuntimeError, SafetensorError):  # not an AttributeError from deep inside
            outcomes["refused"] += 1
        else:
            outcomes["same"] += 1
            found = logits(model, "llama")
            difference = (found - wanted[f"{kind}-a"]).abs().max()
            assert difference == 0, f"mutation {what} {seed} loaded as something else"
        shutil.rmtree(folder)
    assert outcomes["refused"] > outcomes["same"] or what == "json", outcomes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:100]),
            "adapter_model.safetensors is damaged",
        ),
        (
            lambda f: edit_json(f / "adapter_config.json", criterion="topk"),
            "adapter_config.json is not as it was saved",
        ),
        (
            lambda f: drop(f / ADAPTER, "down_proj.spon_threshold"),
            "'spon_threshold' of layer 'model.layers.0.mlp.down",
        ),
        (
            lambda f: reshape(f / ADAPTER, "down_proj.spon_gain"),
            "'spon_gain' of layer 'model.layers.0.mlp.down_proj' has",
        ),
        (lambda f: swap(f.parent / "adapter-a", f, ADAPTER, None), "do not belong together"),
    ],
)
def test_errors_of_adapters_name_the_file_and_the_cause(change, message, saved, tmp_path):
    for name in "ab":
        shutil.copytree(saved[0] / f"adapter-{name}", tmp_path / f"adapter-{name}")
    folder = tmp_path / "adapter-a"
    change(folder)
    base = MODELS["llama"]()
    wanted = logits(base, "llama")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(base, "llama"), wanted), "the model is as it was"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "spon"}),
            "config.json: quantization",
        ),
        (lambda f: drop(f / MODEL, "down_proj.spon_shift"), "layer 'model.layers.0.mlp.down_proj': .*spon_shift"),
        (lambda f: drop(f / MODEL, "embed_tokens.weight"), "weight 'model.embed_tokens.weight'"),
        (lambda f: swap(f.parent / "merged-a", f, MODEL, None), "not those that were saved with this config"),
    ],
)
def test_errors_of_merged_models_name_the_file_and_the_cause(change, message, saved, tmp_path):
    for name in "ab":
        shutil.copytree(saved[0] / f"merged-{name}", tmp_path / f"merged-{name}")
    change(tmp_path / "merged-a")
    with pytest.raises(ValueError, match=message):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged-a")


def drop(path, ending):
    edit_tensors(path, lambda t: t.pop(min(name for name in t if name.endswith(ending))))


def reshape(path, ending):
    def change(tensors):
        name = min(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name][:-1]

    edit_tensors(path, change)


def test_a_setting_can_be_changed_through_the_config_object(saved):
    config = SponConfig.from_pretrained(saved[0] / "adapter-a")
    config.prefill = "dense"
    model = PeftModel.from_pretrained(MODELS["llama"](), saved[0] / "adapter-a", config=config).eval()
    assert torch.equal(logits(model, "llama"), logits(MODELS["llama"](), "llama"))


def test_an_adapter_saved_while_merged_is_the_same(saved, tmp_path):
    model = trained(0)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = load("adapter", tmp_path)
    assert torch.equal(logits(again, "llama"), saved[1]["adapter-a"])
