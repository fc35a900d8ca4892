# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The report: what is measured for it against the definitions, and the page as a browser reads it."""

import base64
import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from models import GENERATE, MODELS, VOCAB, calibrated, compiled, word_tokenizer
from peft import get_peft_model

from peft_spon import SponConfig, dense_mode, evaluate, every_token_sparse, prepare_for_decode, without_anchors
from peft_spon.evaluation import measure_report, measurements, write_report
from peft_spon.evaluation.measurements import equal_rows
from peft_spon.evaluation.report import page, places
from peft_spon.sites import sites, spon_layers


ROWS, TOKENS = 8, 24
HOSTILE = '</title><script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>\x00&amp;'


@pytest.fixture(autouse=True, scope="module")
def _short():
    """Few tokens where text is generated."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"SAMPLE_TOKENS": 12, "SPEED_TOKENS": 4, "SPEED_ROUNDS": 1}.items():
            patched.setattr(measurements, name, value)
        yield


def batches(rows=ROWS):
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(3, VOCAB, (rows, TOKENS), generator=generator).split(4))


def adapter(family="llama", **fields):
    fields = {"sparsity": 0.6, "init_weights": False, **fields}
    return calibrated(get_peft_model(MODELS[family](), SponConfig(**fields)))


def measured(model, **kwargs):
    kwargs = {"samples": 0, "speed": False, "progress": False, **kwargs}
    return measure_report(model, kwargs.pop("data", batches()), kwargs.pop("tokenizer", None), **kwargs)


@pytest.fixture(scope="module")
def full(_short):
    """A report with all of its parts, and what it was measured on."""
    model = adapter()
    log = [{"step": i, "kl": 1 / i, "eval_kl": 2 / i, "loss": 1 / i, "grad_norm": 3.0} for i in range(1, 9)]
    report = measured(
        model, tokenizer=word_tokenizer(), samples=2, speed=True, training=log, command="peft-spon report"
    )
    return model, report


# ---- values ------------------------------------------------------------------------------------------------------


def inputs_of(model, ids):
    """Every layer's input, in the sparse model with anchors."""
    seen, handles = {}, []
    for name, layer in sites(model).items():
        handles.append(
            layer.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        )
    with torch.no_grad(), every_token_sparse(model):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def weighted(values, model):
    """The mean over layers by their weights."""
    sizes = {name: layer.base_layer.weight.numel() for name, layer in spon_layers(model).items()}
    return sum(values[name] * sizes[name] for name in sizes) / sum(sizes.values())


def test_union_and_active_shares_are_counted_token_by_token():
    model = adapter(criterion="magnitude")
    report, ids = measured(model), equal_rows([{"input_ids": batch} for batch in batches()])
    kept = {name: spon_layers(model)[name].sparsify(x, "default") != 0 for name, x in inputs_of(model, ids).items()}

    def unread(mask, groups):
        """Share of the entries that nobody in a group of tokens, (row, position) each, keeps."""
        empty = [~torch.stack([mask[row, position] for row, position in group]).any(0) for group in groups]
        return torch.stack(empty).float().mean().item()

    for i, n in enumerate((1, 2, 4, 8)):
        windows = [
            [(row, first + k) for k in range(n)] for row in range(ROWS) for first in range(0, TOKENS - n + 1, n)
        ]
        together = [[(first + k, t) for k in range(n)] for first in range(0, ROWS - n + 1, n) for t in range(TOKENS)]
        for key, groups in (("windows", windows), ("batches", together)):
            wanted = weighted({name: unread(mask, groups) for name, mask in kept.items()}, model)
            assert report["union"][key][i] == pytest.approx(wanted, abs=1e-6), (key, n)
    assert report["union"]["tokens"] == [1, 2, 4, 8]
    assert report["union"]["windows"][0] == pytest.approx(report["scores"]["anchored"]["sparsity"], abs=1e-6)
    wanted = weighted({name: (1 - mask.float().mean().item()) ** 8 for name, mask in kept.items()}, model)
    assert report["union"]["independent"][3] == pytest.approx(wanted, rel=1e-4)

    active, begin = report["active"], 0
    assert active["tokens"] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    for i, end in enumerate(active["tokens"]):
        shares = {
            "now": {name: mask[:, begin:end].float().mean().item() for name, mask in kept.items()},
            "always": {name: mask[:, :end].all(1).float().mean().item() for name, mask in kept.items()},
            "ever": {name: mask[:, :end].any(1).float().mean().item() for name, mask in kept.items()},
        }
        for key, values in shares.items():
            assert active[key][i] == pytest.approx(weighted(values, model), abs=1e-6), (key, end)
        begin = end


