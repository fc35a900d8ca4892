# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import socket

import pytest
import torch
import torch.multiprocessing as mp
import transformers as tf
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, VOCAB, build, inputs, logits
from peft import get_peft_model
from torch import nn
from torch.nn.functional import pad

from peft_spon import CRITERIA, SponConfig, allocate, calibrate, evaluate
from peft_spon.criteria import threshold_at
from peft_spon.modes import dense_mode
from peft_spon.sites import spon_layers
from peft_spon.statistics import ScoreHistogram, bin_counts


THRESHOLD_CRITERIA = sorted(name for name, c in CRITERIA.items() if c.selects == "threshold")


def batches(count=4, rows=4, tokens=32):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, VOCAB, (rows, tokens), generator=generator)} for _ in range(count)]


def scores_seen(model, data, adapter="default"):
    """Every layer's scores on the dense model, kept in full: what the streaming pass must agree with."""
    seen = {name: [] for name in spon_layers(model)}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(m.score(args[0], adapter).flatten())
        )
        for name, layer in spon_layers(model).items()
    ]
    with torch.no_grad(), dense_mode(model):
        for batch in data:
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from(["normal", "lognormal", "uniform", "heavy", "tiny", "huge", "relu"]),
    sparsity=st.floats(0.01, 0.99),
    parts=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_streamed_thresholds_against_exact_quantiles(shape, sparsity, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(40_000, generator=generator)
    x = {
        "normal": normal,
        "lognormal": (2 * normal).exp(),
        "uniform": torch.rand(40_000, generator=generator),
        "heavy": normal / torch.rand(40_000, generator=generator),
        "tiny": normal * 1e-20,
        "huge": normal * 1e20,
        "relu": normal.relu(),
    }[shape].abs()
    histogram = ScoreHistogram(x.device)
    for part in x.chunk(parts):
        histogram.add(bin_counts(part))
    assert histogram.total == len(x)
    threshold = threshold_at(histogram.quantiles(), sparsity)
    zeros = (x == 0).double().mean().item()
    realised = (x <= threshold).double().mean().item()
    assert abs(realised - max(sparsity, zeros)) <= 0.005
    assert abs(histogram.share_below(threshold.item()) - realised) <= 0.005


def test_quantiles_and_shares_inside_a_bin_are_linear():
    """The bin from 1 to 1 + 1/128, and half of the scores in each of two bins far apart."""
    edges = torch.tensor([1.0, 1 + 1 / 128])
    histogram = ScoreHistogram(edges.device)
    histogram.add(bin_counts(torch.linspace(*edges, 1001)[:-1]))
    assert int((histogram.counts > 0).sum()) == 1
    torch.testing.assert_close(histogram.quantiles(), torch.linspace(*edges, 257), rtol=1e-7, atol=0)
    for share in (0.0, 0.25, 0.5, 0.875):
        assert histogram.share_below(1 + share / 128) == pytest.approx(share, abs=1e-6)
    histogram.add(bin_counts(torch.full((1000,), 64.0)))
    assert histogram.share_below(1 + 0.5 / 128) == pytest.approx(0.25, abs=1e-6)
    assert histogram.share_below(64.25) == pytest.approx(0.75, abs=1e-6)  # the bin is 0.5 wide
    assert histogram.quantiles(5)[[1, 3]].tolist() == pytest.approx([1 + 0.5 / 128, 64.25], rel=1e-6)


@pytest.mark.parametrize("criterion", THRESHOLD_CRITERIA)
@pytest.mark.parametrize(
    "sparsity", [pytest.param(0.25, marks=pytest.mark.slow), 0.6, pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_every_layer_is_within_half_a_point_of_the_wanted_sparsity(family, criterion, sparsity):
    model = get_peft_model(MODELS[family](), SponConfig(sparsity=sparsity, criterion=criterion))
    data = [inputs(family, rows=16, tokens=32)]
    if "labels" in data[0]:
        data[0]["labels"] = data[0]["input_ids"].flip(1)
    result = calibrate(model, data)
    seen = scores_seen(model, data)
    for layer in result.layers:
        adapted = spon_layers(model)[layer.name]
        tau, sparsifier = adapted.spon_threshold["default"], adapted.sparsifier("default")
        zeroed = (seen[layer.name] <= tau).double().mean().item()
        zeros = (seen[layer.name] == 0).double().mean().item()  # ReLU's, which no threshold can keep apart
        assert abs(zeroed - max(sparsifier.zeroed_share, zeros)) <= 0.005, layer
        assert abs(layer.realised - sparsifier.unread(zeroed)) <= 0.005
        assert layer.threshold == tau.item()
    assert len(result.layers) == len(spon_layers(model))


def test_result_prints_a_line_per_layer(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.6))
    lines = str(calibrate(model, batches())).splitlines()
    assert len(lines) == 15
    assert "512 tokens" in lines[0]
    assert lines[1].startswith("model.layers.0.self_attn.q_proj")
    assert "60.0%" in lines[1]


def test_set_sparsity_needs_no_data_and_equals_a_fresh_calibration(llama):
    model = get_peft_model(llama, SponConfig(sparsity=0.3))
    calibrate(model, batches())
    model.set_sparsity(0.7, {"down_proj": 0.5})
    fresh = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.7, sparsity_pattern={"down_proj": 0.5}))
    calibrate(fresh, batches())
    for name, layer in spon_layers(model).items():
        assert torch.equal(layer.spon_threshold["default"], spon_layers(fresh)[name].spon_threshold["default"])
    assert torch.equal(logits(model, "llama"), logits(fresh, "llama"))
    assert model.peft_config["default"].sparsity_pattern == {"down_proj": 0.5}
    with pytest.raises(ValueError, match="sparsity is 1"):
        model.set_sparsity(1)
    with pytest.raises(ValueError, match="'dwn_proj', which no targeted layer matches"):
        model.set_sparsity(0.5, {"dwn_proj": 0.5})
    with pytest.raises(ValueError, match=r"no SPON adapter 'x'; the model has \['default'\]"):
        model.set_sparsity(0.5, adapter_name="x")
    assert torch.equal(logits(model, "llama"), logits(fresh, "llama"))


