"""How the kernels in which warps divide the work are cut for Hopper: tiles, rings and registers, as data alone.

Every plan here keeps what `hopper_kernels` needs: its tiles fit together, its rings are long enough, and all of them
fit into the shared memory that one program may have. A test counts them.
"""

from __future__ import annotations

from dataclasses import dataclass


class Ringed:
    """A plan that says for D = 1, 2, .. how its rings are cut, as far as shared memory and registers reach."""

    rings: tuple[tuple[int, int], ...]

    @property
    def degrees(self) -> int:
        """The most that it has room for."""
        return len(self.rings)


@dataclass(frozen=True)
class Specialised(Ringed):
    """A kernel of eight warps that multiply, and of others that expand what they multiply by.

    Args:
        rows, inputs: of a tile.
        outputs: of a tile: the widths of its two accumulators in the forward; in the coefficient gradient of its one.
        x_tiles: room for so many tiles of x.
        rings: for D = 1, 2, ..: room for so many tiles of features, and of the other operand. In the forward a tile of
            features is of one degree, and with room for D alone nothing would be expanded while the last step is
            multiplied; in the gradient it is of all degrees.
        expanders: warps that expand, 4 or 8.
        registers: of each of their threads. What is left goes to the threads that multiply.
        at_once: rows of a tile that they expand together; the more, the better one value's delay hides another's.
        persistent: whether a program makes one tile after another, and writes one while it makes the next.
    """

    rows: int
    outputs: tuple[int, ...]
    inputs: int
    x_tiles: int
    rings: tuple[tuple[int, int], ...]
    expanders: int
    registers: int
    at_once: int
    persistent: bool = False


@dataclass(frozen=True)
class Piped:
    """The input gradient's kernel for Hopper.

    Args:
        pieces: of 64 inputs, in a tile of 128 rows.
        stages: how many tiles of dy and coefficients are on their way at once.
        programs: on a processor; two share its registers.
        degrees: the most that there are registers and shared memory for.
    """

    pieces: int
    stages: int
    programs: int
    degrees: int


@dataclass(frozen=True)
class Halved(Ringed):
    """The forward in which two groups of four warps have half a tile's rows each, and expand what they multiply by.

    Args:
        rows, outputs, inputs: of a tile; outputs are the widths of its one or two accumulators.
        rings: for D = 1, 2, ..: room for so many steps, each a tile of x and its coefficients, and in each group for
            so many pieces of y. A step reads the x of the next, so with fewer than three nothing is on its way.
    """

    rows: int
    outputs: tuple[int, ...]
    inputs: int
    rings: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HalvedGradient(Ringed):
    """The coefficient gradient in which two groups of four warps, of 64 inputs each, expand what they multiply by.

    Args:
        outputs, inputs: of a tile; outputs are the widths of a degree's one or two accumulators. With 128 inputs the
            groups have different ones, with 64 they have different rows.
        rings: for D = 1, 2, ..: the rows of a step that a group multiplies by, and room for so many steps.
    """

    outputs: tuple[int, ...]
    inputs: int
    rings: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LocalHalved:
    """As Halved, for B-splines or Gaussians, of which a step has one; any number of them.

    Args:
        rows, outputs, inputs: as in Halved.
        stages: room for the coefficients of so many steps.
        pieces: room in each group for so many pieces of y.
    """

    rows: int
    outputs: tuple[int, ...]
    inputs: int
    stages: int
    pieces: int


@dataclass(frozen=True)
class LocalHalvedGradient:
    """As HalvedGradient, for B-splines or Gaussians: of 64 inputs each of the two groups has one function.

    Args:
        outputs: the widths of a function's one or two accumulators.
        rows: of a step.
        stages: room for so many steps.
    """

    outputs: tuple[int, ...]
    rows: int
    stages: int


@dataclass(frozen=True)
class LocalPiped:
    """The input gradient for B-splines or Gaussians, in tiles of 128 rows.

    Args:
        pieces: of 64 inputs, in a tile.
        blocks: of 64 outputs, as many of dy as shared memory keeps for all functions.
        stages: room for so many steps, the coefficients of 64 outputs.
    """

    pieces: int
    blocks: int
    stages: int


# A name says rows x outputs x inputs of a tile. Where a degree is missing, ptxas spills, or three steps do not fit.
HALVED: dict[str, Halved] = {
    "halves-128x192x32": Halved(128, (128, 64), 32, ((8, 4), (6, 4), (4, 4), (3, 4))),
    "halves-128x256x32": Halved(128, (256,), 32, ((8, 4), (5, 3), (3, 4), (3, 1))),
    "halves-128x288x32": Halved(128, (256, 32), 32, ((7, 4), (4, 4), (3, 4))),
    "halves-128x384x32": Halved(128, (256, 128), 32, ((6, 4), (3, 4))),
}

