"""The KAN in a transformer block's feed-forward place: hidden_size in, hidden_size out, whatever is inside."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import make_basis
from kallm_bench.kan.layers import KANLinear

FORMS = {
    "stack": "two KAN layers, hidden_size -> hidden -> hidden_size",
    "single": "one KAN layer, hidden_size -> hidden_size",
}


class KANFeedForward(nn.Module):
    """KAN layers in place of a feed-forward module.

    Args:
        hidden_size: the model's width, in and out.
        hidden: the width between the two layers of a "stack"; not used by "single".
        basis: public name of the basis.
        degree: its degree; None for the family's own default, and for families without one.
        form: a key of FORMS.
        constant: see KANLinear.

    Shapes:
        x (..., hidden_size) -> (..., hidden_size)

    Raises:
        SpecError: unknown form, basis or constant, or a degree that the family cannot take.
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
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise SpecError(unknown("form", form, FORMS))
        widths = [hidden_size, hidden, hidden_size] if form == "stack" else [hidden_size, hidden_size]
        self.layers = nn.ModuleList(
            KANLinear(before, after, make_basis(basis, degree=degree), constant=constant)
            for before, after in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws every layer anew; N(0, 1) inputs give outputs of mean square about `gain`²."""
        for layer in self.layers:
            assert isinstance(layer, KANLinear)
            layer.reset_parameters(generator, gain if layer is self.layers[-1] else 1.0)
