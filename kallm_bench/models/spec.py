"""KANSpec: what a retrofit puts where. Frozen, and the same in Python, on the command line, in a suite and on disk."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan import ADAPTERS, BASES, CONSTANTS, FORMS
from kallm_bench.kan.layers import has_degree, read_mix

NOT_BASES = {
    "linear": "a fresh copy of the block's own feed-forward: the restart that KANs are compared with",
    "drop": "no feed-forward at all: the block keeps its attention alone",
}
"""What may stand in a basis's place without being one."""

TARGETS = {
    "feedforward": "the whole feed-forward of a block, by one module",
    "linears": "each linear layer inside the feed-forward, by a KAN layer; what is between them stays",
    "attention": "each linear layer of the attention, by a KAN layer",
    "linears+attention": "each linear layer of both",
}
"""What a retrofit replaces in a block."""

PARTS = {
    "feedforward": ("feedforward",),
    "linears": ("feedforward",),
    "attention": ("attention",),
    "linears+attention": ("attention", "feedforward"),
}
"""The parts of a block that these are, in order of their names."""

ACTIVATIONS_KEPT = ("keep", "drop")

STARTS = {
    "random": "drawn anew, preserving variance",
    "lstsq": "the output layer solved in closed form to answer as the replaced module did",
    "distill": "trained for some steps to answer as the replaced module did",
    "inherit": "the replaced module's strongest hidden units go on, for glu and linear; of a single layer, the matrix",
    "sequence": "distilled for a quarter of the steps on what the replaced blocks feed each other",
    "convert": "the functions that the blocks hold already, written in the new basis or degree",
}
"""The phases of a start."""

VERSION = 1

LATER = {
    "linear": False,
    "groups": None,
    "up": False,
    "scaled": False,
    "start": "random",
    "start_steps": 400,
    "params": None,
    "target": "feedforward",
    "activation": "keep",
    "experts": False,
    "rank": None,
}
"""Fields that came later, with what was meant before: written only where they differ, so that older keys hold."""


