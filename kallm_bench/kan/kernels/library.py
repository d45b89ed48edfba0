"""A layer's three products as the library's own, on features that a pass writes into a bounded buffer.

Where the products are large, nothing beats the library's, and a pass more costs little. The buffer is filled and used
up chunk by chunk: of rows forward and for the input gradient, of channels for the coefficient gradient, which sums over
all rows and would otherwise be read and written once a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kallm_bench.kan.kernels import passes
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.plans import Library

LEAST_ROWS, LEAST_COLUMNS = 512, 256
"""Of a chunk: with fewer, a product would read its other operand again for next to nothing."""


def forward(x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, plan: Library) -> None:
    """Writes y (M, O) of x (M, I), coefficients (O, D, I) and bias (O,)."""
    weights = coefficients.flatten(1).T  # (D·I, O)
    for chunk, features in chunks(x, coefficients.dtype, family.functions, plan):
        passes.expand(x[chunk], features, family)
        if bias is None:
            torch.mm(features, weights, out=y[chunk])
        else:
            torch.addmm(bias, features, weights, out=y[chunk])


def input_gradient(x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, plan: Library) -> None:
    """Writes dx (M, I) of x (M, I), coefficients (O, D, I) and dy (M, O)."""
    weights = coefficients.flatten(1)  # (O, D·I)
    for chunk, gradients in chunks(x, coefficients.dtype, family.functions, plan):
        torch.mm(dy[chunk], weights, out=gradients)
        passes.combine(x[chunk], gradients, dx[chunk], family)


def coefficient_gradient(x: Tensor, dy: Tensor, dc: Tensor, family: Family, plan: Library) -> None:
    """Writes dc (O, D, I) of x (M, I) and dy (M, O)."""
    (M, I), (O, D, _) = x.shape, dc.shape
    for channels in channel_chunks(M, O, I, D, dy.dtype, plan):
        width = channels.stop - channels.start
        features = torch.empty((M, D * width), dtype=dy.dtype, device=x.device)
        passes.expand(x[:, channels], features, family)
        if width == I:
            torch.mm(dy.T, features, out=dc.view(O, D * I))
        else:
            dc[:, :, channels] = (dy.T @ features).view(O, D, width)


def chunks(x: Tensor, dtype: torch.dtype, functions: int, plan: Library) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows whose features fill the buffer, each with the part of it that it needs."""
    width = functions * x.shape[1]
    fitting = plan.buffer_bytes // (width * dtype.itemsize) // 128 * 128  # whole tiles of the library's
    length = max(1, min(len(x), max(fitting, LEAST_ROWS)))
    buffer = torch.empty((length, width), dtype=dtype, device=x.device)
    for start in range(0, len(x), length):
        stop = min(start + length, len(x))
        yield slice(start, stop), buffer[: stop - start]


def channel_chunks(M: int, O: int, I: int, D: int, dtype: torch.dtype, plan: Library) -> Iterator[slice]:
    """Runs of channels, each a power of two long, whose features and gradient fill the buffer."""
    fitting = plan.buffer_bytes // ((M + O) * D * dtype.itemsize)
    length = I if fitting >= I else 2 ** (max(1, fitting, -(-LEAST_COLUMNS // D)).bit_length() - 1)
    for start in range(0, I, length):
        yield slice(start, min(start + length, I))
