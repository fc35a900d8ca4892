# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from distributed_worker import texts, train
from models import MODELS, VOCAB, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_killed_saving import forked
from transformers import TrainerCallback
from trl import SFTConfig

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, calibrate, dense_mode, evaluate
from peft_spon.comparison import Comparison
from peft_spon.distillation import without_dropout
from peft_spon.divergence import trained_parameters
from peft_spon.losses import forward_kl
from peft_spon.sites import spon_layers
from peft_spon.statistics import removed_by_s
from peft_spon.trainer import TrainingDiverged


def make(tmp_path, tokenizer, model=None, peft_config=None, data=None, eval_data=None, **kwargs):
    args = SponTrainingConfig(
        output_dir=str(tmp_path),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "max_length": 16,
            "learning_rate": 0.02,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            **kwargs,
        },
    )
    return SponTrainer(
        model or MODELS["llama"](),
        args,
        peft_config=peft_config,
        train_dataset=data or texts(),
        eval_dataset=eval_data or texts(8, seed=1),
        processing_class=tokenizer,
    )


def test_training_moves_every_anchor_and_no_weight(tmp_path, tokenizer):
    base = MODELS["llama"]()
    weights = {n: p.clone() for n, p in base.named_parameters()}
    trainer = make(tmp_path, tokenizer, base, SponConfig(sparsity=0.6))
    trainer.train()
    model = trainer.model
    assert all(layer.spon_anchor["default"].abs().sum() > 0 for layer in spon_layers(model).values())
    plain = model.unload()
    assert all(torch.equal(weights[n], p) for n, p in plain.named_parameters())


def test_it_calibrates_by_itself_on_the_training_data(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=1)
    assert not trainer.model.peft_config["default"].calibrated
    trainer.train()
    assert trainer.model.peft_config["default"].calibrated
    assert all(layer.spon_threshold["default"].isfinite() for layer in spon_layers(trainer.model).values())


def test_thresholds_are_of_rows_from_all_over_the_data(tmp_path, tokenizer, monkeypatch):
    """The first rows of a data set are often of one kind: here, of one token."""
    rows = Dataset.from_dict({"input_ids": [[3 + i] * 8 for i in range(64)]})
    seen = []
    found = lambda model, data, **_: seen.append([int(row[0]) for batch in data for row in batch["input_ids"]])  # noqa: E731
    monkeypatch.setattr("peft_spon.trainer.calibrate", found)
    trainer = make(tmp_path, tokenizer, data=rows, max_length=8, relative_learning_rate=False)
    for _ in range(2):
        trainer._prepare_adapter()
    assert seen[0] == seen[1]
    assert sorted(seen[0]) == list(range(3, 67))
    assert max(seen[0][:8]) > 3 + 32


def test_loss_and_metrics_are_the_token_mean_of_the_kl(tmp_path, tokenizer):
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, init_weights=False))
    trainer = make(tmp_path, tokenizer, model)
    batch = next(iter(trainer.get_eval_dataloader()))
    model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student = model(**ids).logits
        with dense_mode(model):
            teacher = model(**ids).logits
    counted = batch["labels"][:, 1:] != -100
    assert 0 < counted.sum() < counted.numel(), "the batch must be ragged"
    wanted = forward_kl(student[:, :-1][counted], teacher[:, :-1][counted]).mean()
    torch.testing.assert_close(loss, wanted)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    sums = [
        trainer.compute_loss(model, dict(batch), return_outputs=True)[1]["kl"]
        for batch in trainer.get_eval_dataloader()
    ]
    assert logged["eval_loss"] == pytest.approx(torch.cat(sums).mean().item(), rel=1e-5)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_loss"] == pytest.approx(logged["eval_loss"], rel=1e-6)
    assert 0 <= logged["eval_top1_agreement"] <= 1


