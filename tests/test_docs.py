# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ show is true: Python blocks run, commands are accepted, links lead somewhere."""

import argparse
import ast
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from unittest import mock

import datasets
import pytest
import torch
import transformers as tf
import yaml
from datasets import Dataset
from models import VOCAB, calibrated, llama, word_tokenizer
from pages import PAGES, ROOT, anchors, blocks, commands, links, read, without_settings
from peft import LoraConfig, get_peft_model

import peft_spon
from peft_spon import CRITERIA, SponConfig, texts
from peft_spon.evaluation import measurements


pytest.importorskip("jsonargparse")

from peft_spon.cli import main  # noqa: E402
from peft_spon.cli.parser import COMMANDS, parse  # noqa: E402


# ---- Python ------------------------------------------------------------------------------------------------------

# Reasons that a block may give for not being run, in a comment above it, and how many may.
REASONS = {"starts a server": 1, "needs lm_eval": 1}


def words(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 40), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def adapted(base=None):
    config = SponConfig(sparsity=0.5, init_weights=False, task_type="CAUSAL_LM")
    return calibrated(get_peft_model(base or llama(), config))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A working folder with what the pages' names stand for: on this machine a folder is found before the Hub."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Meta-Llama-3-8B", "examples/tiny_llama"):
        llama().save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    for name in ("my-spon", "user/llama-spon", "llama-spon"):
        adapted().save_pretrained(folder / name)
    for name in ("my-lora", "lora"):
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(llama(), lora).save_pretrained(folder / name)
    adapted().merge_and_unload().save_pretrained(folder / "llama-spon-merged")
    word_tokenizer().save_pretrained(folder / "llama-spon-merged")
    history = [{"step": 10, "loss": 0.4, "kl": 0.4}, {"step": 20, "loss": 0.3, "kl": 0.3}]
    (folder / "out/checkpoint-150").mkdir(parents=True)
    (folder / "out/checkpoint-150/trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.fixture
def few_steps(monkeypatch):
    """Whatever a trainer is told, it takes two steps."""
    whole = tf.TrainingArguments.__post_init__

    def shortened(self):
        self.max_steps, self.save_strategy, self.report_to = 2, "no", "none"
        self.use_cpu = True
        self.per_device_train_batch_size = 2
        whole(self)

    monkeypatch.setattr(tf.TrainingArguments, "__post_init__", shortened)


@pytest.fixture
def no_new_criteria():
    known = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(known)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(page, prepared, monkeypatch, few_steps, no_new_criteria):
    monkeypatch.chdir(prepared)
    scope = {"__name__": "__main__", "tokenizer": word_tokenizer(), "texts": words(24, 0), "held_out": words(8, 1)}
    scope |= {"dataset": Dataset.from_dict({"text": scope["texts"]}), "model": adapted()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: scope["dataset"])
    for block in blocks(page, "python"):
        if block.reason is None:
            scope["base"] = llama()  # a story of its own, where a block has not made one
            # Errors then name the page and its line.
            exec(compile("\n" * (block.line - 1) + block.code, ROOT / page, "exec"), scope)


def test_what_is_not_run_says_why():
    marked = [block.reason for page in PAGES for block in blocks(page) if block.reason is not None]
    assert {reason: marked.count(reason) for reason in marked} == REASONS
    for page in PAGES:
        found, text = blocks(page), read(page)
        assert text.count("```") == 2 * len(found), f"{page}: a block that the test does not see"
        comments = re.findall("^<!-- not run", text, re.M)
        assert len(comments) == sum(block.reason is not None for block in found), f"{page}: one that is above no block"
        assert {block.language for block in found} <= {"python", "bash", "yaml", "bibtex", ""}, page


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_llama").symlink_to(ROOT / "examples/tiny_llama")
    for name in ("LAYER_TOKENS", "BLOCK_TOKENS", "SAMPLE_TOKENS", "SPEED_TOKENS"):
        monkeypatch.setattr(measurements, name, 8)
    notebook = json.loads(read("examples/quickstart.ipynb"))
    assert (notebook["nbformat"], len(notebook["cells"])) == (4, 12)
    scope = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for much, few in {"STEPS = 150": "STEPS = 2", "TOKENS = 16384": "TOKENS = 512", "=8192": "=512"}.items():
                code = code.replace(much, few)
            exec(compile(code, cell["id"], "exec"), scope)
    assert (scope["STEPS"], scope["TOKENS"]) == (2, 512)
    assert scope["result"].anchored.kl < scope["result"].sparse.kl + 0.05
    assert (tmp_path / "out/notebook/report.html").exists()
    assert "LlamaForCausalLM in out" in capsys.readouterr().out


# ---- commands ----------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Thrown by a script's parser when it has accepted the arguments, before it does anything."""


def run_parser_of(script, arguments, monkeypatch):
    whole = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        _, left = whole(self, args, namespace)
        raise Parsed(left)

    with monkeypatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(ROOT / script.rpartition("/")[0])
        with pytest.raises(Parsed) as found:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert found.value.args == ([],), f"{script} does not know {found.value.args[0]}"


def check_pip(arguments):
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for named in re.findall(r"(?:peft_spon|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(named.split(",")) <= set(extras)


def check_make(arguments):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    assert {word for word in arguments if "=" not in word} <= targets, arguments


def check_accelerate(arguments, monkeypatch):
    assert arguments[:2] == ["launch", "--config_file"]
    assert (ROOT / arguments[2]).exists()
    run_parser_of(arguments[3], arguments[4:], monkeypatch)


def check_peft_spon(arguments):
    if {"--help", "--print_config"} & set(arguments):
        assert main(arguments) == 0
    elif len(arguments) == 1:  # named, in a sentence
        assert arguments[0] in COMMANDS
    else:
        parse(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        (tmp_path / re.match(r"# (\S+\.yaml)\n", block.code)[1]).write_text(block.code)
    (tmp_path / "my.yaml").write_text("{}")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in commands(page):
        program, *arguments = without_settings(line)
        if [program, *arguments[:2]] == ["python", "-m", "peft_spon"]:
            program, *arguments = ["peft-spon", *arguments[2:]]
        if program == "peft-spon":
            check_peft_spon(arguments)
        elif program == "python" and arguments[0].endswith(".py"):
            run_parser_of(arguments[0], arguments[1:], monkeypatch)
        elif program == "accelerate":
            check_accelerate(arguments, monkeypatch)
        elif program == "make":
            check_make(arguments)
        elif program == "pip":
            check_pip(arguments)
        else:
            assert (program, arguments[0]) == ("vllm", "serve"), f"{page}: nothing checks {shlex.join(line)}"


@pytest.mark.slow
def test_from_a_model_to_a_report_by_command_line(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(prepared / "examples")
    parts = {"train": words(300, 0), "held_out": words(60, 1)}
    monkeypatch.setattr(texts, "stdlib_texts", lambda split: dict(enumerate(parts[split])))
    code = next(b.code for b in blocks("docs/command-line.md", "bash") if b.code.startswith("peft-spon train --model"))
    for line in code.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    assert "Content-Security-Policy" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/merged/model.safetensors").exists()


# ---- links -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "examples/tiny_llama/README.md"])
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), f"{page}: {link}"


# ---- API and site --------------------------------------------------------------------------------------------------


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^\| `([\w.]+)` \|", read("docs/api.md"), re.M) + ["__version__"]
    assert set(peft_spon.__all__) <= set(named)
    shown = re.findall(r"^<!-- docstring(?: alone)?: peft_spon\.([\w.]+) -->$", read("docs/api.md"), re.M)
    assert set(shown) == set(named) - {"CRITERIA", "__version__"}
    for name in named:
        pkgutil.resolve_name(f"peft_spon.{name}")


def pages_in(nav):
    """Files of the navigation in their order, from its nested lists of {title: file or list}."""
    for entry in nav:
        for value in entry.values():
            yield from pages_in(value) if isinstance(value, list) else [value]


def test_the_site_has_every_page_and_builds_strictly(tmp_path):
    nav = list(pages_in(yaml.safe_load(read("mkdocs.yml"))["nav"]))
    assert sorted(nav) == sorted([*PAGES, "CHANGELOG.md"])

    if not all(map(find_spec, ("zensical", "mkdocstrings"))):
        pytest.skip("needs peft_spon[docs]")
    (tmp_path / "mkdocs.yml").write_text(read("mkdocs.yml"))
    for name in ("docs", "peft_spon"):
        (tmp_path / name).symlink_to(ROOT / name)
    runpy.run_path(str(ROOT / "docs/gather.py"))["gather"](tmp_path / "build/pages")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site/docs/api.html").read_text()
    assert all(f'id="peft_spon.{name}"' in api for name in set(peft_spon.__all__) - {"CRITERIA", "__version__"})
    for path in (tmp_path / "site").rglob("*.html"):
        targets = re.findall(r'(?:href|src)="?([^">\s#?]+)', path.read_text())
        for target in targets:
            assert target.startswith(("http", "data:")) or path.name == "404.html" or (path.parent / target).is_file()
        assert not re.search(r'<(script|img)[^>]*src="?http|<link[^>]*stylesheet[^>]*href="?http', path.read_text())


# ---- troubleshooting ---------------------------------------------------------------------------------------------

VALUE = "\0"  # stands in a message for what is put into it


def text_of(node):
    """The text of a string expression, f-strings with `VALUE`s; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    return None


def texts_of_the_code():
    return {text for path in (ROOT / "peft_spon").rglob("*.py") for text in map(text_of, walk(path)) if text}


def walk(path):
    return ast.walk(ast.parse(path.read_text()))


def messages_of_the_code():
    """The texts of all errors that are raised and of all warnings, with where they are."""
    for path in (ROOT / "peft_spon").rglob("*.py"):
        for node in walk(path):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            is_warning = isinstance(call.func, ast.Attribute) and call.func.attr in ("warn", "warning")
            text = text_of(call.args[0]) or ""
            # Without a letter of its own it is put together from messages of other functions.
            if (isinstance(node, ast.Raise) or is_warning) and re.search("[A-Za-z]", text):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def quoted_messages():
    """The quotes in the first column of the tables of messages, as patterns of the messages."""
    quotes = []
    for table in re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", read("docs/troubleshooting.md"), re.M):
        for row in table.splitlines():
            quotes += re.findall(r"`([^`]+)`", row.split(" | ")[0])
    assert len(quotes) > 100
    assert not [quote for quote in quotes if len(re.sub("[^A-Za-z]", "", quote)) < 5], "these fit any message"
    return {quote: re.compile(".*".join(map(re.escape, quote.split("…"))), re.S) for quote in quotes}


def test_every_quoted_message_is_one_of_the_code():
    known = texts_of_the_code()
    for quote, pattern in quoted_messages().items():
        assert any(pattern.search(text) for text in known), f"no message says {quote!r} any more"


def test_every_message_of_the_code_is_explained():
    patterns = quoted_messages().values()
    left = [f"{where}: {text}" for where, text in messages_of_the_code() if not any(p.search(text) for p in patterns)]
    assert not left, "docs/troubleshooting.md lacks\n" + "\n".join(left)
