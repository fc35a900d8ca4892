# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spon.criteria import CRITERIA, Wina, entries_kept, keep_above, keep_top_k


X = torch.tensor([[3.0, -1.0, 0.5, -4.0], [0.3, -0.1, 0.05, -0.4]])
NORMS = torch.tensor([1.0, 10.0, 1.0, 0.5])


def score(name, x=X):
    return CRITERIA[name]().score(x, {"column_scale": NORMS})


def test_scores_are_the_documented_formulas():
    assert torch.equal(score("magnitude"), X.abs())
    assert torch.equal(score("topk"), X.abs())
    assert torch.equal(score("wina"), X.abs() * NORMS)
    rms = X.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(score("relative"), X.abs() / rms)
    weighted = X.abs() * NORMS
    torch.testing.assert_close(score("weighted"), weighted / weighted.square().mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(score("robust"), weighted / weighted.mean(-1, keepdim=True))


@pytest.mark.parametrize("name", ["relative", "weighted", "robust"])
def test_relative_scores_do_not_depend_on_the_scale_of_a_token(name):
    torch.testing.assert_close(score(name)[0], score(name)[1])


def test_massive_activations_hardly_move_the_bound_of_robust():
    """Two huge entries among 576: the token's other entries are kept by its mean, and dropped by its mean square."""
    x = torch.randn(1, 576, generator=torch.Generator().manual_seed(0))
    massive = torch.cat([x[:, :-2], torch.tensor([[150.0, -100.0]])], dim=-1)
    kept = {}
    for name in ("weighted", "robust"):
        criterion = CRITERIA[name]()
        usual, other = (criterion.score(part, {"column_scale": torch.ones(576)}) for part in (x, massive))
        threshold = usual.median()
        kept[name] = [float((scores > threshold).float().mean()) for scores in (usual, other)]
    assert kept["weighted"][0] == kept["robust"][0] == 0.5
    assert kept["weighted"][1] < 0.02
    assert kept["robust"][1] > 0.3


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_nan_and_zero_tokens(name):
    x = torch.tensor([[float("nan"), 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    result = score(name, x)
    assert result[0, 0].isnan()
    assert torch.equal(result[1], torch.zeros(4))
    for keep in (keep_above(result, torch.tensor([0.5]), x.dtype), keep_top_k(result, 0.5, x.dtype)):
        assert (x * keep)[0, 0].isnan(), "NaN must not vanish"
        assert torch.equal((x * keep)[1], x[1])


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32(name, dtype):
    assert score(name, X.to(dtype)).dtype == torch.float32


def test_threshold_compares_in_fp32():
    # As a bf16 number the threshold would round up to 0.67578 and drop this entry.
    x = torch.tensor([0.675781], dtype=torch.bfloat16)
    assert keep_above(score("magnitude", x.expand(4)), torch.tensor([0.6745]), torch.bfloat16).all()


def test_wina_norm_order():
    weight = torch.randn(5, 4)
    torch.testing.assert_close(Wina().prepare(weight)["column_scale"], weight.square().sum(0).sqrt())
    torch.testing.assert_close(Wina(norm=1.0).prepare(weight)["column_scale"], weight.abs().sum(0))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 70), sparsity=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_top_k_keeps_exactly_the_k_largest(width, sparsity, seed):
    scores = torch.rand(3, width, generator=torch.Generator().manual_seed(seed))
    mask = keep_top_k(scores, sparsity, torch.float32).bool()
    k = entries_kept(width, sparsity)
    assert 1 <= k <= width
    assert abs(k - (1 - sparsity) * width) <= max(0.5 + 1e-9, 1 - (1 - sparsity) * width)
    assert (mask.sum(-1) == k).all()
    kept, dropped = scores.masked_fill(~mask, 2).amin(-1), scores.masked_fill(mask, -1).amax(-1)
    assert (kept >= dropped).all()


def test_top_k_with_ties_keeps_no_more_than_k():
    assert (keep_top_k(torch.zeros(2, 8), 0.5, torch.float32).sum(-1) == 4).all()
