"""Kolmogorov-Arnold layers for PyTorch: tensors in, tensors out, no language model in sight."""

from kallm_bench.kan.adapter import ADAPTERS, LowRankKAN
from kallm_bench.kan.bases import BASES, Basis, make_basis
from kallm_bench.kan.feedforward import FORMS, KANFeedForward
from kallm_bench.kan.layers import CONSTANTS, GroupFunction, GroupKANLinear, KANLinear, ParallelKANLinear
from kallm_bench.kan.ops import kan_linear

__all__ = [
    "ADAPTERS",
    "BASES",
    "CONSTANTS",
    "FORMS",
    "Basis",
    "GroupFunction",
    "GroupKANLinear",
    "KANFeedForward",
    "KANLinear",
    "LowRankKAN",
    "ParallelKANLinear",
    "kan_linear",
    "make_basis",
]
