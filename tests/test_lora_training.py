# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer trains a LoRA on a sparse model, SponTrainer anchors over a LoRA; checkpoints resume both."""

import pytest
import torch
import transformers
from datasets import Dataset
from lora_models import lora_config
from models import MODELS, VOCAB, calibrated, logits
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_spon import SponConfig, SponTrainer, SponTrainingConfig, add_lora, calibrate, dense_mode, load_with_lora
from peft_spon.lora import RESUMES_ALL, trainable_choice
from peft_spon.sites import spon_layers


def rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, 16), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def sparse_model(trainable=None, name="default"):
    torch.manual_seed(0)
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5), name)
    calibrate(model, [{"input_ids": torch.tensor(rows()["input_ids"])}], progress=False)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    return model if trainable is None else add_lora(model, lora, trainable=trainable)


def trainer_of(kind, model, tmp_path, tokenizer, **kwargs):
    trainer_class, config_class = {"sft": (SFTTrainer, SFTConfig), "spon": (SponTrainer, SponTrainingConfig)}[kind]
    rate = {"learning_rate": 0.02} if kind == "sft" else {}
    data = {"train_dataset": rows(), "eval_dataset": kwargs.pop("eval_dataset", None)}
    args = config_class(
        output_dir=str(tmp_path),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "max_length": 16,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            **rate,
            **kwargs,
        },
    )
    return trainer_class(model, args, **data, processing_class=tokenizer)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    after = state(model)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {"lora" if "lora_" in name else "spon" if "spon_" in name else "base" for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "kinds"), [("lora", {"lora"}), ("anchors", {"spon"}), ("both", {"lora", "spon"})]
)
def test_sft_trainer_trains_what_was_chosen(trainable, kinds, tmp_path, tokenizer):
    model = sparse_model(trainable)
    before = state(model)
    trainer = trainer_of("sft", model, tmp_path, tokenizer, gradient_checkpointing=True)
    output = trainer.train()
    assert moved(before, trainer.model) == kinds
    assert torch.isfinite(torch.tensor(output.training_loss))
    trainer.save_model(tmp_path / "saved")
    again = load_with_lora(MODELS["llama"](), tmp_path / "saved").eval()
    assert torch.equal(logits(again, "llama"), logits(trainer.model.eval(), "llama"))


@pytest.mark.slow
def test_spon_trainer_distils_over_a_frozen_lora(tmp_path, tokenizer):
    torch.manual_seed(0)
    lora = get_peft_model(MODELS["llama"](), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model = get_peft_model(lora, SponConfig(sparsity=0.6))
    before = state(model)
    trainer = trainer_of("spon", model, tmp_path, tokenizer, max_steps=30, logging_steps=1)
    # The teacher is the dense model with its LoRA.
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad(), dense_mode(model.eval()):
        dense = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    _, outputs = trainer._distill(model, batch)
    wanted = torch.nn.functional.cross_entropy(dense, batch["labels"][:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(outputs["teacher_nll"], wanted)
    output = trainer.train()
    assert moved(before, trainer.model) == {"spon"}
    assert output.metrics["kl_after"] < output.metrics["kl_before"]


restores_all = pytest.mark.skipif(
    Version(transformers.__version__) < RESUMES_ALL, reason="older versions restore only what is in subfolders"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trainable", "name"),
    [
        pytest.param("sft", "lora", "default", marks=pytest.mark.slow),
        pytest.param("sft", "both", "default", marks=restores_all),
        pytest.param("sft", "both", "anchors", marks=pytest.mark.slow),
        ("spon", "anchors", "default"),
    ],
)
def test_a_checkpoint_resumes_both_exactly(kind, trainable, name, tmp_path, tokenizer):
    def start():
        model = sparse_model(trainable, name)
        return trainer_of(kind, model, tmp_path, tokenizer, save_strategy="steps", save_steps=4)

    straight = start()
    straight.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6
    wanted = state(straight.model)
    for key, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, wanted[key]), key
    for a, b in zip(spon_layers(straight.model).values(), spon_layers(resumed.model).values(), strict=True):
        assert torch.equal(a.spon_threshold[name], b.spon_threshold[name])
    assert trainable_choice(straight.model) == trainable_choice(resumed.model) == trainable
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors" if name == "default" else name, "task"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names, "only adapters"


@pytest.mark.slow
def test_distil_fine_tune_distil_again(tmp_path, tokenizer):
    """The joint recipe, one object all the way."""
    trainer = trainer_of("spon", sparse_model(), tmp_path, tokenizer)
    trainer.train()
    model = add_lora(trainer.model, LoraConfig(r=4, target_modules="all-linear"))
    before = state(model)
    trainer_of("sft", model, tmp_path, tokenizer).train()
    assert moved(before, model) == {"lora"}
    calibrate(model, [{"input_ids": torch.tensor(rows()["input_ids"])}], refit=True, progress=False)
    before = state(model)
    trainer_of("spon", model, tmp_path, tokenizer).train()
    assert moved(before, model) == {"spon"}
    merged = model.merge_and_unload().eval()
    assert logits(merged, "llama").isfinite().all()


class Compares(TrainerCallback):
    """A user's look at the dense model in the middle of a training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with model.disable_adapter(), torch.no_grad():
            model(input_ids=torch.tensor(rows()["input_ids"][:1]))


def test_a_look_at_the_dense_model_does_not_move_the_teacher(tmp_path, tokenizer):
    model = sparse_model("lora")
    trainer = trainer_of("spon", model, tmp_path, tokenizer)
    trainer.add_callback(Compares())
    before = state(model)
    trainer.train()
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("spon_" in name for name in changed)
    # What was chosen before the distillation holds again after it.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in before if "lora_" in n}


def test_a_lora_model_without_spon_is_told_what_to_do(tmp_path, tokenizer):
    lora = get_peft_model(MODELS["llama"](), lora_config())
    with pytest.raises(ValueError, match=r"adapters \['default'\], but no SPON.*get_peft_model\(model, SponConfig"):
        trainer_of("spon", lora, tmp_path, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("spon", "lora"), [("default", "task"), ("anchors", "default")])
def test_the_best_checkpoint_is_that_of_both(spon, lora, tmp_path, tokenizer):
    torch.manual_seed(0)
    # With `weighted` this training goes as it has to: the last checkpoint is not the best.
    model = calibrated(get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, criterion="weighted"), spon))
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"), lora, trainable="both")
    trainer = trainer_of(
        "sft",
        model,
        tmp_path,
        tokenizer,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the last is not the best
        eval_dataset=rows(8, seed=1),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
