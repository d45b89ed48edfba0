"""The KAN in a transformer block's feed-forward place: hidden_size in, hidden_size out, whatever is inside."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import make_basis
from kallm_bench.kan.layers import GroupFunction, KANLinear, ParallelKANLinear, make_layer

FORMS = {
    "stack": "two KAN layers, hidden_size -> hidden -> hidden_size; one a basis in a sequential mix 'a>b>c'",
    "single": "one KAN layer, hidden_size -> hidden_size",
    "gated": "two KAN layers hidden_size -> hidden, multiplied, then a matrix",
    "glu": "SwiGLU's three matrices, with a learned function for each channel group added to its activation",
}


class KANFeedForward(nn.Module):
    """KAN layers in place of a feed-forward module.

    Args:
        hidden_size: the model's width, in and out.
        hidden: the inner width; not used by "single".
        basis: public name of the basis; "a+b" is a parallel mix, and in a "stack" "a>b" a sequential one.
        degree: for families that have one; None for their own defaults.
        form: a key of FORMS.
        constant, linear, scaled: see KANLinear; not for "glu".
        groups: see GroupFunction; for "glu" alone.
        up: whether the up path of a "glu" has a learned function as well.
        activation: the name of the activation that "glu" adds to, or that a basis learned by itself starts as.

    Shapes:
        x (..., hidden_size) -> (..., hidden_size)

    Raises:
        SpecError: unknown form, basis or constant; a degree that the family cannot take; a mix that the form cannot.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden: int,
        basis: str,
        *,
        degree: int | None = None,
        form: str = "stack",
        constant: str = "bias",
        linear: bool = False,
        scaled: bool = False,
        groups: int | None = None,
        up: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise SpecError(unknown("form", form, FORMS))
        bases = basis.split(">")
        if len(bases) > 1 and form != "stack":
            raise SpecError(f"'{basis}' is a sequential mix, which needs form 'stack'; '{form}' has one kind of layer")
        self.form, self.activation = form, activation

        def layer(before: int, after: int, name: str) -> KANLinear | ParallelKANLinear:
            return make_layer(before, after, name, degree=degree, constant=constant, linear=linear, scaled=scaled)

        if form in ("stack", "single"):
            if form == "stack" and len(bases) == 1:
                bases = bases * 2
            widths = [hidden_size, *[hidden] * (len(bases) - 1), hidden_size]
            self.layers = nn.ModuleList(layer(*pair, name) for pair, name in zip(pairwise(widths), bases, strict=True))
        elif form == "gated":
            self.gate, self.up = layer(hidden_size, hidden, basis), layer(hidden_size, hidden, basis)
            self.down = nn.Linear(hidden, hidden_size)
        else:
            if "+" in basis:
                raise SpecError(f"'{basis}' is a parallel mix, which form 'glu' has no place for")
            function = make_basis(basis, degree=degree)
            self.gate_proj, self.up_proj = (nn.Linear(hidden_size, hidden, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(hidden, hidden_size, bias=False)
            self.gate_function = GroupFunction(hidden, function, groups)
            self.up_function = GroupFunction(hidden, copy.deepcopy(function), groups) if up else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.form in ("stack", "single"):
            for layer in self.layers:
                x = layer(x)
            return x
        output = self.down if self.form == "gated" else self.down_proj
        y: Tensor = output(self.inner(x))
        return y

    def inner(self, x: Tensor) -> Tensor:
        """What the last matrix of "gated" and "glu" takes: (..., hidden_size) -> (..., hidden)."""
        if self.form == "gated":
            product: Tensor = self.gate(x) * self.up(x)
            return product
        gate: Tensor = self.gate_proj(x)
        up: Tensor = self.up_proj(x)
        gate = ACTIVATIONS[self.activation](gate) + self.gate_function(gate)
        if self.up_function is not None:
            up = up + self.up_function(up)
        return gate * up

    def kan_layers(self) -> list[KANLinear]:
        """Every layer of functions on edges, in the order of the parameters; the parts of a mix one by one."""
        return [layer for layer in self.modules() if isinstance(layer, KANLinear)]

    def linear_layers(self) -> list[nn.Linear]:
        """Every plain matrix."""
        return [layer for layer in self.modules() if isinstance(layer, nn.Linear)]

    def input_layers(self) -> list[KANLinear]:
        """Those of them that take the module's own input, or a part of it."""
        if self.form in ("stack", "single"):
            first = self.layers[0]
            return [layer for layer in first.modules() if isinstance(layer, KANLinear)]
        return self.kan_layers()

    def inner_layer(self) -> KANLinear | ParallelKANLinear | None:
        """The layer of functions before the last one, where there is one and it takes the module's own input."""
        if self.form == "stack" and len(self.layers) == 2:
            layer = self.layers[0]
        elif self.form == "gated":
            layer = self.gate
        else:
            return None
        assert isinstance(layer, KANLinear | ParallelKANLinear)
        return layer

    @torch.no_grad()
    def let_inner_through(self) -> None:
        """Makes what multiplies the inner layer of "gated" nearly 1: a tenth of what was drawn, and a constant."""
        if self.form != "gated":
            return
        for layer in self.up.modules():
            if isinstance(layer, KANLinear):
                scale_layer(layer, 0.1)
        first = next(layer for layer in self.up.modules() if isinstance(layer, KANLinear))
        first.add_constant(1.0)

    @property
    def has_constant(self) -> bool:
        """Whether the last layer can add a constant."""
        return self.form != "glu"

    def output_features(self, x: Tensor) -> Tensor:
        """What the last layer's coefficients multiply: (..., hidden_size) -> (..., F)."""
        if self.form not in ("stack", "single"):
            return self.inner(x)
        *others, last = self.layers
        for layer in others:
            x = layer(x)
        assert isinstance(last, KANLinear | ParallelKANLinear)
        return last.features(x)

    @torch.no_grad()
    def load_output(self, matrix: Tensor, bias: Tensor) -> None:
        """Sets the last layer so that forward(x) is `output_features(x) @ matrix.T + bias`. (O, F) and (O,)."""
        last = self.last()
        if isinstance(last, KANLinear | ParallelKANLinear):
            last.load_matrix(matrix, bias)
            return
        last.weight.copy_(matrix)
        if last.bias is not None:
            last.bias.copy_(bias)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiplies the last layer's coefficients by a number."""
        last = self.last()
        for layer in last.modules():
            if isinstance(layer, KANLinear):
                scale_layer(layer, factor)
            elif isinstance(layer, nn.Linear):
                layer.weight.mul_(factor)

    def last(self) -> KANLinear | ParallelKANLinear | nn.Linear:
        """The layer that gives the output."""
        if self.form in ("stack", "single"):
            layer = self.layers[-1]
            assert isinstance(layer, KANLinear | ParallelKANLinear)
            return layer
        return self.down if self.form == "gated" else self.down_proj

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws every layer anew; N(0, 1) inputs give outputs of mean square about `gain`²."""
        if next(self.parameters()).is_meta:
            return
        if self.form in ("stack", "single"):
            for layer in self.layers:
                assert isinstance(layer, KANLinear | ParallelKANLinear)
                layer.reset_parameters(generator, gain if layer is self.layers[-1] else 1.0)
            return
        if self.form == "gated":
            self.gate.reset_parameters(generator)
            self.up.reset_parameters(generator)
        else:
            self.reset_functions()
            _draw(self.gate_proj, generator, 1.0)
            _draw(self.up_proj, generator, 1.0)
        share = self._inner_mean_square(generator)  # a product of few random functions is far from its expectation
        output = self.last()
        assert isinstance(output, nn.Linear)
        _draw(output, generator, gain / share**0.5)

    def _inner_mean_square(self, generator: torch.Generator | None) -> float:
        """E[inner(x)²] over 512 rows of N(0, 1)."""
        like = next(self.parameters())
        width = self.last().out_features
        x = torch.randn((512, width), generator=generator, dtype=torch.float32, device="cpu").to(like)
        return float(self.inner(x).float().square().mean())

    def reset_functions(self) -> None:
        """The learned functions of a "glu" as they start: at zero, so that the whole computes what SwiGLU does."""
        for function in (self.gate_function, self.up_function):
            if function is not None:
                function.reset_parameters()
                if function.coefficients is None:
                    function.basis.start_at_zero()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "identity": lambda x: x,
}
"""What stands between the matrices of a gated feed-forward, by name."""


@torch.no_grad()
def scale_layer(layer: KANLinear, factor: float) -> None:
    """Multiplies every coefficient of a layer, the linear path's too, by a number."""
    layer.coefficients.mul_(factor)
    if layer.linear is not None:
        layer.linear.mul_(factor)


def _draw(layer: nn.Linear, generator: torch.Generator | None, gain: float) -> None:
    drawn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    layer.weight.copy_(drawn * gain / layer.in_features**0.5)
    if layer.bias is not None:
        layer.bias.zero_()
