# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of saved adapters and merged models."""

import json
import os
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ._version import __version__
from .files import written_aside
from .repair import REPAIR_LORA


TITLE = "Resting Neurons, Active Insights: Robustifying Activation Sparsity in LLMs via Spontaneity"
PAPER = "[Resting Neurons, Active Insights](https://arxiv.org/abs/2512.12744)"
CITATION = f"""\
@article{{xu2025spon,
    title  = {{{TITLE}}},
    author = {{Xu, Haotian and Yang, Jiannan and Gao, Tian and Weng, Tsui-Wei and Ma, Tengfei}},
    year   = 2025,
    eprint = {{arXiv:2512.12744}}
}}"""
# What stands between them goes from the card of a saved folder into that on the Hub.
RESULTS, RESULTS_END = "<!-- results -->", "<!-- end of results -->"
MARK = "<!-- peft_spon writes this card anew at every save; remove this line to keep your own. -->"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def adapter_card(
    folder: str | os.PathLike,
    config: Any,
    auto_mapping: dict[str, str] | None = None,
    name: str | None = None,
    subfolder: str | None = None,
    results: str | None = None,
) -> None:
    """Put what the adapter is and a snippet that loads it in the place of PEFT's empty template.

    Args:
        folder (`str`): where the card is written; one that somebody has written stays as it is.
        config (`SponConfig`): the adapter's configuration.
        auto_mapping (`dict[str, str]`, *optional*): PEFT's record of the base's class, if there is no task type.
        name (`str`, *optional*): by which users will load the adapter; default: the folder's own.
        subfolder (`str`, *optional*): in which the adapter is.
        results (`str`, *optional*): Markdown, what was measured; default: what the folder's card says.
    """
    if (card := replaceable_card(folder)) is None:
        return without_local_base(folder)
    base = public_name(config.base_model_name_or_path)
    base_class = AUTO_CLASSES.get(config.task_type, "AutoModelForCausalLM")
    if config.task_type is None and (auto_mapping or {}).get("parent_library", "").startswith("transformers."):
        base_class = class_name(auto_mapping["base_model_class"], base_class)
    where = quoted(name or Path(folder).resolve().name) + (f", subfolder={quoted(subfolder)}" if subfolder else "")
    importing, loading = loading_lines(config)
    text = f"""\
        # SPON adapter for {base}

        {config.sparsity:.0%} of the inputs of this model's linear layers are zeroed at every token (criterion
        `{config.criterion}`{"" if config.calibrated else ", not calibrated"}), and trained anchors repair the damage:
        see {PAPER}. Made with peft_spon {__version__}.

        ```python
        # pip install peft_spon
        import peft_spon  # registers SPON with PEFT
        {importing}
        from transformers import {base_class}

        base = {base_class}.from_pretrained({quoted(base)})
        model = {loading}(base, {where})  # this folder, or its name on the Hub
        # model.set_sparsity(0.6)  # the dial: another sparsity needs no data
        ```

        For fast decoding, and as one model without PEFT:

        ```py
        model.prepare_for_decode()  # generate() skips the weights of zeroed inputs from here on
        merged = model.merge_and_unload()  # a transformers model; S stays active
        merged.save_pretrained("merged")
        ```
        """
    if config.task_type == "CAUSAL_LM":
        card.data.pipeline_tag = "text-generation"
    results = results_in(card) if results is None else results
    _save(card, folder, text, "peft", config.base_model_name_or_path, results)


def loading_lines(config: Any) -> tuple[str, str]:
    """What a program imports to load a SPON adapter, and what it calls: with a repair LoRA, both come along."""
    loras = config._lora_checksums or (config.checksums or {}).get("loras") or {}
    if REPAIR_LORA in loras:
        return "from peft_spon import load_with_lora", "load_with_lora"
    return "from peft import PeftModel", "PeftModel.from_pretrained"


