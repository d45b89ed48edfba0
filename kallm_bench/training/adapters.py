"""Scope `lora` without its library: which layers of a decoder get an adapter, of what shape, and with what settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from kallm_bench.errors import TrainingError, unknown
from kallm_bench.kan import KANLinear
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.models.sites import LINEAR, inputs_of, outputs_of


@dataclass(frozen=True)
class LoraSettings:
    """What low-rank adapters look like.

    Args:
        rank: r; a layer (O, I) gets B (O, r) and A (r, I).
        alpha: their product counts alpha / rank times.
        dropout: share of an adapter's inputs that is left out in training.
        targets: last parts of the names of the layers that get one ("q_proj"); none named: all.

    Raises:
        TrainingError: a value out of its range.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainingError(f"lora_rank must be at least 1, got {self.rank}")
        if self.alpha < 1:
            raise TrainingError(f"lora_alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"lora_dropout is a share from 0 to below 1, got {self.dropout}")
        if not all(isinstance(target, str) and target for target in self.targets):
            raise TrainingError(f'lora_targets are names of layers, such as ["q_proj"], got {list(self.targets)}')


def adapted_layers(
    model: PreTrainedModel, first_block: int = 0, targets: tuple[str, ...] = ()
) -> dict[str, tuple[nn.Module, int, int]]:
    """Names from the model's root -> layer, and how many values its matrix takes and gives, from `first_block` on.

    Matrices of attention and feed-forward, and every KANLinear: it is linear in its coefficients, a matrix (O, F) on
    the basis functions of its inputs, and that matrix gets the adapter. What has no matrix gets none: a function per
    group of channels, norms, experts that lie in one tensor. A layer beside which a retrofit has put a KAN gets one for
    its own matrix, and the KAN none.

    Raises:
        TrainingError: a target that no layer is named by, or no layer at all.
    """
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    inside = {
        part for layer in blocks.modules() if isinstance(layer, AdaptedLinear) for part in layer.adapter.modules()
    }
    found = {
        f"{prefix}.{number}.{name}": (layer, *widths_of(layer))
        for number, block in enumerate(blocks)
        if number >= first_block
        for name, layer in block.named_modules()
        if isinstance(layer, (*LINEAR, KANLinear, AdaptedLinear)) and layer not in inside
    }
    names = {part for name in found for part in name.split(".")[len(prefix.split(".")) + 1 :] if not part.isdecimal()}
    for target in targets:
        if target not in names:
            raise TrainingError(f"lora_targets: {unknown('layer', target, names)}")
    chosen = {
        name: layer
        for name, layer in found.items()
        if not targets or set(targets) & set(name.removeprefix(prefix).split("."))
    }
    if not chosen:
        raise TrainingError(f"blocks from {first_block} on have no linear layer that could get an adapter")
    return chosen


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """How many values a layer's matrix takes and gives; a KANLinear's takes those of its functions, then raw inputs."""
    if isinstance(layer, KANLinear):
        raw = layer.in_features if layer.linear is not None else 0
        return layer.coefficients[0].numel() + raw, layer.out_features
    if isinstance(layer, AdaptedLinear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, LINEAR)
    return inputs_of(layer), outputs_of(layer)
