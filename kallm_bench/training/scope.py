"""What learns: which parameters a training run may change."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import TrainingError, unknown
from kallm_bench.models import replaced_modules
from kallm_bench.models.anatomy import find_blocks

SCOPES = {
    "replaced": "the modules a retrofit put in",
    "tail": "every block from the first replaced one on, and the final norm",
    "tail+head": "the tail and the language-model head; a tied embedding learns through the head alone",
    "all": "everything",
}


def check_scope(scope: str, *, replaced: bool, tail_from: int | None = None) -> None:
    """Asks whether there is such a scope in a model that has, or has not, replaced blocks. TrainingError if not."""
    if scope not in SCOPES:
        raise TrainingError(unknown("scope", scope, SCOPES))
    if not replaced and scope != "all" and (scope == "replaced" or tail_from is None):
        raise TrainingError(f"scope '{scope}' needs replaced blocks and this model has none; take --scope all")


def parameters_in(model: PreTrainedModel, scope: str, tail_from: int | None = None) -> list[nn.Parameter]:
    """The parameters that learn in `scope`, each once. Changes nothing.

    Args:
        scope: a key of SCOPES.
        tail_from: first block of the tail; None for the first replaced one.

    Raises:
        TrainingError: unknown scope, or one that needs a replaced block where none is.
    """
    replaced = replaced_modules(model)
    check_scope(scope, replaced=bool(replaced), tail_from=tail_from)
    if scope == "all":
        return list(model.parameters())
    if scope == "replaced" or tail_from is None:
        tail_from = min(replaced)
    blocks = find_blocks(model)
    if tail_from >= len(blocks):
        raise TrainingError(f"tail_from {tail_from}: the model has {len(blocks)} blocks, 0-{len(blocks) - 1}")
    if scope == "replaced":
        modules: list[nn.Module] = list(replaced.values())
    else:
        modules = [*blocks[tail_from:], *after_blocks(model)]
        if scope == "tail+head":
            modules.append(model.get_output_embeddings())
    return list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


def apply_scope(model: PreTrainedModel, scope: str, tail_from: int | None = None) -> list[nn.Parameter]:
    """Changes `model` so that only `scope` learns; returns what does. Call the model through its forward afterwards.

    In every scope but "all" the input embedding passes nothing back, so a head tied to it learns as a head only, and
    no graph is kept for the frozen blocks below the tail.
    """
    learning = parameters_in(model, scope, tail_from)
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    embeddings = model.get_input_embeddings()
    for number, hook in list(embeddings._forward_hooks.items()):
        if hook is _detach:  # of an earlier scope
            del embeddings._forward_hooks[number]
    if scope != "all":
        embeddings.register_forward_hook(_detach)
    return learning


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
