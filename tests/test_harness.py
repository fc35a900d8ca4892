# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on live and merged sparse models, with task files of our own: right values, S really on."""

import json
import math

import pytest
import torch
import yaml
from models import MODELS, SMALL, SPECIAL, VOCAB, build, calibrated
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_spon import SponConfig, dense_mode, evaluate, without_anchors
from peft_spon.sites import sites


lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'peft_spon[harness]'")

from peft_spon.evaluation.harness import HarnessResult, harness  # noqa: E402


def plain_words():
    """A token per word w0, w1, ...: with w0 for the number that lm_eval pads with, and no token for padding."""
    words = {"w0": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def text(ids):
    return " ".join(f"w{i}" for i in ids)


# Context and continuation. Two of the inputs (all but the last token) end in w0.
PAIRS = [
    ([5, 9, 11, 40, 7], [8, 13]),
    ([12, 3], [0, 6]),
    ([60, 61, 62, 63, 64, 65, 66, 20, 21], [0, 0, 7]),
    ([33, 34], [90]),
]
PROMPTS = [[5, 9, 11, 40], [71, 3], [8, 8, 14, 15, 16, 90]]
NEW = 6


@torch.no_grad()
def greedy(model, prompt, context):
    ids = torch.tensor([prompt])
    with context:
        for _ in range(NEW):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 2:
                return ids[0, len(prompt) : -1].tolist()
    return ids[0, len(prompt) :].tolist()


@torch.no_grad()
def loglikelihoods(model, context):
    found = []
    for prompt, target in PAIRS:
        ids = torch.tensor([prompt + target])
        with context():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        found.append(float(logs.gather(-1, torch.tensor(target)[:, None]).sum()))
    return found


def make_model(**config):
    torch.manual_seed(3)
    return calibrated(get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6, init_weights=False, **config)))


