# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What users' processes do with a Hub. They write down what came of it, and test_hub.py looks at that.

The client reads HF_ENDPOINT, HF_TOKEN and the like when it is imported, so it needs processes of its own.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers as tf
from distributed_worker import texts
from huggingface_hub import HfApi, hf_hub_download
from models import MODELS, calibrated, logits, word_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_spon import (
    SponConfig,
    SponTrainer,
    SponTrainingConfig,
    add_lora,
    dense_mode,
    load_with_lora,
    save_lora,
)


TOKENS = {"hf_user": "user", "hf_other": "other"}


def plain(repo, **kwargs):
    return tf.AutoModelForCausalLM.from_pretrained(repo, **kwargs)


def peft(repo, **kwargs):
    return PeftModel.from_pretrained(plain("user/base"), repo, **kwargs)


def with_lora(repo, **kwargs):
    return load_with_lora(plain("user/base"), repo, **kwargs)


def adapter(seed, name="default", base=None):
    torch.manual_seed(seed)
    config = SponConfig(sparsity=0.3 + 0.1 * seed, init_weights=False, task_type="CAUSAL_LM")
    return calibrated(get_peft_model(base or plain("user/base"), config, adapter_name=name))


def outcome(action, *args, **kwargs):
    """How an action fails: the message, the classes of the error and of those that led to it; or what it returns."""
    try:
        return action(*args, **kwargs)
    except Exception as error:
        message, chain = str(error), []
        while error is not None:
            chain.append(type(error).__name__)
            error = error.__cause__ or error.__context__
        return {"message": message, "chain": chain}


def push(out):
    """The owner's process."""
    api = HfApi()
    MODELS["llama"]().push_to_hub("user/base")
    first, second, third = (adapter(seed) for seed in range(3))
    wanted = {name: logits(model, "llama") for name, model in zip("123", (first, second, third), strict=True)}
    commit = first.push_to_hub("user/llama-spon").oid
    api.create_tag("user/llama-spon", tag="v1")
    second.push_to_hub("user/llama-spon", revision="experiment")
    third.push_to_hub("user/llama-spon", tags=["mine"])
    first.push_to_hub("user/private-spon", private=True)
    adapter(2, "extra").push_to_hub("user/subfolder")
    third.save_pretrained(out / "adapter-folder")
    own = b"---\nlicense: mit\n---\n# My own words\n"
    for repo in ("user/own-card", "user/own-merged-card", "user/own-lora-card"):
        api.create_repo(repo)
        api.upload_file(path_or_fileobj=own, path_in_repo="README.md", repo_id=repo)
    first.push_to_hub("user/own-card")

    both = add_lora(adapter(1), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).eval()
    wanted["with lora"] = logits(both, "llama")
    with dense_mode(both):
        wanted["lora"] = logits(both, "llama")
    both.push_to_hub("user/with-lora")
    (out / "lora").mkdir()
    (out / "lora/.env").write_text("HF_TOKEN=hf_user")
    save_lora(both, out / "lora", repo_id="user/lora")
    save_lora(both, out / "lora", repo_id="user/own-lora-card")

    # Files that do not belong together, and weights as a pickle.
    for name, model in {"mixed": first, "pickled": first, "second": second}.items():
        model.save_pretrained(out / name)
    (out / "second" / "adapter_config.json").replace(out / "mixed" / "adapter_config.json")
    weights = out / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for name in ("mixed", "pickled"):
        api.create_repo(f"user/{name}")
        api.upload_folder(folder_path=out / name, repo_id=f"user/{name}")

    merged = third.merge_and_unload()
    wanted["merged"] = logits(merged, "llama")
    merged.push_to_hub("user/merged", max_shard_size="30KB")
    merged.push_to_hub("user/private-merged", private=True)
    merged.push_to_hub("user/own-merged-card")
    merged.save_pretrained(out / "merged-folder", push_to_hub=True, repo_id="user/saved-and-pushed")
    MODELS["llama"]().save_pretrained(out / "base")
    on_folder = adapter(0, base=plain(out / "base")).merge_and_unload()
    shutil.rmtree(out / "base")
    on_folder.push_to_hub("user/base-was-a-folder")

    errors = {}
    for kind, model in {"adapter": first, "merged": merged}.items():
        for who, token in {"anonymous": False, "other": "hf_other"}.items():
            for repo in ("user/llama-spon", "user/private-spon", "user/new"):
                errors[f"{who} pushes {kind} to {repo}"] = outcome(model.push_to_hub, repo, token=token)
    for repo in ("user/with-lora", "user/merged"):
        errors[f"LoRA over {repo}"] = outcome(save_lora, both, out / "never", repo_id=repo)
    wanted["trained"] = logits(train(out / "trained"), "llama")
    save_file(wanted, out / "wanted.safetensors")
    seen = {"name": api.whoami()["name"], "files": sorted(api.list_repo_files("user/llama-spon"))}
    seen["size"] = api.get_paths_info("user/llama-spon", "adapter_model.safetensors")[0].size
    return {"errors": errors, "commit": commit, "seen": seen}


