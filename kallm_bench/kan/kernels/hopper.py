"""Launches the kernels for Hopper, by the plans of `hopper_plans`."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from kallm_bench.kan.kernels import passes
from kallm_bench.kan.kernels.bells import bell
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.hopper_plans import (
    Halved,
    HalvedGradient,
    LocalHalved,
    LocalHalvedGradient,
    LocalPiped,
    Piped,
    Specialised,
)

PIECE = 64
"""Columns of y that a persistent program writes at once."""
SMALL_PIECE = 32
"""Columns of y that one of a program's two groups writes at once."""


def forward(
    x: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    y: Tensor,
    family: Family,
    plan: Specialised | Halved | LocalHalved,
) -> None:
    """Writes y (M, O) of x (M, I), coefficients (O, D, I) and bias (O,).

    A family of polynomials with D at most plan.degrees, or for the plans of their own one that has a `bell`; M > 0, on
    a Hopper GPU; all but the bias as `fused.reachable` says.
    """
    if isinstance(plan, LocalHalved):
        _forward_local(x, coefficients, bias, y, family, plan)
    elif isinstance(plan, Halved):
        _forward_in_halves(x, coefficients, bias, y, family, plan)
    else:
        _forward_specialised(x, coefficients, bias, y, family, plan)


def _forward_specialised(
    x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, plan: Specialised
) -> None:
    (M, I), O, (wide, narrow) = x.shape, len(coefficients), plan.outputs
    kernels, (features, ring) = _kernels(), plan.rings[family.functions - 1]
    tiles = triton.cdiv(M, plan.rows) * triton.cdiv(O, wide + narrow)
    # A program orders coefficients as far ahead as their ring is long. If that were further than its next tile, it gets
    # no next tile: so few inputs make so small a tile that starting a program for it costs nothing worth saving.
    reach = triton.cdiv(ring, family.functions) * plan.inputs
    programs = min(tiles, _processors(x.device)) if plan.persistent and reach <= I else tiles
    # Where y goes through the ring of coefficients it is swizzled no further than that, whose alignment it shares.
    widths, swizzle = ((PIECE, min(PIECE, narrow)), 128) if plan.persistent else ((wide, narrow), 2 * plan.inputs)
    read = y if bias is None else bias  # without a bias nothing is read there
    kernels.forward[(programs,)](
        _matrix(x, plan.rows, plan.inputs), _matrix(coefficients, wide, 1, plan.inputs),
        _matrix(coefficients, narrow, 1, plan.inputs), _matrix(y, plan.rows, widths[0], swizzle=swizzle),
        _matrix(y, plan.rows, widths[1], swizzle=swizzle), read, M, I, O, BIAS=bias is not None,
        WIDE=wide, NARROW=narrow, FS=features, CS=ring, PERSISTENT=plan.persistent,
        **_options(x, family, plan),
    )  # fmt: skip


