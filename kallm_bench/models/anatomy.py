"""Where the feed-forwards and the attention of a decoder are, found by structure and not by name.

A decoder keeps its blocks in the one ModuleList that is as long as its configuration says. In a block, a feed-forward
is one of three things:

- a module that takes the hidden states, has linear layers, and gives back their width;
- the same that takes the residual stream too, and adds it by itself (Bloom, MPT);
- two linear layers with an activation between, called one after the other (OPT; BERT keeps them in two modules).

What takes attention masks, positions, caches or states is none of them, whatever layers it has.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kallm_bench.errors import SpecError
from kallm_bench.models.sites import LINEAR, Site, inputs_of, linear_layers, original_at, outputs_of
from kallm_bench.models.spec import KANSpec

MIXES_TOKENS = ("attention", "past", "position", "cache", "state")
"""Words in the names of arguments that only something takes which lets tokens see each other.

"state" is not looked for in "hidden_states", which everything takes.
"""


class Anatomy:
    """An untouched architecture: its modules, with or without values, and the places in them.

    Args:
        model: with all its own modules in place.

    Raises:
        SpecError: no list of blocks, or more than one; no hidden size.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        text = model.config.get_text_config(decoder=True)
        width = getattr(text, "hidden_size", None)
        if not isinstance(width, int):
            raise SpecError(
                f"{self._name}: its configuration has no hidden_size, so nothing of that width can be put in"
            )
        self.width: int = width
        self.blocks = find_blocks(model)
        self._prefix = next(name for name, module in model.named_modules() if module is self.blocks)

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: type[PreTrainedModel] | None = None) -> Anatomy:
        """Of a configuration's architecture, as shapes without values."""
        architecture = architecture or _architecture(config)
        with torch.device("meta"):
            return cls(architecture._from_config(copy.deepcopy(config)))

    def sites(self, spec: KANSpec) -> list[Site]:
        """Every place that a resolved spec fills, in order.

        Raises:
            SpecError: a block has no such place; says why, and which blocks have one.
        """
        sites: list[Site] = []
        for block in map(int, spec.blocks):
            for part in spec.parts:
                found = self._attention(block) if part == "attention" else self._feedforward(block, spec.experts)
                if isinstance(found, str):
                    raise SpecError(f"{self._name}: block {block} {found}{self._others(spec)}")
                if isinstance(found, Site):
                    found = [found] if spec.target == "feedforward" else self._linears(found, spec.activation)
                sites += found
        return sites

    def feedforward(self, block: int, experts: bool = True) -> nn.Module:
        """The feed-forward of a block, as one module from hidden states to hidden states.

        Raises:
            SpecError: there is none.
        """
        found = self._feedforward(block, experts)
        if isinstance(found, str):
            raise SpecError(f"{self._name}: block {block} {found}")
        return original_at(self.model, found)

    def covered(self) -> list[Site | str]:
        """For every block its feed-forward's place, or why there is none; experts are taken whole."""
        return [self._feedforward(block, True) for block in range(len(self.blocks))]

    def mixers(self, block: int) -> dict[str, bool]:
        """Path of each part of a block that lets tokens see each other -> whether it is attention."""
        found = {name: child for name, child in self.blocks[block].named_children() if _mixes_tokens(child)}
        return {self._path(block, name): _is_attention(child) for name, child in found.items()}

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _others(self, spec: KANSpec) -> str:
        """Which blocks would do, where some would and `spec` asks for feed-forwards."""
        if "attention" in spec.parts:
            return ""
        numbers = range(len(self.blocks))
        good = [str(block) for block in numbers if isinstance(self._feedforward(block, spec.experts), Site)]
        return f". Blocks that can be replaced: {','.join(good)}" if good else ""

    def _path(self, block: int, name: str) -> str:
        return f"{self._prefix}.{block}.{name}"

    def _feedforward(self, block: int, experts: bool) -> Site | str:
        module = self.blocks[block]
        parts = {name: child for name, child in module.named_children() if not _mixes_tokens(child)}
        alone = [name for name, child in parts.items() if self._fits(child) and len(_needed(child)) == 1]
        adding = [name for name, child in parts.items() if self._fits(child) and _takes_residual(child)]
        if len(alone) == 1 and not adding:
            child, routes = parts[alone[0]], has_experts(parts[alone[0]])
            if routes and not experts:
                return "routes to experts; --experts replaces them as a whole"
            return Site(
                block,
                self._path(block, alone[0]),
                experts=routes,
                takes=len(inspect.signature(child.forward).parameters),
                returns=_returns(child),
            )
        if len(adding) == 1 and not alone:
            chain = _chain(parts[adding[0]], self.width)
            if chain:
                inner = tuple(self._path(block, f"{adding[0]}.{name}") for name in chain)
                return Site(block, self._path(block, adding[0]), chain=inner, adds=True)
        if not alone and not adding:
            chain = _chain(module, self.width)
            if chain:
                places = tuple(self._path(block, name) for name in chain)
                return Site(block, places[0], chain=places)
        count = f"{len(alone + adding)} feed-forwards where one" if alone + adding else "no feed-forward that"
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
        return f"has {count} can be replaced; its parts are {children}"

    def _attention(self, block: int) -> list[Site] | str:
        sites = []
        for name, child in self.blocks[block].named_children():
            if not _is_attention(child):
                continue
            sites += [
                Site(block, self._path(block, f"{name}.{inner}"), label=f"{name}.{inner}", part="attention")
                for inner, layer in child.named_modules()
                if isinstance(layer, LINEAR)
            ]
        return sites or "has no attention with linear layers"

    def _linears(self, site: Site, activation: str) -> list[Site]:
        """The linear layers of a feed-forward, one by one; the first silences the activations that are dropped."""
        if site.experts:
            raise SpecError(f"{self._name}: block {site.block} routes to experts; take --target feedforward")
        paths = site.chain or tuple(
            f"{site.path}.{name}" for name, module in self.model.get_submodule(site.path).named_modules() if name
        )
        layers = [path for path in paths if isinstance(self.model.get_submodule(path), LINEAR)]
        silent = tuple(path for path in paths if is_activation(self.model.get_submodule(path)))
        if activation == "drop" and not silent:
            raise SpecError(
                f"{self._name}: block {site.block} has no activation module to drop; take --activation keep"
            )
        block = f"{self._prefix}.{site.block}."
        return [
            Site(
                site.block,
                path,
                label=path.removeprefix(block),
                silent=silent if activation == "drop" and path == layers[0] else (),
            )
            for path in layers
        ]

    def _fits(self, module: nn.Module) -> bool:
        """Whether some layer takes the hidden states and some gives them, or experts do."""
        layers = linear_layers(module)
        takes = any(inputs_of(layer) == self.width for layer in layers)
        gives = any(outputs_of(layer) == self.width for layer in layers)
        return (takes and gives) or has_experts(module)


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    own = type(config).__module__.startswith("transformers_modules.")  # where transformers puts what a folder brings
    if own or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "brings its own code, without which a retrofit of it could not be loaded" if own else "is no decoder"
        raise SpecError(f"a model of the type '{config.model_type}' cannot be retrofitted: it {reason}")
    architecture: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return architecture


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's list of blocks.

    Raises:
        SpecError: none, or more than one, as long as the configuration says.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    inner = {part for candidate in lists for part in candidate.modules() if part is not candidate}
    outer = [candidate for candidate in lists if candidate not in inner]
    if len(outer) > 1:  # an encoder beside the decoder, or a tower for images
        inside = set(model.get_decoder().modules())
        outer = [candidate for candidate in outer if candidate in inside]
    if len(outer) != 1:
        raise SpecError(f"{type(model).__name__}: found {len(outer)} lists of {count} blocks, need one")
    return outer[0]