@pytest.mark.parametrize("measure", ["calibrate", "allocate"])
def test_an_encoders_padding_is_not_the_decoders(measure):
    """Also where both have rows of one length, and a mask might be of either."""
    batch = {**inputs("t5", rows=4, tokens=12), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].flip(1)
    batch["attention_mask"][:2, 4:] = 0
    longer = {key: value if key == "labels" else pad(value, (0, 3)) for key, value in batch.items()}
    found = []
    for data in (batch, longer):
        model = get_peft_model(MODELS["t5"](), SponConfig(sparsity=0.5, criterion="magnitude"))
        calibrate(model, [data], progress=False)
        if measure == "allocate":
            allocation = allocate(model, [data], progress=False)
            found.append(torch.tensor([allocation.tokens, *(layer.kl for layer in allocation.layers)]))
            assert allocation.tokens == 48
        else:
            found.append(torch.stack([layer.spon_threshold["default"] for layer in spon_layers(model).values()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_padding_does_not_count(family):
    """A padded batch calibrates to the thresholds of the same tokens without padding."""
    if family == "t5":
        pytest.skip("T5's relative positions make padded and unpadded activations differ")
    padded = inputs(family, rows=4, tokens=12)
    mask = torch.ones_like(padded["input_ids"])
    mask[2:, 8:] = 0
    padded["attention_mask"] = mask
    rows = [padded["input_ids"][:2], padded["input_ids"][2:, :8]]
    config = SponConfig(sparsity=0.5, criterion="magnitude")
    a, b = (get_peft_model(MODELS[family](), config) for _ in range(2))
    calibrate(a, [padded])
    calibrate(b, rows)
    for x, y in zip(spon_layers(a).values(), spon_layers(b).values(), strict=True):
        torch.testing.assert_close(x.spon_threshold["default"], y.spon_threshold["default"], rtol=5e-3, atol=1e-6)


def test_layers_that_share_an_input_share_the_work(llama, monkeypatch):
    model = get_peft_model(llama, SponConfig(criterion="magnitude"))
    calls = []
    monkeypatch.setattr("peft_spon.statistics.bin_counts", lambda s: calls.append(1) or bin_counts(s))
    calibrate(model, batches(count=1))
    assert len(calls) == 2 * 4, "per block: q k v share, o, gate up share, down"


@pytest.mark.slow
def test_second_pass_fits_what_the_sparse_model_sees():
    data = batches(count=8)
    realised = {}
    for on_sparse in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.7, criterion="magnitude", anchor_modules=[]))
        calibrate(model, data, on_sparse=on_sparse)
        shares = evaluate(model, data).layer_sparsity.values()
        realised[on_sparse] = max(abs(share - 0.7) for share in shares)
    assert realised[True] < realised[False]
    assert realised[True] < 0.03


def test_calibration_leaves_mode_and_dense_function_alone(llama):
    dense = logits(llama, "llama")
    model = get_peft_model(llama, SponConfig()).train()
    calibrate(model, batches())
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in spon_layers(model).values())
    with model.eval().disable_adapter():
        assert torch.equal(logits(model, "llama"), dense)


