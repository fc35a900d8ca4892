# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""`generate` with a `prefill` other than "sparse": which tokens are the prompt's, whatever pieces they come in."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .layer import SponLayer
from .modes import attribute
from .sparse_linear import Prompt, SparseMixin


# Ways of generating in which several decoded tokens come at once, or the prompt in pieces.
SEVERAL_AT_ONCE = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")


def follow_prompts(model: nn.Module) -> None:
    """Let `generate` of the transformers models in a model tell the sparse layers where the prompt ends."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.can_generate():
            # On the instance: models without such a prefill are not touched.
            part.generate = partial(generate, part)
            if hasattr(part, "init_continuous_batching"):
                part.init_continuous_batching = partial(init_continuous_batching, part)


def layers_with_prefill(model: nn.Module) -> list[nn.Module]:
    """The adapter's and merged layers of a model that may leave tokens of the prompt dense."""
    adapters = [
        module
        for module in model.modules()
        if isinstance(module, SponLayer) and any(s.prefill != "sparse" for s in module.spon_settings.values())
    ]
    merged = [
        module
        for module in model.modules()
        if isinstance(module, SparseMixin) and module.spon_settings.prefill != "sparse"
    ]
    return adapters + merged


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` in which the first tokens of the prompt, by `prefill`, are dense and all others sparse.

    Encoder-decoders and models with a cache of their own kind have no position to tell; there the shape decides: an
    input of more than one token is a prompt.

    Raises:
        `ValueError`: for such a model, if several tokens are decoded at once or the prompt comes in pieces.
    """
    run = partial(type(model).generate, model)
    layers = layers_with_prefill(model)
    if not layers:
        return run(*args, **kwargs)
    has_position = "past_key_values" in inspect.signature(type(model).forward).parameters
    if model.config.is_encoder_decoder or not has_position:
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        settings = {**model.generation_config.to_dict(), **(given.to_dict() if given is not None else {}), **kwargs}
        used = [f"{name}={settings[name]!r}" for name in SEVERAL_AT_ONCE if settings.get(name) is not None]
        used += ["use_cache=False"] if settings.get("use_cache") is False else []
        if used:
            raise refusal(model, f"{type(model).__name__}.generate with {used[0]}")
        return run(*args, **kwargs)
    prompt = Prompt(prompt_length(*args, **kwargs))
    handle = model.register_forward_pre_hook(partial(_note_position, prompt), with_kwargs=True)
    try:
        with attribute(layers, "prompt", prompt):
            return run(*args, **kwargs)
    finally:
        handle.remove()


def init_continuous_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers' continuous batching (`generate_batch`), which mixes prompts and decoded tokens in one row.

    Raises:
        `ValueError`: a `prefill` other than "sparse".
    """
    if layers_with_prefill(model):
        raise refusal(model, "continuous batching (generate_batch)")
    return type(model).init_continuous_batching(model, *args, **kwargs)


def refusal(model: nn.Module, what: str) -> ValueError:
    """The error for a way of generating that does not tell which tokens are the prompt's."""
    layer = layers_with_prefill(model)[0]
    settings = layer.spon_settings if isinstance(layer, SparseMixin) else next(iter(layer.spon_settings.values()))
    return ValueError(
        f"{what} does not tell which tokens are the prompt's, and prefill={settings.prefill!r} leaves these dense. "
        'Use an adapter with SponConfig(prefill="sparse"), or generate token by token with a cache.'
    )


def prompt_length(inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> int:
    """Tokens of the prompt, from the arguments of `generate`: all that is before the first decoded token."""
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    length = next((value.shape[1] for value in given if value is not None), 1)
    mask = kwargs.get("attention_mask")  # also of what a cache holds already
    return length if mask is None or mask.ndim != 2 else max(length, mask.shape[1])


@torch.compiler.disable
def _note_position(prompt: Prompt, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1])
    prompt.tokens = next(value.shape[1] for value in given if value is not None)
    cache = kwargs.get("past_key_values")
    cached = 0 if cache is None else int(cache.get_seq_length())
    prompt.cached = min(cached, prompt.length)  # the same for all decoded tokens: nothing is compiled anew