# The same, of one function at a time. Stages are as many as fit.
LOCAL_HALVED: dict[str, LocalHalved] = {
    "local-halves-128x192x64": LocalHalved(128, (128, 64), 64, 6, 4),
    "local-halves-128x256x64": LocalHalved(128, (256,), 64, 5, 3),
    "local-halves-128x288x32": LocalHalved(128, (256, 32), 32, 9, 4),
    "local-halves-128x384x32": LocalHalved(128, (256, 128), 32, 7, 4),
}

# A name says outputs of a tile x rows of a step.
LOCAL_HALVED_GRADIENTS: dict[str, LocalHalvedGradient] = {
    "local-halves-128x64": LocalHalvedGradient((128,), 64, 9),
    "local-halves-192x64": LocalHalvedGradient((128, 64), 64, 6),
    "local-halves-256x64": LocalHalvedGradient((256,), 64, 5),
    "local-halves-288x64": LocalHalvedGradient((256, 32), 64, 4),
    "local-halves-384x32": LocalHalvedGradient((256, 128), 32, 7),
}

# A name says inputs of a tile x outputs of dy that stay.
LOCAL_PIPED: dict[str, LocalPiped] = {
    "local-pipe-128x256": LocalPiped(2, 4, 7),
    "local-pipe-128x384": LocalPiped(2, 6, 5),
    "local-pipe-64x384": LocalPiped(1, 6, 12),
}

# A name says outputs x inputs of a tile. Each degree takes registers for its sums, and twice for its features: steps
# are as high as what is left lets them be, or in "low" ones half as high. There is room for as many as fit, up to 16.
HALVED_GRADIENTS: dict[str, HalvedGradient] = {
    "halves-64x128": HalvedGradient((64,), 128, ((64, 9), (64, 9), (32, 16), (32, 16))),
    "halves-96x128": HalvedGradient((64, 32), 128, ((64, 8), (32, 16), (32, 16), (16, 16))),
    "halves-128x128": HalvedGradient((128,), 128, ((64, 7), (64, 7), (16, 16))),
    "halves-128x128-low": HalvedGradient((128,), 128, ((32, 14), (32, 14))),
    "halves-192x128": HalvedGradient((128, 64), 128, ((64, 5), (32, 11))),
    "halves-256x128": HalvedGradient((256,), 128, ((64, 4),)),
    "halves-64x64": HalvedGradient((64,), 64, ((64, 7), (64, 7), (32, 14), (32, 14))),
    "halves-96x64": HalvedGradient((64, 32), 64, ((64, 5), (32, 11), (32, 11), (16, 16))),
    "halves-128x64": HalvedGradient((128,), 64, ((64, 4), (64, 4), (16, 16))),
    "halves-128x64-low": HalvedGradient((128,), 64, ((32, 9), (32, 9))),
    "halves-192x64": HalvedGradient((128, 64), 64, ((32, 7), (32, 7))),
}

# A name says rows x outputs x inputs of a tile. Rings are as long as shared memory lets them be, features first, until
# two steps of them fit. Outputs of 384 and 288 leave nothing over in layers of 384, 576 and 1536; wider tiles than 384
# would not leave a thread the registers to multiply.
SPECIALISED: dict[str, dict[str, Specialised]] = {
    "forward": {
        "warps-128x384x32": Specialised(
            rows=128, outputs=(256, 128), inputs=32, x_tiles=2, rings=((6, 6), (6, 6), (6, 6), (8, 5)),
            expanders=4, registers=40, at_once=64,
        ),
        "warps-128x384x32-persistent": Specialised(
            rows=128, outputs=(256, 128), inputs=32, x_tiles=2, rings=((4, 5), (4, 5), (6, 5), (7, 5)),
            expanders=4, registers=40, at_once=64, persistent=True,
        ),
        "warps-128x288x64": Specialised(
            rows=128, outputs=(256, 32), inputs=64, x_tiles=1, rings=((4, 3), (4, 3), (5, 3), (6, 3)),
            expanders=4, registers=56, at_once=32,
        ),
        "warps-128x288x64-persistent": Specialised(
            rows=128, outputs=(256, 32), inputs=64, x_tiles=1, rings=((4, 3), (4, 3), (5, 2), (6, 2)),
            expanders=4, registers=56, at_once=32, persistent=True,
        ),
        "warps-128x288x32-persistent": Specialised(
            rows=128, outputs=(256, 32), inputs=32, x_tiles=2, rings=((4, 6), (4, 6), (6, 6), (8, 6)),
            expanders=4, registers=56, at_once=64, persistent=True,
        ),
    },
    "coefficient_gradient": {
        "warps-64x128x64": Specialised(
            rows=64, outputs=(128,), inputs=64, x_tiles=2, rings=((3, 4), (3, 4), (3, 4), (3, 4)),
            expanders=8, registers=72, at_once=64,
        ),
        "warps-64x256x64": Specialised(
            rows=64, outputs=(256,), inputs=64, x_tiles=2, rings=((3, 4), (3, 4)),
            expanders=8, registers=72, at_once=64,
        ),
    },
}  # fmt: skip
