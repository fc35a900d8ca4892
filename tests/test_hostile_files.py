# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Configurations by strangers: patterns that would never end, names that would become code or give paths away."""

import ast
import json
import time

import pytest
import torch
from models import MODELS, logits
from peft import LoraConfig, PeftModel, get_peft_model
from test_merged_checkpoints import merged_model

from peft_spon import SponConfig, add_lora, save_lora
from peft_spon.cards import MARK


HOSTILE = [
    "([a-z._0-9]+)+X",
    "(([a-z._0-9]+)*)+X",
    "((((([a-z._0-9]+)+)+)+)+)+X",
    "(a|[a-z._0-9]|[a-z]+)*X",
    ".*.*.*.*.*.*.*.*.*.*.*.*X",
    "([a-z._0-9]{1,60}){1,60}X",
]
FIELDS = {
    "target_modules": lambda pattern: {"target_modules": pattern},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "anchor_modules": lambda pattern: {"anchor_modules": pattern},
    "sparsity_pattern": lambda pattern: {"sparsity_pattern": {pattern: 0.3}},
    "layers_pattern": lambda pattern: {"layers_pattern": [pattern], "layers_to_transform": [0]},
    "modules_to_save": lambda pattern: {"modules_to_save": [pattern]},
}


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "pattern",
    [*HOSTILE[::3], *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in HOSTILE[1::3] + HOSTILE[2::3])],
)
def test_patterns_that_take_years_are_refused_at_once(llama, field, pattern):
    config = SponConfig(**FIELDS[field](pattern))
    begin = time.thread_time()
    with pytest.raises(ValueError, match=rf"{field}.* is .*, which takes very long to match names such as"):
        get_peft_model(llama, config)
    assert time.thread_time() - begin < 5
    assert torch.equal(logits(llama, "llama"), logits(MODELS["llama"](), "llama"))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x" * 10_000_000, "regular expression of 10,000,000 characters .*give a list of names instead"),
        ("(" * 9_000, "which is not a regular expression"),
        ("a{99999999999999999999}", "which is not a regular expression"),
        ("[a-", "which is not a regular expression"),
    ],
    ids=["long", "nested", "counted", "open"],
)
def test_what_is_no_pattern_is_refused(field, pattern, message):
    with pytest.raises(ValueError, match=rf"{field}.* is .*{message}") as error:
        SponConfig(**FIELDS[field](pattern))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "pattern",
    [
        r".*(q|v)_proj",
        r".*\.layers\.(\d+)\.(self_attn|mlp)\.(?:.*_)?proj",
        r"(?!.*lm_head)(.*\.)?(down|up|gate)_proj",
        r".*layers.*(self_attn|mlp).*(q|k|v|o|up|down|gate).*",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|down_proj).*?)",
        "|".join(f"model.layers.{i}.mlp.(up|down)_proj" for i in range(200)),
    ],
)
def test_usual_patterns_are_not_refused(llama, pattern):
    get_peft_model(llama, SponConfig(target_modules=pattern))


def test_a_hostile_pattern_in_a_file_leaves_the_base_as_it_was(llama, tmp_path):
    get_peft_model(MODELS["llama"](), SponConfig(init_weights=False)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "checksums": None, "target_modules": HOSTILE[0]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="target_modules is .* takes very long"):
        PeftModel.from_pretrained(llama, tmp_path)
    assert not any("spon" in name for name, _ in llama.named_modules())


# ---- cards ---------------------------------------------------------------------------------------------------------

EVIL = [
    'x")\nimport os; os.system("touch hacked")  #',
    'user/base"); import os; os.system("touch hacked"); ("',
    "user/base\n",
    "a`\n```\n# Mine\n```python\nprint(1)",
]


def code(card):
    parts = card.split("```python\n")
    assert len(parts) == 2
    return parts[1].split("```")[0]


def check_card(path, wanted="name-of-the-base-model"):
    tree = ast.parse(code(path.read_text()))
    assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) for node in tree.body)
    assert {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} <= {"peft_spon"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert {call.func.attr for call in calls} == {"from_pretrained"}
    if wanted:
        assert calls[0].args[0].value == wanted
    assert "\n# Mine" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVIL)
def test_a_name_does_not_become_code_in_cards(llama, name, tmp_path):
    wanted = None if name == "user/base\n" else "name-of-the-base-model"
    model = get_peft_model(llama, SponConfig(init_weights=False))
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(tmp_path / "adapter")
    check_card(tmp_path / "adapter" / "README.md", wanted)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")  # what the file says goes into the next card
    check_card(tmp_path / "again" / "README.md", wanted)
    both = add_lora(loaded, LoraConfig(target_modules=["q_proj"]))
    both.peft_config["task"].base_model_name_or_path = name
    save_lora(both, tmp_path / "lora")
    check_card(tmp_path / "lora" / "README.md", wanted)
    merged = merged_model()
    merged.config._name_or_path = name
    merged.save_pretrained(tmp_path / "merged")
    check_card(tmp_path / "merged" / "README.md", None)


def test_names_of_folders_and_classes_do_not_become_code(llama, tmp_path):
    folder = tmp_path / 'a"); import os; ("```'
    model = get_peft_model(llama, SponConfig(init_weights=False))
    model.save_pretrained(folder)
    check_card(folder / "README.md")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"]["base_model_class"] = "X\nimport os"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model.peft_config["default"].save_pretrained(folder, auto_mapping_dict=config["auto_mapping"])
    check_card(folder / "README.md")
    merged_model().save_pretrained(tmp_path / 'b"); ("')
    check_card(tmp_path / 'b"); ("' / "README.md", None)


def test_no_path_of_this_machine_is_in_a_card(llama, tmp_path):
    llama.save_pretrained(tmp_path / "secret" / "base")
    base = type(llama).from_pretrained(tmp_path / "secret" / "base")
    model = get_peft_model(base, SponConfig(init_weights=False))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    both = add_lora(model, LoraConfig(target_modules=["q_proj"]))
    for folder in ("adapter", "own"):
        both.save_pretrained(tmp_path / folder)
    save_lora(both, tmp_path / "lora")
    merged = both.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    cards = list(tmp_path.rglob("README.md"))
    assert len(cards) >= 4
    for card in cards:
        assert "secret" not in card.read_text(), card
        assert ("My own words" in card.read_text()) == ("own" in card.parts)
        assert (MARK in card.read_text()) != ("own" in card.parts)