def test_gradient_accumulation_is_normalised_by_tokens(tmp_path, tokenizer):
    anchors = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        trainer = make(
            tmp_path,
            tokenizer,
            peft_config=SponConfig(criterion="topk"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        anchors.append(
            [layer.spon_anchor["default"].detach().clone() for layer in spon_layers(trainer.model).values()]
        )
    for a, b in zip(*anchors, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_checkpointing_packing_and_prompts(tmp_path, tokenizer):
    make(tmp_path, tokenizer, gradient_checkpointing=True).train()
    make(tmp_path, tokenizer, packing=True, packing_strategy="wrapped").train()
    rows = Dataset.from_list([{"prompt": "w3 w4 w5", "completion": " w6 w7"}] * 8)
    trainer = make(tmp_path, tokenizer, data=rows)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist() == [3] * 4, "completion and end of text"


def test_saved_adapter_loads_with_peft(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.model.eval()
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "checkpoint-4").eval()
    assert torch.equal(logits(loaded, "llama"), logits(trainer.model, "llama"))
    card = (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert "library_name: peft" in card
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "spon" in card
    assert "2512.12744" in card
    assert "50% of the inputs" in card
    assert "huggingface.co/None" not in card
    assert str(tmp_path) not in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert "pipeline" not in snippet
    base_dir = tmp_path / "base"
    MODELS["llama"]().save_pretrained(base_dir)
    name = re.search(r'from_pretrained\("(.*?)"\)', snippet)[1]
    scope = {}
    exec(
        snippet.replace(f'"{name}"', f'"{base_dir}"').replace(f'"{tmp_path.name}"', f'"{tmp_path}/checkpoint-4"'),
        scope,
    )
    assert torch.equal(logits(scope["model"].eval(), "llama"), logits(trainer.model, "llama"))


@pytest.mark.slow
def test_resume_gives_the_anchors_of_an_uninterrupted_run(tmp_path, tokenizer):
    straight = make(tmp_path / "a", tokenizer, max_steps=6, save_strategy="steps", save_steps=3)
    straight.train()
    resumed = make(tmp_path / "a", tokenizer, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for x, y in zip(spon_layers(straight.model).values(), spon_layers(resumed.model).values(), strict=True):
        assert torch.equal(x.spon_anchor["default"], y.spon_anchor["default"])
        assert torch.equal(x.spon_threshold["default"], y.spon_threshold["default"])


@pytest.mark.slow
def test_prefill_dense_trains_as_if_decoding(tmp_path, tokenizer):
    kinds = {}
    for prefill in ("dense", "sparse"):
        config = SponConfig(prefill=prefill, sparsity=0.6)
        trainer = make(tmp_path, tokenizer, peft_config=config, max_steps=24)
        output = trainer.train()
        assert output.metrics["kl_before"] > output.metrics["kl_after"] > 0
        kinds[prefill] = [layer.spon_anchor["default"] for layer in spon_layers(trainer.model).values()]
    for dense, sparse in zip(kinds["dense"], kinds["sparse"], strict=True):
        assert torch.equal(dense, sparse)


def test_defaults_work_without_an_accelerator(tmp_path, tokenizer):
    args = SponTrainingConfig(str(tmp_path), use_cpu=True)
    assert args.bf16 is False
    assert SponTrainingConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True, "asked for: kept"


def test_learning_rates_are_relative_to_what_s_removes(tmp_path, tokenizer):
    config = SponConfig(criterion="weighted", task_type="CAUSAL_LM")
    trainer = make(
        tmp_path, tokenizer, peft_config=config, learning_rate=0.3, gain_learning_rate=0.07, logging_steps=1
    )
    trainer.train()
    removed = removed_by_s(trainer.model, trainer.train_dataset, batch_size=4, max_length=16)
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, layer in spon_layers(trainer.model).items():
        rate = groups[id(layer.spon_anchor["default"])]["initial_lr"]
        assert rate == pytest.approx(0.3 * trainer._removed[name].mean)
        assert trainer._removed[name].mean == pytest.approx(removed[name].mean, rel=0.5), "trained since, but not far"
        assert groups[id(layer.spon_gain["default"])]["initial_lr"] == 0.07
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.3, 0.225, 0.15, 0.075])


def test_what_s_removes_is_measured_by_the_definition():
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5))
    name, layer = next(iter(spon_layers(model).items()))
    ids = torch.randint(3, VOCAB, (2, 8))
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = removed_by_s(model, [{"input_ids": ids}])
    handle.remove()
    removed = layer.base_layer(seen[0] - layer.sparsify(seen[0], "default"))
    rms, whole = (value.square().mean().sqrt().item() for value in (removed, layer.base_layer(seen[0])))
    assert found[name].rms == pytest.approx(rms, rel=1e-5)
    assert found[name].share == pytest.approx(rms / whole, rel=1e-5)
    by_token = removed.flatten(0, 1)
    chance = by_token.square().mean() / len(by_token)  # what the mean of 16 tokens has of its own
    mean = (by_token.mean(0).square().mean() - chance).maximum(chance).sqrt().item()
    assert found[name].mean == pytest.approx(mean, rel=1e-5)
    assert set(found) == set(spon_layers(model))
    big = MODELS["llama"]()
    big.model.layers[0].self_attn.q_proj.weight.data *= 8
    bigger = removed_by_s(get_peft_model(big, SponConfig()), [{"input_ids": ids}])[name]
    assert bigger.rms == pytest.approx(8 * found[name].rms, rel=1e-4)
    assert bigger.share == pytest.approx(found[name].share, rel=1e-4)
    assert bigger.mean == pytest.approx(8 * found[name].mean, rel=1e-4)


def test_the_unit_of_an_anchor_is_the_mean_of_what_is_removed_and_not_its_noise():
    """A shift common to all tokens counts, what differs from token to token does not, however large; nor padding."""
    found = {}
    for noise in (0.0, 1.0, 10.0):
        model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, target_modules=["q_proj"]))
        layer = spon_layers(model)["model.layers.0.self_attn.q_proj"]
        layer.sparsify = lambda x, name, noise=noise: x - 0.5 - noise * torch.randn_like(x)
        ids = torch.randint(3, VOCAB, (16, 256))
        found[noise] = removed_by_s(model, [{"input_ids": ids}])["model.layers.0.self_attn.q_proj"]
    shift = layer.base_layer(torch.full((32,), 0.5)).square().mean().sqrt().item()
    assert found[0.0].mean == pytest.approx(shift, rel=1e-3)
    assert found[1.0].mean == pytest.approx(shift, rel=0.1)
    assert found[10.0].rms > 10 * shift
    assert found[10.0].mean < 0.8 * shift + found[10.0].rms / 4096**0.5
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.0))
    assert removed_by_s(model, [{"input_ids": ids}])["model.layers.0.self_attn.q_proj"].mean == 0, "nothing to learn"
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5))
    padded = {"input_ids": ids[:4].clone(), "attention_mask": torch.ones_like(ids[:4])}
    padded["attention_mask"][:, 100:] = 0
    first = [removed_by_s(model, [batch]) for batch in (padded, {"input_ids": ids[:4, :100]})]
    for name, one in first[0].items():
        assert one.mean == pytest.approx(first[1][name].mean, rel=1e-4)