@pytest.mark.parametrize("criterion", ["topk", "wina"])
def test_top_k_criteria_need_no_thresholds_but_report(llama, criterion):
    model = get_peft_model(llama, SponConfig(sparsity=0.6, criterion=criterion))
    result = calibrate(model, batches())
    assert not model.peft_config["default"].calibrated
    assert all(layer.threshold is None and abs(layer.realised - 0.6) < 0.02 for layer in result.layers)


def test_offloaded_layers(llama):
    """accelerate's offloading leaves weights on "meta" and brings them in for each call."""
    config = SponConfig(sparsity=0.6, criterion="weighted")  # reads the weights
    plain = get_peft_model(MODELS["llama"](), config)
    calibrate(plain, batches())
    model = get_peft_model(cpu_offload(llama, execution_device="cpu"), config)
    assert model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight.is_meta
    calibrate(model, batches())
    for a, b in zip(spon_layers(model).values(), spon_layers(plain).values(), strict=True):
        torch.testing.assert_close(a.spon_threshold["default"], b.spon_threshold["default"], rtol=1e-4, atol=1e-6)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("already", [False, True])
def test_nan_activations_name_the_layer_and_change_nothing(llama, already):
    model = get_peft_model(llama, SponConfig())
    if already:
        calibrate(model, batches())
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.down_proj' are NaN or infinite"):
        calibrate(model, batches())
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) or before[k].isnan().any() for k in before)
    assert model.peft_config["default"].calibrated is already
    assert not any(layer._forward_pre_hooks for layer in spon_layers(model).values())


def test_failing_second_pass_restores_the_first(llama):
    model = get_peft_model(llama, SponConfig())
    data = batches()
    before = snapshot(model)

    class BreaksOnSecondRead(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(data) if self.reads <= 2 else iter([{"input_ids": torch.full((1, 4), 10**6)}])

    with pytest.raises(IndexError):
        calibrate(model, BreaksOnSecondRead(data), on_sparse=True)
    assert snapshot(model).keys() == before.keys()
    assert not model.peft_config["default"].calibrated
    logits(model, "llama")


class NoTokens:
    eos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": []}


@pytest.mark.parametrize("data", [[], iter([]), [""], [torch.zeros(0, 4, dtype=torch.long)]])
def test_empty_data(llama, data):
    model = get_peft_model(llama, SponConfig())
    with pytest.raises(ValueError, match="The data (is empty|holds no tokens)"):
        calibrate(model, data, NoTokens())


def test_model_without_spon(llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no SPON adapter; add one: get_peft_model"):
        calibrate(llama, batches())


def test_iterator_cannot_be_read_twice(llama):
    model = get_peft_model(llama, SponConfig())
    with pytest.raises(ValueError, match="reads the data twice, but it is an iterator"):
        calibrate(model, iter(batches()), on_sparse=True)


def test_layer_no_token_reaches():
    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids):
            return self.used(self.embed(input_ids))

    model = get_peft_model(TwoPaths(), SponConfig(target_modules=["used", "unused"]))
    with pytest.raises(ValueError, match="No token of the data reached layer 'unused'.*exclude_modules"):
        calibrate(model, [torch.arange(8).view(2, 4)])


def whisper():
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 20}
    special = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.WhisperConfig(vocab_size=VOCAB, d_model=32, max_target_positions=32, **layers, **sizes, **special)
    model = build(tf.WhisperForConditionalGeneration, config)
    batch = {"input_features": torch.randn(3, 8, 40), "labels": torch.randint(3, VOCAB, (3, 6))}
    return model, batch, 18


