# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM serves merged models: the tokens and log-probabilities of transformers. `make test-vllm` runs these, in an
environment that has vLLM's CPU build; every engine is a process of its own."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import edit_json, edit_tensors, qwen2_with_biases
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_spon import SponConfig, calibrate
from peft_spon.sparse_linear import SparseMixin
from peft_spon.statistics import Zeros


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM in this environment: make test-vllm"),
]
TESTS = Path(__file__).parent
TINY_LLAMA = TESTS.parent / "examples" / "tiny_llama"
TEXTS = [path.read_text() for path in sorted((TESTS.parent / "peft_spon").glob("l*.py"))]
CRITERIA = ["weighted", "magnitude", "topk"]
TOKENS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny Llama, merged with anchors and gains that are not 0, by criterion; and a model with biases."""
    root = tmp_path_factory.mktemp("merged")
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    for name in [*CRITERIA, "biases"]:
        torch.manual_seed(0)
        base = qwen2_with_biases() if name == "biases" else AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
        criterion = "weighted" if name == "biases" else name
        model = get_peft_model(base.float(), SponConfig(sparsity=0.5, criterion=criterion))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.02)
        if name == "biases":
            calibrate(model, [{"input_ids": torch.randint(3, 97, (4, 16))}], progress=False)
        else:
            calibrate(model, TEXTS, tokenizer, max_tokens=4096, progress=False)
        model.merge_and_unload().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def by_transformers(model, prompts):
    """Greedy tokens and their log-probabilities, one prompt at a time."""
    tokens, logprobs = [], []
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), **settings, output_logits=True, return_dict_in_generate=True)
        new = output.sequences[0, len(prompt) :]
        tokens.append(new.tolist())
        logprobs.append(torch.cat(output.logits).log_softmax(-1).gather(1, new[:, None])[:, 0])
    return tokens, torch.stack(logprobs)


@torch.no_grad()
def smallest_gap(model, tokens):
    """How near to being decided otherwise any entry is, as a share of its score: S jumps where sums of another order
    round otherwise."""
    gaps = []

    def look(layer, args):
        score = layer.sparsifier().criterion.score(args[0], layer.sparsifier_state())
        if layer.sparsifier().uses_threshold:
            gaps.append((score / layer.spon_threshold - 1).abs().min())
        else:
            k = int(layer.sparsifier().keep(args[0], layer.sparsifier_state())[0, 0].sum())
            best = score.sort(descending=True).values
            gaps.append((1 - best[..., k] / best[..., k - 1]).min())

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, SparseMixin)]
    model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return min(gaps).item()


def prompts_without_ties(model, count=20):
    """Prompts of 5 to 11 tokens in whose answers no entry is a hair's breadth from being kept or zeroed."""
    generator, found = torch.Generator().manual_seed(1), []
    for i in range(4 * count):
        prompt = torch.randint(3, model.config.vocab_size, (5 + i % 7,), generator=generator).tolist()
        (tokens,), _ = by_transformers(model, [prompt])
        if smallest_gap(model, prompt + tokens) > 3e-6:
            found.append(prompt)
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {4 * count} prompts have no ties")


def run(folder, prompts, tmp_path, environment=None, **job):
    """What the worker answers, or what it said where it failed."""
    out = tmp_path / "answers.json"
    job = {"folder": str(folder), "out": str(out), "prompts": prompts, "tokens": TOKENS, **job}
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), **(environment or {})}
    command = [sys.executable, str(TESTS / "vllm_worker.py"), json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return done.stdout + done.stderr
    return json.loads(out.read_text())


def check(found, wanted, tolerance=1e-4):
    assert isinstance(found, dict), found[-3000:]
    tokens, logprobs = wanted
    for way in found["answers"]:
        assert way["tokens"] == tokens
        torch.testing.assert_close(torch.tensor(way["logprobs"]), logprobs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_tokens_log_probabilities_and_realised_sparsity_are_those_of_transformers(criterion, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / criterion)
    prompts = prompts_without_ties(model)
    wanted = by_transformers(model, prompts)
    counts = tmp_path / "realised.json"
    found = run(folders / criterion, prompts, tmp_path, {"PEFT_SPON_VLLM_DEBUG": str(counts)}, at_once=[20, 1])
    check(found, wanted)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMixin)}
    zeros = Zeros(layers, None)
    for prompt, tokens in zip(prompts, wanted[0], strict=True):  # vLLM runs each token but the last, once per way
        with zeros, torch.no_grad():
            model(torch.tensor([prompt + tokens[:-1]]))
    realised = json.loads(counts.read_text())
    assert realised["layer_sparsity"] == pytest.approx(zeros.by_layer(), abs=1e-6)
    assert realised["sparsity"] == pytest.approx(zeros.overall(), abs=1e-6)
    assert 0.4 < realised["sparsity"] < 0.6


