# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`torch.export` and `torch.jit.trace`: right for inputs of any length, or refused."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spon import SponConfig, every_token_sparse


def net(merged=False, **kwargs):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
    config = SponConfig(**{"target_modules": ["0", "2"], "init_weights": False, "criterion": "weighted", **kwargs})
    model = get_peft_model(plain, config).eval()
    for layer in model.get_base_model():
        if not isinstance(layer, nn.GELU):
            layer.set_quantiles("default", torch.linspace(0, 2, 257))
    return model.merge_and_unload() if merged else model.get_base_model()


def export(model, example):
    tokens = torch.export.Dim("tokens", min=2)
    return torch.export.export(model, (example,), dynamic_shapes=({1: tokens},)).module()


def export_strict(model, example):
    tokens = torch.export.Dim("tokens", min=2)
    return torch.export.export(model, (example,), dynamic_shapes=({1: tokens},), strict=True).module()


WAYS = [export, torch.jit.trace]
ANY_LENGTH = [{}, {"prefill": 0.0}, {"anchor_space": "input", "criterion": "magnitude"}]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("config", ANY_LENGTH)
@torch.no_grad()
def test_right_for_every_length(way, merged, config):
    model = net(merged, **config)
    exported = way(model, torch.randn(2, 5, 8))
    for tokens in (2, 5, 9):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, export_strict])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("prefill", [0.5, "dense"])
@torch.no_grad()
def test_a_split_by_the_number_of_tokens_is_refused(way, merged, prefill):
    model = net(merged, prefill=prefill)
    for tokens in (5, 1):
        with pytest.raises(Exception, match=f"prefill={prefill!r} leaves tokens dense by their number"):
            way(model, torch.randn(2, tokens, 8))
    assert torch.isfinite(model(torch.randn(2, 5, 8))).all()


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_token_sparse_inside_its_block(way):
    model = net(prefill=0.5)
    with every_token_sparse(model):
        exported = way(model, torch.randn(2, 5, 8))
        x = torch.randn(2, 9, 8)
        want = model(x)
    torch.testing.assert_close(exported(x), want)


@pytest.mark.slow
@torch.no_grad()
def test_compiling_with_a_share_stays_exact():
    model = net(prefill=0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for tokens in (1, 4, 5, 9):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(compiled(x), model(x))