PICTURE = {"image_size": 16, "patch_size": 4}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit():
    return build(tf.ViTForImageClassification, tf.ViTConfig(**TOWER, **PICTURE)), {"pixel_values": pictures(3)}, 3


def wav2vec2():
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 4), "num_conv_pos_embeddings": 4}
    model = build(tf.Wav2Vec2ForCTC, tf.Wav2Vec2Config(**TOWER, **convolutions, num_feat_extract_layers=2))
    return model, {"input_values": torch.randn(2, 800)}, 2


def llava():
    text = {**TOWER, "vocab_size": VOCAB, "num_key_value_heads": 2, "model_type": "llama"}
    vision = {**TOWER, **PICTURE, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96, vision_feature_layer=-1)
    ids = torch.randint(3, 90, (2, 24))
    ids[:, 2:18] = 96
    batch = {"input_ids": ids, "pixel_values": pictures(2)}
    return build(tf.LlavaForConditionalGeneration, config), batch, 48


def bert_from_embeddings():
    return MODELS["bert"](), {"inputs_embeds": torch.randn(2, 9, 32)}, 18


def pictures(count):
    return torch.randn(count, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("make", [whisper, vit, wav2vec2, llava, bert_from_embeddings])
def test_any_batch_that_the_model_takes(make):
    """The thresholds are the quantiles of what the layers see, whatever the model reads."""
    base, batch, tokens = make()
    model = get_peft_model(base, SponConfig(sparsity=0.6))
    result = calibrate(model, [batch, {**batch, "name": "x"}], progress=False)
    assert result.tokens == 2 * tokens
    seen = scores_seen(model, [batch])
    for layer in result.layers:
        realised = (seen[layer.name] <= layer.threshold).double().mean().item()
        assert abs(realised - 0.6) <= 0.01, layer
    assert calibrate(model, [batch] * 3, max_tokens=2 * tokens, progress=False).tokens == 2 * tokens
    assert calibrate(model, batch, max_tokens=1, progress=False).tokens in (
        1,
        tokens,
        tokens // len(next(iter(batch.values()))),
    )


def test_evaluation_of_speech_to_text():
    base, batch, tokens = whisper()
    model = get_peft_model(base, SponConfig(sparsity=0.6)).eval()
    result = evaluate(model, [batch] * 2, progress=False)
    assert result.tokens == 2 * tokens
    with torch.no_grad(), dense_mode(model):
        nll = torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    assert result.dense.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


def _calibrate_in_process(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6))
    calibrate(model, batches()[rank::2], progress=False)
    taus = [layer.spon_threshold["default"].item() for layer in spon_layers(model).values()]
    queue.put((rank, torch.distributed.get_world_size(), taus))
    torch.distributed.destroy_process_group()


def test_two_processes_with_half_the_data_each_equal_one_with_all():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")  # importing anew takes longest
    queue = context.Queue()
    workers = [context.Process(target=_calibrate_in_process, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert [r[:2] for r in results] == [(0, 2), (1, 2)]
    model = get_peft_model(MODELS["llama"](), SponConfig(sparsity=0.6))
    calibrate(model, batches())
    alone = [layer.spon_threshold["default"].item() for layer in spon_layers(model).values()]
    assert results[0][2] == results[1][2] == alone
