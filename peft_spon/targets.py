# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model may be sparse: in the language model, and called; names that match none are errors."""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Iterable
from functools import cache

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from ._peft import check_target_module_exists, get_pattern_key, include_all_linear_layers
from .base_layer import is_linear
from .budget import exact_key
from .config import SponConfig
from .loading import preview
from .sites import outer_modules


# PEFT adds these to the modules_to_save of classifiers by itself; a model has one of them at most.
HEADS = {"classifier", "score", "qa_outputs"}


def default_targets(config: SponConfig, model: nn.Module) -> set[str]:
    """Every linear layer inside the lists of repeated blocks (`nn.ModuleList`), which no embedding or head is.

    Of a model for text and more, those of its language model; never layers whose weight is read without a call.

    Returns:
        `set[str]`: the layers' last names if these select the same layers in the whole model, else full names.

    Raises:
        `ValueError`: the model has no list of blocks with linear layers.
    """
    blocks = [name for name, module in outer_modules(model) if isinstance(module, nn.ModuleList)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [name for name, module in outer_modules(model) if is_linear(module) and module is not head]
    outside = outside_language_model(model)
    inside = [name for name in linears if any(name.startswith(f"{block}.") for block in blocks)]
    inside = [name for name in inside if model.get_submodule(name) not in outside]
    unused = set(never_called(model, inside))
    inside = [name for name in inside if name not in unused]
    if not inside:
        raise ValueError(
            f"{type(model).__name__} has no list of transformer blocks with linear layers, so SPON cannot choose its "
            f"targets; name them, for example SponConfig(target_modules={linears[:2] or ['fc1']})."
        )
    by_suffix = copy.copy(config)
    by_suffix.target_modules = {name.rpartition(".")[2] for name in inside}
    # Through PEFT's own matcher, so that layers_to_transform and exclude_modules hold for the default as well.
    chosen = [name for name, _ in outer_modules(model) if check_target_module_exists(by_suffix, name)]
    if set(chosen) <= set(inside):
        return by_suffix.target_modules
    return {name for name in chosen if name in inside}


def all_linear(config: SponConfig, model: nn.Module) -> set[str]:
    """What PEFT means by "all-linear", without heads that it trains and layers whose weight is read without a call."""
    names = include_all_linear_layers(copy.copy(config), model).target_modules
    if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        names = {name for name in names if name.rpartition(".")[2] not in HEADS}
    return names - set(never_called(model, names))


def matches(wanted: set[str] | str | None, name: str) -> bool:
    """PEFT's rule for `target_modules`: a regular expression for the whole name, or a set of (ends of) names."""
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{end}") for end in wanted)


def layer_sparsity(sparsity: float, pattern: dict[str, float], name: str) -> float:
    """Sparsity of the layer `name`: its entry in the pattern, matched as LoRA's `rank_pattern`, or the common one."""
    # What `allocate` writes has a key for every layer: found without trying all of them as regular expressions.
    exact = pattern.get(exact_key(name))
    return pattern.get(get_pattern_key(list(pattern), name), sparsity) if exact is None else exact


def check_patterns(config: SponConfig, names: list[str]) -> None:
    """Raises `ValueError` if `sparsity_pattern` or `anchor_modules` name something that no target matches."""
    check_matches("sparsity_pattern", config.sparsity_pattern, names)
    wanted = config.anchor_modules
    if wanted is None or len(wanted) == 0:
        return
    for key in [wanted] if isinstance(wanted, str) else sorted(wanted):
        if not any(matches(key if isinstance(wanted, str) else {key}, name) for name in names):
            raise ValueError(
                f"anchor_modules has {key!r}, which none of the targeted layers matches; they are {preview(names)}."
            )


def check_matches(what: str, pattern: dict[str, float], names: list[str]) -> None:
    """Raises `ValueError` for a pattern key that matches no layer."""
    exact = {exact_key(name) for name in names}
    for key in pattern:
        if key not in exact and not any(get_pattern_key([key], name) == key for name in names):
            raise ValueError(f"{what} has {key!r}, which no targeted layer matches; they are {preview(names)}.")


def outside_language_model(model: nn.Module) -> set[nn.Module]:
    """Modules of a model for text and more (pictures, speech) beside its language model: towers, projectors.

    The language model is the part whose configuration is `config.text_config`, without the parts in it that read
    something else than text. Empty for models of one kind of input, encoder-decoders and dual encoders.
    """
    top = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if top is None or top.config.is_encoder_decoder:
        return set()
    parts = [module for module in top.modules() if isinstance(module, PreTrainedModel)]
    text_config = getattr(top.config, "text_config", None)
    language = next((part for part in parts if type(part.config) is type(text_config)), top)
    if "past_key_values" not in inspect.signature(type(language).forward).parameters:
        return set()
    inside = set(language.modules())
    for part in parts:
        if part in inside and part.main_input_name != language.main_input_name:
            inside -= set(part.modules())
    return set(model.modules()) - inside


def never_called(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named layers whose parents read their weight instead of calling them (Mamba's dt_proj)."""
    parents = ((name, *name.rpartition(".")[::2]) for name in names)
    return [name for name, parent, last in parents if last in read_not_called(type(model.get_submodule(parent)))]


@cache
def read_not_called(module_class: type[nn.Module]) -> frozenset[str]:
    """Names of children whose `weight` the code of a module's class reads while it never calls them, or multiplies
    with (`@`), which some do where others call. Empty where there is no source."""
    read, called, multiplied = set(), set(), set()
    for part in module_class.__mro__:
        if part in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or in a notebook
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for method in ast.walk(tree):
            if not isinstance(method, ast.FunctionDef) or "init" in method.name or "reset" in method.name:
                continue
            for node in ast.walk(method):
                of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                if not of_self or node.value.id != "self" or not isinstance(node.ctx, ast.Load):
                    continue
                use = parents[node]
                if not isinstance(use, ast.Attribute):
                    called.add(node.attr)  # or handed on, to be called elsewhere
                elif use.attr == "weight":
                    read.add(node.attr)
                    above = parents[use]
                    if isinstance(above, ast.BinOp) and isinstance(above.op, ast.MatMult):
                        multiplied.add(node.attr)
    return frozenset(read - called | multiplied)


def check_names(config: SponConfig, model: nn.Module, targets: list[str]) -> None:
    """
    Args:
        config (`SponConfig`): of a new adapter; its `target_modules` may be a regular expression.
        model (`nn.Module`): the base model.
        targets (`list[str]`): names of the layers that it targets.

    Raises:
        `ValueError`: one of `target_modules`, `exclude_modules`, `layers_to_transform` or `modules_to_save` matches
            nothing, or a target is never called.
    """
    modules = dict(outer_modules(model))
    linears = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
    ends = f"the linear layers of {type(model).__name__} are called {', '.join(linears)}."
    wanted = [] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    missing = [key for key in wanted if not any(matches({key}, name) for name in modules)]
    if missing:
        raise ValueError(f"Target modules {missing} of target_modules not found in the model; {ends}")
    excluded = config.exclude_modules or []
    for key in [excluded] if isinstance(excluded, str) else sorted(excluded):
        found = [name for name in modules if matches(key if isinstance(excluded, str) else {key}, name)]
        if not found:
            raise ValueError(f"exclude_modules has {key!r}, which no module matches; {ends}")
        if not any(is_linear(modules[name]) or not list(modules[name].children()) for name in found):
            raise ValueError(
                f"exclude_modules has {key!r}, which is no layer but holds some, and these stay targets; name the "
                f"layers, or give a regular expression for them: exclude_modules=r'.*\\b{found[0]}\\..*'."
            )
    wanted = config.layers_to_transform
    for index in [] if wanted is None else [wanted] if isinstance(wanted, int) else wanted:
        if targets and not any(str(index) in name.split(".") for name in targets):
            raise ValueError(
                f"layers_to_transform has {index!r}, but no targeted layer is in a block of that number; they are "
                f"{preview(targets)}."
            )
    for key in set(config.modules_to_save or []) - HEADS:
        if not any(name.endswith(key) for name in modules):
            children = [name for name, _ in model.named_children()]
            raise ValueError(
                f"modules_to_save has {key!r}, which no module of {type(model).__name__} matches; its parts are "
                f"{preview(children)}."
            )
    unused = never_called(model, targets)
    if unused:
        called = {name.rpartition(".")[2] for name in set(targets) - set(unused)}
        leave = {name if (last := name.rpartition(".")[2]) in called else last for name in unused}
        raise ValueError(
            f"target_modules match {preview(unused)}, which the model never calls: it reads their weight, so there is "
            f"no input that could be made sparse. Leave them out: exclude_modules={sorted(leave)}."
        )
