"""What a retrofit would come to, from configurations alone: no weights are read, nothing is made."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.models import KANSpec, complete_spec, replaced_sites, skeleton_of
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.sites import Site, original_at
from kallm_bench.profiling import flops_per_token
from kallm_bench.training import SCOPES, parameters_in

ADAM_BYTES = 12
"""A learning parameter's gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True)
class Place:
    """A site as it would be.

    Args:
        name: "3", or "3.mlp.up_proj".
        before, after: class and parameters of what goes and of what comes; an adapter comes with its layer.
    """

    name: str
    before: tuple[str, int]
    after: tuple[str, int]


@dataclass(frozen=True)
class Forecast:
    """A retrofit that was not made.

    Args:
        spec: complete.
        parameters, flops: of the model (a token forward) before and after.
        trainable: scope -> parameters that would learn in it.
        places: every site.
    """

    spec: KANSpec
    parameters: tuple[int, int]
    flops: tuple[int, int]
    trainable: dict[str, int]
    places: tuple[Place, ...]

    @property
    def weights(self) -> dict[str, int]:
        """Dtype -> the bytes that all weights take in it afterwards."""
        return {name: self.parameters[1] * size for name, size in (("float32", 4), ("bfloat16", 2))}

    def training_bytes(self, scope: str) -> int:
        """Float32 weights, gradients and AdamW's moments; activations, which depend on the batch, come on top."""
        return self.weights["float32"] + ADAM_BYTES * self.trainable[scope]

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_json(),
            "parameters_before": self.parameters[0],
            "parameters": self.parameters[1],
            "flops_per_token_before": self.flops[0],
            "flops_per_token": self.flops[1],
            "trainable_parameters": self.trainable,
            "weights_bytes": self.weights,
            "training_bytes": {scope: self.training_bytes(scope) for scope in self.trainable},
            "sites": [dataclasses.asdict(place) for place in self.places],
        }


def forecast(config: PreTrainedConfig, spec: KANSpec) -> Forecast:
    """What `spec` would make of a model of this configuration, whose retrofits so far are noted in `config.kallm`.

    Raises:
        SpecError: as the retrofit itself would.
    """
    spec = complete_spec(config, spec)
    wanted = copy.deepcopy(config)
    wanted.kallm = [*(getattr(config, "kallm", None) or []), spec.to_json()]
    before, after = skeleton_of(config), skeleton_of(wanted)
    held, coming = replaced_sites(before), replaced_sites(after)
    places = tuple(
        Place(site.name, _told(held.get(site) or original_at(before, site)), _told_of(after, site, coming[site]))
        for site in Anatomy.of(config).sites(spec)
    )
    return Forecast(
        spec,
        (_count(before), _count(after)),
        (flops_per_token(before), flops_per_token(after)),
        {scope: sum(parameter.numel() for parameter in parameters_in(after, scope)) for scope in SCOPES},
        places,
    )


def _told_of(model: PreTrainedModel, site: Site, module: nn.Module) -> tuple[str, int]:
    """What stands at a site, for an adapter with the layer that it is beside."""
    beside = model.get_submodule(site.path)
    return _told(beside if isinstance(beside, AdaptedLinear) else module)


def _told(module: nn.Module) -> tuple[str, int]:
    kinds = [type(child).__name__ for child in module] if isinstance(module, nn.Sequential) else [type(module).__name__]
    return " > ".join(kinds), _count(module)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
