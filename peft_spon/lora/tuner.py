# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""What a `SponModel` does for the LoRA beneath."""

from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .._peft import set_adapter, set_auxiliary_adapter, set_requires_grad
from ..layer import SponLayer
from ..sites import plain_name
from .adapters import active_lora, lora_layers, lora_names, repair_lora, task_loras
from .adding import delete_lora
from .checks import check_biases, check_finite
from .taken_over import lora_taken_over
from .trained import Trainable, apply_trainable


class OverLora(Trainable):
    """
    Of a SPON tuner: PEFT's methods also serve the LoRA that lies beneath, where there is one.

    Attributes:
        taken_over ([`TakenOver`], *optional*): the LoRA model on which SPON was put.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        with lora_taken_over(model, adapter_name, config) as (inner, taken):
            super().__init__(inner, peft_config, adapter_name, *args, **kwargs)
        self.taken_over, self.trained_before = taken, trained

    def give_back(self) -> None:
        """Once all SPON layers are out again: the model as it was, its LoRA and what of it is trained included."""
        if self.taken_over:
            self.taken_over.give_back()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained_before)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """
        Choose the active adapters. With LoRA beneath: those of the kind that is named; the other kind stays as it is.

        Args:
            adapter_name (`str` or `list[str]`): SPON adapters, LoRA adapters, or both.
            inference_mode (`bool`, *optional*, defaults to `False`): freeze them.
        """
        wanted = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        named = [name for name in wanted if name in lora_names(self.peft_config)]
        spon = [name for name in wanted if name not in named]
        active = active_lora(self.model)
        # The LoRA of the repair is a kind of its own: it stays as SPON does.
        lora = [*(task_loras(named) or task_loras(active)), *(repair_lora(named) or repair_lora(active))]
        lora = lora if named else []
        if lora:
            set_adapter(self.model, lora, inference_mode=inference_mode, layer_cls=LoraLayer)
        if spon or not lora:
            super().set_adapter(adapter_name if not lora else spon, inference_mode)
        if lora or active:
            self._set_auxiliary([*self.active_adapters, *(lora or active)], inference_mode)

    def _set_auxiliary(self, names: list[str], inference_mode: bool = False) -> None:
        # The modules_to_save of all these adapters; what is trained stays as `set_trainable` chose it.
        set_auxiliary_adapter(self.model, names, inference_mode=inference_mode)
        if not inference_mode:
            self._keep_choice()

    def _keep_choice(self) -> None:
        if self.trainable_choice is not None and active_lora(self.model):
            apply_trainable(self.model, self.trainable_choice)

    def enable_adapter_layers(self) -> None:
        """As PEFT's; what is trained stays as `set_trainable` chose it."""
        super().enable_adapter_layers()
        self._keep_choice()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a SPON adapter, or a LoRA beneath; with the last LoRA its layers go, too.

        Args:
            adapter_name (`str`): its name.

        Raises:
            `ValueError`: unknown, or merged.
        """
        if adapter_name not in lora_names(self.peft_config):
            active = active_lora(self.model)
            super().delete_adapter(adapter_name)
        else:
            delete_lora(self.model, adapter_name)
            active = active_lora(self.model)
            if not task_loras(lora_names(self.peft_config)):
                if self.trainable_choice == "lora":
                    set_requires_grad(self.model, [*self.active_adapters, *repair_lora(active)], True)
                self.trainable_choice = None
        if active:
            self._set_auxiliary([*self.active_adapters, *active])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, refusing first what could only be merged by half."""
        check_biases(lora_layers(self.model), adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As PEFT's, refusing first what could only be merged by half."""
        layers = lora_layers(self.model)
        check_biases(layers, adapter_names)
        if safe_merge:
            check_finite(layers)
        if adapter_names is not None and layers:
            self._set_auxiliary(adapter_names)  # the modules_to_save of what is merged, not of the rest
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """Let `model(..., adapter_names=[...])` and `generate` choose one adapter per sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if repair_lora(active_lora(self.model)):
            raise ValueError(
                "adapter_names chooses one adapter per row, and the repair LoRA of this model acts on every row beside"
                " it. Leave adapter_names out, or merge what is to run: model.merge_and_unload()."
            )
        # Errors begin with PEFT's words for the same misuse of LoRA.
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. The adapters are "
                f"{sorted(self.peft_config)}; '__base__' stands for the model without them: without SPON, or, beside "
                "names of LoRAs, without LoRA."
            )
        lora = set(lora_names(self.peft_config))
        if set(adapter_names) != {"__base__"}:  # rows that all want no LoRA, as in a batch where others want one
            lora &= set(adapter_names)
        if lora and set(adapter_names) - lora - {"__base__"}:
            raise ValueError(
                f"adapter_names is {adapter_names}: name LoRA adapters ({sorted(lora)}), or SPON adapters, not both; "
                "the other kind stays as it is."
            )
        kind = LoraLayer if lora else SponLayer
        of_kind = lora or set(self.peft_config) - set(lora_names(self.peft_config))
        chosen = set(adapter_names) & of_kind or of_kind  # all rows "__base__": whatever is active is off
        beams = kwargs.get("num_beams") or 1
        if beams > 1 and not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = self.model.get_encoder() if self.get_model_config(self.model).get("is_encoder_decoder") else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = []
        for module in self.modules():
            is_wrapper = isinstance(module, AuxiliaryTrainingWrapper) and module._adapters & chosen
            if isinstance(module, kind) or is_wrapper:
                # Beam search repeats the rows that the decoder sees; the encoder ran before that.
                names = list(adapter_names) if module in in_encoder else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
