# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `peft-spon`: what each command does, its exit codes and messages, and that it loses nothing."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import FakeHub
from models import MODELS, VOCAB, compiled, logits, word_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("jsonargparse")

from peft_spon import (  # noqa: E402
    SponConfig,
    SponTrainer,
    allocate,
    calibrate,
    evaluate,
    sample_texts,
    study,
)
from peft_spon._version import __version__  # noqa: E402
from peft_spon.cli import fit, main  # noqa: E402
from peft_spon.cli.parser import COMMANDS, parse  # noqa: E402
from peft_spon.cli.ship import uploaded  # noqa: E402
from peft_spon.environment import environment, environment_text, problems  # noqa: E402
from peft_spon.sampling import prompt_tokens  # noqa: E402
from peft_spon.texts import read_data  # noqa: E402


SIZE = ["--max-length", "16", "--batch-size", "4"]


def words(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count,), generator=generator).tolist()
    return "\n\n".join(" ".join(f"w{i}" for i in ids[k : k + 40]) for k in range(0, count, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models with a tokenizer, texts, and an adapter with anchors that are not 0, in the working folder."""
    path = tmp_path_factory.mktemp("cli")
    for family in ("llama", "gpt2"):
        MODELS[family]().save_pretrained(path / family)
        word_tokenizer().save_pretrained(path / family)
    (path / "train.txt").write_text(words(2400, 0))
    (path / "test.txt").write_text(words(600, 1))
    base = AutoModelForCausalLM.from_pretrained(path / "llama")
    model = get_peft_model(base, SponConfig(sparsity=0.5, init_weights=False, task_type="CAUSAL_LM"))
    calibrate(model, read_data(str(path / "train.txt")), word_tokenizer(), max_length=16, progress=False)
    model.save_pretrained(path / "adapter")
    model.merge_and_unload().save_pretrained(path / "merged")
    word_tokenizer().save_pretrained(path / "merged")
    return path


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def call(capsys):
    """Runs a command and gives its exit code, standard output and standard error."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def result(call):
    """Runs a command that succeeds, and gives its JSON."""

    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def files(path):
    return {file: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def loaded(adapter, base="llama"):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


# ---- help, usage, errors -------------------------------------------------------------------------------------------


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    names = "demo sample calibrate allocate train evaluate harness compare report merge bench push serve env".split()
    assert list(COMMANDS) == names
    assert re.findall(r"^    (\w+)\b", out, re.M) == names


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_says_what_every_flag_is_and_has_examples_that_parse(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    examples = out.split("examples:\n")[1].replace("\\\n", " ")
    for line in examples.strip().splitlines():
        command = line.split("#")[0].split(">")[0].split()
        if "--config" not in command:
            assert command[:2] == ["peft-spon", name]
            parse(command[1:])
    flags = re.findall(r"^  (--[\w-]+).*\n?((?: {20,}.*\n)*)", out, re.M)
    assert len(flags) > 2
    assert "None" not in out


def test_wrong_usage_exits_with_2_and_a_message(call):
    for arguments, message in [
        ([], "COMMAND|command"),
        (["calibrat"], "calibrat"),
        (["calibrate", "--model", "llama"], "data.* required|required: .*data"),
        (["calibrate", "--model", "llama", "--data", "train.txt", "--out", "o", "--sparsity", "half"], "sparsity"),
        (["allocate", "--model", "llama", "--data", "train.txt", "--out", "o", "--method", "magic"], "magic"),
        (["env", "--nonsense"], "nonsense"),
    ]:
        code, out, err = call(*arguments)
        assert code == 2, arguments
        assert out == ""
        assert re.search(message, err), err
        assert "Traceback" not in err


def test_an_unknown_setting_in_a_file_is_refused(call, tmp_path):
    (tmp_path / "c.yaml").write_text("model: llama\ndata: [train.txt]\nout: o\nsparsty: 0.4\n")
    code, _, err = call("calibrate", "--config", tmp_path / "c.yaml")
    assert code == 2
    assert "sparsty" in err


def test_errors_are_one_line_and_debug_shows_where(call, tmp_path):
    arguments = ["calibrate", "--model", "llama", "--data", "nowhere.txt", "--out", tmp_path / "o"]
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"peft-spon calibrate: error: There is no file or folder 'nowhere.txt'.*\n", err)
    assert not (tmp_path / "o").exists()
    code, _, err = call(*arguments, "--debug")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--model", "nowhere", "--data", "test.txt"], "no folder 'nowhere'"),
        (["evaluate", "--model", "llama", "--data", "test.txt"], "llama is a dense model; make an adapter"),
        (["evaluate", "--model", "merged", "--data", "test.txt", "--sparsity", "0.4"], "merged model is fixed"),
        (["calibrate", "--model", "merged", "--data", "test.txt", "--out", "new"], "is a merged model"),
        (["calibrate", "--model", "llama", "--data", "test.txt", "--out", "new", "--criterion", "x"], "'x'"),
        (
            ["calibrate", "--model", "adapter", "--data", "test.txt", "--out", "new", "--criterion", "topk"],
            "criterion is 'topk', but the adapter has 'magnitude'",
        ),
        (["merge", "--model", "merged", "--out", "new"], "merged already"),
        (["merge", "--model", "llama", "--out", "new"], "dense model"),
        (["compare", "--model", "merged", "--data", "train.txt", "--out", "new"], "starts from a dense one"),
        (
            ["compare", "--model", "llama", "--data", "train.txt", "--out", "new", "--criteria", "x"],
            "no criterion 'x'",
        ),
        (["report", "--out", "new"], "Give --model and --data"),
        (["bench", "--model", "adapter", "--new-tokens", "1"], "new_tokens is 1: the first comes with the prompt"),
        (["bench", "--model", "adapter", "--rounds", "0"], "rounds is 0; use a whole number above 0, for example 5"),
        (["bench", "--model", "adapter", "--rows", "0"], "rows is 0"),
        (["bench", "--model", "adapter", "--prompt-tokens", "0"], "prompt_tokens is 0"),
        (["bench", "--model", "adapter", "--threads", "0"], "threads is 0"),
        (["train", "--model", "llama", "--data", "train.txt", "--steps", "0", "--out", "new"], "steps is 0"),
        (["demo", "--model", "llama", "--data", "train.txt", "--steps", "0", "--out", "new"], "steps is 0"),
        (["sample", "--model", "llama", "--texts", "0", "--out", "new.jsonl"], "texts is 0"),
        (["sample", "--model", "llama", "--max-length", "1", "--out", "new.jsonl"], "tokens is 1"),
        (
            ["sample", "--model", "llama", "--prompts", "nowhere.txt", "--out", "new.jsonl"],
            "no file or folder 'nowhere.txt'",
        ),
        (["sample", "--model", "llama", "--out", "new"], "name a file that ends in .jsonl"),
        (["sample", "--model", "llama", "--chat", "--out", "new.jsonl"], "there are none; give --prompts"),
        (["sample", "--model", "llama", "--max-length", "4096", "--out", "new.jsonl"], "but the model has"),
        (
            ["train", "--model", "llama", "--data", "train.txt", "test.txt", "--out", "new"]
            + ["--training", '{"completion_only_loss": true}'],
            "mixed as tokens",
        ),
        (["serve", "--folder", "llama"], "llama"),
        (["push", "--folder", "llama", "--to", "a/b"], "neither a SPON adapter nor a merged model"),
        (["push", "--folder", "nowhere", "--to", "a/b"], "no folder nowhere"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_is_written(call, arguments, message):
    code, out, err = call(*arguments)
    assert code == 1
    assert message in err
    assert out == ""
    assert err.count("\n") == 1
    assert not list(Path().glob("new*"))


def test_nothing_is_overwritten_without_force(call, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "taken.json").write_text("mine")
    data = ["--data", "train.txt"]
    for arguments in [
        ["calibrate", "--model", "llama", *data, "--out", taken],
        ["allocate", "--model", "llama", *data, "--out", taken],
        ["train", "--model", "llama", *data, "--out", taken],
        ["merge", "--model", "adapter", "--out", taken],
        ["evaluate", "--model", "adapter", *data, "--out", tmp_path / "taken.json"],
        ["evaluate", "--model", "adapter", *data, "--html", tmp_path / "taken.json"],
        ["report", "--model", "adapter", *data, "--out", tmp_path / "taken.html"],  # its numbers are in taken.json
        ["demo", "--model", "llama", "--data", "train.txt", "--out", taken],
    ]:
        before = files(tmp_path)
        code, _, err = call(*arguments)
        assert code == 1, arguments
        assert "exists already; give another --out, or --force" in err
        assert files(tmp_path) == before
    code, _, _ = call("merge", "--model", "adapter", "--out", taken, "--force")
    assert code == 0
    assert (taken / "notes.txt").read_text() == "mine"
    assert (taken / "config.json").exists()


def test_a_file_is_not_written_where_a_folder_is_and_the_other_way_round(call, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    data = ["--data", "train.txt"]
    for arguments, message in [
        (["evaluate", "--model", "adapter", *data, "--out", tmp_path / "folder"], "is a folder; name the file"),
        (["evaluate", "--model", "adapter", *data, "--html", tmp_path / "folder"], "is a folder; name the file"),
        (["report", "--model", "adapter", *data, "--out", tmp_path / "folder"], "is a folder; name the file"),
        (["merge", "--model", "adapter", "--out", tmp_path / "file"], "is a file, and a folder is to be written"),
        (["train", "--model", "llama", *data, "--out", tmp_path / "file"], "is a file, and a folder is to be written"),
    ]:
        for force in ([], ["--force"]):
            code, out, err = call(*arguments, *force)
            assert (code, out) == (1, "")
            assert message in err
    assert files(tmp_path) == {tmp_path / "file": b"mine"}


def test_a_report_never_writes_its_page_over_its_numbers_or_drops_a_setting(call, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    (tmp_path / "page.html").write_text("<html>")
    measured, drawn = ["--model", "adapter", "--data", "test.txt"], ["--result", tmp_path / "r.json"]
    for arguments, message in [
        ([*measured, "--out", tmp_path / "new.json"], "name the page, such as .*new.html"),
        ([*drawn, "--out", tmp_path / "r.json", "--force"], "name the page, such as .*r.html"),
        ([*drawn, "--out", "new", "--training", "x"], "leave out --training"),
        ([*drawn, "--out", "new", *measured], "or --result with"),
        ([*drawn, "--out", "new", "--model", "adapter", "--prompts", "a"], "leave out --model, --prompts"),
        (["--result", tmp_path / "page.html", "--out", "new"], "page.html is no JSON file; give the one that report"),
        (drawn + ["--out", "new"], "This is no report"),
    ]:
        code, _, err = call("report", *arguments)
        assert code == 1
        assert re.search(message, err)
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "page.html"}
    assert (tmp_path / "r.json").read_text() == "{}"
    assert not Path("new").exists()


def test_the_users_folder_in_a_file_of_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("model: m\ndata: [t]\nout: ~/adapter\n")
    assert parse(["calibrate", "--config", str(tmp_path / "settings.yaml")])[1]["out"] == tmp_path / "adapter"
    assert parse(["merge", "--model", "m", "--out=~/a b/c"])[1]["out"] == tmp_path / "a b" / "c"


def test_without_the_extra_the_pip_line_is_named(call, monkeypatch):
    for name in ("jsonargparse", "docstring_parser"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "peft_spon.cli.parser")
            patch.setitem(sys.modules, name, None)
            code, out, err = call("env")
        assert (code, out) == (1, "")
        assert err == "peft-spon needs jsonargparse: pip install 'peft_spon[cli]'\n"


# ---- calibrate, allocate, train ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_calibrate_saves_what_the_function_finds(result, tmp_path, base):
    found = result(
        "calibrate", "--model", base, "--data", "train.txt", "--sparsity", "0.4", "--out", tmp_path / "a", *SIZE
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), SponConfig(sparsity=0.4))
    expected = calibrate(
        model,
        read_data("train.txt", shuffled=True),
        word_tokenizer(),
        max_length=16,
        batch_size=4,
        max_tokens=65536,
        progress=False,
    )
    assert [layer["threshold"] for layer in found["calibration"]["layers"]] == [x.threshold for x in expected.layers]
    assert torch.equal(logits(loaded(tmp_path / "a", base), base), logits(model.eval(), base))


def test_calibrate_turns_the_dial_of_an_adapter_and_keeps_its_anchors(result, tmp_path):
    arguments = ["calibrate", "--model", "adapter", "--data", "test.txt", "--sparsity", "0.3", *SIZE]
    result(*arguments, "--out", tmp_path / "a")
    before, after = (load_file(Path(path) / "adapter_model.safetensors") for path in ("adapter", tmp_path / "a"))
    anchors = [name for name in before if "anchor" in name]
    assert anchors
    assert all(torch.equal(before[name], after[name]) for name in anchors)
    assert SponConfig.from_pretrained(tmp_path / "a").sparsity == 0.3


@pytest.mark.slow
def test_settings_of_a_file_and_flags_over_them(result, tmp_path):
    config = {"model": "llama", "data": ["train.txt", "test.txt"], "sparsity": 0.4, "max_length": 16}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "on_sparse": True, "out": str(tmp_path / "a")}))
    result("calibrate", "--config", tmp_path / "c.yaml", "--sparsity", "0.7")
    assert SponConfig.from_pretrained(tmp_path / "a").sparsity == 0.7
    flags = ["--model", "llama", "--data", "train.txt", "test.txt", "--max-length", "16", "--sparsity", "0.7"]
    result("calibrate", *flags, "--on-sparse", "--out", tmp_path / "b")
    assert load_equal(tmp_path / "a", tmp_path / "b")


def load_equal(a, b):
    first, second = (load_file(Path(path) / "adapter_model.safetensors") for path in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_allocate_spreads_as_the_function_does_and_goes_on_where_it_was(result, call, tmp_path, monkeypatch):
    arguments = ["allocate", "--model", "adapter", "--data", "train.txt", "--max-length", "16", "--max-tokens", "256"]
    found = result(*arguments, "--out", tmp_path / "a")
    model = loaded("adapter")
    data = read_data("train.txt", shuffled=True)
    expected = allocate(model, data, word_tokenizer(), max_length=16, max_tokens=256, progress=False)
    assert [x["sparsity"] for x in found["allocation"]["layers"]] == [x.sparsity for x in expected.layers]
    assert len({x["sparsity"] for x in found["allocation"]["layers"]}) > 3
    assert not list((tmp_path / "a").glob("*state*"))

    import peft_spon.sensitivity as sensitivity

    calls, whole = [], sensitivity.backward_of_a_sample

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(sensitivity, "backward_of_a_sample", killed)
    code, _, err = call(*arguments, "--out", tmp_path / "b")
    assert (code, err.strip().splitlines()[-1]) == (1, "peft-spon: interrupted")
    code, _, err = call(*arguments, "--out", tmp_path / "b")
    assert (code, "exists already" in err) == (1, True)
    again = result(*arguments, "--out", tmp_path / "b", "--resume")
    assert again["allocation"] == found["allocation"]
    assert len(calls) < 2 * 16, "what was found before the interruption is kept"


TRAIN = [
    "train",
    "--data",
    "train.txt",
    "--eval-data",
    "test.txt",
    "--steps",
    "6",
    "--save-steps",
    "1",
    "--sparsity",
    "0.6",
]
TRAIN += [*SIZE, "--training", json.dumps({"calibration_tokens": 512, "logging_steps": 2})]


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_to_the_same_anchors(result, call, tmp_path, monkeypatch):
    found = result(*TRAIN, "--model", "llama", "--out", tmp_path / "whole")
    assert found["steps"] == 6
    assert SponConfig.from_pretrained(tmp_path / "whole").allocation["method"] == "kl"

    step = SponTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SponTrainer, "training_step", killed)
        code, _, err = call(*TRAIN, "--model", "llama", "--out", tmp_path / "killed")
    assert (code, err.strip().splitlines()[-1]) == (1, "peft-spon: interrupted")
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    code, _, err = call(*TRAIN, "--model", "llama", "--out", tmp_path / "killed")
    assert (code, "exists already" in err) == (1, True)
    again = result(*TRAIN, "--model", "llama", "--out", tmp_path / "killed", "--resume")
    assert load_equal(tmp_path / "whole", tmp_path / "killed")
    assert again["kl_after"] == found["kl_after"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_prepare_adapter", "calibration"])
def test_a_training_that_was_begun_anew_never_goes_on_with_what_an_earlier_one_left(
    where, result, call, tmp_path, monkeypatch
):
    arguments = ["train", "--model", "llama", "--data", "train.txt", "--save-steps", "1", "--steps", "2", *SIZE]
    arguments += ["--allocation", "kl", "--training", json.dumps({"calibration_tokens": 128}), "--out", tmp_path / "o"]
    result(*arguments, "--sparsity", "0.6")
    assert (tmp_path / "o" / "checkpoints" / "checkpoint-2").exists()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "calibration":
            patch.setattr("peft_spon.allocation.calibrate", killed)
        else:
            patch.setattr(SponTrainer, where, killed)
        assert call(*arguments, "--sparsity", "0.4", "--force")[0] == 1
    found = result(*arguments, "--sparsity", "0.4", "--resume")
    assert SponConfig.from_pretrained(tmp_path / "o").sparsity == 0.4
    assert [entry["step"] for entry in found["log"] if "loss" in entry] == [1, 2], "both steps were run"


def test_train_goes_on_from_an_adapter_and_its_thresholds(result, tmp_path):
    arguments = ["train", "--model", "llama", "--adapter", "adapter", "--data", "train.txt", "--steps", "2", *SIZE]
    kept = ["--training", '{"recalibrations": 0}']
    found = result(*arguments, *kept, "--learning-rate", "0.01", "--out", tmp_path / "a")
    assert found["steps"] == 2
    assert found["kl_after"] < found["kl_before"]  # its anchors were random
    config = SponConfig.from_pretrained(tmp_path / "a")
    assert (config.sparsity, config.allocation) == (0.5, None)
    before, after = (load_file(Path(path) / "adapter_model.safetensors") for path in ("adapter", tmp_path / "a"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert any("anchor" in name for name in before.keys() - same)
    assert {name for name in before if "quantiles" in name} <= same


# ---- evaluate, report, compare, bench ------------------------------------------------------------------------------


@pytest.mark.slow
def test_sample_writes_the_dense_models_own_text_and_goes_on_where_it_was(result, call, tmp_path):
    out = tmp_path / "own.jsonl"
    arguments = [
        "sample",
        "--model",
        "adapter",
        "--texts",
        "6",
        "--max-length",
        "12",
        "--batch-size",
        "2",
        "--out",
        out,
    ]
    found = result(*arguments)
    dense = AutoModelForCausalLM.from_pretrained("llama")
    wanted = sample_texts(dense, word_tokenizer(), 6, tokens=12, batch_size=2, progress=False)["input_ids"]
    assert [json.loads(line)["input_ids"] for line in out.read_text().splitlines()] == wanted
    assert found == {"out": str(out), "texts": 6, "tokens": sum(map(len, wanted))}
    code, _, err = call(*arguments)
    assert code == 1
    assert "exists already" in err
    whole = out.read_text()
    out.write_text(whole[: whole.index(whole.splitlines()[4]) + 9])  # a batch was being written
    result(*arguments, "--resume")
    assert out.read_text() == whole
    code, _, _ = call(*arguments, "--force", "--temperature", "0")
    assert code == 1
    assert out.read_text() == whole  # what cannot be done costs nothing
    result(*arguments, "--force", "--seed", "1")
    assert out.read_text() != whole
    assert os.listdir(tmp_path) == ["own.jsonl"]


def test_sample_continues_prompts_and_answers_questions(result, call, tmp_path, monkeypatch):
    (tmp_path / "asked.txt").write_bytes(b"\xef\xbb\xbfw5\xe2\x80\xa8w6\r\n\r\nw7\n")
    said = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]
    rows = [{"messages": said}, {"messages": []}, {"messages": said[1:]}, {"prompt": "w9", "messages": None}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = ["--texts", "2", "--max-length", "12", "--out", tmp_path / "own.jsonl", "--force"]
    own = ["sample", "--model", "llama", *size, "--prompts"]

    def begin_with(*prompts):
        """One text each, with the prompt's tokens in front."""
        rows = [json.loads(line)["input_ids"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
        wanted = [prompt_tokens(prompt, tokenizer) for prompt in prompts]
        return [row[: len(ids)] for row, ids in zip(rows, wanted, strict=True)] == wanted

    tokenizer = word_tokenizer()
    result(*own, tmp_path / "asked.txt")
    assert begin_with("w5\u2028w6", "w7")
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}w4"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    result(*own, tmp_path / "asked.txt", "--chat")
    assert begin_with([{"role": "user", "content": "w5\u2028w6"}], [{"role": "user", "content": "w7"}])
    result(*own, tmp_path / "asked.jsonl")  # the last answer is the model's to give; what is empty is passed over
    assert begin_with(said[:1], "w9")
    code, _, err = call(*own, tmp_path / "own.jsonl")
    assert code == 1
    assert "which is one of --prompts" in err
    before = (tmp_path / "own.jsonl").read_text()
    (tmp_path / "long.txt").write_text("w5 " * 9)
    code, _, err = call(*own, tmp_path / "long.txt", "--chat")  # cut, it would not end with the opening of an answer
    assert code == 1
    assert "1 of 1 prompts are conversations of more than 6 tokens" in err
    assert (tmp_path / "own.jsonl").read_text() == before


def test_texts_mixed_with_own_samples_are_what_all_steps_see(result, tmp_path, monkeypatch):
    """Thresholds, allocation and anchors alike; a sample stays the tokens that were drawn."""
    own = tmp_path / "own.jsonl"
    result("sample", "--model", "llama", "--texts", "40", "--max-length", "16", "--out", own)
    drawn = {tuple(json.loads(line)["input_ids"]) for line in own.read_text().splitlines()}
    seen = {}

    def noting(name, function):
        def run(model, data, *args, **kwargs):
            seen[name] = data
            return function(model, data, *args, **kwargs)

        return run

    monkeypatch.setattr(fit.calibration, "calibrate", noting("calibrate", fit.calibration.calibrate))
    monkeypatch.setattr(fit.allocation, "allocate", noting("allocate", fit.allocation.allocate))
    data = ["--data", "train.txt", own]
    result("calibrate", "--model", "llama", *data, *SIZE, "--max-tokens", "512", "--out", tmp_path / "c")
    found = list(itertools.islice(seen["calibrate"], 8))
    assert {type(item) for item in found} == {str, dict}
    some = ["--steps", "2", "--training", '{"calibration_tokens": 1500}']
    result("train", "--model", "llama", *data, *SIZE, *some, "--out", tmp_path / "t")
    rows = [tuple(ids) for ids in seen["allocate"]["input_ids"]]
    of_own = sum(len(ids) for ids in rows if ids in drawn)
    assert 1500 <= sum(map(len, rows)) < 1500 + 1200  # no more than is needed, with the end of the last text
    assert 400 < of_own <= 16 * 40
    more = ["--training", '{"calibration_tokens": 100, "gradient_accumulation_steps": 4, "max_steps": 10}']
    result("train", "--model", "llama", *data, *SIZE, *more, "--out", tmp_path / "m")
    assert sum(map(len, seen["allocate"]["input_ids"])) >= 10 * 4 * 4 * 16


def test_evaluate_gives_what_the_function_gives_for_adapters_and_merged_folders(result, tmp_path):
    expected = evaluate(
        loaded("adapter"),
        read_data("test.txt"),
        word_tokenizer(),
        max_length=16,
        batch_size=4,
        max_tokens=400,
        progress=False,
    )
    arguments = ["evaluate", "--data", "test.txt", "--max-tokens", "400", *SIZE]
    ways = [["--model", "adapter"], ["--model", "llama", "--adapter", "adapter"], ["--model", "merged"]]
    for way in ways:
        found = result(*arguments, *way)
        assert found["data"]["tokens"] == expected.tokens
        for name in ("sparse", "anchored"):
            got, wanted = found["scores"][name], getattr(expected, name)
            assert got["kl"] == pytest.approx(wanted.kl, abs=1e-6)
            assert got["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
            assert got["sparsity"] == wanted.sparsity
    found = result(*arguments, "--model", "adapter", "--sparsity", "0.2")
    assert found["scores"]["sparse"]["sparsity"] == pytest.approx(0.2, abs=0.05)
    assert found["scores"]["sparse"]["kl"] < expected.sparse.kl


def test_evaluate_writes_json_and_a_page_and_report_draws_it_again(call, tmp_path):
    arguments = ["evaluate", "--model", "adapter", "--data", "test.txt", "--max-tokens", "200", "--layers", *SIZE]
    code, out, _ = call(*arguments, "--out", tmp_path / "e.json", "--html", tmp_path / "e.html")
    assert code == 0
    assert "KL to dense" in out
    assert "model.layers.1.mlp.down_proj" in out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["command"].startswith("peft-spon evaluate --model adapter --data test.txt")
    code, out, _ = call("report", "--result", tmp_path / "e.json", "--out", tmp_path / "again.html")
    assert code == 0
    assert (tmp_path / "again.html").read_text() == (tmp_path / "e.html").read_text()
    assert "peft-spon evaluate --model adapter" in (tmp_path / "e.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["adapter", "merged"])
def test_report_measures_and_writes_page_and_numbers(result, tmp_path, model):
    arguments = ["--data", "test.txt", "--max-tokens", "200", "--samples", "1", "--no-speed", *SIZE]
    found = result("report", "--model", model, *arguments, "--out", tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert "speed" not in found
    assert len(found["samples"]) == 1
    assert "<html" in (tmp_path / "r.html").read_text()


COMPARE = ["compare", "--model", "llama", "--data", "train.txt", "--eval-tokens", "128", "--calibration-tokens", "256"]
COMPARE += ["--allocation-tokens", "64", "--steps", "2", "--criteria", "weighted", "topk", *SIZE]


@pytest.mark.slow
def test_compare_has_a_row_for_every_case_and_goes_on_where_it_was(result, call, tmp_path):
    path = tmp_path / "study.json"
    found = result(*COMPARE, "--out", path, "--figure", tmp_path / "study.svg")
    assert json.loads(path.read_text()) == found
    rows = [(r["criterion"], r["allocation"], r["repaired"]) for r in found["rows"]]
    expected = {(c, a, r) for c in ("weighted", "topk") for a in ("uniform", "kl") for r in (False, True)}
    assert len(rows) == 9
    assert set(rows) == expected | {("dense", "uniform", False)}
    for row in found["rows"][1:]:
        assert row["realised"] == pytest.approx(0.5, abs=0.03)
        assert row["kl"] > 0
    assert found["rows"][0]["kl"] == 0
    text = (tmp_path / "study.svg").read_text()
    assert "</svg>" in text

    cut = {**found, "rows": found["rows"][:5]}  # as after the second of four cases
    path.write_text(json.dumps(cut))
    again = result(*COMPARE, "--out", path)
    assert without_minutes(again["rows"]) == without_minutes(found["rows"])
    assert again["rows"][:5] == found["rows"][:5], "nothing was measured twice"
    more = result(*COMPARE, "--out", path, "--sparsities", "0.5", "0.3", "--allocations", "uniform")
    assert len(more["rows"]) == 13

    code, _, err = call(*COMPARE, "--out", path, "--steps", "3")
    assert code == 1
    assert "another protocol or other data (steps 2 there, steps 3 here)" in err
    assert json.loads(path.read_text()) == more


def without_minutes(rows):
    return [{key: value for key, value in row.items() if key != "minutes"} for row in rows]


def test_the_figure_of_a_large_study_has_room_for_its_legend(monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    root = Path(__file__).resolve().parent.parent
    found = json.loads((root / "docs/compare_study.json").read_text())
    assert len({row["criterion"] for row in found["rows"]} - {"dense"}) == 8
    study.draw_study(found, "figure.png")
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    assert {"robust", "allocated (kl)", "not trained"} < {text.get_text() for text in legend.get_texts()}


def test_compare_without_training_prints_a_table_and_needs_matplotlib_for_a_figure_only(call, tmp_path, monkeypatch):
    arguments = [*COMPARE, "--out", tmp_path / "s.json", "--no-repair", "--allocations", "uniform"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = call(*arguments, "--figure", tmp_path / "s.png")
    assert code == 1
    assert "pip install 'peft_spon[plot]'" in err
    code, out, _ = call(*arguments)
    assert code == 0
    assert len(re.findall(r"^\| 50% \| (?:weighted|topk) \| uniform \| none \|", out, re.M)) == 2
    assert "trained" not in out.split("\n", 1)[1]


def test_a_study_never_goes_on_with_other_data(tmp_path):
    base, path = AutoModelForCausalLM.from_pretrained("llama"), tmp_path / "s.json"
    small = study.Protocol(0, 1, 8, calibration_tokens=32, allocation_tokens=32, eval_tokens=32)
    grid = study.cases(["topk"], [0.5])
    parts = [words(120, seed).split("\n\n") for seed in range(3)]
    found = study.compare(base, *parts[:2], word_tokenizer(), grid, path, small)
    assert study.compare(base, *parts[:2], word_tokenizer(), grid, path, small) == found
    for other in ((parts[0], parts[2]), (parts[2], parts[1])):
        with pytest.raises(ValueError, match=f"other data .*data '{found['study']['data']}' there"):
            study.compare(base, *other, word_tokenizer(), grid, path, small)
    del found["study"]["data"]  # an older file
    path.write_text(json.dumps(found))
    assert study.compare(base, *parts[:2], word_tokenizer(), grid, path, small)["rows"] == found["rows"]


@pytest.mark.slow
def test_what_a_study_calls_not_trained_is_measured_before_the_training(tmp_path):
    """The training fits thresholds anew, so afterwards it would be another S."""
    base, plain = AutoModelForCausalLM.from_pretrained("llama"), []
    parts = [words(120, seed).split("\n\n") for seed in range(2)]
    for steps in (0, 5):
        protocol = study.Protocol(steps, 1, 8, calibration_tokens=64, allocation_tokens=32, eval_tokens=64)
        grid = study.cases(["magnitude"], [0.6])
        found = study.compare(base, *parts, word_tokenizer(), grid, tmp_path / f"{steps}.json", protocol)
        plain.append([row for row in without_minutes(found["rows"]) if not row["repaired"]])
    assert plain[0] == plain[1]


def test_a_study_never_fits_on_what_it_measures_on(tmp_path):
    base = AutoModelForCausalLM.from_pretrained("llama")
    with pytest.raises(ValueError, match="1 texts are both fitted on and measured on"):
        study.compare(base, ["a", "b"], ["b"], word_tokenizer(), study.cases(["topk"], [0.5]), tmp_path / "s.json")
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(ValueError, match="no file of a study"):
        study.read_study(tmp_path / "s.json", {})


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "adapter", "merged"])
def test_bench_measures_dense_against_prepared(result, model):
    found = result("bench", "--model", model, "--rounds", "1", "--new-tokens", "4", "--dtype", "float32")
    assert found["prepared"] == 14
    assert found["realised_sparsity"] == pytest.approx(0.5, abs=0.2)
    assert found["times_as_fast"] == pytest.approx(found["dense"]["token"] / found["sparse"]["token"])
    assert min(found[name]["tokens_per_second"] for name in ("dense", "sparse")) > 0


@pytest.mark.slow
@compiled
def test_bench_with_weights_of_8_bits(result):
    found = result("bench", "--model", "adapter", "--rounds", "1", "--new-tokens", "4", "--int8")
    assert (found["prepared"], found["int8"]) == (14, True)


def test_the_page_that_a_card_links_is_pushed_with_it(result, tmp_path):
    adapter = shutil.copytree("adapter", tmp_path / "adapter")
    (adapter / "trainer_state.pt").write_bytes(b"")
    result("evaluate", "--model", adapter, "--data", "test.txt", "--max-tokens", "64", "--html", adapter / "page.html")
    assert "(page.html)" in (adapter / "README.md").read_text()
    names = {path.name for path in uploaded(adapter)}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "page.html"}


# ---- merge, env, push ----------------------------------------------------------------------------------------------


def test_merge_makes_a_folder_with_the_same_logits(result, tmp_path):
    found = result("merge", "--model", "llama", "--adapter", "adapter", "--out", tmp_path / "m")
    assert (found["model_class"], found["sparse_layers"]) == ("LlamaForCausalLM", 14)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged, "llama"), logits(loaded("adapter"), "llama"), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("w5 w6")["input_ids"][-2:] == [5, 6]
    result("merge", "--model", "adapter", "--sparsity", "0.2", "--out", tmp_path / "n")
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "n").config.quantization_config.layers
    assert {entry["sparsity"] for entry in layers.values()} == {0.2}


def test_env_can_be_pasted(call, result):
    code, out, _ = call("env")
    assert code == 0
    for name in ("peft_spon", "torch", "transformers", "peft", "accelerate", "safetensors", "trl", "python"):
        assert re.search(rf"^{name} +\S+", out, re.M), name
    assert re.search(r"^device +cpu: ", out, re.M)
    assert re.search(r"^kernel +cpu float32: \S+ \(", out, re.M)
    assert re.search(r"^threads +\d+$", out, re.M)
    assert str(Path.home()) not in out
    found = result("env")
    assert found["packages"]["torch"] == metadata.version("torch")


def test_env_without_optional_packages(monkeypatch):
    version = metadata.version
    absent = {"trl", "datasets", "jsonargparse", "matplotlib", "triton", "bitsandbytes"}

    def without(name):
        if name in absent:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    text = environment_text(environment())
    assert all(re.search(rf"^{name} +not installed$", text, re.M) for name in absent)


def test_known_incompatibilities_are_named():
    fine = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "trl": "1.16.0"}
    assert problems(fine) == []
    assert problems({**fine, "trl": None, "accelerate": None}) == []
    for changed, message in [
        ({"transformers": "5.24.0"}, "transformers 5.24.0 with peft 0.21.2: "),
        ({"accelerate": "1.14.0"}, "accelerate 1.14.0: a training under FSDP2 cannot be resumed"),
        ({"torch": "2.5.1"}, "torch 2.5.1: peft_spon .* needs torch>=2.6"),
        ({"trl": "0.29.0"}, "trl 0.29.0: peft_spon .* needs trl"),
        ({"bitsandbytes": "0.50.1"}, "bitsandbytes 0.50.1: on CPUs with AVX-512 BF16"),
    ]:
        (problem,) = problems({**fine, **changed})
        assert re.match(message, problem), problem
    assert problems({**fine, "transformers": "5.24.0", "peft": "0.22.0"}) == []


@pytest.fixture
def process(folder, tmp_path):
    """Runs Python in a new process, in the folder, with its own settings of the Hub."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env = {**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_user"}

    def run(script, *arguments, **more):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, env={**env, **more}, cwd=folder, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_python_dash_m_is_the_same_command():
    command = [sys.executable, "-m", "peft_spon", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == ["peft-spon", __version__]


@pytest.mark.slow
def test_push_uploads_adapters_and_merged_models_and_overwrites_nothing(process, folder):
    script = """
from peft_spon.cli import main
for folder, name in [("adapter", "user/adapter"), ("merged", "user/merged"), ("merged", "user/adapter")]:
    print(main(["push", "--folder", folder, "--to", name]))
"""
    with FakeHub({"hf_user": "user"}) as hub:
        done = process(script, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^\d$", done.stdout, re.M) == ["0", "0", "1"], done.stderr
        assert "user/adapter has adapter_config.json and more already; --force adds to it" in done.stderr
        for what in ("adapter", "merged"):
            stored = hub.files(f"user/{what}")
            assert f'"user/{what}"' in stored["README.md"].content.decode(), "the card loads it by its name there"
            weights = next(name for name in stored if name.endswith(".safetensors"))
            assert stored[weights].content == (folder / what / weights).read_bytes()


@pytest.mark.slow
def test_demo_does_the_whole_job_as_a_process(process, tmp_path):
    demo = ["demo", "--model", "llama", "--data", "train.txt", "--steps", "2", "--eval-tokens", "256"]
    demo += ["--max-length", "16", "--batch-size", "2", "--out", tmp_path / "d"]
    done = process("from peft_spon.cli import run; run()", *demo, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "logits of the new process equal ours: True" in done.stdout
    assert (tmp_path / "d" / "adapter_model.safetensors").exists()
    assert re.findall(r"^## (\d)", done.stdout, re.M) == list("123456789")
