# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Data that SponTrainer takes as SFTTrainer does, no alarm without evidence, and what nothing can be learned from."""

import pytest
import torch
from datasets import Dataset
from distributed_worker import texts
from models import MODELS
from peft import get_peft_model
from test_trainer import make
from trl import SFTConfig

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, calibrate
from peft_spon.sites import spon_layers


def alarms(caplog):
    return [record.message for record in caplog.records if "WORSE" in record.message]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dataloader_drop_last": True, "per_device_eval_batch_size": 16}, marks=pytest.mark.slow),
        pytest.param({"learning_rate": 0.0, "logging_steps": 1}, marks=pytest.mark.slow),
        {"learning_rate": 0.0, "gain_learning_rate": 0.0, "logging_steps": 1},
        {"neftune_noise_alpha": 1.0, "learning_rate": 0.3},
    ],
    ids=str,
)
def test_no_alarm_without_evidence(tmp_path, tokenizer, caplog, options):
    trainer = make(tmp_path, tokenizer, data=texts(6), eval_data=texts(6).select(range(3)), max_steps=22, **options)
    metrics = trainer.train().metrics
    assert metrics["kl_after"] <= metrics["kl_before"] * 1.0001
    assert metrics["kl_before"] > 0.001, "measured on something"
    assert not alarms(caplog)
    moves = options.get("learning_rate", 1) > 0
    assert all(
        (layer.spon_anchor["default"].abs().sum() > 0) == moves for layer in spon_layers(trainer.model).values()
    )
    if not moves:
        assert {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry} == {0.0}


@pytest.mark.parametrize("held_out", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_before_and_after_are_measured_alike_whatever_noise_training_adds(tmp_path, tokenizer, held_out):
    """Without noise, on the same rows; the watch's mark is with the noise that the steps' KL has."""
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, criterion="topk"))
    still = {"learning_rate": 0.0, "gain_learning_rate": 0.0, "relative_learning_rate": False}
    found = {}
    for noise in (None, 30.0):
        trainer = make(tmp_path, tokenizer, model, eval_data=texts(6), neftune_noise_alpha=noise, **still)
        trainer.eval_dataset = trainer.eval_dataset if held_out else None
        found[noise] = {**trainer.train().metrics, "mark": trainer._watch.start}
    for metrics in found.values():
        assert metrics["kl_after"] == pytest.approx(metrics["kl_before"], rel=1e-6)
    assert found[30.0]["kl_before"] == pytest.approx(found[None]["kl_before"], rel=1e-6)
    assert found[30.0]["mark"] != pytest.approx(found[None]["mark"], rel=1e-3)


