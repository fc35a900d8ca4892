# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""S: which entries of a linear layer's input are kept.

One file per method; to add one, write its file and list it here, or, outside of this package, [`register_criterion`].
"""

from dataclasses import fields
from typing import Any

from .base import Criterion, Spec, State
from .larosa import LaRoSA
from .magnitude import Magnitude
from .relative import Relative
from .robust import Robust
from .rsparse import RSparse
from .sparsifier import QUANTILE_POINTS, Sparsifier, entries_kept, keep_above, keep_top_k, threshold_at
from .topk import TopK
from .weighted import Weighted
from .wina import Wina


CRITERIA: dict[str, type[Criterion]] = {
    c.name: c for c in (Magnitude, Relative, TopK, Wina, Weighted, Robust, RSparse, LaRoSA)
}


def register_criterion(criterion: type[Criterion]) -> type[Criterion]:
    """
    Let `SponConfig(criterion="name")` find a criterion from outside of this package; usable as a decorator.

    Whoever loads an adapter that uses it registers it first, too: import the module that does.

    Args:
        criterion (`type[Criterion]`): a frozen dataclass with the attributes and methods of [`Criterion`].

    Raises:
        `TypeError`: not a subclass of [`Criterion`].
        `ValueError`: no name, a name that another criterion has, an unknown `selects`.
    """
    if not (isinstance(criterion, type) and issubclass(criterion, Criterion)):
        raise TypeError(f"{criterion!r} is no criterion; give a subclass of peft_spon.Criterion.")
    name = getattr(criterion, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{criterion.__name__}.name is {name!r}; give the name that users write in SponConfig.")
    if criterion.selects not in ("threshold", "topk"):
        raise ValueError(f"{criterion.__name__}.selects is {criterion.selects!r}; use 'threshold' or 'topk'.")
    owner = CRITERIA.setdefault(name, criterion)
    if (owner.__module__, owner.__qualname__) != (criterion.__module__, criterion.__qualname__):
        raise ValueError(
            f"The criterion {name!r} is {owner.__module__}.{owner.__qualname__} already; name it otherwise."
        )
    CRITERIA[name] = criterion  # a notebook cell run again defines the class anew
    return criterion


def make_criterion(name: str, dials: dict[str, Any]) -> Criterion:
    """A criterion from its name and dials.

    Raises:
        `ValueError`: unknown criterion, or a dial that it does not have.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        raise ValueError(
            f"criterion is {name!r}; use one of {', '.join(CRITERIA)}. (One from another package has to be registered "
            "first: import that package.)"
        )
    cls = CRITERIA[name]
    if not isinstance(dials, dict):
        raise ValueError(f"criterion_kwargs is {dials!r}; use a dictionary of dials.")
    known = {f.name for f in fields(cls)}
    unknown = set(dials) - known
    if unknown:
        raise ValueError(
            f"criterion_kwargs has {sorted(unknown)} but the dials of criterion {name!r} are "
            f"{sorted(known) or 'none'}; drop or rename them."
        )
    return cls(**dials)


__all__ = [
    "CRITERIA",
    "QUANTILE_POINTS",
    "Criterion",
    "LaRoSA",
    "Magnitude",
    "RSparse",
    "Relative",
    "Robust",
    "Sparsifier",
    "Spec",
    "State",
    "TopK",
    "Weighted",
    "Wina",
    "entries_kept",
    "keep_above",
    "keep_top_k",
    "make_criterion",
    "register_criterion",
    "threshold_at",
]
