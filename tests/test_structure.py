# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: layers import downwards, importing the package stays light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_spon
from peft_spon.config import SponPeftType
from peft_spon.register import register


ROOT = Path(peft_spon.__file__).parent
LEVELS = {
    "_version": 0,
    "budget": 0,
    "checksums": 0,
    "criteria": 0,
    "data": 0,
    "files": 0,
    "kernels": 0,
    "losses": 0,
    "offload": 0,
    "patterns": 0,
    "repair": 0,
    "_peft": 1,
    "base_layer": 1,
    "cards": 1,
    "config": 1,
    "containers": 1,
    "decoder": 1,
    "int8": 1,
    "sparse_linear": 1,
    "transposed": 1,
    "decode": 2,
    "layer": 2,
    "linear": 2,
    "loading": 2,
    "lora": 2,
    "merged": 2,
    "merged_loading": 2,
    "modes": 2,
    "peft_model": 2,
    "prefill": 2,
    "results": 2,
    "sites": 2,
    "taking_over": 2,
    "targets": 2,
    "calibration": 3,
    "head": 3,
    "model": 3,
    "register": 3,
    "sampling": 3,
    "statistics": 3,
    "allocation": 4,
    "batches": 4,
    "comparison": 4,
    "distillation": 4,
    "distilling": 4,
    "environment": 4,
    "divergence": 4,
    "evaluation": 4,
    "greedy": 4,
    "learning_rates": 4,
    "resume": 4,
    "sensitivity": 4,
    "study": 4,
    "texts": 4,
    "serving": 4,
    "trainer": 4,
    "trainer_config": 4,
    "cli": 5,
    "__init__": 5,
    "__main__": 6,
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path):
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def inner_imports():
    """Room to the rooms that its files import."""
    found = {room: set() for room in LEVELS}
    for path in ROOT.rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)
        for name in imports(path):
            dots = len(name) - len(name.lstrip("."))
            if dots == 0 or dots < depth:
                assert not name.startswith("peft_spon"), f"{path} imports the package by its absolute name"
                continue
            if target := name.lstrip(".").split(".")[0]:
                found[room(path)].add(target)
    return found


def test_files_import_only_lower_levels_or_their_own():
    for name, targets in inner_imports().items():
        for target in targets:
            assert LEVELS[target] <= LEVELS[name], f"{name} imports {target}, which is above it"


def test_no_files_import_each_other():
    list(graphlib.TopologicalSorter(inner_imports()).static_order())


def test_names_that_peft_may_change_are_imported_in_one_place():
    public = {"peft", "peft.mapping", "peft.tuners.lora", "peft.tuners.tuners_utils", "peft.utils"}
    gathered = {"BaseTuner", "BaseTunerLayer"}  # PEFT's documented bases of a method
    for path in ROOT.rglob("*.py"):
        if path.name == "_peft.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "peft":
                names = {alias.name for alias in node.names}
                assert node.module in public, f"{path}: {node.module}"
                assert not any(name.startswith("_") for name in names), f"{path}: {names}"
                assert node.module != "peft.tuners.tuners_utils" or names <= gathered, f"{path}: {names}"


def test_the_lowest_level_knows_neither_peft_nor_transformers():
    for path in ROOT.rglob("*.py"):
        if LEVELS[room(path)] == 0:
            outside = {name.split(".")[0] for name in imports(path) if not name.startswith(".")}
            assert not outside & {"peft", "transformers", "trl", "datasets"}, path


@pytest.mark.slow
def test_import_is_light_and_a_missing_library_is_named_with_the_pip_line():
    code = (
        "import sys, torch, transformers, peft; theirs = set(sys.modules); import peft_spon, peft_spon.kernels; "
        "heavy = {'trl', 'lm_eval', 'matplotlib', 'pandas', 'jsonargparse'} & {m.split('.')[0] for m in sys.modules}; "
        "heavy |= {'triton'} & (set(sys.modules) - theirs); "  # torch imports triton itself where it is installed
        "heavy and sys.exit(f'imported {heavy}')\n"
        "sys.modules['trl'] = None\n"
        "try:\n    peft_spon.SponTrainer\n"
        "except ImportError as error:\n    assert \"pip install 'peft_spon[train]'\" in str(error), error\n"
        "else:\n    sys.exit('no error')\n"
        "sys.modules['lm_eval'] = None\n"
        "try:\n    import peft_spon.evaluation.harness\n"
        "except ImportError as error:\n    assert \"pip install 'peft_spon[harness]'\" in str(error), error\n"
        "else:\n    sys.exit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    for name in peft_spon.__all__:
        assert getattr(peft_spon, name) is not None
    assert (ROOT / "py.typed").exists()


def test_another_method_of_the_same_name_is_not_overwritten(monkeypatch):
    class Other:
        pass

    key = SponPeftType.SPON
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, key, Other)
    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, key)
    with pytest.raises(RuntimeError, match=r"already has a method named 'SPON': test_structure\..*Other"):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is Other
    assert key not in PEFT_TYPE_TO_TUNER_MAPPING
