# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""The dials of a SPON adapter."""

import json
import os
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import has_file

from ._version import __version__
from .budget import check_allocation
from .cards import adapter_card
from .checksums import fields_checksum, tensors_checksum
from .criteria import Criterion, make_criterion
from .files import header_problem, written_aside
from .patterns import check_pattern, check_speed


class SponPeftType(str, Enum):
    """Peft types of this package. PEFT's own enum is closed and stays untouched.

    `LORA` never leaves the process: a LoRA beneath SPON, see [`lora`].
    """

    SPON = "SPON"
    LORA = "SPON_LORA"


ANCHOR_SPACES = ("input", "output")
# Of what an adapter's weights file holds: SPON's own, those of modules_to_save (since 0.3), embeddings (since 0.3).
TENSORS_CHECKSUMS = ("tensors", "modules", "embeddings")
# Fields that change what the adapted model computes.
COMPUTING_FIELDS = (
    "sparsity",
    "sparsity_pattern",
    "criterion",
    "criterion_kwargs",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "anchor_modules",
    "anchor_space",
    "gain",
    "prefill",
    "modules_to_save",
    "calibrated",
)


@dataclass
class SponConfig(PeftConfig):
    """
    Configuration of a SPON adapter: which linear layers become sparse, how, and what repairs them.

    A targeted layer with weight W computes `y = W (S(x) + anchor) + b` (SPON, arXiv 2512.12744): S zeroes the
    unimportant entries of the input, the anchor is a trained vector that does not depend on the input.

    Args:
        sparsity (`float`, *optional*, defaults to `0.5`):
            Share of the entries of every targeted layer's input that S zeroes, in [0, 1).
        sparsity_pattern (`dict[str, float]`, *optional*):
            Layer name or regular expression to sparsity, overriding `sparsity`, matched as LoRA's `rank_pattern`.
        criterion (`str`, *optional*, defaults to `"magnitude"`):
            What makes an entry important: `"magnitude"`, `"relative"`, `"topk"`, `"wina"`, `"weighted"`, `"robust"`,
            `"rsparse"` or `"larosa"`.
        criterion_kwargs (`dict[str, Any]`, *optional*):
            Dials of the criterion, for example `{"norm": 1.0}` for `"wina"`, `"weighted"` and `"robust"`.
        target_modules (`list[str]` or `str`, *optional*):
            Names (or one regular expression) of the layers to sparsify; default: every linear layer of the
            transformer blocks, never the embedding or the output head; of a model for text and pictures or speech,
            of its language model. `"all-linear"` as in PEFT.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names (or one regular expression) of layers to leave alone.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the transformer blocks to sparsify; default: all.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list that holds the blocks, if it is not found by itself; needs `layers_to_transform`.
        anchor_modules (`list[str]` or `str`, *optional*):
            Which of the targeted layers carry a trainable anchor; default: all of them. `[]`: none.
        anchor_space (`str`, *optional*, defaults to `"output"`):
            `"input"`: the anchor has the layer's input size and goes through W, the paper's form. `"output"`: it has
            the output size and is added behind W; it can reach shifts that W times a vector cannot.
        gain (`bool`, *optional*, defaults to `True`):
            Also train one scale per input channel where there is an anchor: `y = W ((1 + gain) * S(x) + anchor) + b`.
            `False`: anchors alone, as in the paper.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start anchors and gains at zero, so that training begins at plain sparsity; `False`: random, for tests.
        prefill (`str` or `float`, *optional*, defaults to `"sparse"`):
            `"sparse"`: every token is sparse. `"dense"`: the prompt is dense, decoded tokens are sparse. A number in
            [0, 1]: the share of leading tokens of the prompt that stay dense (TEAL's evaluations use 0.5). In
            `generate` position decides; elsewhere an input of more than one token is a prompt. Dense tokens get no
            anchor. Training always makes every token sparse.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train and save in full, such as a classification head.
        calibrated (`bool`, *optional*, defaults to `False`):
            Written by `calibrate`: thresholds are stored with the adapter. Until then layers keep each token's k best
            entries by the criterion's own score.
        allocation (`dict[str, Any]`, *optional*):
            Written by `allocate`: how much each layer suffers at which sparsity, so that `set_sparsity` can split
            another budget. What the layers have now is in `sparsity_pattern`.
        peft_spon_version (`str`, *optional*):
            Version of peft_spon that wrote the adapter; filled in by itself.
        checksums (`dict[str, Any]`, *optional*):
            Of the saved fields and tensors, and of the LoRAs beneath, to notice damaged or mixed files; filled in by
            itself.

    Raises:
        `ValueError`: for an unknown, contradictory or out-of-range setting.
    """

    sparsity: float = field(
        default=0.5,
        metadata={"help": "Share of the entries of every targeted layer's input that S zeroes, in [0, 1)."},
    )
    sparsity_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression to sparsity, overriding `sparsity`."},
    )
    criterion: str = field(
        default="magnitude",
        metadata={
            "help": "What makes an entry important: magnitude, relative, topk, wina, weighted, robust, rsparse or "
            "larosa."
        },
    )
    criterion_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Dials of the criterion, for example {'norm': 1.0}."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or one regular expression) of the layers to sparsify. Default: every linear layer of the "
            "transformer blocks, never the embedding or the output head."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regular expression) of layers to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to sparsify. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that holds the blocks; only together with layers_to_transform."},
    )
    anchor_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Which targeted layers carry a trainable anchor. Default: all; an empty list: none."},
    )
    anchor_space: str = field(
        default="output",
        metadata={"help": "Where the anchor is added: 'input' (before W, the paper's form) or 'output' (behind W)."},
    )
    gain: bool = field(
        default=True, metadata={"help": "Also train one scale per input channel where there is an anchor."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start anchors and gains at zero; False: random, for tests."}
    )
    prefill: str | float = field(
        default="sparse",
        metadata={
            "help": "'sparse': every token is sparse; 'dense': only decoded ones are; a number in [0, 1]: the share "
            "of the prompt's leading tokens that stay dense."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save in full."}
    )
    calibrated: bool = field(
        default=False, metadata={"help": "Written by `calibrate`: thresholds are stored with the adapter."}
    )
    allocation: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Written by `allocate`: how much each layer suffers at which sparsity."},
    )
    peft_spon_version: str | None = field(
        default=None, metadata={"help": "Version of peft_spon that wrote the adapter; filled in by itself."}
    )
    checksums: dict[str, Any] | None = field(
        default=None, metadata={"help": "Of the saved fields and tensors; filled in by itself."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SponPeftType.SPON
        for name in ("target_modules", "exclude_modules", "anchor_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, (set, tuple)):
            self.modules_to_save = sorted(self.modules_to_save)  # in JSON, a set would have any order
        self._is_saved = self.peft_spon_version is not None  # read from a file
        if self.peft_spon_version is None:
            self.peft_spon_version = __version__
        check_version(self.peft_spon_version, "peft_spon_version")
        self._check_fields()
        check_sparsity(self.sparsity, self.sparsity_pattern)
        check_allocation(self.allocation)
        expressions = self._regular_expressions()
        for what, (pattern, _) in expressions.items():
            check_pattern(what, pattern)
        self.make_criterion()
        if self.anchor_space not in ANCHOR_SPACES:
            raise ValueError(f"anchor_space is {self.anchor_space!r}; use one of {', '.join(ANCHOR_SPACES)}.")
        check_prefill(self.prefill)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is not set; name the blocks to "
                "sparsify in layers_to_transform, or drop layers_pattern."
            )
        if self.layers_to_transform is not None and "target_modules" in expressions:
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform!r} but target_modules is the regular "
                f"expression {self.target_modules!r}, which already decides; put the block index into it."
            )
        if not isinstance(self.calibrated, bool):
            raise ValueError(f"calibrated is {self.calibrated!r}; it is True or False and written by calibrate().")
        # Of the tensors to be saved with this configuration, and the modules_to_save among them; see SponModel.
        self._tensors_checksums: dict[str, str | None] = {}
        self._module_names: set[str] = set()
        # What was measured of the adapter as it is saved, for its card.
        self._results = ""
        # Of a load, see load_adapter: whether modules_to_save must have the shapes that they have in the model.
        self._sizes_are_fixed = False
        # Of the LoRAs beneath, by name.
        self._lora_checksums: dict[str, dict[str, str]] | None = None

    @classmethod
    def published(cls, **kwargs: Any) -> "SponConfig":
        """
        The adapter of the paper (SPON, arXiv 2512.12744) as two independent replications have it: magnitude
        thresholds in every linear layer, anchors in front of `down_proj` alone, no gain. Train it with
        [`SponTrainingConfig.published`].

        Args:
            kwargs: any other field, or one to override; `anchor_modules` for models without a `down_proj`.
        """
        recipe = {"criterion": "magnitude", "anchor_space": "input", "anchor_modules": ["down_proj"], "gain": False}
        return cls(**{**recipe, **kwargs})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, with checksums and a model card, written aside and moved into place."""
        self.peft_spon_version = __version__
        checksums = {"fields": self._fields_checksum(), **self._tensors_checksums, "loras": self._lora_checksums}
        checksums["embeddings"] = self._embeddings_checksum(Path(save_directory))
        self.checksums = {name: value for name, value in checksums.items() if value is not None}
        with written_aside(save_directory) as aside:
            super().save_pretrained(str(aside), **kwargs)
            os.replace(aside / CONFIG_NAME, Path(save_directory, CONFIG_NAME))
        self.checksums = None
        adapter_card(save_directory, self, kwargs.get("auto_mapping_dict"), results=self._results)

    def _check_fields(self) -> None:
        """Compare with the checksum in the file; the one of the tensors waits for the tensors."""
        checksums = {} if self.checksums is None else self.checksums
        if not isinstance(checksums, dict):
            raise ValueError(f"checksums is {checksums!r}; {CONFIG_NAME} is damaged or was edited. Save it again.")
        if "fields" in checksums and checksums["fields"] != self._fields_checksum():
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in COMPUTING_FIELDS[:4] + ("prefill",))
            raise ValueError(
                f"{CONFIG_NAME} is not as it was saved: a field that decides what is computed was edited or is "
                f"missing (it now says {values}). To change a setting, set it on a loaded SponConfig and pass that: "
                "PeftModel.from_pretrained(base, folder, config=config)."
            )
        loras = checksums.get("loras", {})
        if not isinstance(loras, dict) or not all(isinstance(entry, dict) for entry in loras.values()):
            raise ValueError(f"checksums has loras={loras!r}; {CONFIG_NAME} is damaged or was edited. Save it again.")
        self.checksums = {name: checksums[name] for name in (*TENSORS_CHECKSUMS, "loras") if name in checksums} or None

    def _embeddings_checksum(self, folder: Path) -> str | None:
        """Of what is in the weights file that PEFT has just written and is neither SPON's nor in `modules_to_save`.

        These are embeddings: PEFT adds them where the vocabulary was resized.
        """
        try:
            with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
                keys = {key.removeprefix("base_model.model."): key for key in file.keys()}
                own = {name for name in keys if ".spon_" in name}
                others = keys.keys() - own - self._module_names
                if not others:
                    return None
                own_checksum, checksum = (
                    tensors_checksum({name: file.get_tensor(keys[name]) for name in names}) for names in (own, others)
                )
        except (OSError, SafetensorError):  # transformers' save_pretrained writes the configuration first
            return None
        return checksum if own_checksum == self._tensors_checksums.get("tensors") else None

    def _regular_expressions(self) -> dict[str, tuple[str, str]]:
        """Field to what it holds, and to the expression that PEFT makes of that for the names of layers."""
        found = {}
        for name in ("target_modules", "exclude_modules", "anchor_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                found[name] = (value, value)
        for key in self.sparsity_pattern:
            found[f"sparsity_pattern[{key[:40]!r}]"] = (key, rf"(.*\.)?({key})$")
        blocks = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for kind, patterns, (before, behind) in (
            ("layers_pattern", blocks, (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\..*")),
            ("modules_to_save", self.modules_to_save or [], (r"(^|.*\.)", r"($|\..*)")),
        ):
            found |= {f"{kind}[{i}]": (value, f"{before}{value}{behind}") for i, value in enumerate(patterns)}
        return found

    def check_speed(self, names: list[str]) -> None:
        """Raises `ValueError` for a regular expression that would take very long to match these names of modules."""
        for what, (pattern, whole) in self._regular_expressions().items():
            check_speed(what, pattern, whole, names)

    def _fields_checksum(self) -> str:
        return fields_checksum({name: getattr(self, name) for name in COMPUTING_FIELDS})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """As PEFT's, but refuses pickled weights, damaged files and hand-edited fields.

        Raises:
            `ValueError`: naming the file and the cause.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            if isinstance(error.__cause__, OSError):  # PEFT says what it did not find, the Hub's client why
                raise ValueError(f"{error}: {error.__cause__}") from error.__cause__
            raise
        prefix = f"{subfolder}/" if subfolder else ""
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        exists = partial(has_file, pretrained_model_name_or_path, **where)
        if exists(prefix + WEIGHTS_NAME) and not exists(prefix + SAFETENSORS_WEIGHTS_NAME):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds its weights as {WEIGHTS_NAME}, a pickle, and SPON adapters "
                f"load from safetensors only; ask its author to save it again, as {SAFETENSORS_WEIGHTS_NAME}."
            )
        weights = Path(pretrained_model_name_or_path, prefix + SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file() and (problem := header_problem(weights)):
            raise ValueError(f"{problem}; save the adapter again.")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's. Raises `ValueError` naming the file for what is no JSON object."""
        try:
            found = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            raise ValueError(f"{path_json_file} is damaged ({error}); save or download the adapter again.") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path_json_file} holds no settings but {found!r:.80}; save or download it again.")
        return found

    def make_criterion(self) -> Criterion:
        """The criterion that `criterion` and `criterion_kwargs` describe. Raises `ValueError` for unknown ones."""
        return make_criterion(self.criterion, self.criterion_kwargs)


