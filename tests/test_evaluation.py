# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pytest
import torch
import transformers as tf
from lora_models import lora_config
from models import MODELS, VOCAB, inputs
from peak_memory import PeakMemory
from peft import get_peft_model
from test_losses import CAUSAL
from torch.nn import functional as F

from peft_spon import SponConfig, add_lora, calibrate, dense_mode, evaluate, every_token_sparse, without_anchors
from peft_spon.evaluation import continuations, metrics
from peft_spon.evaluation.speed import measure_speed
from peft_spon.sites import spon_layers


def data(rows=4, tokens=16, count=3):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (rows, tokens), generator=generator) for _ in range(count)]


@torch.no_grad()
def naive(model, batches, context):
    """Perplexity and KL of everything at once, by the definitions."""
    nll, kl, same = [], [], []
    for ids in batches:
        with dense_mode(model):
            dense = model(input_ids=ids).logits[:, :-1].double()
        with context:
            logits = model(input_ids=ids).logits[:, :-1].double()
        p, q = F.log_softmax(dense, -1), F.log_softmax(logits, -1)
        nll.append(-q.gather(-1, ids[:, 1:, None]).flatten())
        kl.append((p.exp() * (p - q)).sum(-1).flatten())
        same.append((p.argmax(-1) == q.argmax(-1)).flatten())
    nll, kl, same = torch.cat(nll), torch.cat(kl), torch.cat(same)
    ppl = nll.mean().exp()
    return (
        ppl.item(),
        (ppl * nll.std(correction=0) / len(nll) ** 0.5).item(),
        kl.mean().item(),
        same.double().mean().item(),
    )


def test_scores_are_the_definitions(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.6, init_weights=False)).eval()
    calibrate(model, data())
    result = evaluate(model, data())
    contexts = {"dense": dense_mode(model), "sparse": without_anchors(model), "anchored": torch.no_grad()}
    for name, context in contexts.items():
        scores = getattr(result, name)
        ppl, error, kl, same = naive(model, [torch.cat(data())], context)
        assert scores.perplexity == pytest.approx(ppl, rel=1e-4), name
        assert scores.standard_error == pytest.approx(error, rel=1e-4)
        assert scores.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert scores.top1_agreement == pytest.approx(same, abs=1e-9)
    assert result.tokens == 3 * 4 * 15
    assert result.dense.sparsity == 0
    assert result.dense.kl == pytest.approx(0, abs=1e-6)
    assert result.dense.top1_agreement == 1


def test_realised_sparsity_is_counted_and_weighted_by_weights(llama):
    pattern = {"down_proj": 0.25}
    model = get_peft_model(llama, SponConfig(sparsity=0.5, sparsity_pattern=pattern, criterion="topk"))
    result = evaluate(model, data())
    total = weights = 0
    for name, layer in spon_layers(model).items():
        share = 0.25 if name.endswith("down_proj") else 0.5
        assert result.layer_sparsity[name] == pytest.approx(share)
        total += share * layer.base_layer.weight.numel()
        weights += layer.base_layer.weight.numel()
    assert result.sparse.sparsity == pytest.approx(total / weights)


