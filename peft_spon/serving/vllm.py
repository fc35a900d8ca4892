# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's plug-in: `vllm serve FOLDER` runs a merged SPON model. Only vLLM imports this file, by its entry point.

Every sparse layer is the merged layer of transformers itself ([`SparseMixin`]), once per layer of the checkpoint: what
vLLM fuses (q, k, v; gate, up) keeps its own S, gains and anchors each.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.utils.torch_utils import direct_register_custom_op

from ..checksums import is_same_weight
from ..merged import METHOD, SponMergedConfig
from ..merged_loading import not_as_saved
from .parts import Part, dense_part, read_config, sparse_part, unclaimed


DEBUG = "PEFT_SPON_VLLM_DEBUG"  # a JSON file that is to hold the realised sparsity
SHARDS = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """What the entry point names. vLLM calls it in every of its processes, perhaps more than once."""
    register_quantization_config(METHOD)(SponServedConfig)


class SponServedConfig(QuantizationConfig):
    """The `quantization_config` of a merged checkpoint, as vLLM wants it."""

    def __init__(self, merged: SponMergedConfig):
        super().__init__()
        self.layers = dict(merged.layers)
        self.hashes = {name: entry for name, entry in (merged.hashes or {}).items() if entry is not None}
        self.methods: list[SponLinearMethod] = []
        self.counted: dict[str, list[int]] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SponServedConfig":
        return cls(read_config(config))

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.hashes = hf_to_vllm_mapper.apply_dict(self.hashes)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        if not isinstance(layer, LinearBase):
            return None
        if self.online_quantization_config is not None:
            raise ValueError(
                "vLLM was asked to quantise the weights of a merged SPON model, which would drop S and the anchors. "
                "Leave the option out, or serve the dense base model."
            )
        parent, _, own = prefix.rpartition(".")
        fused = [prefix] if prefix in self.layers else self.packed_modules_mapping.get(own, [own])
        names = [prefix] if fused == [prefix] else [f"{parent}.{name}".removeprefix(".") for name in fused]
        if not any(name in self.layers for name in names):
            return DenseLinearMethod(self)
        self.methods.append(SponLinearMethod(self, prefix, names))
        return self.methods[-1]

    def check_claims(self) -> None:
        """Raises `ValueError` if a sparse layer of the checkpoint would run dense, in silence."""
        if left := unclaimed(self.layers, [name for method in self.methods for name in method.names]):
            raise ValueError(
                f"vLLM's model has no linear layer '{left[0]}' that could be sparse ({len(left)} such): it builds it "
                "otherwise (experts, a head), or calls it by another name. Train the adapter without these layers "
                "(exclude_modules), or generate with transformers."
            )

    def count(self, parts: list[Part], x: torch.Tensor) -> None:
        """Add what S keeps of x (tokens, in) to the counts, and write them where the forward ends."""
        for part in parts:
            if (kept := part.kept(x)) is not None:
                seen, zeroed = self.counted.get(part.name, (0, 0))
                zeros = kept.numel() - int(kept.sum(dtype=torch.float64))
                self.counted[part.name] = [seen + kept.numel(), zeroed + zeros]

    def write_counts(self) -> None:
        shares = {name: zeroed / seen for name, (seen, zeroed) in self.counted.items()}
        sizes = {part.name: part.layer.weight.numel() for method in self.methods for part in method.parts}
        total = sum(shares[name] * sizes[name] for name in shares) / sum(sizes[name] for name in shares)
        with open(os.environ[DEBUG], "w") as file:
            json.dump({"sparsity": total, "layer_sparsity": shares}, file)


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """vLLM's own linear layer, for one that is not sparse."""

    def __init__(self, config: SponServedConfig):
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.config.check_claims()
        super().process_weights_after_loading(layer)


