"""Replace the feed-forward parts of chosen blocks: all of them, or, where anything is wrong, none."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.calibration import Calibration
from kallm_bench.models.completion import complete, count_parameters
from kallm_bench.models.modeling import original_class, retrofitted_class, specs_of
from kallm_bench.models.replacement import make_replacement, winning_sites, winning_specs
from kallm_bench.models.sites import Site, module_at, original_at, put
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
        SpecError: see KANSpec, Anatomy, make_replacement and start.
    """
    anatomy = Anatomy.of(model.config, original_class(model))
    before = specs_of(model.config)
    spec = complete(spec.resolved(len(anatomy.blocks)), anatomy, before)
    deviation = getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02)

    held, standing, replacements = winning_specs(before), dict[Site, nn.Module](), dict[Site, nn.Module]()
    for site in anatomy.sites(spec):
        with torch.device("meta"):
            module = make_replacement(anatomy, site, spec)
        last = held.get((site.block, site.part))
        same = last is not None and (last.target == "feedforward") == (spec.target == "feedforward")
        standing[site] = module_at(model, site) if same else original_at(model, site)
        replacements[site] = module.to(torch.float32).to_empty(device=device or _device_of(model, site))
    report = start(model, standing, replacements, spec, deviation, calibration, watch)

    for site, _ in winning_sites(anatomy, before):
        for path in site.silent if site.block in spec.blocks and site.part in spec.parts else ():
            model.set_submodule(path, copy.deepcopy(anatomy.model.get_submodule(path)))  # it has no parameters
    for site, module in replacements.items():
        put(model, site, module.to(model.dtype).train(model.training))
    model.config.kallm = [each.to_json() for each in before] + [spec.to_json()]
    model.__class__ = retrofitted_class(type(model))
    return spec, report


def complete_spec(config: PreTrainedConfig, spec: KANSpec) -> KANSpec:
    """What `retrofit` would return for a model of this configuration; needs no weights and changes nothing."""
    anatomy = Anatomy.of(config)
    return complete(spec.resolved(len(anatomy.blocks)), anatomy, specs_of(config))


def parameters_of(config: PreTrainedConfig, spec: KANSpec) -> int:
    """How many parameters a complete spec puts into a model of this configuration."""
    return count_parameters(spec, Anatomy.of(config))


def replaced_sites(model: PreTrainedModel) -> dict[Site, nn.Module]:
    """What retrofits put into a model, in order of blocks; empty for an untouched one."""
    specs = specs_of(model.config)
    if not specs:
        return {}
    anatomy = Anatomy.of(model.config, original_class(model))
    return {site: module_at(model, site) for site, _ in winning_sites(anatomy, specs)}


def replaced_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Block number -> the module that a retrofit put there, or a list of them where it put several."""
    found: dict[int, list[nn.Module]] = {}
    labelled = set()
    for site, module in replaced_sites(model).items():
        found.setdefault(site.block, []).append(module)
        if site.label:
            labelled.add(site.block)
    return {b: nn.ModuleList(modules) if b in labelled else modules[0] for b, modules in found.items()}


def _device_of(model: PreTrainedModel, site: Site) -> torch.device:
    """Where what stands at a site is: a model may be spread over several devices."""
    devices = (parameter.device for parameter in model.get_submodule(site.path).parameters())
    device: torch.device = next(devices, model.device)
    return device