def spoil(model, **bias):
    """Give a head without a bias one, zero but for some tokens."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    for token, value in bias.items():
        head.bias.data[int(token.removeprefix("token"))] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_model(llama, value):
    model = get_peft_model(llama, SponConfig(criterion="topk", init_weights=False))
    layer = next(iter(spon_layers(model).values()))
    layer.spon_anchor["default"].data.fill_(value)
    with pytest.raises(
        ValueError, match=r"logits of the sparse \(with anchors\) model are NaN or infinite at 15 of 15"
    ):
        evaluate(model, data())
    llama.model.norm.weight.data.fill_(value)
    with pytest.raises(ValueError, match="logits of the dense model are NaN or infinite at 15 of 15"):
        evaluate(model, data())


def test_tokens_that_are_forbidden_to_all_add_nothing(llama):
    model = get_peft_model(llama, SponConfig(criterion="topk", init_weights=False))
    spoil(llama, token1=-1e4)
    wanted = evaluate(model, data())
    spoil(llama, token1=-math.inf)
    found = evaluate(model, data())
    for name in ("dense", "sparse", "anchored"):
        for field in ("perplexity", "standard_error", "kl", "top1_agreement"):
            assert getattr(getattr(found, name), field) == pytest.approx(
                getattr(getattr(wanted, name), field), rel=1e-6, abs=1e-9
            )
    spoil(llama, token5=-math.inf)
    assert any((ids[:, 1:] == 5).any() for ids in data())
    with pytest.raises(ValueError, match="dense model gives the token 5 of the data the probability 0.*-100"):
        evaluate(model, data())


def test_a_perplexity_that_overflows_is_infinite(llama):
    model = get_peft_model(llama, SponConfig(criterion="topk"))
    llama.lm_head.weight.data.mul_(1e6)
    result = evaluate(model, data())
    assert result.dense.perplexity == result.dense.standard_error == math.inf
    assert math.isfinite(result.sparse.kl)
    assert "inf" in str(result)
    assert math.isnan(result.damage_removed)


def variants():
    """Models whose logits are made in ways of their own, and how exact they are."""
    for name, make in CAUSAL.items():
        yield pytest.param(lambda make=make: get_peft_model(make(), SponConfig(init_weights=False)), 1e-5, id=name)

    def merged():
        return get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).merge_and_unload()

    def sparse_head():
        config = SponConfig(init_weights=False, target_modules=["lm_head", "down_proj"])
        return get_peft_model(MODELS["llama"](), config)

    yield pytest.param(merged, 1e-5, id="merged")
    yield pytest.param(sparse_head, 1e-5, id="sparse head")
    yield pytest.param(lambda: sparse_head().merge_and_unload(), 1e-5, id="sparse head, merged")
    yield pytest.param(
        lambda: get_peft_model(MODELS["llama"](), SponConfig(init_weights=False, modules_to_save=["lm_head"])),
        1e-5,
        id="modules_to_save",
    )
    yield pytest.param(
        lambda: add_lora(
            get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)),
            lora_config(target_modules=["lm_head", "q_proj"]),
        ),
        1e-5,
        id="LoRA on the head",
    )
    yield pytest.param(
        lambda: get_peft_model(MODELS["llama"]().bfloat16(), SponConfig(init_weights=False)), 0.02, id="bf16"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("make", "exactness"), variants())
def test_the_scores_of_every_kind_of_head_are_those_of_the_models_own_logits(make, exactness, monkeypatch):
    monkeypatch.setattr(metrics, "MIN_CHUNK_ELEMENTS", 4 * VOCAB)  # chunks that do not fit the rows
    model = make().eval()
    result = evaluate(model, data(count=1))
    last = result.sparse if result.anchored is None else result.anchored
    ppl, _, kl, same = naive(model, data(count=1), every_token_sparse(model))
    assert last.perplexity == pytest.approx(ppl, rel=exactness)
    assert last.kl == pytest.approx(kl, rel=10 * exactness, abs=1e-6)
    assert last.top1_agreement == pytest.approx(same, abs=0.04 if exactness > 1e-3 else 1e-9)


WIDE = {"vocab_size": 262_144, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def wide_llama():
    config = tf.LlamaConfig(**WIDE, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config), {}


def wide_t5():
    config = tf.T5Config(vocab_size=262_144, d_model=128, d_kv=32, d_ff=256, num_layers=1, decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config), {"labels": torch.randint(3, 97, (2, 32))}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("make", [wide_llama, wide_t5])
def test_memory_is_that_of_a_forward_without_logits_and_a_little(make):
    """With a vocabulary of 262,144; benchmarks/evaluation_memory.py measures it at 8 x 512 tokens."""
    base, more = make()
    model = get_peft_model(base.eval(), SponConfig(criterion="topk"))
    batch = {"input_ids": torch.randint(3, 97, (2, 32)), **more}
    head = base.get_output_embeddings()
    with PeakMemory(model) as without, dense_mode(model):
        handle = head.register_forward_pre_hook(lambda module, args: args[0][:1, :1])
        base(input_ids=batch["input_ids"], **({"decoder_input_ids": batch["labels"]} if more else {}))
        handle.remove()
    with PeakMemory(model) as memory:
        evaluate(model, [batch])
    assert 1 < memory.peak / without.peak <= 1.3
    with PeakMemory(model) as with_logits, dense_mode(model):
        model(**batch)
    assert with_logits.peak / without.peak > 1.4, "or this would measure nothing"


def test_the_interval_is_of_the_same_tokens_and_of_rows_that_are_independent(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.7, init_weights=False)).eval()
    result = evaluate(model, data())
    ids = torch.cat(data())
    with torch.no_grad():
        nll = []
        for context in (dense_mode(model), torch.no_grad()):
            with context:
                logits = model(input_ids=ids).logits[:, :-1].double()
            nll.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(12, 15))
    by_row = (nll[1] - nll[0]).mean(1)  # all rows have as many tokens
    error = by_row.std() / 12**0.5
    wanted = [(by_row.mean() + z * error).exp().item() for z in (-1.96, 0, 1.96)]
    low, high = result.anchored.ratio_interval
    assert [low, result.anchored.perplexity_ratio, high] == pytest.approx(wanted, rel=1e-4)
    assert result.anchored.perplexity_ratio == pytest.approx(result.anchored.perplexity / result.dense.perplexity)
    assert result.dense.ratio_interval == (1, 1)
    alone = evaluate(model, [data()[0][:1]])
    assert alone.sparse.ratio_interval == (0, math.inf), "one row says nothing of others"
    assert "x dense (95 %)" in str(result)
    assert f"{result.sparse.perplexity_ratio:.3f} (" in str(result)


def test_scores_by_position(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.7, init_weights=False)).eval()
    ids = torch.cat(data(rows=2, tokens=80))
    whole = evaluate(model, [ids])
    assert [(row.first, row.last, row.tokens) for row in whole.by_position] == [
        (0, 15, 6 * 15),
        (16, 63, 6 * 48),
        (64, 255, 6 * 16),
    ]
    labels = ids.clone()
    labels[:, :16] = labels[:, 64:] = -100
    alone = evaluate(model, [{"input_ids": ids, "labels": labels}])
    (row,) = alone.by_position
    assert row == whole.by_position[1]
    assert (row.kl, row.perplexity, row.top1_agreement) == pytest.approx(
        (alone.anchored.kl, alone.anchored.perplexity, alone.anchored.top1_agreement)
    )
    assert row.dense_perplexity == pytest.approx(alone.dense.perplexity)
    assert "16 to 63" in whole.position_table()
    # Padding on the left does not count.
    padded = F.pad(ids, (7, 0))
    mask = F.pad(torch.ones_like(ids), (7, 0))
    shifted = evaluate(model, [{"input_ids": padded, "attention_mask": mask}])
    assert [row.tokens for row in shifted.by_position] == [row.tokens for row in whole.by_position]
    assert [row.kl for row in shifted.by_position] == pytest.approx([row.kl for row in whole.by_position], rel=1e-3)


@torch.no_grad()
def continued(model, prompt, context):
    """The most likely tokens one by one, without a cache, up to and with the end of text."""
    ids = prompt[None]
    with context, every_token_sparse(model):
        for _ in range(continuations.NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 2:
                break
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("end", [True, False])
def test_greedy_continuations_are_compared(end, llama, monkeypatch):
    monkeypatch.setattr(continuations, "NEW_TOKENS", 12)
    llama.lm_head.weight.data[2] *= 3 if end else 0  # the end of the text comes soon, or never
    model = get_peft_model(llama, SponConfig(sparsity=0.5, init_weights=False, criterion="topk")).eval()
    batches = [*data(rows=2, tokens=20, count=1), *data(rows=1, tokens=13, count=1)]
    result = evaluate(model, batches, continuations=3)
    prompts = [batches[0][0, :10], batches[0][1, :10], batches[1][0, :6]]
    for scores, context in (
        (result.dense, lambda: dense_mode(model)),
        (result.sparse, lambda: without_anchors(model)),
        (result.anchored, torch.no_grad),
    ):
        prefix, same, places = [], 0, 0
        for prompt in prompts:
            dense, own = continued(model, prompt, dense_mode(model)), continued(model, prompt, context())
            equal = [a == b for a, b in zip(dense, own, strict=False)]
            prefix.append(equal.index(False) if False in equal else len(equal))
            same, places = same + sum(equal), places + len(dense)
        found = scores.continuations
        assert found.prompts == 3
        assert (found.common_prefix, found.token_agreement) == pytest.approx((sum(prefix) / 3, same / places))
    assert result.dense.continuations.token_agreement == 1
    assert "sparse: greedy continuations of 3 prompts follow" in str(result)
    assert evaluate(model, batches).sparse.continuations is None
    with pytest.raises(ValueError, match="continuations is -1; use 0"):
        evaluate(model, batches, continuations=-1)
    with pytest.raises(ValueError, match="leave it out for an encoder-decoder"):
        evaluate(get_peft_model(MODELS["t5"](), SponConfig()), [inputs("t5")], continuations=1)


def test_table_and_damage_removed(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.6))
    result = evaluate(model, data())
    assert result.anchored == result.sparse, "zero anchors change nothing"
    table = str(result)
    assert [line.split("  ")[0].strip() for line in table.splitlines()[1:4]] == ["dense", "sparse", "sparse + anchors"]
    assert "180 predicted tokens; 14 sparse layers, S on every token" in table
    assert len(result.layer_table().splitlines()) == 14
    assert result.damage_removed == 0 or math.isnan(result.damage_removed)


def test_adapter_without_anchors_has_no_third_row(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.6, anchor_modules=[]))
    result = evaluate(model, data())
    assert result.anchored is None
    assert math.isnan(result.damage_removed)
    assert "sparse + anchors" not in str(result)
    assert result.sparse.sparsity > 0.5
    model.add_adapter("other", SponConfig())
    with pytest.raises(ValueError, match=r"'other' is not active; call model.set_adapter\('other'\)"):
        evaluate(model, data(), adapter_name="other")


def test_every_token_overrides_prefill(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.6, prefill="dense", criterion="topk"))
    assert evaluate(model, data()).sparse.sparsity == pytest.approx(0.6, abs=0.02)
    as_served = evaluate(model, data(), every_token=False)
    assert as_served.sparse.sparsity == 0
    assert as_served.sparse.perplexity == pytest.approx(as_served.dense.perplexity, rel=1e-6)
    assert "prefill='dense'" in str(as_served)


def test_padding_and_labels_are_respected(llama):
    model = get_peft_model(llama, SponConfig())
    ids = data(rows=2, count=1)[0]
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    padded = evaluate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded.tokens == 15 + 9
    left = torch.stack([ids[0], ids[1].roll(6)])
    mask_left = torch.stack([mask[0], mask[1].roll(6)])
    from_left = evaluate(model, [{"input_ids": left, "attention_mask": mask_left}])
    assert from_left.tokens == 15 + 9, "no token is predicted from padding"
    alone = evaluate(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :10]}])
    for found in (padded, from_left):
        assert found.sparse.perplexity == pytest.approx(alone.sparse.perplexity, rel=1e-4)
        assert found.sparse.sparsity == pytest.approx(alone.sparse.sparsity, abs=1e-9), "padding is not counted"
    labels = ids.clone()
    labels[:, :8] = -100
    assert evaluate(model, [{"input_ids": ids, "labels": labels}]).tokens == 2 * 8


def test_disabled_adapters_are_not_evaluated_as_sparse_ones(llama):
    model = get_peft_model(llama, SponConfig())
    with model.disable_adapter():
        for call in (evaluate, lambda *args: calibrate(*args, on_sparse=True)):
            with pytest.raises(ValueError, match="adapters are disabled"):
                call(model, data())


def test_modules_keep_their_own_modes(llama):
    model = get_peft_model(llama, SponConfig()).train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, data(), progress=False)
    evaluate(model, data(), progress=False)
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_modules_to_save_are_not_part_of_the_dense_model(llama):
    plain = MODELS["llama"]().eval()
    model = get_peft_model(llama, SponConfig(modules_to_save=["lm_head"])).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(3)
    ids = data()[0]
    with torch.no_grad(), dense_mode(model):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_encoder_decoder_and_models_without_a_head():
    model = get_peft_model(MODELS["t5"](), SponConfig())
    assert evaluate(model, [inputs("t5")]).tokens == 15
    with pytest.raises(ValueError, match="batches with labels"):
        evaluate(model, data())
    for base, kind in ((MODELS["llama"]().model, "LlamaModel"), (MODELS["bert"](), "BertForMaskedLM")):
        with pytest.raises(ValueError, match=f"{kind} predicts no next token"):
            evaluate(get_peft_model(base, SponConfig()), data())
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(get_peft_model(MODELS["llama"](), SponConfig()), [torch.ones(3, 1, dtype=torch.long)])


def test_speed_is_of_all_tokens_though_the_model_ends_its_text(llama):
    llama.generation_config.eos_token_id = list(range(VOCAB))  # whatever it says first
    ids, ticks = inputs("llama", rows=2)["input_ids"], itertools.count()
    found = measure_speed({"a": lambda: llama, "b": lambda: llama}, ids, 5, 2, lambda: next(ticks))
    assert found["a"].token == 1
    assert next(ticks) == 2 * 3 * (1 + 5), "two models, three turns, the beginning and five tokens"
    assert llama.generation_config.eos_token_id == list(range(VOCAB))
    for problem, sizes in (("new_tokens is 1: the first comes", (1, 2)), ("rounds is 0", (5, 0))):
        with pytest.raises(ValueError, match=problem):
            measure_speed({"a": lambda: llama}, ids, *sizes)


def test_speed_with_arguments_of_generate(llama):
    seen, plain = [], llama.generate
    llama.generate = lambda **given: (seen.append(given["cache_implementation"]), plain(**given))
    measure_speed({"a": lambda: llama}, inputs("llama")["input_ids"], 3, 1, cache_implementation="static")
    assert seen == ["static"] * 2