def test_the_rates_rise_over_a_tenth_of_the_steps_and_over_none_of_a_short_training(tmp_path):
    args = SponTrainingConfig(str(tmp_path), use_cpu=True)
    assert [args.get_warmup_steps(steps) for steps in (4, 9, 20, 150)] == [0, 0, 2, 15]
    assert SponTrainingConfig(str(tmp_path), use_cpu=True, warmup_steps=7).get_warmup_steps(150) == 7
    assert SponTrainingConfig(str(tmp_path), use_cpu=True, warmup_share=0.0).get_warmup_steps(150) == 0
    assert SponTrainingConfig.published(str(tmp_path), use_cpu=True).get_warmup_steps(150) == 0
    with pytest.raises(ValueError, match="warmup_share is 1.0"):
        SponTrainingConfig(str(tmp_path), use_cpu=True, warmup_share=1.0)


@pytest.mark.slow
def test_thresholds_are_refitted_to_the_sparse_model_during_training(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=5)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([layer.spon_threshold["default"].item() for layer in spon_layers(trainer.model).values()])

    trainer.add_callback(Look())
    trainer.train()
    assert len({tuple(row) for row in seen}) == 5 - 1, "after steps 1 to 4, the last step's being those of step 4"
    fixed = make(tmp_path, tokenizer, max_steps=5, recalibrations=0)
    fixed.add_callback(Look())
    seen.clear()
    trainer = fixed
    trainer.train()
    assert len({tuple(row) for row in seen}) == 1