def has_experts(module: nn.Module) -> bool:
    """Whether a part of a block routes tokens to experts: modules alike in a list, or weights with a dimension more."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) > 1 and all(linear_layers(each) for each in part):
            return True
        if any(parameter.dim() == 3 for parameter in part.parameters(recurse=False)):
            return True
    return False


def is_activation(module: nn.Module) -> bool:
    """Whether a module only bends its input, element by element, as far as its class tells."""
    home = type(module).__module__
    named = "activation" in home or type(module).__name__.lower().endswith(("gelu", "silu", "relu"))
    return named and not any(True for _ in module.children())


def _chain(module: nn.Module, width: int) -> tuple[str, ...]:
    """Two linear layers, into an inner width and back, and the activations of `module`; () where there is more or less.

    Paths from `module`: the first layer, the activations, the second layer. What mixes tokens is left out.
    """
    names = [name for name, _ in module.named_modules() if name]
    mixing = [name for name, child in module.named_children() if _mixes_tokens(child)]
    names = [name for name in names if name.partition(".")[0] not in mixing]
    layers = [name for name in names if isinstance(module.get_submodule(name), LINEAR)]
    bends = [name for name in names if is_activation(module.get_submodule(name))]
    if len(layers) != 2 or not bends:
        return ()
    first, second = (module.get_submodule(name) for name in layers)
    fits = inputs_of(first) == outputs_of(second) == width and outputs_of(first) == inputs_of(second)
    return (layers[0], *bends, layers[1]) if fits else ()


def _mixes_tokens(module: nn.Module) -> bool:
    takes = [name.replace("hidden_states", "") for name in inspect.signature(module.forward).parameters]
    return any(word in name for name in takes for word in MIXES_TOKENS)


def _is_attention(module: nn.Module) -> bool:
    takes = inspect.signature(module.forward).parameters
    return "cache_params" not in takes and any("attention" in taken for taken in takes)  # the first: a state space


def _needed(module: nn.Module) -> list[str]:
    """The arguments that a module must be given."""
    takes = inspect.signature(module.forward).parameters.items()
    return [name for name, taken in takes if taken.default is taken.empty and taken.kind < taken.VAR_POSITIONAL]


def _takes_residual(module: nn.Module) -> bool:
    needed = _needed(module)
    return len(needed) == 2 and "residual" in needed[1]


def _returns(module: nn.Module) -> int:
    """How many values a module's forward returns, as its source says; the first is the hidden states."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):
        return 1
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return max((len(value.elts) for value in returned if isinstance(value, ast.Tuple)), default=1)