def _forward_in_halves(
    x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, plan: Halved
) -> None:
    from kallm_bench.kan.kernels import hopper_halves  # Gluon; see hopper_kernels

    (M, I), O = x.shape, len(coefficients)
    stages, pieces = plan.rings[family.functions - 1]
    tiles = triton.cdiv(M, plan.rows) * triton.cdiv(O, sum(plan.outputs))
    hopper_halves.forward[(min(tiles, _processors(x.device)),)](
        _matrix(x, plan.rows, plan.inputs), _matrix(coefficients, plan.outputs[0], 1, plan.inputs),
        _matrix(coefficients, plan.outputs[-1], 1, plan.inputs), _matrix(y, plan.rows // 2, SMALL_PIECE),
        y if bias is None else bias, M, I, O, FIRST=family.first, R=family.steps, SQUASH=family.squash,
        BITS=passes.bits_of(x.dtype), BIAS=bias is not None, WIDTHS=plan.outputs, STAGES=stages, PIECES=pieces,
        num_warps=4,  # those of a group; Triton adds the others
    )  # fmt: skip


def _forward_local(
    x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, plan: LocalHalved
) -> None:
    from kallm_bench.kan.kernels import hopper_local  # Gluon; see hopper_kernels

    (M, I), (O, K, _) = x.shape, coefficients.shape
    tiles = triton.cdiv(M, plan.rows) * triton.cdiv(O, sum(plan.outputs))
    hopper_local.forward[(min(tiles, _processors(x.device)),)](
        _matrix(x, plan.rows, plan.inputs), _matrix(coefficients, plan.outputs[0], 1, plan.inputs),
        _matrix(coefficients, plan.outputs[-1], 1, plan.inputs), _matrix(y, plan.rows // 2, SMALL_PIECE),
        y if bias is None else bias, M, I, O, K, BIAS=bias is not None, WIDTHS=plan.outputs, STAGES=plan.stages,
        PIECES=plan.pieces, **_local_options(x, family),
    )  # fmt: skip


def coefficient_gradient(
    x: Tensor, dy: Tensor, dc: Tensor, family: Family, plan: Specialised | HalvedGradient | LocalHalvedGradient
) -> None:
    """Writes dc (O, D, I), contiguous, of x (M, I) and dy (M, O), on the terms of `forward`; the same bits each time.

    The rows go in as many parts as keep every processor busy once, which are added in the same order each time.
    """
    (M, I), (O, D, _) = x.shape, dc.shape
    if isinstance(plan, LocalHalvedGradient):
        step, tiles = plan.rows, triton.cdiv(I, 64) * triton.cdiv(D, 2)
    else:
        step = plan.rings[D - 1][0] * 128 // plan.inputs if isinstance(plan, HalvedGradient) else plan.rows
        tiles = triton.cdiv(I, plan.inputs)
    tiles *= triton.cdiv(O, sum(plan.outputs))
    span = triton.cdiv(triton.cdiv(M, max(1, _processors(x.device) // tiles)), step) * step
    count = triton.cdiv(M, span)
    parts = dc[None] if count == 1 else torch.empty((count, O, D, I), dtype=torch.float32, device=x.device)
    if isinstance(plan, LocalHalvedGradient):
        _gradient_local(x, dy, parts, span, tiles, family, plan)
    elif isinstance(plan, HalvedGradient):
        _gradient_in_halves(x, dy, parts, span, tiles, family, plan)
    else:
        _gradient_specialised(x, dy, parts, span, tiles, family, plan)
    if count > 1:
        passes.add_parts(parts, dc)


def _gradient_specialised(
    x: Tensor, dy: Tensor, parts: Tensor, span: int, tiles: int, family: Family, plan: Specialised
) -> None:
    (count, O, D, I), (width,) = parts.shape, plan.outputs
    kernels, (features, ring) = _kernels(), plan.rings[D - 1]
    kernels.coefficient_gradient[(count * tiles,)](
        _matrix(x, plan.rows, plan.inputs), _matrix(dy, plan.rows, width), parts, len(x), I, O, span, BO=width,
        GROUP=2 if D % 2 == 0 else 1, FS=features, CS=ring, **_options(x, family, plan),
    )  # fmt: skip


def _gradient_in_halves(
    x: Tensor, dy: Tensor, parts: Tensor, span: int, tiles: int, family: Family, plan: HalvedGradient
) -> None:
    from kallm_bench.kan.kernels import hopper_halves_gradient  # Gluon; see hopper_kernels

    rows, stages = plan.rings[family.functions - 1]
    hopper_halves_gradient.coefficient_gradient[(len(parts) * tiles,)](
        _matrix(x, rows, 64), _matrix(dy, rows, plan.outputs[0]), _matrix(dy, rows, plan.outputs[-1]), parts,
        *x.shape, dy.shape[1], span, FIRST=family.first, R=family.steps, SQUASH=family.squash,
        BITS=passes.bits_of(x.dtype), WIDTHS=plan.outputs, RINGS=128 // plan.inputs, STAGES=stages,
        num_warps=4,  # those of a group; Triton adds the others
    )  # fmt: skip


def _gradient_local(
    x: Tensor, dy: Tensor, parts: Tensor, span: int, tiles: int, family: Family, plan: LocalHalvedGradient
) -> None:
    from kallm_bench.kan.kernels import hopper_local  # Gluon; see hopper_kernels

    count, O, K, I = parts.shape
    hopper_local.coefficient_gradient[(count * tiles,)](
        _matrix(x, plan.rows, 64), _matrix(dy, plan.rows, plan.outputs[0]), _matrix(dy, plan.rows, plan.outputs[-1]),
        parts, len(x), I, O, K, span, WIDTHS=plan.outputs, STAGES=plan.stages, **_local_options(x, family),
    )  # fmt: skip


def input_gradient(
    x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, plan: Piped | LocalPiped
) -> None:
    """Writes dx (M, I) of x (M, I), coefficients (O, D, I) and dy (M, O), on the terms of `forward`."""
    if isinstance(plan, LocalPiped):
        _input_gradient_local(x, coefficients, dy, dx, family, plan)
    else:
        _input_gradient_piped(x, coefficients, dy, dx, family, plan)


def _input_gradient_local(
    x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, plan: LocalPiped
) -> None:
    from kallm_bench.kan.kernels import hopper_local  # Gluon; see hopper_kernels

    (M, I), (O, K, _), width = x.shape, coefficients.shape, plan.pieces * PIECE
    tiles_m, tiles_i = triton.cdiv(M, 128), triton.cdiv(I, width)
    splits = min(tiles_i, max(1, _processors(x.device) // tiles_m))  # programs to a tile of rows
    hopper_local.input_gradient[(tiles_m * splits,)](
        _matrix(x, 64, width), _matrix(coefficients, PIECE, 1, PIECE), _matrix(dy, 64, PIECE),
        _matrix(dx, 64, SMALL_PIECE), M, I, O, K, splits, BLOCKS=plan.blocks, STAGES=plan.stages,
        **_local_options(x, family),
    )  # fmt: skip


def _input_gradient_piped(x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, plan: Piped) -> None:
    from kallm_bench.kan.kernels import hopper_slopes  # Gluon; see hopper_kernels

    (M, I), O, rows = x.shape, len(coefficients), 128
    tiles = triton.cdiv(M, rows) * triton.cdiv(I, plan.pieces * PIECE)
    hopper_slopes.input_gradient[(min(tiles, plan.programs * _processors(x.device)),)](
        _matrix(x, rows, PIECE), _matrix(coefficients, PIECE, 1, PIECE), _matrix(dy, rows, PIECE),
        _matrix(dx, rows, PIECE), M, I, O, FIRST=family.first, R=family.steps, SQUASH=family.squash,
        BITS=passes.bits_of(x.dtype), PIECES=plan.pieces, RUNS=_runs(plan.pieces * family.functions),
        STAGES=plan.stages, num_warps=8, maxnreg=128 if plan.programs > 1 else None,
    )  # fmt: skip


def _runs(blocks: int) -> tuple[tuple[int, int], ...]:
    """Blocks in runs of 4, 2 or 1, the most that share a product: (how many, number of the first) each."""
    runs, first = [], 0
    while first < blocks:
        size = next(size for size in (4, 2, 1) if size <= blocks - first)
        runs.append((size, first))
        first += size
    return tuple(runs)


def _kernels() -> ModuleType:
    from kallm_bench.kan.kernels import hopper_kernels  # Gluon; see there

    return hopper_kernels


def _options(x: Tensor, family: Family, plan: Specialised) -> dict[str, Any]:
    return {
        "FIRST": family.first,
        "R": family.steps,
        "SQUASH": family.squash,
        "BITS": passes.bits_of(x.dtype),
        "BM": plan.rows,
        "BI": plan.inputs,
        "XS": plan.x_tiles,
        "ROWS": plan.at_once,
        "EXPANDERS": plan.expanders,
        "REGISTERS": plan.registers,
        "num_warps": 8,  # those that multiply; Triton adds the others
    }


def _local_options(x: Tensor, family: Family) -> dict[str, Any]:
    shape = bell(family)
    assert shape
    return {
        "ORDER": shape.order,
        "STEPS": shape.steps,
        "ZERO": shape.zero,
        "SQUASH": family.squash,
        "BITS": passes.bits_of(x.dtype),
        "num_warps": 4,  # those of a group; Triton adds the others
    }


def _matrix(tensor: Tensor, *block: int, swizzle: int = 128) -> Any:
    """A descriptor of a tensor of two bytes an element: in tiles of this size, swizzled as tensor cores want it."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(min(swizzle, 2 * block[-1]), 16, len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
