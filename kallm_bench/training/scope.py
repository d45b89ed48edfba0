"""What learns: which parameters a training run may change."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import TrainingError, unknown
from kallm_bench.models import replaced_modules
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.training.adapters import LoraSettings, adapted_layers

SCOPES = {
    "replaced": "the modules a retrofit put in",
    "tail": "every block from the first replaced one on, and the final norm",
    "tail+head": "the tail and the language-model head; a tied embedding learns through the head alone",
    "all": "everything",
    "lora": "low-rank adapters beside the linear layers and KAN layers of the tail's blocks, or of all; nothing else",
}

FOR_ANY = ("all", "lora")
"""Scopes that a model needs nothing replaced for."""


class ClassHead(nn.Linear):
    """A head for classes, which learns in every scope: it was put in to be learned."""


def check_scope(scope: str, *, replaced: bool, tail_from: int | None = None) -> None:
    """Asks whether there is such a scope in a model that has, or has not, replaced blocks. TrainingError if not."""
    if scope not in SCOPES:
        raise TrainingError(unknown("scope", scope, SCOPES))
    if not replaced and scope not in FOR_ANY and (scope == "replaced" or tail_from is None):
        instead = "--scope all or lora" + ("" if scope == "replaced" else ", or tail_from in a suite's [train]")
        raise TrainingError(f"scope '{scope}' needs replaced blocks and this model has none; take {instead}")


def parameters_in(
    model: PreTrainedModel, scope: str, tail_from: int | None = None, lora: LoraSettings | None = None
) -> list[nn.Parameter]:
    """The parameters that learn in `scope`, each once. Changes nothing.

    Args:
        scope: a key of SCOPES. Of "lora" the model has none yet: these are as many, of the same shapes, without values.
        tail_from: first block of the tail; None for the first replaced one, and of "lora" for all where none is.
        lora: of that scope.

    Raises:
        TrainingError: unknown scope, or one that needs a replaced block where none is; a layer for adapters that is not
            there.
    """
    replaced = replaced_modules(model)
    check_scope(scope, replaced=bool(replaced), tail_from=tail_from)
    if scope == "all":
        return list(model.parameters())
    if scope == "replaced" or tail_from is None:
        tail_from = min(replaced, default=0)
    blocks = find_blocks(model)
    if tail_from >= len(blocks):
        raise TrainingError(f"tail_from {tail_from}: the model has {len(blocks)} blocks, 0-{len(blocks) - 1}")
    if scope == "lora":
        lora = lora or LoraSettings()
        widths = [widths for _, *widths in adapted_layers(model, tail_from, lora.targets).values()]
        with torch.device("meta"):
            shapes = [shape for into, out in widths for shape in ((lora.rank, into), (out, lora.rank))]
            return [nn.Parameter(torch.empty(shape)) for shape in shapes]
    if scope == "replaced":
        modules: list[nn.Module] = list(replaced.values())
    else:
        modules = [*blocks[tail_from:], *after_blocks(model)]
        if scope == "tail+head":
            modules.append(model.get_output_embeddings())
    return list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


def apply_scope(
    model: PreTrainedModel,
    scope: str,
    tail_from: int | None = None,
    lora: LoraSettings | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Changes `model` so that only `scope` learns; returns what does. Call the model through its forward afterwards.

    In every scope but "all" the input embedding passes nothing back, so a head tied to it learns as a head only, and
    no graph is kept for the frozen blocks below the tail. "lora" puts adapters in, which `merge` takes out again.

    Args:
        seed: of adapters.
    """
    merge(model, scope)  # what an earlier call has put in
    learning = parameters_in(model, scope, tail_from, lora)
    if scope == "lora":
        from kallm_bench.training.lora import add_adapters

        first = min(replaced_modules(model), default=0) if tail_from is None else tail_from
        learning = add_adapters(model, first, lora or LoraSettings(), seed)
    model.requires_grad_(False)
    if isinstance(head := model.get_output_embeddings(), ClassHead):
        known = {id(parameter) for parameter in learning}
        learning += [parameter for parameter in head.parameters() if id(parameter) not in known]
    for parameter in learning:
        parameter.requires_grad_(True)
    embeddings = model.get_input_embeddings()
    for number, hook in list(embeddings._forward_hooks.items()):
        if hook is _detach:  # of an earlier scope
            del embeddings._forward_hooks[number]
    if scope != "all":
        embeddings.register_forward_hook(_detach)
    return learning


def merge(model: PreTrainedModel, scope: str) -> None:
    """Changes `model`, which has learned in `scope`, into an ordinary one: adapters become a part of its weights."""
    if scope == "lora":
        from kallm_bench.training.lora import merge_adapters

        merge_adapters(model)


def _detach(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach()


def after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """What a decoder applies after its last block: the norms beside its list of blocks. OPT names its own first."""
    blocks = find_blocks(model)
    decoder = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    children = list(decoder.named_children())
    place = next(number for number, (_, child) in enumerate(children) if child is blocks)
    last = [child for name, child in children[:place] if name.startswith("final")]
    last += [child for _, child in children[place + 1 :]]
    return [child for child in last if any(True for _ in child.parameters())]