@register_weight_loader_v2_supported_method
class SponLinearMethod(UnquantizedLinearMethod):
    """
    y = W (scale * S(x)) + b + shift, for one of vLLM's linear layers.

    Args:
        config ([`SponServedConfig`]): of the checkpoint.
        prefix (`str`): the layer's name in vLLM.
        names (`list[str]`): the layers of the checkpoint that are in it, by the order of their rows.
    """

    supports_pre_processed_weights = False

    def __init__(self, config: SponServedConfig, prefix: str, names: list[str]):
        super().__init__()
        self.config, self.key, self.names = config, f"{prefix}.spon", names
        self.own: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}  # as in the files
        self.shapes: dict[str, tuple[int, int]] = {}
        self.parts: list[Part] = []
        self.debugged = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        attributes["weight_loader"] = partial(self.load_weight, attributes["weight_loader"])
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        super().create_weights(layer, *sizes, params_dtype, **attributes)
        # vLLM finds the place of a tensor by the name of a parameter. These stay empty: what is loaded is kept whole.
        entries = [self.config.layers[name] for name in self.names if name in self.config.layers]
        for part in {part for entry in entries for part in entry["state"]}:
            place = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
            place.weight_loader = partial(self.keep, part)
            layer.register_parameter(part, place)
        vllm_config = get_current_vllm_config()
        vllm_config.compilation_config.static_forward_context[self.key] = layer
        self.debugged = DEBUG in os.environ and layer.tp_rank == 0
        if self.debugged and not vllm_config.model_config.enforce_eager:
            raise ValueError(f"{DEBUG} counts in Python, which compiled models leave out; add --enforce-eager.")

    def load_weight(
        self, load: Callable, param: nn.Parameter, loaded: torch.Tensor, *shard: Any, **named: Any
    ) -> None:
        """vLLM's own loading of W, once its hash is the one that was saved."""
        name = self.name_of(*shard, **named)
        saved = self.config.hashes.get(f"{name}.weight")
        ways = [loaded, loaded.t()]  # vLLM transposes what transformers calls Conv1D
        if saved is not None and not any(list(w.shape) == saved["shape"] and is_same_weight(w, saved) for w in ways):
            raise ValueError(not_as_saved(f"{name}.weight"))
        self.shapes[name] = tuple(loaded.shape)
        load(param, loaded, *shard, **named)

    def keep(self, part: str, param: nn.Parameter, loaded: torch.Tensor, *shard: Any, **named: Any) -> None:
        """The loader of what SPON adds."""
        self.own[self.name_of(*shard, **named)][part] = loaded.detach().clone()

    def name_of(self, shard: Any = None, **named: Any) -> str:
        """The layer of the checkpoint that vLLM means by "q", "k", "v", a number, or nothing."""
        shard = next(iter(named.values()), shard)
        index = SHARDS.get(shard, shard) if len(self.names) > 1 else 0
        if not isinstance(index, int) or not 0 <= index < len(self.names):
            raise ValueError(f"vLLM loads shard {shard!r} of {self.names}, of which peft_spon does not know the rows.")
        return self.names[index]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.config.check_claims()
        is_spread = layer.weight.shape[1] < layer.input_size
        has_bias = layer.bias is not None and not layer.skip_bias_add and not (is_spread and layer.tp_rank > 0)
        sizes = layer.output_partition_sizes if len(self.names) > 1 else [len(layer.weight)]
        is_fused_in_files = len(self.names) < len(layer.output_partition_sizes)
        if len(sizes) != len(self.names) or (is_fused_in_files and layer.tp_size > 1):
            raise ValueError(
                f"{self.names} are {len(layer.output_partition_sizes)} blocks of rows in vLLM, on {layer.tp_size} "
                "processes; peft_spon cannot tell which anchors are whose. Serve with --tensor-parallel-size 1, or "
                "generate with transformers."
            )
        biases = layer.bias.data.split(sizes) if has_bias else [None] * len(sizes)
        for name, weight, bias in zip(self.names, layer.weight.data.split(sizes), biases, strict=True):
            if name not in self.shapes:
                raise ValueError(not_as_saved(f"{name}.weight"))
            if name not in self.config.layers:
                self.parts.append(dense_part(weight.clone(), bias))
                continue
            entry, own, where = self.config.layers[name], self.own[name], (layer.tp_rank, layer.tp_size)
            self.parts.append(sparse_part(name, entry, own, self.shapes[name], weight, bias, *where))
        for name in {part for own in self.own.values() for part in own}:
            delattr(layer, name)
        self.own.clear()
        layer.weight.data = layer.weight.data.new_empty(0)  # the parts have it, laid out for their kernel

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # The parts have the bias, where this process is to add it.
        if torch.compiler.is_compiling():
            return torch.ops.vllm.spon_linear(x, self.key, sum(part.layer.weight.shape[0] for part in self.parts))
        return self.forward(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, shape (tokens, out), of x (tokens, in)."""
        gathered = self.parts[0].gathered
        whole = x if gathered is None else tensor_model_parallel_all_gather(x)
        if self.debugged and get_forward_context().attn_metadata is not None:  # None: vLLM measures its memory
            self.config.count(self.parts, whole)
            if self is self.config.methods[-1]:
                self.config.write_counts()
        if gathered is not None:
            x = gathered(whole)
        parts = [part.layer(x) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def spon_linear(x: torch.Tensor, key: str, n_out: int) -> torch.Tensor:
    """The forward of a layer as one op: compiled graphs do not know the number of rows, by which it chooses."""
    return get_forward_context().no_compile_layers[key].quant_method.forward(x)


def spon_linear_fake(x: torch.Tensor, key: str, n_out: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n_out))


direct_register_custom_op("spon_linear", spon_linear, fake_impl=spon_linear_fake)
