"""Replace the feed-forward modules of chosen blocks: all of them, or, where anything is wrong, none."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

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
    originals = _original_feedforwards(model)
    spec = complete(spec.resolved(len(sites)), originals[0], text_config.hidden_size)
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


def replaced_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Block number -> the module a retrofit put there; empty for an untouched model."""
    blocks = winning_specs(specs_of(model.config))
    return {site.block: site.module for site in find_sites(model) if site.block in blocks} if blocks else {}


def _original_feedforwards(model: PreTrainedModel) -> list[nn.Module]:
    """The feed-forwards of the untouched architecture, one a block, as shapes without values."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        skeleton = original_class(model)._from_config(config)
    return [site.module for site in find_sites(skeleton)]
