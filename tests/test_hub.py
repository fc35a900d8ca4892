# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` and loading from the Hub, by the real client over HTTP, against the small Hub of hub_server.py.

Two fresh processes do it all (hub_worker.py): the owner of the repositories pushes, then somebody else loads. The
tests look at what these wrote down and at what the Hub then holds.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from hub_server import FakeHub
from models import MODELS, SMALL, SPECIAL, build, inputs, logits
from peft import get_peft_model

from peft_spon import SponConfig


# One process of pytest-xdist for all, so that the world is made once (--dist loadgroup).
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hub")]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub after the two processes, and what they wrote down."""
    folder = tmp_path_factory.mktemp("hub")
    with FakeHub({"hf_user": "user", "hf_other": "other"}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        written = {}
        for what, token in {"push": {"HF_TOKEN": "hf_user"}, "load": {}}.items():
            env = {**clean, **settings, **token, "HF_HOME": str(folder / f"home-{what}"), "PYTHONPATH": paths}
            command = [sys.executable, str(HERE / "hub_worker.py"), what, str(folder)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            written[what] = json.loads((folder / f"{what}.json").read_text())
        yield hub, written["push"], written["load"]


def test_what_is_pushed_loads_elsewhere_with_the_same_logits(world):
    same = world[2]["same"]
    loaded = {what: outcome for what, outcome in same.items() if not what.startswith("card")}
    assert loaded == dict.fromkeys(loaded, True)
    assert len(loaded) > 10


FOLDERS = ["adapter-folder", "merged-folder"]
PUSHED = ["user/merged", "user/saved-and-pushed", "user/trained", "user/lora"]
ADAPTERS = ["user/llama-spon", "user/subfolder"]


@pytest.mark.parametrize("where", FOLDERS + PUSHED + ADAPTERS)
def test_the_snippet_in_the_card_runs_and_gives_the_same_logits(world, where):
    assert world[2]["same"][f"card of {where}"] is True


def test_configs_of_revisions_and_from_the_cache(world):
    assert world[2]["sparsity"] == [0.5, 0.3, 0.3]


def test_the_server_is_a_hub_to_the_client(world):
    hub, pushed, _ = world
    file = hub.files("user/llama-spon")["adapter_model.safetensors"]
    files = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert pushed["seen"] == {"name": "user", "files": files, "size": len(file.content)}


def test_weights_are_safetensors_and_went_through_lfs(world):
    hub, _, _ = world
    for name in hub.repos:
        if name == "user/pickled":
            continue
        files = hub.files(name)
        weights = {path: file for path, file in files.items() if file.is_lfs and path != "training_args.bin"}
        assert weights, name
        assert all(path.endswith(".safetensors") for path in weights), name
        assert all(hub.stored[file.oid] == file.content for file in weights.values())
        assert not any("spon-saving" in path or path.startswith("checkpoint") for path in files), name
    assert {file.oid for file in hub.files("user/merged").values() if file.is_lfs} <= set(hub.fetched)


def test_repositories_hold_what_they_should(world):
    hub, _, _ = world
    adapter = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    merged = {".gitattributes", "README.md", "config.json", "generation_config.json"}
    for revision in ("main", "v1", "experiment"):
        assert set(hub.files("user/llama-spon", revision)) == adapter
    assert set(hub.files("user/lora")) == adapter
    assert set(hub.files("user/with-lora")) == adapter | {"task/adapter_config.json", "task/adapter_model.safetensors"}
    shards = {path for path in hub.files("user/merged") if path.startswith("model-")}
    assert len(shards) > 2
    assert set(hub.files("user/merged")) == merged | shards | {"model.safetensors.index.json"}
    assert set(hub.files("user/saved-and-pushed")) == merged | {"model.safetensors"}
    config = json.loads(hub.files("user/merged")["config.json"].content)
    assert config["quantization_config"]["quant_method"] == "spon"
    assert hub.repos["user/private-spon"].private
    assert not hub.repos["user/llama-spon"].private


def card(hub, name):
    return hub.files(name)["README.md"].content.decode()


CARDS = [("user/llama-spon", "peft"), ("user/merged", "transformers")]


@pytest.mark.parametrize(("name", "library"), CARDS)
def test_cards_on_the_hub(world, name, library):
    text = card(world[0], name)
    call = f'from_pretrained({"base, " if library == "peft" else ""}"{name}")'
    for part in (f"library_name: {library}", "base_model: user/base", "- spon", "50%", call):
        assert part in text
    assert "More Information Needed" not in text
    assert ("- mine" in text) == (library == "peft"), "tags given to push_to_hub stay"


def test_own_cards_stay_and_folders_are_not_named(world):
    hub, _, _ = world
    for name in ("user/own-card", "user/own-merged-card", "user/own-lora-card"):
        assert card(hub, name) == "---\nlicense: mit\n---\n# My own words\n"
    assert "\nbase_model:" not in card(hub, "user/base-was-a-folder")


def chain(outcome):
    assert "chain" in outcome, f"no error but {outcome}"
    return outcome["chain"]


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_refused_pushes_say_why(world, kind):
    hub, pushed, _ = world
    for repo in ("user/llama-spon", "user/private-spon", "user/new"):
        anonymous, other = (pushed["errors"][f"{who} pushes {kind} to {repo}"] for who in ("anonymous", "other"))
        assert chain(anonymous)[0] == chain(other)[0] == "HfHubHTTPError"
        assert re.search("401.*Unauthorized", anonymous["message"])
        assert re.search("403.*Forbidden", other["message"])
    assert "user/new" not in hub.repos
    assert len(hub.repos["user/llama-spon"].commits) == 4, "the first, and three pushes"


@pytest.mark.parametrize(
    ("repo", "what"), [("user/with-lora", "an adapter of another kind"), ("user/merged", "a model")]
)
def test_a_lora_is_not_pushed_over_something_else(world, repo, what):
    hub, pushed, _ = world
    assert f"{repo} holds {what}" in pushed["errors"][f"LoRA over {repo}"]["message"]
    assert len(hub.repos[repo].commits) == 2, "the first, and one push"


@pytest.mark.parametrize("repo", ["private", "missing"])
@pytest.mark.parametrize("kind", ["peft", "config", "merged"])
def test_what_one_may_not_see_is_not_found(world, kind, repo):
    name = "user/missing" if repo == "missing" else "user/private-merged" if kind == "merged" else "user/private-spon"
    for who in ("anonymous", "other"):
        error = world[2]["errors"][f"{who}, {kind}, {name}"]
        assert "RepositoryNotFoundError" in chain(error), "PeftModel.from_pretrained has it in the traceback only"
        assert name in error["message"]
        if kind == "config":
            assert "private or gated repo, make sure you are authenticated" in error["message"]
        if kind == "merged":
            assert "If this is a private repository, make sure to pass a token" in error["message"]
    wrong = world[2]["errors"][f"wrong, {kind}, {name}"]
    assert "HfHubHTTPError" in chain(wrong)
    if kind == "config":
        assert "Invalid credentials in Authorization header" in wrong["message"]


@pytest.mark.parametrize("kind", ["peft", "config", "merged"])
def test_missing_revisions(world, kind):
    error = world[2]["errors"][f"revision, {kind}"]
    assert "RevisionNotFoundError" in chain(error)
    assert ("nope" in error["message"]) == (kind != "peft")


def test_a_repository_without_adapter(world):
    error = world[2]["errors"]["no adapter"]
    assert {"RemoteEntryNotFoundError", "EntryNotFoundError"} & set(chain(error)), "by the version of the client"
    assert "Can't find 'adapter_config.json' at 'user/merged': 404" in error["message"]


@pytest.mark.parametrize("kind", ["peft", "config", "auto class", "cached"])
def test_pickles_are_refused(world, kind):
    error = world[2]["errors"][f"pickled, {kind}"]
    assert chain(error) == ["ValueError"]
    assert "user/pickled holds its weights as adapter_model.bin, a pickle" in error["message"]


def test_files_that_do_not_belong_together_are_refused(world):
    error = world[2]["errors"]["mixed"]
    assert chain(error) == ["ValueError"]
    assert "do not belong together" in error["message"]


# ---- cards in folders, without a Hub -------------------------------------------------------------------------------


def run_card(folder):
    scope = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], scope)
    return scope["model"].eval()


def test_the_snippet_of_every_family_runs(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MODELS[family]().save_pretrained("base")
    base = type(MODELS[family]()).from_pretrained("base")
    model = get_peft_model(base, SponConfig(init_weights=False)).eval()
    model.save_pretrained("adapter")
    assert torch.equal(logits(run_card(tmp_path / "adapter"), family), logits(model, family))
    merged = model.merge_and_unload()
    merged.save_pretrained("merged")
    assert torch.equal(logits(run_card(tmp_path / "merged"), family), logits(merged, family))


def test_the_snippet_of_a_classifier_with_exceptions_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tf.LlamaConfig(**SMALL, **SPECIAL, intermediate_size=64, num_labels=3)
    build(tf.LlamaForSequenceClassification, config).save_pretrained("base")
    base = tf.AutoModelForSequenceClassification.from_pretrained("base")
    fields = {"sparsity_pattern": {"up_proj": 0.1}, "task_type": "SEQ_CLS", "init_weights": False}
    model = get_peft_model(base, SponConfig(**fields)).eval()
    model.save_pretrained("adapter")
    with torch.no_grad():
        assert torch.equal(run_card(tmp_path / "adapter")(**inputs("llama")).logits, model(**inputs("llama")).logits)


def test_a_second_save_renews_our_card_and_leaves_a_written_one(llama, tmp_path):
    model = get_peft_model(llama, SponConfig(sparsity=0.3))
    path = tmp_path / "adapter" / "README.md"
    model.save_pretrained(path.parent)
    assert "30% of the inputs" in path.read_text()
    model.set_sparsity(0.7)
    model.save_pretrained(path.parent)
    assert "70% of the inputs" in path.read_text()
    merged_path = tmp_path / "merged" / "README.md"
    get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.3)).merge_and_unload().save_pretrained(merged_path.parent)
    assert "On average 30%" in merged_path.read_text()
    merged = model.merge_and_unload()
    merged.save_pretrained(merged_path.parent)
    assert "On average 70%" in merged_path.read_text()
    for own in (path, merged_path):
        own.write_text("# My own words\n")
    get_peft_model(MODELS["llama"](), SponConfig()).save_pretrained(path.parent)
    merged.save_pretrained(merged_path.parent)
    assert "# My own words" in path.read_text()
    assert "of the inputs" not in path.read_text()
    assert merged_path.read_text() == "# My own words\n"
