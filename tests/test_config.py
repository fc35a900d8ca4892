# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from peft import PeftConfig

import peft_spon
from peft_spon import SponConfig


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0; use a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": "half"}, "sparsity is 'half'"),
        ({"sparsity": True}, "sparsity is True"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity_pattern": {"down_proj": 2}}, r"sparsity_pattern\['down_proj'\] is 2"),
        ({"sparsity_pattern": {"(": 0.5}}, "not a regular expression"),
        (
            {"criterion": "magnitud"},
            "is 'magnitud'; use one of magnitude, relative, topk, wina, weighted, robust",
        ),
        ({"criterion": "magnitude", "criterion_kwargs": {"norm": 1}}, r"has \['norm'\] but the dials .* are none"),
        ({"criterion": "wina", "criterion_kwargs": {"norm": 0}}, "norm is 0; use a number above 0"),
        ({"anchor_space": "middle"}, "anchor_space is 'middle'; use one of input, output"),
        ({"prefill": "none"}, "prefill is 'none'"),
        ({"prefill": 1.5}, "prefill is 1.5"),
        ({"layers_pattern": "layers"}, "layers_to_transform is not set"),
        ({"target_modules": ".*proj", "layers_to_transform": [0]}, "put the block index into it"),
        ({"peft_spon_version": "99.0.0"}, "saved by peft_spon 99.0.0, newer than .* pip install -U peft_spon"),
        ({"peft_spon_version": "tomorrow"}, "'tomorrow', which is not a version"),
    ],
)
def test_bad_settings_say_what_which_value_and_the_remedy(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SponConfig(**kwargs)


def test_the_default_criterion():
    assert SponConfig().criterion == "magnitude"


def test_index_zero_in_layers_to_transform_counts_as_set():
    assert SponConfig(layers_pattern="layers", layers_to_transform=0).layers_to_transform == 0


def test_every_dial_survives_saving(tmp_path):
    config = SponConfig(
        sparsity=0.7,
        sparsity_pattern={"down_proj": 0.9},
        criterion="wina",
        criterion_kwargs={"norm": 1.0},
        target_modules=["q_proj", "down_proj"],
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        anchor_modules=["down_proj"],
        anchor_space="input",
        gain=True,
        init_weights=False,
        prefill=0.25,
        modules_to_save=["lm_head"],
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SponConfig
    assert loaded.to_dict() == config.to_dict()
    assert loaded.peft_spon_version == peft_spon.__version__
    assert loaded.peft_type == "SPON"


def test_unknown_field_of_the_same_version_is_dropped_with_one_warning(tmp_path):
    SponConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**saved, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future") as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