@dataclass(frozen=True)
class KANSpec:
    """One retrofit.

    Args:
        blocks: block numbers from 0, as a tuple or as text: "25-29", "0,3,5-7", "last:5", "all".
        basis: name of a basis, with arguments after a colon if wanted; or a key of NOT_BASES.
        degree: highest degree, for families that have one; None for the family's default.
        hidden: inner width; None for intermediate_size // 4 in a "stack" (384 in SmolLM2, as published) and for
            intermediate_size in "linear". Not for "single" and "drop", which have no inner width.
        form: a key of kan.FORMS, or of kan.ADAPTERS in the place of single layers; for bases only.
        constant: "bias" or "edge", see KANLinear; for bases only.
        linear: whether KAN layers have a path past the basis; not in form "glu".
        groups: how many learned functions form "glu" has; None for 8.
        up: whether "glu" has learned functions on its up path too.
        scaled: whether KAN layers scale each input channel; a start by least squares or distillation turns it on.
        start: phases of STARTS joined by "+", such as "inherit+distill"; "auto" for "convert" where the blocks already
            hold KANs of this shape, else "random".
        start_steps: of distillation.
        params: sets `hidden` to what comes nearest to so many parameters in all replaced modules: a number, or
            "original" for as many as are replaced.
        seed: of the random start.
        target: a key of TARGETS. In the place of single layers stands a KAN layer, which has no form, and `hidden` is
            the inner width of the feed-forward around it; None leaves it as it is. Or they stay, and an adapter, of one
            of the forms ADAPTERS, is put beside each.
        activation: "keep", or "drop" for linear layers without the feed-forward's own activation between them.
        experts: whether a feed-forward that routes to experts may be replaced as a whole.
        rank: how narrow an adapter is; None for 16. For adapters alone.

    Raises:
        SpecError: anything in it that cannot be, whatever the model.
    """

    blocks: tuple[int, ...] | str
    basis: str
    degree: int | None = None
    hidden: int | None = None
    form: str = "stack"
    constant: str = "bias"
    seed: int = 0
    linear: bool = False
    groups: int | None = None
    up: bool = False
    scaled: bool = False
    start: str = "auto"
    start_steps: int = 400
    params: int | str | None = None
    target: str = "feedforward"
    activation: str = "keep"
    experts: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("degree", "hidden", "seed", "groups", "start_steps", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise SpecError(f"{name} must be a whole number, got {value!r}")
        for name in ("basis", "form", "constant", "start", "target", "activation"):
            if not isinstance(getattr(self, name), str):
                raise SpecError(f"{name} must be text, got {getattr(self, name)!r}")
        if not isinstance(self.blocks, str | tuple):
            raise SpecError(f"blocks must be text such as '25-29', or a tuple of numbers, got {self.blocks!r}")
        if not self.is_basis:
            if self.degree is not None:
                raise SpecError(f"'{self.basis}' has no degree; leave it out")
            if self.basis == "drop" and self.hidden is not None:
                raise SpecError("'drop' has no hidden size; leave it out")
        else:
            self._check_basis()
            if self.form == "single" and (self.hidden is not None or self.params is not None):
                raise SpecError("form 'single' is one layer and has no hidden size; leave it out, or take form 'stack'")
        if self.form not in (*FORMS, *ADAPTERS):
            raise SpecError(unknown("form", self.form, [*FORMS, *ADAPTERS]))
        if self.constant not in CONSTANTS:
            raise SpecError(unknown("treatment of the constant", self.constant, CONSTANTS))
        if not self.is_basis and (self.form, self.constant) != ("stack", "bias"):
            raise SpecError(f"'{self.basis}' is no KAN: leave form and constant out")
        self._check_options()
        self._check_target()
        self._check_adapter()
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.hidden is not None and self.hidden < 1:
            raise SpecError(f"hidden must be at least 1, got {self.hidden}")

    def _check_basis(self) -> None:
        names = re.split("[+>]", self.basis)
        for name in names:
            if (family := name.partition(":")[0]) not in BASES:
                raise SpecError(unknown("basis", family, [*BASES, *NOT_BASES]))
        for part in self.basis.split(">"):
            read_mix(part, self.degree if len(names) == 1 or any(map(has_degree, part.split("+"))) else None)
        if self.degree is not None and not any(map(has_degree, names)):
            raise SpecError(f"'{self.basis}' has no degree; leave it out")

    def _check_options(self) -> None:
        for name in ("linear", "up", "scaled", "experts"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be true or false, got {getattr(self, name)!r}")
        glu = self.is_basis and self.form == "glu"
        if not glu and (self.groups is not None or self.up):
            raise SpecError("groups and up are for form 'glu'; leave them out")
        if (glu or not self.is_basis) and (self.linear or self.scaled):
            raise SpecError("linear and scaled are for KAN layers, which form 'glu' and controls have none of")
        if self.start != "auto":
            for phase in self.start.split("+"):
                if phase not in STARTS:
                    raise SpecError(unknown("start", phase, ["auto", *STARTS]))
            self._check_phases(self.start.split("+"))
        if self.start_steps < 1:
            raise SpecError(f"start_steps must be at least 1, got {self.start_steps}")
        if self.groups is not None and self.groups < 1:
            raise SpecError(f"groups must be at least 1, got {self.groups}")
        if self.params is not None:
            if self.hidden is not None or self.basis == "drop":
                raise SpecError("params chooses the hidden size: give one of the two, and not for 'drop'")
            number = isinstance(self.params, int) and not isinstance(self.params, bool)
            if not (number and self.params > 0) and self.params != "original":  # type: ignore[operator]
                raise SpecError(f"params should be a number above 0 or 'original', got {self.params!r}")

    def _check_target(self) -> None:
        if self.target not in TARGETS:
            raise SpecError(unknown("target", self.target, TARGETS))
        if self.activation not in ACTIVATIONS_KEPT:
            raise SpecError(unknown("treatment of the activation", self.activation, ACTIVATIONS_KEPT))
        if self.activation == "drop" and self.target != "linears":
            raise SpecError(f"target '{self.target}' has no activation to drop; leave it out, or take target 'linears'")
        if self.target == "feedforward":
            return
        if self.basis == "drop" or ">" in self.basis or self.form not in ("stack", *ADAPTERS) or self.experts:
            raise SpecError(
                f"target '{self.target}' puts a layer in a layer's place: no drop, sequential mix, form or experts"
            )
        if "attention" in self.parts and (self.hidden is not None or self.params is not None):
            raise SpecError("the widths of attention are its heads': leave hidden and params out")

    def _check_adapter(self) -> None:
        if not self.is_adapter:
            if self.rank is not None:
                raise SpecError(f"rank is for the forms {' and '.join(ADAPTERS)}; leave it out")
            return
        if self.target == "feedforward":
            raise SpecError(
                f"form '{self.form}' adds to single layers; take target linears, attention or both with a +"
            )
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank must be at least 1, got {self.rank}")
        if set(self.basis) & set("+>"):
            raise SpecError(f"'{self.basis}' is a mix, which form '{self.form}' has no place for")
        if self.start not in ("auto", "random"):
            raise SpecError(f"an adapter begins at zero: leave start '{self.start}' out")
        if self.hidden is not None or self.params is not None or self.scaled or self.activation == "drop":
            raise SpecError(
                f"form '{self.form}' leaves what is there: give rank, not hidden, params, scaled or activation"
            )
        if self.form == "adapter-code" and (self.linear or self.constant != "bias"):
            raise SpecError("form 'adapter-code' has no KAN layers: leave linear and constant out")

    def _check_phases(self, phases: list[str]) -> None:
        if "convert" in phases and len(phases) > 1:
            raise SpecError("start 'convert' stands alone")
        late = [phase for phase in phases[1:] if phase in ("random", "lstsq", "inherit")]
        if late or "sequence" in phases[:-1] or len(set(phases)) < len(phases):
            raise SpecError(
                f"start '{self.start}': random, lstsq and inherit can only come first, sequence only last, each once"
            )
        if "inherit" in phases and self.target != "feedforward":
            if not self.is_basis:
                raise SpecError("a linear layer that inherits would be the old one; take another start or a basis")
        elif "inherit" in phases and self.is_basis and self.form != "glu":
            raise SpecError(f"form '{self.form}' has no linear layers to inherit; take form 'glu', or another start")

    @property
    def is_basis(self) -> bool:
        """False for the two controls, "linear" and "drop"."""
        return self.basis not in NOT_BASES

    @property
    def is_adapter(self) -> bool:
        """Whether it adds to linear layers and leaves them as they are."""
        return self.form in ADAPTERS

    @property
    def parts(self) -> tuple[str, ...]:
        """What of a block it changes: of two retrofits of one part the later wins."""
        return PARTS[self.target]

    @property
    def needs_calibration(self) -> bool:
        """Whether some phase of its start looks at what the replaced modules do."""
        by_themselves = {"auto", "random", "convert"} | (set() if self.target == "feedforward" else {"inherit"})
        return bool(set(self.start.split("+")) - by_themselves)

    @property
    def family(self) -> str:
        """The basis without its arguments."""
        return self.basis.partition(":")[0]

    def resolved(self, block_count: int) -> KANSpec:
        """The same spec with its blocks as numbers, checked against a model of `block_count` blocks."""
        if isinstance(self.blocks, str):
            return dataclasses.replace(self, blocks=read_blocks(self.blocks, block_count))
        _check_blocks(self.blocks, block_count, str(self.blocks))
        return self

    def to_json(self) -> dict[str, Any]:
        blocks = self.blocks if isinstance(self.blocks, str) else list(self.blocks)
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in LATER or v != LATER[k]}
        return {"version": VERSION, **fields, "blocks": blocks}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KANSpec:
        """The spec that `to_json` wrote; SpecError where it is newer than this program or has fields unknown to it."""
        data = dict(data)
        version = data.pop("version", None)
        if isinstance(version, int) and version > VERSION:
            raise SpecError(
                f"this retrofit was written in version {version} of the format, by a newer kallm; this program reads "
                f"{VERSION}. Update it: pip install --upgrade kallm-bench"
            )
        if version != VERSION:
            raise SpecError(
                f"this retrofit was written in version {version} of the format, this program reads {VERSION}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if not {"blocks", "basis"} <= set(data) <= names:
            raise SpecError(f"a retrofit has the fields {sorted(names)}, this one has {sorted(data)}")
        blocks = data.pop("blocks")
        data = LATER | data
        return cls(blocks=blocks if isinstance(blocks, str) else tuple(blocks), **data)


def read_blocks(text: str, block_count: int) -> tuple[int, ...]:
    """Block numbers from "25-29", "0,3,5-7", "last:5" or "all".

    Raises:
        SpecError: malformed, out of range, doubled or reversed; the message says how many blocks there are.
    """
    if text == "all":
        return tuple(range(block_count))
    try:
        if text.startswith("last:"):
            count = int(text.removeprefix("last:"))
            blocks = tuple(range(max(block_count - count, -1), block_count))
        else:
            blocks = tuple(number for part in text.split(",") for number in _read_range(part, block_count))
    except ValueError:
        raise SpecError(
            f"cannot read blocks '{text}'; write 25-29, 0,3,5-7, last:5 or all ({_there(block_count)})"
        ) from None
    _check_blocks(blocks, block_count, text)
    return blocks


def _read_range(text: str, block_count: int) -> range:
    first, dash, last = text.partition("-")
    if not dash:
        return range(int(first), int(first) + 1)
    if int(first) > int(last):
        raise SpecError(f"blocks '{text}' run backwards; write {last}-{first} ({_there(block_count)})")
    if int(last) >= block_count:  # before the range is unrolled: nobody waits for 0-9999999999
        raise SpecError(f"blocks '{text}' reach outside: {_there(block_count)}")
    return range(int(first), int(last) + 1)


def _check_blocks(blocks: tuple[int, ...], block_count: int, text: str) -> None:
    there = _there(block_count)
    if not blocks:
        raise SpecError(f"blocks '{text}' name none; {there}")
    for block in blocks:
        if not 0 <= block < block_count:
            raise SpecError(f"blocks '{text}' reach outside: {there}")
    if len(set(blocks)) < len(blocks):
        twice = next(block for block in blocks if blocks.count(block) > 1)
        raise SpecError(f"blocks '{text}' name block {twice} twice; {there}")


def _there(block_count: int) -> str:
    return f"the model has {block_count} blocks, 0-{block_count - 1}"