@pytest.mark.slow
def test_a_layer_that_few_tokens_reach_keeps_its_threshold_in_training(tmp_path, tokenizer):
    """An expert, say: the first token of every row alone goes through the MLPs."""
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6))
    calibrate(model, [{"input_ids": torch.randint(3, VOCAB, (8, 64))}], progress=False)
    before = {name: layer.spon_threshold["default"].item() for name, layer in spon_layers(model).items()}
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.forward = lambda x, own=module.forward: torch.cat([own(x[:, :1]), x[:, 1:]], 1)
    make(tmp_path, tokenizer, model, max_steps=5).train()
    kept = {
        name for name, layer in spon_layers(model).items() if layer.spon_threshold["default"].item() == before[name]
    }
    assert kept == {name for name in before if ".mlp." in name}


def test_nan_stops_training_and_the_last_good_anchors_are_saved(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=30)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                next(iter(spon_layers(trainer.model).values())).spon_anchor["default"].data.fill_(math.nan)

    trainer.add_callback(Poison())
    with pytest.raises(TrainingDiverged, match=r"The KL is nan at step 8.*last-good.*learning_rate"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "last-good").eval()
    assert logits(loaded, "llama").isfinite().all()
    assert torch.equal(logits(loaded, "llama"), logits(trainer.model.eval(), "llama"))


@pytest.mark.slow
def test_an_overflow_that_fitting_thresholds_sees_first(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=10)

    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(iter(spon_layers(trainer.model).values())).spon_anchor["default"].data.fill_(3e38)

    trainer.callback_handler.callbacks.insert(0, Overflow())
    with pytest.raises(TrainingDiverged, match=r"After step 2 .*NaN or infinite.*last-good.*learning_rate"):
        trainer.train()
    assert all(p.abs().max() < 1e3 for p in trained_parameters(trainer.model))
    assert (tmp_path / "last-good" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_stream_is_not_begun_anew_for_thresholds(tmp_path, tokenizer):
    begun = {}
    for count in (0, 4):
        passes = []

        def rows(passes=passes):
            passes.append(1)
            yield from texts()

        data = IterableDataset.from_generator(rows)
        trainer = make(tmp_path, tokenizer, data=data, max_steps=10, recalibrations=count, calibration_tokens=64)
        trainer.train()
        begun[count] = len(passes)
    assert begun[4] == begun[0]


def test_divergence_is_judged_on_the_data_that_is_trained_on_once_a_step(tmp_path, tokenizer):
    easy = Dataset.from_dict({"text": ["w5 w5 w5 w5 w5 w5"] * 8})
    rates = {"learning_rate": 1e-9, "gain_learning_rate": 1e-9, "recalibrations": 0}
    trainer = make(tmp_path, tokenizer, eval_data=easy, max_steps=5, gradient_accumulation_steps=3, **rates)
    trainer.train()
    assert trainer._watch.steps == 5
    assert trainer._watch.start == pytest.approx(Comparison(trainer, trainer.train_dataset).mean_kl("KL"), rel=1e-3)
    assert trainer._watch.start != pytest.approx(Comparison(trainer).mean_kl("KL"), rel=0.02)


def test_gains_move_little_where_s_removes_little(tmp_path, tokenizer):
    shares = {}
    for sparsity in (0.1, 0.8):
        trainer = make(tmp_path, tokenizer, peft_config=SponConfig(sparsity=sparsity), max_steps=1)
        trainer.train()
        shares[sparsity] = sum(r.share for r in trainer._removed.values()) / len(trainer._removed)
        rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        layer = next(iter(spon_layers(trainer.model).values()))
        scale = min(1.0, shares[sparsity] / 0.2) ** 2
        assert rates[id(layer.spon_gain["default"])] == pytest.approx(0.01 * scale)
    assert shares[0.1] < 0.1 < 0.2 < shares[0.8]


def test_arguments_that_cannot_work_say_so(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="takes a SponTrainingConfig"):
        SponTrainer(MODELS["llama"](), SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=texts())
    with pytest.raises(ValueError, match="logits of all tokens"):
        SponTrainer(
            MODELS["llama"](), SponTrainingConfig(str(tmp_path), use_cpu=True), compute_metrics=lambda prediction: {}
        )


def test_the_logits_of_a_batch_never_exist(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    seen = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    trainer.train()
    assert seen
    assert set(seen) == {1}, "tokens that went through the head at once, calibration included"


def test_modules_to_save_and_other_optimizers(tmp_path, tokenizer):
    model = get_peft_model(MODELS["llama"](), SponConfig(modules_to_save=["lm_head"]))
    trainer = make(tmp_path, tokenizer, model)
    trainer.create_optimizer()
    (group,) = [group for group in trainer.optimizer.param_groups if group["params"][0].ndim == 2]
    assert group["lr"] == 1e-5
    trainer = make(tmp_path, tokenizer)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 1.0})
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)


