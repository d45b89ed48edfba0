"""A KAN in the place of LoRA: a narrow way beside a matrix that stays as it is, adding what the matrix cannot do.

LoRA adds B A x to W x, with A (r, I) and B (O, r). There are two ways to put a KAN in that place, and both are here.

"adapter" has a KAN layer in the place of A and another in the place of B. That is what the published experiment tried,
with a negative result, and what public code for a "KAN LoRA" does, such as the package kolmg-lora. Every edge has a
function, so a rank costs as many times more as there are functions, and a budget buys so much less of it.

"adapter-code" keeps both matrices and learns a function for each channel of the code A x between them: B f(A x), with
f(z) = z + Σ_k c_k B_k(squash(z)). It holds LoRA as the case that nothing is bent and costs r functions more, so it
tells at equal rank whether bending is worth anything. AuroRA (arXiv:2505.18738) bends there too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import make_basis
from kallm_bench.kan.layers import GroupFunction, KANLinear

ADAPTERS = {
    "adapter": "beside a linear layer, which stays: two KAN layers, in -> rank -> out, in the place of LoRA's matrices",
    "adapter-code": "the same with LoRA's two matrices, and a learned function for each channel between them",
}
"""Forms that add to a linear layer, where the others replace what was there."""

ALPHA = 32
"""Over the width of what the last matrix takes, how many times the change counts: LoRA's alpha as training has it."""


class LowRankKAN(nn.Module):
    """What is added to a linear layer's output: zero at first.

    The rest starts as LoRA does: the code of N(0, 1) inputs has mean square 1/3, and the change counts
    ALPHA / (width of what the last matrix takes) times, so that arms of equal size learn alike at one rate.

    Args:
        in_features, out_features: I and O of the layer.
        rank: r, how many channels the code has.
        basis: public name of one basis.
        degree: for families that have one; None for their own defaults.
        form: a key of ADAPTERS.
        constant, linear: see KANLinear; for "adapter".

    Shapes:
        x (..., I) -> (..., O)

    Raises:
        SpecError: unknown form, basis or constant; a rank that the basis's groups do not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        basis: str,
        *,
        degree: int | None = None,
        form: str = "adapter",
        constant: str = "bias",
        linear: bool = False,
    ) -> None:
        super().__init__()
        if form not in ADAPTERS:
            raise SpecError(unknown("form", form, ADAPTERS))
        self.encode: KANLinear | nn.Linear
        self.decode: KANLinear | nn.Linear
        self.function: GroupFunction | None = None
        if form == "adapter":
            first, second = (make_basis(basis, degree=degree) for _ in range(2))
            self.encode = KANLinear(in_features, rank, first, constant=constant, linear=linear)
            self.decode = KANLinear(rank, out_features, second, constant=constant, linear=linear, bias=False)
            width = rank * (self.decode.coefficients.shape[1] + linear)
        else:
            family = make_basis(basis, degree=degree)
            self.encode = nn.Linear(in_features, rank, bias=False)
            self.function = GroupFunction(rank, family, family.groups or rank)
            self.decode = nn.Linear(rank, out_features, bias=False)
            width = rank
        self.scaling = ALPHA / width
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.encode(x)
        if self.function is not None:
            code = code + self.function(code)
        change: Tensor = self.decode(code)
        return change * self.scaling

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws what makes the code anew, and sets to zero what bends it and what takes it."""
        if next(self.parameters()).is_meta:
            return
        gain = 3**-0.5
        if isinstance(self.encode, KANLinear):
            self.encode.reset_parameters(generator, gain)
        else:
            drawn = torch.randn(self.encode.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            self.encode.weight.copy_(drawn * gain / self.encode.in_features**0.5)
        if self.function is not None:
            self.function.reset_parameters()
            if self.function.coefficients is None:
                self.function.basis.start_at_zero()
        if isinstance(self.decode, KANLinear):
            self.decode.reset_parameters(generator)  # the basis's own parameters
            self.decode.coefficients.zero_()
            if self.decode.linear is not None:
                self.decode.linear.zero_()
        else:
            self.decode.weight.zero_()
