# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference of TRL's preference trainers for a SPON adapter: the adapter as it was at the start."""

import math

import pytest
import torch
from datasets import Dataset
from models import MODELS, VOCAB, logits
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig

from peft_spon import SponConfig, add_lora, calibrate, load_with_lora
from peft_spon.lora import set_trainable
from peft_spon.sites import spon_layers


PAIRS = Dataset.from_dict(
    {"prompt": ["w3 w4", "w5 w6"] * 4, "chosen": [" w7 w8", " w9"] * 4, "rejected": [" w10", " w11 w12"] * 4}
)


def ids():
    return [torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))]


def spon(calibrated=True, **kwargs):
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.5, init_weights=False, **kwargs))
    if calibrated:
        calibrate(model, ids(), progress=False)
    return model


def lora():
    return get_peft_model(MODELS["llama"](), LoraConfig(target_modules="all-linear", init_lora_weights=False))


def options(tmp_path, **kwargs):
    common = {
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return {"output_dir": str(tmp_path), "save_strategy": "no", "gradient_checkpointing": False, **common, **kwargs}


def dpo(model, tmp_path, tokenizer, **kwargs):
    args = DPOConfig(**options(tmp_path, learning_rate=0.05, per_device_train_batch_size=8))
    return DPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tokenizer, **kwargs)


MAKERS = {
    "lora": lora,
    "calibrated": spon,
    "top-k": lambda: spon(calibrated=False),
    "no thresholds": lambda: spon(criterion="topk"),
    "input anchors": lambda: spon(anchor_space="input", gain=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_dpo_begins_at_ln_2_and_trains_away_from_its_start(tmp_path, tokenizer, kind):
    model = MAKERS[kind]()
    start = logits(model.eval(), "llama")
    trainer = dpo(model, tmp_path, tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-3), "the reference stays where it was"
    assert not torch.allclose(logits(model.eval(), "llama"), start)
    model.set_adapter("ref")
    assert torch.equal(logits(model, "llama"), start)


def test_grpo_begins_without_a_divergence(tmp_path, tokenizer):
    # TRL 1.0 imports requests there and does not ask for it.
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer
    data = Dataset.from_dict({"prompt": ["w3 w4", "w5 w6"] * 4})
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    args = GRPOConfig(**options(tmp_path, learning_rate=0.05, beta=0.1, **sizes))
    trainer = grpo_trainer(
        spon(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(number % 2) for number in range(len(completions))],
    )
    trainer.train()
    first, second = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-5


def test_a_lora_that_is_trained_beneath_cannot_be_its_own_reference(tmp_path, tokenizer):
    model = add_lora(spon(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"LoRA beneath SPON, which is trained.*ref_model.*beta=0.0"):
        dpo(model, tmp_path, tokenizer)
    assert sorted(model.peft_config) == ["default", "task"]
    assert all(list(layer.spon_settings) == ["default"] for layer in spon_layers(model).values())
    reference = load_with_lora(MODELS["llama"](), tmp_path / "saved").get_base_model()
    trainer = dpo(model, tmp_path, tokenizer, ref_model=reference)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_frozen_lora_beneath_is_part_of_both(tmp_path, tokenizer):
    model = add_lora(spon(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    set_trainable(model, "anchors")
    trainer = dpo(model, tmp_path, tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-3)


def test_a_copy_has_a_dial_and_a_configuration_of_its_own():
    model = spon()
    model.add_adapter("ref", model.peft_config["default"])
    assert model.peft_config["ref"] is not model.peft_config["default"]
    model.set_sparsity(0.7)
    assert (model.peft_config["default"].sparsity, model.peft_config["ref"].sparsity) == (0.7, 0.5)
    fresh = spon()
    config = SponConfig(sparsity=0.5)
    fresh.add_adapter("other", config)
    fresh.add_adapter("third", config)
    assert all(
        not layer.spon_anchor[name].any() for layer in spon_layers(fresh).values() for name in ("other", "third")
    )