def test_held_out_data_without_a_label_is_not_compared_on(tmp_path, tokenizer, caplog):
    metrics = make(tmp_path, tokenizer, eval_data=Dataset.from_dict({"input_ids": [[5]] * 4})).train().metrics
    assert "kl_after" not in metrics
    assert not alarms(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_noise_on_the_embeddings_is_that_of_the_teacher(tmp_path, tokenizer, accumulation):
    """Where S zeroes next to nothing the KL is next to nothing, whatever the noise."""
    model = get_peft_model(MODELS["llama"](), SponConfig(criterion="topk", sparsity=0.01))
    options = {"neftune_noise_alpha": 100.0, "gradient_accumulation_steps": accumulation, "logging_steps": 1}
    options |= {"learning_rate": 1e-9, "gain_learning_rate": 1e-9}
    trainer = make(tmp_path, tokenizer, model, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(logged) == 4
    assert all(entry["kl"] < 1e-5 for entry in logged)
    quiet = make(tmp_path, tokenizer, **{**options, "neftune_noise_alpha": None, "max_steps": 1})
    quiet.train()
    dense = next(entry["dense_perplexity"] for entry in quiet.state.log_history if "dense_perplexity" in entry)
    assert logged[0]["dense_perplexity"] != pytest.approx(dense, rel=1e-3), "there was noise"


def own_rows(count=12):
    return Dataset.from_dict({"words": [row["text"] for row in texts(count)]})


@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_that_only_an_own_collator_reads(tmp_path, tokenizer, relative):
    """It calibrates on what the collator gives, without padding, and trains on it."""

    def collate(rows):
        batch = tokenizer([row["words"] for row in rows], return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return dict(batch)

    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6))
    args = SponTrainingConfig(
        str(tmp_path),
        max_steps=16,
        per_device_train_batch_size=4,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        relative_learning_rate=relative,
        recalibrations=0,
        learning_rate=0.1 if relative else 1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = SponTrainer(
        model,
        args,
        train_dataset=own_rows(),
        processing_class=tokenizer,
        data_collator=collate,
        eval_dataset=own_rows(),
    )
    metrics = trainer.train().metrics
    assert metrics["kl_after"] < metrics["kl_before"]
    other = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6))
    rows = list(own_rows())
    batches = [collate(rows[first : first + 4]) for first in (0, 4, 8)]
    calibrate(other, [{key: value for key, value in batch.items() if key != "labels"} for batch in batches])
    for found, wanted in zip(spon_layers(model).values(), spon_layers(other).values(), strict=True):
        assert torch.equal(found.spon_threshold["default"], wanted.spon_threshold["default"])
    with pytest.raises(ValueError, match=r"no labels.*let the collator add them"):
        trainer._distill(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "sparsity", "wanted"),
    [
        ({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[-100] * 4] * 8}, 0.5, "every label is -100"),
        ({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, -100, -100, -100]] * 8}, 0.5, "every label is -100"),
        ({"input_ids": [[5], [6], [7], [8]] * 2}, 0.5, "every sequence has one token"),
        ({"input_ids": [[5, 6, 7, 8]] * 8}, 0.0, "sparsity is 0"),
    ],
    ids=["all masked", "only the first counts", "one token", "no sparsity"],
)
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_error_before_the_first_step_where_nothing_can_be_learned(
    tmp_path,
    tokenizer,
    rows,
    sparsity,
    wanted,
    streaming,
):
    data = Dataset.from_dict(rows)
    data = data.to_iterable_dataset() if streaming else data
    steps, options = [], {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = make(
        tmp_path, tokenizer, peft_config=SponConfig(sparsity=sparsity), data=data, eval_data=data, **options
    )
    trainer.training_step = steps.append
    with pytest.raises(ValueError, match=wanted):
        trainer.train()
    assert not steps


@pytest.mark.parametrize("criterion", ["topk", "weighted"])
def test_prompts_that_leave_no_room_for_a_completion(tmp_path, tokenizer, criterion):
    data = Dataset.from_list([{"prompt": " ".join(["w5"] * 30), "completion": " w6"}] * 8)
    trainer = make(tmp_path, tokenizer, peft_config=SponConfig(criterion=criterion), data=data)
    with pytest.raises(ValueError, match=r"every label is -100.*max_length"):
        trainer.train()


def test_labels_may_come_late(tmp_path, tokenizer):
    labels = [[-100] * 4] * 40 + [[5, 6, 7, 8]] * 8
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 48, "labels": labels})
    trainer = make(
        tmp_path, tokenizer, data=data, eval_data=data, max_steps=1, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer.train()
    assert trainer._watch.start > 0


def test_options_that_would_be_ignored_are_refused(tmp_path, tokenizer):
    common = {"output_dir": str(tmp_path), "use_cpu": True}
    for options, wanted in (
        ({"loss_type": "dft"}, "loss_type is 'dft', but the loss of SponTrainer is the KL"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but the loss of SponTrainer is the KL"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True replaces the output head"),
    ):
        with pytest.raises(ValueError, match=wanted):
            SponTrainingConfig(**common, **options)
    if "router_aux_loss_coef" in SFTConfig.__dataclass_fields__:
        with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.01, but the loss of SponTrainer is the KL"):
            SponTrainingConfig(**common, router_aux_loss_coef=0.01)
    assert SponTrainingConfig(**common).loss_type == "nll"
    for name, wanted in (
        ("compute_loss_func", "compute_loss_func was given, but the loss of SponTrainer is the KL.*leave it out"),
        ("preprocess_logits_for_metrics", "preprocess_logits_for_metrics needs the logits of all tokens"),
    ):
        with pytest.raises(ValueError, match=wanted):
            SponTrainer(
                MODELS["llama"](),
                SponTrainingConfig(**common),
                train_dataset=texts(),
                processing_class=tokenizer,
                **{name: lambda *args, **kwargs: None},
            )
