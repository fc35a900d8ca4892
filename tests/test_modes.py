# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`with` blocks that switch parts of a model: whatever the order in which they end, it is as it was."""

import itertools
import threading

import pytest
import torch
from models import MODELS, logits
from peft import LoraConfig, get_peft_model

from peft_spon import SponConfig, add_lora, dense_mode, every_token_sparse, without_anchors, without_lora
from peft_spon.modes import evaluation_mode


BLOCKS = {
    "dense_mode": dense_mode,
    "without_anchors": without_anchors,
    "every_token_sparse": every_token_sparse,
    "evaluation_mode": evaluation_mode,
    "without_lora": without_lora,
    "disable_adapter": lambda model: model.disable_adapter(),
}


@pytest.fixture(scope="module")
def model():
    """SPON and LoRA; every test leaves it as it was."""
    torch.manual_seed(4)
    model = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, prefill=0.5, modules_to_save=["lm_head"]))
    config = LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.5)
    add_lora(model, config, trainable="both")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def state(model):
    """Which switches stand how, and what is trained."""
    switches = ("training", "_disable_adapters", "_anchors_enabled", "_every_token")
    switched = [{name: vars(module).get(name) for name in switches} for module in model.modules()]
    return switched, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", BLOCKS)
@pytest.mark.parametrize("second", BLOCKS)
def test_two_blocks_that_end_in_any_order(model, first, second, training):
    if first == second == "disable_adapter":
        pytest.skip("PEFT's own: the first that ends switches all on")
    model.train(training)
    before = state(model)
    alone = {}
    for name in (first, second):
        with BLOCKS[name](model):
            alone[name] = state(model)
        assert state(model) == before, "one block alone"
    for inner_first in (True, False):
        one, other = BLOCKS[first](model), BLOCKS[second](model)
        one.__enter__()
        other.__enter__()
        ends = [(other, first), (one, None)] if inner_first else [(one, second), (other, None)]
        for block, left in ends:
            block.__exit__(None, None, None)
            wanted = before if left is None else alone[left]
            assert state(model)[0] == wanted[0], f"what {left} holds, after the other block has ended"
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("block", BLOCKS)
def test_three_of_a_kind(model, order, block):
    if block == "disable_adapter":
        pytest.skip("PEFT's own: the first that ends switches all on")
    want = logits(model.eval(), "llama")
    with BLOCKS[block](model):
        inside = logits(model, "llama")
    blocks = [BLOCKS[block](model) for _ in order]
    for one in blocks:
        one.__enter__()
    for index in order:
        assert torch.equal(logits(model, "llama"), inside)
        blocks[index].__exit__(None, None, None)
    assert torch.equal(logits(model, "llama"), want)


def test_a_generator_that_is_given_up_or_runs_on():
    model = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).eval()
    want = logits(model, "llama")

    def teacher():
        with dense_mode(model):
            while True:
                yield logits(model, "llama")

    one, other = teacher(), teacher()
    dense = next(one)
    assert torch.equal(next(other), dense)
    one.close()
    assert torch.equal(next(other), dense)
    del other
    assert torch.equal(logits(model, "llama"), want)


def test_threads():
    """A block holds for every thread; when all have ended, nothing is left."""
    model = get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).eval()
    want = logits(model, "llama")
    with dense_mode(model):
        dense = logits(model, "llama")
    wrong, start = [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(20):
            with dense_mode(model):
                wrong.extend([] if torch.equal(logits(model, "llama"), dense) else ["not dense"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(logits(model, "llama"), want)


def test_an_error_inside(model):
    before = state(model.train())
    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(model), dense_mode(model), without_anchors(model):
        raise RuntimeError("stop")
    assert state(model) == before