def lora_card(folder: str | os.PathLike, config: Any, spon: Any, name: str | None = None) -> None:
    """Write the card of a LoRA that lies beneath SPON, saved alone; a card that somebody has written stays.

    Args:
        folder (`str`): where it was saved.
        config (`LoraConfig`): its configuration.
        spon (`SponConfig`): of the SPON adapter above it.
        name (`str`, *optional*): by which users will load it; default: the folder's own.
    """
    if (card := replaceable_card(folder)) is None:
        return
    base = public_name(config.base_model_name_or_path)
    base_class = AUTO_CLASSES.get(config.task_type, "AutoModelForCausalLM")
    name = quoted(name or Path(folder).resolve().name)
    text = f"""\
        # LoRA for {base}

        A LoRA of rank {config.r} that was used beneath a SPON adapter (inputs {spon.sparsity:.0%} sparse, see
        {PAPER}). It is a plain LoRA and loads without peft_spon:

        ```python
        from peft import PeftModel
        from transformers import {base_class}

        base = {base_class}.from_pretrained({quoted(base)})
        model = PeftModel.from_pretrained(base, {name})  # this folder, or its name on the Hub
        ```

        Together with its SPON adapter: `peft_spon.load_with_lora(base, "the SPON adapter", {name})`.
        """
    _save(card, folder, text, "peft", config.base_model_name_or_path)


def merged_card(folder: str | os.PathLike, config: Any, name: str, results: str | None = None) -> None:
    """Write the card of a merged model.

    Args:
        folder (`str`): where it is written; a card that somebody has written stays as it is.
        config (`PretrainedConfig`): of the merged model, with its `quantization_config`.
        name (`str`): by which users will load it: of its folder, or on the Hub.
        results (`str`, *optional*): Markdown, what was measured; default: what the folder's card says.
    """
    if (card := replaceable_card(folder)) is None:
        return
    layers = config.quantization_config.layers.values()
    sparsity = sum(entry["sparsity"] for entry in layers) / max(len(layers), 1)
    architecture = class_name((config.architectures or ["AutoModel"])[0], "AutoModel")
    text = f"""\
        # {public_name(config._name_or_path, "A model")} with SPON merged

        On average {sparsity:.0%} of the inputs of {len(layers)} linear layers are zeroed at every token, and merged
        anchors repair the damage: see {PAPER}. Made with peft_spon {__version__}. Without peft_spon the folder loads
        as the dense base model.

        ```python
        # pip install peft_spon
        import peft_spon  # makes transformers load the sparse layers
        from transformers import {architecture}

        model = {architecture}.from_pretrained({quoted(name)})  # this folder, or its name on the Hub
        ```

        For fast decoding:

        ```py
        model.prepare_for_decode()  # generate() skips the weights of zeroed inputs from here on
        ```
        """
    results = results_in(card) if results is None else results
    _save(card, folder, text, "transformers", config._name_or_path, results)


def trainer_card(
    folder: str | os.PathLike, config: Any, base: str | None, name: str, results: str | None = None
) -> None:
    """Put what the adapter is and a snippet that loads it into the card that TRL has written after a training.

    Args:
        folder (`str`): where the card is; its tags, paper, trackers and versions stay.
        config (`SponConfig`): the adapter's configuration.
        base (`str`, *optional*): the base model's name or path.
        name (`str`): by which users will load the adapter.
        results (`str`, *optional*): Markdown, what was measured.
    """
    base = public_name(base)
    about = (
        f"A SPON adapter for `{base}`: {config.sparsity:.0%} of the inputs of its linear layers are zeroed at "
        f"every token (criterion `{config.criterion}`), and trained anchors repair the damage.\n"
    )
    importing, loading = loading_lines(config)
    quick_start = textwrap.dedent(
        f"""\
        ## Quick start

        ```python
        import peft_spon  # registers SPON with PEFT
        {importing}
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained({quoted(base)})
        model = {loading}(base, {quoted(name)})
        ```

        For fast decoding, and as one model without PEFT:

        ```py
        model.prepare_for_decode()  # generate() skips the weights of zeroed inputs from here on
        merged = model.merge_and_unload()  # a transformers model; S stays active
        merged.save_pretrained("merged")
        ```

        """
    )
    quick_start += f"{framed(results)}\n" if results else ""
    path = Path(folder, "README.md")
    card = re.sub(r"This model is a fine-tuned version of .*\n", lambda _: about, path.read_text())
    card = re.sub(r"## Quick start\n.*?(?=## Training procedure)", lambda _: quick_start, card, flags=re.DOTALL)
    path.write_text(card)
    without_local_base(folder)


def framed(results: str) -> str:
    """Results as they stand in a card."""
    return f"{RESULTS}\n## Results\n\n{results}\n{RESULTS_END}\n"