def adapter_card_for_hub(folder: str, name: str) -> None:
    """Write the card of the adapter in a folder, or else in its first subfolder that has one.

    Args:
        folder (`str`): where the adapter was saved.
        name (`str`): by which users will load it.
    """
    paths = [path for pattern in ("", "*/") for path in sorted(Path(folder).glob(f"{pattern}{CONFIG_NAME}"))]
    subfolder = "/".join(paths[0].parent.relative_to(folder).parts) or None if paths else None
    config = PeftConfig.from_pretrained(folder, subfolder=subfolder) if paths else None
    if isinstance(config, SponConfig):
        adapter_card(folder, config, config.auto_mapping, name, subfolder)


def check_version(version: str, where: str) -> None:
    """Raises `ValueError` for what is no version, or one with a newer minor version than the installed one."""
    try:
        saved, installed = Version(version), Version(__version__)
    except (InvalidVersion, TypeError):
        raise ValueError(
            f"{where} is {version!r}, which is not a version such as {__version__!r}; restore it or leave it out."
        ) from None
    # Patch releases may add fields (unknown ones are dropped with a warning) but never change what is stored.
    if saved.release[:2] > installed.release[:2]:
        raise ValueError(
            f"This was saved by peft_spon {saved}, newer than the installed {installed}, and may mean something else "
            "here. Upgrade: pip install -U peft_spon"
        )


def check_sparsity(sparsity: float, pattern: dict[str, float]) -> None:
    """Raises `ValueError` unless every sparsity is a number in [0, 1) and every pattern a regular expression."""
    if not isinstance(pattern, dict):
        raise ValueError(f"sparsity_pattern is {pattern!r}; use a dictionary of layer name to sparsity.")
    named = {"sparsity": sparsity, **{f"sparsity_pattern[{key!r}]": value for key, value in pattern.items()}}
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}; use a number in [0, 1), for example 0.5 to zero half the inputs.")
    for key in pattern:
        check_pattern(f"sparsity_pattern[{str(key)[:40]!r}]", key)


def check_prefill(prefill: str | float) -> None:
    """Raises `ValueError` unless `prefill` is `"sparse"`, `"dense"` or a number in [0, 1]."""
    is_share = isinstance(prefill, (int, float)) and not isinstance(prefill, bool) and 0 <= prefill <= 1
    if prefill not in ("sparse", "dense") and not is_share:
        raise ValueError(
            f"prefill is {prefill!r}; use 'sparse', 'dense' or the share of leading tokens left dense, in [0, 1]."
        )
