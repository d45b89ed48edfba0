"""Put a model's own modules back where a retrofit has replaced them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.modeling import original_class, specs_of
from kallm_bench.models.replacement import winning_sites, winning_specs
from kallm_bench.models.sites import Site
from kallm_bench.models.spec import KANSpec, read_blocks


def blocks_to_revert(config: PreTrainedConfig, blocks: str | Sequence[int] = "all") -> tuple[int, ...]:
    """The blocks that `revert` would put back in a model of this configuration, in order.

    Raises:
        SpecError: nothing was replaced in one of them.
    """
    specs = specs_of(config)
    replaced = sorted({block for block, _ in winning_specs(specs)})
    if not replaced:
        raise SpecError("nothing was replaced in this model, so there is nothing to put back")
    if blocks == "all":
        return tuple(replaced)
    count = config.get_text_config(decoder=True).num_hidden_layers
    chosen = sorted(read_blocks(blocks, count) if isinstance(blocks, str) else blocks)
    if missing := sorted(set(chosen) - set(replaced)):
        raise SpecError(f"nothing was replaced in blocks {missing}; replaced blocks are {replaced}")
    return tuple(chosen)


def revert(model: PreTrainedModel, base: PreTrainedModel, blocks: str | Sequence[int] = "all") -> tuple[int, ...]:
    """Changes `model` in place: what retrofits put into some blocks goes, and the modules of `base` come back.

    What training changed outside the replaced modules stays as it is. Everything is checked before anything changes.

    Args:
        model: a retrofitted one.
        base: the model that it was made from, whose modules go over into `model`.
        blocks: which; "all" for every block that was replaced.

    Returns:
        The blocks, in order.

    Raises:
        SpecError: a block in which nothing was replaced; a `base` of another architecture or of other sizes, or with a
            retrofit of its own there.
    """
    chosen, specs = blocks_to_revert(model.config, blocks), specs_of(model.config)
    for path in (path for site in sites_from(base, model, chosen) for path in site.paths):
        device = next((parameter.device for parameter in model.get_submodule(path).parameters()), model.device)
        model.set_submodule(path, base.get_submodule(path).to(device, model.dtype).train(model.training))
    left = [_without(spec, chosen) for spec in specs]
    model.config.kallm = [spec.to_json() for spec in left if spec.blocks]
    if not model.config.kallm:
        del model.config.kallm
        model.__class__ = original_class(model)
    return chosen


def sites_from(base: PreTrainedModel, model: PreTrainedModel, chosen: Sequence[int]) -> list[Site]:
    """The sites that retrofits filled in some blocks of `model`, if `base` holds what stood there before. SpecError."""
    own, other = original_class(model), original_class(base)
    if own is not other:
        raise SpecError(f"the base is a {other.__name__} and this model a {own.__name__}; pass what it was made from")
    held = sorted({block for block, _ in winning_specs(specs_of(base.config))} & set(chosen))
    if held:
        raise SpecError(f"the base was retrofitted in blocks {held} itself; pass what it was made from")
    anatomy = Anatomy.of(model.config, own)
    sites = [site for site, _ in winning_sites(anatomy, specs_of(model.config)) if site.block in chosen]
    for path in (path for site in sites for path in site.paths):
        if _shapes(base.get_submodule(path)) != _shapes(anatomy.model.get_submodule(path)):
            raise SpecError(f"the base's {path} is of another size than this model's was; pass what it was made from")
    return sites


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _without(spec: KANSpec, blocks: Sequence[int]) -> KANSpec:
    return dataclasses.replace(spec, blocks=tuple(int(block) for block in spec.blocks if int(block) not in blocks))
