"""Replace the feed-forward modules of chosen blocks: all of them, or, where anything is wrong, none."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kallm_bench.models.modeling import original_class, retrofitted_class, specs_of
from kallm_bench.models.replacement import complete, make_replacement, winning_specs
from kallm_bench.models.sites import find_sites
from kallm_bench.models.spec import KANSpec
from kallm_bench.models.start import start_randomly


def retrofit(model: PreTrainedModel, spec: KANSpec) -> KANSpec:
    """Changes `model` in place: puts what `spec` asks for into its blocks, started at random.

    New modules take the device, dtype and training mode of the model. The spec is noted in `model.config.kallm`, which
    is what saving reads; a later retrofit of a block wins over an earlier one. Everything is checked and built before
    anything is replaced, so a refused retrofit leaves the model as it was.

    Returns:
        The spec with nothing left to defaults.

    Raises:
        SpecError: see KANSpec, find_sites, make_replacement and start_randomly.
    """
    sites = find_sites(model)
    text_config = model.config.get_text_config(decoder=True)
    originals = _original_feedforwards(model.config, original_class(model))
    spec = complete(spec.resolved(len(sites)), originals, text_config.hidden_size)
    deviation = getattr(text_config, "initializer_range", 0.02)

    replacements: dict[int, nn.Module] = {}
    for block in map(int, spec.blocks):
        with torch.device("meta"):
            module = make_replacement(originals[block], text_config.hidden_size, spec)
        module = module.to(model.dtype).to_empty(device=model.device).train(model.training)
        start_randomly(module, spec.seed, block, deviation)
        replacements[block] = module

    for block, module in replacements.items():
        sites[block].replace(module)
    model.config.kallm = [before.to_json() for before in specs_of(model.config)] + [spec.to_json()]
    model.__class__ = retrofitted_class(type(model))
    return spec


def complete_spec(config: PreTrainedConfig, spec: KANSpec) -> KANSpec:
    """What `retrofit` would return for a model of this configuration; needs no weights and changes nothing."""
    originals = _original_feedforwards(config, _architecture(config))
    return complete(spec.resolved(len(originals)), originals, config.get_text_config(decoder=True).hidden_size)


def replaced_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Block number -> the module a retrofit put there; empty for an untouched model."""
    blocks = winning_specs(specs_of(model.config))
    return {site.block: site.module for site in find_sites(model) if site.block in blocks} if blocks else {}


def _original_feedforwards(config: PreTrainedConfig, architecture: type[PreTrainedModel]) -> list[nn.Module]:
    """The feed-forwards of the untouched architecture, one a block, as shapes without values."""
    with torch.device("meta"):
        skeleton = architecture._from_config(copy.deepcopy(config))
    return [site.module for site in find_sites(skeleton)]


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    architecture: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture
