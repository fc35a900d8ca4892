# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards: results when they are known, and as long as they hold; snippets that run; the paper."""

import re

import pytest
import torch
from models import MODELS, VOCAB, calibrated, logits
from peft import LoraConfig, PeftModel, get_peft_model

from peft_spon import SponConfig, add_lora, calibrate, evaluate
from peft_spon.cards import MARK
from peft_spon.sites import sites, spon_layers


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (4, 16), generator=generator)]


def adapter(**fields):
    return calibrated(
        get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, task_type="CAUSAL_LM", **fields))
    )


def card(model, folder):
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def check_results(text, result):
    """The card shows these results, once."""
    assert text.count("## Results") == 1
    row = next(line for line in text.splitlines() if line.startswith("| repaired"))
    assert f"| {result.anchored.kl:.4f} | {result.anchored.top1_agreement:.1%} |" in row
    assert f"on {result.tokens:,} tokens" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_results_are_in_the_card_once_they_are_known(kind, tmp_path):
    model = adapter()
    if kind == "merged":
        model = model.merge_and_unload()
    assert "## Results" not in card(model, tmp_path)
    for rows in (2, 4):
        result = evaluate(model, [batches()[0][:rows]])
        text = card(model, tmp_path)
        check_results(text, result)
        assert "2512.12744" in text
        assert "```bibtex\n@article{xu2025spon," in text
        assert text.rstrip().endswith(MARK)


def change(model, how):
    layer = next(iter(spon_layers(model).values()))
    if how == "anchor":
        layer.spon_anchor["default"].data[0] += 1
    elif how == "gain":
        layer.spon_gain["default"].data[0] += 1
    elif how == "threshold":
        calibrate(model, batches(), progress=False)
    elif how == "sparsity":
        model.set_sparsity(0.7)
    elif how == "lora":
        next(p for name, p in model.named_parameters() if "lora_B" in name).data += 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["anchor", "gain", "threshold", "sparsity", "lora"])
@pytest.mark.parametrize("criterion", ["weighted", "topk"])
def test_results_of_another_model_are_not_in_the_card(criterion, how, tmp_path):
    if criterion == "topk" and how == "threshold":
        criterion = "magnitude"
    model = adapter(criterion=criterion)
    if how == "lora":
        model = add_lora(model, LoraConfig(target_modules=["q_proj"]))
    evaluate(model, batches())
    assert "## Results" in card(model, tmp_path)
    change(model, how)
    assert "## Results" not in card(model, tmp_path)


def test_each_adapter_has_its_own_results(tmp_path):
    model = adapter()
    first = evaluate(model, batches())
    model.add_adapter("other", SponConfig(sparsity=0.7, criterion="topk", init_weights=False))
    model.save_pretrained(tmp_path)
    check_results((tmp_path / "README.md").read_text(), first)
    assert "## Results" not in (tmp_path / "other" / "README.md").read_text()
    model.set_adapter("other")
    second = evaluate(model, batches())
    model.save_pretrained(tmp_path)
    check_results((tmp_path / "README.md").read_text(), first)
    check_results((tmp_path / "other" / "README.md").read_text(), second)


def test_results_go_along_to_the_hub(tmp_path, monkeypatch):
    """What `push_to_hub` does after saving: the card is written once more, with the name there."""
    for kind, model in (("adapter", adapter()), ("merged", adapter().merge_and_unload())):
        result = evaluate(model, batches())
        folder = tmp_path / kind
        assert f'"{kind}"' in card(model, folder)
        uploaded = []
        monkeypatch.setattr(type(model), "_upload_modified_files", lambda *args, to=uploaded: to.append(args[2]))
        model._upload_modified_files(folder, "me/name")
        text = (folder / "README.md").read_text()
        assert '"me/name"' in text
        assert uploaded == ["me/name"]
        check_results(text, result)


def test_a_page_beside_a_card_is_linked_from_it(tmp_path):
    model = adapter()
    result = evaluate(model, batches())
    card(model, tmp_path / "a")
    for _ in range(2):
        result.to_html(tmp_path / "a" / "report of it.html")
        text = (tmp_path / "a" / "README.md").read_text()
        check_results(text, result)
        assert text.count("[the whole report](report%20of%20it.html)") == 1
        assert text.index("## Results") < text.index("## Citation")
    assert "whole report" not in card(model, tmp_path / "a"), "the model may be another by then"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# My own words\n")
    result.to_html(tmp_path / "own" / "report.html")
    assert (tmp_path / "own" / "README.md").read_text() == "# My own words\n"
    result.to_html(tmp_path / "none" / "report.html")
    assert not (tmp_path / "none" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_all_snippets_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MODELS["llama"]().save_pretrained("base")
    base = type(MODELS["llama"]()).from_pretrained("base")
    model = calibrated(get_peft_model(base, SponConfig(init_weights=False, task_type="CAUSAL_LM")))
    wanted = logits(model, "llama")
    if kind == "merged":
        model = model.merge_and_unload()
    text = card(model, tmp_path / kind)
    scope = {}
    blocks = re.findall(r"```(?:python|py)\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, scope)
    assert any(site.is_prepared for site in sites(scope["model"]).values()) or kind == "adapter"
    assert torch.allclose(logits(scope["model"].eval(), "llama"), wanted, atol=1e-5)
    if kind == "adapter":
        again = type(base).from_pretrained("merged").eval()
        assert torch.allclose(logits(again, "llama"), wanted, atol=1e-5)


def test_a_loaded_adapter_has_no_results_until_it_is_measured(tmp_path):
    model = adapter()
    evaluate(model, batches())
    card(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "a")
    assert "## Results" not in card(loaded, tmp_path / "b")
