# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What was measured of a sparse model, remembered for its card until what was measured changes."""

import torch
from torch import nn

from .layer import SponLayer
from .loading import whole_checksum
from .sites import Site, sites


def remember_results(model: nn.Module, adapter_name: str | None, results: str) -> None:
    """Keep what was measured of an adapter, or of a merged model (None), as Markdown; nothing of a sharded model."""
    layers = sites_of(model, adapter_name)
    checksum = state_checksum(layers, adapter_name)
    if checksum is not None:
        held = vars(next(iter(layers.values())))
        held["spon_results"] = {**held.get("spon_results", {}), adapter_name: (checksum, results)}


def known_results(model: nn.Module, adapter_name: str | None) -> str:
    """What was measured of it as it is now, or nothing."""
    layers = sites_of(model, adapter_name)
    kept = [vars(layer).get("spon_results", {}) for layer in layers.values()]
    checksum, results = next((found[adapter_name] for found in kept if adapter_name in found), (None, ""))
    return results if results and checksum == state_checksum(layers, adapter_name) else ""


def sites_of(model: nn.Module, adapter_name: str | None) -> dict[str, Site]:
    """The layers of an adapter, or the merged ones (None)."""
    if adapter_name is None:
        return {name: layer for name, layer in sites(model).items() if not isinstance(layer, SponLayer)}
    layers = {name: layer for name, layer in sites(model).items() if isinstance(layer, SponLayer)}
    return {name: layer for name, layer in layers.items() if adapter_name in layer.spon_settings}


def state_checksum(layers: dict[str, Site], adapter_name: str | None) -> str | None:
    """Of what is trained or calibrated: anchors, gains, thresholds, sparsities, a LoRA beneath. None if sharded."""
    tensors = {}
    for name, layer in layers.items():
        sparsifier, state = layer.sparsifier(adapter_name), layer.sparsifier_state(adapter_name)
        found = {"sparsity": torch.tensor(sparsifier.sparsity)}
        if "threshold" in state:
            found["threshold"] = state["threshold"]
        if isinstance(layer, SponLayer):
            plain = {id(parameter) for parameter in layer.plain_layer().parameters()}
            held = {"anchor": layer.spon_anchor, "gain": layer.spon_gain}
            found |= {key: values[adapter_name] for key, values in held.items() if adapter_name in values}
            found |= {key: p for key, p in layer.base_layer.named_parameters() if id(p) not in plain}
        else:
            found |= layer.own_tensors()
        tensors |= {f"{name}.{key}": value.detach() for key, value in found.items()}
    return whole_checksum(tensors)