def test_too_few_rows_for_a_batch_are_no_number(tmp_path):
    report = measured(adapter(), data=batches(rows=4)[:1])
    assert report["union"]["batches"][3] is None
    assert report["union"]["batches"][2] is not None
    write_report(report, tmp_path / "page.html")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_what_s_removes_and_thresholds_that_fit_this_text(kind):
    model = adapter(sparsity_pattern={"up_proj": 0.3})
    if kind == "merged":
        model = model.merge_and_unload()
    report, ids = measured(model), equal_rows([{"input_ids": batch} for batch in batches()])
    seen = inputs_of(model, ids)
    entries = {entry["name"]: entry for entry in report["layers"]}
    assert list(entries) == list(sites(model))
    name = "default" if kind == "adapter" else None
    for key, layer in sites(model).items():
        x, entry, sparsifier = seen[key], entries[key], layer.sparsifier(name)
        state = layer.sparsifier_state(name)
        weight, s = layer.plain_layer().weight, sparsifier(seen[key], state)
        wanted = ((x - s) @ weight.T).norm() / (x @ weight.T).norm()
        assert entry["removed"] == pytest.approx(wanted.item(), rel=1e-4)
        assert entry["wanted"] == (0.3 if "up_proj" in key else 0.6)
        assert entry["threshold"] == pytest.approx(float(state["threshold"]))
        score = sparsifier.criterion.score(x, state)
        assert (score <= entry["threshold_here"]).float().mean().item() == pytest.approx(entry["wanted"], abs=0.01)
        assert ("anchor_norm" in entry) == (kind == "adapter")
        if kind == "adapter":
            assert entry["anchor_norm"] == pytest.approx(layer.spon_anchor[name].norm().item())
            assert entry["gain_rms"] == pytest.approx(layer.spon_gain[name].square().mean().sqrt().item())


def test_drift_of_the_hidden_states_is_that_behind_each_block():
    model, ids = adapter(), equal_rows([{"input_ids": batch} for batch in batches()])
    report = measured(model)
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    blocks = model.base_model.model.model.layers

    def states(context):
        found = []
        handles = [
            b.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o)) for b in blocks
        ]
        with torch.no_grad(), context:
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return found

    dense = states(dense_mode(model))
    for way, context in (("sparse", without_anchors(model)), ("anchored", every_token_sparse(model))):
        for block, h, d in zip(report["blocks"], states(context), dense, strict=True):
            assert block[way] == pytest.approx(((h - d).norm(dim=-1) / d.norm(dim=-1)).mean().item(), rel=1e-4)


def test_scores_are_those_of_evaluate_and_samples_those_of_generate(full):
    model, report = full
    result = evaluate(model, batches())
    assert report["scores"]["anchored"]["kl"] == result.anchored.kl
    assert report["scores"]["sparse"]["perplexity"] == result.sparse.perplexity
    assert report["data"]["tokens"] == result.tokens == ROWS * (TOKENS - 1)
    tokenizer = word_tokenizer()
    for sample in report["samples"]:
        ids = tokenizer(sample["prompt"], return_tensors="pt", return_token_type_ids=False)
        with dense_mode(model):
            whole = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert sample["dense"] == tokenizer.decode(whole[0, ids["input_ids"].shape[1] :])
        assert sample.keys() == {"prompt", "dense", "sparse", "anchored"}
    assert report["speed"]["dense"]["tokens_per_second"] > 0
    assert report["training"][1] == {"step": 2, "kl": 0.5, "eval_kl": 1.0, "loss": 0.5}


def test_rows_are_the_real_tokens_of_one_length():
    ids, mask = torch.arange(1, 21).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    rows = equal_rows([{"input_ids": ids, "attention_mask": mask}])
    assert sorted(rows.tolist()) == [[1, 2, 3, 4, 5, 6, 7], [14, 15, 16, 17, 18, 19, 20]]
    alone = equal_rows([{"input_ids": ids[:1]}, {"input_ids": ids[1:, :2]}])
    assert alone.tolist() == [ids[0].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [None, "as they are", pytest.param("int8", marks=compiled)])