def results_in(card: ModelCard) -> str:
    """The results that a card of ours has, or nothing."""
    found = re.search(f"{RESULTS}\n## Results\n\n(.*?)\n{RESULTS_END}", card.text, flags=re.DOTALL)
    return found[1] if found and MARK in card.text else ""


def show_results(folder: str | os.PathLike, results: str) -> None:
    """Put results into the card of ours that a folder has; without one, or with somebody's own, nothing happens."""
    path = Path(folder, "README.md")
    if not path.exists() or MARK not in path.read_text(encoding="utf-8"):
        return
    card = ModelCard.load(path)
    rest = re.sub(f"{RESULTS}\n.*?{RESULTS_END}\n", "", card.text, flags=re.DOTALL)
    before, mark, after = rest.partition("## Citation\n")
    card.text = f"{before}{framed(results)}\n{mark}{after}" if mark else f"{rest}\n{framed(results)}"
    _write(card, folder)


def keep_card_on_hub(model: nn.Module, write: Callable[[str, str], None]) -> None:
    """Let `model.push_to_hub` upload our card: transformers puts its empty template over the one that was saved.

    Args:
        model (`torch.nn.Module`): a transformers or PEFT model.
        write (`Callable`): writes the card, given the folder and the name on the Hub.
    """
    # On the instance: models without SPON are not touched.
    model._upload_modified_files = partial(_upload_with_card, model, write)


def _upload_with_card(
    model: nn.Module, write: Callable[[str, str], None], working_dir: str, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    write(working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def replaceable_card(folder: str | os.PathLike) -> ModelCard | None:
    """The card in a folder, a new one if there is none, or None if somebody has written it."""
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    return card if "[More Information Needed]" in card.text or MARK in card.text else None


def quoted(text: str) -> str:
    """A Python string literal that stays one inside Markdown, whatever a file's name or setting holds."""
    return json.dumps(text).replace("`", "\\u0060")


def public_name(base: str | None, otherwise: str = "name-of-the-base-model") -> str:
    """The name of a base model on the Hub. A path of this machine, or what is no name, is not shown."""
    return base.strip() if base and _is_repo_id(base) else otherwise


def class_name(name: Any, otherwise: str) -> str:
    """A class by its name in a configuration, if it is one."""
    return name if isinstance(name, str) and name.isidentifier() else otherwise


def without_local_base(folder: str | os.PathLike) -> None:
    """Take a path of this machine, which PEFT writes there, out of the metadata of somebody's own card."""
    card = ModelCard.load(Path(folder, "README.md"))
    base, tags = card.data.base_model, public_tags(card)
    is_local = isinstance(base, str) and not is_public(base)
    if is_local or tags != (card.data.tags or []):
        card.data.base_model, card.data.tags = None if is_local else base, tags
        _write(card, folder)


def is_public(base: str) -> bool:
    """True for what can be a model on the Hub: a path of this machine means nothing there, and the Hub refuses it."""
    return _is_repo_id(base) and not os.path.exists(base)


def public_tags(card: ModelCard) -> list[str]:
    """The tags of a card without those that name a folder, `base_model:adapter:/home/...`, or nothing."""
    tags = card.data.tags or []
    named = [tag for tag in tags if tag.startswith("base_model:")]
    return [tag for tag in tags if tag not in named or is_public(tag.rpartition(":")[2])]


def _write(card: ModelCard, folder: str | os.PathLike) -> None:
    with written_aside(folder) as aside:
        card.save(aside / "README.md")
        os.replace(aside / "README.md", Path(folder, "README.md"))


def _save(
    card: ModelCard, folder: str | os.PathLike, text: str, library: str, base: str | None, results: str = ""
) -> None:
    card.data.library_name = library
    # First the one that PEFT has just written, of the model that is saved; the configuration may name another.
    named = [name for name in (card.data.base_model, base) if isinstance(name, str) and name and is_public(name)]
    card.data.base_model = named[0] if named else None
    tags = {*public_tags(card), "spon", "activation-sparsity"}
    if named and library == "peft":
        tags.add(f"base_model:adapter:{named[0]}")
    card.data.tags = sorted(tags)
    cite = f"## Citation\n\n```bibtex\n{CITATION}\n```"
    card.text = "\n".join([textwrap.dedent(text), *([framed(results)] if results else []), cite, "", MARK, ""])
    _write(card, folder)


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
