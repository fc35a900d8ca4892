# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0

import gc
import os
from pathlib import Path


gc.disable()  # until all tests are collected: what is imported stays, and takes half a second to look through
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The compiled CPU kernel, by the hash of its source, and whatever else libraries keep: not in the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "libraries")

import pytest
import torch
from accelerate.state import AcceleratorState
from lora_models import ROUTES
from models import MODELS, word_tokenizer

from peft_spon import kernels


torch.set_num_threads(1)


def pytest_configure():
    kernels.active_kernel()  # compiled once, before pytest-xdist starts several processes that would all do it


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_precision_of_another_test():
    """Older versions of transformers and accelerate keep a test's bf16 in the process and its environment."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state()


# Every kind of layer: linear with and without a bias, Conv1D, cross-attention. The other families are slow tests.
DISTINCT = {"llama", "gpt2", "bert", "t5"}


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in DISTINCT else pytest.mark.slow) for name in sorted(MODELS)]
)
def family(request):
    """Name of each model family in turn."""
    return request.param


@pytest.fixture
def llama():
    return MODELS["llama"]()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(params=sorted(ROUTES))
def route(request):
    """Makes a calibrated model with LoRA beneath SPON, in each order in turn."""
    return ROUTES[request.param]