def test_the_model_is_left_as_it_was(prepared):
    model = adapter(prefill="dense")
    if prepared:
        prepare_for_decode(model, torch.int8 if prepared == "int8" else None)
    else:
        model.base_model.model.model.layers[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: layer.is_prepared for name, layer in sites(model).items()}
    with torch.no_grad():
        logits = model(input_ids=batches()[0]).logits
    report = measured(model, speed=True, tokenizer=word_tokenizer(), samples=1)
    assert report["speed"]["int8"] is (prepared == "int8")
    assert before == {name: layer.is_prepared for name, layer in sites(model).items()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        assert torch.equal(model(input_ids=batches()[0]).logits, logits)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_blocks_and_kinds():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head"]
    assert list(places(names).values()) == [(0, "q_proj"), (11, "up_proj"), (None, "lm_head")]
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    assert len({kind for _, kind in places(names).values()}) == 2
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)] + ["model.layers.0.mlp.shared.up_proj"]
    assert [kind for _, kind in places(names).values()] == ["*.up_proj", "*.up_proj", "shared.up_proj"]
    assert places(["up"]) == {"up": (None, "up")}


def test_trainings_from_a_list_a_file_and_a_folder(tmp_path):
    log = [{"step": 5, "kl": 0.5, "grad_norm": 1.0}, {"step": 9, "train_runtime": 3.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    model = adapter()
    for training in (log, tmp_path, str(tmp_path / "trainer_state.json")):
        assert measured(model, training=training)["training"] == [{"step": 5, "kl": 0.5}]
    (tmp_path / "other.json").write_text("[]")
    for path in (tmp_path / "other.json", tmp_path / "missing"):
        with pytest.raises(ValueError, match="is no trainer_state.json with a log_history"):
            measured(model, training=path)


def test_what_cannot_be_reported_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"causal.*evaluate\(\.\.\.\)\.to_html"):
        measured(adapter_of_t5())
    with pytest.raises(TypeError, match=r"The order is measure_report\(model, data, tokenizer\)"):
        measure_report(batches(), adapter())
    with pytest.raises(ValueError, match="prompts are texts, and no tokenizer"):
        measured(adapter(), prompts=["w3"])
    with pytest.raises(ValueError, match="no sparse layer"):
        measured(MODELS["llama"]())
    with pytest.raises(ValueError, match="This is no report"):
        page({"scores": {}})
    with pytest.raises(ValueError, match="schema 99, and peft_spon .* knows 1; install a newer"):
        page({"schema": 99, "scores": {}})


def adapter_of_t5():
    return get_peft_model(MODELS["t5"](), SponConfig(criterion="topk", init_weights=False)).eval()


# ---- the page ------------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "circle", "line"}


class Page(HTMLParser):
    """Elements with their attributes and text; an error where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID or tag in ("circle",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def check(text):
    """What holds for every page: well-formed, nothing loaded, nothing run, something to read for every figure."""
    found = Page(text)
    assert not found.all("script", "iframe", "img", "object", "embed", "base", "form", "use", "image")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert [link["href"] for link in found.all("link")] == ["data:,"]
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        if tag != "a":
            assert not [
                v for n, v in attributes.items() if "http:" in (v or "") and n != "aria-label" and n != "title"
            ]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in found.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert all(link[0] == "#" or link.startswith(("https://arxiv.org/", "data:application/json")) for link in links)
    for svg in found.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert len([svg for svg in found.all("svg") if "role" in svg]) <= len(found.all("details"))
    assert all("scope" in th for th in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table"))
    assert [len(found.all(name)) for name in ("h1", "main", "head")] == [1, 1, 1]
    assert found.all("html")[0]["lang"] == "en"
    return found


def test_the_page_of_a_full_report(full, tmp_path):
    _, report = full
    write_report(report, tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    found = check(text)
    shown = "".join(found.text)
    titles = "Realised sparsity|Threshold drift|What S removes|Norms of the anchors|Drift of the hidden states|Neurons"
    for title in f"Dense, sparse, repaired|{titles}|Union sparsity|Speed|Training|Samples|All layers".split("|"):
        assert title in shown, title
    assert f"{report['scores']['anchored']['kl']:.3f}" in shown
    assert f"{report['scores']['anchored']['sparsity']:.1%}" in shown
    assert report["samples"][0]["prompt"] in shown
    assert torch.__version__ in shown
    assert len(found.all("svg")) > 8


def test_the_report_survives_json_and_lies_in_the_page(full):
    _, report = full
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert page(again) == page(report)
    data = next(link["href"] for link in check(page(report)).all("a") if link["href"].startswith("data:"))
    assert json.loads(base64.b64decode(data.partition(",")[2])) == report


def test_hostile_names_and_texts_stay_texts(full):
    report = copy.deepcopy(full[1])
    report["model"] |= {"name": HOSTILE, "criterion": HOSTILE, "adapter": HOSTILE}
    report["samples"] = [dict.fromkeys(("prompt", "dense", "sparse", "anchored"), HOSTILE)]
    report["command"], report["created"] = HOSTILE, HOSTILE
    report["versions"][HOSTILE] = HOSTILE
    report["speed"] |= {"kernels": {HOSTILE: HOSTILE}, "left": {HOSTILE: 1}}
    report["data"]["sparse_tokens"] = HOSTILE
    for layer in report["layers"]:
        layer |= {"name": HOSTILE + layer["name"], "kind": HOSTILE + layer["kind"]}
    found = check(page(report))
    harmless = HOSTILE.replace("\x00", "\ufffd")
    assert "".join(found.text).count(harmless) > 20
    assert any(harmless in (td.get("title") or "") for td in found.all("td"))


def test_a_model_with_a_hostile_name(tmp_path):
    model = adapter()
    model.config._name_or_path = "/secret/folder/" + '"><script>alert(1)'
    report = measured(model)
    assert "secret" not in json.dumps(report)
    check(page(report))


@pytest.mark.parametrize("family", sorted(GENERATE - {"t5"}))
def test_every_family_of_causal_models_has_a_page(family):
    report = measured(adapter(family), data=batches()[:1])
    assert len(report["blocks"]) == 2
    assert {layer["block"] for layer in report["layers"]} == {0, 1}
    check(page(report))


@pytest.mark.parametrize("criterion", ["topk", "rsparse", "larosa", "wina"])
def test_other_criteria_have_a_page(criterion):
    report = measured(adapter(criterion=criterion))
    if criterion in ("topk", "wina"):
        assert "threshold" not in report["layers"][0]
        assert "Threshold drift" not in page(report)
    assert report["union"]["windows"][0] == pytest.approx(report["scores"]["anchored"]["sparsity"], abs=1e-6)
    check(page(report))


def test_evaluation_results_write_a_page(tmp_path):
    evaluate(adapter(), batches()).to_html(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    found = "".join(check(text).text)
    assert "Realised sparsity" in found
    assert "Samples" not in found
    assert "What S removes" not in found
    labels = {"labels": torch.randint(3, VOCAB, (2, 5)), "input_ids": batches()[0][:2]}
    evaluate(adapter_of_t5(), [labels]).to_html(tmp_path / "t5.html")
    check((tmp_path / "t5.html").read_text())


def test_without_anchors_nothing_is_called_repaired(tmp_path):
    model = calibrated(get_peft_model(MODELS["llama"](), SponConfig(anchor_modules=[])))
    text = page(measured(model, tokenizer=word_tokenizer(), samples=1))
    found = check(text)
    assert "repaired" not in "".join(found.text).replace("Dense, sparse, repaired", "")
    assert "Norms of the anchors" not in text


def test_what_is_not_finite_is_not_drawn():
    model = adapter()
    model.get_output_embeddings().weight.data.mul_(1e6)
    report = measured(model)
    assert report["scores"]["dense"]["perplexity"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    found = check(page(report))
    assert "nan" not in "".join(found.text).lower().split()


def test_many_blocks_are_drawn_without_numbers():
    layers = [
        {"name": f"model.layers.{i}.mlp.up_proj", "kind": "up_proj", "block": i, "sparsity": i / 80} for i in range(80)
    ]
    model = adapter()
    report = measured(model) | {"layers": layers}
    found = check(page(report))
    cells = [td for td in found.all("td") if "--v" in td.get("style", "")]
    assert len(cells) == 80
    assert cells[0]["style"] == "--v:0"
    assert cells[-1]["style"] == "--v:100"
    assert cells[40]["title"] == "up_proj, block 40: 50.0%"


def contrast(a, b):
    """WCAG's contrast ratio of two colours, #rrggbb."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_and_dark(full):
    modes = re.findall(r":root \{(.*?)\}", page(full[1]), flags=re.DOTALL)
    assert len(modes) == 2
    text = {"ink": ("paper", "panel", "plus", "minus", "mark"), "soft": ("paper", "panel"), "link": ("paper", "panel")}
    lines = dict.fromkeys(("dense", "sparse", "repaired"), ("panel", "grid"))
    for mode in modes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", mode))
        for wanted, pairs in ((4.5, text), (3.0, lines)):  # WCAG 2.2, level AA
            for front, backs in pairs.items():
                assert all(contrast(colours[front], colours[back]) >= wanted for back in backs), front