def test_a_model_with_biases(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "biases")
    prompts = prompts_without_ties(model)
    check(run(folders / "biases", prompts, tmp_path, at_once=[20, 1]), by_transformers(model, prompts))


@pytest.mark.parametrize("criterion", ["weighted", "topk"])
def test_two_processes_with_tensor_parallelism(criterion, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / criterion)
    prompts = prompts_without_ties(model)
    engine = {"tensor_parallel_size": 2}
    found = run(folders / criterion, prompts, tmp_path, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, engine=engine)
    check(found, by_transformers(model, prompts))


def test_lora_requests_are_lora_on_top_of_the_merged_model(folders, tmp_path):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(folders / "magnitude")
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, init_lora_weights=False, target_modules=targets))
    model.save_pretrained(tmp_path / "lora")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "magnitude"), tmp_path / "lora"
    ).eval()
    prompts = prompts_without_ties(model)
    wanted = by_transformers(model, prompts)
    plain = by_transformers(AutoModelForCausalLM.from_pretrained(folders / "magnitude"), prompts)
    assert plain[0] != wanted[0]
    found = run(folders / "magnitude", prompts, tmp_path, lora=str(tmp_path / "lora"), engine={"enable_lora": True})
    check(found, wanted)


PROMPT = [[5, 6, 7]]


def test_what_is_not_as_it_was_saved_is_refused(folders, tmp_path):
    newer = shutil.copytree(folders / "weighted", tmp_path / "newer")
    edit_json(newer / "config.json", lambda values: values["quantization_config"].update(peft_spon_version="99.0.0"))
    assert "saved by peft_spon 99.0.0, newer than the installed" in run(newer, PROMPT, tmp_path)
    for name in ("spon_threshold", "weight"):
        damaged = shutil.copytree(folders / "weighted", tmp_path / name)
        full = f"model.layers.3.self_attn.k_proj.{name}"
        edit_tensors(damaged / "model.safetensors", lambda tensors, full=full: tensors[full].view(-1)[-1:].mul_(1.01))
        said = run(damaged, PROMPT, tmp_path)
        assert "'model.layers.3.self_attn.k_proj" in said
        assert "merged model again" in said


def test_without_the_plug_in_vllm_refuses_the_folder_itself(folders, tmp_path):
    said = run(folders / "weighted", PROMPT, tmp_path, {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"})
    assert isinstance(said, str)
    assert "Unknown quantization method: spon" in said


def test_an_openai_client_gets_an_answer_over_http(folders, tmp_path):
    from openai import APIConnectionError, OpenAI

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    model = AutoModelForCausalLM.from_pretrained(folders / "magnitude")
    prompt = tokenizer("def read(path):\n")["input_ids"]
    (wanted,), _ = by_transformers(model, [prompt])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 96 --max-num-seqs 4"
    code = "import sys; from peft_spon.serving import serve; sys.exit(serve(sys.argv[1], sys.argv[2:]))"
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", code, str(folders / "magnitude"), *options.split(), "--served-model-name", "tiny"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        answer = None
        while answer is None:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(2)
            try:
                answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0)
            except APIConnectionError:  # it is still loading
                continue
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert answer.choices[0].text == tokenizer.decode(wanted)
