# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of SPON with LoRA beneath: what belongs together loads, all else is refused and leaves the base as it was."""

import copy
import json
import random
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from lora_models import lora_config, lora_then_spon, spon_config, spon_then_lora
from models import MODELS, calibrated, edit_json, edit_tensors, logits
from peft import ArrowConfig, IA3Config, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from safetensors.torch import load_file
from test_killed_saving import kill_everywhere
from test_lora import close

import peft_spon
from peft_spon import SponConfig, add_lora, dense_mode, load_with_lora, save_lora, set_trainable, without_lora


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def train(model, seed):
    """Move the LoRA and the anchors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "spon_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def everything(base):
    """All that a failed call must leave alone."""
    return (
        [(name, type(module).__name__, module.training) for name, module in base.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in base.named_parameters()],
        {name: value.clone() for name, value in base.state_dict().items()},
        sorted(vars(base)),
        base.config.to_dict(),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()],
    )


def refuses(folder, message, *args, **kwargs):
    """`load_with_lora` raises `ValueError`, and the base is as it was."""
    base = MODELS["llama"]().train()
    base.config.pretraining_tp = 2  # which PEFT sets to 1
    base.lm_head.weight.requires_grad_(False)
    before = everything(base)
    with pytest.raises(ValueError, match=message):
        load_with_lora(base, folder, *args, **kwargs)
    after = everything(base)
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert [*before[:2], *before[3:]] == [*after[:2], *after[3:]]


# ---- what belongs together ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}], ids=["lora", "dora, head"]
)
def test_a_mixture_of_two_savings_is_refused(route, fields, tmp_path):
    model = route(lora=lora_config(**fields))
    model.save_pretrained(tmp_path / "old")
    train(model, 1).save_pretrained(tmp_path / "new")
    wanted = logits(model, "llama")
    shutil.copytree(tmp_path / "old", tmp_path / "mixed")
    shutil.copy(tmp_path / "new/task" / WEIGHTS, tmp_path / "mixed/task")
    refuses(tmp_path / "mixed", rf"mixed/task/{WEIGHTS} is not what the SPON adapter .*mixed was saved with")
    refuses(tmp_path / "old", rf"new/task/{WEIGHTS} is not what the SPON adapter .*old was", tmp_path / "new/task")
    for lora in (None, tmp_path / "new/task"):
        again = load_with_lora(MODELS["llama"](), tmp_path / "new", lora).eval()
        assert torch.equal(logits(again, "llama"), wanted)


def test_a_lora_stays_plain_and_each_loads_alone(route, tmp_path):
    model = route()
    model.save_pretrained(tmp_path / "both")
    with dense_mode(model):
        dense = logits(model, "llama")
    with without_lora(model):
        sparse = logits(model, "llama")
    assert torch.equal(
        logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "both/task").eval(), "llama"), dense
    )
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "both").eval(), "llama"), sparse)
    plain = get_peft_model(MODELS["llama"](), lora_config())
    plain.save_pretrained(tmp_path / "plain")
    read = [json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("both/task", "plain")]
    assert read[0].keys() == read[1].keys()
    assert read[0]["peft_type"] == "LORA"
    files = [load_file(tmp_path / folder / WEIGHTS) for folder in ("both/task", "plain")]
    assert files[0].keys() == files[1].keys()


def flip(path, rng):
    """One bit of the tensors."""
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    data[rng.randrange(header, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "a bit": lambda f: flip(f / WEIGHTS, random.Random(0)),
    "another bit": lambda f: flip(f / WEIGHTS, random.Random(1)),
    "truncated": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]),
    "empty": lambda f: (f / WEIGHTS).write_bytes(b""),
    "missing": lambda f: (f / WEIGHTS).unlink(),
    "tensor gone": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(min(t))),
    "tensor renamed": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({min(t) + "x": t.pop(min(t))})),
    "nan": lambda f: edit_tensors(f / WEIGHTS, lambda t: t[min(t)].view(-1)[:1].fill_(torch.nan)),
    "half precision": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({k: v.half() for k, v in t.items()})),
    "no json": lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:-9]),
    "no text": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: (f / CONFIG).write_text("[]"),
    "alpha": lambda f: edit_json(f / CONFIG, lora_alpha=9),
    "rslora": lambda f: edit_json(f / CONFIG, use_rslora=True),
    "targets": lambda f: edit_json(f / CONFIG, target_modules=["q_proj"]),
    "pattern": lambda f: edit_json(f / CONFIG, alpha_pattern={"q_proj": 3}),
    "another method": lambda f: edit_json(f / CONFIG, peft_type="ADALORA"),
    "replicated": lambda f: edit_json(f / CONFIG, layer_replication=[[0, 2], [1, 2]]),
    "spon's": lambda f: shutil.copy(f.parent / CONFIG, f / CONFIG),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lora_is_refused(damage, tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path / "task")
    refuses(tmp_path, "task|LoRA")
    refuses(tmp_path, "task|LoRA", tmp_path / "task")


SPON_DAMAGES = {
    "truncated": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:200]),
    "tensor gone": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(min(t))),
    "of another model": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({min(t): t[min(t)][:3].contiguous()})),
    "another method": lambda f: edit_json(f / CONFIG, peft_type="LORA"),
    "and another": lambda f: edit_json(f / CONFIG, peft_type="IA3"),
    "loras": lambda f: edit_json(f / CONFIG, checksums={"loras": {"task": "x"}}),
    "a lora": lambda f: [shutil.copy(f / "task" / name, f / name) for name in (CONFIG, WEIGHTS)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"init_lora_weights": "pissa"},
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ({}, {"init_lora_weights": "olora"})),
    ],
    ids=str,
)
@pytest.mark.parametrize("damage", SPON_DAMAGES)
def test_a_damaged_spon_adapter_leaves_the_base_as_it_was(damage, kind, tmp_path):
    spon_then_lora(lora=lora_config(**kind)).save_pretrained(tmp_path)
    SPON_DAMAGES[damage](tmp_path)
    refuses(tmp_path, ".")
    refuses(tmp_path, ".", tmp_path / "task", trainable="both")


def test_the_type_that_never_leaves_a_process_is_refused(tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "task"):
        edit_json(folder / CONFIG, peft_type="SPON_LORA")
        with pytest.raises(ValueError, match="peft_type='SPON_LORA', which no file has"):
            PeftModel.from_pretrained(MODELS["llama"](), folder)


def test_two_loras_or_two_spon_adapters_are_no_spon_with_lora(tmp_path):
    model = spon_then_lora()
    model.save_pretrained(tmp_path)
    lora = tmp_path / "task"
    refuses(lora, r"task is given as the SPON adapter, but its adapter_config.json has peft_type='LORA'", lora)
    refuses(lora, "is given as the SPON adapter", tmp_path)
    refuses(tmp_path, "What is given as the LoRA 'task' is a SPON adapter", tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "x.bias"])
def test_tensors_that_would_overwrite_the_base_are_refused(name, tmp_path):
    spon_then_lora().save_pretrained(tmp_path)
    path, key = tmp_path / "task" / WEIGHTS, f"base_model.model.{name}"
    edit_tensors(path, lambda t: t.update({key: torch.zeros(32)}))
    refuses(tmp_path, f"'{key}', which is not of the LoRA and would overwrite the base's")


@pytest.mark.parametrize("save", ["auto", True, False])
def test_embeddings_that_are_saved_along_load(save, tmp_path):
    model = spon_then_lora(lora=lora_config(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    again = load_with_lora(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_adapters_that_name_no_lora_yet_load(route, tmp_path):
    """As peft_spon 0.1 and 0.2 have written them."""
    model = route()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())["checksums"]
    assert written.pop("loras").keys() == {"task"}
    edit_json(tmp_path / CONFIG, checksums=written)
    again = load_with_lora(MODELS["llama"](), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_an_adapter_without_a_lora_takes_one_that_is_given(tmp_path):
    torch.manual_seed(3)
    spon = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    spon.save_pretrained(tmp_path / "spon")
    add_lora(spon, lora_config())
    save_lora(spon, tmp_path / "spon/task")
    again = load_with_lora(MODELS["llama"](), tmp_path / "spon", tmp_path / "spon/task").eval()
    assert torch.equal(logits(again, "llama"), logits(spon, "llama"))
    # The same files are what an interrupted saving leaves, so they need to be named.
    refuses(
        tmp_path / "spon",
        r"spon/task is not what .* \(no LoRA\).*interrupted.*that belongs to it as lora",
    )


def test_several_loras_each_with_its_name(tmp_path):
    model = add_lora(spon_then_lora(), lora_config(target_modules=["q_proj"]), "other")
    model.save_pretrained(tmp_path)
    save_lora(model, tmp_path / "elsewhere", "other")
    again = load_with_lora(MODELS["llama"](), tmp_path, tmp_path / "elsewhere", "mine").eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    (tmp_path / "task").rename(tmp_path / "aside")
    (tmp_path / "other").rename(tmp_path / "task")
    refuses(tmp_path, "task/adapter_model.safetensors is not what the SPON adapter")
    (tmp_path / "task").rename(tmp_path / "third")
    refuses(tmp_path, r"third is not what .* was saved with \(the LoRAs \['other', 'task'\]\)", adapter_name="third")


def test_the_remedy_combines_what_does_not_belong_together(tmp_path):
    model = spon_then_lora()
    model.save_pretrained(tmp_path / "spon")
    torch.manual_seed(7)
    get_peft_model(MODELS["llama"](), lora_config(r=2)).save_pretrained(tmp_path / "lora")
    refuses(tmp_path / "spon", "on purpose: .*load_adapter", tmp_path / "lora")
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "spon")
    add_lora(again, LoraConfig.from_pretrained(tmp_path / "lora"), "name")
    again.load_adapter(tmp_path / "lora", "name")
    with dense_mode(again.eval()):
        plain = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "lora").eval()
        assert torch.equal(logits(again, "llama"), logits(plain, "llama"))
    with without_lora(again), without_lora(model):
        assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_a_state_dict_of_the_callers_own(tmp_path):
    """As Trainer gives one: the same values are named; of others, only the caller knows what they are."""
    model = spon_then_lora()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "same", state_dict=state)
    assert json.loads((tmp_path / "same" / CONFIG).read_text())["checksums"]["loras"].keys() == {"task"}
    other = {name: value * 0.5 if "lora_B" in name or "anchor" in name else value for name, value in state.items()}
    model.save_pretrained(tmp_path / "other", state_dict=other)
    model.load_state_dict(other)
    again = load_with_lora(MODELS["llama"](), tmp_path / "other").eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("name", ["default", "anchors"])
def test_a_checkpoint_whose_lora_is_damaged_is_not_resumed(name, tmp_path):
    torch.manual_seed(3)
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config(), name))
    add_lora(model, lora_config())
    folder = tmp_path / "checkpoint-4"
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    saved = logits(model, "llama")
    model = train(
        add_lora(calibrated(get_peft_model(MODELS["llama"](), spon_config(), name)), lora_config()), 1
    ).eval()
    spon = folder if name == "default" else folder / name
    shutil.copytree(folder, tmp_path / "damaged-4")
    flip(tmp_path / "damaged-4/task" / WEIGHTS, random.Random(0))
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=f"damaged-4/task/{WEIGHTS} is not what"):
        model.load_adapter(tmp_path / "damaged-4" / spon.relative_to(folder), name)
    assert torch.equal(logits(model, "llama"), before)
    model.load_adapter(spon, name)
    model.load_adapter(folder / "task", "task")
    assert torch.equal(logits(model.eval(), "llama"), saved)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["another LoRA", "no LoRA"])
def test_killed_while_saving_both(before, tmp_path):
    torch.manual_seed(3)
    alone = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    old = alone if before == "no LoRA" else spon_then_lora()
    new = train(lora_then_spon(), 1).eval()

    def load(folder):
        if before == "no LoRA" and not (folder / "task" / CONFIG).exists():
            return PeftModel.from_pretrained(MODELS["llama"](), folder).eval()
        return load_with_lora(MODELS["llama"](), folder).eval()

    allowed = {"new": logits(new, "llama"), "old": logits(old, "llama")}
    old.save_pretrained(tmp_path / "old")
    save_old = partial(shutil.copytree, tmp_path / "old")
    assert len(kill_everywhere(tmp_path, load, save_old, new.save_pretrained, allowed)) > 8


# ---- add_lora ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {}], ids=str)
def test_a_lora_that_moves_weights_and_fails_is_undone(kind):
    torch.manual_seed(3)
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config()))
    wanted = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not supported"):
        add_lora(model, lora_config(target_modules=["q_proj", "input_layernorm"], **kind))
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["pissa", "gaussian", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("olora", "mica"))]
)
def test_initialisations(route, kind, tmp_path):
    """Those that move a part of W into the LoRA, too: dense it is PEFT's LoRA; saved, loaded, merged it is exact."""
    torch.manual_seed(3)
    control = get_peft_model(MODELS["llama"](), lora_config(init_lora_weights=kind)).eval()
    control.save_pretrained(tmp_path / "control")
    model = route(lora=LoraConfig.from_pretrained(tmp_path / "control"))
    model.load_adapter(tmp_path / "control", "task")
    with dense_mode(model.eval()):
        assert torch.equal(logits(model, "llama"), logits(control, "llama"))
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(load_with_lora(MODELS["llama"](), tmp_path / "both").eval(), "llama"), wanted)
    close(logits(model.merge_and_unload(), "llama"), wanted)


