"""Low-rank adapters, by peft: put beside frozen layers for training, and merged into their weights afterwards.

Imported only where there are some: peft takes seconds to load.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.kan import KANLinear
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.training.adapters import LoraSettings, adapted_layers, widths_of

NAME = "default"


class KANAdapter(Linear):
    """A KANLinear with an adapter on the matrix of its coefficients.

    A takes the values of the basis functions, (..., F) as KANLinear.features gives them, in the place of raw inputs.
    """

    base_layer: KANLinear

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return widths_of(module)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        y: Tensor = self.base_layer(x)
        features = self.lora_dropout[NAME](self.base_layer.features(x))
        change: Tensor = self.lora_B[NAME](self.lora_A[NAME](features)) * self.scaling[NAME]
        return (y + change).to(y.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds what the adapter has learned to the layer's coefficients, and to its path past the basis."""
        layer = self.base_layer
        first, second = (self.get_parameter(f"lora_{which}.{NAME}.weight") for which in "AB")
        change = second @ first * self.scaling[NAME]  # (O, F)
        functions = layer.coefficients[0].numel()
        layer.coefficients.add_(change[:, :functions].reshape(layer.coefficients.shape))
        if layer.linear is not None:
            layer.linear.add_(change[:, functions:])
        self.merged_adapters.append(NAME)


class SecondAdapter(Linear):
    """An adapter for the matrix of a layer beside which a retrofit has put a KAN; the KAN gets none."""

    base_layer: AdaptedLinear

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return widths_of(module)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds what the adapter has learned to the layer's weight."""
        layer = self.base_layer
        first, second = (self.get_parameter(f"lora_{which}.{NAME}.weight") for which in "AB")
        change = second @ first * self.scaling[NAME]  # (O, I)
        layer.weight.add_(change.T if layer.turned else change)
        self.merged_adapters.append(NAME)


def add_adapters(model: PreTrainedModel, first_block: int, settings: LoraSettings, seed: int) -> list[nn.Parameter]:
    """Changes `model`: every layer of adapters.adapted_layers gets one that changes nothing yet. Returns what it has.

    A is drawn by `seed` and B is zero, so that every process, and a run that goes on, begins with the same.
    """
    names = list(adapted_layers(model, first_block, settings.targets))
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names)
    config._register_custom_module({KANLinear: KANAdapter, AdaptedLinear: SecondAdapter})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it finds out by itself which weights are stored turned round
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Changes `model`: what its adapters have learned is added to the weights, and they are gone."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)
    model.requires_grad_(False)
