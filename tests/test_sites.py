# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapter layers and merged layers are sites alike: blocks, evaluation and reports work on both."""

import pytest
import torch
from models import MODELS, inputs, logits
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_spon import SponConfig, calibrate, dense_mode, evaluate, every_token_sparse, without_anchors
from peft_spon.sites import resolve_sites, sites


def adapted(family="llama", **kwargs):
    model = get_peft_model(MODELS[family](), SponConfig(init_weights=False, **{"sparsity": 0.5, **kwargs})).eval()
    calibrate(model, [inputs(family, rows=4, tokens=16)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("fields", [{}, {"prefill": "dense"}, {"anchor_space": "input", "gain": False}])
def test_blocks_do_to_a_merged_model_what_they_do_to_the_adapter(family, fields):
    adapter, merged = adapted(family, **fields), adapted(family, **fields).merge_and_unload()
    assert list(sites(adapter)) == list(sites(merged))
    dense = logits(MODELS[family](), family)
    for block in (dense_mode, without_anchors, every_token_sparse):
        before = logits(merged, family)
        with block(adapter), block(merged):
            found, wanted = logits(merged, family), logits(adapter, family)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(found, dense) == (
                block is dense_mode or (block is without_anchors and bool(fields.get("prefill")))
            )
        assert torch.equal(logits(merged, family), before), "as it was"


def test_a_merged_model_and_a_merged_folder_are_evaluated_like_the_adapter(tmp_path):
    adapter, data = adapted(), [inputs("llama", rows=4, tokens=16)]
    wanted = evaluate(adapter, data)
    merged = adapter.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for model in (merged, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        found = evaluate(model, data)
        assert str(found) == str(wanted)
        assert found.dense.kl == 0
        assert found.layer_sparsity == pytest.approx(wanted.layer_sparsity)
    assert wanted.anchored.kl != wanted.sparse.kl
    with pytest.raises(ValueError, match="has no SPON adapter"):
        evaluate(merged, data, adapter_name="default")


def test_a_merged_model_without_anchors_has_no_row_for_them():
    model = adapted(anchor_modules=[]).merge_and_unload()
    result = evaluate(model, [inputs("llama")])
    assert result.anchored is None
    assert result.sparse.sparsity > 0.3


@pytest.mark.parametrize("call", [dense_mode, without_anchors, every_token_sparse])
def test_a_model_that_is_nowhere_sparse_is_an_error_not_a_silent_dense_one(call, llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse layer"), call(llama):
        pass
    with pytest.raises(ValueError, match="has no sparse layer"):
        evaluate(llama, [inputs("llama")])


def test_sites_of_one_adapter():
    model = adapted()
    model.add_adapter("other", SponConfig(target_modules=["q_proj"], criterion="topk"))
    name, found = resolve_sites(model, None)
    assert (name, len(found)) == ("default", 14)
    model.set_adapter("other")
    name, found = resolve_sites(model, "other")
    assert (name, len(found)) == ("other", 2)