@pytest.mark.slow
def test_divergence_stops_training_with_the_best_anchors(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=200, learning_rate=50.0, gain_learning_rate=5.0)
    with pytest.raises(TrainingDiverged, match=r"The KL diverges.*Lower learning_rate \(now 50\)"):
        trainer.train()
    assert trainer.state.global_step < 60
    assert Comparison(trainer).mean_kl("KL") < 2 * trainer._watch.start


@pytest.mark.slow
def test_held_out_kl_before_and_after(tmp_path, tokenizer, caplog):
    worse = make(tmp_path, tokenizer, max_steps=15, learning_rate=5.0).train().metrics
    assert worse["kl_after"] > worse["kl_before"]
    assert any(
        "TRAINING MADE THE SPARSE MODEL WORSE" in r.message and r.levelname == "WARNING" for r in caplog.records
    )
    caplog.clear()
    trainer = make(tmp_path, tokenizer, max_steps=8, per_device_train_batch_size=48)
    trainer.eval_dataset = None
    better = trainer.train().metrics
    assert better["kl_after"] < better["kl_before"]
    assert not [r for r in caplog.records if "WORSE" in r.message]
    again = trainer.train().metrics
    assert again["kl_before"] == pytest.approx(better["kl_after"], rel=1e-4), "before is where this training began"


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_anchors(tmp_path, monkeypatch):
    """Processes are killed, without warning, in the middle of a step after the checkpoint of step 2 or 4."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim": "adamw_torch"}
    options |= {"learning_rate": 0.2, "gain_learning_rate": 0.05, "recalibrations": 2}
    worker = [sys.executable, str(Path(__file__).parent / "distributed_worker.py")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    trainings = []
    for step in (3, 5):
        folder = tmp_path / f"killed-{step}"
        with monkeypatch.context() as context:
            context.setenv("SPON_TEST_KILL_AT", str(step))
            assert not forked(partial(train, folder, dict(options)))
        checkpoint = folder / f"checkpoint-{step // 2 * 2}"
        weights = {
            path.name for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        }
        state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
        assert weights == {"adapter_model.safetensors"} | state
        assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1_000_000
        trainings += [str(tmp_path / f"resumed-{step}"), json.dumps({**options, "resume": str(checkpoint)})]
    command = [*worker, *trainings, str(tmp_path / "straight"), json.dumps(options)]
    subprocess.run(command, env=settings, capture_output=True, check=True)
    names = ("resumed-3", "resumed-5", "straight")
    *resumed, straight = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    for anchors in resumed:
        assert all(torch.equal(anchors[key], straight[key]) for key in straight)


def test_packing_and_padding_do_not_change_the_loss(tmp_path, tokenizer):
    def kl(**kwargs):
        model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, init_weights=False))
        torch.manual_seed(5)
        trainer = make(tmp_path, tokenizer, model, per_device_eval_batch_size=4, **{"max_length": 64, **kwargs})
        with torch.no_grad():
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        metrics = trainer.evaluate()
        return metrics["eval_kl"], metrics["eval_perplexity"]

    padded = kl()
    assert kl(padding_free=True, max_length=None) == pytest.approx(padded, rel=1e-5)
    assert kl(packing=True) == pytest.approx(padded, rel=1e-5)


@pytest.mark.slow
def test_chat_and_streaming_data(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "w3 w4 w5"}, {"role": "assistant", "content": "w6 w7"}]
    chat = Dataset.from_list([{"messages": talk}] * 16)
    trainer = make(tmp_path, tokenizer, data=chat, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).tolist() == [3] * 4, "the assistant's words and the end"
    trainer.train()
    stream = texts().to_iterable_dataset()
    make(tmp_path, tokenizer, data=stream).train()


def shallow():
    model = MODELS["llama"]()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.slow
def test_compiled_training(tmp_path, tokenizer):
    plain = make(tmp_path, tokenizer, shallow(), max_steps=2)
    plain.train()
    compiled = make(tmp_path, tokenizer, shallow(), max_steps=2, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    for a, b in zip(trained_parameters(plain.model), trained_parameters(compiled.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_training(tmp_path, tokenizer):
    half = make(tmp_path, tokenizer, MODELS["llama"]().bfloat16(), max_steps=2, bf16=True)
    half.train()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained_parameters(half.model))


def test_the_published_recipe():
    config, training = SponConfig.published(sparsity=0.6), SponTrainingConfig.published("out", use_cpu=True)
    assert (config.criterion, config.anchor_space, config.gain) == ("magnitude", "input", False)
    model = get_peft_model(MODELS["llama"](), config)
    names = [name for name, layer in spon_layers(model).items() if "default" in layer.spon_anchor]
    assert len(spon_layers(model)) == 14
    assert names == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert (training.learning_rate, training.max_length, training.num_train_epochs) == (1e-5, 128, 10)
    assert not training.relative_learning_rate
    assert SponTrainingConfig.published("out", use_cpu=True, max_steps=3).max_steps == 3


def test_nothing_to_train(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"Nothing to train.*is_trainable=True"):
        make(tmp_path, tokenizer, peft_config=SponConfig(anchor_modules=[]))
    with pytest.raises(ValueError, match="temperature is 0"):
        SponTrainingConfig(str(tmp_path), temperature=0, use_cpu=True)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_neither_teacher_nor_student_has_dropout(tmp_path, tokenizer, checkpointing):
    def anchors(dropout):
        model = MODELS["gpt2"]()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        trainer = make(
            tmp_path, tokenizer, model, SponConfig(sparsity=0.6), gradient_checkpointing=checkpointing, max_steps=2
        )
        trainer.train()
        assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {dropout}
        return [layer.spon_anchor["default"] for layer in spon_layers(trainer.model).values()]

    for with_dropout, without in zip(anchors(0.5), anchors(0.0), strict=True):
        assert torch.equal(with_dropout, without)


def test_attention_dropout_in_an_attribute_is_off_as_well():
    model = MODELS["llama"]().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = {"input_ids": torch.randint(3, VOCAB, (2, 12))}
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        with without_dropout(model):
            assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_report_and_the_results_in_the_card_come_with_the_training(packing, tmp_path, tokenizer):
    options = {"packing": packing, "packing_strategy": "wrapped"}
    trainer = make(tmp_path / "a", tokenizer, report_to_html=True, logging_steps=1, **options)
    trainer.train()
    trainer.save_model(tmp_path / "a")
    page = (tmp_path / "a" / "report.html").read_text()
    assert all(title in page for title in (">Training<", ">Samples<", ">Where in the network<"))
    result = evaluate(trainer.model, list(trainer.get_eval_dataloader()))
    assert f"{result.anchored.kl:.3f}" in page
    assert f"| repaired | {result.anchored.kl:.4f} |" in (tmp_path / "a" / "README.md").read_text()
    trainer.create_model_card()
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"| repaired | {result.anchored.kl:.4f} |" in card
    assert "[the whole report](report.html)" in card
    assert card.index("## Results") < card.index("## Training procedure")

    trainer = make(tmp_path / "b", tokenizer, **options)
    metrics = trainer.train().metrics
    assert not (tmp_path / "b" / "report.html").exists()
    trainer.create_model_card()
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"{metrics['kl_before']:.4f} before, {metrics['kl_after']:.4f} after 4 steps" in card
    assert "whole report" not in card