@pytest.fixture(scope="module")
def model():
    """Sparse, with anchors; every test leaves it as it was."""
    return make_model()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """Files of three tasks: log-likelihoods of continuations, of whole texts, and greedy answers."""
    folder = tmp_path_factory.mktemp("tasks")

    def task(name, rows, **settings):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, "doc_to_text": "{{prompt}}", **settings}))

    task(
        "next_words",
        [{"prompt": text(prompt), "target": text(target)} for prompt, target in PAIRS],
        output_type="loglikelihood",
        doc_to_target=" {{target}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )
    task(
        "choice",
        [{"prompt": text(p), "choices": [text(t), text([10, 11])], "answer": i % 2} for i, (p, t) in enumerate(PAIRS)],
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    task(
        "whole_text",
        [{"prompt": text(prompt + target)} for prompt, target in PAIRS],
        output_type="loglikelihood_rolling",
        doc_to_target="{{prompt}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    task(
        "answers",
        [{"prompt": text(p), "target": text(greedy(model, p, dense_mode(model)))} for p in PROMPTS],
        output_type="generate_until",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["w999"], "max_gen_toks": NEW, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return folder


@pytest.fixture(autouse=True)
def _without_environment(monkeypatch):
    """lm_eval asks pip for all versions, for a second and a half."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def run(tasks):
    def call(model, names, **settings):
        settings = {"batch_size": 3, "include_path": tasks, "bootstrap_iters": 0, **settings}
        return harness(model, plain_words(), names, **settings)

    return call


CONTEXTS = {"dense": dense_mode, "sparse": without_anchors, "anchored": lambda model: torch.no_grad()}


def gpt2():
    """Positions of its own, and Conv1D."""
    return calibrated(get_peft_model(MODELS["gpt2"](), SponConfig(sparsity=0.6, init_weights=False)))


def tied(**config):
    """Its output head, which is adapted, shares the weights of its embedding."""
    sizes = {**SMALL, **SPECIAL, "intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
    base = build(LlamaForCausalLM, LlamaConfig(**sizes))
    return calibrated(get_peft_model(base, SponConfig(sparsity=0.6, init_weights=False, **config)))


MAKERS = {
    "llama": make_model,
    "gpt2": gpt2,
    "sparse head": lambda: tied(target_modules=["lm_head", "down_proj", "q_proj"]),
    "saved head": lambda: tied(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_log_likelihoods_are_the_models_own(run, kind):
    model = MAKERS[kind]()
    result = run(model, ["next_words", "choice"])
    found = {}
    for mode, context in CONTEXTS.items():
        hand = loglikelihoods(model, lambda context=context: context(model))
        scores = getattr(result, mode)["next_words"]
        found[mode] = scores.metrics["perplexity"]
        assert found[mode] == pytest.approx(math.exp(-sum(hand) / len(hand)), rel=1e-5)
        assert (scores.samples, scores.shots) == (len(PAIRS), 0)
        assert scores.answer_tokens is None
    assert len({round(value, 3) for value in found.values()}) == 3, "the three differ"


def counted(model, rows):
    """Realised sparsity of rows, as `evaluate` has it."""
    found = [evaluate(model, [torch.tensor([row])], progress=False) for row in rows]
    tokens = [len(row) for row in rows]
    return {
        mode: sum(getattr(f, mode).sparsity * n for f, n in zip(found, tokens, strict=True)) / sum(tokens)
        for mode in ("sparse", "anchored")
    }


def test_realised_sparsity_is_that_of_evaluate_without_padding(run, model):
    result = run(model, ["next_words", "whole_text", "answers"])
    inputs = {
        "next_words": [(prompt + target)[:-1] for prompt, target in PAIRS],
        "whole_text": [[1, *prompt, *target][:-1] for prompt, target in PAIRS],
    }
    for task, rows in inputs.items():
        hand = counted(model, rows)
        for mode in ("sparse", "anchored"):
            scores = getattr(result, mode)[task]
            assert scores.sparsity == pytest.approx(hand[mode], abs=1e-9), task
            assert scores.sparse_tokens == 1
        assert result.dense[task].sparsity == result.dense[task].sparse_tokens == 0
    for mode in ("sparse", "anchored"):
        rows = [prompt + greedy(model, prompt, CONTEXTS[mode](model))[:-1] for prompt in PROMPTS]
        assert getattr(result, mode)["answers"].sparsity == pytest.approx(counted(model, rows)[mode], abs=1e-9)


def test_answers_are_scored_and_their_length_is_said(run, model):
    result = run(model, "answers")
    dense = [greedy(model, prompt, dense_mode(model)) for prompt in PROMPTS]
    for mode, context in CONTEXTS.items():
        answers = [greedy(model, prompt, context(model)) for prompt in PROMPTS]
        scores = getattr(result, mode)["answers"]
        same = sum(a == b for a, b in zip(answers, dense, strict=True)) / len(PROMPTS)
        assert scores.metrics["exact_match"] == pytest.approx(same)
        assert scores.answer_tokens == pytest.approx(sum(map(len, answers)) / len(PROMPTS))
        assert scores.answer_seconds > 0
    model.prepare_for_decode()
    prepared = run(model, "answers")
    model.restore_from_decode()
    for mode in CONTEXTS:
        assert getattr(prepared, mode)["answers"].metrics == getattr(result, mode)["answers"].metrics
    assert result.dense["answers"].metrics["exact_match"] == 1
    assert result.sparse["answers"].metrics["exact_match"] < 1


def test_merged_models_have_the_same_scores(run, tmp_path):
    live = make_model()
    make_model().merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    names = ["next_words", "answers"]
    wanted, found = run(live, names), run(merged, names)
    for mode in CONTEXTS:
        for task, scores in getattr(wanted, mode).items():
            again = getattr(found, mode)[task]
            assert again.metrics == pytest.approx(scores.metrics, rel=1e-5)
            assert again.sparsity == pytest.approx(scores.sparsity, abs=1e-3)


def test_a_dense_model_by_mistake_is_an_error(run):
    model = make_model()
    with pytest.raises(ValueError, match="no sparse layer"):
        run(MODELS["llama"](), "next_words")
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters are disabled"):
        run(model, "next_words")
    merged = make_model().merge_and_unload()
    for task in ("next_words", "answers"):
        with dense_mode(merged), pytest.raises(ValueError, match="S is not active"):
            run(merged, task, states=["anchored"])
    # Anchors, which are on, do not hide it.
    model.set_sparsity(0.0)
    for task in ("next_words", "answers"):
        with pytest.raises(ValueError, match="S is not active"):
            run(model, task, states=["anchored"])
    assert not any(layer._every_token for layer in sites(model).values()), "an error leaves nothing switched"


def test_prefill_is_overridden_or_followed(run, model):
    lazy = make_model(prefill="dense")
    assert run(lazy, "next_words", states=["sparse"]).sparse["next_words"].sparse_tokens == 1
    with pytest.raises(ValueError, match="S was on no token.*every_token=True"):
        run(lazy, "next_words", every_token=False, states=["sparse"])
    found = run(lazy, "answers", every_token=False, states=["sparse"])
    rows = [(len(p), len(greedy_lazy(lazy, p))) for p in PROMPTS]
    read = sum(new - 1 for _, new in rows)
    scores = found.sparse["answers"]
    assert scores.sparse_tokens == pytest.approx(read / (read + sum(n for n, _ in rows)))
    assert 0.3 * scores.sparse_tokens < scores.sparsity < 0.8 * scores.sparse_tokens
    assert "prefill='dense'" in str(found)


def greedy_lazy(model, prompt):
    """What `generate` says with a dense prompt, without anchors."""
    with without_anchors(model):
        ids = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=1
        )
    new = ids[0, len(prompt) :].tolist()
    return new


def test_the_model_and_the_tokenizer_stay_as_they_were(tasks):
    model, tokenizer = make_model().train(), plain_words()
    before = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    harness(model, tokenizer, "answers", include_path=tasks, limit=1, states=["sparse"])
    assert before == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token is None


def test_table_and_json(run, model):
    result = run(model, ["next_words", "answers"], limit=2)
    table = str(result).splitlines()
    assert table[0].split() == ["dense", "sparse", "sparse", "+", "anchors"]
    assert [line.split()[0] for line in table if line[0] != " "][:2] == ["next_words", "answers"]
    assert "limit 2, so not the whole tasks; 14 sparse layers, S on every token; batches of 3" in table[-1]
    assert len({len(line) for line in table[:-1]}) == 1
    found = json.loads(json.dumps(result.to_dict()))
    assert found["sparse"]["next_words"]["sparsity"] == result.sparse["next_words"].sparsity
    assert isinstance(result, HarnessResult)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base model with its tokenizer and an adapter, in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    MODELS["llama"]().save_pretrained("base")
    plain_words().save_pretrained("base")
    config = SponConfig(sparsity=0.6, init_weights=False, task_type="CAUSAL_LM")
    calibrated(get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)).save_pretrained("adapter")
    return tmp_path


def test_the_command_writes_what_the_function_finds(folder, tasks, capsys):
    pytest.importorskip("jsonargparse")
    from peft_spon.cli import main

    arguments = ["harness", "--model", "adapter", "--tasks", "next_words,answers", "--include-path", str(tasks)]
    arguments += ["--limit", "2", "--batch-size", "2", "--out", "r.json", "--prepare"]
    arguments += ["--options", '{"bootstrap_iters": 0}']
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((folder / "r.json").read_text())
    assert printed == written
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    names = ["next_words", "answers"]
    hand = harness(model, plain_words(), names, include_path=tasks, limit=2, batch_size=2, bootstrap_iters=0)
    for mode in CONTEXTS:
        for task, scores in getattr(hand, mode).items():
            assert written[mode][task]["metrics"] == pytest.approx(scores.metrics, rel=1e-5)
            assert written[mode][task]["sparsity"] == scores.sparsity
    assert written["model"]["criterion"] == "magnitude"
    assert written["command"].startswith("peft-spon harness --model adapter")
    before = (folder / "r.json").read_bytes()
    assert main(arguments) == 1
    assert "r.json exists already" in capsys.readouterr().err
    assert (folder / "r.json").read_bytes() == before
    for wrong, message in (
        (["--model", "base"], "base is a dense model"),
        (["--model", "adapter", "--sparsity", "0"], "S is not active"),
    ):
        assert main(["harness", *wrong, "--tasks", str(tasks / "next_words.yaml")]) == 1
        found = capsys.readouterr()
        assert f"peft-spon harness: error: {message}" in found.err


@pytest.mark.slow
def test_an_unknown_task_is_named(run, model):  # lm_eval looks through all of its own
    with pytest.raises(ValueError, match="lm_eval has no task 'gsm9k': `lm_eval ls tasks`"):
        run(model, ["next_words", "gsm9k"])


def test_wrong_arguments_are_named(run, model, tasks):
    with pytest.raises(TypeError, match=r"tokenizer is .*order is harness\(model, tokenizer, tasks\)"):
        harness(model, ["next_words"], plain_words())
    with pytest.raises(TypeError, match="model is of type .*, not a torch.nn.Module"):
        harness(plain_words(), model, "next_words")
    with pytest.raises(ValueError, match=r"no state 'repaired'.*'anchored'"):
        run(model, "next_words", states=["repaired"])
    bare = make_model(anchor_modules=[])
    with pytest.raises(ValueError, match=r"no state 'anchored'; this model has \['dense', 'sparse'\]"):
        run(bare, "next_words", states=["anchored"])
    assert run(bare, "next_words").anchored is None
    with pytest.raises(ValueError, match="causal language models; this is a PeftModel"):
        run(get_peft_model(MODELS["t5"](), SponConfig()), "next_words")
