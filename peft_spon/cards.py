# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of saved adapters and merged models."""

import os
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ._version import __version__


PAPER = "[Resting Neurons, Active Insights](https://arxiv.org/abs/2512.12744)"


def adapter_card(folder: str | os.PathLike, config: Any) -> None:
    """Put what the adapter is and a snippet that loads it in the place of PEFT's empty template.

    Args:
        folder (`str`): where the adapter was saved; a card that somebody has written stays as it is.
        config (`SponConfig`): the adapter's configuration.
    """
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    if "[More Information Needed]" not in card.text:
        return
    base = config.base_model_name_or_path or "name-of-the-base-model"
    auto_class = "AutoModelForCausalLM" if config.task_type in (None, "CAUSAL_LM") else "AutoModel"
    text = f"""\
        # SPON adapter for {base}

        {config.sparsity:.0%} of the inputs of this model's linear layers are zeroed at every token (criterion
        `{config.criterion}`{"" if config.calibrated else ", not calibrated"}), and trained anchors repair the damage:
        see {PAPER}. Made with peft_spon {__version__}.

        ```python
        # pip install peft_spon
        import peft_spon  # registers SPON with PEFT
        from peft import PeftModel
        from transformers import {auto_class}

        base = {auto_class}.from_pretrained("{base}")
        model = PeftModel.from_pretrained(base, "{Path(folder).resolve().name}")  # this folder, or its name on the Hub
        model.set_sparsity({config.sparsity})  # the dial: another sparsity needs no data
        ```
        """
    _save(card, path, text, "peft", config.base_model_name_or_path)


def merged_card(folder: str | os.PathLike, config: Any, name: str) -> None:
    """Write the card of a merged model.

    Args:
        folder (`str`): where it is written.
        config (`PretrainedConfig`): of the merged model, with its `quantization_config`.
        name (`str`): of the folder in which users will find it.
    """
    layers = config.quantization_config.layers.values()
    sparsity = sum(entry["sparsity"] for entry in layers) / max(len(layers), 1)
    architecture = (config.architectures or ["AutoModel"])[0]
    text = f"""\
        # {config._name_or_path or "A model"} with SPON merged

        On average {sparsity:.0%} of the inputs of {len(layers)} linear layers are zeroed at every token, and merged
        anchors repair the damage: see {PAPER}. Made with peft_spon {__version__}. Without peft_spon the folder loads
        as the dense base model.

        ```python
        # pip install peft_spon
        import peft_spon  # makes transformers load the sparse layers
        from transformers import {architecture}

        model = {architecture}.from_pretrained("{name}")  # this folder, or its name on the Hub
        ```
        """
    card = ModelCard.from_template(ModelCardData())
    _save(card, Path(folder, "README.md"), text, "transformers", config._name_or_path)


def _save(card: ModelCard, path: Path, text: str, library: str, base: str | None) -> None:
    card.data.library_name = library
    tags = {tag for tag in card.data.tags or [] if not tag.endswith(":")}
    card.data.tags = sorted({*tags, "spon", "activation-sparsity"})
    if base and not os.path.exists(base):
        card.data.base_model = base
    elif card.data.base_model and os.path.exists(str(card.data.base_model)):
        card.data.base_model = None  # a folder of this machine means nothing elsewhere, and the Hub refuses it
    card.text = textwrap.dedent(text)
    card.save(path)