@pytest.mark.parametrize("targets", [["k_proj.weight"], ["mlp.up_proj.weight", "mlp.down_proj.weight"]])
def test_target_parameters(route, targets, tmp_path):
    model = route(lora=lora_config(target_modules=["q_proj"], target_parameters=targets))
    wanted = logits(model, "llama")
    with without_lora(model):
        assert not torch.equal(logits(model, "llama"), wanted)
    model.save_pretrained(tmp_path)
    with dense_mode(model):
        control = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "task").eval()
        close(logits(model, "llama"), logits(control, "llama"))
    assert torch.equal(logits(load_with_lora(MODELS["llama"](), tmp_path).eval(), "llama"), wanted)
    close(logits(model.merge_and_unload(), "llama"), wanted)


def test_lora_bias(route, tmp_path):
    """Merged where the base has biases, refused where it has none; PEFT stops there with half of it merged."""
    for family in ("opt", "llama"):
        model = route(family, lora=lora_config(lora_bias=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and "bias" in name:
                    parameter.normal_()
        wanted = logits(model, family)
        model.save_pretrained(tmp_path / family)
        again = load_with_lora(MODELS[family](), tmp_path / family).eval()
        assert torch.equal(logits(again, family), wanted)
        if family == "llama":
            for merge in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(ValueError, match="'task' has lora_bias=True, and the base has layers without"):
                    merge()
                assert torch.equal(logits(model, family), wanted)
            return
        model.merge_adapter()
        close(logits(model, family), wanted)
        model.unmerge_adapter()
        close(logits(model.merge_and_unload(), family), wanted)


def test_arrow(tmp_path):
    """SPON over PEFT's router between LoRAs; a router alone has nothing to route."""
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        get_peft_model(MODELS["llama"](), lora_config(target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    control = create_arrow_model(
        MODELS["llama"](), [str(tmp_path / "a"), str(tmp_path / "b")], ArrowConfig(top_k=1)
    ).eval()
    wanted = logits(control, "llama")
    model = calibrated(get_peft_model(control, spon_config()))
    with dense_mode(model):
        assert torch.equal(logits(model, "llama"), wanted)
    model.save_pretrained(tmp_path / "both")
    sparse = logits(model, "llama")
    control = create_arrow_model(MODELS["llama"](), [str(tmp_path / "a"), str(tmp_path / "b")], ArrowConfig(top_k=1))
    again = PeftModel.from_pretrained(control, tmp_path / "both").eval()
    assert torch.equal(logits(again, "llama"), sparse)
    with pytest.raises(ValueError, match="create_arrow_model"):
        load_with_lora(MODELS["llama"](), tmp_path / "both", adapter_name="arrow_router")
    with pytest.raises(ValueError, match="create_arrow_model"):
        add_lora(model, lora_config(arrow_config=ArrowConfig()), "router")


@pytest.mark.parametrize("first", ["lora", "spon"])
def test_layer_replication_is_refused(first):
    lora = lora_config(layer_replication=[[0, 2], [0, 2]])
    model = get_peft_model(MODELS["llama"](), spon_config() if first == "spon" else lora)
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"layer_replication=\[\[0, 2\], \[0, 2\]\].*Save a base model"):
        add_lora(model, lora) if first == "spon" else get_peft_model(model, spon_config())
    assert torch.equal(logits(model, "llama"), before)


# ---- save_lora ---------------------------------------------------------------------------------------------------


class Uploads:
    """What `HfApi` is asked for."""

    def __init__(self):
        self.created, self.files = [], {}

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **kwargs):
        self.created.append((repo_id, kwargs))

    def upload_folder(self, repo_id, folder_path):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in paths}


OWN = {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize("name", ["task", "default"])
def test_only_the_loras_own_files_are_written_and_uploaded(name, tmp_path, monkeypatch):
    torch.manual_seed(3)
    model = calibrated(get_peft_model(MODELS["llama"](), spon_config(), "anchors"))
    add_lora(add_lora(model, lora_config(), name), lora_config(), "other")
    strangers = {".env": b"TOKEN=x", "training_args.bin": b"y", "checkpoint-4/optimizer.pt": b"z"}
    for path, content in strangers.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    hub = Uploads()
    monkeypatch.setattr(peft_spon.lora.saving, "HfApi", hub)
    save_lora(model, tmp_path, name, repo_id="me/lora", private=True)
    assert hub.created == [("me/lora", {"exist_ok": True, "private": True})]
    assert hub.files.keys() == OWN
    assert '"me/lora"' in hub.files["README.md"].decode()
    assert {path.name for path in tmp_path.iterdir()} == OWN | {".env", "training_args.bin", "checkpoint-4"}
    assert all((tmp_path / path).read_bytes() == content for path, content in strangers.items())
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / file).read_bytes() == hub.files[file]
    model.set_adapter(name)
    with dense_mode(model):
        lora = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
        assert torch.equal(logits(lora, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("what", ["spon", "merged", "ia3", "damaged"])
def test_a_lora_overwrites_nothing_else(what, tmp_path, monkeypatch):
    model = spon_then_lora()
    if what == "merged":
        copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
    elif what == "damaged":
        (tmp_path / CONFIG).write_text('{"peft_type": "SP')
    else:
        (model if what == "spon" else get_peft_model(MODELS["llama"](), IA3Config())).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    hub = Uploads()
    monkeypatch.setattr(peft_spon.lora.saving, "HfApi", hub)
    with pytest.raises(ValueError, match="save the LoRA into a folder of its own"):
        save_lora(model, tmp_path, repo_id="me/lora")
    # The same, on the Hub.
    monkeypatch.setattr(peft_spon.lora.saving, "_from_hub", lambda repo_id, token, name: here(tmp_path / name))
    with pytest.raises(ValueError, match="me/lora holds .*save the LoRA into a folder of its own"):
        save_lora(model, tmp_path / "own", repo_id="me/lora")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not hub.created
    assert not (tmp_path / "own").exists()


def here(path):
    return path if path.exists() else None


def test_cards_that_somebody_has_written_stay(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/README.md").write_text("---\nlicense: mit\n---\nOn the Hub\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nOf the folder\n")
    hub = Uploads()
    monkeypatch.setattr(peft_spon.lora.saving, "HfApi", hub)
    monkeypatch.setattr(peft_spon.lora.saving, "_from_hub", lambda repo_id, token, name: here(tmp_path / "hub" / name))
    save_lora(spon_then_lora(), tmp_path, repo_id="me/lora")
    assert "On the Hub" in hub.files["README.md"].decode()
    assert "Of the folder" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_killed_while_saving_a_lora(tmp_path):
    old, new = spon_then_lora(), spon_then_lora(lora=lora_config(r=2, lora_alpha=5))
    allowed = {}
    for name, model in {"new": new, "old": old}.items():
        with dense_mode(model):
            allowed[name] = logits(model, "llama")

    def load(folder):
        return PeftModel.from_pretrained(MODELS["llama"](), folder).eval()

    save_lora(old, tmp_path / "old")
    save_old = partial(shutil.copytree, tmp_path / "old")
    outcomes = kill_everywhere(tmp_path, load, save_old, partial(save_lora, new), allowed)
    assert len(outcomes) > 8


# ---- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: add_lora(lora_config(), m), r"add_lora\(model, config\): model must be .*SPON, not LoraConfig"),
        (lambda m: add_lora(m, "task", lora_config()), "config must be a LoraConfig, not str 'task'"),
        (lambda m: add_lora(m, lora_config(), lora_config()), "adapter_name must be a name, not LoraConfig"),
        (lambda m: load_with_lora("out", m), r"load_with_lora\(model, spon, lora\): model must be .*, not str 'out'"),
        (lambda m: load_with_lora("out", "task", m), "model must be the base model, not str 'out'"),
        (
            lambda m: load_with_lora(m, SponConfig()),
            "spon must be folder or Hub id of the SPON adapter, not Spon",
        ),
        (lambda m: load_with_lora(m, "out", lora_config()), "lora must be folder or Hub id of the LoRA, not LoraConf"),
        (lambda m: load_with_lora(m, "out", "lora", 3), "adapter_name must be the LoRA's name, not int 3"),
        (lambda m: save_lora("out", m), r"save_lora\(model, save_directory\): model must be .*, not str 'out'"),
        (lambda m: save_lora(m, lora_config()), "save_directory must be a folder, not LoraConfig"),
        (lambda m: set_trainable("lora", m), r"set_trainable\(model, what\): model must be .*, not str 'lora'"),
        (lambda m: without_lora("task").__enter__(), r"without_lora\(model\): model must be .*, not str 'task'"),
    ],
)
def test_arguments_in_another_order(call, message):
    with pytest.raises(TypeError, match=message):
        call(get_peft_model(MODELS["llama"](), spon_config()))
