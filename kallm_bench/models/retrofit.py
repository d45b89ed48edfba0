"""Replace the feed-forward modules of chosen blocks: all of them, or, where anything is wrong, none."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kallm_bench.errors import SpecError
from kallm_bench.models.calibration import Calibration
from kallm_bench.models.modeling import original_class, retrofitted_class, specs_of
from kallm_bench.models.replacement import complete, count_parameters, make_replacement, winning_specs
from kallm_bench.models.sites import find_sites
from kallm_bench.models.spec import KANSpec
from kallm_bench.models.start import StartReport, start
from kallm_bench.progress import Watch, nobody


def retrofit(model: PreTrainedModel, spec: KANSpec, calibration: Calibration | None = None) -> KANSpec:
    """Changes `model` in place: puts what `spec` asks for into its blocks. See `retrofit_reporting`.

    Returns:
        The spec with nothing left to defaults.
    """
    return retrofit_reporting(model, spec, calibration)[0]


def retrofit_reporting(
    model: PreTrainedModel,
    spec: KANSpec,
    calibration: Calibration | None = None,
    watch: Watch = nobody,
    device: torch.device | str | None = None,
) -> tuple[KANSpec, StartReport]:
    """Changes `model` in place: puts what `spec` asks for into its blocks, started as `spec.start` says.

    New modules take the device, dtype and training mode of the model. The spec is noted in `model.config.kallm`, which
    is what saving reads; a later retrofit of a block wins over an earlier one. Everything is checked and built before
    anything is replaced, so a refused retrofit leaves the model as it was.

    Args:
        calibration: rows of text for the starts that need some.
        device: of the new modules, where that is not the model's: a skeleton on the meta device gets modules with the
            values that the whole model would get, if they are made on the CPU.

    Returns:
        The spec with nothing left to defaults, and how well the replacements stand in.

    Raises:
        SpecError: see KANSpec, find_sites, make_replacement and start.
    """
    sites = find_sites(model)
    text_config = model.config.get_text_config(decoder=True)
    originals = _original_feedforwards(model.config, original_class(model))
    spec = complete(spec.resolved(len(sites)), originals, text_config.hidden_size, specs_of(model.config))
    deviation = getattr(text_config, "initializer_range", 0.02)

    replacements: dict[int, nn.Module] = {}
    for block in map(int, spec.blocks):
        with torch.device("meta"):
            module = make_replacement(originals[block], text_config.hidden_size, spec)
        replacements[block] = module.to(torch.float32).to_empty(device=device or model.device)
    report = start(model, sites, replacements, spec, deviation, calibration, watch)

    for block, module in replacements.items():
        module.to(model.dtype).train(model.training)
        sites[block].replace(module)
    model.config.kallm = [before.to_json() for before in specs_of(model.config)] + [spec.to_json()]
    model.__class__ = retrofitted_class(type(model))
    return spec, report


def complete_spec(config: PreTrainedConfig, spec: KANSpec) -> KANSpec:
    """What `retrofit` would return for a model of this configuration; needs no weights and changes nothing."""
    originals = _original_feedforwards(config, _architecture(config))
    width = config.get_text_config(decoder=True).hidden_size
    return complete(spec.resolved(len(originals)), originals, width, specs_of(config))


def parameters_of(config: PreTrainedConfig, spec: KANSpec) -> int:
    """How many parameters a complete spec puts into a model of this configuration."""
    originals = _original_feedforwards(config, _architecture(config))
    return count_parameters(spec, originals, config.get_text_config(decoder=True).hidden_size)


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
    own = type(config).__module__.startswith("transformers_modules.")  # where transformers puts what a folder brings
    if own or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "brings its own code, without which a retrofit of it could not be loaded" if own else "is no decoder"
        raise SpecError(f"a model of the type '{config.model_type}' cannot be retrofitted: it {reason}")
    architecture: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture
