# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What peft_spon uses of PEFT beyond its public names, in one place: what another version of PEFT may have renamed."""

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    _get_in_out_features as in_out_features,
)
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers as include_all_linear_layers,
)
from peft.tuners.tuners_utils import (
    cast_adapter_dtype,
    check_adapters_to_merge,
    check_target_module_exists,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import _set_adapter as set_auxiliary_adapter
from peft.utils.other import get_pattern_key


__all__ = [
    "BufferDict",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "dequantize_module_weight",
    "get_pattern_key",
    "in_out_features",
    "include_all_linear_layers",
    "set_adapter",
    "set_auxiliary_adapter",
    "set_requires_grad",
]