def train(folder):
    args = SponTrainingConfig(
        output_dir=str(folder),
        push_to_hub=True,
        hub_model_id="user/trained",
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=16,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    model = get_peft_model(plain("user/base"), SponConfig(task_type="CAUSAL_LM"))
    trainer = SponTrainer(model, args, train_dataset=texts(48, 0), processing_class=word_tokenizer())
    trainer.train()
    trainer.push_to_hub()
    return model.eval()


def run_snippet(card):
    """The model that the Python code in a card makes."""
    scope = {}
    exec(Path(card).read_text().split("```python\n")[1].split("```")[0], scope)
    return scope["model"]


def load(out):
    """Somebody else's process, without a token in its environment."""
    commit = json.loads((out / "push.json").read_text())["commit"]
    config, auto = SponConfig.from_pretrained, AutoPeftModelForCausalLM.from_pretrained
    errors = {}
    for kind, read in {"peft": peft, "config": config, "merged": plain}.items():
        mine = "merged" if kind == "merged" else "spon"
        for repo in (f"user/private-{mine}", "user/missing"):
            for who, token in {"anonymous": None, "other": "hf_other", "wrong": "hf_wrong"}.items():
                errors[f"{who}, {kind}, {repo}"] = outcome(read, repo, token=token)
        repo = "user/merged" if kind == "merged" else "user/llama-spon"
        errors[f"revision, {kind}"] = outcome(read, repo, revision="nope")
    errors["no adapter"] = outcome(config, "user/merged")
    errors["mixed"] = outcome(peft, "user/mixed")
    for kind, read in {"peft": peft, "config": config, "auto class": auto}.items():
        errors[f"pickled, {kind}"] = outcome(read, "user/pickled")
    os.chdir(out)  # where the names in the cards of the saved folders hold
    loads = {
        "adapter": ("3", peft, "user/llama-spon", {}),
        "tag": ("1", peft, "user/llama-spon", {"revision": "v1"}),
        "commit": ("1", peft, "user/llama-spon", {"revision": commit}),
        "branch": ("2", peft, "user/llama-spon", {"revision": "experiment"}),
        "auto class": ("3", auto, "user/llama-spon", {}),
        "auto class, tag": ("1", auto, "user/llama-spon", {"revision": "v1"}),
        "transformers' own loading": ("3", plain, "user/llama-spon", {}),
        "subfolder": ("3", peft, "user/subfolder", {"subfolder": "extra"}),
        "LoRA in a subfolder": ("with lora", with_lora, "user/with-lora", {}),
        "LoRA of its own": ("with lora", with_lora, "user/with-lora", {"lora": "user/lora"}),
        "LoRA alone": ("lora", peft, "user/lora", {}),
        "merged": ("merged", plain, "user/merged", {}),
        "merged by save_pretrained": ("merged", plain, "user/saved-and-pushed", {}),
        "trained": ("trained", peft, "user/trained", {}),
        "private adapter": ("1", peft, "user/private-spon", {"token": "hf_user"}),
        "private merged": ("merged", plain, "user/private-merged", {"token": "hf_user"}),
        "card of adapter-folder": ("3", run_snippet, "adapter-folder/README.md", {}),
        "card of merged-folder": ("merged", run_snippet, "merged-folder/README.md", {}),
    }
    adapters = {"user/llama-spon": "3", "user/subfolder": "3", "user/trained": "trained", "user/lora": "lora"}
    for repo, key in {**adapters, "user/merged": "merged", "user/saved-and-pushed": "merged"}.items():
        loads[f"card of {repo}"] = (key, run_snippet, hf_hub_download(repo, "README.md"), {})
    wanted = load_file("wanted.safetensors")
    same = {}
    for what, (key, action, *args, kwargs) in loads.items():
        model = outcome(action, *args, **kwargs)
        same[what] = model if isinstance(model, dict) else torch.equal(logits(model.eval(), "llama"), wanted[key])
    sparsity = [config("user/llama-spon").sparsity, config("user/llama-spon", revision="v1").sparsity]

    # What is in the cache needs no network, and a pickle there is as bad as one on the Hub.
    hf_hub_download("user/pickled", "adapter_model.bin")
    tf.utils.hub.get_session = None
    errors["pickled, cached"] = outcome(config, "user/pickled", local_files_only=True)
    sparsity += [config("user/llama-spon", revision="v1", local_files_only=True).sparsity]
    return {"errors": errors, "same": same, "sparsity": sparsity}


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    written = {"push": push, "load": load}[what](folder)
    (folder / f"{what}.json").write_text(json.dumps(written, default=str))
